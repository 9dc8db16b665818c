"""Does the verdict of extras.diagnose come true? The share decided in the answer, beside what ActFocus then gained.

    python -m extras.study        # prints the table and Spearman's rho, draws results/decided/verdict.png

For each setting of agent and environment: results/decided/NAME.json, what `extras.diagnose` found before training, and
the summary.json of a run of both credits under GRPO. results/README.md has the commands.
"""

import json

import numpy as np
import torch

from extras.diagnose import rank_correlation
from extras.report import README, by_algo_and_credit, gained, paired_gain, pyplot

SETTINGS = {  # NAME: (what it is, its run)
    "sokoban": ("Sokoban, planned in the answer", "main"), "think25": ("a quarter in the reasoning", "decided/think25"),
    "think50": ("half in the reasoning", "decided/think50"), "think75": ("three quarters in it", "decided/think75"),
    "think100": ("all in the reasoning", "plan-think"), "frozenlake": ("FrozenLake", "frozenlake"),
    "sudoku": ("Sudoku", "sudoku"), "shop": ("the shop", "shop-kl")}


def points():
    """[(label, found: {"share", "interval"}, energy's rho and interval, arms, rivals)] of each setting."""
    made = []
    for name, (label, run) in SETTINGS.items():
        files = (README.parent / "decided" / f"{name}.json", README.parent / run / "summary.json")
        diagnosis, summary = (json.loads(file.read_text()) for file in files)
        groups = by_algo_and_credit(summary)
        made.append((label, diagnosis["decided"]["all turns"], diagnosis["spearman"]["energy, action tokens"],
                     groups["grpo", "actfocus"], groups["grpo", "uniform"]))
    return made


def table():
    """Cells of the table in results/README.md."""
    number = lambda x: "-" if x is None else f"{x:.2f}"
    for label, found, rho, arms, rivals in points():
        yield (label, f"{number(found['share'])} [{'..'.join(map(number, found['interval']))}]",
               f"{number(rho[0])} [{'..'.join(map(number, rho[1:]))}]", ", ".join(gained(arms, rivals)[1:]))


def correlation():
    """Spearman's rho of share and gain over the settings, with a 95 % interval from a bootstrap over them."""
    shares, gains = zip(*((found["share"], paired_gain(arms, rivals)[0]) for _, found, _, arms, rivals in points()))
    return rank_correlation(torch.tensor(shares), torch.tensor(gains), np.random.default_rng(0))


def plot(path):
    """The scatter; False where matplotlib is not installed."""
    if not (plt := pyplot()):
        return False
    figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
    axis.axhline(0, color="grey", linewidth=1)
    axis.axvline(0.5, color="grey", linewidth=1, linestyle=":")
    for label, found, _, arms, rivals in points():
        (gain, low, high), (left, right), x = (100 * np.array(paired_gain(arms, rivals))), found["interval"], found["share"]
        axis.errorbar(x, gain, [[gain - low], [high - gain]], [[max(x - left, 0)], [max(right - x, 0)]], fmt="o", capsize=2,
                      label=label)
    axis.set(xlabel="share of the return's variance that is decided in the answer (before training)",
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
