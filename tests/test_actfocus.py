"""Every formula of actfocus.py against a naive float64 version written from the paper's text."""

import math

import pytest
import torch

from actfocus import (
    SIGNALS,
    gae,
    group_advantages,
    spearman,
    token_energy,
    token_signal,
    token_weights,
    variance_filter,
    weighted_policy_loss,
)

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
    torch.testing.assert_close(token_energy(logits + 3), token_energy(logits) - 3)  # not shift-invariant: no softmax before it


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
        token_weights(arguments.pop("signal"), arguments.pop("action_mask"), arguments.pop("response_mask"), **arguments)


def test_the_four_signals(randn):
    old, ref, energy, entropy = randn(2, 9), randn(2, 9), randn(2, 9), randn(2, 9)
    signals = {name: token_signal(name, old_logprobs=old, ref_logprobs=ref, ref_energy=energy, ref_entropy=entropy)
               for name in SIGNALS}
    assert torch.equal(signals["energy"], energy) and torch.equal(signals["entropy"], entropy)
    assert torch.equal(signals["nll"], -old) and torch.equal(signals["shift"], old - ref)
    with pytest.raises(ValueError, match="signal"):
        token_signal("loudness", old_logprobs=old, ref_logprobs=ref, ref_energy=energy, ref_entropy=entropy)


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


def test_statistics_are_plain_means_over_tokens_that_count(randn):
    logprobs, old, advantages, weights = loss_inputs(randn)
    _, stats = weighted_policy_loss(logprobs, old, advantages, weights)
    log_ratio = (logprobs - old)[weights > 0]
    assert stats["ratio_mean"].item() == pytest.approx(log_ratio.exp().mean().item())
    assert stats["approx_kl"].item() == pytest.approx((log_ratio.exp() - 1 - log_ratio).mean().item())
    assert stats["clip_fraction"].item() == pytest.approx(
        ((log_ratio.exp() < 0.8) | (log_ratio.exp() > 1.28)).double().mean().item())


@pytest.mark.parametrize("name", ["logprobs", "old_logprobs", "advantages", "weights"])
def test_a_bad_number_on_a_token_that_counts_is_named(randn, name):
    arguments = dict(zip(("logprobs", "old_logprobs", "advantages", "weights"), (x.detach() for x in loss_inputs(randn))))
    arguments[name][0, 1] = float("nan")
    with pytest.raises(ValueError, match=name):
        weighted_policy_loss(**arguments)


# Advantages


def test_group_advantages_are_z_scores_within_each_group(randn):
    returns = randn(5, 8)
    advantages = group_advantages(returns)
    for row, values in zip(advantages.tolist(), returns.tolist()):
        mean = sum(values) / 8
        std = math.sqrt(sum((v - mean) ** 2 for v in values) / 7)
        assert row == pytest.approx([(v - mean) / (std + 1e-6) for v in values], rel=1e-5)


@pytest.mark.parametrize("group", [[2.0] * 4, [0.1 + 0.2, 0.3, 0.3, 0.3], [1e8, 1e8 + 1e-6, 1e8, 1e8], [0.0] * 4])
def test_a_group_without_spread_gives_zero(group):
    assert torch.equal(group_advantages(torch.tensor([group], dtype=torch.float64)), torch.zeros(1, 4))
    assert len(variance_filter(torch.tensor([group], dtype=torch.float64))) == 0


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
    assert spearman(torch.tensor([1.0, 2, 2, 3]), torch.tensor([1.0, 2, 3, 4])) == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert math.isnan(spearman(torch.ones(5), torch.arange(5.0))) and math.isnan(spearman(torch.ones(1), torch.ones(1)))
