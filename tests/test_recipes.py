"""The recipes for other frameworks, in extras/. TRL and verl are not requirements: without them, tests skip."""

import inspect
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from actfocus import action_mask, token_weights, weighted_policy_loss
from env import make, response
from extras.agent import tiny_model, tiny_tokenizer
from rollout import score

ROOT = Path(__file__).parent.parent


@pytest.fixture
def recipe():
    pytest.importorskip("trl")
    from extras import trl_trainer
    return trl_trainer


@pytest.fixture
def trl_run(recipe, instruct_model, tmp_path):
    """run(trainer class, options of the trainer, settings of GRPOConfig) -> a trainer that has made its steps on a tiny model."""
    import datasets
    from trl import GRPOConfig

    def run(cls, options={}, **more):
        settings = dict(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[], max_steps=2, learning_rate=1e-3,
                        per_device_train_batch_size=4, gradient_accumulation_steps=2, num_generations=4, max_completion_length=30,
                        epsilon_high=0.28, save_strategy="no", logging_steps=1, disable_tqdm=True) | more
        prompts = [[{"role": "user", "content": f"Play {word}."}] for word in ("Up", "Down", "Left", "Right")]
        model = AutoModelForCausalLM.from_pretrained(instruct_model, dtype=torch.float32, attention_dropout=0.0)
        options = {"model": model, "processing_class": AutoTokenizer.from_pretrained(instruct_model)} | options
        trainer = cls(reward_funcs=lambda completions, **_: [len(str(c)) % 7 / 7 for c in completions],
                      args=GRPOConfig(**settings), train_dataset=datasets.Dataset.from_dict({"prompt": prompts}), **options)
        trainer.train()
        return trainer
    return run


SAME = [{}, {"steps_per_generation": 1, "max_steps": 3, "beta": 0.1}, {"gradient_accumulation_steps": 1, "steps_per_generation": 2},
        {"steps_per_generation": 3, "max_steps": 3, "entropy_coef": 0.05}, {"num_iterations": 2, "max_steps": 4, "delta": 1.5},
        {"gradient_accumulation_steps": 3, "steps_per_generation": 2, "max_steps": 2, "top_entropy_quantile": 0.5},
        {"loss_type": "grpo", "off_policy_mask_threshold": 0.1}, {"loss_type": "dr_grpo", "mask_truncated_completions": True},
        {"loss_type": "cispo", "epsilon_high": 5.0}, {"importance_sampling_level": "sequence"}]


@pytest.mark.parametrize("settings", [pytest.param(x, marks=pytest.mark.slow if n > 2 else ()) for n, x in enumerate(SAME)], ids=str)
def test_trl_with_alpha_1_and_beta_0_is_trls_own_trainer(trl_run, recipe, settings):
    """Whatever is generated, accumulated and iterated together, and with every setting: the same losses and weights."""
    from trl import GRPOTrainer
    with pytest.warns(UserWarning, match="no action"):
        ours = trl_run(recipe.ActFocusTrainer, {"weighting": {"alpha": 1.0, "beta": 0.0}}, **settings)
    theirs = trl_run(GRPOTrainer, **settings)
    logs = [[{name: value for name, value in line.items() if "actfocus" not in name and "time" not in name and "second" not in name}
             for line in x.state.log_history if "loss" in line] for x in (ours, theirs)]
    assert logs[0] == logs[1] and len(logs[0]) == ours.state.global_step and any(line["grad_norm"] > 0 for line in logs[0])
    assert {"entropy", "clip_ratio/region_mean"} <= logs[0][0].keys() or settings.get("loss_type") == "cispo"
    rounding = 2e-5 if "importance_sampling_level" in settings else 0  # there the sum goes over tokens instead of rows
    for x, y in zip(ours.model.parameters(), theirs.model.parameters()):
        torch.testing.assert_close(x, y, atol=rounding, rtol=0)


def test_trl_weights_action_tokens_by_the_references_energy_over_all_that_is_generated(trl_run, recipe, monkeypatch, instruct_model):
    """The untrained checkpoint never writes a tag, so every third token is taken for one of an action."""
    third = lambda ids: torch.arange(ids.shape[1]).expand_as(ids) % 3 == 0
    monkeypatch.setattr(recipe, "action_mask", lambda tokenizer, ids, sampled, pattern: sampled & third(ids))
    seen = []

    class Watched(recipe.ActFocusTrainer):
        def _generate_and_score_completions(self, inputs):
            with monkeypatch.context() as patch:
                plain = recipe.GRPOTrainer._generate_and_score_completions
                patch.setattr(recipe.GRPOTrainer, "_generate_and_score_completions", lambda *x: seen.append(plain(*x)) or seen[-1])
                seen.append(super()._generate_and_score_completions(inputs))
            return seen[-1]
    trainer = trl_run(Watched)
    reference = AutoModelForCausalLM.from_pretrained(instruct_model, dtype=torch.float32).eval()
    assert len(seen) == 4 and any(not torch.equal(x, reference.state_dict()[name])
                                  for name, x in trainer.model.state_dict().items())
    for before, made in zip(seen[::2], seen[1::2]):
        ids, mask = (torch.cat([made[f"prompt_{x}"], made[f"completion_{x}"]], 1) for x in ("ids", "mask"))
        n, response = made["completion_ids"].shape[1], made["completion_mask"].bool()
        with torch.no_grad():
            logits = reference(input_ids=ids, attention_mask=mask).logits[:, -n - 1:-1].float()
        weights = token_weights(-torch.logsumexp(logits, -1), response & third(response), response)
        expected = before["advantages"][:, None] * weights * response.sum() / weights.sum()
        torch.testing.assert_close(made["advantages"], expected, atol=1e-5, rtol=1e-4)
        assert len(made["advantages"]) == 8  # both micro-batches
    line = trainer.state.log_history[0]
    assert 0.3 < line["actfocus/action_tokens"] < 0.4 and 0.8 < line["actfocus/action_weight"] < 1 and "entropy" in line


def test_the_recipes_weigh_as_the_method_does(recipe):
    from extras.verl_loss import weigh_advantages
    own, of_verl, of_trl = (inspect.signature(x).parameters for x in (token_weights, weigh_advantages, recipe.ActFocusTrainer))
    usual = {name: own[name].default for name in ("alpha", "beta")}
    assert {name: of_verl[name].default for name in usual} == of_trl["weighting"].default == usual


def test_trls_loss_with_weighted_advantages_is_the_weighted_loss(randn):
    """What the recipe rests on, where ratios are clipped too."""
    logprobs, old, advantages = (x.float() for x in (randn(4, 9), randn(4, 9), randn(4, 9)))
    weights = randn(4, 9).abs().float()
    loss, _ = weighted_policy_loss(logprobs, old, advantages, weights)
    ratio, scaled = (logprobs - old).exp(), advantages * weights * weights.numel() / weights.sum()
    torch.testing.assert_close(-torch.min(ratio * scaled, ratio.clamp(0.8, 1.28) * scaled).mean(), loss)


def test_trls_reference_is_the_model_as_training_starts_or_the_one_that_is_given(trl_run, recipe, instruct_model):
    start, sizes = AutoModelForCausalLM.from_pretrained(instruct_model, dtype=torch.float32), []

    class Watched(recipe.ActFocusTrainer):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            self.frozen.register_forward_hook(lambda model, inputs, output: sizes.append(output.logits.shape))
    frozen = trl_run(Watched).frozen
    assert all(torch.equal(x, y) for x, y in zip(frozen.parameters(), start.parameters()))
    assert sizes and all(rows == 1 and positions <= 31 for rows, positions, _ in sizes)  # no more than a row's logits at once
    with torch.no_grad():
        for x in start.parameters():
            x += 0.1
    assert trl_run(recipe.ActFocusTrainer, {"reference": start}).frozen is start


@pytest.mark.parametrize("kl", [0.0, 0.1])
@pytest.mark.parametrize("trained", [False, True], ids=["new adapter", "trained adapter"])
def test_a_lora_policys_reference_is_itself_without_the_new_adapter(trl_run, recipe, instruct_model, trained, kl):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model, options = AutoModelForCausalLM.from_pretrained(instruct_model, dtype=torch.float32, attention_dropout=0.0), {}
    if trained:
        model = peft.get_peft_model(model, lora)
        with torch.no_grad():
            for name, x in model.named_parameters():
                if "lora_B" in name:
                    x += 0.5
    else:
        options = {"peft_config": lora}
    ids = torch.arange(40).view(4, 10)
    made = {"prompt_ids": ids[:, :4], "completion_ids": ids[:, 4:], "prompt_mask": torch.ones(4, 4), "completion_mask": torch.ones(4, 6)}
    with torch.no_grad():
        expected = -torch.logsumexp(model.eval()(ids).logits[:, 3:-1], -1)
    trainer = trl_run(recipe.ActFocusTrainer, options | {"model": model}, beta=kl, learning_rate=0.1)
    torch.testing.assert_close(trainer.energies(made), expected)
    with torch.no_grad():
        assert not torch.allclose(-torch.logsumexp(trainer.model.eval()(ids).logits[:, 3:-1], -1), expected, atol=1e-3)


PROCESSES = """
import json, sys
sys.path.insert(0, {root!r})
import torch, datasets
from trl import GRPOConfig
from train import Settings, load_agent
from extras.trl_trainer import ActFocusTrainer, episode_return, playing
settings, processes = Settings(), int(sys.argv[1])
model, tokenizer = load_agent(settings.agent, "cpu")
play = playing(settings.make_env)
def by_board(prompts, trainer):  # what is sampled on a board then does not depend on the boards beside it
    parts = [play(prompts[i:i + 4], trainer) for i in range(0, len(prompts), 4)]
    return {{name: sum((part[name] for part in parts), []) for name in parts[0]}}
args = GRPOConfig(output_dir={out!r} + sys.argv[1], use_cpu=True, bf16=False, report_to=[], max_steps=2, learning_rate=1e-3,
                  per_device_train_batch_size=8 // processes, gradient_accumulation_steps=2, num_generations=4, temperature=1.0,
                  save_strategy="no", logging_steps=1, disable_tqdm=True)
trainer = ActFocusTrainer(model=model, processing_class=tokenizer, reward_funcs=episode_return, rollout_func=by_board, args=args,
                          train_dataset=datasets.Dataset.from_dict({{"prompt": [str(seed) for seed in range(16)]}}))
trainer.train()
if trainer.accelerator.is_main_process:
    print("LOG", json.dumps([line for line in trainer.state.log_history if "loss" in line]))
trainer.accelerator.end_training()  # gloo's threads, left to the interpreter's end, abort there now and then
"""


@pytest.mark.slow
def test_sokoban_through_trl_has_the_same_metrics_on_one_process_and_on_two(recipe, tmp_path):
    script, logs = tmp_path / "train_trl.py", []
    script.write_text(PROCESSES.format(root=str(ROOT), out=str(tmp_path / "out")))
    for processes in (1, 2):
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone", script, processes]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=240,
                              env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"})
        assert done.returncode == 0, done.stderr[-3000:]
        logs.append(json.loads(next(line for line in done.stdout.splitlines() if line.startswith("LOG"))[4:]))
    for one, two in zip(*logs):
        for name in ("loss", "grad_norm", "reward", "success", "actfocus/action_tokens", "actfocus/action_weight", "entropy"):
            assert two[name] == pytest.approx(one[name], rel=2e-3, abs=1e-4), name
    assert len(logs[0]) == 2 and logs[0][0]["grad_norm"] > 0 and 0.03 < logs[0][0]["actfocus/action_tokens"] < 0.1


class Moves:
    """Sokoban for TRL's `environment_factory`: public methods are tools, which the model calls."""

    def reset(self, seed, **_):
        self.env, self.total = make("sokoban", walls=0, observation="coordinates"), 0.0
        return self.env.reset(seed=seed)[0]

    def move(self, direction: str) -> str:
        """
        Step in a direction, and push what stands there.

        Args:
            direction: Up, Down, Left or Right
        """
        observation, reward, *_ = self.env.step(response([direction]))
        self.total += reward
        return observation

    def get_reward(self):
        return self.total


@pytest.fixture
def caller(recipe):
    """A small model that has learnt to call `move` in Qwen3's form, and its tokenizer: a tag is five tokens."""
    import trl
    template = (Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text()

    def call(tokenizer, seed, direction):  # -> prompt, and prompt and response, as text
        prompt = [{"role": "user", "content": "Push.\n" + Moves().reset(seed)}]
        move = {"type": "function", "function": {"name": "move", "arguments": {"direction": direction}}}
        text = lambda messages, **options: tokenizer.apply_chat_template(messages, chat_template=template, tools=[Moves().move],
                                                                         tokenize=False, enable_thinking=False, **options)
        return text(prompt, add_generation_prompt=True), text([*prompt, {"role": "assistant", "content": "", "tool_calls": [move]}])
    calls = list(enumerate(["Up", "Down", "Left", "Right"] * 2))
    tokenizer = tiny_tokenizer([call(tiny_tokenizer([]), *each)[1] for each in calls])
    tokenizer.chat_template = template
    ids = [[tokenizer(text.rstrip("\n"), add_special_tokens=False).input_ids for text in call(tokenizer, *each)] for each in calls]
    whole = torch.nn.utils.rnn.pad_sequence([torch.tensor(both) for _, both in ids], batch_first=True)
    sampled = torch.tensor([[len(prompt) <= t < len(both) for t in range(whole.shape[1])] for prompt, both in ids])
    model = tiny_model(tokenizer)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(80):
        (-score(model, whole, sampled).logprobs.sum() / sampled.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, tokenizer


@pytest.mark.slow
def test_tool_calls_in_trls_environments_are_the_actions(recipe, caller, tmp_path):
    import datasets
    from trl import GRPOConfig
    seen = []

    class Watched(recipe.ActFocusTrainer):
        def energies(self, made):
            seen.append(made["completion_ids"])
            return super().energies(made)

        def weigh(self, energy, action, response):
            seen.extend([action, response, super().weigh(energy, action, response)])
            return seen[-1]
    model, tokenizer = caller
    args = GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[], max_steps=2, per_device_train_batch_size=4,
                      gradient_accumulation_steps=2, num_generations=4, max_completion_length=300, max_tool_calling_iterations=2,
                      save_strategy="no", logging_steps=1, disable_tqdm=True, chat_template_kwargs={"enable_thinking": False})
    boards = datasets.Dataset.from_dict({"prompt": [[{"role": "user", "content": "Push.\n"}]] * 8, "seed": list(range(8))})
    trainer = Watched(model=model, processing_class=tokenizer, args=args, environment_factory=Moves, reward_funcs=[],
                      train_dataset=boards, pattern="(?s)<tool_call>(.*?)</tool_call>")
    trainer.train()
    line = trainer.state.log_history[0]
    assert line["tools/call_frequency"] > 0.8 and line["grad_norm"] > 0 and 0.4 < line["actfocus/action_tokens"] < 0.9
    ids, action, sampled, weights = seen[:4]
    call = re.compile("(?s)<tool_call>(.*?)</tool_call>")
    assert not (action & ~sampled).any() and not weights[~sampled].any() and (weights[action] > 1).all()
    for row in range(len(ids)):
        turns = [tokenizer.decode([token for token, _ in turn]) for own, turn in
                 itertools.groupby(zip(ids[row], sampled[row]), key=lambda pair: bool(pair[1])) if own]
        assert tokenizer.decode(ids[row][action[row]]) == "".join(sum(map(call.findall, turns), []))
        assert not any("player" in turn for turn in turns)
    assert sum(tokenizer.decode(row).count("<tool_response>") for row in ids) > len(ids) / 2


@pytest.mark.parametrize("loss", ["vanilla", "the actor's"])
def test_verls_losses_with_weighted_advantages_are_the_weighted_loss_and_with_1_0_their_own(agent, randn, loss):
    algos = pytest.importorskip("verl.trainer.ppo.core_algos")
    from tensordict import TensorDict
    from verl.workers.config import ActorConfig
    from verl.workers.utils import losses

    from extras.verl_loss import weigh_advantages
    config = ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=2, clip_ratio=0.2, clip_ratio_low=0.2,
                         clip_ratio_high=0.28, clip_ratio_c=100.0, use_kl_loss=False, entropy_coeff=0.0)
    tokenizer = agent[1]
    texts = [tokenizer(f"<think>The box.</think><answer>{act}</answer>").input_ids for act in ("Up", "Up || Left", "Down", "")]
    width = max(map(len, texts))
    responses = torch.tensor([ids + [tokenizer.pad_token_id] * (width - len(ids)) for ids in texts])
    mask = torch.arange(width) < torch.tensor([[len(ids)] for ids in texts])
    logprobs, old, advantages, energy = (0.3 * randn(4, width).float() for _ in range(4))
    logprobs.requires_grad_()
    actions = action_mask(tokenizer, responses, mask)
    assert actions.any(1).tolist() == [True, True, True, False]

    def of_verl(advantages):
        info = dict(dp_size=1, batch_num_tokens=int(mask.sum()), global_batch_size=4)
        total = 0.0
        for rows in (slice(0, 2), slice(2, 4)):  # micro-batches
            fields = {"old_log_probs": old[rows], "advantages": advantages[rows], "response_mask": mask[rows]}
            if loss == "vanilla":
                config.global_batch_info.update(**info, loss_scale_factor=None)
                total += algos.get_policy_loss_fn("vanilla")(
                    old_log_prob=old[rows], log_prob=logprobs[rows], advantages=advantages[rows], response_mask=mask[rows],
                    config=config)[0]
            else:
                with pytest.MonkeyPatch.context() as patch:  # the log-probs are padded already
                    patch.setattr(losses, "no_padding_2_padding", lambda x, data: x)
                    nested = {name: torch.nested.as_nested_tensor([row[m] for row, m in zip(x, mask[rows])], layout=torch.jagged)
                              for name, x in fields.items()}
                    data = TensorDict({**nested, **{k: v for k, v in info.items()}}, batch_size=[])
                    longest = int(mask[rows].sum(1).max())
                    total += losses.ppo_loss(config, {"log_probs": logprobs[rows, :longest]}, data)[0]
        gradient, = torch.autograd.grad(total, logprobs)
        return total.detach(), gradient

    for alpha, beta in ((0.1, 0.5), (1.0, 0.0)):
        batch = {"response_mask": mask.long(), "responses": responses, "advantages": advantages}
        weigh_advantages(batch, energy, tokenizer, alpha=alpha, beta=beta)
        expected, _ = weighted_policy_loss(logprobs, old, advantages, token_weights(energy, actions, mask, alpha=alpha, beta=beta))
        gradient, = torch.autograd.grad(expected, logprobs)
        for got, right in zip(of_verl(batch["advantages"]), (expected.detach(), gradient)):
            torch.testing.assert_close(got, right, atol=1e-6, rtol=1e-4)
    for got, right in zip(of_verl(advantages), of_verl(batch["advantages"])):
        torch.testing.assert_close(got, right)


@pytest.mark.slow
def test_an_update_of_verls_actor_with_weighted_advantages_has_the_gradient_of_the_weighted_loss():
    pytest.importorskip("verl")
    done = subprocess.run([sys.executable, ROOT / "tests" / "verl_actor.py"], capture_output=True, text=True, timeout=240,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and "the same loss and gradients" in done.stdout, done.stderr[-3000:]
