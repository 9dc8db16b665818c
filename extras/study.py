"""Does the verdict of extras.diagnose come true? The share decided in the answer, beside what ActFocus then gained.

    python -m extras.study        # prints the table and Spearman's rho, draws results/decided/verdict.png

For each setting of agent and environment: results/decided/NAME.json, what `extras.diagnose` found before training, and
the summary.json of runs of uniform credit and of ActFocus at several alphas under GRPO (commands: results/README.md).
"""

import json
from collections import namedtuple

import numpy as np
import torch

from extras.diagnose import rank_correlation
from extras.report import README, by_algo_and_credit, gained, paired_gain, pyplot

SETTINGS = {  # NAME: (what it is, its runs)
    "sokoban": ("Sokoban, planned in the answer", "main", "alpha/sokoban"),
    "think25": ("a quarter in the reasoning", "decided/think25", "alpha/think25"),
    "think50": ("half in the reasoning", "decided/think50", "alpha/think50"),
    "think75": ("three quarters in it", "decided/think75", "alpha/think75"),
    "think100": ("all in the reasoning", "plan-think", "alpha/think100"),
    "sokoban-short": ("Sokoban, taught 700 updates instead of 1200", "decided/sokoban-short"),
    "frozenlake": ("FrozenLake", "frozenlake", "alpha/frozenlake"),
    "frozenlake-long": ("FrozenLake, taught 4000 updates instead of 1200", "decided/frozenlake-long"),
    "sudoku": ("Sudoku", "sudoku", "alpha/sudoku"),
    "shop": ("the shop", "shop-kl", "alpha/shop")}
ALPHAS = ("actfocus:alpha=0", "actfocus", "actfocus:alpha=0.3", "uniform")  # reasoning weighs 0, 0.1, 0.3 and 1
# decided: {"share", "interval"}; rho: energy's, with its interval; arms, rivals: ActFocus's and uniform credit's
Point = namedtuple("Point", "label decided rho facts arms rivals finals")


def points():
    """A Point for each setting; facts: share of those stated before training that is true; finals: success at ALPHAS,
    means over seeds 0 to 2.
    """
    read, made = lambda name: json.loads((README.parent / name).read_text()), []
    for name, (label, *runs) in SETTINGS.items():
        diagnosis, groups = read(f"decided/{name}.json"), {}
        for run in runs:
            groups |= by_algo_and_credit(read(f"{run}/summary.json"))
        arms, rivals = groups["grpo", "actfocus"], groups["grpo", "uniform"]
        first = [groups.get(("grpo", credit), [])[:3] for credit in ALPHAS]  # the seeds that all runs have
        finals = [np.mean([arm["final_success"] for arm in three]) if three else None for three in first]
        made.append(Point(label, diagnosis["decided"]["all turns"], diagnosis["spearman"]["energy, action tokens"],
                          arms[0]["eval"]["fact_accuracy"][0], arms, rivals, finals))
    return made


def table():
    """Cells of the table in results/README.md."""
    number = lambda x: "-" if x is None else f"{x:.2f}"
    for p in points():
        between = lambda x, interval: f"{number(x)} [{'..'.join(map(number, interval))}]"
        yield (p.label, between(p.decided["share"], p.decided["interval"]), f"{100 * p.facts:.0f}",
               between(p.rho[0], p.rho[1:]), ", ".join(gained(p.arms, p.rivals)[1:]),
               " / ".join("-" if x is None else f"{100 * x:.0f}" for x in p.finals))


def correlation():
    """Spearman's rho of share and gain over the settings, with a 95 % interval from a bootstrap over them."""
    shares, gains = zip(*((p.decided["share"], paired_gain(p.arms, p.rivals)[0]) for p in points()))
    return rank_correlation(torch.tensor(shares), torch.tensor(gains), np.random.default_rng(0))


def plot(path):
    """The scatter; False where matplotlib is not installed."""
    if not (plt := pyplot()):
        return False
    figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
    axis.axhline(0, color="grey", linewidth=1)
    axis.axvline(0.5, color="grey", linewidth=1, linestyle=":")
    for p in points():
        (gain, low, high), (left, right) = 100 * np.array(paired_gain(p.arms, p.rivals)), p.decided["interval"]
        x = p.decided["share"]
        axis.errorbar(x, gain, [[gain - low], [high - gain]], [[max(x - left, 0)], [max(right - x, 0)]], fmt="o",
                      capsize=2, label=p.label, markerfacecolor=None if p.facts > 0.9 else "white")
    axis.set(xlabel="share of the return's variance decided in the answer\n(open: less than 90 % of the stated facts "
                    "are true)",
             ylabel="gain of ActFocus over uniform credit, points")
    figure.legend(loc="outside right upper")
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True


def main():
    for row in table():
        print(" | ".join(row))
    print("Spearman's rho of share and gain: {:+.2f} [{:+.2f}..{:+.2f}]".format(*correlation()))
    plot(README.parent / "decided" / "verdict.png")


if __name__ == "__main__":
    main()
