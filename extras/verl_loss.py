"""ActFocus in verl: weights that stand in the advantages, which verl keeps for each token.

w min(rho A, clip(rho) A) = min(rho (w A), clip(rho) (w A)) for w >= 0, and so for verl's dual clip: its own losses,
rollout correction, KL and entropy terms stay as they are. One line goes into RayPPOTrainer.fit, right after its
compute_advantage:

    weigh_advantages(batch.batch, batch.batch["ref_energy"], self.tokenizer)

and the reference worker has to send `ref_energy` [B, T] (over the responses) along: -logsumexp of its logits, where it
makes log-probs of them (`prepare_model_outputs` of the FSDP engine), before verl divides them by the temperature.
Weights have mean 1 over a step's batch, so under loss_agg_mode="token-mean" the loss is divided by their sum; of
several minibatches, each has nearly that.

Run with verl 0.9.1 on a CPU: this function, verl's vanilla loss, and an update of its actor (FSDP2 engine, `ppo_loss`:
the gradient of the weighted loss). Only read: the trainer with its workers, the other engines.

prime-rl, too, has an advantage a token (`advantages` of prime_rl.trainer.rl.loss.compute_loss, commit 851c48f, read
only): multiply them where its orchestrator makes them. It clips the ratio from above alone, which is homogeneous too.
"""

from actfocus import ANSWER, action_mask, token_weights


def weigh_advantages(batch, energy, tokenizer, *, alpha=0.1, beta=0.5, pattern=ANSWER):
    """Multiply batch["advantages"] by ActFocus's weights in place; all [B, T] over the responses.

    energy[B, T]: -logsumexp of the frozen reference's raw logits. A response is a run of batch["response_mask"] (verl
    leaves observations out of it).
    """
    mask = batch["response_mask"].bool()
    actions = action_mask(tokenizer, batch["responses"], mask, pattern=pattern)
    weights = token_weights(energy, actions, mask, alpha=alpha, beta=beta)
    batch["advantages"] = batch["advantages"] * weights * (mask.sum() / weights.sum().clamp(min=1e-30))
