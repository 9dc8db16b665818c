"""Small text environments for multi-turn language-model agents: Sokoban, FrozenLake, 4x4 Sudoku and a web shop.

An episode is a conversation. Each turn the environment shows its state as text, the agent answers

    <think> any reasoning </think><answer> Up || Left </answer>

and the environment plays the actions it finds between the answer tags. The interface is Gymnasium's:

    >>> env = make("sokoban")
    >>> observation, info = env.reset(seed=7)
    >>> plan = env.oracle()                                     # a shortest solution, e.g. ["Up", "Left", ...]
    >>> observation, reward, terminated, truncated, info = env.step(response(plan[:2], think="Push it up."))

Symbols, budgets, rewards and the format penalty follow the paper (arXiv 2605.14558, experimental settings), which builds
on RAGEN. All randomness of an instance comes from its own generator, so `copy.deepcopy(env)` is a full snapshot.

To add an environment, subclass `Env` (instance, move, render, solved, oracle, facts) and add a line to `ENVS`; README.md has an
example. Actions that are not a short list of names also need `read`, `action_help` and `random_action`.
"""

import math
import re
from collections import Counter, deque
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import numpy as np

MOVES = {"Up": (-1, 0), "Down": (1, 0), "Left": (0, -1), "Right": (0, 1)}  # (row, column), row 0 on top
# A tag of the other kind inside a block means the structure is broken, so blocks must not contain tags.
_BLOCK = r"((?:(?!</?(?:think|answer)>).)*)"
RESPONSE = re.compile(rf"\s*<think>{_BLOCK}</think>\s*<answer>{_BLOCK}</answer>\s*", re.DOTALL)


def response(actions, think=""):
    """A well-formed response: `response(["Up", "Left"])` -> `<think></think><answer>Up || Left</answer>`."""
    return f"<think>{think}</think><answer>{' || '.join(actions)}</answer>"


def _whole(low, **values):
    """ValueError unless every value is an integer of at least `low`."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise ValueError(f"{name} must be an integer from {low}, got {value!r}")


def _share(**values):
    """ValueError unless every value is a number in [0, 1]."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise ValueError(f"{name} must be a number in [0, 1], got {value!r}")


class Env:
    """What every environment shares: the conversation, the budgets, parsing and the format penalty.

    A response is *valid* if it is exactly one think block followed by one answer block, and the answer holds at least one
    action and no unknown ones. An invalid response costs `format_penalty`, once a turn. Text without that structure moves
    nothing; in an answer with both known and unknown actions, the known ones are played.
    """

    name: str
    intro: str  # who the agent is, the rules and the symbols
    actions: tuple[str, ...]
    fact_pattern = re.compile(r"(?!)")  # what a sentence looks like that claims a fact, true or not
    format_penalty = 0.1

    def __init__(self, *, max_turns=5, actions_per_turn=2, max_actions=10, response_limit=400):
        _whole(1, max_turns=max_turns, actions_per_turn=actions_per_turn, max_actions=max_actions,
               response_limit=response_limit)
        self.max_turns, self.actions_per_turn, self.max_actions = max_turns, actions_per_turn, max_actions
        self.response_limit = response_limit  # tokens; only told to the agent, the sampler enforces it
        self.rng = np.random.default_rng()
        self._over = True

    # What an environment defines ------------------------------------------------------------------------------------

    def instance(self):
        """Draw a new instance from `self.rng`."""
        raise NotImplementedError

    def move(self, action):
        """Play one action, return its reward."""
        raise NotImplementedError

    def render(self):
        """The state as text."""
        raise NotImplementedError

    def solved(self):
        raise NotImplementedError

    def failed(self):
        """Whether the episode is lost for good."""
        return False

    def oracle(self):
        """A shortest list of actions to the goal from here, or None where there is none."""
        raise NotImplementedError

    def facts(self):
        """True sentences about the current state: what a careful reasoner would write down."""
        raise NotImplementedError

    def gold(self):
        """The right answer as text, if the task has one (A2TGPO measures how a turn changes the belief in it); else None."""
        return None

    def ceiling(self):
        """Probability of success from here under the best play within the budgets."""
        plan = self.oracle()
        return float(plan is not None and len(plan) <= self.actions_left)

    def read(self, text):
        """The action that a piece of an answer names, None if it names none."""
        return {action.lower(): action for action in self.actions}.get(" ".join(text.split()).lower())

    def random_action(self, rng):
        """What a player without any idea does now."""
        return str(rng.choice(self.actions))

    @property
    def action_help(self):
        """The actions, as the agent is told them."""
        return ", ".join(self.actions)

    def outcome(self):
        """Numbers beside success that describe how the episode went; they go into info and into a run's metrics."""
        return {}

    # The conversation -----------------------------------------------------------------------------------------------

    @property
    def system_prompt(self):
        return (f"{self.intro}\nActions: {self.action_help}.\nAnswer with at most {self.actions_per_turn} "
                "actions a turn, separated by ||.")

    @property
    def format_reminder(self):
        return ("Write <think> your reasoning </think><answer> your actions </answer> and nothing else, in at most "
                f"{self.response_limit} tokens.")

    @property
    def phrases(self):
        """Fixed strings that recur in every prompt: the built-in agent's tokenizer makes one token of each."""
        return [self.system_prompt, self.format_reminder]

    @property
    def actions_left(self):
        """Actions that can still be played, counting both the turn and the action budget."""
        return min(self.max_actions - self.moves, (self.max_turns - self.turn) * self.actions_per_turn)

    def _observation(self, last_reward=None):
        opening = "" if last_reward is None else f"Reward: {last_reward:.1f}\n"
        return (f"{opening}Turn {self.turn + 1}:\nState:\n{self.render()}\n"
                f"You have {self.actions_left} actions left.\n{self.format_reminder}")

    def reset(self, *, seed=None, options=None):
        """Start a new episode -> (observation, info). The same seed gives the same instance and the same luck."""
        if seed is not None:
            self.rng = np.random.default_rng(seed)
        self.turn = self.moves = 0
        self._over = False
        self.instance()
        return self._observation(), {"success": False, "valid": True, **self.outcome()}

    def parse(self, text):
        """Response text -> (actions to play, whether the response is valid)."""
        match = RESPONSE.fullmatch(text)
        if match is None:
            return [], False
        known = [self.read(part) for part in match[2].split("||")]
        played = [action for action in known if action is not None]
        return played[: min(self.actions_per_turn, self.actions_left)], bool(played) and None not in known

    def step(self, answer_text):
        """Play one turn.

        answer_text: the agent's whole response, tags included; any text is accepted.
        -> (observation, reward, terminated, truncated, info); info has `success`, `valid` (no format penalty was paid),
        `actions` (the ones played), `facts` (check_facts of the text) and what `outcome` adds. RuntimeError if the episode is
        over or was never started.
        """
        if self._over:
            raise RuntimeError("the episode is over: call reset() first")
        actions, valid = self.parse(answer_text)
        facts = self.check_facts(answer_text)
        reward, played = 0.0 if valid else -self.format_penalty, []
        for action in actions:
            reward += self.move(action)
            played.append(action)
            if self.solved() or self.failed():
                break
        self.turn += 1
        self.moves += len(played)
        terminated = self.solved() or self.failed()
        truncated = not terminated and self.actions_left <= 0
        self._over = terminated or truncated
        info = {"success": self.solved(), "valid": valid, "actions": played, "facts": facts, **self.outcome()}
        return self._observation(reward), reward, terminated, truncated, info

    def check_facts(self, text):
        """(stated, true): how many sentences of a text are of the kind that `facts()` writes, and how many of those hold now."""
        holding, sentences = set(self.facts()), re.split(r"(?<=\.)\s+|[<>]", text)
        stated = [sentence for sentence in sentences if sentence in holding or self.fact_pattern.fullmatch(sentence)]
        return len(stated), sum(sentence in holding for sentence in stated)


def relations(a, at, b, other):
    """Where `a` is seen from `b`, row then column: the two facts that decide a move on a grid."""
    (row, column), (other_row, other_column) = at, other
    vertical = "above" if row < other_row else "below" if row > other_row else "in the row of"
    horizontal = "left of" if column < other_column else "right of" if column > other_column else "in the column of"
    return [f"The {a} is {vertical} the {b}.", f"The {a} is {horizontal} the {b}."]


def _fact_pattern(move_facts):
    thing = r"(?:player|goal|hole|box|target)(?: \d)?"
    return re.compile(rf"The {thing} is (?:above|below|in the row of|left of|right of|in the column of) the {thing}\."
                      rf"|(?:{'|'.join(MOVES)}) (?:{'|'.join(map(re.escape, move_facts))})\.")


def shortest_path(start, neighbours, is_goal, limit=None):
    """Breadth-first search -> list of actions, or None. `neighbours(state)` yields (action, next state)."""
    parent, frontier = {start: None}, deque([(start, 0)])
    while frontier:
        state, depth = frontier.popleft()
        if is_goal(state):
            path = []
            while parent[state] is not None:
                state, action = parent[state]
                path.append(action)
            return path[::-1]
        if limit is not None and depth == limit:
            continue
        for action, following in neighbours(state):
            if following not in parent:
                parent[following] = (state, action)
                frontier.append((following, depth + 1))
    return None


class Sokoban(Env):
    """Push every box onto a target. -0.1 a move, +1 / -1 when a box enters / leaves a target, +10 when solved.

    size: side of the board, border walls included; walls: walls inside the border; boxes: number of boxes.
    min_moves, max_moves: range of the shortest solution's length; boards are drawn until a search finds one inside it, so
    every board is solvable within the budget. observation: what the agent sees, "grid", "coordinates" (row, column,
    zero-indexed from the top left) or "both".
    """

    name = "sokoban"
    actions = tuple(MOVES)
    intro = ("You are solving Sokoban: push every box onto a target.\nSymbols: # wall, _ floor, O target, X box, √ box on "
             "target, P player, S player on target.\nMoving into a box pushes it, if the cell behind it is free. Boxes "
             "cannot be pulled.")
    move_facts = ("is a wall", "pushes the box", "is blocked by the box")  # a free cell is not worth a sentence
    fact_pattern = _fact_pattern(move_facts)

    def __init__(self, *, size=6, walls=2, boxes=1, min_moves=1, max_moves=None, observation="grid", **budgets):
        super().__init__(**budgets)
        playable = min(self.max_actions, self.max_turns * self.actions_per_turn)
        max_moves = playable if max_moves is None else max_moves
        _whole(0, size=size, walls=walls, boxes=boxes, min_moves=min_moves, max_moves=max_moves)
        inner = max(size - 2, 0) ** 2
        if size < 4 or boxes < 1 or inner < walls + 2 * boxes + 1:
            raise ValueError(f"size {size} has no room for {walls} walls, {boxes} boxes, their targets and the player")
        if not 1 <= min_moves <= max_moves <= playable:
            raise ValueError(f"need 1 <= min_moves <= max_moves <= {playable} (the budget), got {min_moves}..{max_moves}")
        if observation not in ("grid", "coordinates", "both"):
            raise ValueError(f"observation must be grid, coordinates or both, got {observation!r}")
        self.size, self.n_walls, self.n_boxes = size, walls, boxes
        self.min_moves, self.max_moves, self.observation = min_moves, max_moves, observation

    def instance(self):
        inner = [(row, column) for row in range(1, self.size - 1) for column in range(1, self.size - 1)]
        border = {cell for cell in product(range(self.size), repeat=2) if cell not in inner}
        for _ in range(10_000):
            order = self.rng.permutation(len(inner))
            cells = [inner[i] for i in order[: self.n_walls + 2 * self.n_boxes + 1]]
            self.player = cells.pop()
            self.boxes = frozenset(cells.pop() for _ in range(self.n_boxes))
            self.targets = frozenset(cells.pop() for _ in range(self.n_boxes))
            self.walls = frozenset(border.union(cells))
            plan = self._search(self.max_moves)
            if plan is not None and len(plan) >= self.min_moves:
                return
        raise RuntimeError(f"found no board with a solution of {self.min_moves} to {self.max_moves} moves in 10000 draws")

    def _after(self, player, boxes, action):
        """(player, boxes) after an action; unchanged where a wall or a second box is in the way."""
        d_row, d_column = MOVES[action]
        ahead = (player[0] + d_row, player[1] + d_column)
        if ahead in self.walls:
            return player, boxes
        if ahead in boxes:
            beyond = (ahead[0] + d_row, ahead[1] + d_column)
            if beyond in self.walls or beyond in boxes:
                return player, boxes
            boxes = boxes - {ahead} | {beyond}
        return ahead, boxes

    def _search(self, limit=None):
        return shortest_path((self.player, self.boxes),
                             lambda state: ((action, self._after(*state, action)) for action in MOVES),
                             lambda state: state[1] == self.targets, limit)

    def oracle(self):
        return self._search()

    def move(self, action):
        on_target = len(self.boxes & self.targets)
        self.player, self.boxes = self._after(self.player, self.boxes, action)
        gained = len(self.boxes & self.targets) - on_target
        return -0.1 + gained + (10.0 if gained and self.solved() else 0.0)

    def solved(self):
        return self.boxes == self.targets

    def _symbol(self, cell):
        if cell in self.walls:
            return "#"
        if cell == self.player:
            return "S" if cell in self.targets else "P"
        if cell in self.boxes:
            return "√" if cell in self.targets else "X"
        return "O" if cell in self.targets else "_"

    def _things(self):
        """(name, cell) of the boxes, then of the targets, in reading order; numbered only where there are several."""
        numbered = (lambda name, i: f"{name} {i + 1}") if self.n_boxes > 1 else (lambda name, i: name)
        return ([(numbered("box", i), cell) for i, cell in enumerate(sorted(self.boxes))],
                [(numbered("target", i), cell) for i, cell in enumerate(sorted(self.targets))])

    def render(self):
        lines = []
        if self.observation != "coordinates":
            lines += ["".join(self._symbol((row, column)) for column in range(self.size)) for row in range(self.size)]
        if self.observation != "grid":
            boxes, targets = self._things()
            lines += [f"{name}: {row},{column}" for name, (row, column) in [("player", self.player), *boxes, *targets]]
        return "\n".join(lines)

    def facts(self):
        boxes, targets = self._things()
        sentences = []
        for (box, at), (target, goal) in zip(boxes, targets):
            sentences += relations(box, at, "player", self.player) + relations(target, goal, box, at)
        wall, push, blocked = self.move_facts
        for action, (d_row, d_column) in MOVES.items():
            ahead = (self.player[0] + d_row, self.player[1] + d_column)
            if ahead in self.walls:
                sentences.append(f"{action} {wall}.")
            elif ahead in self.boxes:
                stuck = self._after(self.player, self.boxes, action)[0] == self.player
                sentences.append(f"{action} {blocked if stuck else push}.")
        return sentences


class FrozenLake(Env):
    """Walk over slippery ice to the goal: reward 1 there, 0 elsewhere; a hole ends the episode.

    size: side of the map; frozen: probability that a tile is ice and not a hole; intended: probability that a move goes where
    it was meant to, the rest is split between the two perpendicular directions. Start and goal lie anywhere; maps are drawn
    until a path within the budget exists.
    """

    name = "frozenlake"
    actions = ("Left", "Down", "Right", "Up")
    intro = ("You are walking over a frozen lake to the goal. The ice is slippery: a move may go sideways instead.\nSymbols: P "
             "player, _ ice, O hole, G goal, X player in hole, √ player on goal.\nFalling into a hole ends the game.")
    move_facts = ("is the edge", "is a hole", "is the goal")
    fact_pattern = _fact_pattern(move_facts)

    def __init__(self, *, size=4, frozen=0.9, intended=0.8, **budgets):
        super().__init__(**budgets)
        _whole(2, size=size)
        _share(frozen=frozen, intended=intended)
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
        """Exact: dynamic programming over (cell, turns left, actions left); a turn's actions are chosen without seeing how
        the earlier ones of the same turn slipped."""
        @lru_cache(maxsize=None)
        def value(cell, turns, actions):
            if cell == self.goal:
                return 1.0
            if cell in self.holes or turns == 0 or actions == 0:
                return 0.0
            n = min(self.actions_per_turn, actions)
            return max(play(cell, plan, turns, actions) for k in range(1, n + 1) for plan in product(self.actions, repeat=k))

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
        places = [("start", [self.start]), ("goal", [self.goal]), ("player", [self.player]), ("holes", sorted(self.holes))]
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


@lru_cache(maxsize=None)
def sudoku_grids():
    """All 288 filled 4x4 grids, each as 16 numbers in reading order."""
    def fill(grid):
        if len(grid) == 16:
            return [tuple(grid)]
        taken = {grid[i] for i in SUDOKU_PEERS[len(grid)] if i < len(grid)}
        return [filled for value in (1, 2, 3, 4) if value not in taken for filled in fill([*grid, value])]
    return fill([])


# Rows, columns and boxes of the 4x4 grid, as indices of cells in reading order; a cell's peers share one of them with it.
SUDOKU_UNITS = {**{f"Row {r + 1}": [4 * r + c for c in range(4)] for r in range(4)},
                **{f"Column {c + 1}": [4 * r + c for r in range(4)] for c in range(4)},
                **{f"Box {b + 1}": [4 * (b // 2 * 2 + i // 2) + b % 2 * 2 + i % 2 for i in range(4)] for b in range(4)}}
SUDOKU_PEERS = [{i for unit in SUDOKU_UNITS.values() if cell in unit for i in unit} - {cell} for cell in range(16)]


class Sudoku(Env):
    """Fill a 4x4 grid so that every row, column and 2x2 box holds 1 to 4. Every puzzle has exactly one solution.

    +1 for the right number (once a cell), +0.5 for a wrong one that breaks no rule yet (once a cell), -0.1 for one that does or
    for a given cell, which stays as it is; +10 when solved. A placed number can be replaced. difficulty: easy, medium or hard,
    6, 8 or 9 blanks. hint: list what every empty cell can hold; who copies single candidates solves the puzzle, so it is off.
    observation: what the agent sees, "grid" or "units" (every row, column and box on a line of its own, without marks).
    """

    name = "sudoku"
    actions = tuple(f"place {n} at row {r} col {c}" for n, r, c in product(range(1, 5), repeat=3))
    intro = ("You are solving a 4x4 Sudoku: every row, every column and every 2x2 box holds 1, 2, 3 and 4.\nSymbols: [n] "
             "given, n placed by you, *n* placed and in conflict, . empty. Given numbers cannot be changed.")
    action_help = "place N at row R col C, or short R,C,N, all from 1 to 4"
    fact_pattern = re.compile(r"Row [1-4] col [1-4] can be (?:nothing|[1-4](?: [1-4])*)\.")
    blanks = {"easy": 6, "medium": 8, "hard": 9}

    def __init__(self, *, difficulty="easy", hint=False, observation="grid", max_turns=8, actions_per_turn=2, max_actions=16,
                 **budgets):
        super().__init__(max_turns=max_turns, actions_per_turn=actions_per_turn, max_actions=max_actions, **budgets)
        if difficulty not in self.blanks:
            raise ValueError(f"difficulty must be one of {', '.join(self.blanks)}, got {difficulty!r}")
        if not isinstance(hint, bool):
            raise ValueError(f"hint must be true or false, got {hint!r}")
        if self.blanks[difficulty] > min(self.max_actions, self.max_turns * self.actions_per_turn):
            raise ValueError(f"{self.blanks[difficulty]} blanks cannot be filled within max_turns and max_actions")
        if observation not in ("grid", "units"):
            raise ValueError(f"observation must be grid or units, got {observation!r}")
        self.difficulty, self.hint, self.observation = difficulty, hint, observation

    def instance(self):
        grids = sudoku_grids()
        while True:
            self.solution = grids[self.rng.integers(len(grids))]
            blank = set(self.rng.permutation(16)[: self.blanks[self.difficulty]].tolist())
            self.given = frozenset(set(range(16)) - blank)
            if sum(all(grid[i] == self.solution[i] for i in self.given) for grid in grids) == 1:
                break
        self.grid = [self.solution[i] if i in self.given else 0 for i in range(16)]
        self.paid = set()  # (cell, "right" or "legal"): paid once, or placing and replacing would earn without end

    def read(self, text):
        match = re.fullmatch(r"\s*([1-4])\s*,\s*([1-4])\s*,\s*([1-4])\s*", text, re.ASCII)
        return f"place {match[3]} at row {match[1]} col {match[2]}" if match else super().read(text)

    def _conflict(self, cell):
        return any(self.grid[i] == self.grid[cell] for i in SUDOKU_PEERS[cell])

    def move(self, action):
        value, row, column = (int(word) for word in action.split() if word.isdigit())
        cell = 4 * (row - 1) + column - 1
        if cell in self.given:
            return -0.1
        self.grid[cell] = value
        if self.solved():
            return (1.0 if (cell, "right") not in self.paid else 0.0) + 10.0
        if value != self.solution[cell] and self._conflict(cell):
            return -0.1
        kind, worth = ("right", 1.0) if value == self.solution[cell] else ("legal", 0.5)
        first = (cell, kind) not in self.paid
        self.paid.add((cell, kind))
        return worth if first else 0.0

    def solved(self):
        return tuple(self.grid) == self.solution

    def candidates(self, cell):
        """What the rules allow in a cell, given the others as they stand."""
        return [value for value in (1, 2, 3, 4) if all(self.grid[i] != value for i in SUDOKU_PEERS[cell])]

    def oracle(self):
        """The right number for every cell that has another or none: cells that the rules decide now before the others."""
        trial, plan = list(self.grid), []
        while wrong := [cell for cell in range(16) if trial[cell] != self.solution[cell]]:
            decided = lambda cell: len({trial[i] for i in SUDOKU_PEERS[cell]} - {0}) == 3
            cell = next(filter(decided, wrong), wrong[0])
            trial[cell] = self.solution[cell]
            plan.append(f"place {trial[cell]} at row {cell // 4 + 1} col {cell % 4 + 1}")
        return plan

    def gold(self):
        """What is still to be placed, "" once it is solved."""
        return " || ".join(self.oracle())

    def _possible(self):
        """For every empty cell, what the rules allow there."""
        return [f"row {cell // 4 + 1} col {cell % 4 + 1} can be {' '.join(map(str, self.candidates(cell))) or 'nothing'}"
                for cell in range(16) if not self.grid[cell]]

    def render(self):
        def symbol(cell):
            value = self.grid[cell]
            if not value:
                return "."
            return f"[{value}]" if cell in self.given else f"*{value}*" if self._conflict(cell) else str(value)
        if self.observation == "units":
            lines = [f"{unit}: {' '.join(str(self.grid[i] or '.') for i in cells)}" for unit, cells in SUDOKU_UNITS.items()]
        else:
            lines = [" ".join(symbol(cell) for cell in SUDOKU_UNITS[f"Row {r + 1}"]) for r in range(4)]
        return "\n".join(lines + self._possible() * self.hint)

    def facts(self):
        return [text.capitalize() + "." for text in self._possible()]


# department -> categories; a shop sells every category in variants that differ in attributes, options and price
DEPARTMENTS = {"clothing": ("shirt", "jacket", "dress", "socks"), "kitchen": ("mug", "pan", "kettle", "knife"),
               "furniture": ("chair", "table", "lamp", "shelf"), "electronics": ("headphones", "speaker", "charger", "camera")}
ATTRIBUTES = {"clothing": ("cotton", "warm", "washable", "light", "striped", "stretchy"),
              "kitchen": ("steel", "ceramic", "insulated", "foldable", "enamel", "heavy"),
              "furniture": ("wooden", "metal", "compact", "padded", "modern", "rustic"),
              "electronics": ("wireless", "portable", "waterproof", "silent", "solar", "slim")}
OPTIONS = {"color": ("red", "blue", "green", "black", "white"), "size": ("small", "medium", "large")}


@dataclass(frozen=True)
class Product:
    name: str  # what is clicked on
    department: str
    category: str
    attributes: tuple[str, ...]
    options: dict[str, tuple[str, ...]]  # option -> the values that are on sale
    price: int  # dollars

    def __deepcopy__(self, memo):  # never changed: copies of a shop share the catalogue
        return self

    @property
    def title(self):
        return " ".join((*self.attributes, self.category))


@lru_cache(maxsize=8)
def catalogue(seed, size):
    """`size` products, the same for the same seed."""
    rng = np.random.default_rng(seed)
    pick = lambda values, n: tuple(str(value) for value in rng.choice(values, size=n, replace=False))
    products = []
    for i in range(size):
        department = str(rng.choice(list(DEPARTMENTS)))
        options = {name: tuple(sorted(pick(values, int(rng.integers(2, len(values) + 1))), key=values.index))
                   for name, values in OPTIONS.items()}
        products.append(Product(f"b{i + 1}", department, str(rng.choice(DEPARTMENTS[department])),
                                pick(ATTRIBUTES[department], 3), options, int(rng.integers(5, 100))))
    return tuple(products)


@lru_cache(maxsize=8)
def _word_counts(seed, size):
    documents = [Counter(re.findall(r"[a-z0-9]+", f"{p.title} {p.category} {p.department}")) for p in catalogue(seed, size)]
    return documents, Counter(word for document in documents for word in document)


@lru_cache(maxsize=4096)
def search(seed, size, query, k1=1.5, b=0.75):
    """The products that share a word with the query, best first, by Okapi BM25 (ties in catalogue order)."""
    documents, containing = _word_counts(seed, size)
    mean = sum(document.total() for document in documents) / size
    scores = [0.0] * size
    for word in query.split():
        rarity = math.log(1 + (size - containing[word] + 0.5) / (containing[word] + 0.5))
        for i, document in enumerate(documents):
            if count := document[word]:
                scores[i] += rarity * count * (k1 + 1) / (count + k1 * (1 - b + b * document.total() / mean))
    return tuple(sorted((i for i in range(size) if scores[i]), key=lambda i: -scores[i]))


class Shop(Env):
    """Find the product that an instruction describes, choose its options and buy it: WebShop's task with a generated catalogue.

    The reward comes with the purchase: score = type * (attributes + options + price) / (wanted attributes + wanted options
    + 1), where the first three count what was asked for and is there, price is 1 if it is within the limit, and type is 1 for
    the wanted category, 0.5 for another of its department, 0 otherwise. Success is a score of 1. products: size of the
    catalogue; page: results on a page; catalogue_seed: which catalogue. Instructions are drawn such that their own words find a
    right product within the budget.
    """

    name = "shop"
    actions = ("search[words]", "click[thing]")
    intro = ("You are shopping: find a product that fits the instruction, choose its options and buy it.\nSearch for words, "
             "click on what is listed in square brackets. The purchase ends the game.")
    fact_pattern = re.compile(r"B\d+ (?:fits|is too expensive|lacks [a-z]+|is no [a-z]+)\.|You want [a-z]+\.")

    def __init__(self, *, products=300, page=5, catalogue_seed=0, max_turns=9, actions_per_turn=1, max_actions=9, **budgets):
        super().__init__(max_turns=max_turns, actions_per_turn=actions_per_turn, max_actions=max_actions, **budgets)
        _whole(1, products=products, page=page)
        _whole(0, catalogue_seed=catalogue_seed)
        if actions_per_turn != 1:
            raise ValueError("actions_per_turn must be 1: what can be clicked depends on the click before")
        if min(self.max_turns, self.max_actions) < 3 + len(OPTIONS):
            raise ValueError(f"max_turns and max_actions must be at least {3 + len(OPTIONS)}: search, product, {len(OPTIONS)} "
                             "options, buy now")
        self.products, self.page, self.catalogue_seed = catalogue(catalogue_seed, products), page, catalogue_seed

    def instance(self):
        for _ in range(10_000):
            self.target = self.products[self.rng.integers(len(self.products))]
            self.wanted = tuple(str(word) for word in self.rng.choice(self.target.attributes, size=2, replace=False))
            self.wanted_options = {name: str(self.rng.choice(values)) for name, values in self.target.options.items()}
            self.limit = self.target.price + int(self.rng.integers(1, 20))
            self.results, self.first, self.product, self.chosen, self.bought = None, 0, None, {}, None
            plan = self.oracle()
            if plan is not None and len(plan) <= self.actions_left:
                return
        raise RuntimeError("found no instruction that can be fulfilled within the budget in 10000 draws")

    # The pages: search (results None), results (product None), product ---------------------------------------------

    def clicks(self):
        """What can be clicked on this page."""
        if self.product is not None:
            values = [value for values in self.product.options.values() for value in values]
            return [*values, "buy now", "back to results", "back to search"]
        if self.results is None:
            return []
        turning = ["next page"] * (self.first + self.page < len(self.results)) + ["previous page"] * (self.first > 0)
        return [*(self.products[i].name for i in self._shown()), *turning, "back to search"]

    def _shown(self):
        return self.results[self.first:self.first + self.page]

    def read(self, text):
        match = re.fullmatch(r"\s*(search|click)\s*\[([^\[\]]*)\]\s*", text, re.IGNORECASE)
        if match is None:
            return None
        if match[1].lower() == "search":
            words = re.findall(r"[a-z0-9]+", match[2].lower())
            return f"search[{' '.join(words[:20])}]" if words and self.results is None else None
        thing = " ".join(match[2].split()).lower()
        return f"click[{thing}]" if thing in self.clicks() else None

    def random_action(self, rng):
        if self.results is None:
            return f"search[{rng.choice([category for group in DEPARTMENTS.values() for category in group])}]"
        return f"click[{rng.choice(self.clicks())}]"

    def move(self, action):
        verb, thing = action[:-1].split("[", 1)
        if verb == "search":
            self.results, self.first = search(self.catalogue_seed, len(self.products), thing), 0
        elif thing == "back to search":
            self.results, self.product = None, None
        elif thing == "back to results":
            self.product = None
        elif thing in ("next page", "previous page"):
            self.first += self.page if thing == "next page" else -self.page
        elif thing == "buy now":
            self.bought = self.product
            return self.score(self.product, self.chosen)
        elif self.product is None:
            self.product, self.chosen = next(self.products[i] for i in self._shown() if self.products[i].name == thing), {}
        else:
            self.chosen = self.chosen | {name: thing for name, values in self.product.options.items() if thing in values}
        return 0.0

    def score(self, product, chosen):
        """WebShop's reward for buying a product with chosen options {name: value}."""
        same_department = product.department == self.target.department
        kind = 1.0 if product.category == self.target.category else 0.5 if same_department else 0.0
        found = len(set(self.wanted) & set(product.attributes)) + (product.price <= self.limit)
        found += sum(chosen.get(name) == value for name, value in self.wanted_options.items())
        return kind * found / (len(self.wanted) + len(self.wanted_options) + 1)

    def _perfect(self, product):
        """Whether a product can be bought for a score of 1."""
        offered = all(value in product.options[name] for name, value in self.wanted_options.items())
        return offered and self.score(product, self.wanted_options) == 1

    def solved(self):
        return self.bought is not None and self.score(self.bought, self.chosen) == 1

    def failed(self):
        return self.bought is not None and not self.solved()

    def outcome(self):
        bought = self.bought is not None
        return {"purchased": float(bought), "score": self.score(self.bought, self.chosen) if bought else 0.0}

    @property
    def query(self):
        """What the instruction asks for, in its own words."""
        return " ".join((*self.wanted, self.target.category))

    def oracle(self):
        """The shortest way to a score of 1 that searches for nothing but the instruction's own words; None if there is none."""
        if self.bought is not None:
            return [] if self.solved() else None
        choose = lambda chosen: [f"click[{v}]" for name, v in self.wanted_options.items() if chosen.get(name) != v]
        if self.product is not None and self._perfect(self.product):
            return [*choose(self.chosen), "click[buy now]"]
        plans = []
        anew = search(self.catalogue_seed, len(self.products), self.query)
        back = ["click[back to search]"] * (self.results is not None)
        here = ["click[back to results]"] * (self.product is not None)
        for results, first, way in ((self.results, self.first, here), (anew, 0, [*back, f"search[{self.query}]"])):
            for rank, i in enumerate(results or ()):
                if self._perfect(self.products[i]):
                    pages = rank // self.page - first // self.page
                    turning = ["click[next page]" if pages > 0 else "click[previous page]"] * abs(pages)
                    plans.append([*way, *turning, f"click[{self.products[i].name}]", *choose({}), "click[buy now]"])
        return min(plans, key=len, default=None)

    def gold(self):
        """The purchase: the target, its options, buy now."""
        return " || ".join(f"click[{thing}]" for thing in (self.target.name, *self.wanted_options.values(), "buy now"))

    # What the agent reads ------------------------------------------------------------------------------------------

    @property
    def phrases(self):
        values = [value for values in OPTIONS.values() for value in values]
        clicks = [*values, "buy now", "back to results", "back to search", "next page", "previous page"]
        return [*super().phrases, "Legal actions: ", *(f"click[{thing}]" for thing in clicks)]

    action_help = "search[words] on the search page, click[thing] on any other"

    def render(self):
        options = " and ".join(f"{name} {value}" for name, value in self.wanted_options.items())
        lines = [f"Instruction: buy a {self.query} with {options} for at most {self.limit} dollars."]
        if self.bought is not None:
            lines.append(f"You bought {self.bought.name}.")
        elif self.product is not None:
            lines += [f"{self.product.name}: {self.product.title}, {self.product.price} dollars"]
            lines += [f"{name}: {' '.join(f'[{v}]' for v in values)}, chosen: {self.chosen.get(name, 'none')}"
                      for name, values in self.product.options.items()]
        elif self.results is not None:
            lines.append(f"{len(self.results)} results, page {self.first // self.page + 1}")
            lines += [f"[{p.name}] {p.title}, {p.price} dollars" for p in (self.products[i] for i in self._shown())]
        things = self.clicks()
        legal = "search[words]" if self.results is None else " ".join(f"click[{thing}]" for thing in things)
        return "\n".join([*lines, f"Legal actions: {'none' if self.bought is not None else legal}"])

    def facts(self):
        if self.product is not None or self.results is None:
            chosen = self.chosen if self.product is not None else {}
            return [f"You want {value}." for name, value in self.wanted_options.items() if chosen.get(name) != value]
        sentences = []
        for item in (self.products[i] for i in self._shown()):
            lacking = [word for word in self.wanted if word not in item.attributes]
            if item.category != self.target.category:
                what = f"is no {self.target.category}"
            elif lacking:
                what = f"lacks {lacking[0]}"
            else:
                what = "is too expensive" if item.price > self.limit else "fits"
            sentences.append(f"{item.name.capitalize()} {what}.")
        return sentences


ENVS = {cls.name: cls for cls in (Sokoban, FrozenLake, Sudoku, Shop)}


def make(name, **options):
    """Environment by name, with its options; ValueError that lists what is allowed for an unknown name or option."""
    if name not in ENVS:
        raise ValueError(f"unknown environment {name!r}: choose from {', '.join(ENVS)}")
    try:
        return ENVS[name](**options)
    except TypeError as error:  # an unknown option, or a value of the wrong type
        raise ValueError(f"{name}: {str(error).replace('__init__() ', '')}") from None


def random_floor(env, seeds, episodes=16):
    """Success rate of uniformly random actions on the instances of `seeds`, `episodes` plays of each."""
    rng = np.random.default_rng(0)
    wins = 0
    for seed in seeds:
        for _ in range(episodes):
            env.reset(seed=seed)
            over = False
            while not over:
                picks = [env.random_action(rng) for _ in range(env.actions_per_turn)]
                *_, terminated, truncated, info = env.step(response(picks))
                over = terminated or truncated
            wins += info["success"]
    return wins / (len(seeds) * episodes)


def mean_ceiling(env, seeds):
    """Success rate of the best play on the instances of `seeds`."""
    total = 0.0
    for seed in seeds:
        env.reset(seed=seed)
        total += env.ceiling()
    return total / len(seeds)
