"""The weighted policy loss from hidden states, without the [tokens, vocabulary] tensor.

2048 tokens' logits of a 152k vocabulary are 1.2 GB in float32, and autograd keeps several such tensors. But a loss
needs two numbers a token. With N tokens, H hidden units, V words, z = logits / temperature, p = softmax(z), target y:

    logprob = z_y - logsumexp(z)        d logprob / dz_j = [j = y] - p_j
    entropy = -sum_j p_j log p_j        d entropy / dz_j = -p_j (log p_j + entropy)

By the chain rule, with a = d loss / d logprob and e = d loss / d entropy of the token,

    d loss / dz_j = a [j = y] - p_j (a + e (log p_j + entropy))                                                      (1)

and for ActFocus's loss, -w min(rho A, clip(rho) A) / weight_sum with rho = exp(logprob - old_logprob),

    a = -w rho A / weight_sum where rho A is the minimum, else 0            e = -entropy_coef                        (2)

So `weighted_loss` can turn the logits of a block of tokens into (1) while they are there, and multiply that into the
gradients of hidden and weight: three products, the fewest possible. `token_stats` gives the numbers; for a gradient, it
makes the logits again. This file needs torch alone. `python kernels.py` measures it beside others (see --help).
"""

import functools
import warnings

import torch

BLOCK_LOGITS = 2**24  # that a block holds if nothing speaks for more: 64 MB
COMPILE_FROM = 2**20  # logits of a block below which compiling costs more than it saves
SMALLEST = -1e4  # log of a probability that is 0 in float32; finite, because 0 * -inf is nan
MAX_LOG_RATIO = 20.0  # as in actfocus.py


def _statistics(logits, targets, temperature):
    """logits[n, V], targets[n] -> (logprob, logsumexp of the raw logits, entropy, max of z, log_sum), [n] each."""
    z = logits / temperature
    top = z.amax(-1)
    shifted = (z - top[:, None]).clamp(min=SMALLEST)
    total, log_p_total = shifted.exp().sum(-1), (shifted.exp() * shifted).sum(-1)
    log_sum = total.log()  # logsumexp(z) = top + log_sum; apart, they lose no digits where logits are large
    logprob = z.gather(1, targets[:, None])[:, 0] - top - log_sum
    logsumexp = top + log_sum if temperature == 1 else torch.logsumexp(logits, -1)
    return logprob, logsumexp, log_sum - log_p_total / total, top, log_sum


def _slope(logits, targets, temperature, entropy, top, log_sum, a, e, dtype):
    """Equation (1) for logits[n, V] and [n] of the others, in `dtype`; float32 is written over the logits."""
    log_p = (logits / temperature - top[:, None] - log_sum[:, None]).clamp(min=SMALLEST)
    hit = torch.arange(logits.shape[1], device=logits.device) == targets[:, None]
    slope = torch.where(hit, a[:, None], 0.0) - log_p.exp() * (a[:, None] + e[:, None] * (log_p + entropy[:, None]))
    return logits.copy_(slope / temperature) if dtype == torch.float32 else (slope / temperature).to(dtype)


_compiled = functools.cache(torch.compile)
_plain = False  # set once torch.compile has failed, so that it is tried once a process


def _run(function, logits, *arguments):
    """function(logits, *arguments), compiled where that pays and works; the same numbers up to rounding either way."""
    global _plain
    if _plain or logits.numel() < COMPILE_FROM:
        return function(logits, *arguments)
    try:
        for x in filter(torch.is_tensor, (logits, *arguments)):
            torch._dynamo.maybe_mark_dynamic(x, 0)  # the last block has fewer tokens: compile once for all
        with warnings.catch_warnings(action="ignore"):  # the compiler's hints to its own developers
            return _compiled(function)(logits, *arguments)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # no compiler, or one that fails: which exception depends on the platform
        _plain = True
        warnings.warn(f"torch.compile is not usable here ({type(error).__name__}): the loss runs uncompiled")
        return function(logits, *arguments)


def _factors(hidden, weight):
    """What the products are made of: half precision on a GPU, float32 elsewhere, where halves multiply far slower."""
    half = hidden.dtype == weight.dtype and hidden.dtype in (torch.bfloat16, torch.float16) and hidden.is_cuda
    return (hidden, weight) if half else (hidden.float(), weight.float())


def _in_float32(operation, *tensors, **out):
    """torch.mm or addmm to float32: logits that were rounded to half precision would cost the entropy a digit."""
    return operation(*tensors, **out, **({} if tensors[-1].dtype == torch.float32 else {"out_dtype": torch.float32}))


def logits_by_block(hidden, weight, bias=None, rows=None, block_tokens=None, at_least=1):
    """Yield (rows[n], their logits[n, V] in float32), a block of tokens at a time; the next block overwrites them."""
    rows = torch.arange(len(hidden), device=hidden.device) if rows is None else rows
    at_least = 2048 if hidden.is_cuda else at_least  # a GPU wants large products (results/README.md, one GPU)
    size = max(1, block_tokens or max(at_least, BLOCK_LOGITS // len(weight)))
    hidden, weight = _factors(hidden, weight)
    buffer = torch.empty(min(size, len(rows)), len(weight), device=hidden.device, dtype=torch.float32)
    for part in rows.split(size):
        logits = _in_float32(torch.mm, hidden[part], weight.T, out=buffer[:len(part)])
        yield part, logits if bias is None else logits.add_(bias)


@torch.no_grad()
def _one_pass(inputs, targets, temperature, rows=None, coefficients=None, block_tokens=None):
    """Tokens at `rows` -> (logprob, logsumexp, entropy) [N] each, and float32 gradients of hidden, weight, bias, where
    they ask and there are coefficients(rows, logprob) -> (a, e) of equation (1), [n] all.
    """
    hidden, weight = _factors(*inputs[:2])
    asked = [coefficients is not None and x is not None and x.requires_grad for x in inputs]
    at_least = hidden.shape[1] // 3 if asked[1] else 1  # larger is faster: logits of a third of d_weight's memory
    numbers = torch.zeros(3, len(targets), device=targets.device, dtype=torch.float32)
    sums = [torch.zeros_like(x, dtype=torch.float32) if asks else None for x, asks in zip(inputs, asked)]
    with torch.autocast(targets.device.type, enabled=False):  # it would turn the float32 products into half precision
        for part, logits in logits_by_block(hidden, weight, inputs[2], rows, block_tokens, at_least):
            *found, top, log_sum = _run(_statistics, logits, targets[part], temperature)
            numbers[:, part] = torch.stack(found)
            if any(asked):
                (a, e), (d_hidden, d_weight, d_bias) = coefficients(part, found[0]), sums
                slope = _run(_slope, logits, targets[part], temperature, found[2], top, log_sum, a, e, weight.dtype)
                if d_hidden is not None:
                    d_hidden[part] = _in_float32(torch.mm, slope, weight)
                if d_weight is not None:
                    _in_float32(torch.addmm, d_weight, slope.T, hidden[part], out=d_weight)
                if d_bias is not None:
                    d_bias += slope.sum(0)
    return [x.clone() for x in numbers], sums  # autograd casts them, after a loss that was scaled has scaled them


class _Given(torch.autograd.Function):
    """`values` as functions of the inputs, whose gradients are backward(inputs, *d_values)."""

    @staticmethod
    def forward(ctx, values, backward, *inputs):
        ctx.save_for_backward(*inputs)
        ctx.gradients = backward
        return values

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *d_values):
        return None, None, *ctx.gradients(ctx.saved_tensors, *d_values)


def _check(hidden, weight, targets, bias, temperature, clip_low=0.0, clip_high=0.0, columns=()):
    fits = hidden.dim() == weight.dim() == 2 and hidden.shape == (*targets.shape, weight.shape[1])
    fits &= (bias is None or bias.shape == weight.shape[:1]) and all(x.shape == targets.shape for x in columns)
    if not fits or targets.is_floating_point() or targets.dtype == torch.bool:
        got = [(x.dtype, *x.shape) for x in (hidden, weight, targets, bias, *columns) if x is not None]
        raise ValueError(f"need hidden [N, H], weight [V, H], integer targets [N], bias [V], the others [N], got {got}")
    if not (0 < temperature < float("inf") and 0 <= clip_low <= 1 and clip_high >= 0):
        raise ValueError(f"need {temperature=} above 0, {clip_low=} in [0, 1], {clip_high=} of 0 or more")


def token_stats(hidden, weight, targets, *, bias=None, temperature=1.0):
    """(logprobs[N], logsumexp[N], entropy[N]), float32 nats, of hidden @ weight.T + bias, a block of tokens at a time.

    hidden[N, H], weight[V, H], targets[N] integer, bias[V] or None; any float dtype, the logits are float32. logprobs
    and entropy are at `temperature` and carry gradients to hidden, weight and bias; logsumexp is that of the raw logits
    whatever the temperature, and carries none: the energy of token n is -logsumexp[n].
    ValueError: shapes that do not fit, a target outside [0, V), a temperature that is not positive.
    """
    _check(hidden, weight, targets, bias, temperature)
    if ((targets < 0) | (targets >= len(weight))).any():
        raise ValueError(f"targets must be in [0, {len(weight)})")
    inputs, targets = (hidden, weight, bias), targets.long()
    (logprobs, logsumexp, entropy), _ = _one_pass(inputs, targets, temperature)

    def backward(inputs, d_logprobs, d_entropy):
        rows = ((d_logprobs != 0) | (d_entropy != 0)).nonzero()[:, 0]  # a masked token's gradient is 0
        return _one_pass(inputs, targets, temperature, rows, lambda part, _: (d_logprobs[part], d_entropy[part]))[1]
    logprobs, entropy = _Given.apply((logprobs, entropy), backward, *inputs)
    return logprobs, logsumexp, entropy


def weighted_loss(hidden, weight, targets, old_logprobs, advantages, weights, *, bias=None, temperature=1.0,
                  clip_low=0.2, clip_high=0.28, weight_sum=None, entropy_coef=0.0, block_tokens=None):
    """actfocus.weighted_policy_loss of token_stats' log-probs, in one pass -> (loss, stats).

    loss = -(1 / weight_sum) sum_t w_t min(rho_t A_t, clip(rho_t) A_t) - entropy_coef * sum of the entropies of tokens
    with w_t > 0. Arguments as there, but clip_low and clip_high are numbers, and what is [B, T] is [N]; where a weight
    is 0 nothing is read or computed. weight_sum: the whole minibatch's, where this is a part. block_tokens: how many
    tokens' logits are held at once; fewer: less memory, more time. stats: as there, and logprobs[N], entropy[N]. There
    can be but one backward pass: it hands the gradients out. ValueError: as there; if a log-prob is not finite: nan.
    """
    _check(hidden, weight, targets, bias, temperature, clip_low, clip_high, (old_logprobs, advantages, weights))
    old_logprobs, advantages, weights = (x.detach().float() for x in (old_logprobs, advantages, weights))
    total = weights.sum() if weight_sum is None else torch.as_tensor(weight_sum, device=weights.device).detach().float()
    active = weights != 0  # below, all checks together wait for a GPU once
    right = (weights > 0) & (targets >= 0) & (targets < len(weight)) & weights.isfinite()
    right &= old_logprobs.isfinite() & advantages.isfinite()
    if total.dim() or not ((right | ~active).all() & total.isfinite() & ((total > 0) | (total == 0) & ~active.any())):
        raise ValueError("where weights are not 0, they must be positive, targets in [0, V), old_logprobs and "
                         "advantages finite; weight_sum must be the sum of the minibatch's weights")
    total = total.clamp(min=torch.finfo(torch.float32).tiny)  # without any weight the loss is 0
    rows, inputs = active.nonzero()[:, 0], (hidden, weight, bias)

    def objective(rows, logprob):
        log_ratio = (logprob - old_logprobs[rows]).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        ratio = log_ratio.exp()
        clipped = ratio.clamp(1 - clip_low, 1 + clip_high)  # [n], as are the others
        return log_ratio, ratio, clipped, torch.minimum(ratio * advantages[rows], clipped * advantages[rows])

    def coefficients(rows, logprob):  # equation (2): where it moves, rho A is the minimum
        log_ratio, ratio, _, least = objective(rows, logprob)
        moves = (ratio * advantages[rows] == least) & (log_ratio.abs() < MAX_LOG_RATIO)
        return torch.where(moves, -weights[rows] * least / total, 0.0), torch.zeros_like(ratio) - entropy_coef
    (logprobs, _, entropy), gradients = _one_pass(inputs, targets.long(), temperature, rows,
                                                  coefficients if torch.is_grad_enabled() else None, block_tokens)

    def backward(_, d_loss):
        if not gradients:
            raise RuntimeError("weighted_loss gives its gradients once: call it again for a second backward pass")
        given, gradients[:] = gradients.copy(), []  # held by nothing else, they become .grad without a copy
        return given if not d_loss.is_cuda and d_loss == 1 else [None if d is None else d.mul_(d_loss) for d in given]
    log_ratio, ratio, clipped, least = objective(rows, logprobs[rows])
    loss = -(weights[rows] * least).sum() / total - entropy_coef * entropy.sum() + 0 * logprobs.sum()  # inf * 0 is nan
    mean = lambda x: x.sum() / max(1, len(rows))
    stats = {"approx_kl": mean(log_ratio.expm1() - log_ratio), "clip_fraction": mean(ratio != clipped),
             "ratio_mean": mean(ratio), "logprobs": logprobs, "entropy": entropy}
    return _Given.apply(loss, backward, *inputs), stats


if __name__ == "__main__":
    from extras.bench import loss
    loss()
