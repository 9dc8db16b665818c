"""What a step of training and an evaluation write into metrics.jsonl; README.md says what each field tells."""

from actfocus import variance_filter


def episodes(played):
    """What a batch of episodes says."""
    sampled = played.turn_ids >= 0
    tokens, action, turns = int(sampled.sum()), int(played.action_mask.sum()), int(played.turns.sum())
    think = played.logprobs[sampled & ~played.action_mask]
    outcomes = {}
    for name, value in (item for outcome in played.outcome for item in outcome.items()):
        outcomes.setdefault(name, []).append(float(value))
    return {"return": played.returns.mean().item(), "success": played.success.float().mean().item(),
            "format_valid": float((played.valid * played.turns).sum() / turns), "turns": turns / len(played),
            "think_tokens": (tokens - action) / turns, "action_tokens": action / turns, "generated_tokens": tokens,
            "action_fraction": action / tokens, "think_nll": -think.mean().item() if len(think) else None,
            **{name: sum(values) / len(values) for name, values in outcomes.items()}}


def groups(played, chosen, prompts):
    """How many of the P groups differ in their returns, and how many are trained on."""
    with_spread = len(variance_filter(played.returns.view(prompts, -1), keep=1))
    return {"zero_spread_groups": prompts - with_spread, "kept_groups": len(chosen.seeds.unique())}


def updates(batch, totals):
    """What a step's updates say, from sums over updates and tokens; batch: the kept groups alone."""
    mask, action, n, made = batch.response_mask, batch.action_mask, max(totals["n"], 1), max(totals["updates"], 1)
    mean = lambda values: float(values.mean()) if len(values) else None
    out = {name: totals[name] for name in ("updates", "skipped_updates")} | {"updated_tokens": int(totals["n"])}
    out |= {name: totals[name] / made for name in ("policy_loss", "grad_norm")}
    out |= {name: totals[name] / n for name in ("approx_kl", "clip_fraction", "ratio_mean")}
    out |= {"think_entropy": mean(batch.old_entropy[mask & ~action]), "action_entropy": mean(batch.old_entropy[action]),
            "action_energy": mean(batch.energy[action]),
            "weight_share_action": float(batch.weights[action].sum() / batch.weights.sum().clamp(min=1e-30)),
            "grad_share_action": totals["grad_action"] / max(totals["grad_all"], 1e-30)}
    if batch.value_targets is not None:
        error, variance = (batch.value_targets - batch.old_values)[mask].var(), float(batch.value_targets[mask].var())
        out |= {"value_loss": totals["value_loss"] / made,
                "explained_variance": 1 - float(error) / variance if variance > 0 else None}
    return out
