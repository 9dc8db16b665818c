"""A run that is killed, starved or misled: what it loses (nothing) and what it says."""

import contextlib
import copy
import dataclasses
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_train import BOARDS, BRIEF, ROOT, SMALL, TIMED, arm_of, batch_of, metrics, run, scripted, start, strict, words

import train
from actfocus import gae, group_advantages, token_weights, variance_filter, weighted_policy_loss
from env import ENVS, Sokoban
from extras import runs
from extras.runs import ArmFiles, load_checkpoint, write
from rollout import load_agent

ONE = ["--algos", "ppo", "--credits", "actfocus", "--steps", "3"]  # one arm, with checkpoints after steps 0, 2 and 3
STOPPABLE = ["--seeds", "0", "1", "--algos", "ppo", "--credits", "actfocus", "--steps", "500"]  # two arms, for long


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The directory of a run of ONE that was never stopped."""
    out = tmp_path_factory.mktemp("whole")
    code, _, error = run("--out", out, *ONE)
    assert code == 0 and sum(line.get("updates", 0) for line in metrics(out)) >= 4, error
    return out


def progress(out):
    """How far a run has come: the lines of its arms' logs."""
    return sum(path.read_text().count("\n") for path in (out / "arms").glob("*.jsonl"))


def wait_for(out, lines, process, seconds=120):
    until = time.monotonic() + seconds
    while progress(out) < lines and process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)


def children_of(pid):
    return subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout.split()


def running(pid):
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def gone(pids, seconds):
    """Whether they all end in that time."""
    until = time.monotonic() + seconds
    while any(map(running, pids)) and time.monotonic() < until:
        time.sleep(0.05)
    return not any(map(running, pids))


def interrupt(out, lines, end):
    """Start ONE and end it at its so many-th line -> (process, its children at that moment, stderr, directory)."""
    process = start(out, *ONE)
    wait_for(out, lines, process)
    workers = children_of(process.pid)
    end(process)
    try:
        return process, workers, process.communicate(timeout=60)[1], out
    finally:
        process.kill()


@pytest.fixture(scope="module", autouse=True)
def interrupted(tmp_path_factory):
    """Two runs, which end while the tests below run: by SIGKILL after step 2, by SIGTERM after step 0 -> futures."""
    with ThreadPoolExecutor() as pool:
        yield [pool.submit(interrupt, tmp_path_factory.mktemp(name), lines, end) for name, lines, end in (
            ("killed", 3, subprocess.Popen.kill), ("stopped", 1, subprocess.Popen.terminate))]


# Resume


@pytest.fixture
def stopping(monkeypatch):
    """Every arm is asked to stop, from its first step on."""
    monkeypatch.setattr(runs, "asked_to_stop", stop := multiprocessing.Event())
    stop.set()
    return stop


@pytest.mark.slow
@pytest.mark.parametrize("algo, credit", [("ppo", "actfocus"), ("grpo", "uniform")])
def test_an_arm_that_stops_after_every_step_takes_up_where_it_stopped(tmp_path, monkeypatch, stopping, algo, credit):
    """No step is done twice, and nothing that a step changes is missing in the checkpoint."""
    steps, original = [], train.Arm.step
    monkeypatch.setattr(train.Arm, "step", lambda arm: steps.append(len(steps)) or original(arm))
    settings = [train.Settings(**arm_settings(algo, credit), out=str(tmp_path / name)) for name in ("stopped", "whole")]
    files = [ArmFiles(s.out, algo, credit, 0) for s in settings]
    for done in range(3):
        train.train_arm(settings[0], algo, credit, 0)
        assert len(files[0].lines()) == done + 1 == len(steps) + 1
        assert load_checkpoint(files[0].checkpoint)["step"] == done
    train.train_arm(settings[0], algo, credit, 0)
    assert len(steps) == 2
    stopping.clear()
    train.train_arm(settings[1], algo, credit, 0)
    without_times = lambda lines: [{**line, **dict.fromkeys(TIMED)} for line in lines]
    assert without_times(files[0].lines()) == without_times(files[1].lines()) and files[0].lines()[-1]["step"] == 2
    same_state(*(load_checkpoint(file.checkpoint) for file in files))


def arm_settings(algo, credit):
    return SMALL | {"algos": (algo,), "credits": (credit,), "env_options": tuple(BOARDS), "eval_boards": 1,
                    "eval_rollouts": 1}


def same_state(one, two):
    """Two checkpoints, bit for bit."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, two)
    elif isinstance(one, (dict, list)):
        assert len(one) == len(two)
        for key in one if isinstance(one, dict) else range(len(one)):
            same_state(one[key], two[key])
    else:
        assert one == two


def test_a_kill_between_log_and_checkpoint_or_in_the_middle_of_a_line_loses_nothing(whole, tmp_path):
    """The log is ahead of the checkpoint, or torn: it is cut back to what the checkpoint knows."""
    out = shutil.copytree(whole, tmp_path / "run")
    files = ArmFiles(out, "ppo", "actfocus", 0)
    os.replace(f"{files.checkpoint}.previous", files.checkpoint)  # of step 2
    lines = files.log.read_text().splitlines(keepends=True)
    assert load_checkpoint(files.checkpoint)["step"] == 2 and len(lines) == 4
    files.log.write_text("".join(lines) + lines[3][:30])
    code, _, error = run("--out", out, *ONE, "--resume")
    assert code == 0 and metrics(out) == metrics(whole), error
    assert files.log.read_text().startswith("".join(lines[:3]))  # with its times: those steps were not done again


def test_a_log_that_knows_less_than_the_checkpoint_begins_anew(whole, tmp_path):
    files = ArmFiles(shutil.copytree(whole, tmp_path / "run"), "ppo", "actfocus", 0)
    files.log.write_text("".join(files.log.read_text().splitlines(keepends=True)[:2]))
    saved = load_checkpoint(files.checkpoint)
    arm = SimpleNamespace(agent=saved["agent"], settings=train.Settings())  # nothing that could take up a state
    assert files.restore(arm) == 0 and files.lines() == []


def test_a_finished_run_is_not_run_again(whole, tmp_path, monkeypatch):
    out = shutil.copytree(whole, tmp_path / "run")
    monkeypatch.setattr(train.Arm, "step", lambda arm: pytest.fail("a step was done again"))
    code, output, error = run("--out", out, *ONE, "--resume", "--jobs", "3")  # how many at once may change
    assert code == 0 and metrics(out) == metrics(whole) and "ppo actfocus" in output, error


def test_a_finished_run_takes_more_seeds_and_credits_and_keeps_what_it_has(whole, tmp_path, monkeypatch):
    out, played = shutil.copytree(whole, tmp_path / "run"), Counter()
    monkeypatch.setattr(train.Arm, "step", lambda arm: played.update([(type(arm.credit).__name__, arm.generator.initial_seed())])
                        or {"updates": 0})
    more = ["--algos", "ppo", "--steps", "3", "--seeds", "1", "0", "--credits", "uniform", "actfocus"]
    code, _, error = run("--out", out, *more, "--resume")
    assert code == 0 and played == {("uniform", 1): 3, ("actfocus", 1): 3, ("uniform", 0): 3}, error
    arms = {(line["credit"], line["seed"]) for line in metrics(out)}
    assert len(arms) == 4 and [line for line in metrics(out) if (line["credit"], line["seed"]) == ("actfocus", 0)] == metrics(whole)
    assert len(strict((out / "summary.json").read_text())["arms"]) == 4
    for fewer, name in ((ONE, "credits, seeds"), ([*more, "--credits", "uniform:lr=0.5"], "credits")):  # what was there is not dropped
        code, _, error = run("--out", out, *fewer, "--resume")
        assert code == 2 and error.count("\n") == 1 and re.sub(r" \(.*?\)", "", error).endswith(f"another {name}\n"), error


@pytest.mark.slow
def test_a_run_that_is_prolonged_is_the_longer_run(whole, tmp_path):
    out = tmp_path / "run"
    code, _, error = run("--out", out, *ONE, "--steps", "2", "--resume")
    assert code == 0 and f"nothing to resume in {out}: this is a new run" in error
    code, _, error = run("--out", out, *ONE, "--resume")
    assert code == 0 and metrics(out) == metrics(whole) and "nothing to resume" not in error


def test_other_settings_and_another_agent_are_refused_and_named(whole, tmp_path):
    out = shutil.copytree(whole, tmp_path / "run")
    for steps in ("2", "4"):  # fewer, or more where the last evaluation would stand between two others
        code, _, error = run("--out", out, *ONE, "--resume", "--steps", steps)
        assert code == 2 and f"another steps (3, now {steps}): they can grow" in error
    code, _, error = run("--out", out, *ONE, "--resume", "--lr", "0.5", "--gamma", "0.9")
    assert code == 2 and error.count("\n") == 1 and "lr" in error and "gamma" in error and "minibatch" not in error
    assert "they can grow" not in error and "they can grow" not in run("--out", out, *ONE, "--resume", "--steps", "4", "--lr", "1")[2]
    model, tokenizer = load_agent(train.Settings().agent, "cpu")
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    same = ["--out", tmp_path / "other", *ONE, *BRIEF, "--steps", "0", "--model", tmp_path / "model"]
    assert run(*same)[0] == 0 and run(*same, "--resume")[0] == 0
    next(model.parameters()).data[0, 0] += 1e-3
    model.save_pretrained(tmp_path / "model")
    code, _, error = run(*same, "--resume")
    assert code == 2 and error.count("\n") == 1 and "another agent" in error
    settings = tmp_path / "other" / "settings.json"  # and whoever passes over that is told by the checkpoint
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"agent": runs.fingerprint(model, tokenizer)}))
    code, _, error = run(*same, "--resume")
    assert code == 1 and "was trained from agent" in error and "Traceback" not in error


def test_the_fingerprint_tells_weights_vocabulary_and_template():
    model, tokenizer = load_agent(train.Settings().agent, "cpu")
    first = runs.fingerprint(model, tokenizer)
    assert first == runs.fingerprint(*load_agent(train.Settings().agent, "cpu")) and len(first) == 16
    tokenizer.chat_template += " "
    second = runs.fingerprint(model, tokenizer)
    tokenizer.add_tokens(["something"])
    assert len({first, second, runs.fingerprint(model, tokenizer)}) == 3


def test_a_run_of_an_older_version_goes_on_where_what_it_did_not_know_is_at_its_default(whole, tmp_path):
    out = shutil.copytree(whole, tmp_path / "run")
    known = strict((out / "settings.json").read_text())
    del known["kl_coef"], known["jobs"]
    (out / "settings.json").write_text(json.dumps(known | {"width": 64}))  # and it knew one that is gone
    code, _, error = run("--out", out, *ONE, "--resume", "--kl-coef", "0.1")
    assert code == 2 and error.count("\n") == 1 and "another kl_coef (0.0, now 0.1)" in error
    code, _, error = run("--out", out, *ONE, "--resume")
    assert code == 0 and metrics(out) == metrics(whole), error


def test_two_runs_on_one_directory_are_refused(whole, tmp_path):
    out = shutil.copytree(whole, tmp_path / "run")
    with open(out / "lock", "w") as held:
        import fcntl
        fcntl.flock(held, fcntl.LOCK_EX)
        for resume in ([], ["--resume"]):
            code, _, error = run("--out", out, *ONE, *resume)
            assert code == 2 and error.count("\n") == 1 and "another run" in error and str(out) in error
    assert metrics(out) == metrics(whole) and progress(out) == progress(whole)  # it has touched nothing


def test_a_new_run_on_an_old_directory_forgets_what_was_there(whole, tmp_path):
    out = shutil.copytree(whole, tmp_path / "run")
    code, _, error = run("--out", out, *BRIEF, "--algos", "grpo", "--credits", "uniform")
    assert code == 0 and [path.name for path in sorted((out / "arms").iterdir())][0].startswith("grpo"), error
    assert len(metrics(out)) == 2 == progress(out)


def test_long_names_of_credits_make_files_of_their_own(tmp_path):
    """A file name has 255 bytes, and may not hold every character."""
    own = ",".join(f"{name}=0.{i:040}1" for i, name in enumerate(("alpha", "beta", "lr", "lam", "gamma", "clip_low")))
    credits = [f"actfocus:{own}", f"actfocus:{own[:-1]}2", "actfocus:signal=nll"]
    code, _, error = run("--out", tmp_path, *BRIEF, "--steps", "0", "--algos", "grpo", "--credits", *credits)
    assert code == 0 and len(list((tmp_path / "arms").glob("*.pt"))) == 3, error
    assert [line["credit"] for line in metrics(tmp_path)] == credits
    names = [*credits, "a:x/../y", "ü" * 200]
    paths = {ArmFiles("out", "grpo", name, seed).log for name in names for seed in (1, 2**63 - 1)}
    assert len(paths) == 10 and all(path.parent == Path("out/arms") for path in paths)
    assert max(len(path.name.encode()) for path in paths) < 240  # and .previous, .partial


# Checkpoints


STATE = {"weights": torch.arange(1000.0), "lines": "[]", "step": 3}


@pytest.mark.parametrize("damage", [
    lambda data: b"", lambda data: data[: len(data) // 2], lambda data: data[:-1], lambda data: data[10:],
    lambda data: b"\x80\x04cos\nsystem\n", lambda data: b"PK\x05\x06" + bytes(18),
    lambda data: data[:2000] + bytes([data[2000] ^ 1]) + data[2001:]],
    ids=["empty", "half", "cut", "headless", "foreign", "archive of nothing", "bit"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path, capsys, damage):
    path = tmp_path / "arm.pt"
    write(path, STATE | {"step": 2})
    write(path, STATE)
    assert load_checkpoint(path)["step"] == 3 and not capsys.readouterr().err
    path.write_bytes(damage(path.read_bytes()))
    found = load_checkpoint(path)
    assert found["step"] == 2 and torch.equal(found["weights"], STATE["weights"])
    assert "arm.pt is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("every", [37, pytest.param(1, marks=pytest.mark.slow)])
def test_with_any_bit_flipped_what_is_loaded_is_what_was_saved_or_nothing(tmp_path, every):
    """Of a small checkpoint; one that nothing reads may pass."""
    path, state = tmp_path / "arm.pt", STATE | {"weights": torch.arange(10.0)}
    write(path, state)
    data, refused = path.read_bytes(), 0
    flips = list(itertools.product(range(len(data)), range(8)))[::every]
    for place, bit in flips:
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1:])
        with contextlib.redirect_stderr(io.StringIO()):
            found = load_checkpoint(path)
        refused += found is None
        if found is not None:
            assert found.keys() == state.keys() and torch.equal(found["weights"], state["weights"]), (place, bit)
            assert found["step"] == 3 and found["lines"] == "[]", (place, bit)
    assert refused > len(flips) / 2


def test_without_a_whole_checkpoint_the_arm_starts_again(tmp_path):
    assert load_checkpoint(tmp_path / "arm.pt") is None
    for name in ("arm.pt", "arm.pt.previous"):
        (tmp_path / name).write_bytes(b"junk")
        assert load_checkpoint(tmp_path / "arm.pt") is None


def test_a_checkpoint_executes_no_code(tmp_path, capsys):
    """A whole file whose pickle calls a function is refused, not run."""
    class Call:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)
    write(tmp_path / "arm.pt", {"x": Call(), "step": 1})
    assert load_checkpoint(tmp_path / "arm.pt") is None and not (tmp_path / "ran").exists()
    assert "arm.pt" in capsys.readouterr().err
    pickle.loads(pickle.dumps(Call()))  # it could have done harm
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("when", ["write", "fsync", "replace"])
def test_a_full_disk_leaves_the_checkpoint_before_intact(tmp_path, monkeypatch, when):
    path = tmp_path / "arm.pt"
    write(path, STATE)

    def full(*_):
        raise OSError(28, "No space left on device")
    if when == "write":  # the device itself says so
        path.with_name("arm.pt.partial").symlink_to("/dev/full")
    else:
        monkeypatch.setattr(runs.os, when, full)
    with pytest.raises(OSError, match="No space left"):
        write(path, STATE | {"step": 4, "weights": torch.ones(100_000)})
    monkeypatch.undo()
    assert load_checkpoint(path)["step"] == 3


# Signals


def test_a_first_signal_leaves_8_seconds_and_a_second_one_none(monkeypatch, capfd):
    ended, timers = [], []
    monkeypatch.setattr(runs, "received", [])
    monkeypatch.setattr(runs.os, "_exit", ended.append)
    monkeypatch.setattr(runs.threading.Timer, "start", lambda timer: timers.append(timer))
    runs.on_signal(signal.SIGTERM, None)
    assert runs.received == [signal.SIGTERM] and ended == [] and timers[0].interval <= 8 and timers[0].daemon
    assert "--resume" in capfd.readouterr().err
    timers[0].function(*timers[0].args)
    runs.on_signal(signal.SIGINT, None)
    assert ended == [143, 130]


# Numbers that go bad


def spoil(arm, monkeypatch):
    """Its losses are nan from now on."""
    original = arm.loss

    def spoilt(*arguments):
        loss, hidden, log = original(*arguments)
        return loss * math.nan, hidden, log
    monkeypatch.setattr(arm, "loss", spoilt)


SCRIPTED = {"rollouts": 3, "minibatch": 3, "steps": 1}  # settings that fit the scripted episodes


def unchanged(module, before):
    return all(torch.equal(before[name], x) for name, x in module.state_dict().items())


@pytest.mark.parametrize("algo", ["ppo", "grpo"])
def test_an_update_with_bad_numbers_is_skipped_and_three_in_a_row_stop_the_arm(monkeypatch, algo):
    arm = scripted(arm_of(algo))
    before = copy.deepcopy(arm.policy.state_dict())
    for _ in range(2):  # twice two in a row, and a good one in between
        with monkeypatch.context() as patch:
            spoil(arm, patch)
            for _ in range(2):
                metrics = arm.step()
                assert (metrics["updates"], metrics["skipped_updates"]) == (0, 1) and unchanged(arm.policy, before)
                assert json.dumps(metrics, allow_nan=False)
        assert arm.step()["updates"] == 1 and not unchanged(arm.policy, before)
        before = copy.deepcopy(arm.policy.state_dict())
    spoil(arm, monkeypatch)
    with pytest.raises(FloatingPointError, match="three updates"):
        for _ in range(3):
            arm.step()
    assert unchanged(arm.policy, before)


@pytest.fixture
def quick(monkeypatch):
    """Arms whose steps play scripted episodes and which need no evaluation; -> those that were made."""
    arms = []

    class Quick(train.Arm):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            arms.append(scripted(self))
            self.evaluate = lambda: {}
    monkeypatch.setattr(train, "Arm", Quick)
    return arms


@pytest.mark.parametrize("where", ["policy", "reference", "critic"])
def test_a_model_with_bad_numbers_changes_no_weight_and_stops_its_arm_by_name(tmp_path, quick, monkeypatch, where):
    class Broken(train.Arm):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            next(getattr(self, where).parameters()).data.fill_(math.inf)
            self.watched = self.critic if where != "critic" else self.policy
            self.before = copy.deepcopy(self.watched.state_dict())
    monkeypatch.setattr(train, "Arm", Broken)
    settings = train.Settings(**arm_settings("ppo", "actfocus") | SCRIPTED, out=str(tmp_path))
    with pytest.raises(ValueError, match="ppo actfocus seed 0, step 1: "):
        train.train_arm(settings, "ppo", "actfocus", 0)
    assert unchanged(quick[0].watched, quick[0].before)


@pytest.mark.parametrize("rate", ["--lr", "--critic-lr"])
def test_a_rate_that_blows_the_weights_up_stops_its_arm_in_one_line(tmp_path, rate):
    """Without making one of them infinite."""
    code, _, error = run("--out", tmp_path, *BRIEF, "--steps", "9", "--algos", "ppo", "--credits", "uniform", rate,
                         "1e30")
    last = error.splitlines()[-1]
    assert code == 1 and "Traceback" not in error and last.startswith("train.py: ppo uniform seed 0, step ")
    assert re.search(r"\(\w+\.py, line \d+\)$", last)


@pytest.mark.slow
def test_an_arm_that_goes_bad_lets_the_others_finish(tmp_path):
    out = tmp_path / "run"
    process = start(out, *BRIEF, "--steps", "3", "--algos", "ppo", "--jobs", "1", "--credits", "uniform:lr=1e30", "actfocus")
    error = process.communicate(timeout=120)[1]
    assert process.returncode == 1
    assert error.splitlines()[-1].startswith("train.py: ppo uniform:lr=1e30 seed 0, step "), error
    assert ArmFiles(out, "ppo", "actfocus", 0).lines()[-1]["step"] == 3


LACKS = [torch.OutOfMemoryError("CUDA out of memory"),
         RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")]


@pytest.mark.parametrize("error", LACKS, ids=["GPU", "CPU"])
def test_running_out_of_memory_halves_the_micro_batch_and_keeps_the_result(tmp_path, monkeypatch, quick, capsys, error):
    """Of a whole arm: scoring and gradients, and what a checkpoint says of it."""
    loss, scored = train.Arm.loss, train.score

    def starved(function, most):
        def lacking(first, second, *rest):
            if len(second) > most:
                raise error
            return function(first, second, *rest)
        return lacking
    lines = []
    for name, size in (("rich", 4), ("poor", 1)):
        if name == "poor":
            monkeypatch.setattr(train, "score", starved(scored, 2))  # 4 -> 2 while scoring
            monkeypatch.setattr(train.Arm, "loss", starved(loss, 1))  # 2 -> 1
        settings = arm_settings("ppo", "actfocus") | SCRIPTED
        train.train_arm(train.Settings(**settings, out=str(tmp_path / name)), "ppo", "actfocus", 0)
        files = ArmFiles(tmp_path / name, "ppo", "actfocus", 0)
        lines.append(files.lines()[1])
        assert load_checkpoint(files.checkpoint)["micro_batch"] == quick[-1].micro_batch == size
    for key in ("policy_loss", "grad_norm", "value_loss", "think_entropy", "weight_share_action", "updates"):
        assert lines[1][key] == pytest.approx(lines[0][key], rel=1e-3, abs=1e-6), key
    assert lines[0]["updates"] == 2 and capsys.readouterr().err.count("out of memory") == 2


@pytest.mark.parametrize("error", [RuntimeError("shapes do not match"), LACKS[0]])
def test_other_errors_and_one_trajectory_that_does_not_fit_are_not_tried_for_ever(tmp_path, monkeypatch, quick, error):
    def wrong(*_):
        raise error
    monkeypatch.setattr(train.Arm, "loss", wrong)
    with pytest.raises(ValueError, match=f"step 1: {type(error).__name__}: {error}"):
        settings = arm_settings("grpo", "uniform") | SCRIPTED
        train.train_arm(train.Settings(**settings, out=str(tmp_path)), "grpo", "uniform", 0)


# Fuzz


def random_batch(rng):
    """Shapes, masks and numbers of all sizes, some of them bad."""
    b, t = int(rng.integers(1, 5)), int(rng.integers(1, 9))
    response = torch.from_numpy(rng.random((b, t)) < rng.choice([0, 0.3, 0.9, 1]))
    action = response & torch.from_numpy(rng.random((b, t)) < rng.choice([0, 0.3, 1]))
    scale = float(rng.choice([0, 1e-30, 1, 1e4, 1e30]))
    number = lambda: torch.from_numpy(rng.standard_normal((b, t))).float() * scale
    return response, action, number


@pytest.mark.parametrize("part", [0, *(pytest.param(part, marks=pytest.mark.slow) for part in range(1, 4))])
def test_two_thousand_random_batches_give_finite_numbers_or_a_value_error(part):
    rng = np.random.default_rng(part)
    refused = 0
    for _ in range(500):
        response, action, number = random_batch(rng)
        try:
            alpha, beta = float(rng.choice([0, 0.1, 1])), float(rng.choice([0, 0.5, 3]))
            weights = token_weights(number(), action, response, alpha=alpha, beta=beta)
            assert torch.isfinite(weights).all() and not weights[~response].any()
            logprobs = -number().abs().clamp(max=1e4)
            old = -number().abs().clamp(max=1e4)
            loss, stats = weighted_policy_loss(logprobs.requires_grad_(), old, number().clamp(-1e4, 1e4), weights)
            loss.backward()
            assert torch.isfinite(loss) and torch.isfinite(logprobs.grad).all()
            assert all(math.isfinite(float(value)) for value in stats.values())
            rewards, values = number().clamp(-1e30, 1e30), number().clamp(-1e30, 1e30)
            for out in gae(rewards, values, response, gamma=0.9, lam=0.9):
                assert torch.isfinite(out).all() and not out[~response].any()
            returns = number()
            assert torch.isfinite(group_advantages(returns)).all()
            assert len(variance_filter(returns, keep=0.5)) <= len(returns)
        except ValueError as error:
            refused += 1
            names = ("logprobs", "signal", "weights", "advantages", "returns", "rewards", "values")
            assert any(name in str(error) for name in names), error
    assert refused < 400


def test_the_random_batches_reach_the_edges():
    """The fuzz is worth something: it has empty masks, masks without actions, and numbers that overflow."""
    rng = np.random.default_rng(0)
    batches = [random_batch(rng) for _ in range(300)]
    assert any(not r.any() for r, _, _ in batches) and any(r.any() and not a.any() for r, a, _ in batches)
    assert any(number().abs().max() > 1e20 for _, _, number in batches)


@pytest.mark.parametrize("count", [60, pytest.param(500, marks=pytest.mark.slow)])
def test_random_command_lines_end_with_0_or_2(tmp_path, monkeypatch, capsys, count):
    """Parsed in this process, the arms left out: good settings come through, bad ones end in one line."""
    monkeypatch.setattr(runs, "compare", lambda *_: None)
    rng = np.random.default_rng(0)
    names = [f.name for f in dataclasses.fields(train.Settings) if f.name not in ("out", "model", "device")]
    values = ["0", "1", "-1", "0.5", "nan", "inf", "1e400", "", "abc", "ppo", "uniform", "sudoku", "shop", "size=5",
              "32", "grpo", "carl", "uniform:lr=1", "actfocus:", "+", ":", "carl+actfocus", "a2tgpo:turn_clip=common",
              "energy", "x:y", "99999999999999999999"]
    codes = []
    for _ in range(count):
        arguments = ["--out", str(tmp_path), *(["--resume"] if rng.random() < 0.2 else [])]
        for name in rng.choice(names, size=rng.integers(4), replace=False):
            arguments += ["--" + name.replace("_", "-"), str(rng.choice(values))]
        try:
            train.main(arguments)
            codes.append(0)
        except SystemExit as exit:
            codes.append(exit.code)
            error = capsys.readouterr().err
            assert exit.code == 2 and error.count("\n") == 1, (arguments, error)
    assert {0, 2} == set(codes)


# Runs that were interrupted


def test_a_killed_run_takes_its_training_processes_along(interrupted):
    """They would write beside the run that resumes."""
    killed, _ = interrupted
    workers = killed.result()[1]
    assert len(workers) >= 1 and gone(workers, 5)


def test_a_run_that_is_asked_to_stop_finishes_its_step_and_says_how_to_go_on(interrupted):
    process, _, error, out = interrupted[1].result()
    assert process.returncode == 143 and "--resume goes on" in error and "Traceback" not in error
    saved, lines = load_checkpoint(ArmFiles(out, "ppo", "actfocus", 0).checkpoint), progress(out)
    assert saved["step"] == lines - 1


@pytest.mark.parametrize("which", [0, 1], ids=["killed", "stopped"])
def test_an_interrupted_run_goes_on_to_the_same_metrics(interrupted, whole, which):
    """That which was killed with a damaged checkpoint, too."""
    *_, out = interrupted[which].result()
    if which == 0:
        checkpoint = ArmFiles(out, "ppo", "actfocus", 0).checkpoint
        data = checkpoint.read_bytes()
        checkpoint.write_bytes(data[:5000] + bytes([data[5000] ^ 1]) + data[5001:])
    code, output, error = run("--out", out, *ONE, "--resume")
    assert code == 0 and metrics(out) == metrics(whole) and "ppo actfocus" in output, error
    assert ("0.pt is damaged" in error) == (which == 0)


# Slow: many kills, and every signal


def run_on_one_thread(arguments):
    """train.main on one thread, as all the others; its training processes are forks, which import nothing anew."""
    torch.set_num_threads(1)
    runs.torch.multiprocessing.get_context = lambda _: multiprocessing.get_context("fork")
    train.main(words(arguments))


@pytest.fixture
def forkserver():
    """A context whose processes start with everything imported: most kills hit training, not imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train", "extras.report", "extras.facts", "extras.metrics", "extras.options"])
    return context


@contextlib.contextmanager
def begun(context, target, *arguments):
    """A process that runs; with it go those that it started."""
    process = context.Process(target=target, args=arguments)
    process.start()
    yield process
    workers = children_of(process.pid) if process.exitcode is None else []
    process.kill()
    process.join()
    assert gone(workers, 5)


@pytest.mark.slow
def test_a_run_killed_at_random_moments_writes_the_same_metrics(whole, tmp_path, forkserver):
    """SIGKILL, resume, SIGKILL ...: twenty-five times over, wherever the run happens to be, the writes included."""
    chance, kills, number = random.Random(0), 0, 0
    while kills < 25:
        out, resume = tmp_path / str(number), []
        while not (out / "summary.json").exists():
            with begun(forkserver, run_on_one_thread, ["--out", out, *ONE, *resume]) as process:
                process.join(None if kills >= 25 else chance.uniform(0.1, 4.0))
                kills += process.exitcode is None
            resume = ["--resume"]
        assert metrics(out) == metrics(whole), f"after {kills} kills"
        number += 1


def run_until_write(arguments, call, count, in_worker):
    """A run in which a process kills itself in the middle of its count-th call of os.fsync or os.replace."""
    calls, original, parent = itertools.count(1), getattr(os, call), os.getpid()

    def deadly(*files):
        if (os.getpid() != parent) == in_worker and next(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*files)
    setattr(os, call, deadly)
    run_on_one_thread(arguments)


@pytest.mark.slow
@pytest.mark.parametrize("call, in_worker, counts", [
    ("fsync", True, (2, 3, 5)), ("replace", True, (2, 3, 4)),  # 1: the empty log, before the first step
    ("fsync", False, (1, 2, 3)), ("replace", False, (1, 2, 3))])
def test_a_kill_in_the_middle_of_a_write_loses_nothing(whole, tmp_path, forkserver, call, in_worker, counts):
    """In a training process, which the run then names as its end, or in the run itself."""
    for count in counts:
        out = tmp_path / str(count)
        with begun(forkserver, run_until_write, ["--out", out, *ONE], call, count, in_worker) as process:
            process.join(60)
            assert process.exitcode == (1 if in_worker else -signal.SIGKILL)
        with begun(forkserver, run_on_one_thread, ["--out", out, *ONE, "--resume"]) as process:
            process.join(60)
            assert process.exitcode == 0 and metrics(out) == metrics(whole), (call, count)
        assert strict((out / "summary.json").read_text())["arms"][0]["updates"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("number, code, group", [
    (signal.SIGINT, 130, True), (signal.SIGTERM, 143, True), (signal.SIGINT, 130, False)])
def test_a_signal_finishes_the_step_writes_a_checkpoint_and_says_how_to_go_on(tmp_path, number, code, group):
    """Sent to the run alone, or to all its processes, as a terminal and a batch system do."""
    process = start(tmp_path, *STOPPABLE, "--eval-every", "500")
    wait_for(tmp_path, 4, process)
    os.killpg(process.pid, number) if group else process.send_signal(number)
    _, error = process.communicate(timeout=20)
    assert process.returncode == code and "--resume" in error and "Traceback" not in error
    for seed in (0, 1):
        files = ArmFiles(tmp_path, "ppo", "actfocus", seed)
        assert load_checkpoint(files.checkpoint)["step"] == len(files.lines()) - 1 >= 1
    assert len(metrics(tmp_path)) == progress(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_the_training_processes_start_is_a_signal_like_any_other(tmp_path, number, code):
    """Ctrl-C goes to all processes, and those that still import their libraries cannot answer."""
    process = start(tmp_path, *STOPPABLE)
    while not (tmp_path / "metrics.jsonl").exists() and process.poll() is None:
        time.sleep(0.01)
    time.sleep(1)
    os.killpg(process.pid, number)
    _, error = process.communicate(timeout=20)
    assert process.returncode == code and "--resume" in error and "Traceback" not in error


LONG = ["--eval-boards", "2000", "--eval-rollouts", "4"]  # an evaluation of minutes


@pytest.mark.slow
@pytest.mark.parametrize("signals, seconds", [([signal.SIGTERM], 10), ([signal.SIGINT, signal.SIGINT], 2)])
def test_signals_act_in_time_during_a_long_evaluation(tmp_path, signals, seconds):
    """One within ten seconds, a second one at once; no process stays behind."""
    process = start(tmp_path, *STOPPABLE, *LONG)
    while len(list((tmp_path / "arms").glob("*.jsonl"))) < 2 and process.poll() is None:
        time.sleep(0.05)
    time.sleep(1)
    workers, started = children_of(process.pid), time.monotonic()
    for number in signals:
        process.send_signal(number)
        time.sleep(0.1)
    _, error = process.communicate(timeout=30)
    assert time.monotonic() - started < seconds and process.returncode == 128 + signals[0] and "Traceback" not in error
    assert len(workers) >= 2 and gone(workers, 3) and progress(tmp_path) == 0


@pytest.mark.slow
def test_a_killed_run_takes_its_training_processes_along_and_a_second_run_is_kept_off(tmp_path):
    process = start(tmp_path, *STOPPABLE)
    wait_for(tmp_path, 2, process)
    other = start(tmp_path, *STOPPABLE)
    _, error = other.communicate(timeout=60)
    assert other.returncode == 2 and error.count("\n") == 1 and "another run" in error and str(tmp_path) in error
    workers = children_of(process.pid)
    process.kill()
    process.communicate()
    assert len(workers) >= 2 and gone(workers, 3)


@pytest.mark.slow
def test_a_training_process_that_is_killed_ends_the_run_in_one_line(whole, tmp_path):
    process = start(tmp_path, *ONE)
    wait_for(tmp_path, 2, process)
    command = lambda pid: Path(f"/proc/{pid}/cmdline").read_bytes()
    worker, = (pid for pid in children_of(process.pid) if b"spawn_main" in command(pid))
    os.kill(int(worker), signal.SIGKILL)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 1 and "Traceback" not in error and error.splitlines()[-1].startswith("train.py: ")
    assert run("--out", tmp_path, *ONE, "--resume")[0] == 0 and metrics(tmp_path) == metrics(whole)


@pytest.mark.slow
def test_a_directory_that_goes_away_ends_in_one_line(tmp_path):
    """The arms' place is taken by a file: the run ends with exit code 1 and the reason."""
    process = start(tmp_path, *STOPPABLE)
    wait_for(tmp_path, 2, process)
    (tmp_path / "arms").rename(tmp_path / "moved")
    (tmp_path / "arms").write_text("")
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1 and "Traceback" not in error
    assert error.splitlines()[-1].startswith("train.py: ") and "arms" in error.splitlines()[-1]


@pytest.mark.slow
def test_a_full_disk_ends_a_run_in_one_line_and_with_room_it_goes_on(whole, tmp_path):
    """Files of more than a megabyte cannot be written: logs can, checkpoints cannot."""
    limited = 'ulimit -f 1024; exec "$0" train.py "$@"'
    arguments = ["bash", "-c", limited, sys.executable, *words(["--out", tmp_path, *ONE])]
    result = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith("train.py: ") and "large" in result.stderr.splitlines()[-1]
    assert run("--out", tmp_path, *ONE, "--resume")[0] == 0 and metrics(tmp_path) == metrics(whole)


def count_threads(settings, *arm):
    """In the place of train_arm: how many threads a training process has."""
    ArmFiles(settings.out, *arm).log.parent.mkdir(exist_ok=True)
    ArmFiles(settings.out, *arm).log.write_text(json.dumps({"threads": torch.get_num_threads()}) + "\n")


@pytest.mark.slow
def test_training_processes_share_the_cores_and_never_take_more_threads_than_the_run_has(tmp_path, monkeypatch):
    """OMP_NUM_THREADS is what the run has; as many arms as run side by side share the cores, however many are left."""
    monkeypatch.setattr(runs, "received", [])
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    cores, before = len(os.sched_getaffinity(0)), torch.get_num_threads()
    try:
        for jobs, threads in ((1, 1), (1, cores), (2, cores)):
            settings, seen = train.Settings(seeds=(0, 1), jobs=jobs, out=str(tmp_path / f"{jobs}-{threads}")), []
            Path(settings.out).mkdir()
            torch.set_num_threads(threads)
            runs.run_arms(count_threads, settings, [("grpo", "uniform", seed) for seed in (0, 1)], seen.append)
            assert seen == [{"threads": max(1, min(threads, cores // jobs))}] * 2
    finally:
        torch.set_num_threads(before)
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), handlers):
            signal.signal(number, handler)


@pytest.mark.slow
def test_the_last_arm_of_a_resumed_run_has_the_threads_that_it_had(tmp_path):
    """More of them, now that no other arm needs the cores, would round differently on some processors."""
    arguments = ["--out", tmp_path, "--algos", "ppo", "--prompts", "4", "--minibatch", "16", "--micro-batch", "16",
                 "--steps", "4", "--eval-boards", "8", "--eval-rollouts", "1"]
    several = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    command = [sys.executable, "train.py", *words(arguments)]
    subprocess.run(command, cwd=ROOT, env=several, check=True, timeout=170)
    before = metrics(tmp_path)
    for path in (tmp_path / "arms").glob("ppo-actfocus-0*"):
        path.unlink()
    subprocess.run([*command, "--resume"], cwd=ROOT, env=several, check=True, timeout=170)
    assert metrics(tmp_path) == before


def test_three_steps_without_an_update_are_said_once_an_arm():
    settings, idle, line = train.Settings(), Counter(), {"algo": "grpo", "credit": "uniform", "seed": 0, "eval_format_valid": 0.5}
    said = [bool(runs.hint(line | {"step": step, "updates": updates}, idle, settings))
            for step, updates in enumerate([0, 0, 1, 0, 0, 0, 0], 1)]
    assert said == [False, False, False, False, False, True, False]
    assert runs.hint(line | {"step": 0}, Counter(), settings) is None
    for model, env, advice in (("tiny", "sokoban", "knows the boards of its env.json"), (settings.base, "sokoban", "--teach 32"),
                               (settings.base, "sudoku", "another game: --env sokoban")):
        said = runs.hint(line | {"step": 0, "eval_format_valid": 0.0}, Counter(), train.Settings(model=model, env=env))
        assert "nothing can be learnt" in said and advice in said


def test_boards_that_take_long_to_draw_are_said_with_what_they_come_to(monkeypatch, capsys):
    class Slow(Sokoban):
        def reset(self, **options):
            time.sleep(0.05)
            return super().reset(**options)
    monkeypatch.setitem(ENVS, "slow", Slow)
    monkeypatch.setattr(train.Settings, "agent", "x")
    settings = train.Settings(env="slow", eval_boards=120, prompts=4)
    runs.warn_of_slow_boards(settings)
    assert not capsys.readouterr().err
    runs.warn_of_slow_boards(settings, seconds=0.01)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "0.1 s" in said and "0.1 minutes" in said


@pytest.mark.parametrize("where", ["log", "gradient"])
def test_one_bad_number_anywhere_skips_the_update(where):
    arm = arm_of("ppo")
    before = copy.deepcopy(arm.policy.state_dict())
    for x in arm.policy.parameters():
        x.grad = torch.ones_like(x)
    if where == "gradient":
        arm.critic.head.bias.grad = torch.tensor([math.inf])
    assert arm.update({"policy_loss": math.nan if where == "log" else 1.0}) == {"skipped_updates": 1}
    assert unchanged(arm.policy, before)


def test_gradients_of_before_memory_ran_out_do_not_count_twice(monkeypatch):
    made = []
    for starved in (False, True):
        arm, calls, loss = arm_of(micro_batch=4), [], train.Arm.loss
        batch = batch_of(arm)

        def lacking(self, *arguments):
            calls.append(1)
            if starved and len(calls) == 2:  # the first part's gradient is there
                raise LACKS[1]
            return loss(self, *arguments)
        with monkeypatch.context() as patch:
            patch.setattr(train.Arm, "loss", lacking)
            runs.saving_memory(arm, arm.gradient)(batch)
        made.append([x.grad for x in arm.policy.parameters()])
    assert arm.micro_batch == 2
    for a, b in zip(*made):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-3)


def test_a_checkpoint_brings_back_what_an_arm_has_counted_and_torchs_luck(tmp_path):
    arm, files = arm_of(), ArmFiles(tmp_path, "grpo", "actfocus", 0)
    files.log.parent.mkdir()
    arm.bad_updates, arm.micro_batch, _ = 2, 1, torch.rand(9)
    files.record({"step": 0}, arm, checkpoint=True)
    drawn, again = torch.rand(3), arm_of()  # a signal may draw, as "random" does
    assert files.restore(again) == 1 and (again.bad_updates, again.micro_batch) == (2, 1)
    assert torch.equal(torch.rand(3), drawn)
