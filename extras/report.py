"""What a run's logs say: summary, table and curves; and the tables of results/README.md.

    python -m extras.report DIR         # the table of a finished run
    python -m extras.report             # those of results/README.md
    python -m extras.report --write     # put them there, between the marks `<!-- table: NAME -->` and `<!-- end -->`

A test holds results/README.md to what this prints.
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

RESULTS = Path(__file__).resolve().parents[1] / "results"
README = RESULTS / "README.md"


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


def paired_gain(arms, rivals, draws=10_000):
    """Mean of final success minus the rivals', with a 95 % interval from a paired bootstrap over seeds and boards.

    Arms and rivals are paired by seed. With few seeds the interval is too narrow: three seeds cannot show how seeds vary.
    """
    difference = np.array([np.subtract(a["final_board_success"], b["final_board_success"]) for a, b in zip(arms, rivals)])
    rng, (seeds, boards) = np.random.default_rng(0), difference.shape
    again = [difference[rng.integers(seeds, size=seeds)][:, rng.integers(boards, size=boards)].mean() for _ in range(draws)]
    return difference.mean(), *np.percentile(again, [2.5, 97.5])


def by_algo_and_credit(summary):
    """{(algo, credit): its arms, in the order of the seeds}."""
    groups = defaultdict(list)
    for arm in summary["arms"]:
        groups[arm["algo"], arm["credit"]].append(arm)
    return groups


def table(summary):
    """The comparison as text: one row an algorithm and credit, means over seeds with their range."""
    percent = lambda values: f"{100 * np.mean(values):5.1f}" + (
        f" ({100 * min(values):.1f}..{100 * max(values):.1f})" if len(values) > 1 else "")
    groups, c = by_algo_and_credit(summary), summary["config"]
    rows, verdicts = [("arm", "before", "final", "peak", "peak to final", "final, against uniform [95 %]")], []
    for (algo, credit), arms in groups.items():
        rivals, gain = groups.get((algo, "uniform"), []) if credit != "uniform" else [], ""
        if rivals:
            mean, low, high = (100 * x for x in paired_gain(arms, rivals))
            gain = f"{mean:+5.1f} [{low:+.1f}..{high:+.1f}]"
        rows.append((f"{algo} {credit}", percent([a["eval_success"][0] for a in arms]),
                     *(percent([a[name] for a in arms]) for name in ("final_success", "peak_success")),
                     percent([a["final_success"] - a["peak_success"] for a in arms]), gain))
        if rivals and credit == "actfocus":
            won = "ahead of" if mean > 0 else "behind" if mean < 0 else "level with"
            ahead = sum(a["final_success"] > b["final_success"] for a, b in zip(arms, rivals))
            verdicts.append(f"{algo}: ActFocus ends {abs(mean):.1f} points {won} uniform, ahead in {ahead} of {len(arms)} seeds")
    verdicts += [f"{a['algo']} {a['credit']} seed {a['seed']} collapsed by step {a['collapsed_at']}: under 10 % valid responses"
                 for a in summary["arms"] if a.get("collapsed_at") is not None]
    if len(c["seeds"]) < 3:
        verdicts.append(f"{len(c['seeds'])} seed{'s prove' if len(c['seeds']) > 1 else ' proves'} nothing: run with --seeds 0 1 2 or more")
    return "\n".join([
        f"Success in % on {c['eval_boards']} {c['boards']} boards x {c['eval_rollouts']} rollouts at temperature "
        f"{EVAL_TEMPERATURE}, after {c['steps']} steps; mean (range) over seeds {' '.join(map(str, c['seeds']))}; [95 %]: paired "
        "bootstrap over seeds and boards", *aligned(rows),
        f"random actions {100 * summary['floor']:.1f}, best play {100 * summary['ceiling']:.1f}", *verdicts,
        *(costs(groups) if any("carl" in credit for _, credit in groups) else [])])


def aligned(rows):
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


def costs(groups):
    """Lines of a second table: credits that sample by other rules generate other amounts, so success at equal amounts, too."""
    least = min(arm["eval_generated_tokens"][-1] for arms in groups.values() for arm in arms)
    rows = [("arm", f"success at {least / 1000:.0f}k generated tokens", "generated, k", "updated, k", "minutes")]
    mean = lambda values, scale: f"{np.mean(list(values)) / scale:.1f}"
    for (algo, credit), arms in groups.items():
        rows.append((f"{algo} {credit}",
                     mean((100 * np.interp(least, a["eval_generated_tokens"], a["eval_success"]) for a in arms), 1),
                     mean((a["eval_generated_tokens"][-1] for a in arms), 1000), mean((a["updated_tokens"] for a in arms), 1000),
                     mean((a["seconds"] for a in arms), 60)))
    return aligned(rows)


def pyplot():
    """matplotlib's, drawing to files, or None where it is not installed."""
    try:
        import matplotlib
        matplotlib.use("agg")
        import matplotlib.pyplot
        return matplotlib.pyplot
    except ImportError:
        return None


def plot(summary, path):
    """Success over steps, mean and range over seeds; False where matplotlib is not installed."""
    if not (plt := pyplot()):
        return False
    groups = by_algo_and_credit(summary)
    algos = list(dict.fromkeys(algo for algo, _ in groups))
    figure, axes = plt.subplots(1, len(algos), figsize=(5 * len(algos) + 1.5, 3.6), sharey=True, squeeze=False,
                                layout="constrained")
    for axis, algo in zip(axes[0], algos):
        for credit, arms in ((credit, arms) for (name, credit), arms in groups.items() if name == algo):
            curves = np.array([arm["eval_success"] for arm in arms])  # [seeds, evaluations]
            line, = axis.plot(arms[0]["eval_steps"], curves.mean(0), label=credit)
            axis.fill_between(arms[0]["eval_steps"], curves.min(0), curves.max(0), alpha=0.2, color=line.get_color())
        for name, what, above in (("floor", "random actions", 2), ("ceiling", "best play", -9)):
            axis.axhline(summary[name], color="grey", linestyle=":", linewidth=1)
            axis.annotate(what, (arms[0]["eval_steps"][0], summary[name]), xytext=(2, above), textcoords="offset points",
                          fontsize=7)
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


def random_floor(env, seeds, episodes=16):
    """Success rate of uniformly random actions on the instances of `seeds`, `episodes` plays of each."""
    rng = np.random.default_rng(0)
    wins = 0
    for seed in seeds:
        for _ in range(episodes):
            env.reset(seed=seed)
            over = False
            while not over:
                picks = [env.random_action(rng) for _ in range(env.actions_per_turn)]
                *_, terminated, truncated, info = env.step(response(picks))
                over = terminated or truncated
            wins += info["success"]
    return wins / (len(seeds) * episodes)


def mean_ceiling(env, seeds):
    """Success rate of the best play on the instances of `seeds`."""
    total = 0.0
    for seed in seeds:
        env.reset(seed=seed)
        total += env.ceiling()
    return total / len(seeds)


# The tables of results/README.md -------------------------------------------------------------------------------------


def load(name, file="summary.json"):
    return json.loads((RESULTS / name / file).read_text())


def spread(values, scale=100, digits=1, sign=""):
    """Mean and range of a value a seed."""
    values = scale * np.array(values, dtype=float)
    number = lambda x: f"{x:{sign}.{digits}f}"
    return number(values.mean()) + (f" ({number(values.min())}..{number(values.max())})" if len(values) > 1 else "")


def interval(arms, rivals):
    mean, low, high = (100 * x for x in paired_gain(arms, rivals))
    ahead = sum(a["final_success"] > b["final_success"] for a, b in zip(arms, rivals))
    return f"{mean:+.1f} [{low:+.1f}..{high:+.1f}], {ahead} of {len(arms)}"


def name_of(algo, credit):
    words = {"uniform": "uniform", "actfocus": "ActFocus", "carl": "CARL", "a2tgpo": "A2TGPO"}
    name, _, options = credit.partition(":")
    return f"{algo.upper()}, {' + '.join(words[part] for part in name.split('+'))}" + (
        f", {options.replace('=', ' ').replace(',', ', ')}" if options else "")


def curve(arms):
    return np.mean([arm["eval_success"] for arm in arms], axis=0)


def steps_to(arms, level):
    """First step at which the mean curve reaches a level, between evaluations by a straight line."""
    steps, success = arms[0]["eval_steps"], curve(arms)
    for (s0, y0), (s1, y1) in zip(zip(steps, success), zip(steps[1:], success[1:])):
        if y1 >= level:
            return f"{s0 + (s1 - s0) * max(0.0, level - y0) / max(y1 - y0, 1e-12):.0f}"
    return "-"


def markdown(head, rows):
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def main_result():
    summary = load("main")
    groups, rows = by_algo_and_credit(summary), []
    steps = next(iter(groups.values()))[0]["eval_steps"]
    for (algo, credit), arms in groups.items():
        rivals = groups[algo, "uniform"]
        at = lambda step: f"{100 * curve(arms)[steps.index(step)]:.1f}"
        rows.append([name_of(algo, credit), at(0), at(20), at(40), spread([a["final_success"] for a in arms]),
                     spread([a["peak_success"] for a in arms]),
                     spread([a["final_success"] - a["peak_success"] for a in arms]),
                     "" if credit == "uniform" else interval(arms, rivals),
                     steps_to(arms, curve(rivals)[-1])])
    return markdown(["", "before", "step 20", "step 40", f"final ({steps[-1]})", "peak", "peak to final",
                  "final, against uniform [95 %], seeds ahead", "steps to uniform's final"], rows)


def reasoning():
    groups, rows = by_algo_and_credit(load("main")), []
    first = next(iter(groups.values()))

    def cells(arms, i):
        value = lambda name, scale, digits: spread([arm["eval"][name][i] for arm in arms], scale, digits)
        return [value("fact_accuracy", 100, 1), value("facts", 1, 2), value("think_tokens", 1, 1), value("think_nll", 1, 3),
                value("format_valid", 100, 1)]
    rows.append(["before training", *(cell.split(" ")[0] for cell in cells(first, 0))])
    rows += [[name_of(algo, credit), *cells(arms, -1)] for (algo, credit), arms in groups.items()]
    return markdown(["", "facts that are true, %", "facts a turn", "reasoning tokens a turn", "their mean NLL, nats",
                  "valid responses, %"], rows)


def ablations(name):
    groups = by_algo_and_credit(load(name))
    focus, plain, rows = groups["grpo", "actfocus"], groups["grpo", "uniform"], []
    for (algo, credit), arms in groups.items():
        rows.append([name_of(algo, credit).removeprefix("GRPO, "), spread([a["final_success"] for a in arms]),
                     spread([a["eval"]["fact_accuracy"][-1] for a in arms]),
                     "" if arms is focus else interval(arms, focus), "" if arms is plain else interval(arms, plain)])
    return markdown(["", "final", "facts that are true, %", "against ActFocus [95 %], seeds ahead",
                  "against uniform [95 %], seeds ahead"], rows)


def plan():
    rows = []
    for where, name in (("the answer (default)", "main"), ("the reasoning", "plan-think")):
        groups = by_algo_and_credit(load(name))
        for credit in ("uniform", "actfocus"):
            arms, rivals = ([arm for arm in groups["grpo", c] if arm["seed"] < 3] for c in (credit, "uniform"))
            rows.append([where, name_of("grpo", credit), f"{100 * curve(arms)[0]:.1f}",
                         spread([a["final_success"] for a in arms]), spread([a["eval"]["fact_accuracy"][-1] for a in arms]),
                         "" if credit == "uniform" else interval(arms, rivals)])
    return markdown(["the plan is made in", "", "before", "final", "facts that are true, %",
                  "final, against uniform [95 %], seeds ahead"], rows)


def no_filter():
    """Groups and updates a step, and rates; the default's rows are the main result's first three seeds."""
    rows = []
    for directory, options, what in (
            ("main", "", "a quarter of the groups, 1 update (default)"), ("no-filter", ":keep=1,minibatch=128", "all groups, 1 update"),
            ("no-filter", ":keep=1", "all groups, 4 updates"), ("no-filter-rates", ":lr=3.3e-5", "the same, lr 3.3e-5"),
            ("no-filter-rates", ":lr=1e-5", "the same, lr 1e-5"), ("no-filter-ppo", "", "all groups, 4 updates")):
        groups = by_algo_and_credit(load(directory))
        algo = "ppo" if directory == "no-filter-ppo" else "grpo"
        for credit in ("uniform", "actfocus"):
            arms, plain = ([arm for arm in groups[algo, name + options] if arm["seed"] < 3] for name in (credit, "uniform"))
            if arms:
                rows.append([name_of(algo, credit), what, spread([a["peak_success"] for a in arms]),
                             spread([a["final_success"] for a in arms]),
                             spread([a["eval"]["format_valid"][-1] for a in arms]),
                             spread([a["eval"]["fact_accuracy"][-1] for a in arms]),
                             "" if credit == "uniform" else interval(arms, plain)])
    return markdown(["", "trained on, a step", "peak", "final", "valid responses, %", "facts that are true, %",
                  "final, against uniform [95 %], seeds ahead"], rows)


def rivals(*names):
    groups = {key: arms for name in names for key, arms in by_algo_and_credit(load(name)).items()}
    least = min(arm["eval_generated_tokens"][-1] for arms in groups.values() for arm in arms)
    plain, rows = groups["grpo", "uniform"], []
    for (algo, credit), arms in groups.items():
        equal = [np.interp(least, a["eval_generated_tokens"], a["eval_success"]) for a in arms]
        rows.append([name_of(algo, credit).removeprefix("GRPO, "), f"{100 * curve(arms)[0]:.1f}",
                     spread([a["final_success"] for a in arms]), spread(equal), "" if arms is plain else interval(arms, plain),
                     spread([a["eval"]["fact_accuracy"][-1] for a in arms]),
                     f"{np.mean([a['eval_generated_tokens'][-1] for a in arms]) / 1000:.0f}",
                     f"{np.mean([a['updated_tokens'] for a in arms]) / 1000:.0f}",
                     f"{np.mean([a['seconds'] for a in arms]) / 60:.1f}"])
    return markdown(["", "before", "final", f"at {least / 1000:.0f}k generated tokens", "final, against uniform [95 %], seeds ahead",
                  "facts that are true, %", "generated, thousands", "updated, thousands", "minutes on one core"], rows)


def others():
    rows = []
    for name, directory in (("frozenlake", "frozenlake"), ("sudoku", "rivals-sudoku"), ("shop", "shop"),
                            ("shop, group filter, KL 0.001", "shop-kl")):
        summary = load(directory)
        groups = by_algo_and_credit(summary)
        for (algo, credit), arms in groups.items():
            if credit in ("uniform", "actfocus"):
                rows.append([name, name_of(algo, credit), str(arms[0]["eval_steps"][-1]), f"{100 * summary['floor']:.1f}",
                             f"{100 * curve(arms)[0]:.1f}", spread([a["final_success"] for a in arms]),
                             "" if credit == "uniform" else interval(arms, groups[algo, "uniform"]),
                             f"{100 * summary['ceiling']:.1f}"])
    return markdown(["environment", "", "steps", "random actions", "before", "final", "final, against uniform [95 %], seeds ahead",
                  "best play"], rows)


def diagnosis():
    rows = []
    titles = {"base": "before training", "uniform": "GRPO, uniform, trained", "actfocus": "GRPO, ActFocus, trained"}
    kinds = ("action tokens", "reasoning tokens", "all response tokens")
    for name in titles:
        if not (RESULTS / "diagnosis" / f"{name}.json").exists():
            continue
        data = load("diagnosis", f"{name}.json")
        for signal in ("energy", "entropy", "nll", "shift"):
            cells = [data["spearman"][f"{signal}, {kind}"] for kind in kinds]
            rows.append([titles[name], signal, *("constant" if np.isnan(r) else f"{r:+.2f} [{low:+.2f}..{high:+.2f}]"
                                                 for r, low, high in cells)])
    return markdown(["agent", "signal", *kinds], rows)


TABLES = {"main": main_result, "reasoning": reasoning, "ablations": lambda: ablations("ablations"), "plan": plan,
          "diagnosis": diagnosis,
          "no-filter": no_filter, "others": others, "shop-alpha": lambda: ablations("shop-alpha"),
          "rivals-sokoban": lambda: rivals("rivals-sokoban", "rivals-sokoban-all"),
          "rivals-sudoku": lambda: rivals("rivals-sudoku")}


def filled(text):
    """results/README.md with every table made anew; a table without results is an error."""
    return re.sub(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", lambda m: f"{m[1]}{TABLES[m[2]]()}\n{m[3]}", text,
                  flags=re.DOTALL)


def main():
    parser = argparse.ArgumentParser("python -m extras.report", description=__doc__.split("\n\n")[0])
    parser.add_argument("directory", nargs="?", type=Path, help="a run's output directory, for its table alone")
    parser.add_argument("--write", action="store_true", help="put the tables into results/README.md")
    options = parser.parse_args()
    if options.directory:
        print(table(json.loads((options.directory / "summary.json").read_text())))
    elif options.write:
        README.write_text(filled(README.read_text()))
    else:
        for name in re.findall(r"<!-- table: (\S+) -->", README.read_text()):
            print(f"{name}\n\n{TABLES[name]()}\n")


if __name__ == "__main__":
    main()
