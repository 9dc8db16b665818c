"""Speed and memory beside other implementations: the loss, and the rollouts.

    python -m extras.bench loss --tokens 512 2048       # needs `pip install liger-kernel cut-cross-entropy` for those rows
    python -m extras.bench rollout
"""

import argparse
import ctypes
import itertools
import statistics
import sys
import time
from pathlib import Path

import torch
from torch.utils.checkpoint import checkpoint

from env import make
from extras.agent import tiny_model
from kernels import token_stats
from rollout import load_tokenizer, rollout
from train import AGENTS


def positive(text):
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


# The loss: every method computes -mean(advantages * logprob), whose gradients are compared with float64.

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
    for words in [slice(i, i + 2048) for i in range(0, len(weight), 2048)]:
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


def loss(arguments=None):
    parser = argparse.ArgumentParser("python -m extras.bench loss", description="Time, memory and gradient error of -mean(advantages * logprob), forward and "
                                     "backward, beside other implementations where those are installed.")
    parser.add_argument("--tokens", type=positive, nargs="+", default=[512, 2048], help="default: 512 2048")
    parser.add_argument("--hidden", type=positive, default=896, help="default: 896, as Qwen2.5-0.5B")
    parser.add_argument("--vocabulary", type=positive, default=151936, help="default: 151936, as Qwen2.5")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="default: float32")
    parser.add_argument("--rounds", type=positive, default=5, help="measured runs of each method, in turn (default: 5)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME", help=", ".join(METHODS))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
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


# The rollouts -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def rollout_by_generate(model, tokenizer, envs, *, seeds, temperature, max_response_tokens):
    """What `rollout` is measured against: every turn encodes the whole conversation again and calls `model.generate`.

    -> tokens generated. The responses follow the same distribution, end-of-turn token included.
    """
    chats = [[{"role": "system", "content": env.system_prompt}, {"role": "user", "content": env.reset(seed=seed)[0]}]
             for env, seed in zip(envs, seeds)]
    active, generated = list(range(len(envs))), 0
    while active:
        texts = [tokenizer.apply_chat_template(chats[i], tokenize=False, add_generation_prompt=True) for i in active]
        batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
        out = model.generate(input_ids=batch.input_ids.to(model.device), attention_mask=batch.attention_mask.to(model.device),
                             do_sample=True, temperature=temperature, top_k=0, top_p=1.0, max_new_tokens=max_response_tokens,
                             pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id)
        going_on = []
        for i, ids in zip(active, out[:, batch.input_ids.shape[1]:].tolist()):
            ids = ids[: ids.index(tokenizer.eos_token_id) + 1] if tokenizer.eos_token_id in ids else ids
            generated += len(ids)
            text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            observation, _, terminated, truncated, _ = envs[i].step(text)
            if not (terminated or truncated):
                chats[i] += [{"role": "assistant", "content": text}, {"role": "user", "content": observation}]
                going_on.append(i)
        active = going_on
    return generated


def rollouts(arguments=None):
    parser = argparse.ArgumentParser("python -m extras.bench rollout", description="Tokens per second of rollout() and of model.generate on the re-encoded "
                                     "conversation: the built-in agent, untrained, on Sokoban; medians of alternating runs.")
    parser.add_argument("--batch", type=positive, default=128, help="episodes played side by side (default: 128)")
    parser.add_argument("--turns", type=positive, nargs="+", default=[2, 4, 5, 8, 9], help="turns an episode (default: 2 4 5 8 9)")
    parser.add_argument("--tokens", type=positive, default=60, help="longest response (default: 60)")
    parser.add_argument("--rounds", type=positive, default=3, help="measured runs of each (default: 3)")
    parser.add_argument("--width", type=positive, default=64, help="hidden size, a multiple of 32 (default: 64)")
    parser.add_argument("--layers", type=positive, default=2, help="default: 2; a model of Qwen2.5-0.5B's shape has 24, 896 wide")
    options = parser.parse_args(arguments)
    if options.width % 32:
        parser.error("--width must be a multiple of 32")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads, {options.batch} episodes, responses of at "
          f"most {options.tokens} tokens, {options.layers} layers of width {options.width}")
    print("| turns | rollout, tokens/s | generate, tokens/s | ratio | rollout, s a turn |")
    print("|---|---|---|---|---|")
    for turns in options.turns:
        envs = [make("sokoban", walls=0, observation="coordinates", max_turns=turns, max_actions=2 * turns, max_moves=4)
                for _ in range(options.batch)]
        seeds = range(options.batch)
        tokenizer = load_tokenizer(str(AGENTS / "sokoban"))
        model = tiny_model(tokenizer, width=options.width, layers=options.layers, heads=options.width // 32).to(device).eval()
        runs = {"rollout": [], "generate": []}
        for turn in range(options.rounds + 1):  # the first warms up
            torch.manual_seed(turn)
            shared = dict(seeds=seeds, temperature=1.0, max_response_tokens=options.tokens)
            started = time.perf_counter()
            played = rollout(model, tokenizer, envs, **shared, generator=torch.Generator(device).manual_seed(turn))
            middle = time.perf_counter()
            generated = rollout_by_generate(model, tokenizer, envs, **shared)
            ended = time.perf_counter()
            runs["rollout"].append((int(played.response_mask.sum()) / (middle - started), (middle - started) / turns))
            runs["generate"].append((generated / (ended - middle), 0))
        speed = {name: statistics.median(rate for rate, _ in values[1:]) for name, values in runs.items()}
        print(f"| {turns} | {speed['rollout']:.0f} | {speed['generate']:.0f} | {speed['rollout'] / speed['generate']:.1f} | "
              f"{statistics.median(seconds for _, seconds in runs['rollout'][1:]):.2f} |", flush=True)


if __name__ == "__main__":
    tables = {"loss": loss, "rollout": rollouts}
    if sys.argv[1:2] == [] or sys.argv[1] not in tables:
        sys.exit("usage: python -m extras.bench loss|rollout [options, see --help]")
    tables[sys.argv[1]](sys.argv[2:])
