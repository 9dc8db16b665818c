"""One update of verl's actor (its FSDP engine and `ppo_loss`) on a CPU, from episodes that were played here.

Run by test_recipes.py in a process of its own. verl knows no CPU: a platform that says so stands in for CUDA's.
"""

import os
import sys
from functools import partial
from pathlib import Path

os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
import trl  # noqa: E402
from tensordict import TensorDict  # noqa: E402
from verl.plugin.platform import set_platform  # noqa: E402
from verl.plugin.platform.platform_cuda import PlatformCUDA  # noqa: E402


class CPU(PlatformCUDA):
    device_name, device_module = "cpu", torch.cpu

    def is_available(self):
        return True

    def current_device(self):
        return torch.device("cpu")

    def device_count(self):
        return 1

    def set_device(self, index):
        pass

    def empty_cache(self):
        pass

    def communication_backend_name(self):
        return "gloo"


set_platform(CPU())
trl.AutoModelForCausalLMWithValueHead = type("Gone", (torch.nn.Module,), {})  # verl 0.9.1 asks for it, TRL 1.16 has it no more
torch.distributed.init_process_group("gloo")

from verl.trainer.config import CheckpointConfig  # noqa: E402
from verl.utils import tensordict_utils  # noqa: E402
from verl.workers.config import ActorConfig, FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig  # noqa: E402
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead  # noqa: E402
from verl.workers.utils.losses import ppo_loss  # noqa: E402

from actfocus import group_advantages, token_energy, token_weights, weighted_policy_loss  # noqa: E402
from extras.verl_loss import weigh_advantages  # noqa: E402
from rollout import load_agent, rollout, score  # noqa: E402
from train import Settings  # noqa: E402

settings = Settings()
engine = FSDPEngineWithLMHead(
    HFModelConfig(path=settings.agent, use_remove_padding=False, enable_gradient_checkpointing=False,
                  override_config={"attn_implementation": "sdpa"}),
    FSDPEngineConfig(strategy="fsdp2", use_torch_compile=False, dtype="float32",
                     mixed_precision={"param_dtype": "fp32", "reduce_dtype": "fp32", "buffer_dtype": "fp32"}),
    FSDPOptimizerConfig(lr=1e-3, total_training_steps=10), CheckpointConfig())
engine.initialize()

model, tokenizer = load_agent(settings.agent, "cpu")
played = rollout(model, tokenizer, [settings.make_env() for _ in range(8)], seeds=[1] * 4 + [5] * 4, temperature=1.0,
                 max_response_tokens=100, generator=torch.Generator().manual_seed(0))
ids, mask, lengths, rows = played.ids, played.response_mask, played.lengths, len(played.ids)
advantages = group_advantages(played.returns.view(2, 4)).flatten()[:, None] * mask
with torch.no_grad():
    old = score(model, ids, mask).logprobs + 0.3 * torch.randn(ids.shape, generator=torch.Generator().manual_seed(1)) * mask
    energy = torch.nn.functional.pad(token_energy(model(ids).logits[:, :-1]), (1, 0)) * mask

# As verl has them: prompts and responses apart, a response from the first sampled token to the episode's end
starts = mask.int().argmax(1)
nested = lambda tensors: torch.nested.as_nested_tensor(list(tensors), layout=torch.jagged)
responses = lambda x: [row[start:end] for row, start, end in zip(x, starts, lengths)]
padded = lambda x: torch.nn.utils.rnn.pad_sequence(responses(x), batch_first=True)
batch = {"response_mask": padded(mask.long()), "responses": padded(ids), "advantages": padded(advantages)}
weigh_advantages(batch, padded(energy), tokenizer)
data = TensorDict({
    "prompts": nested(row[:start] for row, start in zip(ids, starts)), "responses": nested(responses(ids)),
    "input_ids": nested(row[:end] for row, end in zip(ids, lengths)), "position_ids": nested(map(torch.arange, lengths.tolist())),
    "loss_mask": nested(row[:end] for row, end in zip(mask.long(), lengths)), "response_mask": nested(responses(mask.long())),
    "old_log_probs": nested(responses(old)),
    "advantages": nested(row[:n] for row, n in zip(batch["advantages"], lengths - starts))}, batch_size=[rows])
tensordict_utils.assign_non_tensor(
    data, use_remove_padding=False, use_dynamic_bsz=False, micro_batch_size_per_gpu=2, use_fused_kernels=False, temperature=1.0,
    global_batch_size=rows, calculate_entropy=False, pad_token_id=tokenizer.pad_token_id)
actor = ActorConfig(strategy="fsdp", rollout_n=4, ppo_micro_batch_size_per_gpu=2, clip_ratio=0.2, clip_ratio_low=0.2,
                    clip_ratio_high=0.28, clip_ratio_c=100.0, use_kl_loss=False, entropy_coeff=0.0)

whole = lambda x: x.full_tensor() if hasattr(x, "full_tensor") else x
with engine.train_mode():
    engine.optimizer_zero_grad()
    found = engine.forward_backward_batch(data, partial(ppo_loss, actor))
    gradients = {name: whole(x.grad).clone() for name, x in engine.module.named_parameters()}
    engine.optimizer_step()

loss, _ = weighted_policy_loss(score(model, ids, mask).logprobs, old, advantages, token_weights(energy, played.action_mask, mask))
loss.backward()
torch.testing.assert_close(sum(found["loss"]), loss.item(), atol=1e-6, rtol=1e-5)
for name, x in model.named_parameters():
    torch.testing.assert_close(gradients[name], x.grad, atol=1e-6, rtol=1e-3)
    moved = (whole(dict(engine.module.named_parameters())[name]) - x).abs().max()
    assert 0 < moved < 2e-3, (name, moved)  # Adam's first step is the learning rate, or less
print("the same loss and gradients")
torch.distributed.destroy_process_group()
