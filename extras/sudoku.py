"""4x4 Sudoku with exactly one solution; symbols, budgets and rewards of the paper (arXiv 2605.14558, after RAGEN)."""

import re
from functools import lru_cache
from itertools import product

from env import Env


@lru_cache(maxsize=None)
def sudoku_grids():
    """All 288 filled 4x4 grids, each as 16 numbers in reading order."""
    def fill(grid):
        if len(grid) == 16:
            return [tuple(grid)]
        taken = {grid[i] for i in SUDOKU_PEERS[len(grid)] if i < len(grid)}
        return [filled for value in (1, 2, 3, 4) if value not in taken for filled in fill([*grid, value])]
    return fill([])


# Rows, columns and boxes of the 4x4 grid, as indices of cells in reading order; a cell's peers share one of them with
# it.
SUDOKU_UNITS = {**{f"Row {r + 1}": [4 * r + c for c in range(4)] for r in range(4)},
                **{f"Column {c + 1}": [4 * r + c for r in range(4)] for c in range(4)},
                **{f"Box {b + 1}": [4 * (b // 2 * 2 + i // 2) + b % 2 * 2 + i % 2 for i in range(4)] for b in range(4)}}
SUDOKU_PEERS = [{i for unit in SUDOKU_UNITS.values() if cell in unit for i in unit} - {cell} for cell in range(16)]


class Sudoku(Env):
    """Fill a 4x4 grid so that every row, column and 2x2 box holds 1 to 4. Every puzzle has exactly one solution.

    +1 for the right number (once a cell), +0.5 for a wrong one that breaks no rule yet (once a cell), -0.1 for one that
    does or for a given cell, which stays as it is; +10 when solved. A placed number can be replaced. difficulty: easy,
    medium or hard, 6, 8 or 9 blanks. hint: list what every empty cell can hold; who copies single candidates solves the
    puzzle, so it is off. observation: what the agent sees, "grid" or "units" (every row, column and box on a line of
    its own, without marks).
    """

    actions = tuple(f"place {n} at row {r} col {c}" for n, r, c in product(range(1, 5), repeat=3))
    intro = ("You are solving a 4x4 Sudoku: every row, every column and every 2x2 box holds 1, 2, 3 and 4.\n"
             "Symbols: [n] given, n placed by you, *n* placed and in conflict, . empty. Given numbers cannot be "
             "changed.")
    action_help = "place N at row R col C, or short R,C,N, all from 1 to 4"
    fact_pattern = re.compile(r"Row [1-4] col [1-4] can be (?:nothing|[1-4](?: [1-4])*)\.")
    blanks = {"easy": 6, "medium": 8, "hard": 9}

    def __init__(self, *, difficulty="easy", hint=False, observation="grid", max_turns=8, actions_per_turn=2,
                 max_actions=16, **budgets):
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
        """The right number for every cell that has another or none: first the cells that the rules decide now."""
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
        allowed = lambda cell: " ".join(map(str, self.candidates(cell))) or "nothing"
        return [f"row {cell // 4 + 1} col {cell % 4 + 1} can be {allowed(cell)}"
                for cell in range(16) if not self.grid[cell]]

    def render(self):
        def symbol(cell):
            value = self.grid[cell]
            if not value:
                return "."
            return f"[{value}]" if cell in self.given else f"*{value}*" if self._conflict(cell) else str(value)
        if self.observation == "units":
            lines = [f"{unit}: {' '.join(str(self.grid[i] or '.') for i in cells)}"
                     for unit, cells in SUDOKU_UNITS.items()]
        else:
            lines = [" ".join(symbol(cell) for cell in SUDOKU_UNITS[f"Row {r + 1}"]) for r in range(4)]
        return "\n".join(lines + self._possible() * self.hint)

    def facts(self):
        return [text.capitalize() + "." for text in self._possible()]
