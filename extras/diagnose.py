"""Will ActFocus help this agent? Where its returns are decided, and what energy says, measured before any training.

    python -m extras.diagnose                                           # the built-in agent, 200 groups of 16: minutes
    python -m extras.diagnose --checkpoint runs/latest/arms/grpo-actfocus-0.pt --signal nll

By nested sampling (extras/decided.py), the share of the returns' variance that is decided in the answer rather than in
the reasoning, and a verdict; the paper's own statistic, how energy of action tokens tracks a group's reward variance;
and who gives the gradient. Writes diagnosis.json and, with matplotlib, diagnosis.png to --out.
"""

import json
import math
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from actfocus import SIGNALS, token_weights, variance_filter, weighted_policy_loss
from env import draw_boards
from extras.decided import decided, verdict
from extras.facts import accuracy
from extras.options import SettingsParser
from extras.report import described, pyplot
from extras.runs import write
from extras.show import CHECKPOINT, agent_at
from rollout import score
from train import EVALUATION_SEED, score_logits


def ranks(x):
    """1-based ranks with ties averaged, [N] -> [N] float64."""
    _, which, counts = torch.unique(x, return_inverse=True, return_counts=True)
    return (counts.cumsum(0).double() - (counts - 1) / 2)[which]


def spearman(x, y):
    """Spearman's rank correlation of x[N] and y[N]; average ranks for ties, nan where a side is constant (or N < 2)."""
    x, y = torch.as_tensor(x).flatten(), torch.as_tensor(y).flatten()
    if x.shape != y.shape or torch.isnan(x).any() or torch.isnan(y).any():
        raise ValueError("x and y must be of one length and not hold nan")
    x, y = ranks(x), ranks(y)
    x, y = x - x.mean(), y - y.mean()
    scale = (x.square().sum() * y.square().sum()).sqrt()
    return float((x * y).sum() / scale) if scale > 0 else float("nan")


def rank_correlation(x, y, rng, draws=1000):
    """Spearman's rho of x[N] and y[N] with a 95 % interval: percentiles over groups drawn again with replacement.

    Where x is nan (a group without an action token), the group is left out.
    """
    x, y = x[~torch.isnan(x)], y[~torch.isnan(x)]
    rho = spearman(x, y)
    if math.isnan(rho):
        return rho, rho, rho
    again = [spearman(x[rows], y[rows]) for rows in torch.from_numpy(rng.integers(len(x), size=(draws, len(x))))]
    return rho, *np.nanpercentile(again, [2.5, 97.5]).tolist()


def gradient_shares(arm, batch):
    """{credit: squared gradient norm of the policy loss on a Batch, from (action tokens, reasoning tokens)}.

    Before the first update, so every ratio is 1. Each part keeps the whole's normaliser: the two gradients add up to
    the loss's. ActFocus weighs by batch.signal, the one of the settings.
    """
    parameters, s, shares = [p for p in arm.policy.parameters() if p.requires_grad], arm.settings, {}
    for credit, (alpha, beta) in {"uniform": (1.0, 0.0), "actfocus": (s.alpha, s.beta)}.items():
        batch.weights = token_weights(batch.signal, batch.action_mask, batch.response_mask, alpha=alpha, beta=beta)
        sums = [[torch.zeros_like(p) for p in parameters] for _ in range(2)]
        for _, part in batch.parts(arm.micro_batch):
            logprobs = score(arm.policy, part.ids, part.response_mask, s.temperature).logprobs
            for total, tokens in zip(sums, (part.action_mask, ~part.action_mask)):
                loss, _ = weighted_policy_loss(logprobs, part.old_logprobs, part.advantages, part.weights * tokens,
                                               weight_sum=batch.weights.sum())
                for sum_, gradient in zip(total, torch.autograd.grad(loss, parameters, retain_graph=True)):
                    sum_ += gradient
        shares[credit] = np.array([sum(float(x.square().sum()) for x in total) for total in sums])
    return shares


def diagnose(arm, groups):
    """Play `groups` boards G times each -> what was found, and each group's mean signals and reward variance."""
    s, names = arm.settings, [name for name in SIGNALS if name != "random"]
    boards = draw_boards(arm.env, arm.rng, groups, EVALUATION_SEED, arm.held_out)
    means, returns, facts = defaultdict(list), [], []
    shares, tokens = defaultdict(lambda: np.zeros(2)), defaultdict(int)
    for start in tqdm(range(0, groups, s.prompts), desc="playing", unit="batch", leave=False, disable=None):
        played = arm.play(np.repeat(boards[start:start + s.prompts], s.rollouts).tolist(), s.temperature, arm.generator)
        returns.append(played.returns.view(-1, s.rollouts))
        facts.append(accuracy(played, arm.env)["fact_accuracy"])
        batch = arm.make_batch(played)
        of_part = lambda part: score_logits(arm.reference, part.ids, part.response_mask, part.old_logprobs,
                                            *(SIGNALS[name] for name in names))
        signals = batch.in_parts(of_part, arm.micro_batch)
        kinds = {"action tokens": batch.action_mask, "reasoning tokens": batch.response_mask & ~batch.action_mask,
                 "all response tokens": batch.response_mask}
        for kind, mask in kinds.items():
            tokens[kind] += int(mask.sum())
            of_group = lambda x: x.view(-1, s.rollouts * x.shape[1]).sum(1).cpu()  # [B, T] -> [P]
            for name, signal in zip(names, (x.round(decimals=5) for x in signals)):  # rounding noise has no ranks
                means[name, kind].append(of_group(signal * mask) / of_group(mask))
        kept = variance_filter(returns[-1], keep=s.keep)
        if len(kept):
            chosen = batch.select(torch.arange(len(batch)).view(-1, s.rollouts)[kept].flatten())
            chosen.advantages = arm.credit.advantages(chosen)
            for credit, squares in gradient_shares(arm, chosen).items():
                shares[credit] += squares
    returns, means = torch.cat(returns), {key: torch.cat(values) for key, values in means.items()}
    variance, rng = returns.double().var(1), np.random.default_rng(s.seeds[0])
    rho = {f"{name}, {kind}": rank_correlation(values, variance, rng) for (name, kind), values in means.items()}
    facts = [x for x in facts if x is not None]
    return {"groups": groups, "groups_with_spread": len(variance_filter(returns, keep=1)), "signal": s.signal,
            "action_fraction": tokens["action tokens"] / tokens["all response tokens"], "spearman": rho,
            "fact_accuracy": float(np.mean(facts)) if facts else None,
            "grad_share_action": {credit: squares[0] / squares.sum() if squares.sum() else None
                                  for credit, squares in shares.items()}}, means, variance


def plot(means, variance, rho, path):
    """Reward variance over mean energy, a point a group; False where matplotlib is not installed."""
    if not (plt := pyplot()):
        return False
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    for axis, kind in zip(axes, ("action tokens", "reasoning tokens")):
        axis.scatter(means["energy", kind], variance, s=9, alpha=0.6)
        axis.set(title=f"{kind}, rho {rho[f'energy, {kind}'][0]:+.2f}",
                 xlabel="mean energy of the group's tokens (nats)")
    axes[0].set_ylabel("variance of the group's returns")
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True


def main(arguments=None):
    started = time.perf_counter()
    parser = SettingsParser("python -m extras.diagnose", description=__doc__.split("\n\n")[0])
    parser.add_argument("--checkpoint", help=CHECKPOINT)
    parser.add_argument("--groups", type=int, default=200, help="groups that are played (default: 200)")
    parser.add_argument("--nested-boards", type=int, default=24, help="boards of the nested sampling (default: 24)")
    arm, options = agent_at(parser, parser.parse_args(arguments).checkpoint, arguments)
    for name in ("groups", "nested_boards"):
        if vars(options)[name] < 2:
            parser.error(f"{name}: {vars(options)[name]} is fewer than 2")
    found, means, variance = diagnose(arm, options.groups)
    nested = decided(arm, options.nested_boards)
    print(f"Where the variance of returns is decided, {nested['episodes']} episodes from {options.nested_boards} "
          "boards:")
    for turns in ("first turn", "all turns"):
        part = nested[turns]
        number = lambda x: "none" if x is None else f"{x:.2f}"
        print(f"  {turns:10}  variance by the reasoning {part['reasoning']:.2f}, by the answer {part['answer']:.2f}, "
              f"by what comes later {part['later']:.2f}; the answer's share of the first two {number(part['share'])} "
              f"[{'..'.join(map(number, part['interval']))}]: {verdict(part)} "
              f"(returns vary in {part['states'][0]} of {part['states'][1]} states)")
    if found["fact_accuracy"] is not None:
        warning = " (three agents with less than 80 % gained little or nothing, whatever the verdict: results)"
        print(f"  {100 * found['fact_accuracy']:.0f} % of the facts that the reasoning states are true"
              + warning * (found["fact_accuracy"] < 0.8))
    out, rho, s = Path(arm.settings.out), found["spearman"], arm.settings
    out.mkdir(parents=True, exist_ok=True)
    plain = {name: [None if math.isnan(x) else x for x in values] for name, values in rho.items()}
    written = found | {"decided": nested, "agent": options.checkpoint or "base", "config": described(s),
                       "spearman": plain, "seconds": time.perf_counter() - started}
    write(out / "diagnosis.json", json.dumps(written, indent=1) + "\n")
    drawn = plot(means, variance, rho, out / "diagnosis.png")
    print(f"{found['groups']} groups of {s.rollouts}, {options.checkpoint or 'the agent before training'}, temperature "
          f"{s.temperature}; {found['groups_with_spread']} groups have any spread of returns")
    print(f"action tokens: {100 * found['action_fraction']:.1f} % of what was generated")
    print("Spearman's rho of a group's reward variance with its mean signal, 95 % bootstrap interval over groups:")
    kinds = ("action tokens", "reasoning tokens", "all response tokens")
    print(f"{'':10}" + "".join(f"{kind:28}" for kind in kinds))
    for name in dict.fromkeys(name for name, _ in means):
        cells = [rho[f"{name}, {kind}"] for kind in kinds]
        print(f"{name:10}" + "".join(f"{'constant' if math.isnan(r) else f'{r:+.2f} ({low:+.2f}..{high:+.2f})':28}"
                                     for r, low, high in cells).rstrip())
    for credit, value in found["grad_share_action"].items():
        by = f", ranked by {s.signal}" if credit == "actfocus" else ""
        print(f"share of the squared gradient norm that comes from action tokens, {credit} credit{by}: "
              + ("there is none" if value is None else f"{100 * value:.1f} %"))
    print(f"written to {out}: diagnosis.json" + (", diagnosis.png" if drawn else ""))


if __name__ == "__main__":
    main()
