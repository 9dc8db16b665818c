"""Per-token log-prob, logsumexp and entropy from hidden states, without the [tokens, vocabulary] tensor.

A language model's last step, `logits = hidden @ weight.T`, makes a tensor that outweighs the model: 2048 tokens of a 152k
vocabulary are 1.2 GB in float32, and autograd keeps several. But the loss needs three numbers a token. With z = logits /
temperature, lse = logsumexp(z), p = exp(z - lse) and target y:

    logprob = z_y - lse            d logprob / dz_j = [j = y] - p_j
    entropy = -sum_j p_j log p_j   d entropy / dz_j = -p_j (log p_j + entropy)

so `token_stats` keeps only lse and entropy, and the backward pass recomputes one chunk of logits at a time, turns it into
its gradient, and adds that chunk's share straight into the one gradient buffer of the weight. The energy of ActFocus is
a by-product: -logsumexp of the raw logits.

The elementwise part runs under torch.compile where a compiler is at hand and the tensor is large enough to pay for it.
"""

import functools
import warnings

import torch

CHUNK_BYTES = 64 * 2**20  # size of one chunk of float32 logits
COMPILE_FROM = 2**24  # elements in a call below which compiling costs more than it saves


def _logits(hidden, weight, bias):
    """float32 logits of a chunk. Rounding them to bfloat16 would cost the entropy its second digit."""
    if weight.dtype == torch.float32:
        return torch.nn.functional.linear(hidden, weight, bias)
    if hidden.is_cuda:  # half-precision inputs, float32 result, no copy of the weight
        logits = torch.mm(hidden, weight.T, out_dtype=torch.float32)
    else:
        logits = hidden.new_empty(len(hidden), len(weight), dtype=torch.float32)
        for words in torch.arange(len(weight)).split(max(1, CHUNK_BYTES // (4 * weight.shape[1]))):
            span = slice(int(words[0]), int(words[-1]) + 1)  # a float32 copy of a part of the weight at a time
            torch.mm(hidden.float(), weight[span].float().T, out=logits[:, span])
    return logits if bias is None else logits.add_(bias)


def _forward_chunk(logits, targets, temperature):
    """logits[n, V], targets[n] -> logprob, raw logsumexp, logsumexp and entropy of logits / temperature, each [n]."""
    raw = torch.logsumexp(logits, -1)
    z = logits / temperature
    lse = torch.logsumexp(z, -1)
    log_p = z - lse[:, None]
    p = torch.exp(log_p)
    # p * log_p, not p * z: no difference of large numbers. A masked-out word (log_p = -inf) counts as 0, not nan.
    entropy = -torch.where(p > 0, p * log_p, 0.0).sum(-1)
    return log_p.gather(-1, targets[:, None])[:, 0], raw, lse, entropy


def _backward_chunk(logits, targets, temperature, lse, entropy, d_logprob, d_entropy):
    """Gradient of the loss for logits[n, V], from the two formulas above."""
    z = logits / temperature
    log_p = z - lse[:, None]
    p = torch.exp(log_p)
    slope = torch.where(p > 0, log_p + entropy[:, None], 0.0)
    d_z = -p * (d_logprob[:, None] + d_entropy[:, None] * slope)
    columns = torch.arange(z.shape[1], device=z.device)
    return (d_z + torch.where(columns == targets[:, None], d_logprob[:, None], 0.0)) / temperature


@functools.cache
def _compiled(function):
    return torch.compile(function, dynamic=True)


_plain = False  # set once torch.compile has failed, so that it is tried once a process


def _run(function, elements, *arguments):
    """function(*arguments), compiled where that pays and works; the same numbers up to rounding either way."""
    global _plain
    if not _plain and elements >= COMPILE_FROM:
        try:
            return _compiled(function)(*arguments)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # no compiler, or one that fails: which exception depends on the platform
            _plain = True
            warnings.warn(f"torch.compile is not usable here ({type(error).__name__}): token_stats runs uncompiled")
    return function(*arguments)


class _TokenStats(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, temperature):
        n, vocabulary = len(hidden), weight.shape[0]
        rows = max(1, CHUNK_BYTES // (4 * vocabulary))
        out = logprob, raw, lse, entropy = [hidden.new_empty(n, dtype=torch.float32) for _ in range(4)]
        for start in range(0, n, rows):
            part = slice(start, start + rows)
            logits = _logits(hidden[part], weight, bias)  # [rows, V]
            for row, values in zip(out, _run(_forward_chunk, n * vocabulary, logits, targets[part], temperature)):
                row[part] = values
        ctx.save_for_backward(hidden, weight, bias, targets, lse, entropy)
        ctx.temperature, ctx.rows = temperature, rows
        ctx.mark_non_differentiable(raw)
        return logprob, raw, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_logprob, _, d_entropy):
        hidden, weight, bias, targets, lse, entropy = ctx.saved_tensors
        need_hidden, need_weight, need_bias, *_ = ctx.needs_input_grad
        d_hidden = torch.zeros_like(hidden) if need_hidden else None
        d_weight = torch.zeros_like(weight) if need_weight else None
        d_bias = torch.zeros_like(bias) if need_bias else None
        # Masked tokens come with gradient 0: nothing to recompute for them.
        for part in ((d_logprob != 0) | (d_entropy != 0)).nonzero()[:, 0].split(ctx.rows):
            h = hidden[part]  # [rows, H]
            logits = _logits(h, weight, bias)
            d_logits = _run(_backward_chunk, len(hidden) * len(weight), logits, targets[part], ctx.temperature, lse[part],
                            entropy[part], d_logprob[part], d_entropy[part]).to(weight.dtype)  # [rows, V]
            if need_hidden:
                d_hidden[part] = (d_logits @ weight).to(hidden.dtype)
            if need_weight:
                d_weight.addmm_(d_logits.T, h)
            if need_bias:
                d_bias += d_logits.sum(0)
        return d_hidden, d_weight, d_bias, None, None


def token_stats(hidden, weight, targets, *, bias=None, temperature=1.0):
    """(logprobs[N], logsumexp[N], entropy[N]), float32 nats, of softmax(hidden @ weight.T + bias), never holding [N, V].

    hidden[N, H], weight[V, H], targets[N] integer, bias[V] or None; any float dtype, the statistics are computed in float32.
    logprobs and entropy are at `temperature` and carry gradients to hidden, weight and bias; logsumexp is that of the raw
    logits whatever the temperature, and carries none: the energy of token n is -logsumexp[n].
    ValueError: shapes that do not fit, a target outside [0, V), a temperature that is not positive.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden must be [N, H] and weight [V, H], got {tuple(hidden.shape)} and {tuple(weight.shape)}")
    if targets.shape != hidden.shape[:1] or targets.is_floating_point() or targets.dtype == torch.bool:
        raise ValueError(f"targets must be {len(hidden)} integers, got {targets.dtype} {tuple(targets.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape ({len(weight)},), got {tuple(bias.shape)}")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be positive, got {temperature}")
    if len(targets) and not (0 <= int(targets.min()) and int(targets.max()) < len(weight)):
        raise ValueError(f"targets must be in [0, {len(weight)})")
    logprobs, logsumexp, entropy = _TokenStats.apply(hidden, weight, bias, targets.long(), float(temperature))
    return logprobs, logsumexp, entropy
