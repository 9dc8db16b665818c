"""ActFocus in Hugging Face TRL: GRPOTrainer with another loss and nothing else. Use it as you would use GRPOTrainer.

    from extras.trl_trainer import ActFocusTrainer          # or copy this file and actfocus.py into your project
    trainer = ActFocusTrainer(model="Qwen/Qwen2.5-0.5B-Instruct", reward_funcs=..., train_dataset=...,
                              args=GRPOConfig(epsilon_high=0.28, ...))     # the paper's clip; TRL's own default is 0.2
    trainer.train()

Tried with TRL 1.16.0 on small local checkpoints on a CPU; the tests make 2 steps of 2 micro-batches. With `weighting =
{"alpha": 1.0, "beta": 0.0}`, loss and gradient are TRL's own (`loss_type="dapo"`, its default). Several GPUs are TRL's
business and were not run: mu and sigma are then each process's own, the normaliser is everybody's, and the frozen model is
not sharded.

Not supported. What is not part of this loss is refused in one line: the KL penalty (beta), the entropy bonus, other loss types,
sequence-level ratios, top_entropy_quantile, delta, off_policy_mask_threshold, vLLM's importance correction. Images and a
mixture of experts' auxiliary loss are left out. TRL's `entropy` and `clip_ratio/*` are not logged; `actfocus/*` are.

Only text between <answer> and </answer> counts as an action. An agent that acts by tool calls has none: a warning says so,
and what is left is plain GRPO. Several turns in one completion work as far as TRL masks the observations (`tool_mask`, or
`env_mask` from a `rollout_func`): tags are looked for within each run of sampled tokens.
"""

import copy
import warnings

import torch
from trl import GRPOTrainer

from actfocus import action_mask, token_energy, token_weights, weighted_policy_loss

# What this loss does not do: the values that GRPOConfig must have
REQUIRED = {"loss_type": "dapo", "beta": 0.0, "importance_sampling_level": "token", "top_entropy_quantile": 1.0, "delta": None,
            "entropy_coef": 0.0, "use_adaptive_entropy": False, "off_policy_mask_threshold": None}


class ActFocusTrainer(GRPOTrainer):
    weighting = {"alpha": 0.1, "beta": 0.5}

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        wrong = {name: value for name, value in REQUIRED.items() if getattr(self.args, name, value) != value}
        if self.args.use_vllm and self.args.vllm_importance_sampling_correction:
            wrong["vllm_importance_sampling_correction"] = False
        if wrong:
            raise ValueError("ActFocusTrainer needs " + ", ".join(f"{name}={value!r}" for name, value in wrong.items()))
        # The reference: the model as training starts, with the LoRA adapter that it came with
        self.frozen = copy.deepcopy(self.model).eval().requires_grad_(False).to(self.accelerator.device)
        for module in self.frozen.modules():  # TRL puts a forward of its own on the model, and its copy would call the policy
            vars(module).pop("forward", None)

    def _compute_loss(self, model, inputs):
        if "weights" not in inputs:
            self.weigh(self._buffered_inputs if model.training else [inputs], model.training)
        new, *_ = self._get_per_token_logps_and_entropies(model, *whole(inputs), inputs["completion_ids"].shape[1])
        old = inputs.get("old_per_token_logps")
        loss, stats = weighted_policy_loss(
            new, new.detach() if old is None else old, inputs["advantages"][:, None].expand_as(new), inputs["weights"],
            clip_low=self.epsilon_low, clip_high=self.epsilon_high, weight_sum=inputs["weight_sum"])
        for name, value in stats.items():
            log = self._metrics["train" if model.training else "eval"][f"actfocus/{name}"]
            log.append(self.accelerator.gather(value).mean().item())
        return loss

    @torch.no_grad()
    def weigh(self, parts, training):
        """Weights of all that was sampled together, in place: mu and sigma are the batch's, not a micro-batch's."""
        energy = torch.cat([self.energy(part) for part in parts])
        ids = torch.cat([part["completion_ids"] for part in parts])
        response = torch.cat([part["completion_mask"] * part.get("tool_mask", 1) for part in parts]).bool()
        action = action_mask(self.processing_class, ids, response)
        if not action.any():
            warnings.warn("no <answer> in this batch: ActFocus has nothing to weigh, and this is plain GRPO")
        weights = token_weights(energy, action, response, **self.weighting)
        # As TRL's own normaliser: the whole generation batch's sum, over all processes, scaled to one optimiser step
        weight_sum = self.accelerator.reduce(weights.sum()) / self.accelerator.num_processes
        if training:
            weight_sum = weight_sum * self.current_gradient_accumulation_steps / len(parts)
        for part, of_part in zip(parts, weights.split([len(part["completion_ids"]) for part in parts])):
            part |= {"weights": of_part, "weight_sum": weight_sum}

    def energy(self, part):
        """Of each completion token [B, T], under the frozen reference."""
        ids, mask = whole(part)
        length = part["completion_ids"].shape[1]
        logits = self.frozen(input_ids=ids, attention_mask=mask, logits_to_keep=length + 1).logits
        return token_energy(logits[:, -length - 1:-1])


def whole(inputs):
    """(ids, attention mask) of prompts with their completions."""
    return (torch.cat([inputs["prompt_" + name], inputs["completion_" + name]], 1) for name in ("ids", "mask"))
