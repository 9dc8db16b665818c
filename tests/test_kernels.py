"""token_stats against the naive float64 computation that holds every logit."""

import pytest
import torch

import kernels
from kernels import token_stats


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
    d_logprob, d_h = torch.randn(2, len(targets), generator=generator)
    (actual[0] * d_logprob + d_entropy * actual[2] * d_h).sum().backward()
    (expected[0] * d_logprob + d_entropy * expected[2] * d_h).sum().backward()
    for x, double in zip((hidden, weight, bias), doubles):
        if x is not None and x.requires_grad:
            close(x.grad, double.grad, tolerance)


@pytest.mark.parametrize("n, chunk_rows", [(0, 4), (1, 4), (4, 4), (5, 4), (23, 4), (23, 100)])
@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_values_and_gradients(monkeypatch, n, chunk_rows, temperature):
    monkeypatch.setattr(kernels, "CHUNK_BYTES", chunk_rows * 4 * 50)
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
    assert torch.equal(hot[1], token_stats(hidden, weight, targets, bias=bias)[1]) and not hot[1].requires_grad


def test_logits_of_all_tokens_never_exist(monkeypatch):
    """The largest tensor that any chunk makes has chunk rows, not N."""
    monkeypatch.setattr(kernels, "CHUNK_BYTES", 4 * 4 * 50)
    seen = []
    for name in ("_forward_chunk", "_backward_chunk"):
        original = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda logits, *rest, f=original: seen.append(len(logits)) or f(logits, *rest))
    hidden, weight, bias, targets = inputs(23, 50, 16)
    token_stats(hidden, weight, targets, bias=bias)[0].sum().backward()
    assert max(seen) == 4 and sum(seen) == 2 * 23


def test_tokens_without_incoming_gradient_cost_nothing(monkeypatch):
    seen = []
    original = kernels._backward_chunk
    monkeypatch.setattr(kernels, "_backward_chunk", lambda logits, *rest: seen.append(len(logits)) or original(logits, *rest))
    hidden, weight, bias, targets = inputs(23, 50, 16)
    token_stats(hidden, weight, targets, bias=bias)[0][:3].sum().backward()
    assert sum(seen) == 3 and not hidden.grad[3:].any()


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
def test_on_a_gpu():
    hidden, weight, bias, targets = (x.detach().cuda().requires_grad_(x.is_floating_point()) for x in inputs(300, 1000, 64))
    compare(hidden, weight, bias, targets, tolerance=1e-4)
