"""token_stats against the naive float64 computation that holds every logit."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kernels
from kernels import token_stats

ROOT = Path(kernels.__file__).parent


def inputs(n, vocabulary, width, dtype=torch.float32):
    generator = torch.Generator().manual_seed(n + vocabulary)
    make = lambda *shape: torch.randn(*shape, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(vocabulary, (n,), generator=generator)
    hidden, weight, bias = make(n, width), make(vocabulary, width), make(vocabulary)
    weight.data /= width ** 0.5  # logits of order 1
    return hidden, weight, bias, targets


def naive(hidden, weight, targets, bias, temperature):
    logits = hidden @ weight.T + (0 if bias is None else bias)
    log_p = torch.log_softmax(logits / temperature, -1)
    return log_p.gather(-1, targets[:, None])[:, 0], torch.logsumexp(logits, -1), -(log_p.exp() * log_p).sum(-1)


def close(actual, expected, tolerance):
    if expected.numel():
        assert ((actual.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item() <= tolerance


def compare(hidden, weight, bias, targets, temperature=1.0, tolerance=1e-5, d_entropy=1.0):
    """Values and gradients of a random combination of log-probs and entropies."""
    doubles = [None if x is None else x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    expected = naive(doubles[0], doubles[1], targets, doubles[2], temperature)
    actual = token_stats(hidden, weight, targets, bias=bias, temperature=temperature)
    for a, e in zip(actual, expected):
        assert a.dtype == torch.float32 and a.shape == e.shape
        close(a.detach(), e.detach(), tolerance)
    generator = torch.Generator().manual_seed(1)
    d_logprob, d_h = torch.randn(2, len(targets), generator=generator).to(hidden.device)
    (actual[0] * d_logprob + d_entropy * actual[2] * d_h).sum().backward()
    (expected[0] * d_logprob + d_entropy * expected[2] * d_h).sum().backward()
    for x, double in zip((hidden, weight, bias), doubles):
        if x is not None and x.requires_grad:
            close(x.grad, double.grad, tolerance)


@pytest.mark.parametrize("n, chunk_rows", [(0, 4), (1, 4), (4, 4), (5, 4), (23, 4), (23, 100)])
@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_values_and_gradients(monkeypatch, n, chunk_rows, temperature):
    monkeypatch.setattr(kernels, "BLOCK", chunk_rows)
    monkeypatch.setattr(kernels, "CHUNK_BYTES", 4 * 16 * 7)
    hidden, weight, bias, targets = inputs(n, 50, 16)
    compare(hidden, weight, bias, targets, temperature)


def test_without_bias_and_with_a_strided_hidden():
    hidden, weight, _, targets = inputs(9, 50, 16)
    wide = torch.randn(9, 32)
    strided = wide[:, ::2].requires_grad_()
    assert not strided.is_contiguous()
    compare(strided, weight, None, targets)


def test_frozen_weight_gets_no_gradient():
    hidden, weight, _, targets = inputs(9, 50, 16)
    weight.requires_grad_(False)
    compare(hidden, weight, None, targets)
    assert weight.grad is None


def test_weight_tied_to_the_embedding_adds_both_gradients():
    targets = inputs(11, 50, 16)[-1]
    weight = torch.nn.Parameter(torch.randn(50, 16))
    ids = torch.arange(11)
    (token_stats(weight[ids] * 2, weight, targets)[0]).sum().backward()
    double = weight.detach().double().requires_grad_()
    naive(double[ids] * 2, double, targets, None, 1.0)[0].sum().backward()
    close(weight.grad, double.grad, 1e-5)


def test_huge_logits_stay_finite():
    hidden = torch.tensor([[1e4], [-1e4], [0.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], [0.0]], requires_grad=True)
    logprob, logsumexp, entropy = token_stats(hidden, weight, torch.tensor([0, 0, 2]))
    (logprob.sum() + entropy.sum()).backward()
    assert logprob.tolist()[:2] == [0.0, -2e4] and logsumexp.tolist()[:2] == [1e4, 1e4]
    assert entropy.tolist() == pytest.approx([0, 0, 1.0986123], abs=1e-6)
    assert torch.isfinite(hidden.grad).all() and torch.isfinite(weight.grad).all()


def test_masked_out_words_count_as_impossible():
    bias = torch.tensor([0.0, 0.0, -float("inf")])
    hidden = torch.zeros(1, 4, requires_grad=True)
    logprob, _, entropy = token_stats(hidden, torch.randn(3, 4), torch.tensor([0]), bias=bias)
    (logprob + entropy).sum().backward()
    assert entropy.item() == pytest.approx(0.6931472) and torch.isfinite(hidden.grad).all()


def test_bfloat16():
    hidden, weight, bias, targets = inputs(40, 300, 32, torch.bfloat16)
    compare(hidden, weight, bias, targets, tolerance=1e-2)


def test_logsumexp_is_of_raw_logits_and_carries_no_gradient():
    hidden, weight, bias, targets = inputs(5, 50, 16)
    hot = token_stats(hidden, weight, targets, bias=bias, temperature=5.0)
    torch.testing.assert_close(hot[1], token_stats(hidden, weight, targets, bias=bias)[1])
    assert not hot[1].requires_grad


def record_slices(monkeypatch):
    """The shapes of the logits that the elementwise parts of the forward and of the backward pass are given."""
    seen = {"_fold": [], "_slope": []}
    for name, position in (("_fold", 0), ("_slope", 1)):
        def spy(*arguments, name=name, position=position, original=getattr(kernels, name)):
            seen[name].append(tuple(arguments[position].shape))
            return original(*arguments)
        monkeypatch.setattr(kernels, name, spy)
    return seen


def test_logits_of_all_tokens_never_exist(monkeypatch):
    """No slice of logits is larger than the chunk, and together they are every logit exactly once."""
    monkeypatch.setattr(kernels, "CHUNK_BYTES", 4 * 16 * 7)
    seen = record_slices(monkeypatch)
    hidden, weight, bias, targets = inputs(23, 50, 16)
    token_stats(hidden, weight, targets, bias=bias)[0].sum().backward()
    for shapes in seen.values():
        assert max(n * v for n, v in shapes) <= 16 * 7 and sum(n * v for n, v in shapes) == 23 * 50


def test_tokens_without_incoming_gradient_cost_nothing(monkeypatch):
    seen = record_slices(monkeypatch)
    hidden, weight, bias, targets = inputs(23, 50, 16)
    token_stats(hidden, weight, targets, bias=bias)[0][:3].sum().backward()
    assert seen["_slope"] == [(3, 50)] and not hidden.grad[3:].any()


@pytest.mark.parametrize("n, width, share", [(40, 16, "some"), (8, 16, "all"), (16, 16, "all")])
def test_kept_logits_are_not_made_again(monkeypatch, n, width, share):
    """They wait in the memory of the weight's gradient: V * H numbers, of N * V logits."""
    monkeypatch.setattr(kernels, "CHUNK_BYTES", 4 * n * 5)
    hidden, weight, bias, targets = inputs(n, 50, width)
    made = []
    original = kernels._logits
    monkeypatch.setattr(kernels, "_logits", lambda h, w, *rest: made.append(len(w)) or original(h, w, *rest))
    log_probs = token_stats(hidden, weight, targets, bias=bias)[0]
    assert sum(made) == 50
    log_probs.sum().backward()
    again = sum(made) - 50
    assert again == 0 if share == "all" else 0 < again < 50
    compare(*[x.detach().requires_grad_() for x in (hidden, weight, bias)], targets)


@pytest.mark.parametrize("masked", ["first block", "last block", "odd tokens", "all", "none"])
@pytest.mark.parametrize("n", [7, 8, 9, 30])
def test_blocks_of_tokens_and_masked_tokens(monkeypatch, n, masked):
    monkeypatch.setattr(kernels, "BLOCK", 8)
    monkeypatch.setattr(kernels, "CHUNK_BYTES", 4 * 8 * 11)
    hidden, weight, bias, targets = inputs(n, 50, 16)
    tokens = torch.arange(n)
    weights = {"first block": tokens >= 8, "last block": tokens < n - n % 8, "odd tokens": tokens % 2 == 0,
               "all": tokens < 0, "none": tokens >= 0}[masked].float()
    doubles = [x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    actual = token_stats(hidden, weight, targets, bias=bias, temperature=1.3)
    expected = naive(*doubles[:2], targets, doubles[2], 1.3)
    for logprob, _, entropy in (actual, expected):
        (weights * (2 * logprob + entropy)).sum().backward()
    for x, double in zip((hidden, weight, bias), doubles):
        close(x.grad, double.grad, 1e-5)


def test_autocast_around_the_call_changes_nothing():
    hidden, weight, bias, targets = inputs(9, 50, 16)
    plain = token_stats(hidden, weight, targets, bias=bias)
    expected = torch.autograd.grad(plain[0].sum(), (hidden, weight, bias))
    with torch.autocast("cpu", torch.bfloat16):
        cast = token_stats(hidden, weight, targets, bias=bias)
        actual = torch.autograd.grad(cast[0].sum(), (hidden, weight, bias))
    assert all(torch.equal(a, b) for a, b in zip(plain + expected, cast + actual))


def test_a_retained_graph_can_be_walked_twice():
    hidden, weight, bias, targets = inputs(40, 50, 16)
    loss = token_stats(hidden, weight, targets, bias=bias)[0].sum()
    loss.backward(retain_graph=True)
    once = [x.grad.clone() for x in (hidden, weight, bias)]
    loss.backward()
    for x, first in zip((hidden, weight, bias), once):
        torch.testing.assert_close(x.grad, 2 * first)


def test_outputs_may_be_changed_in_place():
    hidden, weight, _, targets = inputs(5, 50, 16)
    logprob = token_stats(hidden, weight, targets)[0]
    logprob[2] = 0.0
    logprob.sum().backward()
    assert not hidden.grad[2].any() and hidden.grad[1].any()


def test_a_large_vocabulary_loses_no_precision():
    """Entropy and log-prob are formed without differences of large numbers, whatever the size of the logits."""
    hidden, weight, _, targets = inputs(3, 150_000, 16)
    with torch.no_grad():
        for scale in (0.1, 1, 30):
            actual = token_stats(hidden * scale, weight, targets)
            expected = naive((hidden * scale).double(), weight.double(), targets, None, 1.0)
            for a, e in zip(actual, expected):
                assert ((a.double() - e) / e).abs().max() < 1e-5


def test_a_slice_of_masked_out_words_changes_nothing(monkeypatch):
    monkeypatch.setattr(kernels, "CHUNK_BYTES", 4 * 16 * 10)
    hidden, weight, bias, targets = inputs(9, 50, 16)
    bias.data[:20] = -float("inf")  # the first two slices
    targets = targets % 30 + 20
    short = [x.detach().requires_grad_() for x in (weight[20:], bias[20:])]
    for actual, expected in zip(token_stats(hidden, weight, targets, bias=bias),
                                token_stats(hidden, short[0], targets - 20, bias=short[1])):
        torch.testing.assert_close(actual, expected)
    token_stats(hidden, weight, targets, bias=bias)[2].sum().backward()
    assert torch.isfinite(hidden.grad).all() and torch.isfinite(weight.grad).all() and not weight.grad[:20].any()


def test_no_gradient_asked_no_gradient_memory():
    hidden, weight, _, targets = inputs(9, 50, 16)
    with torch.no_grad():
        assert not token_stats(hidden, weight, targets)[0].requires_grad
    frozen = token_stats(hidden.detach(), weight.detach(), targets)
    assert not any(x.requires_grad for x in frozen)


def test_compiled_and_plain_agree(monkeypatch):
    hidden, weight, bias, targets = inputs(9, 50, 16)
    monkeypatch.setattr(kernels, "COMPILE_FROM", 0)
    compare(hidden, weight, bias, targets)


def test_without_a_compiler_the_plain_path_runs(monkeypatch):
    def broken(function):
        def call(*arguments):
            raise RuntimeError("no compiler")
        return call
    monkeypatch.setattr(kernels, "COMPILE_FROM", 0)
    monkeypatch.setattr(kernels, "_compiled", broken)
    monkeypatch.setattr(kernels, "_plain", False)
    hidden, weight, bias, targets = inputs(9, 50, 16)
    with pytest.warns(UserWarning, match="uncompiled"):
        compare(hidden, weight, bias, targets)


@pytest.mark.parametrize("change", [
    {"targets": torch.tensor([0, 50])}, {"targets": torch.tensor([-1, 0])}, {"targets": torch.tensor([0.0, 1.0])},
    {"targets": torch.tensor([0])}, {"weight": torch.zeros(50, 3)}, {"hidden": torch.zeros(2, 2, 4)},
    {"bias": torch.zeros(49)}, {"temperature": 0.0}, {"temperature": float("nan")}])
def test_bad_arguments_are_refused(change):
    arguments = {"hidden": torch.zeros(2, 4), "weight": torch.zeros(50, 4), "targets": torch.tensor([0, 1])} | change
    with pytest.raises(ValueError):
        token_stats(**arguments)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_gradients_are_those_of_a_naive_reference():
    hidden, weight, bias, targets = (x.detach().cuda().requires_grad_(x.is_floating_point()) for x in inputs(300, 1000, 64))
    compare(hidden, weight, bias, targets, tolerance=1e-4)


def test_the_benchmark_prints_its_table():
    """Small shapes, one round: every method that is installed has a row, and the gradients are right."""
    command = [sys.executable, "kernels.py", "--tokens", "64", "--hidden", "32", "--vocabulary", "500", "--rounds", "1",
               "--device", "cpu", "--methods", "token_stats", "full logits", "checkpoint per chunk", "four products"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| ")]
    assert [row[0] for row in rows[1:]] == command[-4:]
    for row in rows[1:4]:
        assert all(float(error) < 1e-5 for error in row[-1].split(", ")) and float(row[3]) > 0
