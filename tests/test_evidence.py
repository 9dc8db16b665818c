"""What extras.diagnose, extras.show and extras.report compute: correlations, gradient shares, intervals, shades."""

import contextlib
import dataclasses
import io
import json
import math
import os
import re
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from test_train import BOARDS, BRIEF, RETURNS, ROOT, arm_of, batch_of, run, strict, trajectories_of, words

from actfocus import SIGNALS, token_weights
from extras import diagnose, gpu, report, show, study
from extras.diagnose import gradient_shares, rank_correlation, spearman
from extras.report import collapse, costs, paired_gain, table
from extras.runs import ArmFiles, load_checkpoint
from rollout import score
from train import Settings


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(directory, checkpoint) of a small finished run."""
    out = tmp_path_factory.mktemp("run")
    code, _, error = run("--out", out, *BRIEF, "--algos", "grpo", "--credits", "actfocus", "uniform:lr=3e-5")
    assert code == 0, error
    return out, ArmFiles(out, "grpo", "actfocus", 0).checkpoint


def call(main, *arguments):
    """A command in this process -> (exit code, stdout, stderr)."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(argument) for argument in arguments])
            code = 0
        except SystemExit as exit:
            code = exit.code
    return code, out.getvalue(), err.getvalue()


def test_a_summary_says_what_was_run_on_what(trained):
    summary = strict((trained[0] / "summary.json").read_text())
    assert [arm["credit"] for arm in summary["arms"]] == ["actfocus", "uniform:lr=3e-5"]
    assert "out" not in summary["config"] and {"torch", "date", "cores"} <= summary["config"]["made_with"].keys()
    for arm in summary["arms"]:
        assert len(arm["eval_steps"]) == len(arm["eval_generated_tokens"]) == len(arm["eval"]["fact_accuracy"]) == 2
        assert arm["updates"] > 0 and arm["updated_tokens"] > 0 and arm["eval_generated_tokens"][0] == 0


def test_a_summary_counts_what_the_log_holds_and_knows_floor_and_ceiling():
    lines = [{"algo": "grpo", "credit": "carl", "seed": 1, "step": 0, "eval_success": 0.5, "eval_board_success": [0.5],
              "eval_format_valid": 1.0},
             {"algo": "grpo", "credit": "carl", "seed": 1, "step": 1, "generated_tokens": 70, "updates": 2,
              "seconds": 1.5, "updated_tokens": 9, "skipped_updates": 1, "eval_success": 0.25,
              "eval_board_success": [0.25], "eval_format_valid": 0.5}]
    settings = Settings(algos=("grpo",), credits=("carl",), eval_boards=3)
    found = report.summary(settings, "abcd", [lines])
    entry, = found["arms"]
    assert entry["final_board_success"] == [0.25]
    assert entry["final_success"] == 0.25 and entry["peak_success"] == 0.5 and entry["eval_generated_tokens"] == [0, 70]
    assert (entry["updates"], entry["updated_tokens"], entry["skipped_updates"]) == (2, 9, 1)
    assert found["config"]["agent"] == "abcd" and 0 <= found["floor"] < found["ceiling"] == 1
    assert json.dumps(found, allow_nan=False)


# Diagnosis


def test_the_diagnosis_of_an_agent_and_of_a_checkpoint(trained, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # not installed: no picture
    monkeypatch.setattr(diagnose, "rank_correlation", partial(rank_correlation, draws=50))
    out, checkpoint = trained
    for arguments in (words([]), ["--checkpoint", checkpoint, "--signal", "nll"]):  # with its run's other settings
        code, output, error = call(diagnose.main, *arguments, "--groups", "2", "--nested-boards", "2", "--out", tmp_path)
        assert code == 0, error
        found = strict((tmp_path / "diagnosis.json").read_text())
        assert found["groups"] == 2 and found["seconds"] > 0 and found["config"]["rollouts"] == 4
        assert found["agent"] == (str(checkpoint) if "--checkpoint" in arguments else "base")
        assert 0 < found["action_fraction"] < 1 and len(found["spearman"]) == 3 * (len(SIGNALS) - 1)
        assert all(rho is None or -1 <= low <= rho <= high <= 1 for rho, low, high in found["spearman"].values())
        uniform, focused = (found["grad_share_action"][credit] for credit in ("uniform", "actfocus"))
        assert 0 < uniform < focused < 1 and found["groups_with_spread"] > 0
        shifts = [rho for name, (rho, *_) in found["spearman"].items() if name.startswith("shift")]
        assert (shifts == [None] * 3) == (found["agent"] == "base")  # it is its own reference: rounding is no signal
        for part in ("groups of 4", "action tokens:", "Spearman", "energy", "shift", f"ranked by {found['signal']}:"):
            assert part in output
    assert found["signal"] == "nll" and (out / "metrics.jsonl").exists() and not (out / "diagnosis.json").exists()


def test_the_gradient_shares_are_of_the_groups_that_the_filter_keeps(monkeypatch):
    """Of three groups, the first without spread, the last with the most."""
    arm, seen = arm_of(prompts=3, keep=0.7), []
    played = trajectories_of(arm, [1, 1, 1, 0, 1, 2, 3, 9, 5])
    monkeypatch.setattr(arm, "play", lambda *_: played)
    monkeypatch.setattr(diagnose, "gradient_shares", lambda _, batch: seen.append(batch.returns.tolist()) or {})
    diagnose.diagnose(arm, 3)
    assert seen == [[3, 9, 5, 0, 1, 2]]


def test_an_agent_without_an_answer_is_diagnosed_too(agent, tmp_path):
    """Neither action tokens nor spread: what cannot be told is null, not NaN."""
    for part in agent[:2]:
        part.save_pretrained(tmp_path / "agent")
    code, output, error = call(diagnose.main, *words([]), "--model", tmp_path / "agent", "--max-response-tokens", "3",
                               "--groups", "2", "--nested-boards", "2", "--out", tmp_path)
    assert code == 0 and "constant" in output, error
    found = strict((tmp_path / "diagnosis.json").read_text())
    assert found["action_fraction"] == found["groups_with_spread"] == 0
    assert set(map(tuple, found["spearman"].values())) == {(None, None, None)}


def test_where_nothing_has_weight_there_is_no_share_of_a_gradient(tmp_path, monkeypatch):
    """alpha 0, and not one answer in groups whose returns differ."""
    answers = (("hm",), ("hm", "well"))
    monkeypatch.setattr(show.Arm, "play", lambda arm, *_: trajectories_of(arm, RETURNS, answers=answers))
    code, _, error = call(diagnose.main, "--alpha", "0", "--groups", "2", "--nested-boards", "2", "--prompts", "2", "--rollouts", "3",
                          "--keep", "1", "--max-response-tokens", "1", "--out", tmp_path)
    assert code == 0, error
    assert strict((tmp_path / "diagnosis.json").read_text())["grad_share_action"] == {"uniform": 0, "actfocus": None}


def test_the_interval_holds_the_correlation_and_shrinks_with_more_groups():
    generator = torch.Generator().manual_seed(0)
    widths = []
    for n in (40, 400):
        x = torch.randn(n, generator=generator)
        y = x + torch.randn(n, generator=generator)
        rho, low, high = rank_correlation(x, y, np.random.default_rng(0), draws=300)
        assert rho == spearman(x, y) and low < rho < high and 0.3 < rho < 0.95
        widths.append(high - low)
    assert widths[1] < 0.5 * widths[0]
    assert all(map(math.isnan, rank_correlation(torch.ones(9), torch.arange(9.0), np.random.default_rng(0))))


def test_groups_without_an_action_token_are_left_out():
    x, y = torch.tensor([1.0, math.nan, 2.0, 3.0, 4.0]), torch.tensor([1.0, 99.0, 2.0, 3.0, 4.0])
    assert rank_correlation(x, y, np.random.default_rng(0), draws=50)[0] == pytest.approx(1)


def test_the_two_parts_of_the_gradient_are_the_losss():
    """Against a loss written out with full logits, differentiated once for action tokens and once for the others."""
    for signal in ("energy", "nll"):  # ActFocus's share is that of the signal that was asked for
        arm = arm_of(micro_batch=2, signal=signal)
        batch = batch_of(arm)
        shares = gradient_shares(arm, batch)
        model, mask, action = arm.policy, batch.response_mask[:, 1:], batch.action_mask[:, 1:]
        log_p = torch.log_softmax(model(batch.ids).logits[:, :-1], -1).gather(-1, batch.ids[:, 1:, None])[..., 0]
        of_token = score(arm.reference, batch.ids, batch.response_mask)
        scores = {"energy": -of_token.logsumexp, "nll": -of_token.logprobs}[signal].detach()
        for credit, (alpha, beta) in {"uniform": (1, 0), "actfocus": (0.1, 0.5)}.items():
            weights = token_weights(scores, batch.action_mask, batch.response_mask, alpha=alpha, beta=beta)[:, 1:]
            for share, tokens in zip(shares[credit], (action, mask & ~action)):
                loss = -(weights * batch.advantages[:, 1:] * log_p * tokens).sum() / weights.sum()
                gradient = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
                assert share == pytest.approx(sum(float(g.square().sum()) for g in gradient), rel=1e-3)


# Show


def test_an_episode_is_shown_with_the_weights_of_its_tokens(trained, tmp_path):
    out, checkpoint = trained
    for arguments in (words([]), ["--checkpoint", checkpoint]):
        code, output, error = call(show.main, *arguments, "--rollouts", "8")
        assert code == 0, error
        assert "turn 1" in output and "######" in output and "\x1b" not in output
        assert re.search(r"return [+-]\d+\.\d, advantage [+-]\d\.\d\d", output)
        weights = [float(weight) for weight in re.findall(r"\[\S* ?(\d\.\d\d)\]", output)]
        assert weights and all(1 <= weight <= 1.5 for weight in weights)
        assert str(arguments[1]) in output or "before training" in output
        assert "Symbols: # wall" in output and "Not one response" not in output
    log = checkpoint.with_suffix(".jsonl").read_text()  # what the arm was trained with stands there
    (tmp_path / "arms").mkdir()
    (tmp_path / "arms" / "a.pt").write_bytes(checkpoint.read_bytes())
    (tmp_path / "settings.json").write_text((out / "settings.json").read_text())
    for credit, shown in (("actfocus:alpha=0.3,beta=0", "tags weigh 0.3; action tokens 1 to 1,"),
                          ("uniform", "tags weigh 0.1;"), ("carl+actfocus:alpha=0.3", "tags weigh 0.1;")):
        (tmp_path / "arms" / "a.jsonl").write_text(log.replace('"credit": "actfocus"', f'"credit": "{credit}"'))
        code, _, error = call(show.main, "--checkpoint", tmp_path / "arms" / "a.pt", "--rollouts", "4", "--html", tmp_path / "a.html")
        assert code == 0 and shown in (tmp_path / "a.html").read_text(), error
    code, output, error = call(show.main, "--checkpoint", checkpoint, "--rollouts", "8", "--alpha", "0.25",
                               "--html", tmp_path / "episode.html")
    assert code == 0 and not output, error
    page = (tmp_path / "episode.html").read_text()
    assert "tags weigh 0.25" in page and "######" in page and str(checkpoint) in page and "src=" not in page and "href=" not in page
    assert page.count("<section>") == page.count("</section>") > 1 and "nan" not in page


def test_the_episode_shown_is_the_best_of_one_group_on_the_board_that_was_asked_for():
    arm = arm_of(rollouts=8, env_options=tuple(BOARDS))
    batch, row, advantages = show.best_of_group(arm, 5)
    assert len(batch) == len(advantages) == 8 and set(batch.seeds.tolist()) == {5}
    assert row == int(batch.returns.argmax()) and advantages[row] == advantages.max()
    shown, last = show.turns(arm, batch, row)
    assert sum(reward for *_, reward in shown) == pytest.approx(float(batch.returns[row]), abs=1e-4) and len(last) == 6
    tokens = [token for _, turn, _ in shown for token in turn]
    mask = batch.response_mask[row]
    assert [token.weight for token in tokens] == batch.weights[row][mask].tolist()
    assert [token.is_action for token in tokens] == batch.action_mask[row][mask].tolist()
    for name, column in (("energy", batch.energy), ("logprob", batch.old_logprobs), ("reference", batch.ref_logprobs)):
        assert [getattr(token, name) for token in tokens] == column[row][mask].tolist()
    for token in tokens:  # w = 1 + beta * sigmoid(z)
        assert not token.is_action or token.weight == pytest.approx(1 + 0.5 / (1 + math.exp(-token.z)), abs=1e-5)
    shares, uniform = show.action_shares(arm, batch), batch.action_mask.sum() / batch.response_mask.sum()
    (_, tokens_share), (_, weight_share), (_, gradient), (_, plain) = shares
    assert tokens_share == pytest.approx(float(uniform)) and tokens_share < weight_share < gradient and plain < gradient <= 1
    page = show.page(shown, last, "<&>", arm.settings, shares)
    assert page.count(" data-t=") == len(tokens) and "<title>&lt;&amp;&gt;</title>" in page


def test_the_page_stands_without_action_tokens_and_with_text_that_looks_like_html(monkeypatch):
    arm = arm_of(rollouts=3, env_options=tuple(BOARDS))
    monkeypatch.setattr(show.Arm, "play", lambda arm, *_: trajectories_of(arm, [-0.1, 0.2, 0.3], answers=(('<b id="x">hm',),)))
    batch, row, _ = show.best_of_group(arm, 0)
    shown, last = show.turns(arm, batch, row)
    page = show.page(shown, last, "title", arm.settings, show.action_shares(arm, batch))
    assert "<b" not in page.split("<section>", 1)[1] and 'class="act"' not in page


def test_one_group_is_played_and_without_a_valid_response_it_is_said(monkeypatch):
    played = []

    def play(arm, seeds, *_):
        played.append(seeds)
        return trajectories_of(arm, [-0.1] * 3, answers=(("hm",),))
    monkeypatch.setattr(show.Arm, "play", play)
    code, output, error = call(show.main, "--seed", "7", "--rollouts", "3")
    assert code == 0 and played == [[7] * 3] and "board of seed 7" in output, error
    assert "Not one response" in output and "env.json" in output
    code, output, error = call(show.main, "--seed", "-1")
    assert code == 2 and error.count("\n") == 1 and "seed" in error


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_narrow_terminal_that_knows_few_characters_is_enough(encoding):
    done = subprocess.run([sys.executable, "-m", "extras.show", "--seed", "3", "--rollouts", "4"], cwd=ROOT, capture_output=True,
                          env=os.environ | {"COLUMNS": "20", "PYTHONIOENCODING": encoding}, timeout=100)
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.decode(encoding).splitlines())) <= 21  # a full stop may stick out


def test_shades_follow_the_weights():
    shaded = lambda *token, beta=0.5, colour=True: show.shaded(*token, beta, colour)
    pale, strong = (shaded("Up", weight, True)[1] for weight in (1.0, 1.5))
    assert pale != strong and "Up" in pale and pale.endswith("\x1b[0m")
    assert shaded("hm", 0.1, False) == ("hm", "\x1b[2mhm\x1b[0m")
    assert shaded(" Up", 1.234, True, colour=False) == (" [Up 1.23]",) * 2
    assert shaded("hm", 0.1, False, colour=False) == ("hm", "hm")
    assert shaded("Up", 1.0, True, beta=0.0) and "\n" not in shaded("a\nb\x1b", 1.0, False)[0]


def test_text_stands_beside_the_board_and_is_broken_to_fit():
    tokens = [(word, f"<{word}>") for word in ("one", " two", " three", " four", " five")]
    lines = show.beside(["####", "#P_#"], tokens, width=4 + 3 + 20)
    assert lines == ["####   <one>< two>< three>< four>", "#P_#   <five>"]
    assert show.beside(["####"], tokens, width=26) == ["####", "<one>< two>< three>< four>< five>"]  # no room beside it
    assert show.beside(["####"], tokens, width=8) == ["####", "<one>< two>", "<three>", "<four>", "<five>"]
    assert len(show.beside(["#"], [("ab", "ab")] * 51, width=24)) == 6  # text without a space is broken too
    assert show.beside(["####", "#P_#"], [], width=20) == ["####", "#P_#"]


@pytest.mark.parametrize("main", [show.main, diagnose.main])
@pytest.mark.parametrize("arguments, words", [
    (["--checkpoint", "no/such.pt"], "no/such.pt"), (["--checkpoint", "."], "checkpoint"), (["--alpha", "2"], "alpha"),
    (["--model", "/no/such"], "model"), (["--resume"], "resume"), (["--env", "mine:Game"], "mine")])
def test_wrong_requests_end_in_one_line(main, arguments, words):
    code, output, error = call(main, *arguments)
    assert code == 2 and error.count("\n") == 1 and words in error and not output
    assert error.startswith("python -m extras.")


def test_a_diagnosis_needs_two_groups():
    code, _, error = call(diagnose.main, "--groups", "1")
    assert code == 2 and error.count("\n") == 1 and "groups" in error


def test_a_checkpoint_of_another_agent_or_a_damaged_one_ends_in_one_line(trained, tmp_path, agent):
    out, checkpoint = trained
    for part in agent[:2]:
        part.save_pretrained(tmp_path / "agent")
    code, _, error = call(show.main, "--checkpoint", checkpoint, "--model", tmp_path / "agent")
    name = load_checkpoint(checkpoint)["agent"]
    assert code == 2 and error.count("\n") == 1 and "was trained from agent" in error and name in error
    (tmp_path / "bad.pt").write_bytes(checkpoint.read_bytes()[:-9])
    code, _, error = call(show.main, "--checkpoint", tmp_path / "bad.pt")
    assert code == 2 and "no whole checkpoint" in error.splitlines()[-1] and "Traceback" not in error


def test_a_checkpoint_of_an_older_version_is_shown(trained, tmp_path):
    """Its settings.json may lack settings, and hold one that is gone."""
    out, checkpoint = trained
    (tmp_path / "arms").mkdir()
    (tmp_path / "arms" / "a.pt").write_bytes(checkpoint.read_bytes())
    known = strict((out / "settings.json").read_text())
    del known["kl_coef"]
    (tmp_path / "settings.json").write_text(json.dumps(known | {"width": 64}))
    code, output, error = call(show.main, "--checkpoint", tmp_path / "arms" / "a.pt")
    assert code == 0 and "turn 1" in output, error


# Tables


def arm(credit, seed, boards, tokens=(0, 100), success=(0.2, 0.4)):
    return {"algo": "grpo", "credit": credit, "seed": seed, "eval_steps": [0, 10], "eval_success": list(success),
            "final_success": float(np.mean(boards)), "peak_success": max(success), "final_board_success": list(boards),
            "eval_generated_tokens": list(tokens), "updated_tokens": 50, "seconds": 60.0}


def test_the_paired_interval_is_about_the_difference():
    """Boards differ by far more than the credits do: paired, the gain of 0.1 is certain; unpaired it would not be."""
    boards = np.linspace(0, 0.9, 40)
    mean, low, high = paired_gain(*([arm(credit, s, boards + plus) for s in range(3)]
                                    for credit, plus in (("actfocus", 0.1), ("uniform", 0.0))))
    assert mean == pytest.approx(0.1) and low == pytest.approx(0.1) and high == pytest.approx(0.1)
    flip = np.where(np.arange(40) % 2, 0.5, -0.5)
    mean, low, high = paired_gain([arm("actfocus", 0, boards + flip)], [arm("uniform", 0, boards)])
    assert (mean, low, high) == pytest.approx((0, -0.155, 0.155), abs=0.03)


def test_success_at_equal_tokens_lies_on_the_curve():
    groups = {("grpo", "uniform"): [arm("uniform", 0, [0.4], tokens=(0, 4000))],
              ("grpo", "carl"): [arm("carl", 0, [0.4], tokens=(0, 1000))]}
    head, plain, carl = costs(groups)
    assert "1k generated tokens" in head and plain.split()[2] == "25.0" and carl.split()[2] == "40.0"
    assert carl.split()[3:] == ["1.0", "0.1", "1.0"]


def test_the_table_reports_means_ranges_and_who_won():
    def arm(algo, credit, seed, *success):
        return {"algo": algo, "credit": credit, "seed": seed, "eval_steps": [0, 10], "eval_success": list(success),
                "final_success": success[-1], "peak_success": max(success),
                "final_board_success": [success[-1] - 0.1, success[-1] + 0.1]}
    arms = [arm("grpo", "uniform", 0, 0.2, 0.4), arm("grpo", "uniform", 1, 0.5, 0.3),
            arm("grpo", "actfocus", 0, 0.2, 0.7), arm("grpo", "actfocus", 1, 0.5, 0.2)]
    config = dataclasses.asdict(Settings(seeds=(0, 1)))
    text = table({"config": config, "floor": 0.05, "ceiling": 1.0, "arms": arms})
    assert "grpo: ActFocus ends 10.0 points ahead of uniform, ahead in 1 of 2 seeds" in text
    assert "35.0 (30.0..40.0)" in text and "-10.0 (-20.0..0.0)" in text and "2 seeds prove nothing" in text
    assert not math.isnan(float(text.split("random actions ")[1].split(",")[0]))
    assert "collapsed" not in text
    arms[1]["collapsed_at"] = 30
    text = table({"config": config, "floor": 0.05, "ceiling": 1.0, "arms": arms})
    assert "grpo uniform seed 1 collapsed by step 30" in text


def test_collapse_is_three_evaluations_in_a_row_or_how_a_run_ends():
    assert collapse([(0, 0.5), (10, 0.05), (20, 0.0), (30, 0.09), (40, 0.0), (50, 0.9)]) == 30
    assert collapse([(0, 0.05), (10, 0.05), (20, 0.1), (30, 0.0), (40, 0.0)]) == 40
    assert collapse([(0, 0.9), (60, 0.1)]) is None and collapse([(0, 0.9), (60, 0.09)]) == 60
    assert collapse([(0, 0.0)]) is None and collapse([(0, 0.05), (10, 0.0)]) is None  # it never had the form


def test_the_collapses_in_the_results_would_be_said():
    arms = [arm for path in (report.README.parent).rglob("summary.json") for arm in strict(path.read_text())["arms"]]
    ends = [arm for arm in arms if arm.get("eval", {}).get("format_valid", [1])[-1] < 0.1]
    assert len(ends) >= 10
    for arm in ends:
        assert collapse(list(zip(arm["eval_steps"], arm["eval"]["format_valid"]))) is not None


def test_the_table_of_a_finished_run_is_printed_again(trained, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["report", str(trained[0])])
    report.main()
    text = capsys.readouterr().out
    assert "grpo actfocus" in text and "grpo uniform:lr=3e-5" in text and "1 seed proves nothing" in text


@pytest.mark.slow
def test_everything_that_wants_a_gpu_can_be_rehearsed(tmp_path):
    """Every part runs to its end at toy size, and what it printed and took is in the file."""
    done = subprocess.run([sys.executable, "-m", "extras.gpu", "--rehearse", "--out", tmp_path], cwd=gpu.ROOT, text=True,
                          capture_output=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stderr
    found = strict((tmp_path / "gpu.json").read_text())
    assert list(found["parts"]) == list(gpu.PARTS) and found["rehearsal"]
    for name, part in found["parts"].items():
        assert part["code"] == 0 and part["printed"], (name, part)
    assert all(arm["steps"] == 2 and len(arm["success"]) == 2
               for arm in found["parts"]["default comparison"]["arms"].values())


def test_the_study_has_every_setting_whose_files_are_there_and_its_rho_is_of_share_and_gain():
    """Its table stands in results/README.md, which a test holds to it."""
    points, folder = study.points(), report.README.parent / "decided"
    assert len(points) == len(list(folder.glob("*.json"))) and len(list(study.table())) == len(points) >= 5
    for _, found, rho, facts, arms, rivals, finals in points:
        assert 0.5 < facts <= 1 and finals[1] == pytest.approx(np.mean([arm["final_success"] for arm in arms[:3]]))
        assert found["share"] == pytest.approx(found["answer"] / (found["answer"] + found["reasoning"]))
        assert found["interval"][0] <= found["share"] <= found["interval"][1] and -1 <= rho[0] <= 1
        assert [arm["seed"] for arm in arms] == [arm["seed"] for arm in rivals] and {arm["credit"] for arm in arms} == {"actfocus"}
        assert {arm["updates"] for arm in arms} == {arm["updates"] for arm in rivals}  # equal budgets
    rho, low, high = study.correlation()
    assert low <= rho <= high


def test_arms_that_end_alike_are_level():
    config = dataclasses.asdict(Settings())
    arms = [arm(credit, 0, [0.4, 0.6]) for credit in ("uniform", "actfocus")]
    text = table({"config": config, "floor": 0.05, "ceiling": 1.0, "arms": arms})
    assert "grpo: ActFocus ends level with uniform, ahead in 0 of 1 seeds" in text


def test_floor_and_ceiling_are_of_the_boards_that_evaluations_play(monkeypatch):
    for name in ("random_floor", "mean_ceiling"):
        monkeypatch.setattr(report, name, lambda env, seeds: list(seeds))
    found = report.summary(Settings(eval_boards=2), "abcd", [])
    assert found["floor"] == found["ceiling"] == [10**9, 10**9 + 1]
