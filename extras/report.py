"""What a run's logs say: summary, table and curves; and the tables of results/README.md.

    python -m extras.report DIR         # the table of a finished run
    python -m extras.report --write     # the tables of results/README.md, between `<!-- table: NAME -->` and `<!-- end -->`

A test holds results/README.md to what this makes.
"""

import argparse
import dataclasses
import json
import os
import platform
import re
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import transformers

from env import response
from extras.runs import write
from train import EVAL_TEMPERATURE

README = Path(__file__).resolve().parents[1] / "results" / "README.md"


# A run ----------------------------------------------------------------------------------------------------------------


def described(settings):
    """A run's settings, less its directory, and what it ran on."""
    config = {name: value for name, value in dataclasses.asdict(settings).items() if name != "out"}
    return config | {"made_with": {"python": platform.python_version(), "torch": torch.__version__, "cores": os.cpu_count(),
                                   "transformers": transformers.__version__, "date": time.strftime("%Y-%m-%d")}}


def summary(settings, agent, logs):
    """summary.json: the settings and what they ran on, success of random and of best play, an entry for each arm's log."""
    env, seeds = settings.make_env(), settings.evaluation_seeds()
    return {"config": described(settings) | {"agent": agent}, "floor": random_floor(env, seeds),
            "ceiling": mean_ceiling(env, seeds), "arms": [summarise(lines) for lines in logs]}


def summarise(lines):
    """The log of one arm -> its entry in summary.json."""
    at = [line for line in lines if "eval_success" in line]
    success, total = [line["eval_success"] for line in at], lambda name, part: sum(line.get(name, 0) for line in part)
    return {name: lines[0][name] for name in ("algo", "credit", "seed")} | {
        "eval_steps": [line["step"] for line in at], "eval_success": success, "final_success": success[-1],
        "peak_success": max(success), "final_board_success": at[-1]["eval_board_success"],
        "eval": {name: [line.get(f"eval_{name}") for line in at]
                 for name in ("format_valid", "fact_accuracy", "facts", "think_tokens", "think_nll")},
        "eval_generated_tokens": [total("generated_tokens", lines[: line["step"] + 1]) for line in at],
        "collapsed_at": collapse([(line["step"], line["eval_format_valid"]) for line in at]),
        **{name: total(name, lines) for name in ("updates", "updated_tokens", "skipped_updates", "seconds")}}


def collapse(evaluations):
    """[(step, format-valid rate)] -> the step of the third evaluation in a row under 10 %, or None."""
    return next((c[0] for a, b, c in zip(evaluations, evaluations[1:], evaluations[2:]) if max(a[1], b[1], c[1]) < 0.1), None)


def random_floor(env, seeds, episodes=16):
    """Success rate of uniformly random actions on the instances of `seeds`, `episodes` plays of each."""
    rng, wins = np.random.default_rng(0), 0
    for seed in np.repeat(seeds, episodes).tolist():
        env.reset(seed=seed)
        over = False
        while not over:
            *_, terminated, truncated, info = env.step(response([env.random_action(rng) for _ in range(env.actions_per_turn)]))
            over = terminated or truncated
        wins += info["success"]
    return wins / (len(seeds) * episodes)


def mean_ceiling(env, seeds):
    """Success rate of the best play on the instances of `seeds`."""
    return sum(env.ceiling() for seed in seeds if env.reset(seed=seed)) / len(seeds)


def by_algo_and_credit(summary):
    """{(algo, credit): its arms, in the order of the seeds}."""
    groups = defaultdict(list)
    for arm in summary["arms"]:
        groups[arm["algo"], arm["credit"]].append(arm)
    return groups


def paired_gain(arms, rivals, draws=10_000):
    """Mean of final success minus the rivals', with a 95 % interval from a paired bootstrap over seeds and boards.

    Arms and rivals are paired by seed. With few seeds the interval is too narrow: three seeds cannot show how seeds vary.
    """
    difference = np.array([np.subtract(a["final_board_success"], b["final_board_success"]) for a, b in zip(arms, rivals)])
    rng, (seeds, boards) = np.random.default_rng(0), difference.shape
    again = [difference[rng.integers(seeds, size=seeds)][:, rng.integers(boards, size=boards)].mean() for _ in range(draws)]
    return difference.mean(), *np.percentile(again, [2.5, 97.5])


def gained(arms, rivals, width=0):
    """The gain in points, the same as text with its interval, and how many seeds end ahead."""
    mean, low, high = (100 * x for x in paired_gain(arms, rivals))
    ahead = sum(a["final_success"] > b["final_success"] for a, b in zip(arms, rivals))
    return mean, f"{mean:+{width}.1f} [{low:+.1f}..{high:+.1f}]", f"{ahead} of {len(arms)}"


def spread(values, digits=1, width=0):
    """Mean and range of a value a seed."""
    number = lambda x, width=0: f"{x:{width}.{digits}f}"
    return number(np.mean(values), width) + (f" ({number(min(values))}..{number(max(values))})" if len(values) > 1 else "")


# A column of a table: an arm -> its number
def start(arm): return 100 * arm["eval_success"][0]
