"""Multi-turn sampling: a causal language model plays many text environments at once.

Token in, token out: the ids that were sampled are trained on, never decoded and tokenised again; text is made of them
for the environment and the action mask alone. One key-value cache lives through all turns: little is fed twice.

Shapes as in actfocus.py. `python rollout.py` measures tokens per second beside a loop around model.generate.
"""

import copy
import importlib
import inspect
import re
import weakref
from collections import namedtuple
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicLayer

from actfocus import action_mask
from kernels import token_stats


@dataclass
class Trajectories:
    """A batch of played episodes; rows are padded on the right, where every mask is False."""

    ids: torch.Tensor  # [B, T] int64: prompts, responses and observations in the order the model saw them
    response_mask: torch.Tensor  # [B, T] bool: sampled, end-of-turn token included (Credit.filter may take some out)
    action_mask: torch.Tensor  # [B, T] bool: those of them that hold a character between <answer> and </answer>
    turn_ids: torch.Tensor  # [B, T] int64: turn of a sampled token, from 0; -1 elsewhere
    logprobs: torch.Tensor  # [B, T] float32: log-prob of each sampled token, at the sampling temperature
    lengths: torch.Tensor  # [B] int64: tokens that are not padding
    seeds: torch.Tensor  # [B] int64: of the instance; rows of one seed are a group
    returns: torch.Tensor  # [B] float32: sum of the episode's rewards
    success: torch.Tensor  # [B] bool
    valid: torch.Tensor  # [B] float32: share of the responses that paid no format penalty
    turns: torch.Tensor  # [B] int64: responses given
    outcome: list[dict]  # B of name -> number: what the environment says of the finished episode
    texts: list[list[str]]  # B of the responses as the environment read them
    notes: list  # B of Transcript.notes: what a credit method has kept of an episode, usually None

    def __len__(self):
        return len(self.ids)

    def select(self, rows):
        """The given rows (indices, or a bool mask), without the padding that none of them needs."""
        rows = torch.as_tensor(rows, device=self.ids.device)
        rows = rows.nonzero()[:, 0] if rows.dtype == torch.bool else rows.long()
        longest = int(self.lengths[rows].max()) if len(rows) else 0
        picked = self._each(lambda x: x[rows] if x.dim() == 1 else x[rows, :longest])
        for name in ("outcome", "texts", "notes"):
            setattr(picked, name, [getattr(self, name)[row] for row in rows.tolist()])
        return picked

    def to(self, device):
        return self._each(lambda x: x.to(device))

    def _each(self, function):
        """A copy with the function of each tensor, of those too that a subclass or a credit method has added."""
        other = copy.copy(self)
        vars(other).update({name: function(x) for name, x in vars(self).items() if isinstance(x, torch.Tensor)})
        return other

    def parts(self, size):
        """(rows, those rows), at most `size` of like length at a time, so there is little padding."""
        for rows in self.lengths.argsort(stable=True).split(size):
            yield rows, self.select(rows)

    def in_parts(self, function, size):
        """The tensors [b, T'] that function(part) makes of micro-batches of `size`, put together as [B, T]."""
        whole = None
        for rows, part in self.parts(size):
            made = function(part)
            whole = whole or [torch.zeros(self.ids.shape, dtype=torch.float32, device=x.device) for x in made]
            for total, x in zip(whole, made):
                total[rows, :x.shape[1]] = x
        return whole


class Chat:
    """The tokens around the responses, taken from the tokenizer's chat template."""

    def __init__(self, tokenizer, system_prompt, stop_ids=()):
        self.tokenizer, self.system = tokenizer, {"role": "system", "content": system_prompt}
        self.stop_ids = {tokenizer.eos_token_id, *stop_ids}  # what ends a response
        special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
        self.control = re.compile("|".join(map(re.escape, [*special, "@hidden@", "@response@"])))
        self.text = partial(tokenizer.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        self.opening, self.bridge = cache(self.opening), cache(self.bridge)  # a group's rollouts share much

    def render(self, messages):
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def _encode(self, messages, after=""):
        """Ids of the rendered messages from `after` on. What looks like a control token in a message stays text."""
        encode, found = partial(self.tokenizer, add_special_tokens=False), []
        hide = lambda text: self.control.sub(lambda match: found.append(match[0]) or "@hidden@", text)
        text = self.render([m if m["role"] == "assistant" else m | {"content": hide(m["content"])}
                            for m in [self.system, *messages]])
        first, *parts = text[text.index(after) + len(after):].split("@hidden@")
        ids = encode(first).input_ids
        for control, part in zip(found[len(found) - len(parts):], parts):  # the others came before `after`
            ids += encode(control, split_special_tokens=True).input_ids + encode(part).input_ids
        return ids

    def opening(self, observation):
        """Ids from the start to where the first response begins."""
        return self._encode([{"role": "user", "content": observation}])

    def bridge(self, observation, ended):
        """Ids between a response and the next one. `ended`: the response closed with the end-of-turn token itself."""
        # Templates may rewrite earlier turns (Qwen3 drops their reasoning), so only what follows a response is taken.
        mark = "@response@"
        ids = self._encode([{"role": "user", "content": ""}, {"role": "assistant", "content": mark},
                            {"role": "user", "content": observation}], after=mark)
        if ids[:1] != [self.tokenizer.eos_token_id]:
            raise ValueError("the chat template does not close a response with the tokenizer's eos_token")
        return ids[1:] if ended else ids


class Transcript:
    """One episode as it grows: its ids and what is known of each. A subclass may keep `notes` for a credit method."""

    def __init__(self, chat, env, seed, max_context, max_response_tokens):
        self.chat, self.env, self.seed, self.longest_prompt = chat, env, int(seed), max_context - max_response_tokens
        self.ids, self.turn_ids, self.logprobs = [], [], []
        self.rewards, self.valid, self.texts, self.success, self.notes = [], [], [], False, None
        self.observation, _ = env.reset(seed=self.seed)
        self._append(chat.opening(self.observation))
        if len(self.ids) > self.longest_prompt:
            raise ValueError(f"the first prompt has {len(self.ids)} tokens: with {max_response_tokens} for the "
                             f"response it does not fit a context of {max_context}")

    def _append(self, ids, turn=-1, logprobs=None):
        self.ids += ids
        self.turn_ids += [turn] * len(ids)
        self.logprobs += logprobs or [0.0] * len(ids)

    def respond(self, ids, logprobs=None):
        """Record a response, play it, and append what the environment says -> whether the episode goes on."""
        self.texts.append(self.chat.text(ids[:-1] if ids[-1] in self.chat.stop_ids else ids))
        self._append(ids, len(self.rewards), logprobs)
        self.observation, reward, terminated, truncated, info = self.env.step(self.texts[-1])
        self.rewards.append(reward)
        self.valid.append(info["valid"])
        self.success = info["success"]
        if terminated or truncated:
            return False
        bridge = self.bridge()
        goes_on = len(self.ids) + len(bridge) <= self.longest_prompt  # else there is no room for another turn
        self._append(bridge if goes_on else [])
        return goes_on

    def bridge(self):
        """Ids between the last response and the next one."""
        return self.chat.bridge(self.observation, ended=self.ids[-1] == self.chat.tokenizer.eos_token_id)


def pack(transcripts, pad_id=0):
    """Transcripts -> Trajectories. The padding is never read, but has to be an id that every model knows."""
    def column(values, pad, dtype=None):
        return nn.utils.rnn.pad_sequence([torch.tensor(x, dtype=dtype) for x in values], True, pad)
    ids, turn_ids = column([t.ids for t in transcripts], pad_id), column([t.turn_ids for t in transcripts], -1)
    return Trajectories(
        ids=ids, response_mask=turn_ids >= 0, turn_ids=turn_ids,
        action_mask=action_mask(transcripts[0].chat.tokenizer, ids, turn_ids >= 0, turn_ids),
        logprobs=column([t.logprobs for t in transcripts], 0.0, torch.float32),
        lengths=torch.tensor([len(t.ids) for t in transcripts]), seeds=torch.tensor([t.seed for t in transcripts]),
        returns=torch.tensor([sum(t.rewards) for t in transcripts], dtype=torch.float32),
        success=torch.tensor([t.success for t in transcripts], dtype=torch.bool),
        valid=torch.tensor([sum(t.valid) / len(t.valid) for t in transcripts], dtype=torch.float32),
        turns=torch.tensor([len(t.valid) for t in transcripts]),
        outcome=[t.env.outcome() for t in transcripts], texts=[t.texts for t in transcripts],
        notes=[t.notes for t in transcripts])


def rollout(model, tokenizer, envs, *, seeds, temperature, max_response_tokens, generator, max_context=None,
            transcript=Transcript):
    """Play one episode in each of envs -> Trajectories, in their order, on the CPU.

    envs[i] is reset with seeds[i]: equal seeds give the G rollouts of a group the same instance. temperature > 0, for
    sampling and for `logprobs`; the distribution is not truncated (no top-k, no top-p), so these are the policy's.
    max_response_tokens: a longer response is cut, and lacks its end-of-turn token. generator: torch.Generator on the
    model's device. max_context: an episode ends where the next turn might not fit; the model's own limit by default.
    transcript: the class that records an episode. FloatingPointError: logits that are not finite.
    """
    transcripts = open_transcripts(model, tokenizer, envs, seeds, max_response_tokens, max_context, transcript)
    play_on(model, transcripts, temperature, max_response_tokens, generator)
    return pack(transcripts)


def open_transcripts(model, tokenizer, envs, seeds, max_response_tokens, max_context=None, transcript=Transcript):
    """A transcript of each environment, up to where the first response begins."""
    if not len(envs) == len(seeds) > 0 or max_response_tokens < 1:
        raise ValueError(f"cannot play {len(envs)} environments, {len(seeds)} seeds, {max_response_tokens} tokens each")
    eos = getattr(model.generation_config, "eos_token_id", None)
    stop_ids = {*(eos if isinstance(eos, list) else [eos])} - {None}
    max_context = max_context or getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**31
    chats = {env.system_prompt: Chat(tokenizer, env.system_prompt, stop_ids) for env in envs}
    return [transcript(chats[e.system_prompt], e, s, max_context, max_response_tokens) for e, s in zip(envs, seeds)]


@torch.no_grad()
def play_on(model, transcripts, temperature, max_response_tokens, generator):
    """Play all transcripts on to the end of their episodes, in place."""
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be positive, got {temperature}")
    was_training = model.training
    model.eval()
    try:
        decoder, playing = decoder_for(model)(model, temperature, generator), range(len(transcripts))
        while playing:
            texts = {row: transcripts[row].ids for row in playing}
            responses = sample_turn(decoder, texts, transcripts[0].chat.stop_ids, max_response_tokens)
            playing = [row for row in playing if transcripts[row].respond(*responses[row])]
    finally:
        model.train(was_training)


def decoder_for(model):
    return importlib.import_module("extras.captured").CapturedDecoder if model.device.type == "cuda" else Decoder


def sample(logits, temperature, generator):
    """logits [rows, V] -> sampled tokens [rows], their log-probs [rows], nan where a logit is nan or +inf."""
    logprobs = torch.log_softmax(logits / temperature, -1)
    # The inverse of the distribution function: torch.multinomial draws a number a word, a tenth of a rollout's time.
    below = logprobs.double().exp().cumsum(-1)  # [rows, V]
    drawn = torch.rand(len(logits), 1, dtype=torch.float64, device=logits.device, generator=generator)
    token = torch.searchsorted(below, drawn * below[:, -1:], right=True)  # right: never a word of mass 0
    token = token.clamp(max=logits.shape[-1] - 1)
    return token[:, 0], logprobs.gather(1, token)[:, 0]


def sample_turn(decoder, texts, stop_ids, max_tokens):
    """A response to each text, {row: its ids so far} -> {row: (ids, log-probs)}, ended by a stop id or max_tokens."""
    drawn = [decoder.feed_texts(texts, max_tokens)]
    stops = torch.tensor(sorted(stop_ids), device=decoder.model.device)
    running = ~torch.isin(drawn[0][0], stops)
    # Rows that are done go on: what they add is dropped in the next turn. A GPU is not asked after every token.
    while len(drawn) < max_tokens and (len(drawn) % (8 if running.is_cuda else 1) or running.any()):
        drawn.append(decoder.step(drawn[-1][0]))
        running &= ~torch.isin(drawn[-1][0], stops)
    tokens, logprobs = (torch.stack(x, 1) for x in zip(*drawn))  # [rows, steps]
    if torch.isnan(logprobs).any():
        raise FloatingPointError("the model's logits are not finite")
    stopped = torch.isin(tokens, stops)
    lengths = torch.where(stopped.any(1), stopped.int().argmax(1) + 1, tokens.shape[1]).tolist()
    decoder.cached = {row: len(texts[row]) + n - 1 for row, n in zip(texts, lengths)}  # its last id was not fed
    return {row: (t[:n], p[:n]) for row, t, p, n in zip(texts, tokens.tolist(), logprobs.tolist(), lengths)}


class RoomyLayer(DynamicLayer):
    """A layer's keys and values with room for a turn's columns: a decode step writes its own and copies nothing."""

    def __init__(self, decoder):
        super().__init__()
        self.decoder = decoder

    def update(self, key_states, value_states, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            device = key_states.device.type  # under autocast, attention reads what it casts: keep it so
            dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else key_states.dtype
            self.keys, self.values = (x.new_zeros(*x.shape[:2], self.decoder.mask.shape[1], x.shape[3], dtype=dtype)
                                      for x in (key_states, value_states))
        for room, new in ((self.keys, key_states), (self.values, value_states)):
            room.index_copy_(2, self.decoder.columns, new.to(room.dtype))
        return self.keys[:, :, :self.decoder.end], self.values[:, :, :self.decoder.end]

    def get_seq_length(self):
        return self.decoder.used

    def get_mask_sizes(self, query_length):
        return self.decoder.end, 0

    def keep(self, places, columns, room):
        """Keep the rows at `places` [R], of each its columns [R, C], and make room for more."""
        if self.is_initialized:
            heads = torch.arange(self.keys.shape[1], device=places.device)
            kept = [x[places[:, None, None], heads[:, None], columns[:, None]] for x in (self.keys, self.values)]
            self.keys, self.values = (nn.functional.pad(x, (0, 0, 0, room)) for x in kept)


class Decoder:
    """A model that samples, with its key-value cache. Rows are padded on the left alone, so that in the cache, as in
    the text, a token stands right after the one before it: what the library's masks count, windows too, is right."""

    def __init__(self, model, temperature, generator):
        self.model, self.temperature, self.generator = model, temperature, generator
        self.rows, self.cached, self.used = [], {}, 0  # row numbers; how many ids of a row; columns in use
        itself = weakref.proxy(self)  # no cycle: memory goes at once
        self.cache = Cache(layer_class_to_replicate=partial(RoomyLayer, itself))
        self.cache_name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"

    def feed_texts(self, texts, room):
        """Feed what is new of each text, {row: all its ids}, with room for more -> a token to follow, its log-prob.

        Where one row has 9 new ids and another 4, the last 9 of both are fed: the cache never holds padding in between.
        """
        device, rows = self.model.device, list(texts)
        lengths = torch.tensor([len(texts[row]) for row in rows], device=device)
        width = max(len(texts[row]) - self.cached.get(row, 0) for row in rows)
        held = max(int(lengths.max()) - width, 0)  # columns that stay: all but the last `width` ids of each row
        if self.rows:
            places = torch.tensor([self.rows.index(row) for row in rows], device=device)
            columns = torch.arange(held, device=device) + (self.padding[places] + lengths - width - held)[:, None]
            for layer in self.cache.layers:
                layer.keep(places, columns.clamp(min=0), width + room)
        self.rows, self.used, self.padding = rows, held, held + width - lengths
        self.mask = torch.arange(held + width + room, device=device) >= self.padding[:, None]  # [rows, columns]
        ids = [[0] * (width - len(texts[row])) + texts[row][-width:] for row in rows]
        return self.feed(torch.tensor(ids, device=device))

    def feed(self, ids):
        """Append ids [rows, c] -> (tokens, log-probs) sampled to follow, [rows] each."""
        self.end = self.used + ids.shape[1]
        self.columns = torch.arange(self.used, self.end, device=ids.device)
        drawn = self.forward(ids)
        self.used = self.end
        return drawn

    def forward(self, ids):
        positions = (self.columns - self.padding[:, None]).clamp(min=0)
        out = self.model(input_ids=ids, attention_mask=self.mask[:, :self.end], position_ids=positions, use_cache=True,
                         logits_to_keep=1, **{self.cache_name: self.cache})
        return sample(out.logits[:, -1].float(), self.temperature, self.generator)

    def step(self, tokens):
        """feed() of one token a row."""
        return self.feed(tokens[:, None])


def load_agent(path, device):
    """(model in float32, tokenizer) from a directory or a Hugging Face id. ValueError: one line says what is wrong."""
    return importlib.import_module("extras.guard").load(path, device)


TokenStats = namedtuple("TokenStats", "logprobs logsumexp entropy")  # [B, T] each: of response tokens, 0 elsewhere


def states(model, ids, response_mask):
    """What predicts the N response tokens of ids[B, T]: (hidden[N, H], head's weight[V, H], its bias, targets[N])."""
    backbone = getattr(model, "get_base_model", lambda: model)().base_model  # PEFT's wrapper has both, at another depth
    here, head = response_mask[:, 1:], model.get_output_embeddings()
    hidden, weight = backbone(input_ids=ids[:, :-1]).last_hidden_state[here], head.weight  # t - 1 predicts token t
    if torch.is_autocast_enabled(ids.device.type):  # the products below take what they are given
        hidden, weight = (x.to(torch.get_autocast_dtype(ids.device.type)) for x in (hidden, weight))
    return hidden, weight, getattr(head, "bias", None), ids[:, 1:][here]


def to_tokens(values, response_mask):
    """values[N] of the response tokens -> [B, T] float32, 0 elsewhere. FloatingPointError: they are not finite."""
    if not torch.isfinite(values).all():
        raise FloatingPointError("log-probs, energies or what ranks tokens are not finite")
    blank = torch.zeros(response_mask.shape, dtype=torch.float32, device=values.device)
    return blank.masked_scatter(response_mask, values.float())


def score(model, ids, response_mask, temperature=1.0):
    """Statistics of every response token under a Hugging Face model, ids and mask [B, T]; column t is of token t."""
    hidden, weight, bias, targets = states(model, ids, response_mask)
    stats = token_stats(hidden, weight, targets, bias=bias, temperature=temperature)
    return TokenStats(*(to_tokens(values, response_mask) for values in stats))


if __name__ == "__main__":
    from extras.bench import rollouts
    rollouts()
