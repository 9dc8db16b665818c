"""Speed and memory beside other implementations: the loss, and the rollouts.

    python -m extras.bench loss --tokens 512 2048   # `pip install liger-kernel cut-cross-entropy` for two of its rows
    python -m extras.bench rollout

Methods run in turn, medians are printed. The loss is the policy loss where rho is 1, -mean(advantages * logprob),
forward and backward; its gradients are compared with float64. Its yardstick are three matrix products, hidden @
weight.T and the two that make the gradients, without anything in between: no exact method can do with less.
"""

import argparse
import ctypes
import math
import statistics
import sys
import time
from pathlib import Path

import torch
from torch.nn.attention import sdpa_kernel
from torch.utils.checkpoint import checkpoint

from env import make
from extras.agent import tiny_model
from extras.captured import ATTENTION, CapturedDecoder
from extras.guard import load_tokenizer
from kernels import token_stats, weighted_loss
from rollout import rollout
from train import AGENTS


def ours(hidden, weight, targets, advantages, old_logprobs):
    return weighted_loss(hidden, weight, targets, old_logprobs, advantages, torch.ones_like(advantages))[0]


def full_logits(hidden, weight, targets, advantages, _=None):
    logprob = torch.log_softmax(hidden @ weight.T, -1).gather(1, targets[:, None])[:, 0]
    return -(advantages * logprob).mean()


def checkpoint_per_chunk(hidden, weight, targets, advantages, _):
    chunks = zip(*(x.split(128) for x in (hidden, targets, advantages)))
    losses = [checkpoint(full_logits, h, weight, y, a, use_reentrant=False) * len(y) for h, y, a in chunks]
    return sum(losses) / len(targets)


def cut_cross_entropy(hidden, weight, targets, advantages, _):
    from cut_cross_entropy.torch_compile import torch_compile_linear_cross_entropy as cross_entropy
    return (advantages * cross_entropy(hidden, weight, targets, reduction="none")).mean()


def liger(hidden, weight, targets, advantages, _):
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss
    loss = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, chunk_size=1, loss_type="grpo")
    h, y, a = (x.view(max(1, len(targets) // 512), -1, *x.shape[1:]) for x in (hidden, targets, advantages))
    return loss(h, weight, y, torch.ones_like(y), a)[0]  # in sequences of 512 tokens


def through_token_stats(hidden, weight, targets, advantages, _):
    return -(advantages * token_stats(hidden, weight, targets)[0]).mean()


def three_products(hidden, weight, targets, advantages, _):
    """What a loss would take that cost nothing but its products."""
    with torch.no_grad():
        d_weight = torch.zeros_like(weight)
        for h in hidden.split(4096 if hidden.is_cuda else max(256, hidden.shape[1] // 2)):
            logits = h @ weight.T
            logits @ weight
            d_weight.addmm_(logits.T, h)
    return (hidden.sum() + weight[0].sum()) * 0


METHODS = {"weighted_loss": ours, "token_stats": through_token_stats, "three products": three_products,
           "full logits": full_logits, "checkpoint per chunk": checkpoint_per_chunk, "Liger GRPO": liger,
           "cut-cross-entropy": cut_cross_entropy}


def measure(step, device):
    """(seconds, extra peak bytes) of one step; on a CPU the peak is the process's, which only Linux tells."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before, started = torch.cuda.memory_allocated(), time.perf_counter()
        step()
        torch.cuda.synchronize()
        return time.perf_counter() - started, torch.cuda.max_memory_allocated() - before
    resident = lambda name: next(int(x.split()[1]) * 1024 for x in open("/proc/self/status") if x.startswith(name))
    if linux := sys.platform == "linux":
        if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
            libc.malloc_trim(0)  # memory that was freed but not handed back would hide a peak
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        before = resident("VmRSS")
    started = time.perf_counter()
    step()
    return time.perf_counter() - started, resident("VmHWM") - before if linux else float("nan")


def errors(leaves, targets, advantages):
    """The largest error of each gradient against float64, as a share of the largest gradient."""
    doubles = [x.detach().double().requires_grad_() for x in leaves]
    for h, y, a in zip(*(x.split(256) for x in (doubles[0], targets, advantages))):
        (full_logits(h, doubles[1], y, a.double()) * len(y) / len(targets)).backward()
    return [((x.grad - d.grad).abs().max() / d.grad.abs().max()).item() for x, d in zip(leaves, doubles)]


def positive(text):
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def parser_of(name, more, rounds):
    parser = argparse.ArgumentParser(f"python -m extras.bench {name}",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for option, default in (more | {"rounds": rounds}).items():
        parser.add_argument(f"--{option}", type=positive, default=default, help=" ",
                            nargs="+" if isinstance(default, list) else None)
    return parser


def loss(arguments=None):
    parser = parser_of("loss", {"tokens": [512, 2048], "hidden": 896, "vocabulary": 151936}, 5)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help=" ")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME", help=" ")
    options = parser.parse_args(arguments)
    dtype, device = getattr(torch, options.dtype), "cuda" if torch.cuda.is_available() else "cpu"
    print(f"torch {torch.__version__}, {options.dtype} on {device} ({torch.get_num_threads()} threads), "
          f"H {options.hidden}, V {options.vocabulary}, "
          f"weight gradient {options.vocabulary * options.hidden * dtype.itemsize / 1e6:.0f} MB")
    print("| method | tokens | extra peak, MB | median, s | range, s | of three products | error of d hidden, d weight "
          "|\n|---|---|---|---|---|---|---|")
    for n in options.tokens:
        torch.manual_seed(0)
        leaves = [torch.randn(n, options.hidden, device=device).to(dtype),
                  (torch.randn(options.vocabulary, options.hidden, device=device) / options.hidden ** 0.5).to(dtype)]
        targets, advantages = torch.randint(options.vocabulary, (n,), device=device), torch.randn(n, device=device)
        columns = targets, advantages, token_stats(*leaves, targets)[0]
        runs, notes = {name: [] for name in options.methods}, {}
        for turn in range(options.rounds + 1):  # turn 0 compiles and compares
            for name in (name for name in options.methods if turn == 0 or runs[name]):
                leaves = [x.detach().requires_grad_() for x in leaves]
                try:
                    runs[name].append(measure(lambda: METHODS[name](*leaves, *columns).backward(), device))
                    if turn == 0 and name != "three products":
                        notes[name] = ", ".join(f"{error:.0e}" for error in errors(leaves, targets, advantages))
                except Exception as error:  # a peer that is absent, does not fit or does not run here
                    runs[name], notes[name] = [], f"{type(error).__name__}: {error}".splitlines()[0][:60]
        medians = {name: statistics.median(seconds for seconds, _ in measured[1:])
                   for name, measured in runs.items() if measured[1:]}
        for name, measured in runs.items():
            if name not in medians:
                print(f"| {name} | {n} | - | - | - | - | {notes[name]} |", flush=True)
                continue
            seconds, peaks = zip(*measured[1:])
            share = f"{medians[name] / medians['three products']:.2f}" if "three products" in medians else "-"
            print(f"| {name} | {n} | {max(peaks) / 1e6:.0f} | {medians[name]:.3g} | {min(seconds):.3g}-"
                  f"{max(seconds):.3g} | {share} | {notes.get(name, '-')} |", flush=True)


@torch.no_grad()
def rollout_by_generate(model, tokenizer, envs, *, seeds, temperature, max_response_tokens):
    """What `rollout` is measured against: every turn encodes the whole conversation again and calls `model.generate`.

    -> tokens generated. The responses follow the same distribution, end-of-turn token included.
    """
    eos, active, generated = tokenizer.eos_token_id, list(range(len(envs))), 0
    chats = [[{"role": "system", "content": env.system_prompt}, {"role": "user", "content": env.reset(seed=seed)[0]}]
             for env, seed in zip(envs, seeds)]
    while active:
        texts = [tokenizer.apply_chat_template(chats[i], tokenize=False, add_generation_prompt=True) for i in active]
        batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False,
                          return_token_type_ids=False)
        out = model.generate(**batch.to(model.device), do_sample=True, temperature=temperature, top_k=0, top_p=1.0,
                             max_new_tokens=max_response_tokens, eos_token_id=eos, pad_token_id=tokenizer.pad_token_id)
        going_on = []
        for i, ids in zip(active, out[:, batch.input_ids.shape[1]:].tolist()):
            ids = ids[: ids.index(eos) + 1] if eos in ids else ids
            generated += len(ids)
            text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            observation, _, terminated, truncated, _ = envs[i].step(text)
            if not (terminated or truncated):
                chats[i] += [{"role": "assistant", "content": text}, {"role": "user", "content": observation}]
                going_on.append(i)
        active = going_on
    return generated


def replayed_step(model, rows, width, room):
    """Seconds of a decode step of `rows` texts with `width` ids each, replayed on a GPU: nothing waits for Python."""
    with torch.no_grad():
        decoder = CapturedDecoder(model, 1.0, None)
        tokens, _ = decoder.feed_texts({row: [5] * width for row in range(rows)}, room)
        decoder.step(tokens)
        if decoder.graph is None:
            return float("nan")
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(room - 2):
            decoder.graph.replay()
        torch.cuda.synchronize()
        return (time.perf_counter() - started) / (room - 2)


def read_speed(device, size=2**28):
    """Bytes a second at which memory is read: the best of five sums over `size` bytes."""
    x, seconds = torch.ones(size // 4, device=device), []
    for _ in range(6):
        started = time.perf_counter()
        x.sum().item()
        seconds.append(time.perf_counter() - started)
    return size / min(seconds[1:])


def bytes_of_a_step(model, rows, width):
    """What a decode step of `rows` texts with `width` ids each has to read: weights and key-value cache, once."""
    config = model.config
    heads = config.num_key_value_heads * (config.hidden_size // config.num_attention_heads)
    numbers = sum(x.numel() for x in model.parameters()) + 2 * config.num_hidden_layers * heads * rows * width
    return numbers * model.dtype.itemsize


def rollouts(arguments=None):
    more = {"batch": 128, "turns": [2, 4, 5, 8, 9], "tokens": 60, "width": 64, "layers": 2, "vocabulary": 351}
    options = parser_of("rollout", more, 3).parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads, {options.batch} episodes, "
          f"responses of at most {options.tokens} tokens, {options.layers} layers of width {options.width}")
    print("| turns | rollout, tokens/s | range | generate, tokens/s | ratio | replayed steps alone, tokens/s | "
          "floor: memory read once, tokens/s |\n|---|---|---|---|---|---|---|")
    tokenizer = load_tokenizer(str(AGENTS / "sokoban"))
    model = tiny_model(tokenizer, width=options.width, layers=options.layers, heads=max(1, options.width // 16))
    model.resize_token_embeddings(max(options.vocabulary, len(tokenizer)), mean_resizing=False)
    model = model.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32).eval()
    speed = read_speed(device)
    for turns in options.turns:
        budgets = dict(max_turns=turns, max_actions=2 * turns, max_moves=min(4, 2 * turns))
        envs = [make("sokoban", walls=0, observation="coordinates", **budgets) for _ in range(options.batch)]
        shared, runs = dict(seeds=range(options.batch), temperature=1.0, max_response_tokens=options.tokens), []
        for turn in range(options.rounds + 1):  # the first warms up
            torch.manual_seed(turn)
            started = time.perf_counter()
            played = rollout(model, tokenizer, envs, **shared, generator=torch.Generator(device).manual_seed(turn))
            middle = time.perf_counter()
            with sdpa_kernel(ATTENTION):  # the same choice for both
                generated = rollout_by_generate(model, tokenizer, envs, **shared)
            ended = time.perf_counter()
            runs.append((int(played.response_mask.sum()) / (middle - started), generated / (ended - middle)))
        ours, theirs = zip(*runs[1:])
        our_median, their_median = statistics.median(ours), statistics.median(theirs)
        halfway, seconds = int(played.lengths.max()) // 2, math.nan
        if device.type == "cuda":
            seconds = replayed_step(model, options.batch, halfway, options.tokens)
        floor = options.batch * speed / bytes_of_a_step(model, options.batch, halfway)
        print(f"| {turns} | {our_median:.0f} | {min(ours):.0f}-{max(ours):.0f} | {their_median:.0f} | "
              f"{our_median / their_median:.1f} | {options.batch / seconds:.0f} | {floor:.0f} |", flush=True)


if __name__ == "__main__":
    tables = {"loss": loss, "rollout": rollouts}
    if sys.argv[1:2] == [] or sys.argv[1] not in tables:
        sys.exit("usage: python -m extras.bench loss|rollout [options, see --help]")
    tables[sys.argv[1]](sys.argv[2:])
