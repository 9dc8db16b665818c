"""Everything that wants a GPU, in one go, tables last: all but the last two parts took five minutes on an H200.

    python -m extras.gpu --out results/gpu             # a part that fails or runs out of time does not stop the next
    python -m extras.gpu --model smollm2               # and a model of your own, taught and trained (extras/smollm2.py)
    python -m extras.gpu --rehearse --out /tmp/gpu     # every part at toy size, on a CPU too, in two minutes

Writes a log a part and gpu.json (device, versions, and of each part its command, seconds and exit code; the training
parts also what a step took).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import torch
import transformers

from extras.report import commit
from train import AGENTS

ROOT = Path(__file__).resolve().parent.parent
PAPER = "--max-response-tokens 400 --env-options size=6 walls=2 max_turns=5 max_actions=10 observation=grid --keep 1"
SMOLLM2 = "--width 576 --layers 30 --vocabulary 49152"  # its shape but for the heads, with untrained weights
TOY = "--jobs 1 --prompts 2 --rollouts 4 --eval-boards 2 --eval-rollouts 2"
# part: (seconds it may take, command, what is appended in a rehearsal)
PARTS = {
    "tests": (45, "-m pytest -q -k on_a_gpu -p no:cacheprovider", ""),
    "default comparison": (115, "train.py", f"{TOY} --steps 2"),
    "loss, V 151936": (45, "-m extras.bench loss --dtype bfloat16 --tokens 16384 --rounds 3",
                       "--tokens 64 --hidden 32 --vocabulary 500 --rounds 1"),
    "loss, V 128256": (55, "-m extras.bench loss --dtype bfloat16 --tokens 16384 --hidden 4096 --vocabulary 128256 "
                       "--rounds 3", "--tokens 64 --hidden 32 --vocabulary 500 --rounds 1"),
    "rollouts": (40, "-m extras.bench rollout --turns 2 5 9 --rounds 2", "--turns 2 --rounds 1 --batch 4 --tokens 9"),
    "rollouts, SmolLM2's shape": (42, f"-m extras.bench rollout --turns 5 --rounds 1 {SMOLLM2}",
                                  "--turns 2 --rounds 1 --batch 4 --tokens 9 --width 32 --layers 2 --vocabulary 351"),
    "paper's boards": (58, f"train.py --steps 3 --eval-boards 16 {PAPER}",
                       f"{TOY} --steps 1 --algos grpo --max-response-tokens 20"),
    "your model": (80, "train.py --model MODEL --teach 64 --algos grpo --steps 2 --eval-boards 16",
                   f"{TOY} --teach 4 --steps 1"),
}


def of_steps(out):
    """Of each arm of a run: steps, median seconds of a step and of its rollout, success at the start and the end."""
    lines = defaultdict(list)
    for line in (out / "metrics.jsonl").read_text().splitlines() if (out / "metrics.jsonl").exists() else []:
        line = json.loads(line)
        lines[f"{line['algo']} {line['credit']}"].append(line)
    median = lambda values: statistics.median(values) if values else None
    return {arm: {"steps": len(log) - 1, **{name: median([line[name] for line in log if name in line])
                                            for name in ("seconds", "rollout_seconds", "tokens_per_second")},
                  "updates": sum(line.get("updates", 0) for line in log),
                  "success": [line["eval_success"] for line in (log[0], log[-1]) if "eval_success" in line]}
            for arm, log in lines.items()}


def main(arguments=None):
    parser = argparse.ArgumentParser("python -m extras.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "gpu", help="directory for logs and gpu.json")
    parser.add_argument("--rehearse", action="store_true", help="every part at toy size")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART",
                        help=f"of {', '.join(PARTS)}")
    parser.add_argument("--model", help="directory or Hugging Face id for the last part, which is left out without it")
    options = parser.parse_args(arguments)
    model = options.model or (str(AGENTS / "sokoban") if options.rehearse else None)
    if not torch.cuda.is_available() and not options.rehearse:
        parser.error("torch finds no GPU here (--rehearse runs every part at toy size)")
    options.out.mkdir(parents=True, exist_ok=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    found = {"device": device, "torch": torch.__version__, "transformers": transformers.__version__,
             "commit": commit(), "date": time.strftime("%Y-%m-%d"), "rehearsal": options.rehearse, "parts": {}}
    for name in (name for name in options.parts if model or name != "your model"):
        limit, command, toy = PARTS[name]
        run, stem = options.out / "run", name.replace(" ", "-").replace(",", "").replace("'", "")
        command = command.replace("MODEL", str(model)).split() + (toy.split() if options.rehearse else [])
        command += ["--out", str(run)] if command[0] == "train.py" else []
        print(f"{name}: python {' '.join(command)}", flush=True)
        started = time.perf_counter()
        with open(options.out / f"{stem}.log", "w") as log:
            process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT,
                                       start_new_session=True)
            try:
                code = process.wait(limit)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, 9)
                code = process.wait()
        part = {"command": " ".join(command), "seconds": round(time.perf_counter() - started, 1), "limit": limit,
                "code": code}
        lines = (options.out / f"{stem}.log").read_text().splitlines()
        part["printed"] = [line for line in lines if line.startswith("|")] or lines[-10:]
        found["parts"][name] = part | ({"arms": of_steps(run)} if command[0] == "train.py" else {})
        (options.out / "gpu.json").write_text(json.dumps(found, indent=1) + "\n")
    print(f"\n{device}, torch {found['torch']}, transformers {found['transformers']}, {found['date']}")
    for name, part in found["parts"].items():
        print(f"\n{name}: {part['seconds']} s, {'exit code ' + str(part['code']) if part['code'] else 'ok'}")
        for arm, numbers in part.get("arms", {}).items():
            print(f"  {arm}: {json.dumps(numbers)}")
        print("\n".join(part["printed"]))


if __name__ == "__main__":
    main()
