"""What `--diagnose`, `--show` and the tables compute: correlations, gradient shares, intervals, shades."""

import json
import math
import re

import numpy as np
import pytest
import torch
from test_train import RETURNS, command, learner, trajectories_of

import train
from actfocus import spearman, token_weights
from rollout import score


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(cache, directory) of a small finished run."""
    cache, out = tmp_path_factory.mktemp("cache"), tmp_path_factory.mktemp("run")
    result = command(cache, out, "--algos", "grpo", "--credits", "actfocus", "uniform:lr=3e-5", "--plan-in", "think")
    assert result.returncode == 0, result.stderr
    return cache, out


def test_a_credit_can_have_settings_of_its_own(trained):
    summary = json.loads((trained[1] / "summary.json").read_text())
    assert [arm["credit"] for arm in summary["arms"]] == ["actfocus", "uniform:lr=3e-5"]
    assert "cache" not in summary["config"] and {"torch", "date", "cores"} <= summary["config"]["made_with"].keys()
    settings = train.Settings(credits=("uniform", "actfocus:alpha=0.3,signal=nll"))
    name, own = settings.of_arm("actfocus:alpha=0.3,signal=nll")
    assert name == "actfocus" and own.alpha == 0.3 and own.signal == "nll" and own.lr == settings.lr
    for wrong in ("actfocus:alpha=2", "actfocus:alpha", "actfocus:steps=3", "actfocus:alpha=x", "actfocus:signal=loud",
                  "magic:lr=1"):
        with pytest.raises(ValueError):
            train.Settings(credits=(wrong,))


# Diagnosis


def test_the_diagnosis_of_an_agent_and_of_a_checkpoint(trained):
    cache, out = trained
    checkpoint = out / "checkpoints" / "grpo-actfocus-0.pt"
    for arguments in ((), (checkpoint,)):
        result = command(cache, out, "--plan-in", "think", "--groups", "7", "--diagnose", *arguments)
        assert result.returncode == 0, result.stderr
        found = json.loads((out / "diagnosis.json").read_text())
        assert found["groups"] == 7 and found["agent"] == (str(checkpoint) if arguments else "base") and found["seconds"] > 0
        assert 0 <= found["action_fraction"] < 1 and len(found["spearman"]) == 12
        for words in ("action tokens:", "Spearman", "energy", "shift", "seconds"):
            assert words in result.stdout
    # the base agent is its own reference: its log-probs have not shifted
    assert "groups of 4" in result.stdout and (out / "metrics.jsonl").exists()


def test_the_interval_holds_the_correlation_and_shrinks_with_more_groups():
    generator = torch.Generator().manual_seed(0)
    widths = []
    for n in (40, 400):
        x = torch.randn(n, generator=generator)
        y = x + torch.randn(n, generator=generator)
        rho, low, high = train.rank_correlation(x, y, np.random.default_rng(0), draws=300)
        assert rho == spearman(x, y) and low < rho < high and 0.3 < rho < 0.95
        widths.append(high - low)
    assert widths[1] < 0.5 * widths[0]
    assert all(map(math.isnan, train.rank_correlation(torch.ones(9), torch.arange(9.0), np.random.default_rng(0))))


def test_groups_without_an_action_token_are_left_out():
    x, y = torch.tensor([1.0, math.nan, 2.0, 3.0, 4.0]), torch.tensor([1.0, 99.0, 2.0, 3.0, 4.0])
    assert train.rank_correlation(x, y, np.random.default_rng(0), draws=50)[0] == pytest.approx(1)


def test_the_two_parts_of_the_gradient_are_the_losss(agent):
    """Against a loss written out with full logits, differentiated once for action tokens and once for the others."""
    made = learner(agent, "grpo", "actfocus", micro_batch=2, entropy_coef=0.0)
    data = trajectories_of(agent, RETURNS)
    batch = made.prepare(*train.group_credit(data, data.returns.view(2, 3), None))
    shares = train.gradient_shares(made, batch, torch.arange(6))
    model, mask, action = made.policy, data.response_mask[:, 1:], data.action_mask[:, 1:]
    log_p = torch.log_softmax(model(data.ids).logits[:, :-1], -1).gather(-1, data.ids[:, 1:, None])[..., 0]
    energy = score(made.reference, data.ids, data.response_mask).logsumexp.detach().neg()
    for credit, (alpha, beta) in {"uniform": (1, 0), "actfocus": (0.1, 0.5)}.items():
        weights = token_weights(energy, data.action_mask, data.response_mask, alpha=alpha, beta=beta)[:, 1:]
        for share, tokens in zip(shares[credit], (action, mask & ~action)):
            loss = -(weights * batch["advantages"][:, 1:] * log_p * tokens).sum() / weights.sum()
            gradient = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
            assert share == pytest.approx(sum(float(g.square().sum()) for g in gradient), rel=1e-3)


# Show


def test_an_episode_is_shown_with_the_weights_of_its_tokens(trained):
    cache, out = trained
    for arguments in ((), (out / "checkpoints" / "grpo-actfocus-0.pt",)):
        result = command(cache, out, "--plan-in", "think", "--show", *arguments)
        assert result.returncode == 0, result.stderr
        assert "turn 1" in result.stdout and "######" in result.stdout and "\x1b" not in result.stdout
        assert re.search(r"return [+-]\d+\.\d, advantage [+-]\d\.\d\d", result.stdout)
        assert all(1 <= float(weight) <= 1.5 for weight in re.findall(r"\[\S* ?(\d\.\d\d)\]", result.stdout))


def test_shades_follow_the_weights():
    settings = train.Settings()
    pale, strong = (train.shaded("Up", weight, True, settings, colour=True) for weight in (1.0, 1.5))
    assert pale != strong and "Up" in pale and pale.endswith("\x1b[0m")
    assert train.shaded("hm", 0.1, False, settings, colour=True) == "\x1b[2mhm\x1b[0m"
    assert train.shaded(" Up", 1.234, True, settings, colour=False) == "[Up 1.23]"
    assert train.shaded("hm", 0.1, False, settings, colour=False) == "hm"
    assert train.shaded("Up", 1.0, True, train.Settings(beta=0.0), colour=True)


def test_text_stands_beside_the_board_and_is_broken_to_fit():
    tokens = [(word, f"<{word}>") for word in ("one", " two", " three", " four", " five")]
    lines = train.beside(["####", "#P_#"], tokens, width=4 + 3 + 10)
    assert lines == ["####   <one>< two>", "#P_#   < three>", "       < four>< five>"]
    assert len(train.beside(["#"], [("ab", "ab")] * 30, width=14)) == 6  # text without a space is broken too
    assert train.beside(["####", "#P_#"], [], width=20) == ["####", "#P_#"]


@pytest.mark.parametrize("arguments, words", [
    (["--diagnose", "no/such.pt"], "no/such.pt"), (["--show", "no/such.pt"], "no/such.pt"), (["--show", "--diagnose"], "exclude"),
    (["--show", "--resume"], "exclude"), (["--diagnose", "--groups", "1"], "groups")])
def test_wrong_requests_end_in_one_line(arguments, words, capsys, tmp_path):
    with pytest.raises(SystemExit) as exit:
        train.main(["--cache", str(tmp_path), "--out", str(tmp_path), *arguments])
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.count("\n") == 1 and words in error


def test_a_checkpoint_of_another_agent_or_a_damaged_one_ends_in_one_line(trained, tmp_path):
    cache, out = trained
    checkpoint = out / "checkpoints" / "grpo-actfocus-0.pt"
    result = command(cache, out, "--plan-in", "think", "--width", "64", "--show", checkpoint)
    assert result.returncode == 1 and "another agent" in result.stderr and "Traceback" not in result.stderr
    (tmp_path / "bad.pt").write_bytes(checkpoint.read_bytes()[:-9])
    result = command(cache, out, "--plan-in", "think", "--show", tmp_path / "bad.pt")
    assert result.returncode == 1 and "no whole checkpoint" in result.stderr and "Traceback" not in result.stderr


# Tables


def arm(credit, seed, boards, tokens=(0, 100), success=(0.2, 0.4)):
    return {"algo": "grpo", "credit": credit, "seed": seed, "eval_steps": [0, 10], "eval_success": list(success),
            "final_success": float(np.mean(boards)), "peak_success": max(success), "final_board_success": list(boards),
            "eval_generated_tokens": list(tokens), "updated_tokens": 50, "seconds": 60.0}


def test_the_paired_interval_is_about_the_difference():
    """Boards differ by far more than the credits do: paired, the gain of 0.1 is certain; unpaired it would not be."""
    boards = np.linspace(0, 0.9, 40)
    mean, low, high = train.paired_gain(*([arm(credit, s, boards + plus) for s in range(3)]
                                          for credit, plus in (("actfocus", 0.1), ("uniform", 0.0))))
    assert mean == pytest.approx(0.1) and low == pytest.approx(0.1) and high == pytest.approx(0.1)
    flip = np.where(np.arange(40) % 2, 0.5, -0.5)
    mean, low, high = train.paired_gain([arm("actfocus", 0, boards + flip)], [arm("uniform", 0, boards)])
    assert mean == pytest.approx(0) and low == pytest.approx(-0.155, abs=0.03) and high == pytest.approx(0.155, abs=0.03)


def test_success_at_equal_tokens_lies_on_the_curve():
    groups = {("grpo", "uniform"): [arm("uniform", 0, [0.4], tokens=(0, 4000))],
              ("grpo", "carl"): [arm("carl", 0, [0.4], tokens=(0, 1000))]}
    head, plain, carl = train.costs(groups)
    assert "1k generated tokens" in head and plain.split()[2] == "25.0" and carl.split()[2] == "40.0"
    assert carl.split()[3:] == ["1.0", "0.1", "1.0"]


