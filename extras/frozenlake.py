"""FrozenLake: cross slippery ice to the goal, with the paper's symbols and budgets (arXiv 2605.14558, after RAGEN)."""

from functools import lru_cache
from itertools import product

from env import MOVES, Env, check_integers, shortest_path
from extras.facts import grid_pattern, relations


class FrozenLake(Env):
    """Walk over slippery ice to the goal: reward 1 there, 0 elsewhere; a hole ends the episode.

    size: side of the map; frozen: probability that a tile is ice and not a hole; intended: probability that a move goes
    where it was meant to, the rest is split between the two perpendicular directions. Start and goal lie anywhere; maps
    are drawn until a path within the budget exists.
    """

    actions = ("Left", "Down", "Right", "Up")
    intro = ("You are walking over a frozen lake to the goal. The ice is slippery: a move may go sideways instead.\n"
             "Symbols: P player, _ ice, O hole, G goal, X player in hole, √ player on goal.\n"
             "Falling into a hole ends the game.")
    move_facts = ("is the edge", "is a hole", "is the goal")
    fact_pattern = grid_pattern(*move_facts)

    def __init__(self, *, size=4, frozen=0.9, intended=0.8, **budgets):
        super().__init__(**budgets)
        check_integers(2, size=size)
        for option, value in (("frozen", frozen), ("intended", intended)):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
                raise ValueError(f"{option} must be a number in [0, 1], got {value!r}")
        if not frozen:
            raise ValueError("frozen must be above 0: nobody can cross a lake of holes")
        self.size, self.frozen, self.intended = size, frozen, intended

    def instance(self):
        cells = list(product(range(self.size), repeat=2))
        for _ in range(10_000):
            start, goal = self.rng.choice(len(cells), size=2, replace=False)
            self.player = self.start = cells[start]
            self.goal = cells[goal]
            self.holes = frozenset(cell for cell, ice in zip(cells, self.rng.random(len(cells)) < self.frozen)
                                   if not ice and cell not in (self.start, self.goal))
            plan = self.oracle()
            if plan is not None and len(plan) <= self.actions_left:
                return
        raise RuntimeError("found no map with a path to the goal within the budget in 10000 draws")

    def _after(self, cell, action):
        d_row, d_column = MOVES[action]
        return min(max(cell[0] + d_row, 0), self.size - 1), min(max(cell[1] + d_column, 0), self.size - 1)

    def _outcomes(self, action):
        """[(direction, probability)]: `actions` is in turning order, so the neighbours in it are the perpendiculars."""
        i = self.actions.index(action)
        slip = (1 - self.intended) / 2
        return [(self.actions[i - 1], slip), (action, self.intended), (self.actions[(i + 1) % 4], slip)]

    def move(self, action):
        directions, probabilities = zip(*self._outcomes(action))
        self.player = self._after(self.player, directions[self.rng.choice(3, p=probabilities)])
        return float(self.solved())

    def solved(self):
        return self.player == self.goal

    def failed(self):
        return self.player in self.holes

    def oracle(self):
        """A shortest path that keeps off the holes, as if no move slipped."""
        def neighbours(cell):
            return ((a, self._after(cell, a)) for a in self.actions if self._after(cell, a) not in self.holes)
        return None if self.failed() else shortest_path(self.player, neighbours, lambda cell: cell == self.goal)

    def ceiling(self):
        """Exact: dynamic programming over (cell, turns left, actions left); a turn's actions are chosen without seeing
        how the earlier ones of the same turn slipped."""
        @lru_cache(maxsize=None)
        def value(cell, turns, actions):
            if cell == self.goal:
                return 1.0
            if cell in self.holes or turns == 0 or actions == 0:
                return 0.0
            n = min(self.actions_per_turn, actions)
            plans = (plan for k in range(1, n + 1) for plan in product(self.actions, repeat=k))
            return max(play(cell, plan, turns, actions) for plan in plans)

        def play(cell, plan, turns, actions):
            if not plan or cell == self.goal or cell in self.holes:
                return value(cell, turns - 1, actions)
            return sum(p * play(self._after(cell, direction), plan[1:], turns, actions - 1)
                       for direction, p in self._outcomes(plan[0]) if p > 0)

        return value(self.player, self.max_turns - self.turn, self.max_actions - self.moves)

    def _symbol(self, cell):
        if cell == self.player:
            return "X" if self.failed() else "√" if self.solved() else "P"
        return "O" if cell in self.holes else "G" if cell == self.goal else "_"

    def render(self):
        rows = ["".join(self._symbol((row, column)) for column in range(self.size)) for row in range(self.size)]
        places = [("start", [self.start]), ("goal", [self.goal]), ("player", [self.player]),
                  ("holes", sorted(self.holes))]
        return "\n".join(rows + [f"{name}: {' '.join(f'{row},{column}' for row, column in cells) or 'none'}"
                                 for name, cells in places])

    def facts(self):
        edge, hole, goal = self.move_facts
        sentences = relations("goal", self.goal, "player", self.player)
        for action in self.actions:
            ahead = self._after(self.player, action)
            if ahead == self.player or ahead == self.goal or ahead in self.holes:
                what = edge if ahead == self.player else goal if ahead == self.goal else hole
                sentences.append(f"{action} {what}.")
        return sentences
