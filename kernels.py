"""Per-token log-prob, logsumexp and entropy from hidden states, without the [tokens, vocabulary] tensor.

A language model's last step, `logits = hidden @ weight.T`, makes a tensor that outweighs the model: 2048 tokens of a
152k vocabulary are 1.2 GB in float32, and autograd keeps several. But the loss needs three numbers a token. With N
tokens, H hidden units, V words, z = logits / temperature, p = softmax(z) and target y:

    logprob = z_y - logsumexp(z)        d logprob / dz_j = [j = y] - p_j
    entropy = -sum_j p_j log p_j        d entropy / dz_j = -p_j (log p_j + entropy)

By the chain rule, with a = d loss / d logprob and e = d loss / d entropy of the token:

    d loss / dz_j = a [j = y] - p_j (a + e (log p_j + entropy))

So the forward pass makes the logits of a block of tokens, keeps the three numbers and drops the logits; the backward
pass makes them again, turns them into d loss / dz, and multiplies that into the gradients of hidden and weight. The
energy of ActFocus is a by-product: -logsumexp of the raw logits. This file needs torch and nothing else.
`python kernels.py` measures time, memory and gradient error beside other implementations (see --help).
"""

import functools
import warnings
from dataclasses import dataclass

import torch

BLOCK_BYTES = 64 * 2**20  # float32 logits that are held at once
COMPILE_FROM = 2**26  # N * V below which compiling costs more than it saves
SMALLEST = -1e4  # log of a probability that is 0 in float32; finite, because 0 * -inf is nan


def _statistics(logits, targets, temperature):
    """logits[n, V], targets[n] -> (logprob[n], logsumexp[n] of the raw logits, entropy[n])."""
    log_p = torch.log_softmax(logits / temperature, -1)  # not z - logsumexp(z), which cancels where logits are large
    logprob = log_p.gather(1, targets[:, None])[:, 0]
    return logprob, torch.logsumexp(logits, -1), -(log_p.exp() * log_p.clamp(min=SMALLEST)).sum(-1)


def _slope(logits, targets, temperature, d_logprob, d_entropy):
    """d loss / d logits[n, V], from d_logprob[n] and d_entropy[n]."""
    log_p = torch.log_softmax(logits / temperature, -1).clamp(min=SMALLEST)
    p = log_p.exp()
    entropy = -(p * log_p).sum(-1)
    slope = -p * (d_logprob[:, None] + d_entropy[:, None] * (log_p + entropy[:, None]))
    return slope.scatter_add(1, targets[:, None], d_logprob[:, None]) / temperature


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


def _factors(hidden, weight):
    """What the products are made of: half precision on a GPU, float32 elsewhere, where halves multiply far slower."""
    half = hidden.dtype == weight.dtype and hidden.dtype in (torch.bfloat16, torch.float16) and hidden.is_cuda
    return (hidden, weight) if half else (hidden.float(), weight.float())


def _product(a, b):
    """a @ b in float32: logits that were rounded to half precision would cost the entropy its second digit."""
    return a @ b if a.dtype == torch.float32 else torch.mm(a, b, out_dtype=torch.float32)


def _blocks(n, vocabulary):
    """Slices of n tokens, at least one, each of so few that their logits fit into BLOCK_BYTES."""
    size = max(1, BLOCK_BYTES // 4 // vocabulary)
    return [slice(start, min(start + size, n)) for start in range(0, max(n, 1), size)]


def blockwise(function, hidden, weight, bias, *columns):
    """function(logits[n, V], *columns[n]) -> tensors [n], of a block of tokens at a time -> those tensors [N]."""
    hidden, weight = _factors(hidden, weight)
    made = []
    for rows in _blocks(len(hidden), len(weight)):
        logits = _product(hidden[rows], weight.T)
        made.append(function(logits if bias is None else logits + bias, *(x[rows] for x in columns)))
    return [torch.cat(parts) for parts in zip(*made)]


class _TokenStats(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, temperature):
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.temperature, elements = temperature, len(hidden) * len(weight)
        logprobs, logsumexp, entropy = blockwise(lambda *block: _run(_statistics, elements, *block, temperature),
                                                 hidden, weight, bias, targets)
        ctx.mark_non_differentiable(logsumexp)
        return logprobs, logsumexp, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_logprobs, _, d_entropy):
        hidden, weight, bias, targets = ctx.saved_tensors
        need_hidden, need_weight, need_bias, *_ = ctx.needs_input_grad
        d_hidden = torch.zeros_like(hidden) if need_hidden else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        d_bias = torch.zeros_like(bias, dtype=torch.float32) if need_bias else None
        active = ((d_logprobs != 0) | (d_entropy != 0)).nonzero()[:, 0]  # a masked token's gradient is 0

        def multiply(logits, rows):  # rows[n]: the block's tokens
            slope = _run(_slope, len(hidden) * len(weight), logits, targets[rows], ctx.temperature, d_logprobs[rows],
                         d_entropy[rows])
            if need_bias:
                d_bias.add_(slope.sum(0))
            h, w = _factors(hidden[rows], weight)
            slope = slope.to(w.dtype)
            if need_hidden:
                d_hidden[rows] = _product(slope, w).to(hidden.dtype)
            if need_weight and h.dtype == torch.float32:
                d_weight.addmm_(slope.T, h)
            elif need_weight:
                d_weight.add_(_product(slope.T, h))
            return ()
        with torch.autocast(hidden.device.type, enabled=False):
            blockwise(multiply, hidden[active], weight, bias, active)
        cast = lambda gradient, x: None if gradient is None else gradient.to(x.dtype)
        return d_hidden, cast(d_weight, weight), cast(d_bias, bias), None, None


def token_stats(hidden, weight, targets, *, bias=None, temperature=1.0):
    """(logprobs[N], logsumexp[N], entropy[N]), float32 nats, of hidden @ weight.T + bias, never holding [N, V].

    hidden[N, H], weight[V, H], targets[N] integer, bias[V] or None; any float dtype, the statistics are computed in
    float32. logprobs and entropy are at `temperature` and carry gradients to hidden, weight and bias; logsumexp is that
    of the raw logits whatever the temperature, and carries none: the energy of token n is -logsumexp[n].
    Memory: the logits of a block of tokens, and the weight's gradient.
    ValueError: shapes that do not fit, a target outside [0, V), a temperature that is not positive.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden must be [N, H], weight [V, H], got {tuple(hidden.shape)} and {tuple(weight.shape)}")
    if targets.shape != hidden.shape[:1] or targets.is_floating_point() or targets.dtype == torch.bool:
        raise ValueError(f"targets must be {len(hidden)} integers, got {targets.dtype} {tuple(targets.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape ({len(weight)},), got {tuple(bias.shape)}")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be positive, got {temperature}")
    if len(targets) and not (0 <= int(targets.min()) and int(targets.max()) < len(weight)):
        raise ValueError(f"targets must be in [0, {len(weight)})")
    with torch.autocast(hidden.device.type, enabled=False):  # it would turn the float32 products into half precision
        return _TokenStats.apply(hidden, weight, bias, targets.long(), float(temperature))


@dataclass
class TokenStats:
    logprobs: torch.Tensor  # [B, T], of each response token; 0 elsewhere, as are the next two
    logsumexp: torch.Tensor  # [B, T]
    entropy: torch.Tensor  # [B, T]
    hidden: torch.Tensor  # [N, H], the states that predict the N response tokens


def states(model, ids, response_mask):
    """What predicts the N response tokens of ids[B, T]: (hidden[N, H], head's weight[V, H], its bias, targets[N])."""
    hidden = model.base_model(input_ids=ids[:, :-1]).last_hidden_state  # [B, T - 1, H]: position t - 1 predicts token t
    here, head = response_mask[:, 1:], model.get_output_embeddings()
    hidden, weight = hidden[here], head.weight
    if torch.is_autocast_enabled(ids.device.type):  # the products below take what they are given
        hidden, weight = (x.to(torch.get_autocast_dtype(ids.device.type)) for x in (hidden, weight))
    return hidden, weight, getattr(head, "bias", None), ids[:, 1:][here]


def _at_tokens(values, response_mask):
    """values[N] of the response tokens -> [B, T] float32, 0 elsewhere. FloatingPointError: they are not finite."""
    if not torch.isfinite(values).all():
        raise FloatingPointError("the model's log-probs or energies are not finite")
    blank = torch.zeros(response_mask.shape, dtype=torch.float32, device=values.device)
    return blank.masked_scatter(response_mask, values.float())


def score(model, ids, response_mask, temperature=1.0):
    """Statistics of every response token under a Hugging Face model, ids and mask [B, T]; column t is of token t."""
    hidden, weight, bias, targets = states(model, ids, response_mask)
    stats = token_stats(hidden, weight, targets, bias=bias, temperature=temperature)
    return TokenStats(*(_at_tokens(values, response_mask) for values in stats), hidden)


@torch.no_grad()
def score_logits(model, ids, response_mask, old_logprobs, *functions):
    """Each function(logits[n, V], targets[n], old_logprobs[n]) -> [n], of a model's raw logits, as [B, T] tensors."""
    hidden, weight, bias, targets = states(model, ids, response_mask)
    once = list(dict.fromkeys(functions))  # by default the signal is the energy: no second pass over the vocabulary
    with torch.autocast(ids.device.type, enabled=False):
        made = blockwise(lambda *block: [function(*block) for function in once], hidden, weight, bias, targets,
                         old_logprobs[response_mask])
    found = {function: _at_tokens(values, response_mask) for function, values in zip(once, made)}
    return [found[function] for function in functions]


if __name__ == "__main__":
    from extras.bench import loss
    loss()
