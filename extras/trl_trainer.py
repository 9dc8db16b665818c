"""ActFocus in Hugging Face TRL: a GRPOTrainer whose advantages are weighted, and this project's environments for it.

    from extras.trl_trainer import ActFocusTrainer          # or copy this file (and actfocus.py) into your project
    trainer = ActFocusTrainer(model="Qwen/Qwen2.5-0.5B-Instruct", reward_funcs=..., train_dataset=..., args=...)

w min(rho A, clip(rho) A) = min(rho (w A), clip(rho) (w A)) for w >= 0: a token's weight may stand in its advantage. So
all of TRL's settings keep their meaning, and (alpha, beta) = (1, 0) is GRPOTrainer bit for bit (where epsilon_high is
set: else it is 0.28, the paper's). `weighting` has ActFocus's beta; GRPOConfig's is the KL penalty's. Weights have mean
1 over all that all processes generate together; with loss_type="dapo", TRL's default, that is the paper's division by
their sum. KL penalty and entropy bonus stay unweighted. A response is a run of tokens that TRL does not mask
(`tool_mask`, or `env_mask` of a rollout_func); pattern="(?s)<tool_call>(.*?)</tool_call>" finds tool calls.
Tried with TRL 1.16.0 on a CPU, one and two processes. On several GPUs only the launcher changes; none was run, nor was
vLLM: `accelerate launch --multi_gpu --num_processes 8 trl_run.py`, or with `--use_deepspeed --zero_stage 3`, or with
`--use_fsdp --fsdp_version 2` (without `playing`).
"""

import copy
import warnings
from contextlib import nullcontext

import torch
from trl import GRPOTrainer
from trl.models import prepare_deepspeed, prepare_fsdp, unwrap_model_for_generation
from trl.trainer.utils import use_adapter

from actfocus import ANSWER, action_mask, token_energy, token_weights


class ActFocusTrainer(GRPOTrainer):
    """GRPOTrainer's arguments and weighting: alpha and beta; pattern: what is an action; reference: the frozen model.

    By default the reference is the model as training starts; of a model with adapters, itself without the new one.
    """

    def __init__(self, *arguments, weighting={"alpha": 0.1, "beta": 0.5}, pattern=ANSWER, reference=None, **options):
        super().__init__(*arguments, **options)
        self.weighting, self.pattern = weighting, pattern
        if self.args.epsilon_high is None and self.loss_type != "cispo":  # there it is another thing
            self.epsilon_high = 0.28
        copied = "ref" in getattr(self.model, "peft_config", {})  # by TRL: the adapter that the model came with
        if reference is None and (copied or options.get("peft_config")):
            self.frozen, self.as_reference = None, lambda model: use_adapter(model, "ref" if copied else None)
            return
        frozen, self.as_reference = copy.deepcopy(self.model) if reference is None else reference, nullcontext
        for module in frozen.modules():  # TRL puts a forward of its own on the model: its copy would call the policy
            vars(module).pop("forward", None)
        frozen.eval().requires_grad_(False)
        self.frozen = (prepare_deepspeed(frozen, self.accelerator) if self.is_deepspeed_enabled else
                       prepare_fsdp(frozen, self.accelerator) if self.is_fsdp_enabled else
                       self.accelerator.prepare_model(frozen, evaluation_mode=True))

    @torch.no_grad()
    def _generate_and_score_completions(self, inputs):
        made = super()._generate_and_score_completions(inputs)
        if "pixel_values" in made:
            raise ValueError("ActFocusTrainer does not know images")
        response = (made["completion_mask"] * made.get("tool_mask", 1)).bool()  # [B, T]
        action = action_mask(self._tokenizer, made["completion_ids"], response, pattern=self.pattern)
        weights = self.weigh(self.energies(made), action, response)
        total = lambda x: self.accelerator.reduce(x.sum().float())  # over all processes
        tokens, actions, weight, of_actions = map(total, (response, action, weights, weights[action]))
        if not actions:
            warnings.warn("no action in what was generated: ActFocus has nothing to weigh, and this is plain GRPO")
        log = self._metrics["train" if self.model.training else "eval"]
        log["actfocus/action_tokens"].append((actions / tokens.clamp(min=1)).item())
        log["actfocus/action_weight"].append((of_actions / weight.clamp(min=1e-30)).item())
        return made | {"advantages": made["advantages"][:, None] * weights * (tokens / weight.clamp(min=1e-30))}

    def energies(self, made):
        """Of each completion token [B, T] under the reference: a row's logits at a time, in float32 a part of it."""
        ids, mask = (torch.cat([made["prompt_" + name], made["completion_" + name]], 1) for name in ("ids", "mask"))
        length, energies = made["completion_ids"].shape[1], []
        model = self.accelerator.unwrap_model(self.model) if self.frozen is None else self.frozen
        training = model.training
        model.eval()
        with self.as_reference(model):
            for row, real in zip(ids, mask):
                logits = model(input_ids=row[None], attention_mask=real[None], logits_to_keep=length + 1).logits
                energies.append(torch.cat([token_energy(part) for part in logits[0, -length - 1:-1].split(256)]))
                del logits  # before there are the next row's
        model.train(training)
        return torch.stack(energies)

    def weigh(self, energy, action, response):
        """token_weights [B, T] with mu and sigma of the action tokens of all processes."""
        weights, own = token_weights(energy, action, response, **self.weighting), energy[action]
        longest = self.accelerator.pad_across_processes(own, pad_index=float("nan"))
        everybody = self.accelerator.gather(longest)[None]  # [1, processes * longest]
        known = ~everybody.isnan()
        start = self.accelerator.process_index * len(longest)
        weights[action] = token_weights(everybody, known, known, **self.weighting)[0, start:start + len(own)]
        return weights


def playing(make_env, max_response_tokens=100):
    """A rollout_func: each prompt of the dataset is a board's seed, as text. Rewards see returns and success."""
    from rollout import rollout

    def rollout_func(prompts, trainer):
        if trainer.is_fsdp_enabled:  # each forward pass is everybody's there, and one process plays longer than another
            raise ValueError("playing: not under FSDP, where processes would wait for ever; DDP or DeepSpeed")
        seeds = [int(prompt) for prompt in prompts]
        luck = hash((trainer.args.seed, trainer._step, *seeds)) % 2**63
        with unwrap_model_for_generation(trainer.model_wrapped, trainer.accelerator) as model:
            played = rollout(model, trainer.processing_class, [make_env() for _ in seeds], seeds=seeds,
                             temperature=trainer.temperature, max_response_tokens=max_response_tokens,
                             generator=torch.Generator(model.device).manual_seed(luck))
        spans = [slice(int(sampled.int().argmax()), int(n)) for sampled, n in zip(played.response_mask, played.lengths)]
        cut = lambda x: [row[span].tolist() for row, span in zip(x, spans)]
        return {"prompt_ids": [row[:span.start].tolist() for row, span in zip(played.ids, spans)],
                "completion_ids": cut(played.ids), "logprobs": cut(played.logprobs),
                "env_mask": cut(played.response_mask.int()), "returns": played.returns.tolist(),
                "success": played.success.float().tolist()}
    return rollout_func


def episode_return(returns, success, log_metric, **_):
    """The reward function that goes with `playing`; the log gets `success`."""
    log_metric("success", sum(success) / len(success))
    return returns
