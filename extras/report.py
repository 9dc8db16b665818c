"""What a run's logs say: summary, table and curves; and the tables of results/README.md.

    python -m extras.report DIR         # the table of a finished run
    python -m extras.report --write     # the tables of results/README.md, from `<!-- table: NAME -->` to `<!-- end -->`

A test holds results/README.md to what this makes.
"""

import argparse
import dataclasses
import functools
import json
import os
import platform
import re
import subprocess
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import transformers
from tqdm import tqdm

from env import response
from extras.runs import write
from train import EVAL_TEMPERATURE

README = Path(__file__).resolve().parents[1] / "results" / "README.md"


# A run ----------------------------------------------------------------------------------------------------------------


def commit():
    """The commit of this code, with -dirty where files differ from it; None outside a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=7", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def described(settings):
    """A run's settings, less its directory, and what it ran on."""
    config = {name: value for name, value in dataclasses.asdict(settings).items() if name != "out"}
    return config | {"made_with": {
        "commit": commit(), "python": platform.python_version(), "torch": torch.__version__, "cores": os.cpu_count(),
        "transformers": transformers.__version__, "date": time.strftime("%Y-%m-%d")}}


def summary(settings, agent, logs):
    """summary.json: the settings and what they ran on, success of random and of best play, an entry for each log."""
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
    """[(step, format-valid rate)] -> the step of the third evaluation in a row under 10 %, or None.

    Or of the last one, if that is under 10 % and one before it is not: there may be few.
    """
    threes = zip(evaluations, evaluations[1:], evaluations[2:])
    (last, valid), most = evaluations[-1], max(valid for _, valid in evaluations)
    return next((c[0] for a, b, c in threes if max(a[1], b[1], c[1]) < 0.1), last if valid < 0.1 <= most else None)


def random_floor(env, seeds, episodes=16):
    """Success rate of uniformly random actions on the instances of `seeds`, `episodes` plays of each."""
    rng, wins = np.random.default_rng(0), 0
    for seed in np.repeat(seeds, episodes).tolist():
        _, over = env.reset(seed=seed), False
        while not over:
            actions = [env.random_action(rng) for _ in range(env.actions_per_turn)]
            *_, terminated, truncated, info = env.step(response(actions))
            over = terminated or truncated
        wins += info["success"]
    return wins / (len(seeds) * episodes)


def mean_ceiling(env, seeds):
    """Success rate of the best play within the budgets on the instances of `seeds`; None: there is no oracle."""
    wins = 0.0
    for seed in tqdm(seeds, desc="the best play", unit="board", leave=False, disable=None, delay=2):
        env.reset(seed=seed)
        if hasattr(env, "ceiling"):  # where there is luck, only the environment knows
            wins += env.ceiling()
            continue
        try:
            plan = env.oracle()
        except NotImplementedError:
            return None
        wins += plan is not None and len(plan) <= env.actions_left
    return wins / len(seeds)


def by_algo_and_credit(summary):
    """{(algo, credit): its arms, in the order of the seeds}."""
    groups = defaultdict(list)
    for arm in summary["arms"]:
        groups[arm["algo"], arm["credit"]].append(arm)
    return groups


@functools.cache
def resamples(seeds, boards, draws):
    """Indices drawn with replacement, the same ones for all: ([draws, seeds], [draws, boards])."""
    rng = np.random.default_rng(0)
    drawn = [(rng.integers(seeds, size=seeds), rng.integers(boards, size=boards)) for _ in range(draws)]
    return [np.array(indices) for indices in zip(*drawn)]


def paired_gain(arms, rivals, draws=10_000):
    """Mean of final success minus the rivals', with a 95 % interval from a paired bootstrap over seeds and boards.

    Arms and rivals are paired by seed. With few seeds the interval is too narrow: three cannot show how seeds vary.
    """
    of_boards = lambda arms: np.array([arm["final_board_success"] for arm in arms])  # [seeds, boards]
    difference = of_boards(arms) - of_boards(rivals)
    seeds, boards = resamples(*difference.shape, draws)
    again = difference[seeds[:, :, None], boards[:, None]].mean((1, 2))
    return difference.mean(), *np.percentile(again, [2.5, 97.5])


def gained(arms, rivals, width=0):
    """The gain in points, the same as text with its interval, and in how many seeds the arms end ahead."""
    mean, low, high = (100 * x for x in paired_gain(arms, rivals))
    ahead = sum(a["final_success"] > b["final_success"] for a, b in zip(arms, rivals))
    return mean, f"{mean:+{width}.1f} [{low:+.1f}..{high:+.1f}]", f"{ahead} of {len(arms)}"


COLUMNS = {  # head -> (an arm's number, its digits, whether the range over seeds is shown)
    "before": (lambda a: 100 * a["eval_success"][0], 1, False),
    "step 20": (lambda a: 100 * a["eval_success"][a["eval_steps"].index(20)], 1, False),
    "step 40": (lambda a: 100 * a["eval_success"][a["eval_steps"].index(40)], 1, False),
    "final": (lambda a: 100 * a["final_success"], 1, True), "peak": (lambda a: 100 * a["peak_success"], 1, True),
    "peak to final": (lambda a: 100 * (a["final_success"] - a["peak_success"]), 1, True),
    "at generated tokens": (lambda a: 100 * np.interp(a["least"], a["eval_generated_tokens"], a["eval_success"]),
                            1, True),
    "generated, thousands": (lambda a: a["eval_generated_tokens"][-1] / 1000, 0, False),
    "updated, thousands": (lambda a: a["updated_tokens"] / 1000, 0, False),
    "minutes on one core": (lambda a: a["seconds"] / 60, 1, False),
    "facts that are true, %": (lambda a: 100 * a["eval"]["fact_accuracy"][-1], 1, True),
    "facts a turn": (lambda a: a["eval"]["facts"][-1], 2, True),
    "reasoning tokens a turn": (lambda a: a["eval"]["think_tokens"][-1], 1, True),
    "their mean NLL, nats": (lambda a: a["eval"]["think_nll"][-1], 3, True),
    "valid responses, %": (lambda a: 100 * a["eval"]["format_valid"][-1], 1, True),
    "steps": (lambda a: a["eval_steps"][-1], 0, False), "random actions": (lambda a: 100 * a["floor"], 1, False),
    "best play": (lambda a: 100 * a["ceiling"], 1, False)}


def shown(arms, head, digits=None, width=0):
    """A column's mean over the arms of an algorithm and credit, with the range over seeds."""
    value, usual, ranged = COLUMNS[head]
    values, digits = [value(arm) for arm in arms], usual if digits is None else digits
    number, ranged = lambda x, width=0: f"{x:{width}.{digits}f}", (ranged or width) and len(arms) > 1
    return number(np.mean(values), width) + (f" ({number(min(values))}..{number(max(values))})" if ranged else "")


def with_least(groups):
    """{key: arms}, which now know how many tokens all have generated: credits with other rules generate others."""
    least = min(arm["eval_generated_tokens"][-1] for arms in groups.values() for arm in arms)
    return {key: [arm | {"least": least} for arm in arms] for key, arms in groups.items()}, f"{least / 1000:.0f}k"


def table(summary):
    """The comparison as text: one row an algorithm and credit, means over seeds with their range."""
    groups, c, seeds = by_algo_and_credit(summary), summary["config"], summary["config"]["seeds"]
    heads, verdicts = ("before", "final", "peak", "peak to final"), []
    rows = [("arm", *heads, "final, against uniform [95 %]")]
    for (algo, credit), arms in groups.items():
        rivals, gain = groups.get((algo, "uniform"), []) if credit != "uniform" else [], ""
        if rivals:
            mean, gain, ahead = gained(arms, rivals, width=5)
        rows.append((f"{algo} {credit}", *(shown(arms, head, width=5) for head in heads), gain))
        if rivals and credit == "actfocus":
            won = f"{abs(mean):.1f} points {'ahead of' if mean > 0 else 'behind'}" if mean else "level with"
            learnt = all(any(arm.get("updated_tokens", 1) for arm in either) for either in (arms, rivals))
            verdicts.append(f"{algo}: ActFocus ends {won} uniform, ahead in {ahead} seeds" if learnt
                            else f"{algo}: no comparison, an arm made no update")
    verdicts += [f"{a['algo']} {a['credit']} seed {a['seed']} collapsed by step {a['collapsed_at']}: "
                 "under 10 % valid responses" for a in summary["arms"] if a.get("collapsed_at") is not None]
    if len(seeds) < 3:
        prove = "s prove" if len(seeds) > 1 else " proves"
        verdicts.append(f"{len(seeds)} seed{prove} nothing: run with --seeds 0 1 2 or more")
    return "\n".join([
        f"Success in % on {c['eval_boards']} {c['boards']} boards x {c['eval_rollouts']} rollouts at temperature "
        f"{EVAL_TEMPERATURE}, after {c['steps']} steps; mean (range) over seeds {' '.join(map(str, seeds))}; [95 %]: "
        "paired bootstrap over seeds and boards", *aligned(rows),
        f"random actions {100 * summary['floor']:.1f}"
        + ("" if summary["ceiling"] is None else f", best play {100 * summary['ceiling']:.1f}"), *verdicts,
        *(costs(groups) if any("carl" in credit for _, credit in groups) else [])])


def costs(groups):
    """Lines of a second table: success at equal amounts of generated tokens, and what each credit took."""
    groups, least = with_least(groups)
    heads = ("at generated tokens", "generated, thousands", "updated, thousands", "minutes on one core")
    return aligned([("arm", f"success at {least} generated tokens", "generated, k", "updated, k", "minutes"),
                    *((f"{algo} {credit}", *(shown(arms, head, digits=1).split()[0] for head in heads))
                      for (algo, credit), arms in groups.items())])


def aligned(rows):
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


def pyplot():
    """matplotlib's, drawing to files, or None where it is not installed."""
    try:
        import matplotlib.pyplot
    except ImportError:
        return None
    matplotlib.pyplot.switch_backend("agg")
    return matplotlib.pyplot


def plot(summary, path):
    """Success over steps, mean and range over seeds; False where matplotlib is not installed."""
    if not (plt := pyplot()):
        return False
    algos = list(dict.fromkeys(arm["algo"] for arm in summary["arms"]))
    figure, axes = plt.subplots(1, len(algos), figsize=(5 * len(algos) + 1.5, 3.6), sharey=True, squeeze=False,
                                layout="constrained")
    for (algo, credit), arms in by_algo_and_credit(summary).items():
        curves, steps = np.array([arm["eval_success"] for arm in arms]), arms[0]["eval_steps"]
        axis = axes[0][algos.index(algo)]
        line, = axis.plot(steps, curves.mean(0), label=credit)
        axis.fill_between(steps, curves.min(0), curves.max(0), alpha=0.2, color=line.get_color())
    for axis, algo in zip(axes[0], algos):
        for name, what, above in (("floor", "random actions", 2), ("ceiling", "best play", -9)):
            if summary[name] is None:
                continue
            axis.axhline(summary[name], color="grey", linestyle=":", linewidth=1)
            axis.annotate(what, (0, summary[name]), xytext=(2, above), textcoords="offset points", fontsize=7)
        axis.set(title=algo.upper(), xlabel="step", ylim=(0, 1.02))
    axes[0][0].set_ylabel("success on evaluation boards")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right upper")
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True


def conclude(settings, agent, logs, minutes):
    """Write the summary of a finished run, print its table, draw its curves."""
    out, found = Path(settings.out), summary(settings, agent, logs)
    write(out / "summary.json", json.dumps(found, indent=1, allow_nan=False) + "\n")
    print(table(found))
    drawn = plot(found, out / "curves.png")
    print(f"{minutes:.1f} minutes; written to {out}: metrics.jsonl, summary.json" + (", curves.png" if drawn else ""))


# The tables of results/README.md --------------------------------------------------------------------------------------


def rows(*runs, algo=None, credits=None, own="", seeds=range(99), label="", before=False):
    """(label, name, arms, uniform credit's arms, ActFocus's) of each algorithm and credit of the runs, or of some.

    own: the settings that these credits have; before: a first row, of the agent before training, the same for all.
    """
    words, groups = {"uniform": "uniform", "actfocus": "ActFocus", "carl": "CARL", "a2tgpo": "A2TGPO"}, {}
    for run in (json.loads((README.parent / run / "summary.json").read_text()) for run in runs):
        bounds = {"floor": run["floor"], "ceiling": run["ceiling"]}
        groups |= {key: [arm | bounds for arm in arms if arm["seed"] in seeds]
                   for key, arms in by_algo_and_credit(run).items()}
    groups, _ = with_least(groups)
    if before:
        arm = next(iter(groups.values()))[0]
        yield label, "before training", [arm | {"eval": {name: x[:1] for name, x in arm["eval"].items()}}], [], []
    for (of, credit), arms in groups.items():
        if algo in (None, of) and credit in [x + own for x in credits or [credit]]:
            methods, _, options = credit.removesuffix(own).partition(":")
            name = [of.upper()] if label or len({algo for algo, _ in groups}) > 1 else []
            name += [" + ".join(words[x] for x in methods.split("+")), *options.replace("=", " ").split(",")]
            yield label, ", ".join(filter(None, name)), arms, groups[of, "uniform" + own], groups.get((of, "actfocus"))


PAIR = {"credits": ("uniform", "actfocus")}
TABLES = {  # name -> its rows, if not just those of the run of that name; its columns are those whose heads stand there
    "reasoning": lambda: rows("main", before=True),
    "energy": lambda: rows("main", "energy", algo="grpo"),
    "step-size": lambda: rows("main", "step-size", algo="grpo"),
    "rivals-sudoku": lambda: rows("sudoku", "rivals-sudoku"),
    "rivals-sokoban": lambda: rows("main", "rivals-sokoban", algo="grpo"),
    "plan": lambda: [*rows("main", **PAIR, algo="grpo", label="the answer (default)"),
                     *rows("plan-think", label="the reasoning")],
    "rates": lambda: rows("rates", "rates-high"),
    "own-rate": lambda: rows("main", "own-rate", algo="grpo"),
    "no-filter": lambda: [*rows("main", **PAIR, algo="grpo", label="a quarter of the groups, 1 update (default)"),
                          *rows("no-filter-once", **PAIR, own=":keep=1,minibatch=128", label="all groups, 1 update"),
                          *rows("no-filter", **PAIR, own=":keep=1", label="all groups, 4 updates"),
                          *rows("no-filter-rates", **PAIR, own=":lr=3.3e-5", label="the same, lr 3.3e-5"),
                          *rows("no-filter-rates", **PAIR, own=":lr=1e-5", label="the same, lr 1e-5"),
                          *rows("no-filter-ppo", label="all groups, 4 updates")],
    "others": lambda: [*rows("frozenlake", label="frozenlake"), *rows("sudoku", label="sudoku"),
                       *rows("shop-kl", label="shop, group filter, KL 0.001")]}


def cell(head, label, name, arms, uniform, actfocus):
    if head in ("environment", "trained on, a step", "the plan is made in"):
        return label
    if "against" in head:
        rivals = uniform if "uniform" in head else actfocus
        return "" if arms == rivals else ", ".join(gained(arms, rivals)[1:])
    if head == "steps to uniform's final":
        return steps_to(arms, np.mean([arm["final_success"] for arm in uniform]))
    return shown(arms, re.sub(r" \(\d+\)| \d+k", "", head)) if head else name  # final (60), at 1321k generated tokens


def steps_to(arms, level):
    """First step at which the mean curve reaches a level, between evaluations by a straight line."""
    steps, success = arms[0]["eval_steps"], np.mean([arm["eval_success"] for arm in arms], axis=0)
    return next((f"{s0 + (s1 - s0) * max(0.0, level - y0) / max(y1 - y0, 1e-12):.0f}"
                 for s0, s1, y0, y1 in zip(steps, steps[1:], success, success[1:]) if y1 >= level), "-")


def diagnosis(kinds):
    """Rows of the correlations that extras.diagnose found for the agent before training."""
    rho = json.loads((README.parent / "diagnosis" / "base.json").read_text())["spearman"]
    for signal in ("energy", "entropy", "nll", "shift"):
        shown = lambda r, low, high: "constant" if r is None else f"{r:+.2f} [{low:+.2f}..{high:+.2f}]"
        yield "before training", signal, *(shown(*rho[f"{signal}, {kind}"]) for kind in kinds)


def filled(text):
    """results/README.md with every table made anew, under the heads that it has."""
    def made(match):
        heads = [head.strip() for head in match[3].split("|")[1:-1]]
        if match[2] == "diagnosis":
            cells = diagnosis(heads[2:])
        elif match[2] == "decided":
            from extras import study  # here, because it needs this module
            cells = study.table()
        else:
            found = list(TABLES.get(match[2], lambda: rows(match[2]))())
            cells = [[cell(head, *row) for head in heads] for row in found]
            heads = [re.sub(r"\d+k", f"{found[0][2][0]['least'] / 1000:.0f}k", head) for head in heads]
        lines = ["| " + " | ".join(line) + " |\n" for line in (heads, *cells)]
        return "".join([match[1], lines[0], "|", "---|" * len(heads), "\n", *lines[1:], "<!-- end -->"])
    return re.sub(r"(<!-- table: (\S+) -->\n)(.*?\n).*?<!-- end -->", made, text, flags=re.DOTALL)


def main():
    parser = argparse.ArgumentParser("python -m extras.report", description=__doc__.split("\n\n")[0])
    parser.add_argument("directory", nargs="?", type=Path, help="a run's output directory, for its table alone")
    parser.add_argument("--write", action="store_true", help="put the tables into results/README.md")
    options = parser.parse_args()
    if options.directory:
        if not (path := options.directory / "summary.json").exists():
            parser.error(f"{path} is not there: a run writes it when all its arms are done (metrics.jsonl before)")
        print(table(json.loads(path.read_text())))
    elif options.write:
        README.write_text(filled(README.read_text()))
    else:
        print(filled(README.read_text()))


if __name__ == "__main__":
    main()
