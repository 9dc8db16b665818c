"""The README's recipes for other frameworks, run as printed. TRL and verl are not requirements: without them, tests skip."""

import re
from pathlib import Path

import pytest
import torch

from actfocus import token_weights, weighted_policy_loss

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()


def recipe(text):
    """The README's python block that holds `text`."""
    block, = [block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if text in block]
    assert block.count("\n") < 40, "a recipe is under 40 lines"
    names = {}
    exec(block, names)
    return names


@pytest.fixture
def trl_run(instruct_model, tmp_path):
    """run(trainer class) -> a GRPOTrainer that has made 2 steps, of two micro-batches each, on a tiny checkpoint."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")

    def run(cls):
        options = dict(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[], max_steps=2, learning_rate=1e-3,
                       per_device_train_batch_size=4, gradient_accumulation_steps=2, num_generations=4, max_completion_length=30,
                       epsilon_high=0.28, save_strategy="no", logging_steps=1, disable_tqdm=True)
        prompts = [[{"role": "user", "content": f"Play {word}."}] for word in ("Up", "Down", "Left", "Right")]
        rewards = lambda completions, **_: [len(str(c)) % 7 / 7 for c in completions]
        trainer = cls(model=str(instruct_model), reward_funcs=rewards, args=trl.GRPOConfig(**options),
                      train_dataset=datasets.Dataset.from_dict({"prompt": prompts}))
        for module in trainer.model.modules():  # the checkpoint's; two passes are compared, which must not draw differently
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.0
        trainer.train()
        return trainer
    return run


def watched(cls, **weighting):
    """The recipe's trainer, which also notes TRL's own loss of every micro-batch."""
    class Watched(cls):
        def _compute_loss(self, model, inputs):
            mine, theirs = super()._compute_loss(model, inputs), super(cls, self)._compute_loss(model, inputs)
            gradients = [torch.autograd.grad(loss, list(model.parameters()), retain_graph=True) for loss in (mine, theirs)]
            self.__dict__.setdefault("pairs", []).append((mine.item(), theirs.item(), gradients, dict(inputs)))
            return mine
    Watched.weighting = weighting
    return Watched


def test_trl_with_alpha_1_and_beta_0_is_trls_own_loss(trl_run):
    trainer = trl_run(watched(recipe("class ActFocusTrainer")["ActFocusTrainer"], alpha=1.0, beta=0.0))
    assert len(trainer.pairs) == 4 and trainer.state.global_step == 2
    for mine, theirs, gradients, _ in trainer.pairs:
        assert mine == pytest.approx(theirs, abs=1e-6)
        for a, b in zip(*gradients):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_trl_weights_action_tokens_by_energy_over_the_whole_batch(trl_run, monkeypatch):
    """The untrained checkpoint never writes a tag, so every third token is taken for one of an action."""
    names = recipe("class ActFocusTrainer")
    monkeypatch.setitem(names, "answer_mask", lambda tokenizer, ids: torch.arange(ids.shape[1]).expand_as(ids) % 3 == 0)
    trainer = trl_run(watched(names["ActFocusTrainer"], alpha=0.1, beta=0.5))
    assert len(trainer.pairs) == 4 and any(abs(mine - theirs) > 1e-6 for mine, theirs, *_ in trainer.pairs)
    for first, second in zip(trainer.pairs[::2], trainer.pairs[1::2]):  # the micro-batches of one optimiser step
        parts = [first[3], second[3]]
        weights = torch.cat([part["weights"] for part in parts])
        assert all(part["weight_sum"].item() == pytest.approx(weights.sum().item()) for part in parts)
        energy, masks = [], []
        for part in parts:
            ids, mask = (torch.cat([part[f"prompt_{x}"], part[f"completion_{x}"]], 1) for x in ("ids", "mask"))
            n = part["completion_ids"].shape[1]
            with torch.no_grad():
                logits = trainer.frozen(input_ids=ids, attention_mask=mask).logits[:, -n - 1:-1].float()
            energy.append(-torch.logsumexp(logits, -1))
            masks.append(part["completion_mask"].bool())
        response, energy = torch.cat(masks), torch.cat(energy)
        action = response & (torch.arange(response.shape[1]) % 3 == 0)
        torch.testing.assert_close(weights, token_weights(energy, action, response), atol=1e-5, rtol=0)


def test_trl_masks_are_the_characters_between_the_tags(agent):
    pytest.importorskip("trl")
    tokenizer = agent[1]
    text = "<think>Up</think><answer>Up || Left</answer>"
    ids = torch.tensor([tokenizer(text).input_ids, tokenizer(text.replace("</answer>", "<answer>")).input_ids])
    mask = recipe("class ActFocusTrainer")["answer_mask"](tokenizer, ids)
    assert tokenizer.decode(ids[0][mask[0]]) == "Up || Left" and not mask[1].any()


def test_verls_registered_loss_is_the_weighted_loss_and_with_1_0_its_own(randn):
    algos = pytest.importorskip("verl.trainer.ppo.core_algos")
    from verl.workers.config import ActorConfig
    names = recipe("register_policy_loss")
    config = ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=2, clip_ratio=0.2, clip_ratio_low=0.2,
                         clip_ratio_high=0.28, clip_ratio_c=100.0)
    logprobs, old, advantages = (x.float() for x in (0.1 * randn(4, 9), 0.1 * randn(4, 9), randn(4, 9)))
    mask = torch.arange(9) < torch.tensor([[9], [4], [6], [7]])
    action = mask & (torch.arange(9) % 3 == 0)
    energy = randn(4, 9)
    for alpha, beta in ((0.1, 0.5), (1.0, 0.0)):
        batch = {"response_mask": mask.long()}
        names["add_weights"](batch, energy, action, alpha, beta)
        config.global_batch_info.update(dp_size=1, batch_num_tokens=int(mask.sum()), global_batch_size=4, loss_scale_factor=None)
        loss = 0.0
        for rows in (slice(0, 2), slice(2, 4)):  # micro-batches
            loss += algos.get_policy_loss_fn("actfocus")(
                old_log_prob=old[rows], log_prob=logprobs[rows], advantages=advantages[rows], response_mask=mask[rows],
                config=config, rollout_is_weights=batch["rollout_is_weights"][rows])[0]
        expected, _ = weighted_policy_loss(logprobs, old, advantages, token_weights(energy, action, mask, alpha=alpha, beta=beta))
        torch.testing.assert_close(loss, expected)
    plain, _ = algos.get_policy_loss_fn("vanilla")(old_log_prob=old, log_prob=logprobs, advantages=advantages, response_mask=mask,
                                                   config=config)
    torch.testing.assert_close(loss, plain)
