"""How an agent is loaded, and what is looked at before it is accepted: `rollout.load_agent` is this.

Accepted means right: what is sampled is the model's own distribution, what is scored, too, and the conversation that
the tokenizer's template renders holds what it should. Whatever differs is refused in one line.
"""

from datetime import date
from pathlib import Path

import torch
from jinja2 import TemplateError
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, logging

from rollout import Chat, decoder_for, sample_turn, score

logging.disable_progress_bar()  # a bar for every loaded file would drown that of the training
TOLERANCE = 1e-3  # nats, in float32
LONGEST = 600  # ids: beyond a sliding window, where it is not larger


# Put before a template that prints today's date, which would be another when the run goes on tomorrow.
CODES = [*"aAbBcdejmyYHIMSpFDTUwGVWZx", "-d", "-m", "-j"]  # of strftime
FROZEN_DATE = "{% macro strftime_now(format) %}{{ format" + "".join(
    f"|replace('%{code}', '{date(2025, 1, 1).strftime('%' + code)}')" for code in CODES
) + " }}{% endmacro %}{{ '' }}"  # else a line break that opens the template would be taken for the macro's


def frozen(template):
    dated = isinstance(template, str) and "strftime_now" in template and not template.startswith(FROZEN_DATE)
    return FROZEN_DATE + template if dated else template


def load_tokenizer(path):
    try:  # tokenizer.json as it stands: AutoTokenizer may rebuild it by model type, and then the ids are others
        tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
    except (OSError, ValueError):
        tokenizer = AutoTokenizer.from_pretrained(path)
    template = tokenizer.chat_template  # several, by name, or one
    several = isinstance(template, dict)
    tokenizer.chat_template = {name: frozen(x) for name, x in template.items()} if several else frozen(template)
    return tokenizer


def load(path, device):
    """What rollout.load_agent promises."""
    try:
        if Path(path).is_absolute() and not Path(path).is_dir():
            raise ValueError("no such directory (python -m extras.agent ENV --out DIR teaches one for --model DIR)")
        model, found = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa",
                                                            output_loading_info=True)
        if missing := sorted(found["missing_keys"]):
            raise ValueError(f"{len(missing)} of its weights are missing ({missing[0]}, ...): they would be random")
        model, tokenizer = model.to(device), load_tokenizer(path)
        check_agent(model.eval(), tokenizer)
    except Exception as error:  # no such directory, no network, a damaged file: each library raises its own
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        here = Path(path).is_absolute() or Path(path).is_dir()
        nor = "" if here else " (it is a file)" if Path(path).exists() else " (no directory here has that name, either)"
        raise ValueError(f"model: cannot use {str(path)!r}: {reason}{nor}") from None
    return model, tokenizer


@torch.no_grad()
def check_agent(model, tokenizer):
    """ValueError, in one line, where `rollout` or `score` would go wrong with them."""
    without_noise(model)
    known, rows = max(tokenizer.get_vocab().values()), len(model.get_input_embeddings().weight)
    if known >= rows:
        raise ValueError(f"its tokenizer has ids up to {known}, its embedding ends at {rows - 1}")
    if len(model.get_output_embeddings().weight) > rows:
        raise ValueError("it can say words that its embedding does not know")
    try:
        check_template(tokenizer)
    except TemplateError as error:  # some know no system role, say
        raise ValueError(f"the tokenizer's chat template refuses the conversation: {error}") from None
    config = model.config.get_text_config()
    ropes = getattr(config, "rope_parameters", None) or {}
    for rope in (ropes, *ropes.values()):  # one for all layers, or one a kind of layer
        if isinstance(rope, dict) and rope.get("rope_type") in ("longrope", "dynamic"):
            # Beyond its original context, one long text changes the rotations of its whole batch.
            original = rope.get("original_max_position_embeddings", 2**31)
            config.max_position_embeddings = min(config.max_position_embeddings, original)
    try:
        check_numbers(model, tokenizer)
    except (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError) as error:  # recurrent states, say
        raise ValueError(f"rollout cannot play it: its cache or its outputs are of another kind ({error})") from None


def recompute_layers(model):
    """Activations are computed again in the backward pass: less memory, more time."""
    new, old = "activation_checkpointing_enable", "gradient_checkpointing_enable"  # renamed in transformers 5
    getattr(model, new if hasattr(model, new) else old)({"use_reentrant": False})
    model.train()  # the only mode in which transformers does it; there is no dropout to switch on


def without_noise(model):
    """Dropout and jitter off, in training mode, too: the policy would be compared with another draw of itself."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and ("dropout" in name or "jitter" in name):
                setattr(module, name, 0.0)


def check_template(tokenizer):
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("the tokenizer has no chat template: use an instruction-tuned model")
    system, said = "Rules: be brief.", "I go left."
    chat = Chat(tokenizer, system)
    messages = [{"role": "user", "content": "Begin."}, {"role": "assistant", "content": said},
                {"role": "user", "content": "Go on."}]
    render = lambda messages: chat.render([chat.system, *messages])
    opening, longer = render(messages[:1]), render(messages)
    unlike = ValueError("its chat template does not open a response as it shows one that was given")
    if said not in longer:
        raise unlike
    bridge = chat.text(chat.bridge("Go on.", ended=True))
    if opening.count(system) != 1 or system in bridge:
        raise ValueError("its chat template does not show the system text once, at the start of the conversation")
    header, after_said = opening.rpartition("Begin.")[2], longer.rpartition(said)[2]
    if header.count("<think>") > header.count("</think>"):
        raise ValueError("its chat template opens the reasoning itself, so every response would lack the tag")
    if "Begin." not in opening or not longer.removeprefix(opening).lstrip().startswith(said):
        raise unlike
    if not all(words in chat.text(chat.opening("Begin.")) for words in (system, "Begin.")):
        raise ValueError("its tokenizer loses text: is tokenizer.json there, and whole?")
    # Chat.bridge renders a second turn and takes what it finds there for every turn.
    after_second = render([*messages[:2], *messages]).rpartition(said)[2]
    if after_said.rpartition("Go on.")[1:] != ("Go on.", header) or after_second != after_said:
        raise ValueError("its chat template does not open each response alike, or does not show each observation")


def check_numbers(model, tokenizer):
    """Two ragged turns as `rollout` samples them, and `score` of the batch, beside the model's own forward pass."""
    config, generator = model.config.get_text_config(), torch.Generator(model.device).manual_seed(0)
    words, window = len(model.get_output_embeddings().weight), getattr(config, "sliding_window", None) or 0
    limit = min(LONGEST, (getattr(config, "max_position_embeddings", None) or LONGEST) - 50)
    draw = lambda n: torch.randint(len(tokenizer), (n,), generator=torch.Generator().manual_seed(n)).tolist()
    texts = {0: draw(min(limit, max(window, 24) + 12)), 1: draw(min(limit, 7))}
    decoder, sampled = decoder_for(model)(model, 1.0, generator), {0: [], 1: []}
    for _ in range(2):
        for row, (ids, logprobs) in sample_turn(decoder, texts, set(range(0, words, 4)), 8).items():
            sampled[row] += zip(range(len(texts[row]), len(texts[row]) + len(ids)), logprobs)
            texts[row] = texts[row] + ids + draw(5 - 3 * row)
    ids = nn.utils.rnn.pad_sequence([torch.tensor(x) for x in texts.values()], batch_first=True).to(model.device)
    lengths = torch.tensor([len(x) for x in texts.values()], device=ids.device)
    mask = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
    mask[:, 0] = False
    scored = score(model, ids, mask)
    for row, text in texts.items():
        ids = torch.tensor([text], device=model.device)
        plain = model(ids).logits[0, :-1].float()  # [T - 1, V]
        logprobs = plain.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        if not torch.allclose(scored.logsumexp[row, 1:len(text)], plain.logsumexp(-1), atol=TOLERANCE):
            raise ValueError("its logits are more than its output embedding of the last hidden state")
        if not torch.allclose(scored.logprobs[row, 1:len(text)], logprobs, atol=TOLERANCE):
            raise ValueError("a trajectory's log-probs depend on the others of its batch")
        places, drawn = zip(*sampled[row])
        if not torch.allclose(torch.tensor(drawn), logprobs[torch.tensor(places) - 1].cpu(), atol=TOLERANCE):
            raise ValueError("sampled with a key-value cache, its words have other log-probs than in a forward pass")
    training = model.train()(ids).logits
    if not torch.allclose(training, model(ids).logits, atol=TOLERANCE) \
            or not torch.allclose(training, model.eval()(ids).logits, atol=TOLERANCE):
        raise ValueError("in training mode it computes other log-probs, or others each time")
