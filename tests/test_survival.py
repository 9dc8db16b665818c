"""A run that is killed, starved or misled: what it loses (nothing) and what it says."""

import copy
import itertools
import json
import math
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from test_train import RETURNS, credit_of, learner, trajectories_of

import train
from actfocus import gae, group_advantages, token_weights, variance_filter, weighted_policy_loss

ROOT = Path(train.__file__).parent
TINY = ["--steps", "6", "--prompts", "2", "--rollouts", "4", "--minibatch", "4", "--micro-batch", "2", "--keep", "1",
        "--eval-boards", "2", "--eval-rollouts", "2", "--eval-every", "2", "--width", "32", "--layers", "1",
        "--warm-episodes", "64", "--warm-steps", "60", "--worse-steps", "5", "--max-response-tokens", "30",
        "--checkpoint-every", "2", "--jobs", "2", "--algos", "ppo", "--credits", "uniform", "actfocus"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache that already holds the taught agent, and the directory of a run that was never stopped."""
    path, out = tmp_path_factory.mktemp("cache"), tmp_path_factory.mktemp("whole")
    result = start(path, out).communicate(timeout=170)
    assert (out / "summary.json").exists(), result
    return path, out


def start(cache, out, *arguments):
    command = [sys.executable, "train.py", "--cache", cache, "--out", out, *TINY, *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            start_new_session=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def metrics(out):
    timed = ("tokens_per_second", "rollout_seconds", "seconds")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in timed} for line in lines]


def progress(out):
    """How far a run has come: the lines it has written."""
    path = out / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def wait_for(out, lines, process):
    while progress(out) < lines and process.poll() is None:
        time.sleep(0.01)


# Resume


def run_on_one_thread(command):
    torch.set_num_threads(1)  # as the whole run's processes have: another number rounds differently on some processors
    train.main(command)


def test_a_run_killed_at_random_moments_writes_the_same_metrics(cache, tmp_path):
    """SIGKILL, resume, SIGKILL ...: more than twenty times over, wherever the run happens to be, the writes included."""
    path, whole = cache
    context = multiprocessing.get_context("forkserver")  # children start with everything imported: most kills hit training
    context.set_forkserver_preload(["train"])
    chance, kills, run = random.Random(0), 0, 0
    while kills < 25:
        out, resume = tmp_path / str(run), []
        while not (out / "summary.json").exists():
            command = ["--cache", str(path), "--out", str(out), *TINY, "--jobs", "1", "--checkpoint-every", "1", *resume]
            process = context.Process(target=run_on_one_thread, args=(command,))
            process.start()
            process.join(None if kills >= 25 else chance.uniform(0.1, 2.0))
            if process.exitcode is None:
                process.kill()
                process.join()
                kills += 1
            resume = ["--resume"]
        assert metrics(out) == metrics(whole), f"after {kills} kills"
        run += 1


def run_until_write(command, call, count):
    """train.main that kills itself in the middle of its count-th call of os.fsync or os.replace."""
    calls, original = itertools.count(1), getattr(os, call)

    def deadly(*arguments):
        if next(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments)
    setattr(os, call, deadly)
    run_on_one_thread(command)


@pytest.mark.parametrize("call, counts", [("fsync", (2, 4, 7)), ("replace", (3, 5, 8))])
def test_a_kill_in_the_middle_of_a_write_loses_nothing(cache, tmp_path, call, counts):
    path, whole = cache
    context = multiprocessing.get_context("forkserver")
    for count in counts:
        out = tmp_path / str(count)
        command = ["--cache", str(path), "--out", str(out), *TINY, "--jobs", "1"]
        process = context.Process(target=run_until_write, args=(command, call, count))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        process = context.Process(target=run_on_one_thread, args=([*command, "--resume"],))
        process.start()
        process.join()
        assert process.exitcode == 0 and metrics(out) == metrics(whole), (call, count)


def test_a_killed_run_takes_its_training_processes_along(cache, tmp_path):
    """They would go on writing checkpoints beside the run that resumes."""
    path, whole = cache
    process = start(path, tmp_path)
    wait_for(tmp_path, 3, process)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    process.kill()
    process.communicate()
    time.sleep(2)
    assert len(children) >= 2 and not any(Path(f"/proc/{child}").exists() for child in children)
    start(path, tmp_path, "--resume").communicate(timeout=120)
    assert metrics(tmp_path) == metrics(whole)


def test_the_last_arm_of_a_resumed_run_has_the_threads_that_it_had(cache, tmp_path):
    """More of them, now that no other arm needs the cores, would round differently on some processors."""
    agent = next(path for path in cache[0].iterdir() if path.name.startswith("tiny-"))
    command = [sys.executable, "train.py", "--model", agent, "--env-options", "walls=0", "observation=coordinates", "--out", tmp_path,
               *TINY, "--jobs", "0", "--prompts", "4", "--minibatch", "16", "--micro-batch", "16"]
    several = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    subprocess.run(command, cwd=ROOT, env=several, check=True, timeout=170)
    whole = metrics(tmp_path)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    (tmp_path / "metrics.jsonl").write_text("".join(line + "\n" for line in lines if json.loads(line)["credit"] == "uniform"))
    for path in (tmp_path / "checkpoints").glob("ppo-actfocus-0.pt*"):
        path.unlink()
    subprocess.run([*command, "--resume"], cwd=ROOT, env=several, check=True, timeout=170)
    assert metrics(tmp_path) == whole


@pytest.mark.parametrize("number, code, group", [
    (signal.SIGINT, 130, True), (signal.SIGTERM, 143, True), (signal.SIGTERM, 143, False)])
def test_a_signal_finishes_the_update_and_says_how_to_go_on(cache, tmp_path, number, code, group):
    """Sent to the run alone, or to all its processes, as a terminal and a batch system do."""
    path, whole = cache
    process = start(path, tmp_path)
    wait_for(tmp_path, 3, process)
    os.killpg(process.pid, number) if group else process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == code and "--resume" in error and "Traceback" not in error
    assert list((tmp_path / "checkpoints").glob("*.pt"))
    output, _ = start(path, tmp_path, "--resume").communicate(timeout=120)
    assert metrics(tmp_path) == metrics(whole) and "ppo actfocus" in output


def test_a_second_signal_stops_at_once(cache, tmp_path):
    process = start(cache[0], tmp_path, "--steps", "500")
    wait_for(tmp_path, 2, process)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode in (130, -signal.SIGINT)


def test_other_settings_are_refused_and_named(cache, tmp_path):
    process = start(cache[0], tmp_path)
    wait_for(tmp_path, 1, process)
    process.kill()
    process.communicate()
    _, error = start(cache[0], tmp_path, "--resume", "--lr", "0.5", "--gamma", "0.9").communicate(timeout=60)
    assert error.count("\n") == 1 and "lr" in error and "gamma" in error and "minibatch" not in error


def test_a_finished_run_is_not_run_again(cache):
    path, whole = cache
    before = metrics(whole)
    started = time.perf_counter()
    output, _ = start(path, whole, "--resume").communicate(timeout=60)
    assert metrics(whole) == before and "ppo actfocus" in output and time.perf_counter() - started < 40


def test_a_second_run_on_one_directory_is_refused(cache, tmp_path):
    first = start(cache[0], tmp_path, "--steps", "500")
    wait_for(tmp_path, 1, first)
    _, error = start(cache[0], tmp_path).communicate(timeout=60)
    first.kill()
    first.communicate()
    assert error.count("\n") == 1 and "another run" in error and str(tmp_path) in error


# Checkpoints


STATE = {"weights": torch.arange(1000.0), "lines": "[]", "step": 3}


@pytest.mark.parametrize("damage", [
    lambda data: b"", lambda data: data[: len(data) // 2], lambda data: data[:-1], lambda data: data[10:],
    lambda data: data.replace(b"checkpoint 1", b"checkpoint 9"), lambda data: b"\x80\x04cos\nsystem\n",
    lambda data: data[:500] + bytes([data[500] ^ 1]) + data[501:]],
    ids=["empty", "half", "cut", "headless", "version", "foreign", "bit"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path, capsys, damage):
    path = tmp_path / "arm.pt"
    train.save_checkpoint(path, STATE | {"step": 2})
    train.save_checkpoint(path, STATE)
    assert train.load_checkpoint(path, "cpu")["step"] == 3 and not capsys.readouterr().err
    path.write_bytes(damage(path.read_bytes()))
    found = train.load_checkpoint(path, "cpu")
    assert found["step"] == 2 and torch.equal(found["weights"], STATE["weights"])
    assert "arm.pt is damaged" in capsys.readouterr().err


def test_without_a_whole_checkpoint_the_arm_starts_again(tmp_path):
    assert train.load_checkpoint(tmp_path / "arm.pt", "cpu") is None
    (tmp_path / "arm.pt").write_bytes(b"junk")
    assert train.load_checkpoint(tmp_path / "arm.pt", "cpu") is None


def test_a_checkpoint_executes_no_code(tmp_path):
    """A file with the right checksum whose pickle calls a function is refused by torch, not run."""
    class Call:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)
    train.save_checkpoint(tmp_path / "arm.pt", {"x": Call()})
    with pytest.raises(Exception, match="[Ww]eights.only"):
        train.load_checkpoint(tmp_path / "arm.pt", "cpu")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("when", ["write", "fsync", "replace"])
def test_a_full_disk_leaves_the_checkpoint_before_intact(tmp_path, monkeypatch, when):
    path = tmp_path / "arm.pt"
    train.save_checkpoint(path, STATE)

    def full(*_):
        raise OSError(28, "No space left on device")
    if when == "write":
        real = open
        monkeypatch.setattr("builtins.open", lambda name, mode="r", *rest: full() if mode == "wb" else real(name, mode, *rest))
    else:
        monkeypatch.setattr(train.os, when, full)
    with pytest.raises(OSError):
        train.save_checkpoint(path, STATE | {"step": 4})
    monkeypatch.undo()
    assert train.load_checkpoint(path, "cpu")["step"] == 3


def test_a_directory_that_goes_away_ends_in_one_line(cache, tmp_path):
    """The checkpoints' place is taken by a file: the run ends with exit code 1 and the reason."""
    process = start(cache[0], tmp_path, "--steps", "500")
    wait_for(tmp_path, 1, process)
    directory = tmp_path / "checkpoints"
    if directory.exists():
        directory.rename(tmp_path / "moved")
    directory.write_text("")
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1 and "train.py: " in error and "checkpoints" in error and "Traceback" not in error


# Numbers that go bad


def test_an_update_with_bad_numbers_is_skipped_and_three_in_a_row_stop_the_arm(agent):
    made = learner(agent, "grpo", "actfocus")
    data, advantages = trajectories_of(agent, RETURNS), torch.tensor(RETURNS)
    before = copy.deepcopy(made.policy.state_dict())
    original = made.minibatch_loss

    def spoilt(part, *rest):
        loss, hidden, log = original(part, *rest)
        return loss * math.nan, hidden, log
    made.minibatch_loss = spoilt
    for _ in range(2):
        assert made.update(data, credit_of(data, advantages), np.random.default_rng(0)) == {"updates": 0, "skipped_updates": 1}
    made.minibatch_loss = original
    assert made.update(data, credit_of(data, advantages), np.random.default_rng(0))["updates"] == 1  # and the count begins anew
    after = copy.deepcopy(made.policy.state_dict())
    assert any(not torch.equal(before[name], after[name]) for name in before)
    made.minibatch_loss = spoilt
    with pytest.raises(train.Diverged, match="three updates"):
        for _ in range(3):
            made.update(data, credit_of(data, advantages), np.random.default_rng(0))
    assert all(torch.equal(after[name], x) for name, x in made.policy.state_dict().items())


@pytest.mark.parametrize("where", ["policy", "reference", "critic"])
def test_a_model_with_bad_numbers_changes_no_weight(agent, where):
    made = learner(agent, "ppo", "actfocus")
    next(getattr(made, where).parameters()).data.fill_(math.inf)
    watched = made.critic if where != "critic" else made.policy
    before = copy.deepcopy(watched.state_dict())
    data = trajectories_of(agent, RETURNS)
    metrics = made.update(data, credit_of(data, RETURNS), np.random.default_rng(0))
    assert metrics == {"updates": 0, "skipped_updates": 1}
    assert all(torch.equal(before[name], x) for name, x in watched.state_dict().items())


def test_a_policy_that_cannot_be_sampled_from_stops_its_arm_in_one_line(cache, tmp_path):
    """A learning rate that blows the weights up without making one of them infinite."""
    process = start(cache[0], tmp_path, "--lr", "1e30", "--credits", "uniform")
    _, error = process.communicate(timeout=120)
    assert process.returncode == 1 and "Traceback" not in error
    last = error.splitlines()[-1]
    assert last.startswith("train.py: ppo uniform seed 0, step ") and "checkpoint" in last


def test_collapse_is_three_evaluations_in_a_row():
    assert train.collapse([(0, 0.5), (10, 0.05), (20, 0.0), (30, 0.09), (40, 0.0)]) == 30
    assert train.collapse([(0, 0.05), (10, 0.05), (20, 0.1), (30, 0.0), (40, 0.0)]) is None


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")])
def test_running_out_of_memory_halves_the_micro_batch_and_keeps_the_result(agent, capsys, error):
    data, advantages = trajectories_of(agent, RETURNS), torch.tensor(RETURNS)
    results = []
    for limit in (64, 2):
        made = learner(agent, "grpo", "actfocus", micro_batch=8)
        original = made.minibatch_loss

        def starved(part, *rest, original=original, limit=limit):
            if len(part["ids"]) > limit:
                raise error
            return original(part, *rest)
        made.minibatch_loss = starved
        metrics = made.update(data, credit_of(data, advantages), np.random.default_rng(0))
        results.append((metrics["policy_loss"], metrics["grad_norm"], made.micro_batch))
    assert results[0][2] == 8 and results[1][2] == 2 and results[1][:2] == pytest.approx(results[0][:2], rel=1e-4, abs=1e-7)
    assert capsys.readouterr().err.count("out of memory") == 2  # 8 -> 4 -> 2


def test_other_errors_are_not_taken_for_a_lack_of_memory(agent):
    made = learner(agent)
    made.minibatch_loss = lambda *_: (_ for _ in ()).throw(RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes"):
        data = trajectories_of(agent, RETURNS)
        made.update(data, credit_of(data, RETURNS), np.random.default_rng(0))


# Fuzz


def random_batch(rng):
    """Shapes, masks and numbers of all sizes, some of them bad."""
    b, t = int(rng.integers(1, 5)), int(rng.integers(1, 9))
    response = torch.from_numpy(rng.random((b, t)) < rng.choice([0, 0.3, 0.9, 1]))
    action = response & torch.from_numpy(rng.random((b, t)) < rng.choice([0, 0.3, 1]))
    scale = float(rng.choice([0, 1e-30, 1, 1e4, 1e30]))
    number = lambda: torch.from_numpy(rng.standard_normal((b, t))).float() * scale
    return response, action, number


@pytest.mark.parametrize("part", range(4))
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


def test_five_hundred_random_command_lines_end_with_0_or_2(tmp_path, monkeypatch, capsys):
    """Parsed in this process, the comparison left out: good settings come through, bad ones end in one line."""
    monkeypatch.setattr(train, "compare", lambda *_: None)
    monkeypatch.setattr(train, "only_run", lambda _: None)
    rng = np.random.default_rng(0)
    names = [f.name for f in train.dataclasses.fields(train.Settings) if f.name not in ("out", "cache", "model", "device")]
    values = ["0", "1", "-1", "0.5", "nan", "inf", "1e400", "", "abc", "ppo", "uniform", "sudoku", "shop", "size=5", "32"]
    codes = []
    for _ in range(500):
        arguments = ["--out", str(tmp_path), "--cache", str(tmp_path)]
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


def test_the_random_batches_reach_the_edges():
    """The fuzz is worth something: it has empty masks, masks without actions, and numbers that overflow."""
    rng = np.random.default_rng(0)
    batches = [random_batch(rng) for _ in range(300)]
    assert any(not r.any() for r, _, _ in batches) and any(r.any() and not a.any() for r, a, _ in batches)
    assert any(number().abs().max() > 1e20 for _, _, number in batches)
