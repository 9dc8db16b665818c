"""What the environments promise: solvable boards, the paper's rules, and answers of any shape."""

import copy
import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import scripted

import env as environments
from env import ENVS, Env, draw_boards, make, response
from extras.facts import accuracy, check, facts
from extras.report import mean_ceiling, random_floor
from extras.shop import catalogue, search
from rollout import pack

SEEDS = range(30)
GRIDS = ["sokoban", "frozenlake"]  # whose actions are moves


def play(env, seed, choose):
    """Play an episode with `choose(env) -> actions` -> list of step results."""
    env.reset(seed=seed)
    results = []
    while not results or not (results[-1][2] or results[-1][3]):
        results.append(env.step(response(choose(env))))
    return results


@pytest.mark.parametrize("options", [{}, {"walls": 0}, {"walls": 4}, {"size": 7, "boxes": 2},
                                     {"min_moves": 4, "max_moves": 6}])
def test_every_sokoban_board_is_solvable_within_the_budget(options):
    env = make("sokoban", **options)
    for seed in SEEDS:
        env.reset(seed=seed)
        n = len(env.oracle())
        assert env.min_moves <= n <= env.max_moves
        results = play(env, seed, lambda e: e.oracle()[:2])
        assert results[-1][4]["success"] and results[-1][2] and sum(len(r[4]["actions"]) for r in results) == n


def test_the_oracle_is_shortest():
    """No sequence of fewer moves solves the board: every one is tried."""
    env = make("sokoban", max_moves=5)
    for seed in range(8):
        env.reset(seed=seed)
        best = len(env.oracle())
        for plan in itertools.product(env.actions, repeat=best - 1):
            trial = copy.deepcopy(env)
            for action in plan:
                trial.move(action)
                assert not trial.solved()


def test_sokoban_rewards_and_symbols():
    env = make("sokoban", walls=0)
    env.reset(seed=0)
    env.player, env.boxes, env.targets = (1, 1), frozenset({(1, 2)}), frozenset({(1, 3)})
    assert env.render() == "######\n#PXO_#\n#____#\n#____#\n#____#\n######"
    assert env.oracle() == ["Right"]
    before = copy.deepcopy(env)
    assert env.move("Up") == pytest.approx(-0.1) and env.player == (1, 1)  # into the wall: the move still costs
    _, reward, terminated, _, info = env.step(response(["Right"]))
    assert reward == pytest.approx(-0.1 + 1 + 10) and terminated and info["success"]
    assert env.render().splitlines()[1] == "#_P√_#"
    env = before
    env.boxes, env.targets = frozenset({(1, 2), (2, 2)}), frozenset({(1, 2), (4, 4)})
    assert env.move("Right") == pytest.approx(-1.1)  # pushed off its target
    assert env.render().splitlines()[1] == "#_SX_#"


def test_a_box_against_a_wall_or_a_box_does_not_move():
    env = make("sokoban", walls=0, boxes=2)
    env.reset(seed=0)
    env.player, env.boxes = (2, 2), frozenset({(2, 3), (2, 4), (1, 2)})
    for blocked in ("Right", "Up"):
        env.move(blocked)
        assert env.player == (2, 2) and env.boxes == {(2, 3), (2, 4), (1, 2)}


def test_frozenlake_slips_as_often_as_it_says():
    env = make("frozenlake", frozen=1.0, size=5)
    env.reset(seed=0)
    counts = {(1, 2): 0, (2, 1): 0, (2, 3): 0, (3, 2): 0}
    for _ in range(4000):
        env.player = (2, 2)
        env.move("Up")
        counts[env.player] += 1
    assert counts[3, 2] == 0
    assert counts[1, 2] / 4000 == pytest.approx(0.8, abs=0.03)
    assert counts[2, 1] / 4000 == pytest.approx(0.1, abs=0.02) and counts[2, 3] / 4000 == pytest.approx(0.1, abs=0.02)


def test_frozenlake_ceiling_is_what_the_best_play_wins():
    """On a 1-wide choice the ceiling is known: one step to the goal, 0.8 a try, edges that hold the player in place."""
    env = make("frozenlake", size=2, frozen=1.0, max_turns=1, actions_per_turn=1, max_actions=1)
    env.reset(seed=0)
    env.player = env.start = (0, 0)
    env.goal, env.holes = (0, 1), frozenset()
    assert env.ceiling() == pytest.approx(0.8)
    env.intended = 0.0  # a move always slips: aim sideways, half of the slips go to the goal
    assert env.ceiling() == pytest.approx(0.5)
    env.holes = frozenset({(1, 0)})
    env.player = (1, 0)
    assert env.ceiling() == 0


def test_no_play_beats_the_ceiling_and_random_play_is_far_below():
    for name in GRIDS:
        env = make(name)
        floor, ceiling = random_floor(env, SEEDS), mean_ceiling(env, SEEDS)
        wins = []
        for seed in SEEDS:
            for luck in range(5):
                env.reset(seed=seed)
                env.rng = np.random.default_rng(luck)
                info = {"success": env.solved()}
                over = False
                while not over:
                    *_, terminated, truncated, info = env.step(response((env.oracle() or ["Up"])[:1]))
                    over = terminated or truncated
                wins.append(info["success"])
        assert floor < 0.4 < np.mean(wins) + 1e-9 <= ceiling + 0.05


@pytest.mark.parametrize("name", ENVS)
def test_best_play_wins_and_random_play_hardly(name):
    env = make(name)
    assert mean_ceiling(env, SEEDS) > 0.9 and random_floor(env, SEEDS, episodes=4) < 0.4
    if name != "frozenlake":  # where luck decides
        for seed in SEEDS:
            assert play(env, seed, lambda e: e.oracle()[:e.actions_per_turn])[-1][4]["success"]


@pytest.mark.parametrize("name", ENVS)
def test_the_same_seed_gives_the_same_episode_whatever_else_is_drawn(name):
    def episode(env):
        rng = np.random.default_rng(0)
        return [r[:4] for r in play(env, 11, lambda e: [e.random_action(rng)])]
    first = episode(make(name))
    np.random.seed(0)
    env = make(name)
    env.reset(seed=5)
    assert episode(env) == first


@pytest.mark.parametrize("name", ENVS)
def test_a_deep_copy_goes_on_with_the_same_luck(name):
    env, rng = make(name), np.random.default_rng(0)
    env.reset(seed=3)
    env.step(response([env.random_action(rng)]))
    twin = copy.deepcopy(env)
    for _ in range(3):
        if not env._over:
            text = response([env.random_action(rng)])
            assert env.step(text) == twin.step(text)


def noise(rng):
    """Random text, most of it near a valid response: pieces of responses, actions, tags, noise of several alphabets."""
    pieces = ["<think>", "</think>", "<answer>", "</answer>", "||", " ", "\n", "Up", "place 3 at row 1 col 2", "1,2,3",
              "4,4,4", "search[warm shirt]", "click[buy now]", "search[", "]", "click[b1]", "'; DROP TABLE boards; --",
              "\x00\x1b[2J\r", "\u202e\ud7ff🙂é", "<think><answer></think>", "9" * 50, "%s%n{0}", "\\", "<|im_end|>"]
    text = "".join(pieces[i] for i in rng.integers(len(pieces), size=rng.integers(12)))
    return response([text], text[:9]) if rng.random() < 0.3 else text


@pytest.mark.parametrize("name", ENVS)
def test_two_thousand_random_answers_break_nothing(name):
    """No exception; an invalid answer costs the penalty, and what could not be read changed nothing."""
    env, rng, invalid = make(name), np.random.default_rng(0), 0
    env.reset(seed=0)
    for i in range(2000):
        if env._over:
            env.reset(seed=i)
        text, before = noise(rng), env.render()
        actions, valid = env.parse(text)
        _, reward, _, _, info = env.step(text)
        assert info["valid"] == valid and np.isfinite(reward)
        if not actions:
            invalid += 1
            assert not valid and reward == -env.format_penalty and env.render() == before
    assert 1000 < invalid < 2000


@pytest.mark.parametrize("name", ENVS)
@pytest.mark.parametrize("text", ["", "x" * 10_000, "<think></think><answer>" + "Up||" * 2500, "\x00" * 100,
                                  response(["[" * 5000]), response(["click[" * 1000]), response(["1," * 5000])])
def test_long_and_odd_answers_are_only_invalid(name, text):
    env = make(name)
    env.reset(seed=0)
    before = env.render()
    assert env.step(text)[1] == -0.1 and env.render() == before


def answers():
    good = response(["Up"])
    return {
        "empty": ("", [], False), "empty answer": (response([]), [], False), "no tags": ("Up", [], False),
        "no reasoning": ("<answer>Up</answer>", [], False), "text around": ("well " + good, [], False),
        "text between": ("<think></think> so <answer>Up</answer>", [], False),
        "two answers": (good + "<answer>Down</answer>", [], False), "two responses": (good + good, [], False),
        "cut": ("<think>hm</think><answer>Up", [], False),
        "nested": ("<think><think></think></think><answer>Up</answer>", [], False),
        "unknown": (response(["Jump"]), [], False), "one unknown": (response(["Up", "Jump"]), ["Up"], False),
        "trailing separator": ("<think></think><answer>Up ||</answer>", ["Up"], False),
        "case and spaces": ("\n<think> a </think>\n<answer>  uP||DOWN\n</answer> ", ["Up", "Down"], True),
        "too many": (response(["Up"] * 100), ["Up", "Up"], True), "good": (good, ["Up"], True),
        "unicode": ("🙂é\u202e" * 50, [], False), "control": ("\x00\x1b[2J\r\n", [], False),
        "long": ("<think>" * 2000, [], False),
    }


@pytest.mark.parametrize("case", answers())
@pytest.mark.parametrize("name", GRIDS)
def test_any_text_is_an_answer(name, case):
    text, expected, valid = answers()[case]
    env = make(name)
    env.reset(seed=1)
    before = env.render()
    assert env.parse(text) == (expected, valid)
    observation, reward, terminated, truncated, info = env.step(text)
    assert info["valid"] == valid and info["actions"] == expected[: len(info["actions"])]
    if not expected:
        assert env.render() == before and reward == pytest.approx(-0.1)
        assert not terminated and not truncated and env.turn == 1 and before in observation


def test_a_format_penalty_is_paid_once_a_turn():
    env = make("sokoban", walls=0)
    env.reset(seed=0)
    env.player, env.boxes, env.targets = (1, 1), frozenset({(3, 3)}), frozenset({(2, 2)})
    assert env.step(response(["Down", "Jump", "Fly"]))[1] == pytest.approx(-0.1 - 0.1)


def test_budgets_end_the_episode():
    env = make("sokoban", walls=0)
    env.reset(seed=0)
    env.player, env.boxes, env.targets = (1, 1), frozenset({(3, 3)}), frozenset({(2, 2)})
    for turn in range(5):
        observation, _, terminated, truncated, _ = env.step(response(["Up", "Up"]))
        assert not terminated and truncated == (turn == 4)
    with pytest.raises(RuntimeError, match="reset"):
        env.step(response(["Up"]))
    env = make("sokoban", max_actions=3, max_moves=3)
    env.reset(seed=0)
    env.boxes = frozenset({(0, 0)})
    env.step(response(["Up", "Up"]))
    *_, truncated, info = env.step(response(["Up", "Up"]))
    assert truncated and info["actions"] == ["Up"]


@pytest.mark.parametrize("name", GRIDS)
def test_prompts_say_what_the_paper_says(name):
    env = make(name)
    observation, info = env.reset(seed=0)
    assert observation.startswith("Turn 1:\nState:\n" + env.render()) and "10 actions left" in observation
    assert "<think>" in observation and "<answer>" in observation and "400 tokens" in observation
    assert all(action in env.system_prompt for action in env.actions) and "||" in env.system_prompt
    assert info == {"success": False, "valid": True}
    later, *_, info = env.step("")
    assert info == {"success": False, "valid": False, "actions": []}
    assert later.startswith("Reward: -0.1\nTurn 2:") and "8 actions left" in later


@pytest.mark.parametrize("name", GRIDS)
def test_facts_are_true_and_their_opposites_false(name):
    env = make(name)
    opposite = {"above": "below", "below": "above", "left of": "right of", "right of": "left of", "wall": "box",
                "in the row of": "above", "in the column of": "left of"}
    for seed in SEEDS:
        env.reset(seed=seed)
        for fact in facts(env):
            assert check(env, fact) == (1, 1)
        relation = facts(env)[0]
        word = next(word for word in opposite if f" is {word} " in relation)
        assert check(env, relation.replace(word, opposite[word])) == (1, 0)
        assert check(env, "The sky is blue.") == (0, 0)


@pytest.mark.parametrize("name, options", [
    ("chess", {}), ("sokoban", {"sise": 6}), ("sokoban", {"size": 3}), ("sokoban", {"walls": 20}),
    ("sokoban", {"max_moves": 11}), ("sokoban", {"max_moves": 5, "max_turns": 2}), ("sokoban", {"max_turns": True}),
    ("sudoku", {"max_actions": 5}),
    ("sokoban", {"observation": "smell"}), ("sokoban", {"size": "big"}), ("sokoban", {"max_turns": 0}),
    ("sudoku", {"difficulty": "brutal"}), ("sudoku", {"hint": 1}), ("sudoku", {"max_turns": 2}),
    ("shop", {"actions_per_turn": 2}), ("shop", {"products": 0}), ("shop", {"page": "many"}),
    ("shop", {"catalogue_seed": -1}), ("shop", {"max_turns": 3}),
    ("sokoban", {"boxes": 1.0}), ("sokoban", {"min_moves": "two"}),
    ("frozenlake", {"frozen": 0}), ("frozenlake", {"frozen": "ice"}), ("frozenlake", {"intended": 1.5}),
    ("frozenlake", {"intended": None}), ("frozenlake", {"size": 1}), ("frozenlake", {"size": "big"})])
def test_bad_options_are_a_value_error_that_names_them(name, options):
    with pytest.raises(ValueError, match=next(iter(options), name)):
        make(name, **options)


class Coin(Env):
    """The smallest environment: Heads wins. Every board looks alike."""

    name, intro, actions = "coin", "Call it.", ("Heads", "Tails")

    def __init__(self, *, sides=2, **budgets):
        super().__init__(**budgets)
        self.sides, self.up = sides, None

    def instance(self):
        self.up = None

    def move(self, action):
        self.up = action
        return float(self.solved())

    def render(self):
        return f"up: {self.up}"

    def solved(self):
        return self.up == "Heads"

    def oracle(self):
        return ["Heads"]


def test_an_environment_is_named_by_its_class_by_a_registered_name_or_by_where_it_is(monkeypatch):
    monkeypatch.setitem(ENVS, "coin", Coin)
    monkeypatch.setitem(ENVS, "dime", f"{__name__}:Coin")
    for name in ("coin", "dime", f"{__name__}:Coin"):
        env = make(name, sides=3, max_turns=2)
        assert type(env) is Coin and (env.sides, env.max_turns) == (3, 2)
        with pytest.raises(ValueError, match="edges"):
            make(name, edges=1)
    env.reset(seed=0)
    assert env.step(response(["tails", "heads"]))[1:4] == (1.0, True, False)
    assert mean_ceiling(env, SEEDS) == 1 and 0.9 < random_floor(env, SEEDS) < 1  # 1 - 1 / 2 ** 4
    assert facts(env) == [] and not hasattr(env, "gold")
    assert check(env, "Up is a wall. The box is above the player.") == (0, 0)


@pytest.mark.parametrize("name", ["chess", "", "extras.chess:Chess", "extras.shop:Chess", "extras.shop:", ":Shop"])
def test_an_environment_that_is_not_there_is_a_value_error_of_one_line(name):
    with pytest.raises(ValueError) as error:
        make(name)
    assert name in str(error.value) and "\n" not in str(error.value)


def test_the_environments_need_neither_torch_nor_the_extras_until_one_is_asked_for():
    code = ("import sys, env\nassert not {'torch', 'extras', 'rollout'} & set(sys.modules)\n"
            "env.make('sokoban').reset(seed=0)\nassert 'extras' not in sys.modules\n"
            "env.make('frozenlake').reset(seed=0)\nassert 'extras.frozenlake' in sys.modules\n"
            "assert 'torch' not in sys.modules")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(environments.__file__).parent)


def test_boards_are_drawn_beside_those_that_are_held_out():
    env = make("sokoban", size=5, walls=0, max_moves=2)
    look = lambda seed: env.reset(seed=seed)[0]
    everything = {look(seed) for seed in range(300)}
    held_out = set(sorted(everything)[: len(everything) // 2])
    drawn = draw_boards(env, np.random.default_rng(0), 40, 300, held_out)
    assert len(drawn) == 40 and all(0 <= seed < 300 and look(seed) not in held_out for seed in drawn)
    assert drawn == draw_boards(env, np.random.default_rng(0), 40, 300, held_out)
    assert drawn != draw_boards(env, np.random.default_rng(1), 40, 300, held_out)
    with pytest.raises(ValueError, match="held out"):
        draw_boards(env, np.random.default_rng(0), 4, 300, everything)
    coin = Coin()
    assert len(draw_boards(coin, np.random.default_rng(0), 4, 300, {coin.reset(seed=0)[0]})) == 4  # all look alike
    one = {look(0)}  # --eval-boards 1: that one is held out, too
    assert one.isdisjoint(map(look, draw_boards(env, np.random.default_rng(0), 100, 300, one)))


def test_frozenlake_moves_like_gymnasiums():
    """Same slips, same edges as the transition table of Gymnasium's FrozenLake, for every tile and move."""
    gymnasium = pytest.importorskip("gymnasium")
    rows = ["SFFF", "FHFH", "FFFH", "HFFG"]
    table = gymnasium.make("FrozenLake-v1", desc=rows, is_slippery=True).unwrapped.P
    env = make("frozenlake", intended=1 / 3)
    env.reset(seed=0)
    env.holes = frozenset((r, c) for r in range(4) for c in range(4) if rows[r][c] == "H")
    env.goal = (3, 3)
    for cell in range(15):
        if rows[cell // 4][cell % 4] == "H":
            continue
        for i, action in enumerate(env.actions):  # in Gymnasium's order: Left, Down, Right, Up
            ours, theirs = np.zeros(16), np.zeros(16)
            for direction, p in env._outcomes(action):
                row, column = env._after(divmod(cell, 4), direction)
                ours[4 * row + column] += p
            for p, after, reward, _ in table[cell][i]:
                theirs[after] += p
                assert reward == (after == 15)
            np.testing.assert_allclose(ours, theirs)


def test_sokobans_oracle_agrees_with_a_second_solver():
    """Iterative deepening over move sequences on the printed grid: nothing shared with the environment but the text."""
    def solvable(grid, depth):
        if not any("X" in row for row in grid):
            return True
        if depth == 0:
            return False
        r, c = next((r, row.index(p)) for r, row in enumerate(grid) for p in "PS" if p in row)
        for dr, dc in ((-1, 0), (1, 0), (0, -1), (0, 1)):
            cells = [list(row) for row in grid]
            if cells[r + dr][c + dc] in "X√":
                if cells[r + 2 * dr][c + 2 * dc] not in "_O":
                    continue
                cells[r + 2 * dr][c + 2 * dc] = "√" if cells[r + 2 * dr][c + 2 * dc] == "O" else "X"
                cells[r + dr][c + dc] = "O" if cells[r + dr][c + dc] == "√" else "_"
            elif cells[r + dr][c + dc] == "#":
                continue
            cells[r + dr][c + dc] = "S" if cells[r + dr][c + dc] == "O" else "P"
            cells[r][c] = "O" if grid[r][c] == "S" else "_"
            if solvable(["".join(row) for row in cells], depth - 1):
                return True
        return False
    env = make("sokoban", max_moves=6)
    for seed in range(12):
        env.reset(seed=seed)
        n = len(env.oracle())
        grid = env.render().splitlines()
        assert solvable(grid, n) and not any(solvable(grid, depth) for depth in range(n))


# Sudoku


@pytest.mark.parametrize("difficulty, blanks", [("easy", 6), ("medium", 8), ("hard", 9)])
def test_every_sudoku_has_exactly_one_solution(difficulty, blanks):
    """Brute force: of all ways to fill the blanks, one breaks no rule, and it is the oracle's."""
    env = make("sudoku", difficulty=difficulty)
    units = [[(r, c) for c in range(4)] for r in range(4)] + [[(r, c) for r in range(4)] for c in range(4)]
    units += [[(2 * a + r, 2 * b + c) for r in range(2) for c in range(2)] for a in range(2) for b in range(2)]

    def solutions(grid):
        empty = [cell for cell, value in grid.items() if not value]
        if not empty:
            return [dict(grid)]
        found = []
        for value in range(1, 5):
            if all(grid[other] != value for unit in units if empty[0] in unit for other in unit):
                found += solutions(grid | {empty[0]: value})
        return found
    for seed in range(60):
        env.reset(seed=seed)
        grid = {(r, c): int(x.strip("[]").replace(".", "0")) for r, row in enumerate(env.render().splitlines())
                for c, x in enumerate(row.split())}
        assert sum(not value for value in grid.values()) == blanks
        only, = solutions(grid)
        for action in env.oracle():
            value, row, column = (int(word) for word in action.split() if word.isdigit())
            assert only[row - 1, column - 1] == value
            env.move(action)
        assert env.solved()


def test_sudoku_rewards_marks_and_both_answer_forms():
    env = make("sudoku")
    env.reset(seed=1)
    assert env.render() == "[2] . [3] [1]\n[1] [3] [4] .\n[4] [1] . [3]\n. . [1] ."
    *_, info = env.step(response(["place 4 at row 1 col 2"]))
    twin = make("sudoku")
    twin.reset(seed=1)
    assert twin.step(response([" 1, 2,4 "]))[4]["actions"] == info["actions"] == ["place 4 at row 1 col 2"]
    assert env.render().startswith("[2] 4 [3]")
    assert env.move("place 4 at row 1 col 2") == 0  # right, but paid before
    assert env.move("place 1 at row 1 col 1") == -0.1 and env.render().startswith("[2] 4")  # given
    assert env.move("place 3 at row 4 col 2") == -0.1 and "*3*" in env.render()  # in conflict with the 3 above
    assert env.move("place 4 at row 4 col 2") == -0.1 and env.render().startswith("[2] *4*")  # marks both
    assert env.move("place 2 at row 4 col 2") == 1
    assert env.move("place 4 at row 4 col 1") == -0.1
    assert env.move("place 2 at row 4 col 4") == -0.1
    assert env.move("place 2 at row 2 col 4") == 1 and env.move("place 2 at row 3 col 3") == 1
    assert env.move("place 3 at row 4 col 1") == 1 and not env.solved()
    assert env.move("place 4 at row 4 col 4") == 11 and env.solved()


def test_a_legal_but_wrong_number_earns_half_once():
    env = make("sudoku", difficulty="hard")
    for seed in range(50):
        env.reset(seed=seed)
        for cell in set(range(16)) - env.given:
            wrong = [v for v in env.candidates(cell) if v != env.solution[cell]]
            if wrong:
                action = f"place {wrong[0]} at row {cell // 4 + 1} col {cell % 4 + 1}"
                assert env.move(action) == 0.5 and env.move(action) == 0
                return
    raise AssertionError("no puzzle had a legal wrong number")


def test_the_candidate_hint_is_off_unless_asked_for():
    plain, hinted = make("sudoku"), make("sudoku", hint=True)
    for seed in SEEDS:
        assert "can be" not in plain.reset(seed=seed)[0]
        observation, _ = hinted.reset(seed=seed)
        for line in observation.splitlines():
            if "can be" in line:
                _, row, _, column, _, _, *values = line.split()
                assert str(hinted.solution[4 * int(row) + int(column) - 5]) in values


# The shop


def buy(env, *actions):
    for action in actions:
        assert env.read(action) == action
        reward = env.move(action)
    return reward


def test_the_score_of_a_purchase_is_webshops():
    env = make("shop")
    env.reset(seed=1)
    assert "compact wooden chair with color red and size small for at most 81 dollars" in env.render()
    shops = [copy.deepcopy(env) for _ in range(4)]
    buy_now = "click[buy now]"
    assert buy(env, "search[compact wooden chair]", "click[b20]", "click[red]", "click[small]", buy_now) == 1
    assert env.solved() and env.outcome() == {"purchased": 1.0, "score": 1.0}
    assert buy(shops[0], "search[compact wooden chair]", "click[b20]", "click[blue]", "click[small]", buy_now) == 4 / 5
    assert shops[0].failed() and shops[0].outcome() == {"purchased": 1.0, "score": 0.8}
    assert buy(shops[1], "search[compact wooden chair]", "click[b5]", buy_now) == 2 / 5  # too expensive, no options
    lamp = next(p for p in env.products if p.category == "lamp" and p.price <= 81 and "wooden" in p.attributes)
    other = next(p for p in env.products if p.department == "clothing")
    assert shops[2].score(lamp, {}) == 0.5 * (len({"compact", "wooden"} & set(lamp.attributes)) + 1) / 5
    assert shops[3].score(other, {"color": "red", "size": "small"}) == 0


def test_search_ranks_by_bm25():
    """Against the formula, computed from the titles alone."""
    products = catalogue(0, 50)
    documents = [f"{p.title} {p.category} {p.department}".split() for p in products]
    mean = np.mean([len(d) for d in documents])

    def bm25(document, words, k1=1.5, b=0.75):
        total = 0.0
        for word in words:
            n = sum(word in d for d in documents)
            f = document.count(word)
            rarity = np.log(1 + (50 - n + 0.5) / (n + 0.5))
            total += rarity * f * (k1 + 1) / (f + k1 * (1 - b + b * len(document) / mean))
        return total
    for query in ("warm cotton shirt", "wireless speaker", "kitchen", "zebra"):
        scores = [bm25(d, query.split()) for d in documents]
        found = search(0, 50, query)
        assert [scores[i] for i in found] == pytest.approx(sorted((x for x in scores if x), reverse=True))


def test_the_shop_lists_exactly_what_can_be_done():
    env, rng = make("shop"), np.random.default_rng(0)
    for seed in range(40):
        observation, _ = env.reset(seed=seed)
        over = False
        while not over:
            line = next(line for line in observation.splitlines() if line.startswith("Legal actions: "))
            assert line == "Legal actions: " + (" ".join(f"click[{x}]" for x in env.clicks()) or "search[words]")
            assert env.read("search[shirt]") == ("search[shirt]" if env.results is None else None)
            assert env.read("\u017fearch[shirt]") is None and env.read("clic\u212a[buy now]") is None  # a long s, a Kelvin sign
            assert env.read("click[the moon]") is None and env.read(" CLICK[ buy  now ] ") in (None, "click[buy now]")
            observation, _, terminated, truncated, info = env.step(response([env.random_action(rng)]))
            assert info["valid"]
            over = terminated or truncated


def test_the_oracle_buys_the_right_thing_from_any_page():
    env, rng = make("shop"), np.random.default_rng(0)
    for seed in range(60):
        env.reset(seed=seed)
        for _ in range(int(rng.integers(5))):
            if "buy" not in (action := env.random_action(rng)):
                env.move(action)
        plan = env.oracle()
        for n, action in enumerate(plan):
            assert len(env.oracle()) == len(plan) - n
            buy(env, action)
        assert env.solved()


@pytest.mark.parametrize("name", ["sudoku", "shop"])
def test_facts_hold_and_others_of_their_kind_do_not(name):
    env = make(name)
    false = {"sudoku": "Row 1 col 1 can be nothing.", "shop": "B299 fits."}[name]
    for seed in SEEDS:
        env.reset(seed=seed)
        true = facts(env)
        assert true and check(env, " ".join(true)) == (len(true), len(true))
        assert check(env, f"{false} I like it here.") == (1, 0)


# Facts


def test_the_facts_of_a_board_by_hand():
    env = make("sokoban", walls=0, boxes=2)
    env.reset(seed=0)
    env.player, env.boxes, env.targets = (1, 2), frozenset({(1, 3), (2, 2)}), frozenset({(4, 2), (4, 4)})
    env.walls |= {(1, 4)}
    assert facts(env) == [
        "The box 1 is in the row of the player.", "The box 1 is right of the player.",
        "The target 1 is below the box 1.", "The target 1 is left of the box 1.",
        "The box 2 is below the player.", "The box 2 is in the column of the player.",
        "The target 2 is below the box 2.", "The target 2 is right of the box 2.",
        "Up is a wall.", "Down pushes the box.", "Right is blocked by the box."]
    env = make("frozenlake")
    env.reset(seed=0)
    env.player, env.goal, env.holes = (0, 1), (1, 1), frozenset({(0, 2)})
    assert facts(env) == ["The goal is below the player.", "The goal is in the column of the player.",
                          "Down is the goal.", "Right is a hole.", "Up is the edge."]
    env = make("shop")
    env.reset(seed=1)
    assert facts(env) == ["You want red.", "You want small."]
    buy(env, "search[compact wooden chair]")
    assert {"B20 fits.", "B5 is too expensive."} <= set(facts(env))


def test_claims_are_counted_and_held_to_the_state_wherever_they_stand():
    env = make("sokoban", walls=0)
    env.reset(seed=0)
    env.player, env.boxes, env.targets = (1, 1), frozenset({(2, 2)}), frozenset({(3, 3)})
    said = "Hm. Up is a wall. Down is a wall. The box is below the player. So I wait."
    assert check(env, response(["Up"], said)) == (3, 2)
    assert check(env, "Up is a wall.\nUp is a wall. up is a wall. Up is a wall") == (2, 2)
    assert check(env, "") == (0, 0) and check(env, "<" * 1000 + "Up is a wall." + "\x00🙂") == (0, 0)


@pytest.mark.parametrize("name, options", [("sokoban", {"walls": 0}), ("frozenlake", {"intended": 0.3})])
@pytest.mark.parametrize("stopped_by", ["<|im_end|>", "<|endoftext|>"])
def test_accuracy_plays_the_episodes_again_and_checks_every_claim_where_it_was_made(agent, name, options, stopped_by):
    """FrozenLake's luck included, and whatever token ended the responses: a wrong replay shows as false claims."""
    tokenizer, env = agent[1], make(name, **options)
    expected, transcripts = [], []

    def claim(state):
        true = facts(state)
        expected.append((len(true) + 1, len(true), state.render()))
        return response(["Right"], f"I see. {' '.join(true)} The box is above the box.")
    stop = None if stopped_by == tokenizer.eos_token else tokenizer.convert_tokens_to_ids(stopped_by)
    for seed in range(8):
        transcripts.append(scripted(tokenizer, copy.deepcopy(env), seed, itertools.repeat(claim), stop=stop))
    stated, true, boards = zip(*expected)
    assert len(set(boards)) > 16 and all(valid for t in transcripts for valid in t.valid)
    found = accuracy(pack(transcripts), env)
    assert found == {"facts": sum(stated) / len(stated), "fact_accuracy": sum(true) / sum(stated)}
    assert env._over and not hasattr(env, "turn")  # the one that was handed over is as it was


def test_what_ends_with_another_special_token_is_played_again_as_it_was(agent):
    """Invalid then and now: else the replay would end before the episode did."""
    tokenizer, env = agent[1], make("sokoban", walls=0, max_moves=2)
    env.reset(seed=0)
    winning = response(env.oracle())
    played = pack([scripted(tokenizer, copy.deepcopy(env), 0, [winning + "<|endoftext|>", "hm", winning])])
    assert played.texts[0][0].endswith("<|endoftext|>")
    assert played.success.all() and int(played.turns) == len(played.texts[0]) == 3
    assert accuracy(played, env) == {"facts": 0, "fact_accuracy": None}


def test_who_claims_nothing_has_no_accuracy(agent):
    played = pack([scripted(agent[1], make("sokoban"), 0, [response(["Up"], "Hm."), "what?"])])
    assert accuracy(played, make("sokoban")) == {"facts": 0, "fact_accuracy": None}


@pytest.mark.parametrize("name", list(ENVS))
def test_gymnasium_takes_every_environment(name):
    gymnasium = pytest.importorskip("gymnasium")
    from gymnasium.utils.env_checker import check_env

    import extras.gym  # noqa: F401, registers them
    made = gymnasium.make(f"actfocus/{name}", render_mode="ansi", max_turns=5)
    check_env(made.unwrapped)
    observation, info = made.reset(seed=3)
    assert observation == make(name, max_turns=5).reset(seed=3)[0] and observation in made.observation_space
    assert made.step("nonsense")[1] == pytest.approx(-0.1) and made.render() in observation
    made.reset()
    first = made.unwrapped.env.render()
    made.reset()
    assert name == "shop" or made.unwrapped.env.render() != first  # without a seed, another board


def test_a_board_is_searched_once_for_all_rollouts_of_its_group(monkeypatch):
    searched, plain = [], environments.shortest_path
    monkeypatch.setattr(environments, "shortest_path", lambda *x: searched.append(1) or plain(*x))
    environments.solution.cache_clear()
    first = make("sokoban", size=7, boxes=2, walls=3)
    first.reset(seed=11)
    once, plan = len(searched), first.oracle()
    assert once >= 1
    for _ in range(5):
        again = make("sokoban", size=7, boxes=2, walls=3)
        again.reset(seed=11)
        assert again.render() == first.render() and again.oracle() == plan
    assert len(searched) == once + 1  # the plan's own, which has no limit
    plan.clear()
    assert first.oracle()  # what is handed out is a copy


def test_who_falls_into_a_hole_plays_no_further_action_of_the_turn():
    env = make("frozenlake", intended=1.0)
    env.reset(seed=0)
    env.player, env.goal, env.holes = (0, 0), (0, 2), frozenset({(0, 1)})
    _, reward, terminated, _, info = env.step(response(["Right", "Right"]))
    assert terminated and not info["success"] and info["actions"] == ["Right"] and reward == 0


def test_a_win_with_the_last_action_is_no_truncation():
    env = make("sokoban", walls=0, max_moves=1, max_actions=1)
    env.reset(seed=0)
    assert env.step(response(env.oracle()))[2:4] == (True, False)


def test_an_invalid_turn_costs_no_action_and_an_answer_is_read_to_its_end():
    env = make("sokoban", walls=0, max_actions=3, max_moves=3)
    env.reset(seed=0)
    env.step("hm")
    assert env.actions_left == 3
    for actions in (["Up", "Down", "Jump"], ["Jump", "Up", "Down"]):
        assert env.parse(response(actions)) == (["Up", "Down"], False)


def test_options_say_what_a_board_is_made_of():
    for walls in (0, 3):
        env = make("sokoban", walls=walls, min_moves=3, max_moves=3)
        board = env.reset(seed=0)[0].partition("State:\n")[2].partition("\nYou")[0]
        assert board.count("#") == 20 + walls and len(env.oracle()) == 3
    counts = []
    for frozen in (1.0, 0.9, 0.6):
        env = make("frozenlake", frozen=frozen, size=6, max_turns=2)
        for seed in SEEDS:
            env.reset(seed=seed)
            assert len(env.oracle()) <= 4  # crossed within the budget
            counts.append(len(env.holes))
    assert sum(counts[:30]) == 0 < 2 * sum(counts[30:60]) < sum(counts[60:])


def test_boards_are_found_where_hardly_one_kind_is_left():
    env = make("sokoban", size=5, walls=0, max_moves=2)
    kinds = sorted({env.reset(seed=seed)[0] for seed in range(300)})
    drawn = draw_boards(env, np.random.default_rng(0), 2, 300, set(kinds[1:]))
    assert {env.reset(seed=seed)[0] for seed in drawn} == {kinds[0]}


def test_the_ceiling_counts_what_can_be_seen_before_the_second_action():
    """Right then Up, or first look where the first one slipped to."""
    env = make("frozenlake", size=3, frozen=1.0, max_turns=2, max_actions=2)
    env.reset(seed=0)
    env.player, env.goal, env.holes = (1, 1), (0, 2), frozenset()
    assert env.ceiling() == pytest.approx(0.8 * 0.8 + 0.1 * 0.8)
    env.step("hm")  # one turn is left: both at once
    assert env.ceiling() == pytest.approx(0.8 * 0.8 + 0.1 * 0.1)


def test_the_floor_is_repeated_and_a_plan_that_is_too_long_is_no_best_play(monkeypatch):
    env = Coin(max_turns=1, actions_per_turn=1)
    assert len({random_floor(env, SEEDS) for _ in range(3)}) == 1
    monkeypatch.setattr(Coin, "oracle", lambda self: ["Heads"] * 2)
    assert mean_ceiling(env, SEEDS) == 0


def test_a_right_number_is_paid_once_whatever_stood_there_and_even_if_it_wins():
    env = make("sudoku")
    env.reset(seed=1)
    *others, last = env.oracle()
    assert env.move(last) == 1 and env.move(f"place {int(last[6]) % 4 + 1}{last[7:]}") < 1
    assert [env.move(action) for action in others] == [1] * 5 and env.move(last) == 10 and env.solved()
    env = make("sudoku", difficulty="hard")
    for seed in SEEDS:
        env.reset(seed=seed)
        right = env.oracle()[-1]
        wrong = [action for v in range(1, 5) if (action := f"place {v}{right[7:]}") != right]
        if 0.5 in [env.move(action) for action in wrong]:
            assert env.move(right) == 1
            return
    raise AssertionError("no puzzle had a legal wrong number")


def test_a_sudokus_plan_begins_with_what_the_rules_decide():
    env = make("sudoku")
    for seed in SEEDS:
        env.reset(seed=seed)
        for action in env.oracle():
            value, row, column = (int(word) for word in action.split() if word.isdigit())
            sure = [i for i in range(16) if not env.grid[i] and len(env.candidates(i)) == 1]
            assert not sure or 4 * row + column - 5 in sure
            env.move(action)


def test_a_price_at_the_limit_is_within_it_and_another_catalogue_is_searched():
    env, margins = make("shop", catalogue_seed=1), set()
    for seed in range(100):
        env.reset(seed=seed)
        margins.add(env.limit - env.target.price)
    assert margins == set(range(1, 20))
    for seed in range(5):
        env.reset(seed=seed)
        env.limit = env.target.price
        assert env.score(env.target, env.wanted_options) == 1
        buy(env, *env.oracle())
        assert env.solved()


def test_a_board_is_shown_by_rows_and_columns():
    env = make("sokoban", walls=0, observation="coordinates")
    env.reset(seed=0)
    env.player, env.boxes, env.targets = (1, 2), frozenset({(3, 1)}), frozenset({(4, 2)})
    assert env.render() == "player: 1,2\nbox: 3,1\ntarget: 4,2"
    env = make("sudoku", observation="units")
    env.reset(seed=1)
    assert env.render().splitlines()[::4] == ["Row 1: 2 . 3 1", "Column 1: 2 1 4 .", "Box 1: 2 . 1 3"]
    env = make("frozenlake", size=2)
    env.reset(seed=0)
    env.start, env.player, env.goal, env.holes = (0, 0), (1, 0), (1, 1), frozenset({(0, 1)})
    assert env.render() == "_O\nPG\nstart: 0,0\ngoal: 1,1\nplayer: 1,0\nholes: 0,1"


def test_the_shop_shows_what_was_found_and_chosen():
    env = make("shop")
    env.reset(seed=1)
    buy(env, "search[compact wooden chair]", "click[next page]")
    page, item = env.render().splitlines()[1:3], env.products[env.results[5]]
    assert page == [f"{len(env.results)} results, page 2", f"[{item.name}] {item.title}, {item.price} dollars"]
    buy(env, f"click[{item.name}]", f"click[{item.options['color'][0]}]")
    assert f"chosen: {item.options['color'][0]}\nsize: " in env.render() and env.render().count("chosen: none") == 1
