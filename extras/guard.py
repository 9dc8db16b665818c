"""What is looked at before an agent is accepted: `rollout.load_agent` asks it of every model."""

import torch

from rollout import Chat, score


@torch.no_grad()
def check_agent(model, tokenizer):
    """ValueError, in one line, where the chat template does not fit, or where `score` would be wrong."""
    for module in model.modules():  # with dropout, the policy would be compared with another draw of itself
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if getattr(module, "attention_dropout", 0.0):
            module.attention_dropout = 0.0
    chat = Chat(tokenizer, "")
    if chat.text(chat.bridge("", ended=True)).rstrip().endswith("<think>"):
        raise ValueError("its chat template opens the reasoning itself, so every response would lack the tag")
    ids = torch.arange(8, device=model.device)[None]  # [1, 8]
    logsumexp = torch.logsumexp(model(ids).logits.float(), -1)[:, :-1]
    if not torch.allclose(score(model, ids, ids > 0).logsumexp[:, 1:], logsumexp, atol=1e-2):
        raise ValueError("its logits are more than its output embedding of the last hidden state")
