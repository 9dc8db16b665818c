"""Per-token log-prob, logsumexp and entropy from hidden states, without the [tokens, vocabulary] tensor.

A language model's last step, `logits = hidden @ weight.T`, makes a tensor that outweighs the model: 2048 tokens of a 152k
vocabulary are 1.2 GB in float32, and autograd keeps several. But the loss needs three numbers a token. With N tokens, H
hidden units, V words, z = logits / temperature, p = softmax(z) and target y:

    logprob = z_y - logsumexp(z)        d logprob / dz_j = [j = y] - p_j
    entropy = -sum_j p_j log p_j        d entropy / dz_j = -p_j (log p_j + entropy)

(the second because d p_k / dz_j = p_k ([j = k] - p_j), and sum_j p_j log p_j = -entropy). By the chain rule, with a = d loss /
d logprob and e = d loss / d entropy of the token, and nothing else that depends on z:

    d loss / dz_j = a [j = y] - p_j (a + e (log p_j + entropy))

So the forward pass walks over slices of the vocabulary and keeps running sums; from m = max z, s = sum exp(z - m) and
u = sum exp(z - m)(z - m) follow logsumexp = m + log s and entropy = log s - u / s, sums of terms of one sign: no difference
of large numbers. The backward pass makes each slice of logits again, turns it into d loss / dz, and multiplies it into that
slice of the weight's gradient, which is written once, and into the gradient of hidden. That costs a fourth matrix product
where full logits need three, so logits that fit are not made twice: until the weight's gradient is there, its memory is free.

The energy of ActFocus is a by-product: -logsumexp of the raw logits.
`python kernels.py` measures time, memory and gradient error beside other implementations (see --help).
"""

import argparse
import ctypes
import functools
import itertools
import statistics
import sys
import time
import warnings
from pathlib import Path

import torch
from torch.utils.checkpoint import checkpoint

BLOCK = 2048  # tokens that are worked on together
CHUNK_BYTES = 16 * 2**20  # float32 logits of a block in one slice of the vocabulary; a CPU's last cache holds them
COMPILE_FROM = 2**26  # N * V below which compiling costs more than it saves
SMALLEST = -1e4  # log of a probability that is 0 in float32; finite, because 0 * -inf is nan


def _fold(logits, temperature, peak, total, moment):
    """Fold logits[n, v] into m, s and u of the docstring above, each [n]."""
    z = logits / temperature
    top = torch.maximum(peak, z.amax(-1))
    z = z.sub_(top[:, None]).clamp_(min=SMALLEST)  # in place: uncompiled, each new tensor would be a slice more
    p = z.exp()
    shift = peak - top
    total, moment = shift.exp() * total, shift.exp() * (moment + shift * total)
    return top, total + p.sum(-1), moment + z.mul_(p).sum(-1)


def _slope(out, logits, temperature, peak, log_total, entropy, d_logprob, d_entropy):
    """d loss / dz of logits[n, v], without the target's own term, into out[n, v] (which may be logits)."""
    log_p = (logits / temperature).sub_(peak[:, None]).sub_(log_total[:, None]).clamp_(min=SMALLEST)
    p = log_p.exp()
    bracket = log_p.add_(entropy[:, None]).mul_(d_entropy[:, None]).add_(d_logprob[:, None])
    return out.copy_(p.mul_(bracket).neg_())


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


def _slices(length, size):
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _walk(n, weight, buffer):
    """Blocks of tokens, each with the slices of the vocabulary and where a slice's logits are kept, or None.

    They wait in the first block's share of `buffer`, the weight's gradient-to-be. The backward pass goes the same way: having
    written the gradient up to row words.stop it has used words.stop * H numbers, and what it still has to read begins at
    words.stop * max(n, H).
    """
    vocabulary, width = weight.shape
    size = max(1, CHUNK_BYTES // 4 // max(1, min(n, BLOCK), width))
    size -= size % 256 if size > 256 else 0  # a product into rows that are not aligned takes 1.4 times as long
    for rows in _slices(n, BLOCK):
        plan = []
        for words in _slices(vocabulary, size):
            shape, start = (rows.stop - rows.start, words.stop - words.start), words.start * max(rows.stop, width)
            stop = start + shape[0] * shape[1]
            fits = rows.start == 0 and buffer is not None and stop <= buffer.numel()
            plan.append((words, buffer.view(-1)[start:stop].view(shape) if fits else None))
        yield rows, plan


def _factor_dtype(hidden, weight):
    """What the factors of a product are cast to, a slice at a time; the product is float32 either way."""
    half = weight.dtype in (torch.bfloat16, torch.float16) and hidden.dtype == weight.dtype
    return weight.dtype if half and weight.is_cuda else torch.float32  # many CPUs multiply halves far slower than floats


def _logits(h, w, bias, words, out):
    """float32 logits[n, v], in `out` if the library can: rounding them to bfloat16 would cost the entropy its second digit."""
    logits = torch.mm(h, w.T, out=out) if h.dtype == torch.float32 else torch.mm(h, w.T, out_dtype=torch.float32)
    return logits if bias is None else logits.add_(bias[words])


def _add_product(total, a, b, beta=1.0):
    """total = beta * total + a @ b in float32; beta = 0 forgets what total held, nan or not."""
    if a.dtype == total.dtype == torch.float32:
        return total.addmm_(a, b, beta=beta)
    product = torch.mm(a, b) if a.dtype == torch.float32 else torch.mm(a, b, out_dtype=torch.float32)
    return total.add_(product) if beta else total.copy_(product)


def _column(targets, words):
    """The targets' columns[n, 1] in a slice of the vocabulary, and which[n] of them lie in it."""
    inside = (targets >= words.start) & (targets < words.stop)
    return torch.where(inside, targets - words.start, 0)[:, None], inside


class _TokenStats(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, temperature, with_gradient):
        n, elements, dtype = len(hidden), len(hidden) * len(weight), _factor_dtype(hidden, weight)
        keep = with_gradient and ctx.needs_input_grad[1] and weight.dtype == torch.float32 and n > 0
        ctx.buffer, ctx.temperature = weight.new_empty(weight.shape) if keep else None, temperature
        scratch = hidden.new_empty(max(CHUNK_BYTES // 4, BLOCK), dtype=torch.float32)  # new memory is slow memory
        logprob, logsumexp, entropy, peak, log_total = [hidden.new_empty(n, dtype=torch.float32) for _ in range(5)]
        for rows, plan in _walk(n, weight, ctx.buffer):
            h, y = hidden[rows].to(dtype), targets[rows]
            raw, top = h.new_full((2, len(h)), -1e30, dtype=torch.float32)
            chosen, total, moment = h.new_zeros((3, len(h)), dtype=torch.float32)
            for words, kept in plan:
                w = weight[words].to(dtype)
                space = scratch[:len(h) * len(w)].view(len(h), len(w)) if kept is None else kept
                logits = _logits(h, w, bias, words, space)
                column, inside = _column(y, words)
                chosen = torch.where(inside, logits.gather(1, column)[:, 0], chosen)
                top, total, moment = _run(_fold, elements, logits, temperature, top, total, moment)
                if temperature != 1:
                    raw = torch.logaddexp(raw, torch.logsumexp(logits, -1))
            peak[rows], log_total[rows] = top, total.log()
            logprob[rows] = chosen / temperature - top - log_total[rows]
            entropy[rows] = log_total[rows] - moment / total
            logsumexp[rows] = top + log_total[rows] if temperature == 1 else raw
        ctx.save_for_backward(hidden, weight, bias, targets, peak, log_total, entropy)
        ctx.mark_non_differentiable(logsumexp)
        return logprob, logsumexp, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *gradients):
        with torch.autocast(gradients[0].device.type, enabled=False):
            return _TokenStats.gradients(ctx, *gradients)

    @staticmethod
    def gradients(ctx, d_logprob, _, d_entropy):
        hidden, weight, bias, targets, *saved = ctx.saved_tensors
        elements, dtype = len(hidden) * len(weight), _factor_dtype(hidden, weight)
        need_hidden, need_weight, need_bias, *_ = ctx.needs_input_grad
        buffer, ctx.buffer = ctx.buffer, None  # a second backward pass through a retained graph makes all logits again
        d_hidden = torch.zeros_like(hidden) if need_hidden else None
        d_weight = buffer if buffer is not None else torch.zeros_like(weight) if need_weight else None
        d_bias = torch.zeros_like(bias, dtype=torch.float32) if need_bias else None
        scratch = hidden.new_empty(max(CHUNK_BYTES // 4, BLOCK), dtype=torch.float32)
        active = (d_logprob != 0) | (d_entropy != 0)  # masked tokens come with gradient 0: nothing to do for them
        d_logprob, d_entropy = d_logprob / ctx.temperature, d_entropy / ctx.temperature
        for rows, plan in _walk(len(hidden), weight, buffer):
            index = active[rows].nonzero()[:, 0]
            if not len(index):
                if need_weight and rows.start == 0:
                    d_weight.zero_()
                continue
            part = rows if len(index) == rows.stop - rows.start else rows.start + index
            h, y, d_y = hidden[part].to(dtype), targets[part], d_logprob[part]
            arguments = [x[part] for x in (*saved, d_logprob, d_entropy)]
            d_h = torch.zeros_like(h, dtype=torch.float32)
            for words, kept in plan:
                w = weight[words].to(dtype)
                space = scratch[:len(h) * len(w)].view(len(h), len(w))
                if kept is None:
                    logits = _logits(h, w, bias, words, space)
                else:
                    logits = kept if part is rows else kept[index]
                d_z = _run(_slope, elements, space, logits, ctx.temperature, *arguments)
                column, inside = _column(y, words)
                d_z.scatter_add_(1, column, torch.where(inside, d_y, 0.0)[:, None])
                if need_bias:
                    d_bias[words] += d_z.sum(0)
                d_z = d_z.to(dtype)
                if need_hidden:
                    _add_product(d_h, d_z, w)
                if need_weight:  # the first block writes instead of adding, because the buffer held logits
                    _add_product(d_weight[words], d_z.T, h, beta=float(rows.start > 0))
            if need_hidden:
                d_hidden[part] = d_h.to(hidden.dtype)
        return d_hidden, d_weight, None if d_bias is None else d_bias.to(bias.dtype), None, None, None


def token_stats(hidden, weight, targets, *, bias=None, temperature=1.0):
    """(logprobs[N], logsumexp[N], entropy[N]), float32 nats, of softmax(hidden @ weight.T + bias), never holding [N, V].

    hidden[N, H], weight[V, H], targets[N] integer, bias[V] or None; any float dtype, the statistics are computed in float32.
    logprobs and entropy are at `temperature` and carry gradients to hidden, weight and bias; logsumexp is that of the raw
    logits whatever the temperature, and carries none: the energy of token n is -logsumexp[n].
    Memory: a few slices of logits, and the weight's gradient (from the forward pass on, where weight is float32).
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
    with torch.autocast(hidden.device.type, enabled=False):  # it would turn the float32 products into half precision
        return _TokenStats.apply(hidden, weight, bias, targets.long(), float(temperature), torch.is_grad_enabled())


# The benchmark: every method computes -mean(advantages * logprob), whose gradients are compared with float64.

def _full_logits(hidden, weight, targets, advantages):
    logprob = torch.log_softmax(hidden @ weight.T, -1).gather(1, targets[:, None])[:, 0]
    return -(advantages * logprob).mean()


def _checkpoint_per_chunk(hidden, weight, targets, advantages):
    chunks = zip(*(x.split(128) for x in (hidden, targets, advantages)))
    losses = [checkpoint(_full_logits, h, weight, y, a, use_reentrant=False) * len(y) for h, y, a in chunks]
    return sum(losses) / len(targets)


def _cut_cross_entropy(hidden, weight, targets, advantages):
    from cut_cross_entropy.torch_compile import torch_compile_linear_cross_entropy as cross_entropy
    return (advantages * cross_entropy(hidden, weight, targets, reduction="none")).mean()


def _liger(hidden, weight, targets, advantages):
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss
    loss = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, chunk_size=1, loss_type="grpo")
    h, y, a = (x.view(max(1, len(targets) // 512), -1, *x.shape[1:]) for x in (hidden, targets, advantages))
    return loss(h, weight, y, torch.ones_like(y), a)[0]  # in sequences of 512 tokens


def _token_stats(hidden, weight, targets, advantages):
    return -(advantages * token_stats(hidden, weight, targets)[0]).mean()


def _four_products(hidden, weight, targets, advantages):
    """The floor: logits, logits again, d hidden and d weight, a slice of the vocabulary at a time, and nothing between them."""
    hidden, weight = hidden.detach(), weight.detach()
    d_hidden, d_weight = torch.zeros_like(hidden), torch.empty_like(weight)
    for words in _slices(len(weight), 2048):
        logits = hidden @ weight[words].T
        torch.mm(hidden, weight[words].T, out=logits)
        d_hidden.addmm_(logits, weight[words])
        torch.mm(logits.T, hidden, out=d_weight[words])


METHODS = {"token_stats": _token_stats, "full logits": _full_logits, "checkpoint per chunk": _checkpoint_per_chunk,
           "Liger GRPO": _liger, "cut-cross-entropy": _cut_cross_entropy, "four products": _four_products}


def _measure(step, device):
    """(seconds, extra peak bytes) of one step; on a CPU the peak is the process's, which only Linux tells."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before, start, end = torch.cuda.memory_allocated(), *(torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3, torch.cuda.max_memory_allocated() - before
    resident = lambda name: next(int(x.split()[1]) * 1024 for x in open("/proc/self/status") if x.startswith(name))
    if linux := sys.platform == "linux":
        if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
            libc.malloc_trim(0)  # memory that was freed but not handed back would hide a peak
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        before = resident("VmRSS")
    start = time.perf_counter()
    step()
    return time.perf_counter() - start, resident("VmHWM") - before if linux else float("nan")


def _errors(leaves, targets, advantages):
    """The largest error of each gradient against float64, as a share of the largest gradient."""
    doubles = [x.detach().double().requires_grad_() for x in leaves]
    for h, y, a in zip(*(x.split(256) for x in (doubles[0], targets, advantages))):
        (_full_logits(h, doubles[1], y, a.double()) * len(y) / len(targets)).backward()
    return [((x.grad - d.grad).abs().max() / d.grad.abs().max()).item() for x, d in zip(leaves, doubles)]


def positive(text):
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def main():
    parser = argparse.ArgumentParser(description="Time, memory and gradient error of -mean(advantages * logprob), forward and "
                                     "backward, beside other implementations where those are installed.")
    parser.add_argument("--tokens", type=positive, nargs="+", default=[512, 2048], help="default: 512 2048")
    parser.add_argument("--hidden", type=positive, default=896, help="default: 896, as Qwen2.5-0.5B")
    parser.add_argument("--vocabulary", type=positive, default=151936, help="default: 151936, as Qwen2.5")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="default: float32")
    parser.add_argument("--rounds", type=positive, default=5, help="measured runs of each method, in turn (default: 5)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME", help=", ".join(METHODS))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    dtype, device = getattr(torch, options.dtype), options.device
    print(f"torch {torch.__version__}, {options.dtype} on {device} ({torch.get_num_threads()} threads), H {options.hidden}, V "
          f"{options.vocabulary}, weight gradient {options.vocabulary * options.hidden * dtype.itemsize / 1e6:.0f} MB")
    print("| method | tokens | extra peak, MB | median, s | quartiles, s | / floor | error of d hidden, d weight |")
    print("|---|---|---|---|---|---|---|")
    for n in options.tokens:
        torch.manual_seed(0)
        leaves = [torch.randn(n, options.hidden, device=device).to(dtype),
                  (torch.randn(options.vocabulary, options.hidden, device=device) / options.hidden ** 0.5).to(dtype)]
        targets, advantages = torch.randint(options.vocabulary, (n,), device=device), torch.randn(n, device=device)
        runs, notes = {name: [] for name in options.methods}, {}
        for turn, name in itertools.product(range(options.rounds + 1), options.methods):  # turn 0 compiles and compares
            leaves = [x.detach().requires_grad_() for x in leaves]

            def step():
                loss = METHODS[name](*leaves, targets, advantages)
                if loss is not None:
                    loss.backward()
            if name not in notes or runs[name]:
                try:
                    runs[name].append(_measure(step, device))
                    if turn == 0 and leaves[0].grad is not None:
                        notes[name] = ", ".join(f"{error:.0e}" for error in _errors(leaves, targets, advantages))
                except Exception as error:  # a peer that is absent, does not fit or does not run here
                    notes[name] = f"{type(error).__name__}: {error}".splitlines()[0][:60]
        floor = statistics.median(t for t, _ in runs.get("four products", [])[1:] or [(float("nan"), 0)])
        for name, (_, *measured) in ((name, measured) for name, measured in runs.items() if len(measured) > 1):
            low, middle, high = statistics.quantiles([t for t, _ in measured] * 2, n=4, method="inclusive")
            print(f"| {name} | {n} | {max(peak for _, peak in measured) / 1e6:.0f} | {middle:.3g} | {low:.3g}-{high:.3g} | "
                  f"{middle / floor:.2f} | {notes.get(name, '')} |", flush=True)
        for name in (name for name, measured in runs.items() if len(measured) < 2):
            print(f"| {name} | {n} | - | - | - | - | {notes.get(name, '')} |", flush=True)


if __name__ == "__main__":
    main()
