"""The recipes for other frameworks, in extras/. TRL and verl are not requirements: without them, tests skip."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from actfocus import token_weights, weighted_policy_loss


@pytest.fixture
def recipe():
    pytest.importorskip("trl")
    from extras import trl_trainer
    return trl_trainer


@pytest.fixture
def trl_run(recipe, instruct_model, tmp_path):
    """run(trainer class, settings of GRPOConfig) -> a trainer that has made 2 steps on a tiny checkpoint."""
    import datasets
    from trl import GRPOConfig

    def run(cls, **more):
        options = dict(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[], max_steps=2, learning_rate=1e-3,
                       per_device_train_batch_size=4, gradient_accumulation_steps=2, num_generations=4, max_completion_length=30,
                       epsilon_high=0.28, save_strategy="no", logging_steps=1, disable_tqdm=True) | more
        prompts = [[{"role": "user", "content": f"Play {word}."}] for word in ("Up", "Down", "Left", "Right")]
        trainer = cls(model=str(instruct_model), reward_funcs=lambda completions, **_: [len(str(c)) % 7 / 7 for c in completions],
                      args=GRPOConfig(**options), train_dataset=datasets.Dataset.from_dict({"prompt": prompts}))
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


@pytest.mark.parametrize("accumulation, generated", [(2, 2), (2, 1), (1, 2)])
def test_trl_with_alpha_1_and_beta_0_is_trls_own_loss(trl_run, recipe, accumulation, generated):
    """Also where what is generated together is not what an optimiser step uses."""
    with pytest.warns(UserWarning, match="no <answer>"):
        trainer = trl_run(watched(recipe.ActFocusTrainer, alpha=1.0, beta=0.0), gradient_accumulation_steps=accumulation,
                          steps_per_generation=generated)
    assert len(trainer.pairs) == 2 * accumulation and trainer.state.global_step == 2
    assert any(abs(mine) > 1e-3 for mine, *_ in trainer.pairs)
    for mine, theirs, gradients, _ in trainer.pairs:
        assert mine == pytest.approx(theirs, abs=1e-6)
        for a, b in zip(*gradients):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_trl_weights_action_tokens_by_the_references_energy_over_the_whole_batch(trl_run, recipe, monkeypatch, instruct_model):
    """The untrained checkpoint never writes a tag, so every third token is taken for one of an action."""
    third = lambda ids: torch.arange(ids.shape[1]).expand_as(ids) % 3 == 0
    monkeypatch.setattr(recipe, "action_mask", lambda tokenizer, ids, sampled: sampled & third(ids))
    trainer = trl_run(watched(recipe.ActFocusTrainer, alpha=0.1, beta=0.5))
    reference = AutoModelForCausalLM.from_pretrained(instruct_model, dtype=torch.float32).eval()
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
                logits = reference(input_ids=ids, attention_mask=mask).logits[:, -n - 1:-1].float()
            energy.append(-torch.logsumexp(logits, -1))
            masks.append(part["completion_mask"].bool())
        response, energy = torch.cat(masks), torch.cat(energy)
        torch.testing.assert_close(weights, token_weights(energy, response & third(response), response), atol=1e-5, rtol=0)
    assert "actfocus/approx_kl" in {name for line in trainer.state.log_history for name in line}


def test_trls_settings_that_the_loss_does_not_have_are_refused(trl_run, recipe):
    for name, value in (("beta", 0.04), ("loss_type", "grpo"), ("importance_sampling_level", "sequence"), ("entropy_coef", 0.01),
                        ("top_entropy_quantile", 0.2), ("delta", 2.0), ("off_policy_mask_threshold", 0.1)):
        with pytest.raises(ValueError, match=f"ActFocusTrainer needs {name}="):
            trl_run(recipe.ActFocusTrainer, **{name: value})


def test_verls_registered_loss_is_the_weighted_loss_and_with_1_0_its_own(randn):
    algos = pytest.importorskip("verl.trainer.ppo.core_algos")
    from verl.workers.config import ActorConfig

    from extras.verl_loss import add_weights
    config = ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=2, clip_ratio=0.2, clip_ratio_low=0.2,
                         clip_ratio_high=0.28, clip_ratio_c=100.0)
    logprobs, old, advantages = (x.float() for x in (0.1 * randn(4, 9), 0.1 * randn(4, 9), randn(4, 9)))
    mask = torch.arange(9) < torch.tensor([[9], [4], [6], [7]])
    action = mask & (torch.arange(9) % 3 == 0)
    energy = randn(4, 9)
    for alpha, beta in ((0.1, 0.5), (1.0, 0.0)):
        batch = {"response_mask": mask.long()}
        add_weights(batch, energy, action, alpha, beta)
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
