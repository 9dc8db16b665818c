"""ActFocus: focus the policy gradient of a multi-turn language-model agent on its action tokens.

"Resolving Action Bottleneck: Agentic Reinforcement Learning Informed by Token-Level Energy" (arXiv 2605.14558). The
agent writes `<think> long reasoning </think><answer> short action </answer>` every turn. PPO and GRPO credit all those
tokens alike; ActFocus weights them by where they stand and by how unsure a frozen reference model is about them:

    E_t = -logsumexp_v f_ref[t, v]                     energy of token y_t           token_energy
    w_t = alpha                                        y_t is reasoning              token_weights
    w_t = 1 + beta * sigmoid((E_t - mu) / sigma)       y_t is part of an action
    L   = -(1 / sum_t w_t) sum_t w_t min(rho_t A_t, clip(rho_t, 1 - eps_low, 1 + eps_high) A_t)   weighted_policy_loss

mu and sigma are the mean and the population deviation of E over all action tokens of the training batch. The advantages
A_t are those of the algorithm that it is put into: group_advantages (GRPO) or gae (PPO). (alpha, beta) = (1, 0) is that
algorithm itself, bit for bit. This file needs torch and nothing else: copy it. In your own loop:

    energy  = token_energy(ref_logits[:, :-1])                    # logits at t - 1 predict token t
    actions = action_mask(tokenizer, ids, response_mask)          # [B, T]
    weights = token_weights(energy, actions[:, 1:], response_mask[:, 1:])
    loss, stats = weighted_policy_loss(logprobs, old_logprobs, advantages, weights)      # all [B, T - 1]

Shapes, here and in the other files: B trajectories, T tokens, N flattened tokens, V vocabulary, H hidden size, P
prompts, G rollouts of a prompt. Column t of a [B, T] tensor of log-probs, energies or weights is of token t (above,
where the first column is cut, of token t + 1). Masks are bool: response_mask marks the tokens that the policy
sampled, action_mask those of them that hold a character between `<answer>` and `</answer>`.
"""

import copy
import re
from bisect import bisect_left, bisect_right
from itertools import accumulate, groupby

import torch
from torch import nn
from torch.distributions import Categorical

ANSWER = "(?s)<answer>(?:(.*?)</answer>|.*)"  # (?s): a dot is any character; |.*: passes what is never closed, once
MAX_LOG_RATIO = 20.0  # exp(20) = 5e8: far outside any clip range, and exp() of a stray log-ratio stays finite


def check_tensors(like, where=None, dtype=None, **tensors):
    """ValueError that names it unless each tensor has the shape of `like`, the `dtype`, and finite numbers `where`."""
    for name, x in tensors.items():
        if x.shape != like.shape:
            raise ValueError(f"{name} has shape {tuple(x.shape)}, expected {tuple(like.shape)}")
        if dtype is not None and x.dtype != dtype:
            raise ValueError(f"{name} has dtype {x.dtype}, expected {dtype}")
        if not (torch.isfinite(x) if where is None else torch.isfinite(x) | ~where).all():
            raise ValueError(f"{name} is not finite" + ("" if where is None else " on a token that counts"))


def check_range(low, high=float("inf"), **values):
    """ValueError that names the argument, unless each number lies in [low, high] and is finite."""
    for name, value in values.items():
        if not (low <= value <= high and value < float("inf")):
            raise ValueError(f"{name} must be in [{low}, {high}], got {value}")


def at_least_float32(x):  # in half precision and in integers, sums go wrong
    return x.to(torch.promote_types(x.dtype, torch.float32))


# Which tokens act -----------------------------------------------------------------------------------------------------


def token_spans(tokenizer, ids, pieces):
    """ids of a response -> (text, starts, ends of its tokens, which may share a character); pieces: texts of ids."""
    before = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]  # some decoders drop a leading space
    decode = lambda ids: tokenizer.decode(before + ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    opening = len(decode([]))
    text = decode(ids)[opening:]
    for i in set(ids).difference(pieces):
        pieces[i] = decode([i])[opening:]
    ends = list(accumulate((len(pieces[i]) for i in ids), initial=0))
    if "".join(pieces[i] for i in ids) == text:
        return text, ends[:-1], ends[1:]
    # What a token adds depends on those before it: decode it with what the last whole character came from.
    spans, first, here, at = [], 0, 0, 0  # ids[:here] are whole, `at` long; ids[first:here]: the last piece
    for n in range(1, len(ids) + 1):
        known, held, grown = (decode(ids[first:end]) for end in (here, n - 1, n))
        whole = not grown.endswith("\ufffd") or n - here == 32  # U+FFFD: not whole yet; or nothing that will ever be
        apart = n - 1 > here and whole and grown.startswith(held)  # bytes held back stay a character of their own
        start, end = at + apart * (len(held) - len(known)), at + len(grown) - len(known)
        spans.append((start, max(end, start)))
        first, here, at = (here, n, end) if whole else (first, here, at)
    return text, *zip(*spans)


def action_mask(tokenizer, ids, response_mask, turn_ids=None, pattern=ANSWER):
    """Which sampled tokens of ids[B, T] hold a character of an action -> [B, T] bool.

    An action is what `pattern` finds within a response (if it has groups: what the first that takes part does); a
    response is a run of response_mask[B, T], in which turn_ids[B, T], if given, stay the same. What stands between
    responses is never read. An agent that calls tools: pattern="(?s)<tool_call>(.*?)</tool_call>". tokenizer: anything
    with decode and eos_token_id. ValueError: a mask of another shape or dtype.
    """
    check_tensors(ids, dtype=torch.bool, response_mask=response_mask)
    check_tensors(ids, turn_ids=ids if turn_ids is None else turn_ids)
    turns = response_mask.long() if turn_ids is None else torch.where(response_mask, turn_ids + 1, 0)
    mask, pieces, pattern = [[False] * ids.shape[1] for _ in ids], {}, re.compile(pattern)
    groups = range(1, pattern.groups + 1) or [0]  # 0: all of the match
    for row, (tokens, of_row) in enumerate(zip(ids.tolist(), turns.tolist())):
        for turn, run in groupby(range(len(of_row)), key=of_row.__getitem__):
            if turn:  # 0: between responses
                here = list(run)
                text, starts, ends = token_spans(tokenizer, tokens[here[0]:here[-1] + 1], pieces)
                for match in pattern.finditer(text):
                    first, last = next((match.span(n) for n in groups if match[n] is not None), (0, 0))
                    for i in range(bisect_right(ends, first), bisect_left(starts, last)):  # end after, start before
                        mask[row][here[0] + i] |= first < last and starts[i] < ends[i]  # some tokens have no text
    return torch.tensor(mask, dtype=torch.bool, device=ids.device).view(ids.shape)


# Token weights --------------------------------------------------------------------------------------------------------


def token_energy(logits):
    """Energy of the next-token distribution, `-logsumexp` of raw logits [..., V] -> [...] float32, in nats.

    Low: the model is confident, high: it is unsure, says the paper. Use the frozen reference's logits as they come (no
    temperature, no softmax) and mind the offset: the energy *of* token t is that of the logits at t - 1.
    """
    return -torch.logsumexp(logits.float(), dim=-1)


@torch.no_grad()
def token_weights(signal, action_mask, response_mask, *, alpha=0.1, beta=0.5, eps=1e-6):
    """ActFocus weights w[B, T] float32, without gradient: alpha on reasoning, 1 + beta * sigmoid(z) on actions, else 0.

    signal[B, T]: a score of each token, token_energy in the paper; read on action tokens only. z = (signal - mean) /
    sqrt(population variance + eps) over all action tokens of the call, so pass the whole training batch at once,
    not a micro-batch. A batch without an action token is valid: every response token then weighs alpha.
    ValueError: alpha outside [0, 1], beta < 0, a mask of another shape or dtype, an action token outside the response,
    a signal that is not finite on an action token.
    """
    check_range(0, 1, alpha=alpha)
    check_range(0, beta=beta)
    check_tensors(response_mask, dtype=torch.bool, response_mask=response_mask, action_mask=action_mask)
    check_tensors(response_mask, where=action_mask, signal=signal)
    if (action_mask & ~response_mask).any():
        raise ValueError("action_mask marks a token outside response_mask")
    weights = response_mask.float() * alpha  # [B, T]
    if action_mask.any():
        score = signal[action_mask].double()  # [N action tokens]
        centred = score - score.mean()
        z = centred / (centred.square().mean() + eps).sqrt()
        weights[action_mask] = (1 + beta * torch.sigmoid(z)).float()
    return weights


def token_logprobs(logits, targets):
    """Log-probs [n] of targets[n] under logits[n, V]."""
    return at_least_float32(logits).log_softmax(-1).gather(-1, targets[:, None])[:, 0]


# What is put in the place of energy in the paper's ablation (random: a control of ours). Each is (logits[n, V] of the
# frozen reference, targets[n], old_logprobs[n] of the policy that sampled) -> [n]: the higher, the heavier the token.
SIGNALS = {
    "energy": lambda logits, targets, old_logprobs: token_energy(logits),
    "entropy": lambda logits, targets, old_logprobs: Categorical(logits=logits.float(), validate_args=False).entropy(),
    "nll": lambda logits, targets, old_logprobs: -old_logprobs,
    "shift": lambda logits, targets, old_logprobs: old_logprobs - token_logprobs(logits, targets),
    "random": lambda logits, targets, old_logprobs: torch.rand_like(old_logprobs),
}


def weighted_policy_loss(logprobs, old_logprobs, advantages, weights, *, clip_low=0.2, clip_high=0.28, weight_sum=None):
    """Clipped policy loss with token weights; all [B, T], read where weights > 0 -> (loss, stats).

    L = -(1 / weight_sum) sum_t w_t min(rho_t A_t, clip(rho_t, 1 - clip_low, 1 + clip_high) A_t), rho_t = exp(logprobs -
    old_logprobs). weight_sum: that of the whole optimiser minibatch's weights (or a constant, as in Dr. GRPO). Where a
    call sees only a part of it (a micro-batch), pass the whole's: the parts' losses and gradients then add up to the
    whole's, means would not. Without any weight the loss is 0. clip_low, clip_high: a number, or one a token, [B, T].

    stats, plain means over the tokens with weight > 0, no gradient: approx_kl (rho - 1 - log rho, Schulman's k3, nats),
    clip_fraction (rho outside the clip range, whatever the advantage's sign), ratio_mean.
    ValueError: another shape, a negative or non-finite weight or weight_sum, a value not finite where weights > 0.
    """
    logprobs, weights = at_least_float32(logprobs), at_least_float32(weights.detach())
    check_tensors(logprobs, weights=weights)
    active = weights > 0
    check_tensors(logprobs, where=active, logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    weight_sum = weights.sum() if weight_sum is None else torch.as_tensor(weight_sum).to(weights).detach()
    check_tensors(weights.new_zeros(()), weight_sum=weight_sum)  # one number, finite
    if (weights < 0).any() or weight_sum < 0 or (weight_sum == 0 and active.any()):
        raise ValueError("weights must not be negative, and weight_sum must be the sum of the minibatch's weights")
    for name, bound, most in (("clip_low", clip_low, 1), ("clip_high", clip_high, float("inf"))):
        bound = torch.as_tensor(bound)
        if not ((bound >= 0) & (bound <= most)).all() or bound.shape not in ((), logprobs.shape):
            raise ValueError(f"{name} must be in [0, {most}], a number or one for each token")

    # where() before exp(): padding may hold anything, and a NaN multiplied by weight 0 is still NaN.
    log_ratio = torch.where(active, logprobs - old_logprobs.detach(), 0.0)  # [B, T]
    log_ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    advantages = torch.where(active, advantages.detach(), 0.0)  # [B, T]
    ratio = log_ratio.exp()
    clipped = ratio.clamp(min=1 - clip_low).clamp(max=1 + clip_high)  # apart: one may be a number, the other a tensor
    objective = torch.minimum(ratio * advantages, clipped * advantages)  # [B, T]
    loss = -(weights * objective).sum() / weight_sum.clamp(min=torch.finfo(torch.float32).tiny)

    with torch.no_grad():
        n = active.sum().clamp(min=1)
        outside = (ratio < 1 - clip_low) | (ratio > 1 + clip_high)
        stats = {"approx_kl": (active * (log_ratio.expm1() - log_ratio)).sum() / n,
                 "clip_fraction": (active & outside).sum() / n,
                 "ratio_mean": (active * ratio).sum() / n}
    return loss, stats


def group_spread(returns, correction=1):
    """torch.std in each group, returns[P, G] -> [P] float64; 0 if they differ by at most 1e-6 of the largest."""
    if returns.dim() != 2 or 0 in returns.shape:
        raise ValueError(f"returns must be [P, G] and not empty, got shape {tuple(returns.shape)}")
    check_tensors(returns, returns=returns)
    returns = returns.double()
    noise = 1e-6 * returns.abs().amax(1)
    deviation = returns.std(1, correction=min(correction, returns.shape[1] - 1))
    return torch.where(returns.amax(1) - returns.amin(1) > noise, deviation, 0.0)


def group_advantages(returns):
    """GRPO: (R - mean) / (std + 1e-6) within each group, returns[P, G] -> [P, G] float32; 0 for a group without spread.

    std is the sample deviation (G - 1), as in TRL and verl. One advantage serves all response tokens of its trajectory.
    """
    spread = group_spread(returns)[:, None]  # [P, 1]
    centred = returns.double() - returns.double().mean(1, keepdim=True)
    return torch.where(spread > 0, centred / (spread + 1e-6), 0.0).float()


@torch.no_grad()
def gae(rewards, values, response_mask, *, gamma=1.0, lam=1.0):
    """Generalised advantage estimation over response tokens, all [B, T] -> (advantages, returns), 0 outside the mask.

    delta_t = r_t + gamma V_next - V_t and A_t = delta_t + gamma lam A_next, where "next" is the next *response* token:
    the observation between two turns neither ends the recursion, nor discounts, nor receives credit. returns = A + V,
    the critic's target. values[b, t] is V before token t is written; what stands outside the mask is never read.
    """
    check_range(0, 1, gamma=gamma, lam=lam)
    check_tensors(rewards, dtype=torch.bool, response_mask=response_mask)
    check_tensors(rewards, where=response_mask, values=values, rewards=rewards)
    rewards, values = at_least_float32(rewards), at_least_float32(values)
    advantages = torch.zeros_like(values)
    next_value = next_advantage = values.new_zeros(len(values))  # [B]
    for t in reversed(range(values.shape[1])):
        here = response_mask[:, t]
        advantage = rewards[:, t] + gamma * next_value - values[:, t] + gamma * lam * next_advantage
        next_value = torch.where(here, values[:, t], next_value)
        next_advantage = torch.where(here, advantage, next_advantage)
        advantages[:, t] = torch.where(here, advantage, 0.0)
    return advantages, torch.where(response_mask, advantages + values, 0.0)


def whiten(x, mask):
    """x[B, T] with mean 0 and deviation 1 over the mask, 0 outside."""
    values = x[mask].double()  # in float32, a mean of equal numbers is another number
    return torch.where(mask, (x - values.mean()) / (values.std(correction=0) + 1e-6), 0.0)


class Critic(nn.Module):
    """PPO's V of the state before each token: the policy's backbone, copied, with a scalar head that starts at 0."""

    def __init__(self, model):
        super().__init__()
        self.backbone = copy.deepcopy(model.base_model)
        self.head = nn.Linear(model.get_input_embeddings().embedding_dim, 1, device=model.device)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, ids, response_mask):
        """ids[B, T], response_mask[B, T] -> values[B, T], 0 outside the mask."""
        hidden = self.backbone(input_ids=ids[:, :-1]).last_hidden_state  # [B, T - 1, H]
        values = self.head(hidden)[..., 0].float()
        return torch.where(response_mask, nn.functional.pad(values, (1, 0)), 0.0)


def variance_filter(returns, keep=0.25):
    """Indices of the groups worth training on, largest spread of returns[P, G] first: the top `keep` of all P groups.

    At least one group is kept where any has spread; groups without spread teach GRPO nothing and are never kept, so the
    result is empty where no group has any: skip the update then.
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep must be in (0, 1], got {keep}")
    spread = group_spread(returns)
    count = max(1, int(keep * len(spread) + 1e-9))  # 1e-9: 0.29 * 100 is 28.999999999999996
    order = torch.argsort(spread, descending=True, stable=True)[:count]
    return order[spread[order] > 0]


# Credit methods: their answers to what the training loop asks -----------------------------------------------------


class Credit:
    """Plain PPO and GRPO. A method of credit assignment is a subclass with the answers in which it differs.

    arm: train.Arm; played: rollout.Trajectories; batch, minibatch: train.Batch, each tensor [B] or [B, T]. A number,
    text or bool as a class attribute is a setting, NAME:ATTRIBUTE=VALUE. `step` counts from 1. All else is not resumed.
    """

    algos = ("ppo", "grpo")  # what it goes with

    def __init__(self, algo, settings):
        self.algo, self.settings, self.step = algo, settings, 0

    def check(self, env):
        """ValueError where the method cannot be used; asked before a run, of a copy that does not train."""
        if self.algo not in self.algos:
            raise ValueError(f"credits: {type(self).__name__} goes with --algos {' '.join(self.algos)} alone")

    def play(self, arm, boards):
        """Seeds of P boards -> Trajectories of P * G episodes, board by board."""
        seeds = [board for board in boards for _ in range(self.settings.rollouts)]
        return arm.play(seeds, self.settings.temperature, arm.generator)

    def filter(self, played):
        """-> what is trained on; none: nothing to learn. `advantages` wants whole groups of G. May clear masks."""
        keep, rows = self.settings.keep, torch.arange(len(played.returns)).view(self.settings.prompts, -1)  # [P, G]
        groups = variance_filter(played.returns[rows], keep=keep)
        if keep == 1 and (self.algo == "ppo" or len(groups)):  # no filter: all stay, but GRPO needs some spread
            groups = slice(None)
        return played.select(rows[groups].flatten())

    def advantages(self, batch):
        """-> [B, T]."""
        if self.algo == "ppo":
            return whiten(batch.gae_advantages, batch.response_mask)
        return group_advantages(batch.returns.view(-1, self.settings.rollouts)).view(-1, 1) * batch.response_mask

    def weights(self, batch):
        """-> [B, T] float32, 0 on what is not trained; outside the response it is read as 0."""
        return batch.response_mask.float()

    def ratio(self, logprobs, batch):
        """The policy's log-probs [B, T] -> (the log-probs that enter rho, clip_low, clip_high)."""
        return logprobs, self.settings.clip_low, self.settings.clip_high

    def normaliser(self, minibatch):
        """What the sum of the tokens' losses is divided by."""
        return minibatch.weights.sum()

    def metrics(self, batch):
        """Numbers of its own for the step's line in the log, {name: number}, asked after the updates."""
        return {}


class ActFocus(Credit):
    """The paper's: reasoning weighs alpha, action tokens 1 to 1 + beta by their energy."""

    def weights(self, batch):
        s = self.settings
        return token_weights(batch.signal, batch.action_mask, batch.response_mask, alpha=s.alpha, beta=s.beta)


# name -> class, or "module:Class" for one that is imported when somebody asks for it
CREDITS = {"uniform": Credit, "actfocus": ActFocus, "carl": "extras.rivals:Carl", "a2tgpo": "extras.rivals:A2tgpo"}
