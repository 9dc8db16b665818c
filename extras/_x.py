"""The README's tables, made from the summaries in this directory.

    python results/report.py            # print them
    python results/report.py --write    # put them into README.md, between the marks `<!-- table: NAME -->` and `<!-- end -->`

A test holds the README to what this prints.
"""

import argparse
import json
import re
import sys
from pathlib import Path

import numpy as np

RESULTS = Path(__file__).resolve().parent
sys.path.insert(0, str(RESULTS.parent))
import train  # noqa: E402

README = RESULTS.parent / "README.md"


def load(name, file="summary.json"):
    return json.loads((RESULTS / name / file).read_text())


def spread(values, scale=100, digits=1, sign=""):
    """Mean and range of a value a seed."""
    values = scale * np.array(values, dtype=float)
    number = lambda x: f"{x:{sign}.{digits}f}"
    return number(values.mean()) + (f" ({number(values.min())}..{number(values.max())})" if len(values) > 1 else "")


def interval(arms, rivals):
    mean, low, high = (100 * x for x in train.paired_gain(arms, rivals))
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


def table(head, rows):
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def main_result():
    summary = load("main")
    groups, rows = train.by_algo_and_credit(summary), []
    steps = next(iter(groups.values()))[0]["eval_steps"]
    for (algo, credit), arms in groups.items():
        rivals = groups[algo, "uniform"]
        at = lambda step: f"{100 * curve(arms)[steps.index(step)]:.1f}"
        rows.append([name_of(algo, credit), at(0), at(20), at(40), spread([a["final_success"] for a in arms]),
                     spread([a["peak_success"] for a in arms]),
                     spread([a["final_success"] - a["peak_success"] for a in arms]),
                     "" if credit == "uniform" else interval(arms, rivals),
                     steps_to(arms, curve(rivals)[-1])])
    return table(["", "before", "step 20", "step 40", f"final ({steps[-1]})", "peak", "peak to final",
                  "final, against uniform [95 %], seeds ahead", "steps to uniform's final"], rows)


def reasoning():
    groups, rows = train.by_algo_and_credit(load("main")), []
    first = next(iter(groups.values()))

    def cells(arms, i):
        value = lambda name, scale, digits: spread([arm["eval"][name][i] for arm in arms], scale, digits)
        return [value("fact_accuracy", 100, 1), value("facts", 1, 2), value("think_tokens", 1, 1), value("think_nll", 1, 3),
                value("format_valid", 100, 1)]
    rows.append(["before training", *(cell.split(" ")[0] for cell in cells(first, 0))])
    rows += [[name_of(algo, credit), *cells(arms, -1)] for (algo, credit), arms in groups.items()]
    return table(["", "facts that are true, %", "facts a turn", "reasoning tokens a turn", "their mean NLL, nats",
                  "valid responses, %"], rows)


def ablations(name):
    groups = train.by_algo_and_credit(load(name))
    focus, plain, rows = groups["grpo", "actfocus"], groups["grpo", "uniform"], []
    for (algo, credit), arms in groups.items():
        rows.append([name_of(algo, credit).removeprefix("GRPO, "), spread([a["final_success"] for a in arms]),
                     spread([a["eval"]["fact_accuracy"][-1] for a in arms]),
                     "" if arms is focus else interval(arms, focus), "" if arms is plain else interval(arms, plain)])
    return table(["", "final", "facts that are true, %", "against ActFocus [95 %], seeds ahead",
                  "against uniform [95 %], seeds ahead"], rows)


def plan():
    rows = []
    for where, name in (("the answer (default)", "main"), ("the reasoning", "plan-think")):
        groups = train.by_algo_and_credit(load(name))
        for credit in ("uniform", "actfocus"):
            arms, rivals = ([arm for arm in groups["grpo", c] if arm["seed"] < 3] for c in (credit, "uniform"))
            rows.append([where, name_of("grpo", credit), f"{100 * curve(arms)[0]:.1f}",
                         spread([a["final_success"] for a in arms]), spread([a["eval"]["fact_accuracy"][-1] for a in arms]),
                         "" if credit == "uniform" else interval(arms, rivals)])
    return table(["the plan is made in", "", "before", "final", "facts that are true, %",
                  "final, against uniform [95 %], seeds ahead"], rows)


def no_filter():
    """Groups and updates a step, and rates; the default's rows are the main result's first three seeds."""
    rows = []
    for directory, options, what in (
            ("main", "", "a quarter of the groups, 1 update (default)"), ("no-filter", ":keep=1,minibatch=128", "all groups, 1 update"),
            ("no-filter", ":keep=1", "all groups, 4 updates"), ("no-filter-rates", ":lr=3.3e-5", "the same, lr 3.3e-5"),
            ("no-filter-rates", ":lr=1e-5", "the same, lr 1e-5"), ("no-filter-ppo", "", "all groups, 4 updates")):
        groups = train.by_algo_and_credit(load(directory))
        algo = "ppo" if directory == "no-filter-ppo" else "grpo"
        for credit in ("uniform", "actfocus"):
            arms, plain = ([arm for arm in groups[algo, name + options] if arm["seed"] < 3] for name in (credit, "uniform"))
            if arms:
                rows.append([name_of(algo, credit), what, spread([a["peak_success"] for a in arms]),
                             spread([a["final_success"] for a in arms]),
                             spread([a["eval"]["format_valid"][-1] for a in arms]),
                             spread([a["eval"]["fact_accuracy"][-1] for a in arms]),
                             "" if credit == "uniform" else interval(arms, plain)])
    return table(["", "trained on, a step", "peak", "final", "valid responses, %", "facts that are true, %",
                  "final, against uniform [95 %], seeds ahead"], rows)


def rivals(*names):
    groups = {key: arms for name in names for key, arms in train.by_algo_and_credit(load(name)).items()}
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
    return table(["", "before", "final", f"at {least / 1000:.0f}k generated tokens", "final, against uniform [95 %], seeds ahead",
                  "facts that are true, %", "generated, thousands", "updated, thousands", "minutes on one core"], rows)


def others():
    rows = []
    for name, directory in (("frozenlake", "frozenlake"), ("sudoku", "rivals-sudoku"), ("shop", "shop"),
                            ("shop, group filter, KL 0.001", "shop-kl")):
        summary = load(directory)
        groups = train.by_algo_and_credit(summary)
        for (algo, credit), arms in groups.items():
            if credit in ("uniform", "actfocus"):
                rows.append([name, name_of(algo, credit), str(arms[0]["eval_steps"][-1]), f"{100 * summary['floor']:.1f}",
                             f"{100 * curve(arms)[0]:.1f}", spread([a["final_success"] for a in arms]),
                             "" if credit == "uniform" else interval(arms, groups[algo, "uniform"]),
                             f"{100 * summary['ceiling']:.1f}"])
    return table(["environment", "", "steps", "random actions", "before", "final", "final, against uniform [95 %], seeds ahead",
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
    return table(["agent", "signal", *kinds], rows)


TABLES = {"main": main_result, "reasoning": reasoning, "ablations": lambda: ablations("ablations"), "plan": plan,
          "diagnosis": diagnosis,
          "no-filter": no_filter, "others": others, "shop-alpha": lambda: ablations("shop-alpha"),
          "rivals-sokoban": lambda: rivals("rivals-sokoban", "rivals-sokoban-all"),
          "rivals-sudoku": lambda: rivals("rivals-sudoku")}


def filled(text):
    """A README with every table made anew; a table without results is an error."""
    return re.sub(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", lambda m: f"{m[1]}{TABLES[m[2]]()}\n{m[3]}", text,
                  flags=re.DOTALL)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--write", action="store_true", help="put the tables into README.md")
    if parser.parse_args().write:
        README.write_text(filled(README.read_text()))
    else:
        for name in re.findall(r"<!-- table: (\S+) -->", README.read_text()):
            print(f"{name}\n\n{TABLES[name]()}\n")
