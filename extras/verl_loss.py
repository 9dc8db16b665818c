"""ActFocus in verl: a policy loss, registered at verl's own extension point.

    actor_rollout_ref.actor.policy_loss.loss_mode=actfocus       # once this module is imported by the workers

The function, its registration and its agreement with verl's `vanilla` loss at (alpha, beta) = (1, 0) were run with verl 0.9.1
on a CPU; a training run was not. What could only be read:

- verl hands one extra field a token to its losses, `rollout_is_weights`, so the weights travel in it. That rules out verl's
  rollout correction beside ActFocus.
- The weights are scaled so that verl's token count is their sum. With several minibatches a step, that sum is the whole
  batch's, not the minibatch's.
- Two things are left to you. Call `add_weights` where `ref_log_prob` joins the batch (RayPPOTrainer.fit), so that batch.batch
  carries the weights to the loss. And add the energy to the reference worker's output where the log-probs are made from logits
  (`prepare_model_outputs` of the FSDP engine), before verl divides them by the temperature.

The action mask is to be found on the sampled ids, within each response: rollout.Chat.actions, or `in_answer` of trl_trainer.py.
"""

from verl.trainer.ppo.core_algos import register_policy_loss

from actfocus import token_weights, weighted_policy_loss


def add_weights(batch, energy, action_mask, alpha=0.1, beta=0.5):
    """Put the token weights into the batch; energy and action_mask are [B, T], as batch["response_mask"]."""
    mask = batch["response_mask"].bool()
    weights = token_weights(energy, action_mask & mask, mask, alpha=alpha, beta=beta)
    batch["rollout_is_weights"] = weights * (mask.sum() / weights.sum())


@register_policy_loss("actfocus")
def actfocus_loss(old_log_prob, log_prob, advantages, response_mask, loss_agg_mode="token-mean", config=None,
                  rollout_is_weights=None):
    """The weighted loss with verl's signature."""
    info, weights = config.global_batch_info, rollout_is_weights * response_mask
    # The weights were scaled to add up to the number of tokens, so verl's global token count is their sum.
    weight_sum = info["batch_num_tokens"] / info["dp_size"] if info.get("batch_num_tokens") else weights.sum()
    loss, stats = weighted_policy_loss(log_prob, old_log_prob, advantages, weights, weight_sum=weight_sum,
                                       clip_low=config.clip_ratio_low, clip_high=config.clip_ratio_high)
    return loss, {"actor/ppo_kl": stats["approx_kl"].item(), "actor/pg_clipfrac": stats["clip_fraction"].item()}
