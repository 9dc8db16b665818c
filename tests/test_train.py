"""The loop: what a step computes, what a run writes, how it is extended, and how it refuses bad settings."""

import contextlib
import copy
import dataclasses
import io
import json
import os
import runpy
import shutil
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, CohereConfig, CohereForCausalLM

import env as environments
import train
from actfocus import CREDITS, SIGNALS, ActFocus, Credit, Critic, token_weights
from extras import runs
from extras.agent import teach
from extras.guard import load_tokenizer
from extras.metrics import updates as said_of_updates
from extras.options import SettingsParser, make_credit
from rollout import Chat, Transcript, load_agent, pack, score
from train import Arm, Settings

ROOT = Path(train.__file__).parent
SMALL = {"prompts": 2, "rollouts": 4, "keep": 1.0, "minibatch": 4, "micro_batch": 4, "eval_boards": 2,
         "eval_rollouts": 2, "eval_every": 2, "steps": 2}
COMMAND = [word for name, value in SMALL.items() for word in ("--" + name.replace("_", "-"), str(value))]
RETURNS = [1.0, -1.0, 2.0, 0.5, 0.0, -0.5]  # of two groups of three
UP, LEFT = "<think>The box.</think><answer>Up</answer>", "<think>Up.</think><answer>Left || Down</answer>"
HALF = lambda settings: torch.autocast("cpu", torch.bfloat16)  # as on a GPU
BOARDS = ["walls=0", "min_moves=2", "max_moves=4", "max_turns=2", "max_actions=4", "observation=coordinates"]
BRIEF = ["--steps", "1", "--eval-boards", "1", "--eval-rollouts", "1"]
TIMED = ("tokens_per_second", "rollout_seconds", "seconds")


def arm_of(algo="grpo", credit="actfocus", **settings):
    """An arm whose groups are the two of RETURNS: all of them are one minibatch, unless it is said otherwise."""
    settings = SMALL | {"rollouts": 3, "minibatch": 6, "algos": (algo,), "lr": 1e-3} | settings
    return Arm(Settings(**settings), algo, credit, 0)


def trajectories_of(arm, rewards, answers=((UP,), (UP, LEFT)), group=3):
    """Scripted episodes with the given returns and, in turn, each of the answers: a turn or two, if not said."""
    chat, transcripts = Chat(arm.tokenizer, arm.env.system_prompt), []
    for i, reward in enumerate(rewards):
        transcript = Transcript(chat, copy.deepcopy(arm.env), i // group, 10**6, 100)
        for answer in answers[i % len(answers)]:
            transcript.respond(arm.tokenizer(answer).input_ids + [arm.tokenizer.eos_token_id])
        transcript.rewards = [0.0] * (len(transcript.rewards) - 1) + [reward]
        transcripts.append(transcript)
    return pack(transcripts)


def scripted(arm, rewards=RETURNS, **how):
    """The arm, which from now on plays scripted episodes."""
    played = trajectories_of(arm, rewards, **how)
    arm.credit.play = lambda *_: played
    return arm


def batch_of(arm, rewards=RETURNS):
    """What a step would train on."""
    batch = arm.make_batch(trajectories_of(arm, rewards))
    batch.advantages, batch.weights = arm.credit.advantages(batch), arm.credit.weights(batch)
    return batch


# Scoring


def test_scores_are_those_of_the_full_logits():
    arm = arm_of()
    data = trajectories_of(arm, RETURNS)
    stats = score(arm.policy, data.ids, data.response_mask, temperature=0.7)
    logits = arm.policy(data.ids).logits[:, :-1].double()
    log_p = torch.log_softmax(logits / 0.7, -1)
    here = data.response_mask[:, 1:]
    expected = {"logprobs": log_p.gather(-1, data.ids[:, 1:, None])[..., 0], "logsumexp": torch.logsumexp(logits, -1),
                "entropy": -(log_p.exp() * log_p).sum(-1)}
    for name, values in expected.items():
        actual = getattr(stats, name)
        torch.testing.assert_close(actual[:, 1:][here].double(), values[here], atol=1e-4, rtol=0)
        assert not actual[~data.response_mask].any()


def test_the_critics_value_of_a_token_does_not_see_it():
    """V(before token t) must not change with token t or anything after it."""
    arm = arm_of()
    data, critic = trajectories_of(arm, RETURNS), Critic(arm.policy)
    torch.nn.init.normal_(critic.head.weight)
    with torch.no_grad():
        values = critic(data.ids, data.response_mask)
        t = int(data.response_mask[0].nonzero()[4])
        changed = data.ids.clone()
        changed[0, t:] = 5
        again = critic(changed, data.response_mask)
    assert torch.equal(again[0, : t + 1], values[0, : t + 1]) and not torch.equal(again[0, t + 1:], values[0, t + 1:])


def moved(arm):
    """The arm, its policy no longer the reference."""
    with torch.no_grad():
        for parameter in arm.policy.parameters():
            parameter.mul_(1.1)
    return arm


def test_energy_comes_from_the_frozen_reference():
    """After the policy has moved, the energies are still the reference's, and its weights are untouched."""
    arm = arm_of()
    before, after = batch_of(arm), batch_of(moved(arm))
    assert torch.equal(before.energy, after.energy) and torch.equal(before.weights, after.weights)
    assert not torch.equal(before.old_logprobs, after.old_logprobs)
    logits, here = arm.reference(after.ids).logits[:, :-1], after.response_mask[:, 1:]
    torch.testing.assert_close(after.energy[:, 1:][here], -torch.logsumexp(logits, -1)[here], atol=1e-4, rtol=0)
    torch.testing.assert_close(after.ref_logprobs, before.old_logprobs, atol=1e-5, rtol=0)  # they began as one model


def test_every_signal_is_of_the_token_that_it_stands_at():
    for name in SIGNALS:
        arm = moved(arm_of(signal=name))
        batch = batch_of(arm)
        here, targets = batch.response_mask[:, 1:], batch.ids[:, 1:, None]
        old, ref = (torch.log_softmax(model(batch.ids).logits[:, :-1], -1) for model in (arm.policy, arm.reference))
        taken = lambda log_p: log_p.gather(-1, targets)[..., 0]
        expected = {"entropy": -(ref.exp() * ref).sum(-1), "nll": -taken(old), "shift": taken(old) - taken(ref),
                    "energy": batch.energy[:, 1:]}.get(name)
        if expected is not None:
            torch.testing.assert_close(batch.signal[:, 1:][here], expected[here], atol=1e-4, rtol=0)
        weights = token_weights(batch.signal, batch.action_mask, batch.response_mask, alpha=0.1, beta=0.5)
        assert torch.equal(batch.weights, weights) and batch.weights[batch.action_mask].std() > 0.01


def test_ppo_pays_the_return_on_the_last_response_token():
    batch = batch_of(arm_of("ppo"))
    # The critic starts at 0 and gamma = lambda = 1: every response token's target is the episode's return.
    for targets, mask, value in zip(batch.value_targets, batch.response_mask, RETURNS):
        assert torch.allclose(targets[mask], torch.tensor(value)) and not targets[~mask].any()
    whitened = batch.advantages[batch.response_mask]
    assert whitened.mean().item() == pytest.approx(0, abs=1e-5)
    assert whitened.std(correction=0).item() == pytest.approx(1, abs=1e-3)
    for less in ("gamma", "lam"):  # then the return is whole at the last token alone
        late = batch_of(arm_of("ppo", **{less: 0.5})).value_targets
        for targets, mask, value in zip(late, batch.response_mask, RETURNS):
            assert targets[mask][-1] == value and targets[mask][-2] == value / 2


# The update


def by_hand(arm, data, credit):
    """Gradients of the papers' loss from full logits, the policy being still the old one and its own reference."""
    model, mask, action = arm.reference.requires_grad_(True), data.response_mask[:, 1:], data.action_mask[:, 1:]
    logits = model(data.ids).logits[:, :-1]  # at t - 1, of token t
    log_p = torch.log_softmax(logits, -1).gather(-1, data.ids[:, 1:, None])[..., 0]
    groups = [(r, np.mean(g), np.std(g, ddof=1)) for g in (RETURNS[:3], RETURNS[3:]) for r in g]
    advantages = torch.tensor([(r - mean) / (deviation + 1e-6) for r, mean, deviation in groups])[:, None] * mask
    if arm.critic:  # it starts at 0: every token's advantage is the return, which is whitened over the batch's tokens
        returns = torch.tensor(RETURNS)[:, None].expand(mask.shape)
        advantages = (returns - returns[mask].mean()) / returns[mask].std(correction=0) * mask
    weights = mask.double()
    if credit == "actfocus":
        energy = -torch.logsumexp(logits.detach(), -1)
        z = (energy - energy[action].mean()) / energy[action].std(correction=0)
        weights = torch.where(action, 1 + 0.5 * torch.sigmoid(z), 0.1) * mask
    return torch.autograd.grad(-(weights * advantages * log_p).sum() / weights.sum(), list(model.parameters()))


@pytest.mark.parametrize("algo", ["ppo", "grpo"])
@pytest.mark.parametrize("credit", ["uniform", "actfocus"])
def test_a_step_follows_the_gradient_of_the_papers_loss(monkeypatch, algo, credit):
    """The whole of Arm.step, with plain gradient descent at rate 1 in the place of Adam."""
    monkeypatch.setattr(train, "MAX_GRAD_NORM", 1e9)
    arm = scripted(arm_of(algo, credit, entropy_coef=0.0, micro_batch=2))
    expected, before = by_hand(arm, arm.credit.play(), credit), copy.deepcopy(arm.policy)
    learners = [arm.policy, arm.critic] if arm.critic else [arm.policy]
    arm.optimizers = [torch.optim.SGD(part.parameters(), 1.0) for part in learners]
    metrics = arm.step()
    assert metrics["updates"] == 1 and metrics["skipped_updates"] == 0
    assert metrics["tokens_per_second"] == metrics["generated_tokens"] / metrics["rollout_seconds"]
    assert all(p.grad is None for part in learners for p in part.parameters())  # or the next update would hold this one
    for old, new, gradient in zip(before.parameters(), arm.policy.parameters(), expected):
        torch.testing.assert_close(old - new, gradient.float(), atol=1e-5, rtol=1e-3)
    assert sum(float(x.square().sum()) for x in expected) > 1e-4
    if arm.critic:  # at rate 1, from 0, its constant goes to the mean of what it is to predict
        tokens = arm.credit.play().response_mask.sum(1)
        mean = (tokens * torch.tensor(RETURNS)).sum() / tokens.sum()
        torch.testing.assert_close(arm.critic.head.bias[0], mean, atol=1e-5, rtol=0)


def gradients(algo, credit, micro_batch, **settings):
    """(sums for the log, gradients) of one minibatch over all trajectories."""
    arm = arm_of(algo, credit, micro_batch=micro_batch, **settings)
    totals = arm.gradient(batch_of(arm))
    return totals, [p.grad for group in arm.optimizers for p in group.param_groups[0]["params"] if p.grad is not None]


@pytest.mark.parametrize("algo", ["ppo", "grpo"])
@pytest.mark.parametrize("credit", ["uniform", "actfocus"])
@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
def test_micro_batch_size_changes_neither_loss_nor_gradient(algo, credit, kl_coef):
    whole, expected = gradients(algo, credit, 64, kl_coef=kl_coef, entropy_coef=0.1)
    for size in (1, 4):
        parts, actual = gradients(algo, credit, size, kl_coef=kl_coef, entropy_coef=0.1)
        assert parts == pytest.approx(whole, rel=1e-4, abs=1e-5) and len(actual) == len(expected) > 0
        for a, b in zip(actual, expected):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


class OwnRatio(ActFocus):
    """A token's ratio after all, but the loop cannot know."""

    def ratio(self, logprobs, batch):
        return super().ratio(logprobs, batch)


@pytest.mark.parametrize("algo", ["ppo", "grpo"])
def test_the_loss_in_one_pass_and_by_way_of_the_logprobs_are_one(monkeypatch, algo):
    """Once the policy has moved, so that some tokens are clipped; every number for the log, and every gradient."""
    monkeypatch.setitem(CREDITS, "own", OwnRatio)
    used, made = [], []
    monkeypatch.setattr(train, "weighted_loss", lambda *x, f=train.weighted_loss, **k: used.append(1) or f(*x, **k))
    for credit, one_pass in (("actfocus", True), ("own", False)):
        arm = arm_of(algo, credit, entropy_coef=0.1, temperature=0.8)
        batch = batch_of(arm)
        made.append((arm.gradient(moved_batch(arm, batch)), [p.grad for p in arm.policy.parameters()]))
        assert bool(used) == one_pass
        used.clear()
    assert made[0][0] == pytest.approx(made[1][0], rel=1e-4, abs=1e-6) and made[0][0]["clip_fraction"] > 0
    for a, b in zip(made[0][1], made[1][1]):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def moved_batch(arm, batch):
    """As if the policy had moved since: other old log-probs."""
    batch.old_logprobs = batch.old_logprobs + batch.response_mask * 0.3 * torch.sin(torch.arange(batch.ids.shape[1]))
    return batch


@pytest.mark.parametrize("algo", ["ppo", "grpo"])
def test_actfocus_with_alpha_1_and_beta_0_is_uniform_bit_for_bit(algo):
    plain, focused = gradients(algo, "uniform", 64), gradients(algo, "actfocus", 64, alpha=1.0, beta=0.0)
    assert plain[0] == focused[0] and len(plain[1]) == len(focused[1]) and all(map(torch.equal, plain[1], focused[1]))
    one, two = (scripted(arm_of(algo, credit, minibatch=3, alpha=1.0, beta=0.0)) for credit in ("uniform", "actfocus"))
    assert {**one.step(), **dict.fromkeys(TIMED)} == {**two.step(), **dict.fromkeys(TIMED)}
    assert all(map(torch.equal, one.policy.parameters(), two.policy.parameters()))


@pytest.mark.parametrize("algo", ["ppo", "grpo"])
def test_gradient_checkpointing_changes_no_gradient(algo):
    plain, saving = (gradients(algo, "actfocus", 4, gradient_checkpointing=on)[1] for on in (False, True))
    assert len(plain) == len(saving) > 0
    for a, b in zip(plain, saving):
        torch.testing.assert_close(a, b)


def test_the_first_update_has_ratio_1_and_a_gradient_and_the_second_has_moved():
    first = scripted(arm_of(minibatch=6, entropy_coef=0.0)).step()
    assert first["ratio_mean"] == pytest.approx(1, abs=1e-6) and first["approx_kl"] == pytest.approx(0, abs=1e-6)
    assert first["grad_norm"] > 1e-3 and first["updates"] == 1
    both = scripted(arm_of(minibatch=3, entropy_coef=0.0)).step()
    assert both["updates"] == 2 and abs(both["ratio_mean"] - 1) > 1e-4 and both["approx_kl"] > 1e-6


def test_actfocus_moves_the_gradient_to_action_tokens():
    uniform, focused = (scripted(arm_of("grpo", credit)).step() for credit in ("uniform", "actfocus"))
    data = trajectories_of(arm_of(), RETURNS)
    share = data.action_mask.sum() / data.response_mask.sum()
    assert uniform["weight_share_action"] == pytest.approx(share.item())
    assert focused["weight_share_action"] > 2 * uniform["weight_share_action"]
    assert focused["grad_share_action"] > uniform["grad_share_action"]


def test_the_entropy_bonus_is_a_mean_over_trained_tokens_whatever_they_weigh():
    """With weights of 0 on the reasoning, its tokens get no bonus either, and the others' does not shrink for that."""
    for alpha in (0.0, 0.1):
        arm = arm_of(alpha=alpha, entropy_coef=1.0)
        batch = batch_of(arm)
        batch.advantages = torch.zeros_like(batch.advantages)
        loss = arm.loss(batch, batch)[0]
        assert loss.item() == pytest.approx(-batch.old_entropy[batch.weights > 0].mean().item(), rel=1e-4)


def test_the_kl_penalty_pulls_towards_the_reference():
    arm = moved(arm_of(kl_coef=0.1, entropy_coef=0.0))
    batch = batch_of(arm)
    batch.advantages = torch.zeros_like(batch.advantages)
    gap = (batch.old_logprobs - batch.ref_logprobs)[batch.response_mask]
    penalty = arm.loss(batch, batch)[0].item()
    assert penalty == pytest.approx(0.05 * gap.square().mean().item(), rel=1e-4) and gap.std() > 0.01


def test_a_value_moves_at_most_the_clip_range_in_an_update():
    """Where it has moved further towards its target, the clipped error is the larger one: no gradient is left."""
    arm = arm_of("ppo")
    batch = batch_of(arm)
    for bias, alone in ((0.0, True), (0.4, True), (0.6, False), (0.9, False)):
        arm.critic.head.bias.data.fill_(bias)
        batch.value_targets = batch.response_mask * 5.0
        gradient, = torch.autograd.grad(arm.loss(batch, batch)[0], arm.critic.head.bias)
        assert (gradient.item() == pytest.approx(bias - 5, abs=1e-4)) if alone else gradient.item() == 0


@pytest.mark.slow
@pytest.mark.parametrize("algo", ["ppo", "grpo"])
def test_actfocus_costs_what_uniform_credit_costs(algo):
    """Steps on scripted episodes, in turn; `pytest -s --slow -k costs` prints the ratios.

    Of neighbours, in one thread's processor time, and with room in the bound: a machine is slower at one time than at
    another, more than a tenth, and for minutes.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    ratios = []
    for turn in range(8):
        seconds = {}
        for credit in sorted(["uniform", "actfocus"], reverse=turn % 2):
            arm = scripted(arm_of(algo, credit, prompts=6, rollouts=6), RETURNS * 6)
            started = time.process_time()
            arm.step()
            seconds[credit] = time.process_time() - started
        ratios.append(seconds["actfocus"] / seconds["uniform"])
    torch.set_num_threads(threads)
    print(algo, [f"{ratio:.3f}" for ratio in ratios])
    assert statistics.median(ratios[1:]) < 1.15  # the first warms up


@pytest.mark.parametrize("algo", ["ppo", "grpo"])
def test_rewarded_actions_become_likelier(algo):
    arm = scripted(arm_of(algo, entropy_coef=0.0, lr=1e-4), [1.0, -1.0] * 3, answers=((UP,), (LEFT,)))
    data = arm.credit.play()
    rewarded, punished = (data.action_mask & (data.returns == value)[:, None] for value in (1, -1))
    logprobs = lambda mask: score(arm.policy, data.ids, data.response_mask).logprobs[mask].mean().item()
    before = logprobs(rewarded), logprobs(punished)
    for _ in range(5):
        arm.step()
    assert logprobs(rewarded) > before[0] and logprobs(punished) < before[1]


def test_the_critic_learns():
    arm = scripted(arm_of("ppo", lr=0.0), group=1)  # six boards
    metrics = [arm.step() for _ in range(12)]
    assert metrics[-1]["value_loss"] < 0.5 * metrics[0]["value_loss"]
    assert metrics[-1]["explained_variance"] > metrics[0]["explained_variance"]


# A step and an evaluation


def test_a_step_plays_every_board_of_it_g_times_and_none_of_the_evaluations(monkeypatch):
    arm, played = arm_of(rollouts=3, prompts=2), []
    monkeypatch.setattr(arm, "play", lambda seeds, temperature, generator: played.append((seeds, temperature)) or data)
    data = trajectories_of(arm, RETURNS)
    first, second = (arm.step() and played[-1][0] for _ in range(2))
    assert first != second and len(set(first)) == 2 and all(first[i] == first[i // 3 * 3] for i in range(6))
    assert max(first + second) < train.EVALUATION_SEED and {temperature for _, temperature in played} == {1.0}
    look = lambda seed: arm.env.reset(seed=seed)[0]
    assert not {look(seed) for seed in first + second} & {look(seed) for seed in arm.settings.evaluation_seeds()}


@pytest.mark.parametrize("algo", ["ppo", "grpo"])
def test_the_groups_with_the_largest_spread_are_trained_on(monkeypatch, algo):
    arm, seen = scripted(arm_of(algo, prompts=4, keep=0.5), [1, 2, 1.5, 9, 0, 5, 3, 3, 3, 1, 7, 2]), []
    original = arm.make_batch
    monkeypatch.setattr(arm, "make_batch", lambda chosen: seen.append(chosen) or original(chosen))
    metrics = arm.step()
    kept, = seen
    assert sorted(kept.seeds.tolist()) == [1, 1, 1, 3, 3, 3] and sorted(kept.returns.tolist()) == [0, 1, 2, 5, 7, 9]
    assert metrics["kept_groups"] == 2 and metrics["zero_spread_groups"] == 1 and metrics["updates"] == 1


def test_a_step_without_spread_is_skipped_and_counted():
    """Under GRPO there is nothing to learn; PPO without the filter still teaches the critic."""
    for algo, keep, updates in (("grpo", 1.0, 0), ("grpo", 0.5, 0), ("ppo", 0.5, 0), ("ppo", 1.0, 1)):
        arm = scripted(arm_of(algo, keep=keep), [1.0] * 6)
        before = copy.deepcopy(arm.policy.state_dict())
        metrics = arm.step()
        assert [metrics[name] for name in ("updates", "zero_spread_groups", "kept_groups")] == [updates, 2, 2 * updates]
        same = all(torch.equal(before[name], x) for name, x in arm.policy.state_dict().items())
        assert same == (not updates) and json.dumps(metrics, allow_nan=False)


@pytest.mark.parametrize("algo", ["ppo", "grpo"])
def test_a_step_whose_tokens_weigh_nothing_teaches_the_policy_nothing(algo):
    """alpha 0, and not one answer in the batch: a run goes on, and its log stays JSON."""
    arm = scripted(arm_of(algo, alpha=0.0, minibatch=2), answers=(("hm",), ("hm", "well")))
    before = copy.deepcopy(arm.policy.state_dict())
    metrics = arm.step()
    assert json.dumps(metrics, allow_nan=False)
    assert all(torch.equal(before[name], x) for name, x in arm.policy.state_dict().items())


def test_what_a_credit_attaches_to_the_trajectories_comes_along(monkeypatch):
    arm = scripted(arm_of())
    arm.credit.play().mark = torch.arange(6.0)
    seen = []
    monkeypatch.setattr(arm.credit, "weights", lambda batch: seen.append(batch) or batch.response_mask.float())
    arm.step()
    assert seen[0].mark.tolist() == list(range(6)) and seen[0].old_logprobs.shape == seen[0].ids.shape
    assert (seen[0].old_logprobs[seen[0].response_mask] < 0).all()


def test_what_a_credit_weighs_outside_the_responses_is_not_trained(monkeypatch):
    plain, careless = (scripted(arm_of(credit="uniform")) for _ in range(2))
    monkeypatch.setattr(careless.credit, "weights", lambda batch: torch.ones(batch.ids.shape))
    expected, found = plain.step(), careless.step()
    for name in ("updated_tokens", "policy_loss", "grad_norm", "weight_share_action"):
        assert found[name] == expected[name] != 0, name


def test_an_evaluation_has_its_own_temperature_boards_and_luck(monkeypatch):
    """Whatever the training temperature; training goes on as if there had been none; twice it is the same."""
    arm, calls, original = arm_of(temperature=3.0, max_response_tokens=20), [], train.rollout
    monkeypatch.setattr(train, "rollout", lambda *a, **options: calls.append(options) or original(*a, **options))
    luck = arm.generator.get_state(), arm.rng.bit_generator.state, torch.get_rng_state()
    first, second = arm.evaluate(), arm.evaluate()
    assert first == second and calls[0]["temperature"] == train.EVAL_TEMPERATURE == 0.5
    assert calls[0]["seeds"] == [10**9, 10**9, 10**9 + 1, 10**9 + 1] and len(first["eval_board_success"]) == 2
    assert torch.equal(luck[0], arm.generator.get_state()) and luck[1] == arm.rng.bit_generator.state
    assert torch.equal(luck[2], torch.get_rng_state())
    arm.step()
    assert calls[-1]["temperature"] == 3.0
    assert list(arm_of(boards="validation").settings.evaluation_seeds()) == [2 * 10**9, 2 * 10**9 + 1]


def test_a_learning_rate_of_1e_6_moves_a_policy_that_computes_in_bfloat16(instruct_model, monkeypatch):
    """Its float32 weights move; the same weights kept in bfloat16 would stay where they are."""
    monkeypatch.setattr(Settings, "autocast", HALF)
    arm = scripted(arm_of("ppo", model=str(instruct_model), lr=1e-6))
    arm.reference.bfloat16()
    before = {name: x.clone() for name, x in arm.policy.named_parameters()}
    assert arm.step()["updates"] == 1
    shares = {name: (x != before[name]).float().mean().item() for name, x in arm.policy.named_parameters()}
    rounded = [(x.bfloat16() != before[name].bfloat16()).float().mean().item()
               for name, x in arm.policy.named_parameters() if x.dim() == 2]  # biases: at 0 it is fine
    assert arm.policy.dtype == torch.float32 and min(shares.values()) > 0.5
    assert np.mean(rounded) < 0.05


def test_dropout_of_a_loaded_model_is_switched_off(instruct_model):
    policy, _ = load_agent(instruct_model, torch.device("cpu"))
    policy.train()
    ids = torch.arange(20)[None]
    assert torch.equal(policy(ids).logits, policy(ids).logits)


# Whole runs


def words(arguments):
    """The small run's settings with others on top; Sokoban's boards are those that take two turns."""
    return [*COMMAND, *([] if "--env" in arguments else ["--env-options", *BOARDS]), *map(str, arguments)]


def run(*arguments):
    """train.main with its arms in this process -> (exit code, stdout, stderr)."""
    out, err = io.StringIO(), io.StringIO()

    def in_turn(train_arm, settings, arms, report):
        for arm in arms:
            train_arm(settings, *arm)
            for line in runs.ArmFiles(settings.out, *arm).lines():
                report(line)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(runs, "run_arms", in_turn)
        patch.setitem(sys.modules, "matplotlib", None)  # not installed: no curves
        try:
            train.main(words(arguments))
            code = 0
        except SystemExit as exit:
            code = exit.code
    if isinstance(code, str):
        return 1, out.getvalue(), err.getvalue() + code + "\n"
    return code, out.getvalue(), err.getvalue()


def start(out, *arguments, script="train.py"):
    """The command as it is, in a process group of its own, all its processes on one thread."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, script, "--out", out, *words(arguments)], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True, env=environment)


def strict(text):
    """JSON as every reader takes it: no NaN, no Infinity."""
    def refuse(word):
        raise ValueError(f"{word} is no JSON")
    return json.loads(text, parse_constant=refuse)


def metrics(out):
    """metrics.jsonl less the times."""
    lines = [strict(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMED} for line in lines]


def moved_by(checkpoint, settings=Settings()):
    """How far training moved the policy: the largest change of a weight."""
    policy, _ = load_agent(settings.agent, "cpu")
    learnt = runs.load_checkpoint(checkpoint)["learners"][0]
    return max(float((x - learnt[name]).abs().max()) for name, x in policy.state_dict().items())


RIVALS = [*BRIEF, "--env", "sudoku", "--prompts", "1", "--env-options", "hint=true", "max_turns=3", "max_actions=6",
          "--algos", "grpo", "--credits", "carl", "carl+actfocus", "a2tgpo", "a2tgpo+actfocus"]


def test_an_environment_without_an_oracle_has_no_best_play(tmp_path, monkeypatch):
    """Only demonstrations need one, and the table's last line."""
    monkeypatch.setitem(environments.ENVS, "mute", type("Mute", (environments.Sokoban,), {"oracle": environments.Env.oracle}))
    code, output, error = run("--out", tmp_path, *BRIEF, "--env", "mute", "--env-options", *BOARDS, "--algos", "grpo",
                              "--model", Settings().agent, "--steps", "0", "--credits", "uniform")
    assert code == 0 and "random actions" in output and "best play" not in output, error
    assert strict((tmp_path / "summary.json").read_text())["ceiling"] is None


def test_a_slip_in_a_credit_of_ones_own_is_named_with_its_place(tmp_path, monkeypatch):
    def weights(self, batch):
        one, two = 1, 2, 3
    monkeypatch.setitem(CREDITS, "mine", type("Mine", (Credit,), {"weights": weights}))
    code, _, error = run("--out", tmp_path, *BRIEF, "--algos", "grpo", "--credits", "mine")
    assert code == 1 and error.count("\n") <= 2 and "Traceback" not in error
    assert f"grpo mine seed 0, step 1: too many values to unpack (expected 2) (test_train.py, line {weights.__code__.co_firstlineno + 1})" in error


@pytest.mark.parametrize("name, answer, words", [
    ("advantages", lambda self, batch: batch.returns[:, None], r"advantages has shape \(6, 1\), expected \(6, \d+\)"),
    ("advantages", lambda self, batch: torch.full(batch.ids.shape, torch.nan), "advantages is not finite"),
    ("weights", lambda self, batch: batch.reward, r"AttributeError: 'Batch' object has no attribute 'reward' \(test_tr"),
    ("normaliser", lambda self, batch: {}["sum"], r"KeyError: 'sum' \(test_train.py, line \d+\)$"),
    ("weights", lambda self, batch: batch.returns[:2] @ batch.returns, r"RuntimeError: .*\(test_train.py, line \d+\)$")])
def test_a_wrong_answer_of_a_credit_of_ones_own_is_named(tmp_path, monkeypatch, name, answer, words):
    monkeypatch.setitem(CREDITS, "mine", type("Mine", (Credit,), {name: answer}))
    monkeypatch.setattr(Credit, "play", lambda self, arm, boards: trajectories_of(arm, RETURNS))
    monkeypatch.setattr(Arm, "evaluate", lambda arm: {})
    settings = Settings(**SMALL | {"rollouts": 3}, credits=("mine",), algos=("grpo",), out=str(tmp_path))
    with pytest.raises(ValueError, match="^grpo mine seed 0, step 1: " + words):
        train.train_arm(settings, "grpo", "mine", 0)


def test_an_answer_that_nobody_asks_for_is_refused(monkeypatch):
    for slip, meant in (("advantage", "advantages"), ("normalizer", "normaliser"), ("weight", "weights")):
        monkeypatch.setitem(CREDITS, "mine", type("Mine", (Credit,), {slip: lambda self, batch: None}))
        with pytest.raises(ValueError, match=f"nobody asks Mine for {slip}: is {meant} meant"):
            make_credit("mine", "grpo", Settings())
    allowed = {"_weights": lambda self: None, "weight": 2.0, "tree": lambda self: None}  # its own, and a setting
    monkeypatch.setitem(CREDITS, "mine", type("Mine", (Credit,), allowed))
    assert make_credit("mine:weight=3", "grpo", Settings()).weight == 3.0
    monkeypatch.setitem(CREDITS, "mine", type("Mine", (Credit,), {"__init__": lambda self, algo: None}))
    with pytest.raises(ValueError, match="'mine' cannot be made: .* takes 2 positional arguments but 3 were given"):
        make_credit("mine", "grpo", Settings())


def test_a_credit_logs_numbers_of_its_own(monkeypatch):
    arm = scripted(arm_of())
    monkeypatch.setattr(type(arm.credit), "metrics", lambda self, batch: {"heaviest": float(batch.weights.max())})
    assert 1 < arm.step()["heaviest"] <= 1.5


def test_a_metric_that_is_no_number_is_named(tmp_path):
    line = {"algo": "grpo", "credit": "mine", "seed": 3, "step": 7, "think_nll": None, "length": float("nan")}
    with pytest.raises(ValueError, match="grpo mine seed 3, step 7: the metric length is nan"):
        runs.ArmFiles(tmp_path, "grpo", "mine", 3).record(line, None, checkpoint=False)


@pytest.mark.slow
def test_a_credit_knows_the_step_of_its_run_after_a_resumption_too(tmp_path, monkeypatch):
    seen = []

    def weights(self, batch):
        seen.append(self.step)
        return Credit.weights(self, batch)
    monkeypatch.setitem(CREDITS, "mine", type("Mine", (Credit,), {"weights": weights}))
    mine = ["--out", tmp_path, *BRIEF, "--algos", "ppo", "--credits", "mine", "--eval-every", "1", "--steps", "3"]
    assert run(*mine)[0] == 0 and seen == [1, 2, 3]
    log = next((tmp_path / "arms").glob("*.jsonl"))
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:3]))  # as if killed before the last step's line
    (log.with_suffix(".pt")).unlink()
    assert run(*mine, "--resume")[0] == 0 and seen == [1, 2, 3, 3]


def test_every_rival_learns(tmp_path):
    code, output, error = run("--out", tmp_path, *RIVALS)
    assert code == 0 and "generated tokens" in output, error
    learnt = [line for line in metrics(tmp_path) if line["step"]]
    for line in learnt:
        assert line["updates"] > 0 and line["grad_norm"] > 0, line
        files = runs.ArmFiles(tmp_path, "grpo", line["credit"], 0)
        assert moved_by(files.checkpoint, Settings(env="sudoku")) > 1e-5
    assert len({line["grad_norm"] for line in learnt}) == 4


@pytest.mark.slow
def test_every_rival_learns_in_a_process_of_its_own_and_repeats_itself(tmp_path):
    process = start(tmp_path / "processes", *RIVALS, "a2tgpo:turn_clip=common", "--seeds", "1", "--steps", "2")
    _, error = process.communicate(timeout=300)
    lines, again = metrics(tmp_path / "processes"), ("carl", "a2tgpo+actfocus")
    assert process.returncode == 0 and len(lines) == 5 * 3, error
    summary = strict((tmp_path / "processes" / "summary.json").read_text())
    assert all(arm["updates"] > 0 for arm in summary["arms"])
    code, _, error = run("--out", tmp_path / "here", *RIVALS, "--seeds", "1", "--steps", "2", "--credits", *again)
    assert code == 0 and metrics(tmp_path / "here") == [line for line in lines if line["credit"] in again], error


@pytest.mark.parametrize("env", ["frozenlake", pytest.param("shop", marks=pytest.mark.slow)])
def test_every_environment_runs_with_its_own_agent(env, tmp_path):
    code, output, error = run("--out", tmp_path, *BRIEF, "--env", env, "--algos", "grpo", "--signal", "entropy",
                              "--credits", "actfocus:alpha=0.3")
    assert code == 0, error
    lines = metrics(tmp_path)
    assert lines[1]["updates"] > 0 and lines[1]["format_valid"] > 0.8
    if env == "shop":
        assert all({"eval_purchased", "eval_score"} <= line.keys() for line in lines) and "purchased" in output


def test_a_saved_model_runs_from_its_directory(tmp_path):
    model = shutil.copytree(train.AGENTS / "sokoban", tmp_path / "model")
    code, output, error = run("--out", tmp_path, *BRIEF, "--model", model, "--algos", "grpo", "--credits", "actfocus",
                              "--seeds", "0", "1", "--kl-coef", "0.1", "--env-options", "walls=0", "max_turns=2",
                              "observation=both")
    assert code == 0, error
    assert "over seeds 0 1" in output and "2 seeds prove nothing" in output


@pytest.mark.parametrize("env, options", [("sudoku", ["max_turns=3", "max_actions=6"]),
                                          pytest.param("shop", ["max_turns=15"], marks=pytest.mark.slow)])
def test_an_instruct_model_runs_from_its_directory(tmp_path, instruct_model, monkeypatch, env, options):
    """In bfloat16 with gradient checkpointing, PPO and GRPO, the paper's boards: the path of a downloaded model."""
    monkeypatch.setattr(Settings, "autocast", HALF)
    code, output, error = run("--out", tmp_path, *BRIEF, "--model", instruct_model, "--env", env, "--lr", "1e-3",
                              "--prompts", "1", "--gradient-checkpointing", "--credits", "actfocus",
                              "--max-response-tokens", "15", "--env-options", *options)
    assert code == 0, error
    lines = metrics(tmp_path)
    assert len(lines) == 4 and all(0 <= line["success"] <= 1 for line in lines if line["step"])


def test_a_run_in_which_nothing_can_be_learnt_says_so_and_compares_nothing(tmp_path, instruct_model):
    """An untrained model: no response of the right form, no update in three steps."""
    code, output, error = run("--out", tmp_path, *BRIEF, "--model", instruct_model, "--algos", "grpo", "--steps", "3",
                              "--prompts", "1", "--max-response-tokens", "10")
    assert code == 0, error
    assert output.count("nothing can be learnt") == 1 and "level" not in output
    assert "grpo actfocus seed 0: three steps without an update" in output
    assert "grpo: no comparison, an arm made no update" in output


def test_a_run_of_no_steps_evaluates_the_agent(tmp_path):
    code, output, error = run("--out", tmp_path, *BRIEF, "--steps", "0", "--algos", "grpo")
    assert code == 0 and [line["step"] for line in metrics(tmp_path)] == [0, 0], error


# What a user adds


class ReinforcePP(Credit):
    """Advantages normalised over the whole batch; only actions are trained."""
    algos = ("grpo",)

    def advantages(self, batch):
        returns = batch.returns
        return ((returns - returns.mean()) / (returns.std() + 1e-6))[:, None] * batch.response_mask

    def weights(self, batch):
        return batch.action_mask.float()


class DrGrpo(Credit):
    """Neither the group's deviation nor the responses' length: both are biases."""
    algos = ("grpo",)

    def advantages(self, batch):
        returns = batch.returns.view(-1, self.settings.rollouts)
        return (returns - returns.mean(1, keepdim=True)).view(-1, 1) * batch.response_mask

    def normaliser(self, minibatch):
        return len(minibatch) * self.settings.max_response_tokens


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setitem(CREDITS, "reinforcepp", ReinforcePP)
    monkeypatch.setitem(CREDITS, "drgrpo", DrGrpo)
    monkeypatch.setitem(SIGNALS, "margin", lambda logits, targets, old_logprobs: logits.topk(2).values.diff()[:, 0])


def test_reinforcepp_trains_action_tokens_alone(registered):
    """Not even the entropy bonus or the KL penalty reaches a token of the reasoning."""
    arm = moved(arm_of("grpo", "reinforcepp", entropy_coef=0.5, kl_coef=0.5))
    batch = batch_of(arm)
    loss, hidden, _ = arm.loss(batch, batch)
    gradient, = torch.autograd.grad(loss, hidden)
    action = batch.action_mask[batch.response_mask]
    assert not gradient[~action].any() and gradient[action].any(1).all()
    expected = (torch.tensor(RETURNS) - np.mean(RETURNS)) / np.std(RETURNS, ddof=1)
    torch.testing.assert_close(batch.advantages, expected.float()[:, None] * batch.response_mask, atol=1e-5, rtol=0)


def test_dr_grpo_has_neither_deviation_nor_length(registered):
    arm = arm_of("grpo", "drgrpo", entropy_coef=0.0, micro_batch=2)
    batch, model = batch_of(arm), arm.reference.requires_grad_(True)
    arm.gradient(batch)
    log_p = torch.log_softmax(model(batch.ids).logits[:, :-1], -1).gather(-1, batch.ids[:, 1:, None])[..., 0]
    centred = torch.tensor([r - np.mean(group) for group in (RETURNS[:3], RETURNS[3:]) for r in group])[:, None]
    loss = -(centred * log_p * batch.response_mask[:, 1:]).sum() / (6 * 100)
    for p, gradient in zip(arm.policy.parameters(), torch.autograd.grad(loss, list(model.parameters()))):
        torch.testing.assert_close(p.grad, gradient.float(), atol=1e-5, rtol=1e-3)


def test_a_signal_is_one_line(registered):
    arm = arm_of(signal="margin")
    batch = batch_of(arm)
    top = arm.reference(batch.ids).logits[:, :-1].topk(2).values  # [B, T - 1, 2]
    here = batch.response_mask[:, 1:]
    torch.testing.assert_close(batch.signal[:, 1:][here], (top[..., 1] - top[..., 0])[here], atol=1e-4, rtol=0)


def test_what_a_user_registered_trains_from_the_command_line(registered, tmp_path):
    code, output, error = run("--out", tmp_path, *BRIEF, "--algos", "grpo", "--signal", "margin",
                              "--credits", "reinforcepp", "drgrpo", "drgrpo+actfocus")
    assert code == 0, error
    assert all(line["updates"] > 0 and line["grad_norm"] > 0 for line in metrics(tmp_path) if line["step"])
    assert len({line["grad_norm"] for line in metrics(tmp_path) if line["step"]}) == 3


CORRIDOR = '''
import train
from env import ENVS, Env

class Corridor(Env):
    name, actions, intro = "corridor", ("Left", "Right"), "Walk to the goal."

    def instance(self):
        self.at, self.goal = map(int, self.rng.choice(9, 2, replace=False))

    def move(self, action):
        self.at += 1 if action == "Right" else -1
        return 1.0 if self.solved() else -0.1

    def render(self):
        return f"You are at {self.at}, the goal is at {self.goal}."

    def solved(self):
        return self.at == self.goal

    def oracle(self):
        return ["Right" if self.goal > self.at else "Left"] * abs(self.goal - self.at)

ENVS["corridor"] = Corridor
if __name__ == "__main__":
    train.main()
'''


@pytest.fixture(scope="module")
def corridor(tmp_path_factory):
    """The script runs in the background, with an agent that the built-in teacher taught -> (process, directory)."""
    path = tmp_path_factory.mktemp("corridor")
    (path / "corridor.py").write_text(CORRIDOR)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.environments, "ENVS", dict(train.environments.ENVS))
        env = runpy.run_path(str(path / "corridor.py"))["Corridor"](max_turns=1)
    for part in teach(env, set(), layers=1, episodes=200, steps=200, worse_steps=0):
        part.save_pretrained(path / "model")
    process = start(path / "out", "--model", path / "model", "--env", "corridor", "--env-options", "max_turns=1",
                    "--algos", "grpo", "--credits", "actfocus", "--max-response-tokens", "40",
                    script=path / "corridor.py")
    yield process, path
    process.kill()
    process.communicate()


@pytest.mark.slow
def test_an_environment_can_be_named_as_module_and_class(corridor, monkeypatch):
    monkeypatch.syspath_prepend(corridor[1])
    assert "You are at" in Settings(env="corridor:Corridor", model=str(corridor[1] / "model")).make_env().reset()[0]


# Settings


@pytest.mark.parametrize("arguments, words", [
    (["--env", "chess"], "env"), (["--env", "no.module:Class"], "no.module"), (["--algos", "dqn"], "algos"),
    (["--credits", "magic"], "magic"), (["--credits", "carl"], "grpo"),
    (["--algos", "grpo", "--credits", "a2tgpo"], "gold answer"),
    (["--credits", "actfocus+magic"], "magic"), (["--credits", "no.module:Class"], "no.module"),
    (["--credits", "json:loads"], "subclass"), (["--credits", "extras.rivals:Nothing"], "Nothing"),
    (["--credits", "carl:+actfocus"], "carl:"), (["--algos", "grpo", "--credits", "carl+a2tgpo"], "both"),
    (["--credits", "uniform+actfocus"], "uniform+actfocus"), (["--credits", "actfocus:steps=3"], "steps"),
    (["--credits", "actfocus:alpha=2"], "alpha"), (["--credits", "actfocus:alpha"], "alpha"),
    (["--credits", "uniform", "uniform"], "credits"), (["--credits", "uniform,actfocus"], "a space between"),
    (["--seeds", "0,1"], "a space between"), (["--credits", "actfocus,alpha=0.3"], "'actfocus,alpha=0.3'"),
    (["--algos", "rloo"], "is a credit"),
    (["--eval_boards", "0"], "eval_boards: 0 is not in [1, 100000]"), (["--lr", "inf"], "a finite number of at least 0"),
    (["--env", "env:Env"], "an environment has "), (["--credits", "builtins:object"], "subclass"),
    (["--signal", "loud"], "signal"), (["--boards", "training"], "boards"),
    (["--alpha", "2"], "alpha"), (["--alpha", "nan"], "alpha"), (["--beta", "-1"], "beta"), (["--beta", "inf"], "beta"),
    (["--steps", "-1"], "steps"), (["--steps", "many"], "steps"), (["--teach", "100001"], "teach"),
    (["--seeds", "0", "0"], "seeds"),
    (["--seeds"], "seeds"), (["--seeds", "18446744073709551616"], "seeds"), (["--seeds", "-1"], "seeds"),
    (["--rollouts", "1"], "rollouts"), (["--step", "3"], "--step"),
    (["--signal", "shift", "--temperature", "0.5"], "temperature"), (["--env-options", "size=6", "size=5"], "second"),
    (["--env-options", "size"], "env_options"), (["--env-options", "size=2"], "size"),
    (["--env-options", "size=4", "walls=0"], "no board"), (["--env-options", "colour=red"], "colour"),
    (["--model", "/no/such/model"], "model"), (["--device", "abacus"], "abacus"),
    *([] if torch.cuda.is_available() else [(["--device", "cuda"], "no GPU")]),
    (["--out", "/proc/nowhere"], "/proc"), (["--out", "train.py/x"], "train.py/x"), (["--unknown", "1"], "unknown"),
    (["--env", "chess:Board", "--out", "a\nb"], "chess")])
def test_bad_settings_end_in_one_line_and_exit_code_2(arguments, words, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(runs, "run_arms", lambda *_: pytest.fail("work was begun"))
    with pytest.raises(SystemExit) as exit:
        train.main(["--out", str(tmp_path), *arguments])
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.count("\n") == 1 and error.startswith("train.py: ") and words in error


@pytest.mark.parametrize("old, new, words", [
    ("{% if messages[0]['role'] != 'system' %}",
     "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}", "no system role"),
    ("assistant\n", "assistant\n<think>\n", "opens the reasoning"), ("<|im_end|>", "<|endoftext|>", "does not close")])
def test_a_model_whose_chat_template_does_not_fit_is_named(instruct_model, tmp_path, old, new, words):
    shutil.copytree(instruct_model, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(instruct_model)
    tokenizer.chat_template = tokenizer.chat_template.replace(old, new)
    tokenizer.save_pretrained(tmp_path / "model")
    code, _, error = run("--model", tmp_path / "model", "--out", tmp_path)
    assert code == 2 and error.count("\n") == 1 and words in error


def test_a_model_that_scales_its_logits_is_refused_in_a_line(tmp_path, instruct_model):
    """What `score` computes would not be its log-probs."""
    tokenizer = AutoTokenizer.from_pretrained(instruct_model)
    config = CohereConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                          logit_scale=0.06, num_attention_heads=2, num_key_value_heads=2, bos_token_id=None,
                          eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    for part in (CohereForCausalLM(config), tokenizer):
        part.save_pretrained(tmp_path / "model")
    code, _, error = run("--out", tmp_path, "--model", tmp_path / "model")
    assert code == 2 and error.count("\n") == 1 and "logits" in error and "output embedding" in error


def test_a_credit_can_have_settings_of_its_own():
    arm = arm_of("grpo", "actfocus:alpha=0.3,signal=nll,lr=3e-5")
    assert (arm.settings.alpha, arm.settings.signal, arm.optimizers[0].param_groups[0]["lr"]) == (0.3, "nll", 3e-5)
    batch = batch_of(arm)
    assert torch.allclose(batch.weights[batch.response_mask & ~batch.action_mask], torch.tensor(0.3))
    torch.testing.assert_close(batch.signal, -batch.old_logprobs * batch.response_mask)
    own = {"clip_low": 0.1, "clip_high": 0.4, "entropy_coef": 0.5, "kl_coef": 0.1, "gamma": 0.9, "lam": 0.8}
    settings = arm_of("grpo", "actfocus:" + ",".join(f"{name}={x}" for name, x in own.items())).settings
    assert {name: getattr(settings, name) for name in own} == own
    assert arm_of("grpo", "carl:tree_forks=3").credit.tree_forks == 3
    for wrong in ("actfocus:alpha=2", "actfocus:alpha", "actfocus:steps=3", "actfocus:alpha=x", "actfocus:signal=loud",
                  "magic:lr=1", "uniform:signal=nll", "carl:alpha=0"):  # the last two weigh all alike
        with pytest.raises(ValueError):
            Settings(credits=(wrong,))


def test_defaults_are_the_environments_and_the_command_line_overrides_them():
    parse = lambda *arguments: SettingsParser("train.py").parse_settings(list(arguments))[0]
    assert parse().make_env().max_turns == 4 and parse().agent == str(train.AGENTS / "sokoban")
    paper = parse("--model", "some/model").make_env()  # a model of one's own plays the paper's boards
    assert (paper.max_turns, paper.n_walls, paper.observation) == (5, 2, "grid")
    assert parse("--env-options", "walls=1").make_env().n_walls == 1
    assert parse("--env-options", "walls=1", "--max-response-tokens", "9").make_env().response_limit == 9
    for name in environments.ENVS:  # what the built-in agent is told is one token to it, which another number would not be
        short = parse("--env", name, "--max-response-tokens", "9")
        told = short.make_env().format_reminder
        assert short.max_response_tokens == 9 and told == parse("--env", name).make_env().format_reminder
        assert len(load_tokenizer(short.agent)(told).input_ids) == 1
    assert parse("--env", "sudoku").max_response_tokens == 140 and parse("--env", "frozenlake").keep == 1.0
    assert parse("--env", "sudoku", "--max-response-tokens", "9").max_response_tokens == 9


def test_every_setting_is_explained(capsys):
    with pytest.raises(SystemExit) as exit:
        train.main(["--help"])
    text = capsys.readouterr().out
    assert exit.value.code == 0
    for field in dataclasses.fields(Settings):
        assert "--" + field.name.replace("_", "-") in text and len(field.metadata["help"]) > 10
    assert "(default: 100; 140 with --env sudoku)" in " ".join(text.split())


# The command as it is


@pytest.mark.slow
def test_an_environment_registered_in_a_script_of_the_users_own_trains_in_processes(corridor):
    process, path = corridor
    _, error = process.communicate(timeout=100)
    assert process.returncode == 0, error
    lines = metrics(path / "out")
    assert len(lines) == 3 and lines[1]["updates"] > 0 and lines[1]["format_valid"] > 0.5


@pytest.fixture(scope="module", autouse=True)
def begun(tmp_path_factory):
    """The default comparison, which runs while the tests above do."""
    out = tmp_path_factory.mktemp("run")
    process = start(out)
    yield process, out
    process.kill()
    process.communicate()


@pytest.fixture(scope="module")
def finished(begun):
    """(exit code, stdout, stderr, directory) of that run."""
    process, out = begun
    output = process.communicate(timeout=170)
    return process.returncode, *output, out


def test_a_run_compares_four_arms_and_writes_everything(finished):
    code, output, error, out = finished
    assert code == 0, error
    summary = strict((out / "summary.json").read_text())
    assert {"config", "floor", "ceiling", "arms"} <= summary.keys() and 0 <= summary["floor"] < summary["ceiling"] == 1
    names = [("ppo", "uniform", 0), ("ppo", "actfocus", 0), ("grpo", "uniform", 0), ("grpo", "actfocus", 0)]
    assert [(arm["algo"], arm["credit"], arm["seed"]) for arm in summary["arms"]] == names
    for arm, name in zip(summary["arms"], names):
        assert arm["eval_steps"] == [0, 2] and len(arm["eval_success"]) == 2
        assert arm["final_success"] == arm["eval_success"][-1] and arm["peak_success"] == max(arm["eval_success"])
        assert arm["updates"] > 0 and arm["skipped_updates"] == 0
        assert moved_by(runs.ArmFiles(out, *name).checkpoint) > 1e-5
    assert len({arm["eval_success"][0] for arm in summary["arms"]}) == 1  # one agent for all
    lines = metrics(out)
    assert [line["step"] for line in lines] == [0, 1, 2] * 4
    for line in lines:
        evaluated = {"eval_success", "eval_format_valid", "eval_facts", "eval_fact_accuracy", "eval_board_success"}
        assert evaluated <= line.keys() if line["step"] != 1 else not evaluated & line.keys()
        if line["step"]:
            assert {"return", "success", "format_valid", "think_tokens", "action_tokens",
                    "zero_spread_groups"} <= line.keys()
            assert line["format_valid"] > 0.9
        if line.get("updates"):
            assert {"think_entropy", "action_entropy", "grad_share_action", "approx_kl", "clip_fraction",
                    "grad_norm"} <= line.keys()
            assert ("explained_variance" in line) == (line["algo"] == "ppo")
    for words in ("ppo actfocus", "grpo uniform", "random actions", "best play 100.0", "1 seed proves nothing"):
        assert words in output
    assert "step/s" in error or "s/step" in error  # a progress bar with its speed
    assert strict((out / "settings.json").read_text())["agent"] == summary["config"]["agent"]
    assert not list(out.rglob("*.partial"))


def test_all_credits_train_on_the_same_boards(finished):
    """Until the policies differ, so do not their rollouts: step 1 is played alike by all four arms."""
    lines = [line for line in metrics(finished[3]) if line["step"] == 1]
    assert len({(line["return"], line["think_tokens"]) for line in lines}) == 1
    assert len({line["grad_norm"] for line in lines}) == 4  # and is learnt from in four ways


def test_the_same_seed_writes_the_same_metrics_and_another_seed_others(finished, tmp_path):
    """Arms that learn, once in processes side by side and once one after the other in this one."""
    code, _, error = run("--out", tmp_path / "0", "--credits", "actfocus")
    lines = [line for line in metrics(finished[3]) if line["credit"] == "actfocus"]
    assert code == 0 and metrics(tmp_path / "0") == lines, error
    assert all(sum(line.get("updates", 0) for line in lines if line["algo"] == algo) > 0 for algo in ("ppo", "grpo"))
    code, _, error = run("--out", tmp_path / "1", *BRIEF, "--seeds", "1", "--algos", "grpo", "--credits", "uniform")
    assert code == 0 and metrics(tmp_path / "1")[1]["think_nll"] != metrics(finished[3])[1]["think_nll"], error


@pytest.mark.slow
def test_the_same_command_writes_the_same_metrics(finished, tmp_path):
    _, error = (process := start(tmp_path)).communicate(timeout=100)
    assert process.returncode == 0 and metrics(tmp_path) == metrics(finished[3]), error


def test_a_random_signal_is_that_of_the_seed():
    one, two = (batch_of(arm_of(signal="random")).signal for _ in range(2))
    assert torch.equal(one, two)


@pytest.mark.parametrize("boards", ["evaluation", "validation"])
def test_every_board_that_evaluations_play_is_held_out(boards):
    arm = arm_of(eval_boards=9, boards=boards)
    assert arm.held_out == {arm.env.reset(seed=seed)[0] for seed in arm.settings.evaluation_seeds()}


def test_minibatches_are_drawn_anew_in_every_step(monkeypatch):
    arm, seen = scripted(arm_of(minibatch=2, lr=0.0)), []
    monkeypatch.setattr(arm, "gradient", lambda batch: seen.append(batch.returns.tolist()) or Arm.gradient(arm, batch))
    arm.step(), arm.step()
    assert sorted(sum(seen[:3], [])) == sorted(sum(seen[3:], [])) == sorted(RETURNS) and seen[:3] != seen[3:]


def test_gradients_are_scaled_down_to_norm_1_each_model_for_itself():
    arm = arm_of("ppo")
    learners, moves = [arm.policy, arm.critic], []
    arm.optimizers = [torch.optim.SGD(x.parameters(), 1.0) for x in learners]
    before = copy.deepcopy(learners)
    for x in learners:
        for p in x.parameters():
            p.grad = torch.full_like(p, 10.0)
    assert arm.update({})["grad_norm"] > 100  # before clipping
    for old, new in zip(before, learners):
        moves.append(sum((a - b).square().sum() for a, b in zip(old.parameters(), new.parameters())).sqrt().item())
    assert moves == pytest.approx([1, 1], rel=1e-3)


def test_a_boards_success_is_the_mean_over_its_own_rollouts(monkeypatch):
    arm = arm_of(eval_boards=3, eval_rollouts=2)
    data = trajectories_of(arm, RETURNS)
    data.success = torch.tensor([True, True, False, False, True, False])
    monkeypatch.setattr(arm, "play", lambda *_: data)
    assert arm.evaluate()["eval_board_success"] == [1.0, 0.0, 0.5]


def test_an_evaluations_luck_does_not_hang_on_the_trainings():
    arm = arm_of(max_response_tokens=10)
    first = arm.evaluate()
    torch.rand(1, generator=arm.generator)
    assert arm.evaluate() == first


def test_log_probs_that_stay_fixed_are_at_the_sampling_temperature():
    arm = arm_of(temperature=0.5)
    batch = batch_of(arm)
    log_p = torch.log_softmax(arm.policy(batch.ids).logits[:, :-1] / 0.5, -1).gather(-1, batch.ids[:, 1:, None])[..., 0]
    for column in (batch.old_logprobs, batch.ref_logprobs):  # the policy is still the reference
        torch.testing.assert_close(column[:, 1:], log_p * batch.response_mask[:, 1:], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name, ratio", [("clip_low", 0.9), ("clip_high", 1.1)])
def test_ratios_are_clipped_where_the_settings_say(name, ratio):
    arm = arm_of(**{name: 0.05})
    batch = batch_of(arm)
    batch.old_logprobs = batch.old_logprobs - float(np.log(ratio)) * batch.response_mask
    log = arm.gradient(batch)
    assert log["clip_fraction"] == log["n"]


def test_a_credit_knows_the_step_of_its_run(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(Arm, "step", lambda arm: seen.append(arm.credit.step) or {"updates": 0})
    monkeypatch.setattr(Arm, "evaluate", lambda arm: {})
    train.train_arm(Settings(**SMALL, out=str(tmp_path)), "grpo", "uniform", 0)
    assert seen == [1, 2]


def test_the_main_results_are_those_of_the_defaults():
    made = json.loads((ROOT / "results" / "main" / "summary.json").read_text())["config"]
    now = json.loads(json.dumps(dataclasses.asdict(Settings())))
    assert {name for name in now if now[name] != made.get(name, now[name])} <= {"seeds"}
    assert SettingsParser("train.py").parse_settings(["--env", "shop"])[0].keep == 1.0


def test_the_gradients_share_is_of_squares_over_action_tokens():
    arm = arm_of()
    batch = batch_of(arm)
    loss, hidden, _ = arm.loss(batch, batch)
    squares = torch.autograd.grad(loss, hidden)[0].square().sum(1)
    totals = arm.gradient(batch)
    assert totals["grad_all"] == pytest.approx(squares.sum().item(), rel=1e-4)
    of_actions = squares[batch.action_mask[batch.response_mask]].sum().item()
    assert totals["grad_action"] == pytest.approx(of_actions, rel=1e-4)


def test_what_a_steps_updates_say_is_counted_by_hand():
    on, row = torch.tensor([[True, True, True, False]]), lambda *values: torch.tensor([values])
    batch = SimpleNamespace(response_mask=on, action_mask=row(False, False, True, False),
                            weights=row(0.1, 0.1, 1.3, 0.0), old_entropy=row(1.0, 3.0, 5.0, 99.0),
                            energy=row(-1.0, -2.0, -7.0, 99.0),
                            value_targets=row(1.0, 2.0, 6.0, 99.0), old_values=row(1.0, 0.0, 3.0, -99.0))
    totals = Counter(updates=2, n=6, policy_loss=4.0, grad_norm=6.0, value_loss=8.0, approx_kl=3.0)
    found = said_of_updates(batch, totals)
    expected = {"think_entropy": 2, "action_entropy": 5, "action_energy": -7, "weight_share_action": 1.3 / 1.5,
                "policy_loss": 2, "grad_norm": 3, "value_loss": 4, "approx_kl": 0.5, "explained_variance": 1 - (7 / 3) / 7}
    assert {name: found[name] for name in expected} == pytest.approx(expected)
