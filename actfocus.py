"""ActFocus: focus the policy gradient of a multi-turn language-model agent on its action tokens.

"Resolving Action Bottleneck: Agentic Reinforcement Learning Informed by Token-Level Energy" (arXiv 2605.14558). The agent
writes `<think> long reasoning </think><answer> short action </answer>` every turn. PPO and GRPO credit all those tokens
alike; ActFocus weights them by where they stand and by how unsure a frozen reference model is about them:

    E_t = -logsumexp_v f_ref[t, v]                                energy of token y_t             token_energy
    w_t = alpha                                                   y_t is reasoning                token_weights
    w_t = 1 + beta * sigmoid((E_t - mu) / sigma)                  y_t is part of an action
    L   = -(1 / sum_t w_t) sum_t w_t min(rho_t A_t, clip(rho_t, 1 - eps_low, 1 + eps_high) A_t)   weighted_policy_loss

The advantages A_t are those of the algorithm it is put into: group_advantages (GRPO) or gae (PPO). (alpha, beta) = (1, 0)
is that algorithm itself, bit for bit. This file needs torch and nothing else: copy it. In your own loop:

    energy  = token_energy(ref_logits[:, :-1])                    # logits at t - 1 predict token t
    weights = token_weights(energy, action_mask[:, 1:], response_mask[:, 1:])
    loss, stats = weighted_policy_loss(logprobs, old_logprobs, advantages, weights)      # all [B, T - 1]

Beside it stand two rivals that change the advantages instead: CARL (tree_advantages) and A2TGPO (turn_gain_advantages).

Shapes, here and in the other files: B trajectories, T tokens, N flattened tokens, V vocabulary, H hidden size, P prompts,
G rollouts of a prompt. Column t of a [B, T] tensor of log-probs, energies or weights belongs to token t. Masks are bool:
response_mask marks the tokens that the policy sampled, action_mask those of them between `<answer>` and `</answer>`.
"""

import torch

SIGNALS = ("energy", "entropy", "nll", "shift")
MAX_LOG_RATIO = 20.0  # exp(20) = 5e8: far outside any clip range, and exp() of a stray log-ratio stays finite


def _check(name, tensor, like, dtype=None):
    if tensor.shape != like.shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {tuple(like.shape)}")
    if dtype is not None and tensor.dtype != dtype:
        raise ValueError(f"{name} has dtype {tensor.dtype}, expected {dtype}")


def _check_finite(name, tensor, where=None):
    bad = ~torch.isfinite(tensor)
    if (bad if where is None else bad & where).any():
        raise ValueError(f"{name} is not finite" + ("" if where is None else " on a token that counts"))


# Token weights --------------------------------------------------------------------------------------------------------


def token_energy(logits):
    """Energy of the next-token distribution, `-logsumexp` of raw logits [..., V] -> [...] float32, in nats.

    Low energy: the model is confident, high energy: it is unsure. Use the frozen reference's logits as they come (no
    temperature, no softmax) and mind the shift: the energy *of* token t is that of the logits at t - 1.
    """
    return -torch.logsumexp(logits.float(), dim=-1)


def token_signal(name, *, old_logprobs, ref_logprobs, ref_energy, ref_entropy):
    """The raw score s_t behind the weights, [B, T] each in and out; the paper's signal ablation.

    energy, entropy: of the frozen reference, fixed through training. nll: -log pi_old(y_t). shift: log pi_old(y_t) -
    log pi_ref(y_t); these two drift as the policy learns. The paper ranks energy best.
    """
    if name not in SIGNALS:
        raise ValueError(f"unknown signal {name!r}: choose from {', '.join(SIGNALS)}")
    return {"energy": lambda: ref_energy, "entropy": lambda: ref_entropy, "nll": lambda: -old_logprobs,
            "shift": lambda: old_logprobs - ref_logprobs}[name]()


@torch.no_grad()
def token_weights(signal, action_mask, response_mask, *, alpha=0.1, beta=0.5, eps=1e-6):
    """ActFocus weights w[B, T], float32, without gradient: alpha on reasoning, 1 + beta * sigmoid(z) on actions, else 0.

    signal[B, T]: score of each token (token_energy, or any of token_signal); read on action tokens only. z is standardised
    with the mean and population deviation over all action tokens of the call, so pass the whole training batch at once,
    not a micro-batch. A batch without an action token is valid: every response token then weighs alpha.
    ValueError: alpha outside [0, 1], beta < 0, a mask of another shape or dtype, an action token outside the response, a
    signal that is not finite on an action token.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be in [0, 1], got {alpha}")
    if not 0 <= beta < float("inf"):
        raise ValueError(f"beta must be finite and at least 0, got {beta}")
    _check("action_mask", action_mask, signal, torch.bool)
    _check("response_mask", response_mask, signal, torch.bool)
    if (action_mask & ~response_mask).any():
        raise ValueError("action_mask marks a token outside response_mask")
    _check_finite("signal", signal, action_mask)

    weights = response_mask.float() * alpha  # [B, T]
    if action_mask.any():
        score = signal[action_mask].double()  # [N action tokens]
        centred = score - score.mean()
        z = centred / (centred.square().mean() + eps).sqrt()
        weights[action_mask] = (1 + beta * torch.sigmoid(z)).float()
    return weights


# The objective --------------------------------------------------------------------------------------------------------


def weighted_policy_loss(logprobs, old_logprobs, advantages, weights, *, clip_low=0.2, clip_high=0.28, weight_sum=None):
    """Clipped policy loss with token weights; all [B, T], read where weights > 0 -> (loss, stats).

    L = -(1 / weight_sum) sum_t w_t min(rho_t A_t, clip(rho_t, 1 - clip_low, 1 + clip_high) A_t), rho_t = exp(logprobs -
    old_logprobs). weight_sum is the sum of weights over the whole optimiser minibatch. Where a call sees only a part of it
    (a micro-batch), pass the whole's sum: the parts' losses and gradients then add up to the whole's. A mean per micro-batch
    would not. Without any weight the loss is 0. clip_low and clip_high: a number, or a tensor [B, T] where the range differs.

    stats, plain means over the tokens with weight > 0, no gradient: approx_kl (rho - 1 - log rho, Schulman's k3, nats),
    clip_fraction (rho outside the clip range, whatever the advantage's sign), ratio_mean.
    ValueError: another shape, a negative or non-finite weight or weight_sum, a value not finite where weights > 0.
    """
    for name, tensor in (("old_logprobs", old_logprobs), ("advantages", advantages), ("weights", weights)):
        _check(name, tensor, logprobs)
    for name, bound, most in (("clip_low", clip_low, 1), ("clip_high", clip_high, float("inf"))):
        bound = torch.as_tensor(bound)
        if bound.dim():
            _check(name, bound, logprobs)
        if not ((bound >= 0) & (bound <= most)).all():
            raise ValueError("need clip_low in [0, 1] and clip_high >= 0")
    _check_finite("weights", weights)
    if (weights < 0).any():
        raise ValueError("weights must not be negative")
    weights = weights.detach()
    active = weights > 0
    for name, tensor in (("logprobs", logprobs), ("old_logprobs", old_logprobs), ("advantages", advantages)):
        _check_finite(name, tensor, active)
    weight_sum = weights.sum() if weight_sum is None else torch.as_tensor(weight_sum, device=weights.device)
    _check_finite("weight_sum", weight_sum)
    if weight_sum < 0 or (weight_sum == 0 and active.any()):
        raise ValueError("weight_sum must be the sum of the minibatch's weights")

    # where() before exp(): padding may hold anything, and a NaN multiplied by weight 0 is still NaN.
    zero = torch.zeros((), dtype=logprobs.dtype, device=logprobs.device)
    log_ratio = torch.where(active, logprobs - old_logprobs.detach(), zero).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)  # [B, T]
    advantages = torch.where(active, advantages.detach(), zero)  # [B, T]
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    objective = torch.minimum(ratio * advantages, clipped * advantages)  # [B, T]
    loss = -(weights * objective).sum() / weight_sum.clamp(min=torch.finfo(torch.float32).tiny)

    with torch.no_grad():
        n = active.sum().clamp(min=1)
        outside = (ratio < 1 - clip_low) | (ratio > 1 + clip_high)
        stats = {"approx_kl": (active * (ratio - 1 - log_ratio)).sum() / n,
                 "clip_fraction": (active & outside).sum() / n,
                 "ratio_mean": (active * ratio).sum() / n}
    return loss, stats


# Advantages -----------------------------------------------------------------------------------------------------------


def _spread(returns, correction=1):
    """Standard deviation of each group, returns[P, G] float64 -> [P]; exactly 0 for rounding noise. correction 1: the sample's."""
    if returns.dim() != 2 or 0 in returns.shape:
        raise ValueError(f"returns must be [P, G] and not empty, got shape {tuple(returns.shape)}")
    _check_finite("returns", returns)
    span = returns.amax(1) - returns.amin(1)
    noise = 1e-6 * returns.abs().amax(1)
    deviation = returns.std(1, correction=correction) if returns.shape[1] > 1 else torch.zeros_like(span)
    return torch.where(span > noise, deviation, 0.0)


def group_advantages(returns):
    """GRPO: (R - mean) / (std + 1e-6) within each group, returns[P, G] -> [P, G] float32; 0 for a group without spread.

    std is the sample deviation (G - 1), as in TRL and verl. One advantage serves all response tokens of its trajectory.
    """
    values = returns.double()
    spread = _spread(values)[:, None]  # [P, 1]
    advantages = (values - values.mean(1, keepdim=True)) / (spread + 1e-6)
    return torch.where(spread > 0, advantages, 0.0).float()


@torch.no_grad()
def gae(rewards, values, response_mask, *, gamma=1.0, lam=1.0):
    """Generalised advantage estimation over response tokens only, all [B, T] -> (advantages, returns), 0 outside the mask.

    delta_t = r_t + gamma V_next - V_t and A_t = delta_t + gamma lam A_next, where "next" is the next *response* token: the
    observation between two turns neither ends the recursion, nor discounts, nor receives credit. returns = A + V, the
    critic's target. values[b, t] is V before token t is written; what stands outside the mask is never read.
    """
    _check("values", values, rewards)
    _check("response_mask", response_mask, rewards, torch.bool)
    for name, number in (("gamma", gamma), ("lam", lam)):
        if not 0 <= number <= 1:
            raise ValueError(f"{name} must be in [0, 1], got {number}")
    _check_finite("rewards", rewards, response_mask)
    _check_finite("values", values, response_mask)
    advantages = torch.zeros_like(values)
    next_value = next_advantage = torch.zeros_like(values[:, 0]) if values.shape[1] else None  # [B]
    for t in reversed(range(values.shape[1])):
        here = response_mask[:, t]
        advantage = rewards[:, t] + gamma * next_value - values[:, t] + gamma * lam * next_advantage
        next_value = torch.where(here, values[:, t], next_value)
        next_advantage = torch.where(here, advantage, next_advantage)
        advantages[:, t] = torch.where(here, advantage, 0.0)
    return advantages, torch.where(response_mask, advantages + values, 0.0)


# Credit by turns: the rivals -------------------------------------------------------------------------------------------


def tree_advantages(parent, returns):
    """CARL (arXiv 2512.04949): credit of every response in a tree of rollouts, parent[E], returns[E] -> advantages[E] float32.

    An edge is one response; edges stand in the order they were sampled. parent[e]: the edge whose end state e continues from,
    -1 at the root. returns[e]: the episode's return where e ended it, nan elsewhere. With V(leaf) = its return and V(state) =
    the plain mean over the edges sampled from it, A(e) = V(end of e) - V(start of e), not normalised.
    ValueError: an edge before its parent, a return on an edge that others continue, none on one that nothing continues.
    """
    parent, returns = torch.as_tensor(parent), torch.as_tensor(returns)
    _check("parent", parent, returns)
    if parent.dim() != 1 or (parent.is_floating_point() and len(parent)):
        raise ValueError(f"parent must be [E] integers, got {parent.dtype} of shape {tuple(parent.shape)}")
    edges, ends = parent.tolist(), (~torch.isnan(returns)).tolist()
    if any(not -1 <= up < e for e, up in enumerate(edges)):
        raise ValueError("parent must name an earlier edge, or -1 at the root")
    if torch.isinf(returns).any():
        raise ValueError("returns must not be infinite")
    value = returns.double().tolist()  # of each edge's end
    children = [[] for _ in range(len(edges) + 1)]  # the last: the root's, since parent -1 names it
    for e, up in enumerate(edges):
        children[up].append(e)
    for e in reversed(range(len(edges))):  # children come after their parent: leaves first
        if ends[e] == bool(children[e]):
            raise ValueError(f"edge {e} {'has a return but goes on' if ends[e] else 'ends without a return'}")
        if children[e]:
            value[e] = sum(value[c] for c in children[e]) / len(children[e])
    root = sum(value[c] for c in children[-1]) / max(len(children[-1]), 1)
    start = [value[up] if up >= 0 else root for up in edges]
    return torch.tensor([v - u for v, u in zip(value, start)], dtype=torch.float32, device=returns.device)


def turn_gain_advantages(gain, turn_mask, returns, group, *, gamma=1.0, scale=0.3):
    """A2TGPO (arXiv 2605.06200): outcome plus information gain of each turn -> (advantages[B, K], normalised_gain[B, K]).

    gain[B, K]: how much the mean log-prob of the gold answer rose in turn k (nats); turn_mask[B, K] bool: turns that were
    played; returns[B]; group[B]: trajectories of one prompt share a number. The gain is standardised among the same turn
    of the same group (population deviation + 1e-6; 0 for a turn without a peer or without spread), then
    D_k = sum_{j >= k} gamma^(j - k) gain_j / sqrt(number of terms) over the turns played. A turn's advantage is that of its
    trajectory in the group (group_advantages) + scale * D_k, without the second part in the last turn, whose answer the outcome
    judges already. Both results are 0 outside turn_mask.
    """
    _check("turn_mask", turn_mask, gain, torch.bool)
    if gain.dim() != 2:
        raise ValueError(f"gain must be [B, K], got shape {tuple(gain.shape)}")
    _check("returns", returns, gain[:, 0] if gain.shape[1] else gain.sum(1))
    _check("group", group, returns)
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma must be in [0, 1], got {gamma}")
    if not 0 <= scale < float("inf"):
        raise ValueError(f"scale must be finite and at least 0, got {scale}")
    _check_finite("gain", gain, turn_mask)
    outcome = torch.zeros_like(returns, dtype=torch.float32)
    normalised = torch.zeros(gain.shape, dtype=torch.float64, device=gain.device)
    for members in (group == g for g in group.unique()):
        outcome[members] = group_advantages(returns[members][None])[0]
        for k in range(gain.shape[1]):
            peers = members & turn_mask[:, k]
            if peers.any():
                values = gain[peers, k].double()
                spread = _spread(values[None], correction=0)
                normalised[peers, k] = (values - values.mean()) / (spread + 1e-6) if spread > 0 else 0.0
    total, count = torch.zeros_like(outcome, dtype=torch.float64), torch.zeros_like(outcome)  # [B]: of the turns after k
    ahead = torch.zeros_like(normalised)
    for k in reversed(range(gain.shape[1])):
        here = turn_mask[:, k]
        total = torch.where(here, normalised[:, k], 0.0) + gamma * total
        count = count + here
        ahead[:, k] = torch.where(here & (count > 1), total / count.clamp(min=1).sqrt(), 0.0)  # count 1: the last turn
    advantages = torch.where(turn_mask, outcome[:, None] + scale * ahead, 0.0)
    return advantages.float(), normalised.float()


def turn_clip_scale(normalised_gain, turn_mask, *, strength=0.3):
    """A2TGPO's adaptive clip: factor c[B, K] on the clip range, 1 + strength * (2 sigmoid(gain) - 1), and 1 in the last turn.

    The range of a turn is [1 - c * clip_low, 1 + c * clip_high]: wider where a turn brought more than its peers' did.
    """
    _check("turn_mask", turn_mask, normalised_gain, torch.bool)
    if not 0 <= strength <= 1:
        raise ValueError(f"strength must be in [0, 1], got {strength}")
    factor = 1 + strength * (2 * torch.sigmoid(normalised_gain.float()) - 1)
    last = turn_mask & (turn_mask.flip(1).cumsum(1).flip(1) == 1)
    return torch.where(turn_mask & ~last, factor, 1.0)


def turn_logprobs(logprobs, old_logprobs, turn_ids):
    """Log-probs whose ratio to old_logprobs is that of the whole turn, all [B, T], for weighted_policy_loss (A2TGPO, GSPO).

    The ratio's value is exp(mean log-ratio of the turn's tokens), its gradient the token's own (straight-through). turn_ids: the
    turn of each response token, -1 elsewhere. A turn must not be split between calls.
    """
    _check("old_logprobs", old_logprobs, logprobs)
    _check("turn_ids", turn_ids, logprobs)
    log_ratio = torch.where(turn_ids >= 0, (logprobs - old_logprobs).detach(), 0.0)  # [B, T]
    turns = int(turn_ids.max()) + 1 if turn_ids.numel() else 0
    place = turn_ids.clamp(min=-1) + 1  # [B, T], 0: no response token
    sums = torch.zeros(len(logprobs), turns + 1, dtype=log_ratio.dtype, device=logprobs.device)
    counts = sums.scatter_add(1, place, torch.ones_like(log_ratio))
    mean = (sums.scatter_add(1, place, log_ratio) / counts.clamp(min=1)).gather(1, place)  # [B, T]
    return torch.where(turn_ids >= 0, logprobs - logprobs.detach() + old_logprobs.detach() + mean, logprobs)


# Which groups are trained on ------------------------------------------------------------------------------------------


def variance_filter(returns, keep=0.25):
    """Indices of the groups worth training on, largest spread of returns[P, G] first: the top `keep` of all P groups.

    At least one group is kept where any has spread; groups without spread teach GRPO nothing and are never kept, so the
    result is empty where no group has any: skip the update then.
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep must be in (0, 1], got {keep}")
    spread = _spread(returns.double())
    count = max(1, int(keep * len(spread) + 1e-9))  # 1e-9: 0.29 * 100 is 28.999999999999996
    order = torch.argsort(spread, descending=True, stable=True)[:count]
    return order[spread[order] > 0]


# Evidence -------------------------------------------------------------------------------------------------------------


def _ranks(x):
    """1-based ranks with ties averaged, [N] -> [N] float64."""
    _, which, counts = torch.unique(x, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[which]


def spearman(x, y):
    """Spearman's rank correlation of x[N] and y[N]; average ranks for ties, nan where a side is constant (or N < 2)."""
    x, y = torch.as_tensor(x).flatten(), torch.as_tensor(y).flatten()
    _check("y", y, x)
    if torch.isnan(x).any() or torch.isnan(y).any():
        raise ValueError("x and y must not hold nan")
    x, y = _ranks(x), _ranks(y)
    x, y = x - x.mean(), y - y.mean()
    scale = (x.square().sum() * y.square().sum()).sqrt()
    return float((x * y).sum() / scale) if scale > 0 else float("nan")
