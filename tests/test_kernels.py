"""token_stats, weighted_loss, score and score_logits against the naive float64 computation that holds every logit."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kernels
from actfocus import SIGNALS, weighted_policy_loss
from kernels import token_stats, weighted_loss
from rollout import score
from train import score_logits

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


def blocks_of(monkeypatch, tokens, vocabulary=50):
    monkeypatch.setattr(kernels, "BLOCK_LOGITS", vocabulary * tokens)


@pytest.mark.parametrize("n, block", [(0, 4), (1, 4), (4, 4), (5, 4), (23, 4), (23, 100), (23, 1), (5, 0)])
@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_values_and_gradients(monkeypatch, n, block, temperature):
    """In blocks of any size; where not even one token's logits fit, of one."""
    blocks_of(monkeypatch, block)
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


def record_blocks(monkeypatch):
    """The shapes of the logits that the elementwise parts of the forward and of the backward pass are given."""
    seen = {"_statistics": [], "_slope": []}
    for name in seen:
        def spy(logits, *arguments, name=name, original=getattr(kernels, name)):
            seen[name].append(tuple(logits.shape))
            return original(logits, *arguments)
        monkeypatch.setattr(kernels, name, spy)
    return seen


def test_no_block_of_logits_is_larger_than_asked_and_each_pass_makes_every_logit_once(monkeypatch):
    blocks_of(monkeypatch, 7)
    seen = record_blocks(monkeypatch)
    hidden, weight, bias, targets = inputs(23, 50, 16)
    token_stats(hidden, weight, targets, bias=bias)[0].sum().backward()
    blocks = [(7, 50), (7, 50), (7, 50), (2, 50)]
    assert seen == {"_statistics": 2 * blocks, "_slope": blocks}


class Largest(TorchDispatchMode):
    """The bytes of the largest memory that any operation's result lies in."""

    size = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        out = function(*arguments, **options or {})
        tensors = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.size = max([self.size, *(x.untyped_storage().nbytes() for x in tensors)])
        return out


def test_logits_of_all_tokens_never_exist(monkeypatch):
    blocks_of(monkeypatch, 10, 500)
    hidden, weight, bias, targets = inputs(400, 500, 8)
    for function, largest in ((lambda: token_stats(hidden, weight, targets, bias=bias), 4 * kernels.BLOCK_LOGITS),
                              (lambda: naive(hidden, weight, targets, bias, 1.0), 4 * 400 * 500)):
        with Largest() as mode:
            logprob, _, entropy = function()
            (logprob.sum() + entropy.sum()).backward()
        assert mode.size == largest


def test_tokens_without_incoming_gradient_cost_nothing(monkeypatch):
    seen = record_blocks(monkeypatch)
    hidden, weight, bias, targets = inputs(23, 50, 16)
    token_stats(hidden, weight, targets, bias=bias)[0][:3].sum().backward()
    assert seen["_slope"] == [(3, 50)] and not hidden.grad[3:].any()


@pytest.mark.parametrize("masked", ["first block", "last block", "odd tokens", "all", "none"])
@pytest.mark.parametrize("n", [7, 8, 9, 30])
def test_blocks_of_tokens_and_masked_tokens(monkeypatch, n, masked):
    blocks_of(monkeypatch, 8)
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


@pytest.mark.parametrize("output", [0, 2])
def test_the_gradient_of_one_output_alone(output):
    """Of the log-probs of some tokens, or of the entropy of some."""
    hidden, weight, bias, targets = inputs(9, 50, 16)
    doubles = [x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    token_stats(hidden, weight, targets, bias=bias)[output][2:6].sum().backward()
    naive(*doubles[:2], targets, doubles[2], 1.0)[output][2:6].sum().backward()
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


def test_words_masked_out_change_nothing(monkeypatch):
    blocks_of(monkeypatch, 4)
    hidden, weight, bias, targets = inputs(9, 50, 16)
    bias.data[:20] = -float("inf")
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


def test_a_weight_of_another_precision_than_the_states():
    hidden, weight, bias, targets = inputs(20, 50, 16)
    compare(hidden.detach().bfloat16().requires_grad_(), weight, bias, targets, tolerance=1e-2)
    actual = token_stats(hidden.bfloat16(), weight, targets, bias=bias)
    for a, e in zip(actual, naive(hidden.bfloat16().double(), weight.double(), targets, bias.double(), 1.0)):
        close(a.detach(), e.detach(), 1e-5)  # the products are made in float32


@pytest.mark.slow
def test_compiled_and_plain_agree(monkeypatch):
    monkeypatch.setattr(kernels, "COMPILE_FROM", 0)
    monkeypatch.setattr(kernels, "_plain", False)
    blocks_of(monkeypatch, 4)
    hidden, weight, bias, targets = inputs(10, 50, 16)
    compare(hidden, weight, bias, targets, 0.7)
    if kernels._plain:
        pytest.skip("torch.compile does not work here")


def test_without_a_compiler_the_plain_path_runs(monkeypatch):
    tried = []

    def broken(function):
        def call(*arguments):
            tried.append(function)
            raise RuntimeError("no compiler")
        return call
    monkeypatch.setattr(kernels, "COMPILE_FROM", 0)
    monkeypatch.setattr(kernels, "_compiled", broken)
    monkeypatch.setattr(kernels, "_plain", False)
    hidden, weight, bias, targets = inputs(9, 50, 16)
    with pytest.warns(UserWarning, match="uncompiled") as said:
        compare(hidden, weight, bias, targets)
    assert len(tried) == len(said) == 1  # once a process


@pytest.mark.parametrize("change", [
    {"targets": torch.tensor([0, 50])}, {"targets": torch.tensor([-1, 0])}, {"targets": torch.tensor([0.0, 1.0])},
    {"targets": torch.tensor([0])}, {"weight": torch.zeros(50, 3)}, {"hidden": torch.zeros(2, 2, 4)},
    {"targets": torch.tensor([True, False])}, {"bias": torch.zeros(49)}, {"temperature": 0.0},
    {"temperature": float("nan")}, {"temperature": float("inf")}])
def test_bad_arguments_are_refused(change):
    arguments = {"hidden": torch.zeros(2, 4), "weight": torch.zeros(50, 4), "targets": torch.tensor([0, 1])} | change
    with pytest.raises(ValueError):
        token_stats(**arguments)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_gradients_are_those_of_a_naive_reference():
    *leaves, targets = (x.detach().cuda() for x in inputs(300, 1000, 64))
    hidden, weight, bias = (x.requires_grad_() for x in leaves)
    compare(hidden, weight, bias, targets, tolerance=1e-4)


# The loss in one pass


def columns(n, device="cpu"):
    """old_logprobs' noise, advantages and weights of n tokens, a third of the weights 0."""
    generator = torch.Generator().manual_seed(n)
    noise, advantages, weights, kept = torch.randn(4, n, generator=generator).to(device)
    return 0.4 * noise, advantages, weights.abs() * (kept > -0.4)


def compare_loss(hidden, weight, bias, targets, tolerance=1e-5, temperature=1.0, scale=1.0, **options):
    """weighted_loss, its stats and its gradients beside weighted_policy_loss of the naive float64 log-probs."""
    doubles = [None if x is None else x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    logprobs, _, entropy = naive(doubles[0], doubles[1], targets, doubles[2], temperature)
    noise, advantages, weights = columns(len(targets), hidden.device)
    old = logprobs.detach() + noise
    entropy_coef, total = options.get("entropy_coef", 0.0), options.get("weight_sum")
    clips = {name: x for name, x in options.items() if name.startswith("clip")}
    expected, stats = weighted_policy_loss(*(x.double()[None] for x in (logprobs, old, advantages, weights)),
                                           weight_sum=total, **clips)
    expected = expected - entropy_coef * entropy[weights > 0].sum()
    old, advantages = (x.masked_fill(weights == 0, float("nan")) for x in (old, advantages))  # not to be read
    loss, found = weighted_loss(hidden, weight, targets, old.float(), advantages, weights, bias=bias,
                                temperature=temperature, **options)
    assert abs(loss.item() - expected.item()) <= tolerance * max(1, abs(expected.item()))
    for name, value in stats.items():
        assert abs(found[name].item() - value.item()) <= tolerance * max(1, abs(value.item())), name
    for name, value in (("logprobs", logprobs), ("entropy", entropy)):
        assert found[name].dtype == torch.float32 and not found[name].requires_grad
        close(found[name], value.detach() * (weights > 0), tolerance)
    (scale * loss).backward()
    (scale * expected).backward()
    for x, double in zip((hidden, weight, bias), doubles):
        if x is not None and x.requires_grad:
            assert x.grad.dtype == x.dtype
            close(x.grad, double.grad, tolerance)


@pytest.mark.parametrize("n, block", [(0, 4), (1, 4), (4, 4), (5, 4), (23, 4), (23, 100), (23, 1)])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "entropy_coef": 0.02}, {"weight_sum": 123.0, "scale": 3.0},
                                     {"clip_low": 0.05, "clip_high": 0.01}])
def test_the_loss_in_one_pass_is_the_loss_of_the_logprobs(n, block, options):
    compare_loss(*inputs(n, 50, 16), block_tokens=block, **options)


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 1e-2), (torch.float16, 2e-3), (torch.float64, 1e-5)])
def test_the_loss_in_one_pass_in_other_precisions(dtype, tolerance):
    compare_loss(*inputs(40, 300, 32, dtype), tolerance=tolerance, entropy_coef=0.01)


def test_the_loss_in_one_pass_without_bias_with_a_frozen_or_a_tied_weight():
    hidden, weight, _, targets = inputs(11, 50, 16)
    compare_loss(hidden, weight, None, targets)
    hidden.grad = None
    compare_loss(hidden, weight.detach(), None, targets)
    noise, advantages, weights = columns(11)
    gradients = []
    for loss in (lambda h, w: weighted_loss(h, w, targets, noise - 4, advantages, weights)[0],
                 lambda h, w: weighted_policy_loss(token_stats(h, w, targets)[0][None], (noise - 4)[None], advantages[None],
                                                   weights[None])[0]):
        tied = weight.detach().clone().requires_grad_()
        loss(tied[torch.arange(11)] * 2, tied).backward()
        gradients.append(tied.grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_parts_of_a_minibatch_add_up():
    hidden, weight, bias, targets = inputs(23, 50, 16)
    noise, advantages, weights = columns(23)
    whole = weighted_loss(hidden, weight, targets, noise - 4, advantages, weights, bias=bias, entropy_coef=0.01)[0]
    parts = [weighted_loss(hidden[rows], weight, targets[rows], (noise - 4)[rows], advantages[rows], weights[rows], bias=bias,
                           entropy_coef=0.01, weight_sum=weights.sum())[0] for rows in (slice(9), slice(9, 23))]
    torch.testing.assert_close(sum(parts), whole)
    expected = torch.autograd.grad(whole, (hidden, weight, bias))
    for x, y in zip(torch.autograd.grad(sum(parts), (hidden, weight, bias)), expected):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)


def test_the_loss_in_one_pass_stays_finite_where_logits_are_huge_or_words_masked_out():
    hidden = torch.tensor([[1e4], [-1e4], [0.0]], requires_grad=True)
    weight, bias = torch.tensor([[1.0], [-1.0], [0.5]], requires_grad=True), torch.tensor([0.0, 0.0, -float("inf")])
    for bias in (None, bias):
        loss, stats = weighted_loss(hidden, weight, torch.tensor([0, 1, 0]), torch.zeros(3), torch.ones(3), torch.ones(3),
                                    bias=bias, entropy_coef=0.1)
        loss.backward()
        assert stats["logprobs"][:2].tolist() == [0.0, 0.0] and torch.isfinite(loss)
        assert torch.isfinite(hidden.grad).all() and torch.isfinite(weight.grad).all()


def test_tokens_of_weight_0_cost_nothing_and_each_logit_is_made_once(monkeypatch):
    seen = record_blocks(monkeypatch)
    hidden, weight, bias, targets = inputs(23, 50, 16)
    noise, advantages, weights = columns(23)
    targets[weights == 0] = -100  # as frameworks mark what is not trained
    weighted_loss(hidden, weight, targets, noise - 4, advantages, weights, bias=bias, entropy_coef=0.01,
                  block_tokens=7)[0].backward()
    n = int((weights > 0).sum())
    assert seen["_statistics"] == seen["_slope"] == [(min(7, n - start), 50) for start in range(0, n, 7)]
    assert not hidden.grad[weights == 0].any() and hidden.grad[weights > 0].any(1).all()


def test_without_gradients_only_the_numbers_are_made(monkeypatch):
    seen = record_blocks(monkeypatch)
    hidden, weight, bias, targets = inputs(9, 50, 16)
    with torch.no_grad():
        loss, _ = weighted_loss(hidden, weight, targets, *columns(9), bias=bias)
    assert not loss.requires_grad and seen["_slope"] == [] and len(seen["_statistics"]) == 1


def test_nothing_but_the_loss_carries_a_gradient_and_only_to_hidden_and_weight():
    hidden, weight, _, targets = inputs(9, 50, 16)
    noise, advantages, weights = (x.requires_grad_() for x in columns(9))
    loss, stats = weighted_loss(hidden, weight, targets, noise, advantages, weights, weight_sum=weights.sum())
    loss.backward()
    assert not any(x.requires_grad for x in stats.values()) and hidden.grad is not None
    assert noise.grad is None and advantages.grad is None and weights.grad is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_another_default_dtype_changes_nothing(dtype):
    try:
        torch.set_default_dtype(dtype)
        compare_loss(*inputs(9, 50, 16), entropy_coef=0.01)
        compare(*inputs(9, 50, 16))
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_scaled_loss_rescues_gradients_that_float16_cannot_hold():
    hidden, weight, _, targets = inputs(9, 50, 16, torch.float16)
    loss, _ = weighted_loss(hidden, weight, targets, -4 * torch.ones(9), torch.ones(9), torch.ones(9), weight_sum=1e6)
    (65536 * loss).backward()
    assert weight.grad.abs().max() > 1e-3


def test_a_stray_ratio_moves_nothing_and_an_impossible_word_makes_the_loss_nan():
    """As in weighted_policy_loss, whose log-ratios are clamped."""
    hidden, weight, _, targets = inputs(3, 50, 16)
    old, advantages = torch.tensor([-60.0, -4.0, -4.0]), torch.tensor([-1.0, 0.0, 0.0])
    weighted_loss(hidden, weight, targets, old, advantages, torch.ones(3))[0].backward()
    assert not hidden.grad.any()
    bias = torch.zeros(50).index_fill(0, targets[:1], -float("inf"))
    loss, stats = weighted_loss(hidden, weight, targets, old, advantages, torch.ones(3), bias=bias)
    assert stats["logprobs"][0] == -float("inf") and torch.isnan(loss)


class Waits(TorchDispatchMode):
    """How often a number was asked for, which on a GPU waits for all that was launched."""

    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*arguments, **options or {})


def test_the_checks_of_the_loss_wait_once():
    hidden, weight, _, targets = inputs(23, 50, 16)
    with Waits() as waits:
        weighted_loss(hidden, weight, targets, *columns(23), entropy_coef=torch.tensor(0.01), block_tokens=5)
    assert waits.count == 1


def test_a_second_backward_pass_through_the_loss_is_refused():
    hidden, weight, _, targets = inputs(9, 50, 16)
    loss, _ = weighted_loss(hidden, weight, targets, *columns(9))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        loss.backward()


def test_the_weights_gradient_is_handed_out_without_a_copy(monkeypatch):
    """The largest tensor there is: the sum that the blocks were added up in becomes .grad, scaled in place."""
    made, zeros_like = [], torch.zeros_like

    def recorded(*arguments, **options):
        x = zeros_like(*arguments, **options)
        made.append(x.data_ptr())
        return x
    monkeypatch.setattr(torch, "zeros_like", recorded)
    hidden, weight, _, targets = inputs(9, 50, 16)
    (2 * weighted_loss(hidden, weight, targets, *columns(9))[0]).backward()
    assert weight.grad.data_ptr() in made


@pytest.mark.parametrize("change", [
    {"targets": torch.tensor([0, 50])}, {"weights": torch.tensor([2.0, -1.0])},
    {"weights": torch.tensor([1.0, float("inf")]), "weight_sum": 1.0}, {"weights": torch.tensor([1.0, float("nan")])},
    {"advantages": torch.tensor([0.0, float("inf")])}, {"old_logprobs": torch.tensor([float("nan"), 0.0])},
    {"weights": torch.ones(3)}, {"old_logprobs": torch.zeros(2, 1)}, {"weight_sum": 0.0}, {"weight_sum": -1.0},
    {"weight_sum": torch.ones(3)}, {"weight_sum": torch.ones(1)},
    {"weight_sum": float("nan")}, {"weight_sum": float("inf")}, {"clip_low": 1.5}, {"clip_low": -0.1},
    {"clip_high": -0.1}, {"temperature": 0.0},
    {"bias": torch.zeros(49)}])
def test_bad_arguments_of_the_loss_are_refused(change):
    arguments = {"hidden": torch.zeros(2, 4), "weight": torch.zeros(50, 4), "targets": torch.tensor([0, 1]),
                 "old_logprobs": torch.zeros(2), "advantages": torch.ones(2), "weights": torch.ones(2)}
    weighted_loss(**arguments)
    with pytest.raises(ValueError):
        weighted_loss(**arguments | change)


def test_the_loss_compiled_and_under_autocast_is_the_same(monkeypatch):
    compare_loss(*inputs(23, 50, 16), entropy_coef=0.01, block_tokens=5)
    with torch.autocast("cpu", torch.bfloat16):
        compare_loss(*inputs(23, 50, 16), entropy_coef=0.01, block_tokens=5)
    monkeypatch.setattr(kernels, "COMPILE_FROM", 0)
    compiled = []
    monkeypatch.setattr(kernels, "_compiled", lambda f, make=kernels._compiled: compiled.append(f) or make(f))
    compare_loss(*inputs(23, 50, 16), entropy_coef=0.01, block_tokens=5)  # the last block is smaller
    assert kernels._plain or kernels._slope in compiled


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 1e-2)])
def test_on_a_gpu_the_loss_in_one_pass_is_that_of_a_naive_reference(dtype, tolerance):
    for n, vocabulary in ((300, 1000), (700, 5000)):  # plain and compiled
        *leaves, targets = (x.detach().cuda() for x in inputs(n, vocabulary, 64, dtype))
        compare_loss(*(x.requires_grad_() for x in leaves), targets, tolerance=tolerance, entropy_coef=0.01, temperature=0.7,
                     block_tokens=256)


# A language model's trajectories


@pytest.fixture
def played(agent):
    """(model, ids[4, 30], response_mask): tokens as they come, responses here and there, padding in the last row."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(len(agent[1]), (4, 30), generator=generator)
    mask = torch.rand(4, 30, generator=generator) < 0.6
    mask[:, 0] = mask[:, 9:12] = mask[3, 20:] = False
    return copy.deepcopy(agent[0]), ids, mask


def naive_scores(model, ids, temperature=1.0):
    """(log-probs, logsumexp, entropy) [B, T] of all of a model's logits, in float64; 0 for the first token."""
    logits = copy.deepcopy(model).double()(ids).logits[:, :-1]
    identity = torch.eye(logits.shape[-1], dtype=torch.float64)
    flat = naive(logits.flatten(0, 1), identity, ids[:, 1:].flatten(), None, temperature)
    return [torch.nn.functional.pad(x.view(len(ids), -1), (1, 0)) for x in flat]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_scores_are_those_of_the_full_logits(monkeypatch, played, temperature):
    model, ids, mask = played
    blocks_of(monkeypatch, 5, model.config.vocab_size)
    stats = score(model, ids, mask, temperature)
    for actual, expected in zip(stats, naive_scores(model, ids, temperature)):
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual.double(), expected * mask, atol=1e-4, rtol=0)


def test_the_gradient_of_a_score_is_that_of_the_full_logits(played):
    model, ids, mask = played
    weights = torch.randn(2, 4, 30, generator=torch.Generator().manual_seed(1))
    stats = score(model, ids, mask, 0.7)
    total = (weights[0] * stats.logprobs + weights[1] * stats.entropy).sum()
    actual = torch.autograd.grad(total, list(model.parameters()))
    double = copy.deepcopy(model).double()
    log_p = torch.log_softmax(double(ids).logits[:, :-1] / 0.7, -1)
    logprobs, entropy = log_p.gather(-1, ids[:, 1:, None])[..., 0], -(log_p.exp() * log_p).sum(-1)
    total = ((weights[0, :, 1:] * logprobs + weights[1, :, 1:] * entropy) * mask[:, 1:]).sum()
    for a, e in zip(actual, torch.autograd.grad(total, list(double.parameters()))):
        close(a, e, 1e-4)


def energies(model, ids, mask):
    stats = score(model, ids, mask)
    of_reference, = score_logits(model, ids, mask, torch.zeros(ids.shape), SIGNALS["energy"])
    torch.testing.assert_close(of_reference, -stats.logsumexp.detach())
    return of_reference


def test_the_energy_of_a_token_is_that_of_the_logits_before_it(played):
    model, ids, mask = played
    with torch.no_grad():
        expected = -torch.logsumexp(model(ids).logits, -1)  # [B, T], position t predicts token t + 1
    actual = energies(model, ids, mask)
    for b, t in mask.nonzero().tolist():
        assert actual[b, t].item() == pytest.approx(expected[b, t - 1].item(), abs=1e-4)
    assert not actual[~mask].any() and (actual - expected)[mask].abs().median() > 0.01  # as it is not one token late


def test_changing_a_token_changes_only_the_energies_after_it(played):
    model, ids, mask = played
    before = energies(model, ids, mask)
    for t in (1, 5, 10, 13, 28):
        changed = ids.clone()
        changed[:, t] = (ids[:, t] + 1) % model.config.vocab_size
        after = energies(model, changed, mask)
        assert torch.equal(after[:, : t + 1], before[:, : t + 1])
        later = mask[:, t + 1:]
        assert (after[:, t + 1:] != before[:, t + 1:])[later].all() and later.any()


def test_score_logits_is_naive(monkeypatch, played):
    """Every signal of the raw logits, of the right token, and what the policy that sampled thought of that token."""
    model, ids, mask = played
    blocks_of(monkeypatch, 5, model.config.vocab_size)
    old = torch.where(mask, -torch.rand(4, 30, generator=torch.Generator().manual_seed(2)), float("nan"))
    logprobs, logsumexp, entropy = naive_scores(model, ids)
    expected = {"energy": -logsumexp, "entropy": entropy, "nll": -old, "shift": old - logprobs}
    also = (lambda logits, targets, _: targets.double(), lambda logits, targets, _: logits.max(-1).values)
    *signals, words, most = score_logits(model, ids, mask, old, *(SIGNALS[name] for name in expected), *also)
    for actual, e in zip(signals, expected.values()):
        assert actual.dtype == torch.float32 and not actual.requires_grad
        torch.testing.assert_close(actual.double(), torch.where(mask, e.double(), 0.0), atol=1e-4, rtol=0)
    assert torch.equal(words, (ids * mask).float())
    top = copy.deepcopy(model).double()(ids).logits.max(-1).values
    torch.testing.assert_close(most[:, 1:].double(), top[:, :-1] * mask[:, 1:], atol=1e-4, rtol=0)


@pytest.mark.parametrize("function", [
    lambda *played: score(*played).logprobs.sum().backward(),
    lambda *played: score_logits(*played, torch.zeros(played[1].shape), *SIGNALS.values())])
def test_logits_of_all_response_tokens_never_exist(monkeypatch, agent, function):
    model, generator = copy.deepcopy(agent[0]), torch.Generator().manual_seed(0)
    ids = torch.randint(len(agent[1]), (20, 40), generator=generator)
    blocks_of(monkeypatch, 8, model.config.vocab_size)
    with Largest() as mode:
        function(model, ids, torch.arange(40).expand(20, -1) > 0)
    assert mode.size <= 4 * 20 * 39 * model.config.intermediate_size < 4 * 20 * 39 * model.config.vocab_size


def test_a_head_with_a_bias_is_scored_with_it(played):
    model, ids, mask = played
    head = torch.nn.Linear(model.config.hidden_size, model.config.vocab_size)
    torch.nn.init.normal_(head.bias)
    model.set_output_embeddings(head)
    for actual, expected in zip(score(model, ids, mask), naive_scores(model, ids)):
        torch.testing.assert_close(actual.double(), expected * mask, atol=1e-4, rtol=0)
    expected = -naive_scores(model, ids)[1] * mask
    torch.testing.assert_close(energies(model, ids, mask).double(), expected, atol=1e-4, rtol=0)


def test_under_autocast_scores_are_those_of_the_half_precision_model(played):
    model, ids, mask = played
    with torch.no_grad():
        half = copy.deepcopy(model).bfloat16()
        expected = naive_scores(half, ids)
        with torch.autocast("cpu", torch.bfloat16):
            stats = score(model, ids, mask)
            of_reference, = score_logits(half, ids, mask, torch.zeros(ids.shape), SIGNALS["energy"])
    for actual, e in zip((stats.logprobs, stats.logsumexp, stats.entropy), expected):
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual.double(), e * mask, atol=0.1, rtol=0)
    assert of_reference.dtype == torch.float32
    torch.testing.assert_close(of_reference.double(), -expected[1] * mask, atol=0.1, rtol=0)


def test_without_a_response_token_every_score_is_0(played):
    model, ids, mask = played
    stats = score(model, ids, mask & False)
    stats.logprobs.sum().backward()
    made = score_logits(model, ids, mask & False, torch.zeros(ids.shape), *SIGNALS.values())
    assert not any(x.any() for x in (*stats, *made))


@pytest.mark.parametrize("function", [score, *(
    lambda *played, name=name: score_logits(*played, torch.zeros(played[1].shape), SIGNALS[name])
    for name in ("energy", "entropy", "shift"))])
def test_a_model_whose_numbers_went_bad_is_named(played, function):
    played[0].get_output_embeddings().weight.data[7] = float("nan")
    with pytest.raises(FloatingPointError, match="not finite"):
        function(*played)


@pytest.mark.slow
def test_the_benchmark_prints_its_table():
    """Small shapes, one round: every method that is installed has a row, and the gradients are right."""
    methods = ["weighted_loss", "token_stats", "full logits", "checkpoint per chunk"]
    command = [sys.executable, "kernels.py", "--tokens", "64", "--hidden", "32", "--vocabulary", "500", "--rounds", "1"]
    printed = subprocess.run([*command, "--methods", *methods], capture_output=True, text=True, check=True, cwd=ROOT,
                             env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}).stdout
    head, *rows = [[x.strip() for x in line.split("|")[1:-1]] for line in printed.splitlines() if line.startswith("| ")]
    assert [row[head.index("method")] for row in rows] == methods
    for row in rows:
        assert all(float(error) < 1e-5 for error in row[head.index("error of d hidden, d weight")].split(", "))
        assert float(row[head.index("median, s")]) > 0


def test_a_stray_ratio_is_cut_alike_in_both_losses():
    hidden, weight, _, targets = inputs(3, 50, 16)
    given = torch.tensor([-60.0, -4.0, -4.0]), torch.tensor([-1.0, 0.0, 0.0]), torch.ones(3)
    logprobs = token_stats(hidden, weight, targets)[0]
    expected, _ = weighted_policy_loss(logprobs[None], *(x[None] for x in given))
    assert weighted_loss(hidden, weight, targets, *given)[0].item() == pytest.approx(expected.item(), rel=1e-5)


def test_running_out_of_memory_is_not_taken_for_a_missing_compiler(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("full")
    monkeypatch.setattr(kernels, "COMPILE_FROM", 0)
    monkeypatch.setattr(kernels, "_compiled", lambda function: full)
    monkeypatch.setattr(kernels, "_plain", False)
    with pytest.raises(torch.OutOfMemoryError):
        token_stats(*inputs(9, 50, 16)[:2], torch.arange(9))
    assert not kernels._plain


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_targets_may_be_integers_of_any_size(dtype):
    hidden, weight, _, targets = inputs(9, 50, 16)
    for a, b in zip(*(token_stats(hidden, weight, x) for x in (targets, targets.to(dtype)))):
        assert torch.equal(a, b)
    one, two = (weighted_loss(hidden, weight, x, *columns(9))[0] for x in (targets, targets.to(dtype)))
    assert one == two


def test_a_second_derivative_is_refused():
    hidden, weight, _, targets = inputs(9, 50, 16)
    once, = torch.autograd.grad(token_stats(hidden, weight, targets)[0].square().sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        (once.sum() + hidden.sum()).backward()
