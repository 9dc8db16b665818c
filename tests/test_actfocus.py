"""Every formula of actfocus.py against a naive float64 version written from the paper's text."""

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch

from actfocus import (
    CREDITS,
    SIGNALS,
    ActFocus,
    Credit,
    gae,
    group_advantages,
    token_energy,
    token_logprobs,
    token_weights,
    variance_filter,
    weighted_policy_loss,
    whiten,
)
from extras.diagnose import spearman
from extras.options import make_credit
from train import Settings

#          prompt  think  think  answer answer obs    think  answer pad
RESPONSE = [False, True, True, True, True, False, True, True, False]
ACTION = [False, False, False, True, True, False, False, True, False]
response_mask, action_mask = torch.tensor([RESPONSE, RESPONSE]), torch.tensor([ACTION, ACTION])


# Weights


def test_energy_is_minus_logsumexp_of_raw_logits(randn):
    logits = 5 * randn(3, 4, 7)
    naive = [[-math.log(sum(math.exp(x) for x in row)) for row in rows] for rows in logits.tolist()]
    assert token_energy(logits).dtype == torch.float32
    torch.testing.assert_close(token_energy(logits), torch.tensor(naive), rtol=1e-6, atol=0)
    torch.testing.assert_close(token_energy(logits + 3), token_energy(logits) - 3)  # no softmax before it


def test_energy_survives_huge_logits_and_half_precision():
    assert token_energy(torch.tensor([1e4, -1e4])).item() == -1e4
    assert abs(token_energy(torch.zeros(1000, dtype=torch.bfloat16)).item() + math.log(1000)) < 1e-5


@pytest.mark.parametrize("alpha, beta", [(0.1, 0.5), (0.0, 2.0), (1.0, 0.0), (0.3, 0.0)])
def test_weights_are_the_papers_formula(randn, alpha, beta):
    signal = 3 * randn(2, 9) - 20
    weights = token_weights(signal, action_mask, response_mask, alpha=alpha, beta=beta)
    scores = [signal[b, t].item() for b in range(2) for t in range(9) if ACTION[t]]
    mu = sum(scores) / len(scores)
    sigma = math.sqrt(sum((s - mu) ** 2 for s in scores) / len(scores))
    for b in range(2):
        for t in range(9):
            naive = 0.0
            if ACTION[t]:
                naive = 1 + beta / (1 + math.exp(-(signal[b, t].item() - mu) / sigma))
            elif RESPONSE[t]:
                naive = alpha
            assert weights[b, t].item() == pytest.approx(naive, rel=1e-5)


def test_more_uncertain_action_tokens_weigh_more():
    confident, unsure = torch.tensor([9.0, 0.0, 0.0]), torch.tensor([0.2, 0.1, 0.0])
    signal = token_energy(torch.stack([confident, unsure]))[None]  # [1, 2]
    here = torch.ones(1, 2, dtype=torch.bool)
    weights = token_weights(signal, here, here)
    assert weights[0, 1] > weights[0, 0]


def test_uniform_weights_are_exactly_the_response_mask(randn):
    assert torch.equal(token_weights(randn(2, 9), action_mask, response_mask, alpha=1, beta=0), response_mask.float())


def test_weights_read_the_signal_on_action_tokens_only(randn):
    signal = randn(2, 9).requires_grad_()
    expected = token_weights(signal, action_mask, response_mask)
    polluted = torch.where(action_mask, signal, float("nan"))
    assert torch.equal(token_weights(polluted, action_mask, response_mask), expected)
    assert not expected.requires_grad and expected.dtype == torch.float32


def test_without_an_action_token_every_response_token_weighs_alpha(randn):
    weights = token_weights(randn(2, 9), torch.zeros_like(action_mask), response_mask, alpha=0.1)
    assert torch.equal(weights, 0.1 * response_mask.float())


def test_equal_energies_give_the_middle_of_the_range():
    weights = token_weights(torch.full((2, 9), -1e4), action_mask, response_mask, beta=0.5)
    torch.testing.assert_close(weights[action_mask], torch.full((6,), 1.25))


@pytest.mark.parametrize("change, name", [
    ({"alpha": 2}, "alpha"), ({"alpha": -0.1}, "alpha"), ({"alpha": float("nan")}, "alpha"),
    ({"beta": -1}, "beta"), ({"beta": float("inf")}, "beta"),
    ({"action_mask": action_mask[:, :5]}, "action_mask"), ({"action_mask": action_mask.long()}, "action_mask"),
    ({"response_mask": response_mask.float()}, "response_mask"),
    ({"response_mask": torch.zeros_like(response_mask)}, "action_mask"),
    ({"signal": torch.full((2, 9), float("nan"))}, "signal"), ({"signal": torch.full((2, 9), float("inf"))}, "signal")])
def test_bad_arguments_are_named(change, name):
    arguments = {"signal": torch.zeros(2, 9), "action_mask": action_mask, "response_mask": response_mask} | change
    with pytest.raises(ValueError, match=name):
        token_weights(**arguments)


def test_the_signals_are_what_they_are_called(randn):
    logits, targets, old = 4 * randn(6, 7), torch.tensor([0, 6, 3, 3, 1, 5]), -randn(6).abs()
    p = [[math.exp(x) / sum(math.exp(y) for y in row) for x in row] for row in logits.tolist()]
    naive = {"energy": [-math.log(sum(math.exp(x) for x in row)) for row in logits.tolist()],
             "entropy": [-sum(x * math.log(x) for x in row) for row in p],
             "nll": [-x for x in old.tolist()],
             "shift": [x - math.log(row[y]) for x, row, y in zip(old.tolist(), p, targets.tolist())]}
    assert SIGNALS.keys() >= naive.keys() | {"random"}
    for name, values in naive.items():
        assert SIGNALS[name](logits, targets, old).tolist() == pytest.approx(values, rel=1e-6)
        half = logits.bfloat16()  # sums are float32's
        torch.testing.assert_close(SIGNALS[name](half, targets, old), SIGNALS[name](half.float(), targets, old), check_dtype=False)
    logprobs = [math.log(row[y]) for row, y in zip(p, targets.tolist())]
    assert token_logprobs(logits, targets).tolist() == pytest.approx(logprobs, rel=1e-12)
    once, again = (SIGNALS["random"](logits, targets, old) for _ in range(2))
    assert once.shape == (6,) and ((0 <= once) & (once < 1)).all() and not torch.equal(once, again)


@pytest.mark.parametrize("name", SIGNALS)
def test_a_signal_of_no_tokens_is_empty(name):
    assert SIGNALS[name](torch.zeros(0, 7), torch.zeros(0, dtype=torch.long), torch.zeros(0)).shape == (0,)


# Loss


def loss_inputs(randn):
    logprobs = (-randn(2, 9).abs()).requires_grad_()
    old = (logprobs + 0.3 * randn(2, 9)).detach()
    return logprobs, old, randn(2, 9), torch.where(response_mask, randn(2, 9).abs() + 0.1, 0.0)


def naive_loss(logprobs, old, advantages, weights, low=0.2, high=0.28):
    total, norm = 0.0, 0.0
    for b in range(2):
        for t in range(9):
            ratio = math.exp(logprobs[b, t].item() - old[b, t].item())
            advantage = advantages[b, t].item()
            surrogate = min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)
            total += weights[b, t].item() * surrogate
            norm += weights[b, t].item()
    return -total / norm


def test_loss_is_the_papers_formula(randn):
    logprobs, old, advantages, weights = loss_inputs(randn)
    loss, _ = weighted_policy_loss(logprobs, old, advantages, weights)
    assert loss.item() == pytest.approx(naive_loss(logprobs, old, advantages, weights), rel=1e-12)


def test_loss_gradient_matches_finite_differences(randn):
    logprobs, old, advantages, weights = loss_inputs(randn)
    assert torch.autograd.gradcheck(lambda x: weighted_policy_loss(x, old, advantages, weights)[0], logprobs)


def test_with_alpha_1_and_beta_0_loss_and_gradient_are_the_plain_algorithms_bit_for_bit(randn):
    logprobs, old, advantages, _ = (x.detach().float() for x in loss_inputs(randn))
    results = []
    for plain in (False, True):
        x = logprobs.clone().requires_grad_()
        if plain:  # PPO's clipped token mean, as written in its paper
            ratio = (x - old).exp()
            terms = torch.min(ratio * advantages, ratio.clamp(0.8, 1.28) * advantages) * response_mask
            loss = -terms.sum() / response_mask.sum()
        else:
            weights = token_weights(torch.zeros(2, 9), action_mask, response_mask, alpha=1, beta=0)
            loss, _ = weighted_policy_loss(x, old, advantages, weights)
        loss.backward()
        results.append((loss.detach(), x.grad))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


def test_micro_batches_add_up_to_the_minibatch(randn):
    logprobs, old, advantages, weights = loss_inputs(randn)
    whole, _ = weighted_policy_loss(logprobs, old, advantages, weights)
    gradient, = torch.autograd.grad(whole, logprobs)
    parts = sum(weighted_policy_loss(logprobs[i:i + 1], old[i:i + 1], advantages[i:i + 1], weights[i:i + 1],
                                     weight_sum=weights.sum())[0] for i in range(2))
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(torch.autograd.grad(parts, logprobs)[0], gradient)


def test_padding_may_hold_anything(randn):
    logprobs, old, advantages, weights = loss_inputs(randn)
    expected, _ = weighted_policy_loss(logprobs, old, advantages, weights)
    expected_grad, = torch.autograd.grad(expected, logprobs)
    dirty = torch.where(response_mask, logprobs.detach(), float("nan")).requires_grad_()
    loss, stats = weighted_policy_loss(dirty, torch.where(response_mask, old, -float("inf")),
                                       torch.where(response_mask, advantages, float("inf")), weights)
    loss.backward()
    assert torch.equal(loss, expected) and torch.equal(dirty.grad, expected_grad)
    assert all(torch.isfinite(value) for value in stats.values())


def test_extreme_ratios_stay_finite():
    logprobs = torch.tensor([[0.0, -1e4, 0.0, -1e4]], requires_grad=True)
    old = torch.tensor([[-1e4, 0.0, -1e4, 0.0]])
    loss, stats = weighted_policy_loss(logprobs, old, torch.tensor([[1.0, 1.0, -1.0, -1.0]]), torch.ones(1, 4))
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(logprobs.grad).all() and stats["clip_fraction"] == 1


def test_no_weight_no_loss(randn):
    logprobs, old, advantages, weights = loss_inputs(randn)
    loss, stats = weighted_policy_loss(logprobs, old, advantages, torch.zeros_like(weights))
    loss.backward()
    assert loss == 0 and not logprobs.grad.any() and stats["ratio_mean"] == 0


def test_log_probs_of_bfloat16_logits_want_float32():
    """README's loop casts the logits: without, a log-prob near -10 is one in 0.06, and the logits' gradient goes wrong."""
    assert torch.tensor([-10.0, -10.03, -10.06]).bfloat16().unique().diff().tolist() == [0.0625]
    logits, errors = 3 * torch.randn(64, 5000, generator=torch.Generator().manual_seed(0)), []
    targets, advantages = torch.arange(64), torch.linspace(-1, 1, 64)[None]

    def gradient(cast, leaf):
        leaf = leaf.requires_grad_()
        old = leaf.detach().double().log_softmax(-1)[range(64), targets][None]
        loss, _ = weighted_policy_loss(cast(leaf).log_softmax(-1)[range(64), targets][None], old, advantages, torch.ones(1, 64))
        return torch.autograd.grad(loss, leaf)[0].double()
    right = gradient(torch.Tensor.double, logits.bfloat16().double())
    for cast in (torch.Tensor.float, lambda x: x):
        errors.append((gradient(cast, logits.bfloat16()) - right).norm() / right.norm())
    assert errors[0] < 3e-3 and errors[1] > 4 * errors[0]


DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_sum", [None, 0.0])
def test_without_any_weight_the_loss_is_0_in_every_precision(randn, dtype, weight_sum):
    logprobs, old, advantages, weights = (x.detach().to(dtype) for x in loss_inputs(randn))
    loss, stats = weighted_policy_loss(logprobs.requires_grad_(), old, advantages, 0 * weights, weight_sum=weight_sum)
    loss.backward()
    assert loss == 0 and not logprobs.grad.any() and all(value == 0 for value in stats.values())
    assert weighted_policy_loss(logprobs, old, advantages, 0 * weights, weight_sum=weights.sum() * 0)[0] == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_ratio_that_half_precision_cannot_hold_has_a_finite_loss_and_gradient(dtype):
    """exp(13) is 442413, and float16 ends at 65504."""
    logprobs, old, advantages = torch.zeros(3, 1, 16, dtype=dtype)
    old[0, :2], advantages[0, :3] = -13, torch.tensor([1.0, -1.0, 1.0])
    loss, stats = weighted_policy_loss(logprobs.requires_grad_(), old, advantages, torch.ones(1, 16, dtype=dtype))
    loss.backward()
    assert loss.item() == pytest.approx((-1.28 + math.exp(13) - 1) / 16, rel=1e-6)
    assert logprobs.grad[0, :3].tolist() == pytest.approx([0, math.exp(13) / 16, -1 / 16], rel=1e-2)
    assert stats["ratio_mean"].item() == pytest.approx((2 * math.exp(13) + 14) / 16, rel=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_in_half_precision_add_up_as_others_do(dtype):
    ones = torch.ones(1, 70_001, dtype=dtype)  # their sum is more than float16 can hold, and no number of bfloat16
    loss, _ = weighted_policy_loss(0 * ones, 0 * ones, ones, ones)
    assert loss.item() == pytest.approx(-1, rel=1e-6)


def test_statistics_are_plain_means_over_tokens_that_count(randn):
    logprobs, old, advantages, weights = loss_inputs(randn)
    _, stats = weighted_policy_loss(logprobs, old, advantages, weights)
    log_ratio = (logprobs - old)[weights > 0]
    assert stats["ratio_mean"].item() == pytest.approx(log_ratio.exp().mean().item())
    assert stats["approx_kl"].item() == pytest.approx((log_ratio.exp() - 1 - log_ratio).mean().item())
    assert stats["clip_fraction"].item() == pytest.approx(
        ((log_ratio.exp() < 0.8) | (log_ratio.exp() > 1.28)).double().mean().item())


def test_the_kl_of_a_small_update_is_not_rounded_away():
    """rho - 1 - log rho is half the square of a small log-ratio; in float32, rho - 1 alone is off by 1e-7."""
    old = torch.full((1, 10), -2.0)
    stats = weighted_policy_loss(old + 1e-4, old, old, torch.ones(1, 10))[1]
    assert stats["approx_kl"].item() == pytest.approx(0.5e-8, rel=2e-3)


def test_one_clip_range_may_be_a_number_and_the_other_one_a_token(randn):
    arguments, of_each = loss_inputs(randn), torch.full((2, 9), 0.1, dtype=torch.float64)
    expected = weighted_policy_loss(*arguments, clip_low=0.1, clip_high=0.1)[0]
    assert weighted_policy_loss(*arguments, clip_low=0.1, clip_high=of_each)[0] == expected
    assert weighted_policy_loss(*arguments, clip_low=of_each, clip_high=0.1)[0] == expected


INPUTS = ("logprobs", "old_logprobs", "advantages", "weights")


@pytest.mark.parametrize("name", INPUTS)
def test_a_bad_number_on_a_token_that_counts_is_named(randn, name):
    arguments = dict(zip(INPUTS, (x.detach() for x in loss_inputs(randn))))
    arguments[name][0, 1] = float("nan")
    with pytest.raises(ValueError, match=name):
        weighted_policy_loss(**arguments)


@pytest.mark.parametrize("change, words", [
    ({"weights": torch.full((2, 9), -1.0)}, "weights"), ({"weights": torch.ones(2, 8)}, "weights"),
    ({"weight_sum": 0.0}, "weight_sum"), ({"weight_sum": -1.0}, "weight_sum"), ({"weight_sum": math.nan}, "weight_sum"),
    ({"weight_sum": torch.ones(1)}, "weight_sum"), ({"weight_sum": torch.ones(2, 1)}, "weight_sum"),
    ({"clip_low": -0.1}, "clip_low"), ({"clip_low": 1.5}, "clip_low"), ({"clip_low": float("nan")}, "clip_low"),
    ({"clip_high": -1.0}, "clip_high"), ({"clip_high": torch.zeros(9)}, "clip_high")])
def test_weights_and_clip_ranges_that_make_no_sense_are_named(randn, change, words):
    arguments = dict(zip(INPUTS, (x.detach() for x in loss_inputs(randn))))
    with pytest.raises(ValueError, match=words):
        weighted_policy_loss(**arguments | change)


# Advantages


def test_group_advantages_are_z_scores_within_each_group(randn):
    returns = randn(5, 8)
    advantages = group_advantages(returns)
    for row, values in zip(advantages.tolist(), returns.tolist()):
        mean = sum(values) / 8
        std = math.sqrt(sum((v - mean) ** 2 for v in values) / 7)
        assert row == pytest.approx([(v - mean) / (std + 1e-6) for v in values], rel=1e-5)


@pytest.mark.parametrize("group", [[2.0] * 4, [0.1 + 0.2, 0.3, 0.3, 0.3], [1e8, 1e8 + 9, 1e8, 1e8], [0.0] * 4])
def test_a_group_without_spread_gives_zero(group):
    assert torch.equal(group_advantages(torch.tensor([group], dtype=torch.float64)), torch.zeros(1, 4))
    assert len(variance_filter(torch.tensor([group], dtype=torch.float64))) == 0


def test_how_small_a_spread_counts_depends_on_the_returns():
    """Rounding is relative: where all are tiny, a tiny difference is one."""
    assert variance_filter(torch.tensor([[1e-9, 1e-9], [1e-9, 3e-9]]), keep=1).tolist() == [1]


def test_a_group_of_one_gives_zero():
    assert torch.equal(group_advantages(torch.tensor([[3.0], [4.0]])), torch.zeros(2, 1))


def naive_gae(rewards, values, gamma, lam):
    """One trajectory of response tokens only: the textbook recursion."""
    advantages, following, next_value = [], 0.0, 0.0
    for r, v in zip(reversed(rewards), reversed(values)):
        following = r + gamma * next_value - v + gamma * lam * following
        next_value = v
        advantages.append(following)
    return advantages[::-1]


@pytest.mark.parametrize("gamma, lam", [(1.0, 1.0), (0.9, 0.8), (1.0, 0.0), (0.0, 1.0)])
def test_gae_is_the_textbook_recursion_on_response_tokens(randn, gamma, lam):
    rewards, values = randn(2, 9), randn(2, 9)
    advantages, returns = gae(rewards, values, response_mask, gamma=gamma, lam=lam)
    here = response_mask[0]
    for b in range(2):
        naive = naive_gae(rewards[b][here].tolist(), values[b][here].tolist(), gamma, lam)
        assert advantages[b][here].tolist() == pytest.approx(naive)
        assert returns[b][here].tolist() == pytest.approx((torch.tensor(naive) + values[b][here]).tolist())
    assert not advantages[~response_mask].any() and not returns[~response_mask].any()


def test_observations_between_turns_change_no_advantage(randn):
    rewards, values = randn(1, 6), randn(1, 6)
    dense = torch.ones(1, 6, dtype=torch.bool)
    apart = torch.tensor([[False, True, True, True, False, False, False, True, True, False, True, False]])
    spread = lambda x: torch.full((1, 12), 99.0, dtype=torch.float64).masked_scatter(apart, x)  # 99: must not be read
    advantages, returns = gae(rewards, values, dense, gamma=0.9, lam=0.7)
    with_gaps = gae(spread(rewards), spread(values), apart, gamma=0.9, lam=0.7)
    assert torch.equal(with_gaps[0][apart], advantages[0]) and torch.equal(with_gaps[1][apart], returns[0])


def test_gae_of_integers_and_of_half_precision_is_that_of_their_values(randn):
    rewards, values = (10 * randn(2, 9)).round().long(), (10 * randn(2, 9)).round().long()
    expected = gae(rewards.double(), values.double(), response_mask, gamma=0.9, lam=0.8)
    for dtype in (torch.long, torch.int32, torch.bfloat16, torch.float16, torch.float32):  # 40 is exact in each
        actual = gae(rewards.to(dtype), values.to(dtype), response_mask, gamma=0.9, lam=0.8)
        for a, e in zip(actual, expected):
            assert a.dtype == torch.float32
            torch.testing.assert_close(a.double(), e, atol=1e-5, rtol=1e-6)
    mixed = gae(rewards, values.double(), response_mask, gamma=0.9, lam=0.8)
    assert mixed[0].dtype == torch.float64 and torch.equal(mixed[0], expected[0])


def test_whitened_is_mean_0_and_deviation_1_over_the_mask(randn):
    x = torch.where(response_mask, 7 + 3 * randn(2, 9), float("nan"))
    values = x[response_mask].tolist()
    mean = sum(values) / len(values)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))
    actual = whiten(x, response_mask)
    assert actual[response_mask].tolist() == pytest.approx([(value - mean) / deviation for value in values], abs=1e-5)
    assert not actual[~response_mask].any()
    small = whiten(torch.tensor([[-1e-6, 1e-6]]), torch.ones(1, 2, dtype=torch.bool))  # its deviation counts 1e-6 more
    assert small.tolist() == [pytest.approx([-0.5, 0.5], rel=1e-4)]


@pytest.mark.parametrize("value", [10.4, -0.4, 100.1])
@pytest.mark.parametrize("tokens", [50, 4097])
def test_equal_numbers_whitened_are_0(value, tokens):
    """Where every return is one number there is nothing to learn, and rounding is no advantage."""
    assert whiten(torch.full((8, tokens), value), torch.ones(8, tokens, dtype=torch.bool)).abs().max() < 1e-3


@pytest.mark.parametrize("bad", [{"gamma": 1.01}, {"gamma": -0.1}, {"lam": 1.01}, {"lam": float("nan")}])
def test_gae_names_a_discount_outside_0_and_1(randn, bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        gae(randn(2, 9), randn(2, 9), response_mask, **bad)


def test_gae_with_1_1_is_return_minus_value(randn):
    rewards, values = randn(2, 9), randn(2, 9)
    advantages, _ = gae(rewards, values, response_mask)
    to_go = (rewards * response_mask).flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(advantages[response_mask], (to_go - values)[response_mask])


# Filter and evidence


def test_filter_keeps_the_widest_groups_first():
    returns = torch.tensor([[0.0, 1], [0, 5], [2, 2], [0, 3], [1, 1], [0, 4], [0, 2], [7, 7]])
    assert variance_filter(returns).tolist() == [1, 5]
    assert variance_filter(returns, keep=1).tolist() == [1, 5, 3, 6, 0]  # groups without spread never
    assert variance_filter(returns, keep=0.01).tolist() == [1]
    assert variance_filter(torch.ones(4, 4)).tolist() == []


@pytest.mark.parametrize("keep", [0, -1, 1.5, float("nan")])
def test_filter_refuses_a_share_outside_0_1(keep):
    with pytest.raises(ValueError, match="keep"):
        variance_filter(torch.rand(4, 4), keep)


def test_spearman_known_values():
    assert spearman(torch.tensor([1.0, 2, 3, 4]), torch.tensor([10.0, 20, 30, 25])) == pytest.approx(0.8)
    assert spearman(torch.arange(9.0), -torch.arange(9.0) ** 3) == pytest.approx(-1)
    # ranks 1 2.5 2.5 4 against 1 2 3 4
    tied = spearman(torch.tensor([1.0, 2, 2, 3]), torch.tensor([1.0, 2, 3, 4]))
    assert tied == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert math.isnan(spearman(torch.ones(5), torch.arange(5.0))) and math.isnan(spearman(torch.ones(1), torch.ones(1)))


# Credits


def settings(**changes):
    return Settings(**{"algos": ("grpo",), "prompts": 3, "rollouts": 2} | changes)


def batch_of(randn):
    return SimpleNamespace(signal=randn(2, 9), action_mask=action_mask, response_mask=response_mask,
                           returns=torch.tensor([1.0, 4]), gae_advantages=randn(2, 9), weights=randn(2, 9).abs())


def test_plain_credit_weighs_all_tokens_alike_and_actfocus_weighs_by_its_signal(randn):
    batch, s = batch_of(randn), settings(alpha=0.3, beta=0.7, clip_low=0.1, clip_high=0.4)
    plain, focused = (make_credit(name, "grpo", s) for name in ("uniform", "actfocus"))
    assert torch.equal(plain.weights(batch), response_mask.float())
    expected = token_weights(batch.signal, action_mask, response_mask, alpha=0.3, beta=0.7)
    assert torch.equal(focused.weights(batch), expected) and expected.unique().numel() > 4
    for credit in (plain, focused):
        assert credit.ratio(batch.signal, batch) == (batch.signal, 0.1, 0.4)
        assert credit.normaliser(batch) == batch.weights.sum()
        z = 1.5 / (4.5 ** 0.5 + 1e-6)
        torch.testing.assert_close(credit.advantages(batch), torch.tensor([[-z], [z]]) * response_mask)
    of_ppo = make_credit("actfocus", "ppo", s).advantages(batch)
    assert torch.equal(of_ppo, whiten(batch.gae_advantages, response_mask))


@pytest.mark.parametrize("keep, algo, returns, rows", [
    (0.4, "grpo", [[1, 2], [0, 5], [3, 3]], [2, 3]), (0.7, "grpo", [[1, 2], [0, 5], [3, 3]], [2, 3, 0, 1]),
    (0.4, "ppo", [[1, 2], [0, 5], [3, 3]], [2, 3]), (1.0, "grpo", [[1, 2], [0, 5], [3, 3]], [0, 1, 2, 3, 4, 5]),
    (1.0, "grpo", [[1, 1], [2, 2], [3, 3]], []), (1.0, "ppo", [[1, 1], [2, 2], [3, 3]], [0, 1, 2, 3, 4, 5]),
    (0.4, "ppo", [[1, 1], [2, 2], [3, 3]], [])])
def test_what_is_trained_on_are_whole_groups_and_all_of_them_without_the_filter(keep, algo, returns, rows):
    """GRPO learns nothing where no group has any spread; PPO's critic does."""
    returns = torch.tensor(returns, dtype=torch.float32).flatten()
    played = SimpleNamespace(returns=returns, select=lambda rows: rows.tolist())
    assert make_credit("uniform", algo, settings(keep=keep)).filter(played) == rows


class Doubled(Credit):
    """A credit method as somebody else would write it."""

    factor, words, loud = 2.0, "plain", True

    def advantages(self, batch):
        return self.factor * super().advantages(batch)


def test_methods_are_joined_and_have_settings_of_their_own(randn, monkeypatch):
    monkeypatch.setitem(CREDITS, "doubled", f"{__name__}:Doubled")
    s, batch = settings(), batch_of(randn)
    joined = make_credit("doubled+actfocus:alpha=0.5,factor=3,words=other,loud=false", "grpo", s)
    assert isinstance(joined, ActFocus) and isinstance(joined, Doubled)
    assert (joined.factor, joined.words, joined.loud) == (3.0, "other", False)
    assert (joined.settings.alpha, joined.settings.beta) == (0.5, s.beta)
    plain = make_credit("uniform", "grpo", s)
    assert torch.equal(joined.advantages(batch), 3 * plain.advantages(batch))
    assert (joined.weights(batch)[response_mask & ~action_mask] == 0.5).all()
    assert Doubled.factor == 2.0 and s == settings()
    changed = dataclasses.asdict(joined.settings) | {"alpha": s.alpha, "credits": s.credits}
    assert changed == dataclasses.asdict(s)


@pytest.mark.parametrize("text, words", [
    ("magic", "magic"), ("", "not one of"), ("actfocus+magic", "magic"), ("actfocus+actfocus", "weights"),
    ("doubled+carl", "advantages"), ("uniform+actfocus", "join"), ("actfocus+uniform", "join"),
    ("actfocus:gravity=1", "gravity"), ("actfocus:steps=3", "steps"), ("actfocus:seeds=3", "seeds"),
    ("actfocus:alpha=high", "high"), ("actfocus:alpha", "alpha"), ("actfocus:alpha=2", "alpha"),
    ("actfocus:signal=loudness", "loudness"), ("actfocus:0.3", "KEY=VALUE"), ("actfocus:alpha=0,alpha=1", "twice"),
    ("louder+carl", "advantages"), ("louder+doubled", "advantages"), ("actfocus:_x=1", "_x"), ("doubled:factor=much", "much"),
    ("doubled:loud=maybe", "maybe"), ("uniform:algo=ppo", "algo")])
def test_a_credit_that_cannot_be_is_refused(monkeypatch, text, words):
    monkeypatch.setitem(CREDITS, "doubled", Doubled)
    monkeypatch.setitem(CREDITS, "louder", type("Louder", (Doubled,), {}))  # what it inherits is its own answer, too
    with pytest.raises(ValueError, match=words):
        make_credit(text, "grpo", settings())


def test_a_method_says_which_algorithms_it_goes_with(monkeypatch):
    monkeypatch.setattr(Doubled, "algos", ("ppo",))
    monkeypatch.setitem(CREDITS, "doubled", Doubled)
    make_credit("doubled", "ppo", settings()).check(None)
    with pytest.raises(ValueError, match="--algos ppo alone"):
        make_credit("doubled", "grpo", settings()).check(None)


class Timid(Credit):
    """Another one, for PPO alone, that can be joined with what has advantages of its own."""

    algos = ("ppo",)

    def weights(self, batch):
        return super().weights(batch) / 2


@pytest.mark.parametrize("text", ["timid+carl", "carl+timid"])
@pytest.mark.parametrize("algo", ["ppo", "grpo"])
def test_methods_that_are_joined_go_with_what_both_go_with(monkeypatch, text, algo):
    monkeypatch.setitem(CREDITS, "timid", Timid)
    with pytest.raises(ValueError, match="--algos|join"):
        make_credit(text, algo, settings()).check(settings().make_env())


def test_only_the_new_log_probs_carry_a_gradient(randn):
    """What a user's own loop hands over may still hang on its graph."""
    given = [x.detach().requires_grad_() for x in loss_inputs(randn)]
    loss, stats = weighted_policy_loss(*given)
    loss.backward()
    weighted_policy_loss(*given, weight_sum=given[3].sum())[0].backward()
    assert given[0].grad is not None and all(x.grad is None for x in given[1:])
    assert not any(x.requires_grad for x in (*stats.values(), *gae(given[1], given[2], response_mask)))


def test_energies_a_hundredth_of_a_nat_apart_are_ranked_and_rounding_is_not():
    here = torch.ones(1, 1000, dtype=torch.bool)
    apart = 0.01 * (-1.0) ** torch.arange(1000)[None]
    middle = 1 + 0.5 / (1 + math.exp(-1))
    assert token_weights(apart, here, here)[0, 0].item() == pytest.approx(middle, abs=1e-3)
    equal = token_weights(torch.full((1, 1000), -12345.678), here, here)
    torch.testing.assert_close(equal, torch.full_like(equal, 1.25))


def test_a_tenth_in_ten_is_a_difference_and_a_share_of_groups_is_not_rounded_down():
    returns = torch.tensor([[10.8, 10.7, 10.8, 10.7]])
    assert group_advantages(returns).abs().min() > 0.5 and len(variance_filter(returns)) == 1
    assert len(variance_filter(torch.arange(200.0).view(100, 2) ** 2, keep=0.29)) == 29  # 0.29 * 100 is 28.999...


@pytest.mark.parametrize("name", ["rewards", "values"])
def test_gae_names_what_is_not_finite(randn, name):
    given = {"rewards": randn(2, 9), "values": randn(2, 9)}
    given[name][0, 1] = math.nan
    with pytest.raises(ValueError, match=name):
        gae(**given, response_mask=response_mask)


def test_the_clip_fraction_counts_below_and_above_by_their_own_bounds():
    ratio, ones = torch.tensor([[0.75, 0.85, 1.25, 1.3]]), torch.ones(1, 4)
    assert weighted_policy_loss(ratio.log(), 0 * ones, ones, ones)[1]["clip_fraction"] == 0.5
    assert weighted_policy_loss(0 * ones, 0 * ones, ones, ones, clip_low=0, clip_high=0)[1]["clip_fraction"] == 0  # at both
