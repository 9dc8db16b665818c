"""Text environments for multi-turn language-model agents: what they share, and Sokoban.

An episode is a conversation. Each turn the environment shows its state as text, the agent answers

    <think> any reasoning </think><answer> Up || Left </answer>

and the environment plays the actions between the answer tags, then shows its state again. The calls are Gymnasium's:

    >>> env = make("sokoban")
    >>> observation, info = env.reset(seed=7)
    >>> plan = env.oracle()                                     # a shortest solution, e.g. ["Up", "Left", ...]
    >>> observation, reward, terminated, truncated, info = env.step(response(plan[:2], think="Push it up."))

Symbols, budgets, rewards and the format penalty follow the paper (arXiv 2605.14558, experimental settings), which
builds on RAGEN. All randomness of an instance comes from its own generator, so `copy.deepcopy(env)` is a full snapshot.

To add an environment, subclass `Env` (instance, move, render, solved, oracle; README.md has an example) and register
it, `ENVS["name"] = Class`, or name it as "module:Class" where a name is asked for. Three others stand in extras/.
"""

import pkgutil
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


def check_integers(low, **values):
    """ValueError unless every value is an integer of at least `low`."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise ValueError(f"{name} must be an integer from {low}, got {value!r}")


class Env:
    """What every environment shares: the conversation, the budgets, parsing and the format penalty.

    A response is *valid* if it is exactly one think block followed by one answer block, and the answer holds at least
    one action and no unknown ones. An invalid response costs `format_penalty`, once a turn. Text without that structure
    moves nothing; of an answer with known and unknown actions, the known ones are played, up to the turn's limit.
    """

    intro: str  # who the agent is, the rules and the symbols
    actions: tuple[str, ...]  # optional beside it, for extras/: ceiling(), gold(), facts() with fact_pattern, phrases
    format_penalty = 0.1

    def __init__(self, *, max_turns=5, actions_per_turn=2, max_actions=10, response_limit=400):
        check_integers(1, max_turns=max_turns, actions_per_turn=actions_per_turn, max_actions=max_actions,
                       response_limit=response_limit)
        self.max_turns, self.actions_per_turn, self.max_actions = max_turns, actions_per_turn, max_actions
        self.response_limit = response_limit  # tokens; only told to the agent, the sampler has its own
        self.rng, self._over = np.random.default_rng(), True

    # What an environment defines

    def instance(self):
        """Draw a new instance from `self.rng`."""
        raise NotImplementedError("an environment has instance()")

    def move(self, action):
        """Play one action, return its reward."""
        raise NotImplementedError("an environment has move()")

    def render(self):
        """The state as text."""
        raise NotImplementedError("an environment has render()")

    def solved(self):
        raise NotImplementedError("an environment has solved()")

    def failed(self):
        """Whether the episode is lost for good."""
        return False

    def oracle(self):
        """A shortest list of actions to the goal from here, or None; demonstrations and the ceiling play it."""
        raise NotImplementedError("there is no oracle()")

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
        """Finite numbers beside success that say how the episode went, for info and a run's metrics (their mean)."""
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
        self.turn, self.moves, self._over = 0, 0, False
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

    def step(self, response_text):
        """Play one turn. response_text: the agent's whole response, tags included; any text is accepted.

        -> (observation, reward, terminated, truncated, info); info has `success`, `valid` (no format penalty was paid),
        `actions` (the ones played) and what `outcome` adds. RuntimeError if the episode is over or was never started.
        """
        if self._over:
            raise RuntimeError("the episode is over: call reset() first")
        actions, valid = self.parse(response_text)
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
        info = {"success": self.solved(), "valid": valid, "actions": played, **self.outcome()}
        return self._observation(reward), reward, terminated, truncated, info


def shortest_path(start, neighbours, is_goal, limit=None):
    """Breadth-first search -> list of actions, or None. `neighbours(state)` yields (action, next state)."""
    seen, frontier = {start}, deque([(start, [])])
    while frontier:
        state, path = frontier.popleft()
        if is_goal(state):
            return path
        for action, following in neighbours(state) if len(path) != limit else ():
            if following not in seen:
                seen.add(following)
                frontier.append((following, [*path, action]))
    return None


def push(player, boxes, walls, action):
    """Sokoban's (player, boxes) after an action; unchanged where a wall or a second box is in the way."""
    d_row, d_column = MOVES[action]
    ahead = (player[0] + d_row, player[1] + d_column)
    beyond = (ahead[0] + d_row, ahead[1] + d_column)
    if ahead in walls or ahead in boxes and (beyond in walls or beyond in boxes):
        return player, boxes
    return ahead, boxes - {ahead} | {beyond} if ahead in boxes else boxes


@lru_cache(maxsize=10_000)  # all rollouts of a group begin on one board
def solution(player, boxes, targets, walls, limit=None):
    """Sokoban's shortest list of moves to boxes on all targets, of at most `limit`, or None."""
    return shortest_path((player, boxes), lambda state: ((action, push(*state, walls, action)) for action in MOVES),
                         lambda state: state[1] == targets, limit)


class Sokoban(Env):
    """Push every box onto a target. -0.1 a move, +1 / -1 when a box enters / leaves a target, +10 when solved.

    size: side of the board, border walls included; walls: walls inside the border; boxes: number of boxes. min_moves,
    max_moves: range of the shortest solution's length; boards are drawn until a search finds one inside it, so every
    board is solvable within the budget. observation: what the agent sees, "grid", "coordinates" (row, column,
    zero-indexed from the top left) or "both".
    """

    actions = tuple(MOVES)
    intro = ("You are solving Sokoban: push every box onto a target.\nSymbols: # wall, _ floor, O target, X box, "
             "√ box on target, P player, S player on target.\nMoving into a box pushes it, if the cell behind it is "
             "free. Boxes cannot be pulled.")

    def __init__(self, *, size=6, walls=2, boxes=1, min_moves=1, max_moves=None, observation="grid", **budgets):
        super().__init__(**budgets)
        playable = min(self.max_actions, self.max_turns * self.actions_per_turn)
        max_moves = playable if max_moves is None else max_moves
        check_integers(0, size=size, walls=walls, boxes=boxes, min_moves=min_moves, max_moves=max_moves)
        inner = max(size - 2, 0) ** 2
        if size < 4 or boxes < 1 or inner < walls + 2 * boxes + 1:
            raise ValueError(f"size {size} has no room for {walls} walls, {boxes} boxes, their targets and the player")
        if not 1 <= min_moves <= max_moves <= playable:
            raise ValueError(f"need 1 <= min_moves <= max_moves <= {playable} (the budget): {min_moves}..{max_moves}")
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
            plan = solution(self.player, self.boxes, self.targets, self.walls, self.max_moves)
            if plan is not None and len(plan) >= self.min_moves:
                return
        raise RuntimeError(f"no board with a solution of {self.min_moves} to {self.max_moves} moves in 10000 draws")

    def oracle(self):
        plan = solution(self.player, self.boxes, self.targets, self.walls)
        return None if plan is None else list(plan)  # a copy: the kept one serves others

    def move(self, action):
        on_target = len(self.boxes & self.targets)
        self.player, self.boxes = push(self.player, self.boxes, self.walls, action)
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

    def things(self):
        """(name, cell) of the boxes, then of the targets, in reading order; numbered only where there are several."""
        numbered = (lambda name, i: f"{name} {i + 1}") if self.n_boxes > 1 else (lambda name, i: name)
        return ([(numbered("box", i), cell) for i, cell in enumerate(sorted(self.boxes))],
                [(numbered("target", i), cell) for i, cell in enumerate(sorted(self.targets))])

    def render(self):
        lines = []
        if self.observation != "coordinates":
            lines += ["".join(self._symbol((row, column)) for column in range(self.size)) for row in range(self.size)]
        if self.observation != "grid":
            boxes, targets = self.things()
            lines += [f"{name}: {row},{column}" for name, (row, column) in [("player", self.player), *boxes, *targets]]
        return "\n".join(lines)


# name -> class, or "module:Class" for one that is imported when somebody asks for it
ENVS = {"sokoban": Sokoban, "frozenlake": "extras.frozenlake:FrozenLake", "sudoku": "extras.sudoku:Sudoku",
        "shop": "extras.shop:Shop"}


def make(name, **options):
    """Environment by name, of `ENVS` or module:Class, with its options; ValueError for an unknown name or option."""
    cls = ENVS.get(name, name)
    if isinstance(cls, str) and ":" not in cls:
        raise ValueError(f"unknown environment {name!r}: choose from {', '.join(ENVS)}, or name a module:Class")
    try:
        cls = pkgutil.resolve_name(cls) if isinstance(cls, str) else cls
        return cls(**options)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"environment {name!r} cannot be made: {error}") from None
    except TypeError as error:  # an unknown option, or a value of the wrong type
        raise ValueError(f"{name}: {str(error).split('__init__() ')[-1]}") from None


def draw_boards(env, rng, n, below, held_out):
    """Seeds under `below` of n boards whose first observation is not in the set `held_out`, the evaluation boards'."""
    seeds, alike = [], len(held_out) == 1 and held_out == {env.reset(seed=seed)[0] for seed in range(8)}
    for _ in range(100 * n):
        seed = int(rng.integers(below))
        if alike or env.reset(seed=seed)[0] not in held_out:  # alike: the seed is all that tells boards apart
            seeds.append(seed)
        if len(seeds) == n:
            return seeds
    raise ValueError(f"hardly a board is left beside the {len(held_out)} held out: more kinds, or fewer --eval-boards")
