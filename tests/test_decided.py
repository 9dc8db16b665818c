"""Where the return is decided: the estimator on components that are known, and the sampling itself."""

import json

import numpy as np
import pytest
import torch
from test_evidence import call
from test_rollout import bpe
from test_train import BOARDS, arm_of, words

from env import Sokoban
from extras import decided, diagnose

KNOWN = {"all in the reasoning": (2.0, 0.0, 0.0), "all in the answer": (0.0, 2.0, 0.0), "half and half": (1.0, 1.0, 0.5),
         "only luck": (0.0, 0.0, 3.0), "everything": (0.5, 1.5, 2.0)}


def drawn(variances, rng, shape=(400, 6, 4, 2)):
    """Returns of toy policies whose reasoning, answer and luck add terms of the given variances, on boards that differ."""
    n, m, k, c = shape
    parts = [np.sqrt(v) * rng.normal(size=size) for v, size in zip(variances, ((n, m, 1, 1), (n, m, k, 1), shape))]
    return 3 * rng.normal(size=(n, 1, 1, 1)) + sum(parts)


@pytest.mark.parametrize("name", KNOWN)
def test_components_are_those_of_toy_policies_and_unbiased(name):
    rng, variances = np.random.default_rng(0), KNOWN[name]
    found = decided.components(drawn(variances, rng))
    for part, true in zip(("reasoning", "answer", "later"), variances):
        assert found[part] == pytest.approx(true, abs=0.12)
    small = [decided.components(drawn(variances, rng, (5, 2, 2, 2))) for _ in range(3000)]  # unbiased, however few
    for part, true in zip(("reasoning", "answer", "later"), variances):
        values = [x[part] for x in small]
        assert np.mean(values) == pytest.approx(true, abs=4 * np.std(values) / np.sqrt(len(values)))


def test_share_interval_and_verdict_tell_the_toy_policies_apart():
    rng = np.random.default_rng(1)
    found = {name: decided.with_interval(drawn(variances, rng, (60, 6, 4, 2)), rng, draws=300) for name, variances in KNOWN.items()}
    assert decided.verdict(found["all in the answer"]).startswith("hold")
    assert decided.verdict(found["all in the reasoning"]).startswith("do not")
    assert decided.verdict(found["only luck"]).startswith("cannot") and decided.verdict(found["half and half"]).startswith("cannot")
    low, high = found["everything"]["interval"]
    assert low < 0.75 < high and high - low < 0.5
    nothing = decided.with_interval(np.ones((5, 2, 2, 2)), rng, draws=50)
    assert nothing["share"] is None and decided.verdict(nothing).startswith("cannot")


@pytest.mark.parametrize("varying, tells", [(1, False), (9, False), (10, True), (24, True)])
def test_of_few_states_that_vary_no_verdict_is_given(varying, tells):
    """Of one such state, all draws have the same share: an interval of no width."""
    rng = np.random.default_rng(2)
    returns = np.full((24, 6, 4, 2), -0.3)
    returns[:varying] = drawn(KNOWN["all in the answer"], rng, (varying, 6, 4, 2))
    found = decided.with_interval(returns, rng, draws=300)
    assert found["states"] == [varying, 24] and found["share"] > 0.5
    assert decided.verdict(found).startswith("hold") == tells and (found["interval"] == [None, None]) != tells


@pytest.mark.parametrize("turn", [0, 1])
def test_what_is_nested_is_shared_and_what_is_not_is_drawn_anew(monkeypatch, turn):
    """The answers of one reasoning begin with it, continuations of one answer with that, and each has luck of its own."""
    arm, played, luck = arm_of(env_options=tuple(BOARDS), max_response_tokens=60), [], []

    class Watched(Sokoban):
        def step(self, text):
            if self.turn == turn:
                played.append(text)
                luck.append(self.rng.random())
            return super().step(text)
    arm.env.__class__ = Watched
    returns = decided.nested_returns(arm, turn, [1, 2, 5], 2, 3, 2)
    n = len(returns)
    assert returns.shape == (n, 2, 3, 2) and 1 <= n <= 3 and np.isfinite(returns).all()
    texts = np.array(played[-n * 12:]).reshape(n, 2, 3, 2)
    assert (texts[..., 0] == texts[..., 1]).all() and len(set(luck[-n * 12:])) == n * 12
    reasonings = np.vectorize(lambda text: text.split("</think>")[0])(texts)
    assert (reasonings == reasonings[:, :, :1, :1]).all() and (reasonings[:, 0] != reasonings[:, 1]).any()
    assert (texts[:, :, 0] != texts[:, :, 1]).any()


class Lever(Sokoban):
    """One turn whose return is what the answer says: all is decided there."""

    def __init__(self, **options):
        super().__init__(**options | {"max_turns": 1})

    def step(self, text):
        observation, _, terminated, _, info = super().step(text)
        return observation, float("Up" in text.partition("</think>")[2]), terminated, True, info


@pytest.mark.parametrize("merged", [[], ["think>Up", "</think>"], ["k>", "></"]])
def test_the_reasoning_ends_with_its_closing_tag(merged):
    tokenizer = bpe(merged)
    ids = tokenizer("<think>é Left</think><answer>Up</answer>").input_ids
    n = decided.reasoning_length(tokenizer, ids, {})
    assert "</think>" in tokenizer.decode(ids[:n]) and "</think>" not in tokenizer.decode(ids[:n - 1])
    assert decided.reasoning_length(tokenizer, ids[:5], {}) == 5


def test_a_game_that_only_reads_the_answer_is_decided_in_the_answer(monkeypatch):
    arm = arm_of(temperature=1.5)
    arm.env.__class__ = Lever
    arm.env.max_turns = 1
    found = decided.decided(arm, 8)["first turn"]
    assert found["later"] == 0 and found["answer"] > 0.1 and abs(found["reasoning"]) < 0.5 * found["answer"]


def test_the_diagnosis_prints_and_keeps_the_verdict(tmp_path):
    code, output, error = call(diagnose.main, *words([]), "--groups", "2", "--nested-boards", "2", "--out", tmp_path)
    assert code == 0 and "the answer's share of the first two" in output and "first turn" in output, error
    found = json.loads((tmp_path / "diagnosis.json").read_text())
    kept = found["decided"]
    assert 0.8 < found["fact_accuracy"] <= 1 and f"{100 * found['fact_accuracy']:.0f} % of the facts" in output
    assert kept["episodes"] >= 2 * 48 and {"first turn", "all turns"} <= kept.keys()
    code, _, error = call(diagnose.main, "--nested-boards", "1")
    assert code == 2 and error.count("\n") == 1 and "boards" in error


def test_a_response_without_reasoning_has_no_answer_to_draw(agent):
    """The untrained model never closes its reasoning: what was drawn is the whole response."""
    arm = arm_of(max_response_tokens=5)
    for x in arm.policy.parameters():
        x.data = torch.zeros_like(x) if x.dim() == 1 else x.data * 0
    assert np.isfinite(decided.nested_returns(arm, 0, [1], 2, 2, 2)).all()


def test_reasoning_and_answer_together_stay_within_a_response_and_the_context():
    arm = arm_of(max_response_tokens=40, env_options=tuple(BOARDS))
    first = len(arm.play([1], 1.0, arm.generator).ids[0])
    arm.policy.config.max_position_embeddings = longest = first + 45
    seen = []

    class Counting(Sokoban):
        def step(self, text):
            seen.append(len(arm.tokenizer(text).input_ids))
            return super().step(text)
    arm.env.__class__ = Counting
    forward, widths = type(arm.policy).forward, []

    def watched(self, *arguments, position_ids, **options):
        widths.append(int(position_ids.max()) + 1)
        return forward(self, *arguments, position_ids=position_ids, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(arm.policy), "forward", watched)
        assert np.isfinite(decided.nested_returns(arm, 0, [1, 2], 3, 2, 2)).all()
    assert max(widths) <= longest and max(seen) <= 40 and len(seen) >= 24


def test_no_evaluation_board_is_sampled(monkeypatch):
    boards = ("size=5", "walls=0", "max_moves=2", "max_turns=1")
    arm, seen, rng = arm_of(env_options=boards, eval_boards=64), [], np.random.default_rng(0)
    returns = lambda arm, turn, seeds, *_: seen.extend(seeds) or rng.normal(size=(len(seeds), 2, 2, 2))
    monkeypatch.setattr(decided, "nested_returns", returns)
    decided.decided(arm, 30)
    assert len(seen) == 30 and not {arm.env.reset(seed=seed)[0] for seed in seen} & arm.held_out
