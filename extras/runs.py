"""What keeps a run safe: files that are written whole, arms in processes of their own, signals, and --resume.

Each arm writes its own log and checkpoint (DIR/arms); the parent only reads. Whatever ends a run at whatever moment,
the same command with --resume goes on from the last checkpoints and writes the metrics of a run that was never stopped.
"""

import dataclasses
import hashlib
import io
import json
import math
import os
import pickle
import re
import shutil
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch
from tqdm import tqdm

from rollout import load_agent

asked_to_stop = threading.Event()  # in a training process: the parent's
received = []  # the signals that this process got


def write(path, data):
    """Replace a file, all or nothing: neither a kill nor a full disk nor a reader leaves or sees half of it."""
    partial = path.with_name(path.name + ".partial")
    if not isinstance(data, str):  # a checkpoint: what torch.save writes, then its checksum, which torch.load ignores
        torch.save(data, buffer := io.BytesIO())
        data = buffer.getvalue() + hashlib.sha256(buffer.getbuffer()).digest()
    with open(partial, "wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)
        file.flush()
        os.fsync(file.fileno())  # on the disk before it takes the place of the last one
    if path.suffix == ".pt" and path.exists():
        os.replace(path, f"{path}.previous")
    os.replace(partial, path)


def load_checkpoint(path, device="cpu"):
    """The newest whole checkpoint, or None; a damaged one is named on stderr. Nothing in the file is executed."""
    for candidate in (path, Path(f"{path}.previous")):
        if not candidate.exists():
            continue
        data = candidate.read_bytes()
        try:
            if hashlib.sha256(data[:-32]).digest() == data[-32:]:
                return torch.load(io.BytesIO(data[:-32]), map_location=device, weights_only=True)
        except (pickle.UnpicklingError, RuntimeError):  # no checkpoint of ours, whatever its checksum
            pass
        print(f"train.py: {candidate} is damaged, so it is not used", file=sys.stderr)
    return None


def fingerprint(model, tokenizer):
    """What tells one agent from another, 16 characters: weights, vocabulary and chat template."""
    digest = hashlib.sha256(repr((sorted(tokenizer.get_vocab().items()), tokenizer.chat_template)).encode())
    for name, x in sorted(model.state_dict().items()):
        digest.update(name.encode() + x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


class ArmFiles:
    """The log and the checkpoint of one arm."""

    def __init__(self, out, algo, credit, seed):
        name = re.sub(r"[^\w+.=,-]", "-", f"{algo}-{credit}-{seed}")
        if len(name) > 100:  # a file system takes 255 bytes
            name = f"{name[:80]}-{hashlib.sha256(name.encode()).hexdigest()[:12]}-{seed}"
        self.log, self.checkpoint = Path(out) / "arms" / f"{name}.jsonl", Path(out) / "arms" / f"{name}.pt"

    def lines(self):
        """Whole lines of the log; a kill may have torn the last one."""
        text = self.log.read_text() if self.log.exists() else ""
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

    def restore(self, arm):
        """Put the arm into the state of its checkpoint -> the step to go on with, 0 where there is no checkpoint."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        saved, lines = load_checkpoint(self.checkpoint, arm.settings.torch_device), self.lines()
        if saved and saved["agent"] != arm.agent:
            raise ValueError(f"{self.checkpoint} was trained from agent {saved['agent']}, this is {arm.agent}")
        done = saved["step"] + 1 if saved and len(lines) > saved["step"] else 0
        if done:
            for x, state in zip(arm.learners, saved["learners"]):
                x.load_state_dict(state)
            arm.bad_updates, arm.micro_batch = saved["bad_updates"], saved["micro_batch"]
            arm.rng.bit_generator.state = json.loads(saved["rng"])
            arm.generator.set_state(saved["generator"].cpu())
            torch.set_rng_state(saved["torch_rng"].cpu())
        # A kill may have come between the two.
        write(self.log, "".join(json.dumps(line) + "\n" for line in lines[:done]))
        return done

    def record(self, line, arm, checkpoint):
        """Append a step's line; with checkpoint=True, or when asked to stop, save the arm -> whether to stop."""
        stopping = asked_to_stop.is_set()
        for name, value in line.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError("{algo} {credit} seed {seed}, step {step}: ".format(**line)
                                 + f"the metric {name} is {value}, not finite (None: there is none)")
        with open(self.log, "a") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")
            if checkpoint or stopping:
                file.flush()
                os.fsync(file.fileno())
                write(self.checkpoint, {  # everything that a step changes
                    "agent": arm.agent, "step": line["step"], "learners": [x.state_dict() for x in arm.learners],
                    "bad_updates": arm.bad_updates, "micro_batch": arm.micro_batch, "torch_rng": torch.get_rng_state(),
                    "rng": json.dumps(arm.rng.bit_generator.state), "generator": arm.generator.get_state()})
        return stopping


def located(error):
    """The words of an error in a line, and the last place outside of libraries that it went through."""
    frames = traceback.extract_tb(error.__traceback__)
    place = ([frame for frame in frames if "site-packages" not in frame.filename] or frames)[-1]
    kind = "" if isinstance(error, (ValueError, FloatingPointError)) else f"{type(error).__name__}: "
    return f"{kind}{' '.join(str(error).split())} ({Path(place.filename).name}, line {place.lineno})"


def saving_memory(arm, method):
    """A method of an arm that is called again, with half the micro-batch, for as long as memory runs out."""
    def retried(*arguments):
        while True:
            try:
                return method(*arguments)
            except RuntimeError as error:  # a CPU's has no class of its own
                lacking = isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
                if not lacking or arm.micro_batch == 1:
                    raise
            arm.micro_batch //= 2  # outside of except: its traceback holds on to what did not fit
            for optimizer in arm.optimizers:
                optimizer.zero_grad()
            print(f"train.py: out of memory, going on with micro-batches of {arm.micro_batch}", file=sys.stderr)
    return retried


def warn_of_slow_boards(settings, seconds=0.25):
    """Some options have boards that take long to find: say so, and what it comes to, instead of nothing for minutes."""
    env, started = settings.make_env(), time.perf_counter()
    for seed in settings.evaluation_seeds()[:2]:
        env.reset(seed=seed)
    taken = (time.perf_counter() - started) / len(settings.evaluation_seeds()[:2])
    if taken > seconds:
        print(f"train.py: a board takes about {taken:.1f} s to draw with these options: "
              f"{taken * settings.eval_boards / 60:.1f} minutes before each arm's first step, "
              f"{taken * settings.prompts:.0f} s and more in every step", file=sys.stderr)


def open_run(settings, resume):
    """Make the output directory, or check that its run can go on -> (the model's fingerprint, a lock, to be held).

    With --teach, its agent/ is then the taught model, made once.
    """
    model, tokenizer = load_agent(settings.base, "cpu")
    agent, out = fingerprint(model, tokenizer), Path(settings.out)
    warn_of_slow_boards(settings)
    base = Path(settings.base).resolve()
    if {out.resolve() / name for name in ("agent", "arms")} & {base, *base.parents}:
        raise ValueError(f"model: {settings.base} is what a new run in {out} clears: choose another --out")
    from extras import agent as teacher  # here, because it needs train.Settings
    taught = not settings.teach or resume and Path(settings.agent).exists()
    lessons = None if taught else teacher.format_lessons(settings, tokenizer)  # refused before anything is lost
    if out.exists() and not out.is_dir():
        raise ValueError(f"out: {out} is a file, not a directory")
    out.mkdir(parents=True, exist_ok=True)
    lock = open(out / "lock", "w")
    try:
        import fcntl
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # Windows: two runs on one directory are not told apart there
        pass
    except OSError:
        raise ValueError(f"out: another run is writing to {out}") from None
    plain = lambda s: json.loads(json.dumps(dataclasses.asdict(s)))
    now, default = plain(settings) | {"agent": agent}, plain(type(settings)())
    if resume and (out / "settings.json").exists():
        before = default | json.loads((out / "settings.json").read_text())  # an older version may not know all of them
        # Arms do not meet, so there may be more of them.
        grown = [name for name in ("seeds", "algos", "credits") if set(before[name]) <= set(now[name])]
        if before["steps"] <= now["steps"] and before["steps"] % now["eval_every"] == 0:  # evaluations stay in step
            grown.append("steps")
        changed = [name for name in now if name not in ("out", "jobs", *grown) and now[name] != before.get(name)]
        if changed:
            named = (f"{name} ({before.get(name)}, now {now[name]})" for name in changed)
            grow = ": they can grow, where --eval-every divides those before" if changed == ["steps"] else ""
            raise ValueError(f"resume: {out} was begun with another {', '.join(named)}{grow}")
    else:
        if resume:
            print(f"train.py: there is nothing to resume in {out}: this is a new run", file=sys.stderr)
        for made in ("arms", "agent"):
            shutil.rmtree(out / made, ignore_errors=True)
    write(out / "settings.json", json.dumps(now, indent=1) + "\n")
    if lessons:
        try:
            teacher.teach_format(settings, model, tokenizer, lessons)
        except KeyboardInterrupt:
            print("train.py: interrupted before the model was taught", file=sys.stderr)
            sys.exit(130)
    return agent, lock


def in_worker(stop, threads):
    """What a training process is set up with: the parent says when to stop, and the parent's end is its own."""
    global asked_to_stop
    asked_to_stop = stop
    parent = torch.multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    torch.set_num_threads(threads)
    tqdm.set_lock(threading.RLock())  # its own is shared between processes: one that is killed would leave it behind


def on_signal(number, _):
    """A first signal ends every arm with a checkpoint after its step, or after 8 seconds without; a second at once."""
    if received:
        os._exit(128 + number)
    received.append(number)
    os.write(2, b"\ninterrupted: stopping after this step, in 8 seconds at the latest (a second signal: at once); the "
             b"same command with --resume goes on\n")
    timer = threading.Timer(8, os._exit, (128 + number,))  # checkpoints are whole at any moment; workers end with us
    timer.daemon = True
    timer.start()


def run_arms(train_arm, settings, arms, report):
    """train_arm(settings, *arm) for each arm, side by side: a small model cannot keep several cores busy, several can.

    report(line) gets every line of their logs as it comes.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    several = settings.torch_device.type != "cuda" or settings.model == "tiny"  # a large model fills a GPU alone
    jobs = min(settings.jobs or (cores if several else 1), len(arms))
    context, seen = torch.multiprocessing.get_context("spawn"), Counter()
    stop, threads, failed = context.Event(), max(1, min(torch.get_num_threads(), cores // jobs)), []
    pool = ProcessPoolExecutor(jobs, context, in_worker, (stop, threads))
    try:
        for number in (signal.SIGINT, signal.SIGTERM):  # a terminal sends them to the whole process group: what is
            signal.signal(number, signal.SIG_IGN)  # ignored here now is ignored in the workers that submit() starts
        left = {pool.submit(train_arm, settings, *arm) for arm in arms}
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, on_signal)
        while left:
            done, left = wait(left, timeout=0.5, return_when=FIRST_COMPLETED)
            for arm in arms:
                lines = ArmFiles(settings.out, *arm).lines()
                for line in lines[seen[arm]:]:
                    report(line)
                seen[arm] = max(seen[arm], len(lines))
            for future in done:
                try:
                    future.result()  # raises what the arm raised
                except ValueError as error:  # its numbers have gone bad, or its credit's code is wrong: others go on
                    failed.append(error)
            if received:
                stop.set()
        pool.shutdown()  # all is done: let the workers end by themselves, and clean up
        if failed and not received:
            raise failed[0]
    except BrokenProcessPool:
        if not received:  # else the signal reached a process that was still starting
            raise ValueError("a training process ended without a word: was it killed, for want of memory? (A smaller "
                             "--micro-batch takes less)") from None
    finally:
        for process in torch.multiprocessing.active_children():
            process.kill()
        pool.shutdown(cancel_futures=True)  # waits: Python must not exit while the pool's own thread closes its pipes


def without_format(settings):
    """What to do where not one response has the form that the environment wants."""
    taught = Path(settings.base) / "env.json"
    known = json.loads(taught.read_text()) if taught.exists() else {settings.env: {}}
    if settings.env not in known:
        return f"This agent knows another game: --env {' or '.join(known)}"
    if settings.model == "tiny":
        return "The built-in agent knows the boards of its env.json alone, which --env-options replace as a whole"
    return "--teach 32 teaches a model the format first"


def hint(line, idle, settings):
    """What a user should know at once about a line of the log, or None. idle: {arm: steps in a row without update}."""
    arm = f"{line['algo']} {line['credit']} seed {line['seed']}"
    if line["step"] == 0 and line["eval_format_valid"] == 0:
        return ("not one response has the form <think>...</think><answer>...</answer> with a known action, so all "
                f"returns are alike and nothing can be learnt. {without_format(settings)}")
    idle[arm] = 0 if line.get("updates", 1) else idle[arm] + 1
    if idle[arm] == 3:
        return f"{arm}: three steps without an update: in none did a group's rollouts differ in their return"


def compare(train_arm, settings, agent):
    """Train all arms, or what is left of them, and write the output directory."""
    from extras.report import conclude  # here, because it writes with `write`
    out, started, s, idle, said = Path(settings.out), time.perf_counter(), settings, Counter(), set()
    arms = [(algo, credit, seed) for seed in s.seeds for algo in s.algos for credit in s.credits]
    longest = max(map(len, s.credits))
    shown = {name: f"eval_{name}" for name in s.make_env().reset(seed=0)[1]} | {"valid": "eval_format_valid"}
    with tqdm(total=len(arms) * (s.steps + 1), desc=f"{len(arms)} arms", unit="step", smoothing=0.05) as bar, \
            open(out / "metrics.jsonl", "w") as file:
        def report(line):
            file.write(json.dumps(line) + "\n")
            file.flush()
            if (words := hint(line, idle, s)) and words not in said:  # all arms start from one agent
                said.add(words)
                bar.write(words)
            if "eval_success" in line:
                bar.write(f"{line['algo']:<4} {line['credit']:<{longest}} seed {line['seed']}  step {line['step']:>3}  "
                          + "  ".join(f"{name} {100 * line[key]:5.1f} %" for name, key in shown.items()))
            bar.update()
        run_arms(train_arm, s, arms, report)
    # Arms that ran side by side have mixed their lines; in the end an arm's lines stand together.
    logs = [ArmFiles(out, *arm).lines() for arm in arms]
    write(out / "metrics.jsonl", "".join(json.dumps(line) + "\n" for lines in logs for line in lines))
    if received:
        sys.exit(128 + received[0])
    conclude(s, agent, logs, minutes=(time.perf_counter() - started) / 60)
