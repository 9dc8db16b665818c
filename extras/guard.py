"""How an agent is loaded, and what is looked at before it is accepted: `rollout.load_agent` is this."""

import torch
from jinja2 import TemplateError
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from rollout import Chat, score


def load_tokenizer(path):
    try:  # tokenizer.json as it stands: AutoTokenizer may rebuild it by model type, and then the ids are others
        return PreTrainedTokenizerFast.from_pretrained(path)
    except (OSError, ValueError):
        return AutoTokenizer.from_pretrained(path)


@torch.no_grad()
def check_agent(model, tokenizer):
    """ValueError, in one line, where the chat template does not fit, or where `score` would be wrong."""
    for module in model.modules():  # with dropout, the policy would be compared with another draw of itself
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if getattr(module, "attention_dropout", 0.0):
            module.attention_dropout = 0.0
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("model: the tokenizer has no chat template: use an instruction-tuned model")
    chat = Chat(tokenizer, "")
    try:
        chat.opening("")
    except TemplateError as error:  # some know no system role, say
        raise ValueError(f"the tokenizer's chat template refuses the conversation: {error}") from None
    if chat.text(chat.bridge("", ended=True)).rstrip().endswith("<think>"):
        raise ValueError("its chat template opens the reasoning itself, so every response would lack the tag")
    ids = torch.arange(8, device=model.device)[None]  # [1, 8]
    logsumexp = torch.logsumexp(model(ids).logits.float(), -1)[:, :-1]
    if not torch.allclose(score(model, ids, ids > 0).logsumexp[:, 1:], logsumexp, atol=1e-2):
        raise ValueError("its logits are more than its output embedding of the last hidden state")


def load(path, device):
    """What rollout.load_agent promises."""
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa").to(device)
        tokenizer = load_tokenizer(path)
        check_agent(model.eval(), tokenizer)
    except Exception as error:  # no such directory, no network, a damaged file: each library raises its own
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise ValueError(f"model: cannot use {str(path)!r}: {reason}") from None
    return model, tokenizer
