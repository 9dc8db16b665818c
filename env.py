"""Small text environments for multi-turn language-model agents: Sokoban and FrozenLake.

An episode is a conversation. Each turn the environment shows its state as text, the agent answers

    <think> any reasoning </think><answer> Up || Left </answer>

and the environment plays the actions it finds between the answer tags. The interface is Gymnasium's:

    >>> env = make("sokoban")
    >>> observation, info = env.reset(seed=7)
    >>> plan = env.oracle()                                     # a shortest solution, e.g. ["Up", "Left", ...]
    >>> observation, reward, terminated, truncated, info = env.step(response(plan[:2], think="Push it up."))

Symbols, budgets, rewards and the format penalty follow the paper (arXiv 2605.14558, experimental settings), which builds
on RAGEN. All randomness of an instance comes from its own generator, so `copy.deepcopy(env)` is a full snapshot.

To add an environment, subclass `Env` (instance, move, render, solved, oracle, facts) and add a line to `ENVS`.
"""

import re
from collections import deque
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


class Env:
    """What every environment shares: the conversation, the budgets, parsing and the format penalty.

    A response is *valid* if it is exactly one think block followed by one answer block, and the answer holds at least one
    action and no unknown ones. An invalid response costs `format_penalty`, once a turn. Text without that structure moves
    nothing; in an answer with both known and unknown actions, the known ones are played.
    """

    name: str
    intro: str  # who the agent is, the rules and the symbols
    actions: tuple[str, ...]
    format_penalty = 0.1

    def __init__(self, *, max_turns=5, actions_per_turn=2, max_actions=10, response_limit=400):
        limits = dict(max_turns=max_turns, actions_per_turn=actions_per_turn, max_actions=max_actions,
                      response_limit=response_limit)
        for key, value in limits.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{key} must be a positive integer, got {value!r}")
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

    def ceiling(self):
        """Probability of success from here under the best play within the budgets."""
        plan = self.oracle()
        return float(plan is not None and len(plan) <= self.actions_left)

    # The conversation -----------------------------------------------------------------------------------------------

    @property
    def system_prompt(self):
        return (f"{self.intro}\nActions: {', '.join(self.actions)}.\nAnswer with at most {self.actions_per_turn} "
                "actions a turn, separated by ||.")

    @property
    def format_reminder(self):
        return ("Write <think> your reasoning </think><answer> your actions </answer> and nothing else, in at most "
                f"{self.response_limit} tokens.")

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
        return self._observation(), {"success": False, "valid": True}

    def parse(self, text):
        """Response text -> (actions to play, whether the response is valid)."""
        match = RESPONSE.fullmatch(text)
        if match is None:
            return [], False
        by_name = {action.lower(): action for action in self.actions}
        known = [by_name.get(" ".join(part.split()).lower()) for part in match[2].split("||")]
        played = [action for action in known if action is not None]
        return played[: min(self.actions_per_turn, self.actions_left)], bool(played) and None not in known

    def step(self, answer_text):
        """Play one turn.

        answer_text: the agent's whole response, tags included; any text is accepted.
        -> (observation, reward, terminated, truncated, info); info has `success`, `valid` (no format penalty was paid)
        and `actions` (the ones played). RuntimeError if the episode is over or was never started.
        """
        if self._over:
            raise RuntimeError("the episode is over: call reset() first")
        actions, valid = self.parse(answer_text)
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
        info = {"success": self.solved(), "valid": valid, "actions": played}
        return self._observation(reward), reward, terminated, truncated, info

    def is_fact(self, sentence):
        """True or False for a sentence of the kind that `facts()` writes, None for any other text."""
        if sentence in self.facts():
            return True
        return False if self.fact_pattern.fullmatch(sentence) else None


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
        inner = max(size - 2, 0) ** 2
        if size < 4 or walls < 0 or boxes < 1 or inner < walls + 2 * boxes + 1:
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
        if size < 2:
            raise ValueError(f"size must be at least 2, got {size}")
        if not 0 < frozen <= 1:
            raise ValueError(f"frozen must be in (0, 1], got {frozen}")
        if not 0 <= intended <= 1:
            raise ValueError(f"intended must be in [0, 1], got {intended}")
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


ENVS = {cls.name: cls for cls in (Sokoban, FrozenLake)}


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
                picks = rng.choice(env.actions, size=env.actions_per_turn)
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
