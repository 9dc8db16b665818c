"""The loop: what the update computes, what a run writes, and how it refuses bad settings."""

import dataclasses
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, CohereConfig, CohereForCausalLM

import env as environments
import train
from rollout import Chat, Transcript, demonstration, load_agent, pack, score
from train import Critic, Learner, Settings

ROOT = Path(train.__file__).parent
SMALL = ["--steps", "2", "--prompts", "3", "--rollouts", "4", "--minibatch", "4", "--micro-batch", "2", "--keep", "0.7",
         "--eval-boards", "2", "--eval-rollouts", "2", "--eval-every", "1", "--width", "32", "--layers", "1",
         "--warm-episodes", "64", "--warm-steps", "60", "--worse-steps", "5", "--max-response-tokens", "40"]


ANSWERS = ("<think>The box.</think><answer>Up</answer>", "<think>Up.</think><answer>Left || Down</answer>")


def trajectories_of(agent, rewards):
    """Scripted episodes, of one turn and of two by turns, with the given returns, action tokens and all."""
    model, tokenizer, make_env = agent
    chat, transcripts = Chat(tokenizer, make_env().system_prompt), []
    for i, reward in enumerate(rewards):
        transcript = Transcript(chat, make_env(), i, 10**6, 100)
        for answer in ANSWERS[: 1 + i % 2]:
            transcript.respond(tokenizer(answer).input_ids + [tokenizer.eos_token_id])
        transcript.rewards = [0.0] * (len(transcript.rewards) - 1) + [reward]
        transcripts.append(transcript)
    return pack(transcripts, tokenizer.pad_token_id)


def credit_of(data, advantages):
    """What a method hands to the learner: one advantage a trajectory."""
    return {"advantages": torch.as_tensor(advantages)[:, None] * data.response_mask}


def learner(agent, algo="grpo", credit="actfocus", **settings):
    import copy
    torch.manual_seed(0)
    policy = copy.deepcopy(agent[0]).eval()
    return Learner(policy, copy.deepcopy(agent[0]).requires_grad_(False), algo, credit, Settings(lr=1e-3, **settings))


RETURNS = [1.0, -1.0, 2.0, 0.5, 0.0, -0.5]


# Scoring


def test_scores_are_those_of_the_full_logits(agent):
    model = agent[0]
    data = trajectories_of(agent, RETURNS)
    stats = score(model, data.ids, data.response_mask, temperature=0.7)
    logits = model(data.ids).logits[:, :-1].double()
    log_p = torch.log_softmax(logits / 0.7, -1)
    here = data.response_mask[:, 1:]
    expected = {"logprobs": log_p.gather(-1, data.ids[:, 1:, None])[..., 0], "logsumexp": torch.logsumexp(logits, -1),
                "entropy": -(log_p.exp() * log_p).sum(-1)}
    for name, values in expected.items():
        actual = getattr(stats, name)
        torch.testing.assert_close(actual[:, 1:][here].double(), values[here], atol=1e-4, rtol=0)
        assert not actual[~data.response_mask].any()


def test_the_critics_value_of_a_token_does_not_see_it(agent):
    """V(before token t) must not change with token t or anything after it."""
    data = trajectories_of(agent, RETURNS)
    critic = Critic(agent[0])
    torch.nn.init.normal_(critic.head.weight)
    with torch.no_grad():
        values = critic(data.ids, data.response_mask)
        t = int(data.response_mask[0].nonzero()[4])
        changed = data.ids.clone()
        changed[0, t:] = 5
        again = critic(changed, data.response_mask)
    assert torch.equal(again[0, : t + 1], values[0, : t + 1]) and not torch.equal(again[0, t + 1:], values[0, t + 1:])


# The update


def gradients(agent, algo, credit, micro_batch, **settings):
    """Gradient of one minibatch over all trajectories, before clipping and stepping."""
    made = learner(agent, algo, credit, minibatch=64, micro_batch=micro_batch, max_grad_norm=1e9, **settings)
    kept = {}
    for i, optimizer in enumerate(made.optimizers):
        def keep(i=i, parameters=optimizer.param_groups[0]["params"]):
            kept.update({(i, j): p.grad.clone() for j, p in enumerate(parameters) if p.grad is not None})
        optimizer.step = keep
    data = trajectories_of(agent, RETURNS)
    metrics = made.update(*train.group_credit(data, data.returns.view(2, 3), None), np.random.default_rng(0))
    return metrics, kept


@pytest.mark.parametrize("algo", ["ppo", "grpo"])
@pytest.mark.parametrize("credit", ["uniform", "actfocus"])
def test_micro_batch_size_changes_neither_loss_nor_gradient(agent, algo, credit):
    whole, expected = gradients(agent, algo, credit, micro_batch=64, kl_coef=0.1, entropy_coef=0.1)
    for size in (1, 4):
        parts, actual = gradients(agent, algo, credit, micro_batch=size, kl_coef=0.1, entropy_coef=0.1)
        assert parts["policy_loss"] == pytest.approx(whole["policy_loss"], abs=1e-6)
        assert actual.keys() == expected.keys() and expected
        for name in expected:
            torch.testing.assert_close(actual[name], expected[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("algo", ["ppo", "grpo"])
def test_actfocus_with_alpha_1_and_beta_0_is_uniform_bit_for_bit(agent, algo):
    plain = gradients(agent, algo, "uniform", 64)
    focused = gradients(agent, algo, "actfocus", 64, alpha=1.0, beta=0.0)
    assert plain[0] == focused[0]
    assert all(torch.equal(plain[1][name], focused[1][name]) for name in plain[1])


def test_uniform_grpo_is_the_textbook_loss(agent):
    """The gradient of -mean over tokens of advantage * log-prob, the policy being still the old one."""
    _, actual = gradients(agent, "grpo", "uniform", 64, entropy_coef=0.0)
    model = agent[0]
    data = trajectories_of(agent, RETURNS)
    log_p = torch.log_softmax(model(data.ids).logits[:, :-1], -1).gather(-1, data.ids[:, 1:, None])[..., 0]
    advantages = torch.tensor([(r - m) / (s + 1e-6) for group in (RETURNS[:3], RETURNS[3:])
                               for m, s in [(np.mean(group), np.std(group, ddof=1))] for r in group], dtype=torch.float32)
    mask = data.response_mask[:, 1:]
    loss = -(advantages[:, None] * log_p * mask).sum() / mask.sum()
    expected = torch.autograd.grad(loss, list(model.parameters()))
    for (_, j), gradient in actual.items():
        torch.testing.assert_close(gradient, expected[j], atol=1e-5, rtol=1e-4)


def test_the_first_update_has_ratio_1_and_a_gradient_and_the_second_has_moved(agent):
    made = learner(agent, minibatch=3, entropy_coef=0.0)
    data = trajectories_of(agent, RETURNS)
    advantages = train.group_advantages(data.returns.view(2, 3)).flatten()
    first = learner(agent, minibatch=6, entropy_coef=0.0).update(data, credit_of(data, advantages), np.random.default_rng(0))
    assert first["ratio_mean"] == pytest.approx(1, abs=1e-6) and first["approx_kl"] == pytest.approx(0, abs=1e-6)
    assert first["grad_norm"] > 1e-3
    both = made.update(data, credit_of(data, advantages), np.random.default_rng(0))
    assert both["updates"] == 2 and abs(both["ratio_mean"] - 1) > 1e-4 and both["approx_kl"] > 1e-6


def test_actfocus_moves_the_gradient_to_action_tokens(agent):
    uniform, focused = (gradients(agent, "grpo", credit, 64)[0] for credit in ("uniform", "actfocus"))
    data = trajectories_of(agent, RETURNS)
    share = data.action_mask.sum() / data.response_mask.sum()
    assert uniform["weight_share_action"] == pytest.approx(share.item())
    assert focused["weight_share_action"] > 2 * uniform["weight_share_action"]
    assert focused["grad_share_action"] > uniform["grad_share_action"]


@pytest.mark.parametrize("algo", ["ppo", "grpo"])
def test_actfocus_costs_what_uniform_credit_costs(agent, algo):
    """Updates on one batch, in turn; `pytest -s -k costs` prints the medians.

    Processor time of one thread, and room in the bound: on a busy machine, threads wait for each other.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    data = trajectories_of(agent, RETURNS * 6)
    advantages = train.group_advantages(data.returns.view(6, 6)).flatten()
    seconds = {"uniform": [], "actfocus": []}
    for turn in range(15):
        for credit in sorted(seconds, reverse=turn % 2):
            made = learner(agent, algo, credit)
            started = time.process_time()
            made.update(data, credit_of(data, advantages), np.random.default_rng(0))
            seconds[credit].append(time.process_time() - started)
    torch.set_num_threads(threads)
    medians = {credit: statistics.median(values[1:]) for credit, values in seconds.items()}
    print(algo, medians, "ratio", medians["actfocus"] / medians["uniform"])
    assert medians["actfocus"] < 1.15 * medians["uniform"]


def test_rewarded_actions_become_likelier(agent):
    """Episodes of one turn are rewarded, those of two turns are not."""
    made = learner(agent, minibatch=6, entropy_coef=0.0)
    data = trajectories_of(agent, [1.0, -1.0] * 3)
    second_turn = data.action_mask & (data.turn_ids == 1)
    first_only = data.action_mask & (data.turn_ids.amax(1, keepdim=True) == 0)
    logprobs = lambda mask: score(made.policy, data.ids, data.response_mask).logprobs[mask].mean().item()
    rewarded, punished = logprobs(first_only), logprobs(second_turn)
    for _ in range(5):
        made.update(data, credit_of(data, [1.0, -1.0] * 3), np.random.default_rng(0))
    assert logprobs(second_turn) < punished and logprobs(first_only) - rewarded > logprobs(second_turn) - punished


def test_ppo_pays_the_return_on_the_last_response_token(agent):
    made = learner(agent, "ppo")
    data = trajectories_of(agent, RETURNS)
    batch = made.prepare(data, credit_of(data, torch.zeros(6)))
    # The critic starts at 0 and gamma = lambda = 1: every response token's target is the episode's return.
    for row, value in enumerate(RETURNS):
        targets = batch["value_targets"][row]
        assert torch.allclose(targets[batch["response_mask"][row]], torch.tensor(value))
        assert not targets[~batch["response_mask"][row]].any()
    whitened = batch["advantages"][batch["response_mask"]]
    assert whitened.mean().item() == pytest.approx(0, abs=1e-5)
    assert whitened.std(correction=0).item() == pytest.approx(1, abs=1e-3)


def test_the_critic_learns(agent):
    made = learner(agent, "ppo", critic_lr=1e-2)
    data = trajectories_of(agent, RETURNS)
    losses = [made.update(data, credit_of(data, torch.zeros(6)), np.random.default_rng(0))["value_loss"] for _ in range(20)]
    assert losses[-1] < 0.5 * losses[0]


def test_energy_comes_from_the_frozen_reference(agent):
    """After the policy has moved, the energies are still the reference's, and its weights are untouched."""
    made = learner(agent)
    data = trajectories_of(agent, RETURNS)
    before = made.prepare(data, credit_of(data, torch.ones(6)))
    with torch.no_grad():
        for parameter in made.policy.parameters():
            parameter.mul_(1.5)
    after = made.prepare(data, credit_of(data, torch.ones(6)))
    assert torch.equal(before["ref_energy"], after["ref_energy"]) and torch.equal(before["weights"], after["weights"])
    assert not torch.equal(before["old_logprobs"], after["old_logprobs"])
    logits = made.reference(data.ids).logits[:, :-1]
    here = data.response_mask[:, 1:]
    torch.testing.assert_close(after["ref_energy"][:, 1:][here], -torch.logsumexp(logits, -1)[here], atol=1e-4, rtol=0)


# Whole runs


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def command(cache, out, *arguments):
    return subprocess.run([sys.executable, "train.py", "--cache", cache, "--out", out, *SMALL, *arguments], cwd=ROOT,
                          capture_output=True, text=True, timeout=170, env=os.environ | {"OMP_NUM_THREADS": "1"})


def metrics(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    timed = ("tokens_per_second", "rollout_seconds", "seconds")
    return [{key: value for key, value in line.items() if key not in timed} for line in lines]


@pytest.fixture(scope="module")
def two_runs(cache, tmp_path_factory):
    """The same command twice: (result, directory) of each."""
    directories = [tmp_path_factory.mktemp("run") for _ in range(2)]
    return [(command(cache, out), out) for out in directories]


def test_a_run_compares_four_arms_and_writes_everything(two_runs):
    (result, out), _ = two_runs
    assert result.returncode == 0, result.stderr
    summary = json.loads((out / "summary.json").read_text())
    assert {"config", "floor", "ceiling", "arms"} <= summary.keys() and 0 <= summary["floor"] < summary["ceiling"] == 1
    assert [(arm["algo"], arm["credit"], arm["seed"]) for arm in summary["arms"]] == [
        ("ppo", "uniform", 0), ("ppo", "actfocus", 0), ("grpo", "uniform", 0), ("grpo", "actfocus", 0)]
    for arm in summary["arms"]:
        assert arm["eval_steps"] == [0, 1, 2] and len(arm["eval_success"]) == 3
        assert arm["final_success"] == arm["eval_success"][-1] and arm["peak_success"] == max(arm["eval_success"])
    assert len({arm["eval_success"][0] for arm in summary["arms"]}) == 1  # one warm start for all
    lines = metrics(out)
    assert [line["step"] for line in lines] == [0, 1, 2] * 4
    for line in lines:
        if line["step"]:
            assert {"return", "success", "format_valid", "think_tokens", "action_tokens", "zero_spread_groups"} <= line.keys()
        if line.get("updates"):
            assert {"think_entropy", "action_entropy", "grad_share_action", "approx_kl", "clip_fraction",
                    "grad_norm"} <= line.keys()
            assert ("explained_variance" in line) == (line["algo"] == "ppo")
    for words in ("ppo actfocus", "grpo uniform", "random actions", "best play 100.0", "1 seed proves nothing"):
        assert words in result.stdout
    assert "step/s" in result.stderr or "s/step" in result.stderr  # a progress bar with its speed


def test_both_credits_train_on_the_same_boards(two_runs):
    """Until the policies differ, so do not their rollouts: step 1 is played alike by all four arms."""
    lines = [line for line in metrics(two_runs[0][1]) if line["step"] == 1]
    assert len({(line["return"], line["think_tokens"]) for line in lines}) == 1


def test_the_same_seed_writes_the_same_metrics(two_runs):
    (first, one), (second, two) = two_runs
    assert second.returncode == 0, second.stderr
    assert metrics(one) == metrics(two)


def test_an_interrupted_run_keeps_its_finished_arms(cache, two_runs, tmp_path):
    """Two arms done, one begun, and a line torn by the kill: the resumed run ends as if nothing had happened."""
    whole = two_runs[0][1]
    lines = (whole / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text("".join(lines[:7]) + lines[7][:30])
    (tmp_path / "settings.json").write_text((whole / "settings.json").read_text())
    result = command(cache, tmp_path, "--resume")
    assert result.returncode == 0, result.stderr
    assert metrics(tmp_path) == metrics(whole)
    assert "2 arms" in result.stderr and (tmp_path / "metrics.jsonl").read_text().startswith("".join(lines[:6]))
    other = command(cache, tmp_path, "--resume", "--lr", "0.5", "--gamma", "0.9")
    assert other.returncode == 2 and other.stderr.count("\n") == 1 and "lr, gamma" in other.stderr


def test_the_taught_agent_is_cached_by_what_shaped_it(cache, two_runs):
    small = train.parse(["--cache", str(cache), *SMALL])[0]
    kept = [path for path in cache.iterdir() if "sokoban" in path.name]
    assert len(kept) == 1
    model, tokenizer = load_agent(str(kept[0]), "cpu")
    env = small.make_env()
    text = env.reset(seed=3)[0] + demonstration(env, np.random.default_rng(0), 0.5)
    fresh_vocabulary = tokenizer(text).input_ids
    assert tokenizer.decode(fresh_vocabulary) == text and len(fresh_vocabulary) < 110  # the phrases survived saving


def test_frozenlake_runs_from_the_command_line(cache, tmp_path):
    result = command(cache, tmp_path, "--env", "frozenlake", "--algos", "grpo", "--credits", "actfocus", "--jobs", "1",
                     "--keep", "1", "--signal", "entropy")
    assert result.returncode == 0, result.stderr
    assert len(metrics(tmp_path)) == 3


def test_a_saved_model_runs_from_its_directory(cache, tmp_path, two_runs):
    directory = next(path for path in cache.iterdir() if "sokoban" in path.name)
    result = command(cache, tmp_path, "--model", str(directory), "--env-options", "walls=0", "max_turns=3", "observation=both",
                     "--algos", "grpo", "--credits", "actfocus", "--steps", "1", "--seeds", "0", "1", "--kl-coef", "0.1")
    assert result.returncode == 0, result.stderr
    assert "over seeds 0 1" in result.stdout and "2 seeds prove nothing" in result.stdout


def test_a_model_that_scales_its_logits_is_refused_in_a_line(cache, tmp_path, instruct_model):
    """What `score` computes would not be its log-probs."""
    tokenizer = AutoTokenizer.from_pretrained(instruct_model)
    config = CohereConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, logit_scale=0.06,
                          num_attention_heads=2, num_key_value_heads=2, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
                          pad_token_id=tokenizer.pad_token_id)
    for part in (CohereForCausalLM(config), tokenizer):
        part.save_pretrained(tmp_path / "model")
    result = command(cache, tmp_path, "--model", str(tmp_path / "model"), "--jobs", "2")
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "logits are more than" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize("name", ["sudoku", "shop"])
def test_an_instruct_model_runs_from_its_directory(cache, tmp_path, instruct_model, name):
    """In bfloat16 with gradient checkpointing, PPO and GRPO, the paper's boards: the path that a downloaded model takes."""
    result = command(cache, tmp_path, "--model", str(instruct_model), "--env", name, "--precision", "bfloat16", "--lr", "1e-3",
                     "--gradient-checkpointing", "--steps", "1", "--eval-boards", "1", "--keep", "1", "--prompts", "1",
                     "--credits", "actfocus")
    assert result.returncode == 0, result.stderr
    lines = metrics(tmp_path)
    assert len(lines) == 4 and all(0 <= line["success"] <= 1 for line in lines if line["step"])
    if name == "shop":
        assert all({"eval_purchased", "eval_score"} <= line.keys() for line in lines) and "purchased" in result.stdout


def test_a_learning_rate_of_1e_6_moves_a_policy_that_computes_in_bfloat16(instruct_model):
    """Its float32 weights move; the same weights kept in bfloat16 would stay where they are."""
    policy, tokenizer = load_agent(instruct_model, torch.device("cpu"))
    make_env = lambda: environments.make("sokoban", walls=0)
    data = trajectories_of((policy, tokenizer, make_env), RETURNS)
    before = {name: x.clone() for name, x in policy.named_parameters()}
    learner = Learner(policy, load_agent(instruct_model, torch.device("cpu"))[0].requires_grad_(False), "grpo", "actfocus",
                      Settings(lr=1e-6, precision="bfloat16"))
    learner.update(data, credit_of(data, RETURNS), np.random.default_rng(0))
    moved = {name: (x != before[name]).float().mean().item() for name, x in policy.named_parameters()}
    rounded = [(x.bfloat16() != before[name].bfloat16()).float().mean().item() for name, x in policy.named_parameters()
               if x.dim() == 2]  # biases start at 0, where bfloat16 is as fine as float32
    assert policy.dtype == torch.float32 and min(moved.values()) > 0.5
    assert np.mean(rounded) < 0.05


@pytest.mark.parametrize("algo", ["ppo", "grpo"])
def test_gradient_checkpointing_changes_no_gradient(agent, algo):
    _, plain = gradients(agent, algo, "actfocus", 4)
    _, saving = gradients(agent, algo, "actfocus", 4, gradient_checkpointing=True)
    assert plain and plain.keys() == saving.keys()
    for name in plain:
        torch.testing.assert_close(saving[name], plain[name])


def test_dropout_of_a_loaded_model_is_switched_off(instruct_model):
    policy, _ = load_agent(instruct_model, torch.device("cpu"))
    policy.train()
    ids = torch.arange(20)[None]
    assert torch.equal(policy(ids).logits, policy(ids).logits)


def test_a_step_without_spread_is_skipped_and_counted(agent, tmp_path, monkeypatch):
    """An agent that never answers gets one return everywhere: no update, and the log says so."""
    model, tokenizer, _ = agent
    model.save_pretrained(tmp_path / "agent")
    tokenizer.save_pretrained(tmp_path / "agent")
    settings = Settings(model=str(tmp_path / "agent"), steps=1, prompts=2, rollouts=2, eval_boards=1, eval_rollouts=1,
                        max_response_tokens=5, out=str(tmp_path))
    lines = []
    train.train_arm(settings, settings.model, "grpo", "actfocus", 0, lines.append)
    assert lines[1]["updates"] == 0 and lines[1]["zero_spread_groups"] == 2 and lines[1]["format_valid"] == 0


@pytest.mark.parametrize("arguments, words", [
    (["--env", "chess"], "env"), (["--algos", "dqn"], "algos"), (["--credits", "magic"], "credits"),
    (["--signal", "loud"], "signal"),
    (["--alpha", "2"], "alpha"), (["--alpha", "nan"], "alpha"), (["--beta", "-1"], "beta"), (["--beta", "inf"], "beta"),
    (["--steps", "-1"], "steps"), (["--steps", "many"], "steps"), (["--seeds", "0", "0"], "seeds"), (["--seeds"], "seeds"),
    (["--width", "50"], "width"), (["--env-options", "size"], "env_options"), (["--env-options", "size=2"], "size"),
    (["--env-options", "size=4", "walls=0"], "no board"),
    (["--env-options", "colour=red"], "colour"), (["--model", "/no/such/model"], "model"), (["--device", "abacus"], "abacus"),
    *([] if torch.cuda.is_available() else [(["--device", "cuda"], "no GPU")]),
    (["--out", "/proc/nowhere"], "/proc"), (["--out", "train.py/x"], "train.py/x"), (["--unknown", "1"], "unknown")])
def test_bad_settings_end_in_one_line_and_exit_code_2(arguments, words, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(train, "compare", lambda *_: pytest.fail("work was begun"))
    with pytest.raises(SystemExit) as exit:
        train.main(["--cache", str(tmp_path), "--out", str(tmp_path), *arguments])
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.count("\n") == 1 and error.startswith("train.py: ") and words in error


@pytest.mark.parametrize("old, new, words", [
    ("{% if messages[0]['role'] != 'system' %}", "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}",
     "no system role"),
    ("assistant\n", "assistant\n<think>\n", "opens the reasoning"), ("<|im_end|>", "<|endoftext|>", "does not close")])
def test_a_model_whose_chat_template_does_not_fit_is_named(instruct_model, tmp_path, capsys, old, new, words):
    tokenizer = AutoTokenizer.from_pretrained(instruct_model)
    tokenizer.chat_template = tokenizer.chat_template.replace(old, new)
    tokenizer.save_pretrained(tmp_path / "model")
    shutil.copy(instruct_model / "config.json", tmp_path / "model")
    with pytest.raises(SystemExit) as exit:
        train.parse(["--model", str(tmp_path / "model"), "--out", str(tmp_path), "--cache", str(tmp_path)])
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.count("\n") == 1 and words in error


def test_a_preset_changes_defaults_and_the_command_line_overrides_it(tmp_path):
    where = ["--out", str(tmp_path), "--cache", str(tmp_path)]
    settings = train.parse(["--preset", "paper", *where])[0]
    env = settings.make_env()
    assert (settings.steps, env.max_turns, env.n_walls, env.observation, env.response_limit) == (200, 5, 2, "grid", 400)
    assert train.parse(["--preset", "paper", "--steps", "7", *where])[0].steps == 7
    assert train.parse(where)[0].make_env().max_turns == 4
    assert train.parse(["--env", "sudoku", *where])[0].max_response_tokens == 140
    assert train.parse(["--env", "sudoku", "--max-response-tokens", "9", *where])[0].max_response_tokens == 9


def test_every_setting_is_explained(capsys):
    with pytest.raises(SystemExit) as exit:
        train.main(["--help"])
    text = capsys.readouterr().out
    assert exit.value.code == 0
    for field in dataclasses.fields(Settings):
        assert "--" + field.name.replace("_", "-") in text and len(field.metadata["help"]) > 10


def test_the_table_reports_means_ranges_and_who_won():
    def arm(algo, credit, seed, *success):
        return {"algo": algo, "credit": credit, "seed": seed, "eval_steps": [0, 10], "eval_success": list(success),
                "final_success": success[-1], "peak_success": max(success),
                "final_board_success": [success[-1] - 0.1, success[-1] + 0.1]}
    arms = [arm("grpo", "uniform", 0, 0.2, 0.4), arm("grpo", "uniform", 1, 0.5, 0.3), arm("grpo", "actfocus", 0, 0.2, 0.7),
            arm("grpo", "actfocus", 1, 0.5, 0.2)]
    config = dataclasses.asdict(Settings(seeds=(0, 1)))
    text = train.table({"config": config, "floor": 0.05, "ceiling": 1.0, "arms": arms})
    assert "grpo: ActFocus ends 10.0 points ahead of uniform, ahead in 1 of 2 seeds" in text
    assert "35.0 (30.0..40.0)" in text and "-10.0 (-20.0..0.0)" in text and "2 seeds prove nothing" in text
    assert not math.isnan(float(text.split("random actions ")[1].split(",")[0]))
