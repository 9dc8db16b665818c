"""What the environments promise: solvable boards, the paper's rules, and answers of any shape."""

import copy
import itertools

import numpy as np
import pytest

import env as environments
from env import ENVS, make, response

SEEDS = range(30)


def play(env, seed, choose):
    """Play an episode with `choose(env) -> actions` -> list of step results."""
    env.reset(seed=seed)
    results = []
    while not results or not (results[-1][2] or results[-1][3]):
        results.append(env.step(response(choose(env))))
    return results


@pytest.mark.parametrize("options", [{}, {"walls": 0}, {"walls": 4}, {"size": 7, "boxes": 2}, {"min_moves": 4, "max_moves": 6}])
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
    assert env.move("Up") == pytest.approx(-0.1) and env.player == (1, 1)  # into the wall: nothing moves, the move still costs
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
    for name in ENVS:
        env = make(name)
        floor, ceiling = environments.random_floor(env, SEEDS), environments.mean_ceiling(env, SEEDS)
        wins = []
        for seed in SEEDS:
            for luck in range(10):
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
def test_the_same_seed_gives_the_same_episode_whatever_else_is_drawn(name):
    def episode(env):
        return [r[:4] for r in play(env, 11, lambda e: ["Left", "Up"])]
    first = episode(make(name))
    np.random.seed(0)
    env = make(name)
    env.reset(seed=5)
    assert episode(env) == first


@pytest.mark.parametrize("name", ENVS)
def test_a_deep_copy_goes_on_with_the_same_luck(name):
    env = make(name)
    env.reset(seed=3)
    env.step(response(["Up"]))
    twin = copy.deepcopy(env)
    for _ in range(3):
        if not env._over:
            assert env.step(response(["Right", "Down"])) == twin.step(response(["Right", "Down"]))


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
@pytest.mark.parametrize("name", ENVS)
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


@pytest.mark.parametrize("name", ENVS)
def test_prompts_say_what_the_paper_says(name):
    env = make(name)
    observation, info = env.reset(seed=0)
    assert observation.startswith("Turn 1:\nState:\n" + env.render()) and "10 actions left" in observation
    assert "<think>" in observation and "<answer>" in observation and "400 tokens" in observation
    assert all(action in env.system_prompt for action in env.actions) and "||" in env.system_prompt
    assert info == {"success": False, "valid": True}
    later = env.step("")[0]
    assert later.startswith("Reward: -0.1\nTurn 2:") and "8 actions left" in later


@pytest.mark.parametrize("name", ENVS)
def test_facts_are_true_and_their_opposites_false(name):
    env = make(name)
    opposite = {"above": "below", "below": "above", "left of": "right of", "right of": "left of", "wall": "box",
                "in the row of": "above", "in the column of": "left of"}
    for seed in SEEDS:
        env.reset(seed=seed)
        for fact in env.facts():
            assert env.is_fact(fact) is True
        relation = env.facts()[0]
        word = next(word for word in opposite if f" is {word} " in relation)
        assert env.is_fact(relation.replace(word, opposite[word])) is False
        assert env.is_fact("The sky is blue.") is None


@pytest.mark.parametrize("name, options", [
    ("chess", {}), ("sokoban", {"sise": 6}), ("sokoban", {"size": 3}), ("sokoban", {"walls": 20}),
    ("sokoban", {"max_moves": 11}),
    ("sokoban", {"observation": "smell"}), ("sokoban", {"size": "big"}), ("sokoban", {"max_turns": 0}),
    ("frozenlake", {"frozen": 0}), ("frozenlake", {"intended": 1.5}), ("frozenlake", {"size": 1})])
def test_bad_options_are_a_value_error(name, options):
    with pytest.raises(ValueError):
        make(name, **options)
