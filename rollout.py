"""Multi-turn sampling: a causal language model plays many text environments at once.

Token in, token out: the ids that the model sampled are the ids that are trained on. They are never decoded and tokenised
again; text is made from them only for the environment to read. One key-value cache lives through all turns, so each token is
fed once: a turn costs its own tokens, not the conversation's.

    trajectories = rollout(model, tokenizer, envs, seeds=range(128), temperature=1.0, max_response_tokens=100,
                           generator=torch.Generator().manual_seed(0))
    stats = score(model, trajectories.ids, trajectories.response_mask)      # log-prob, logsumexp, entropy of each token

Works with any Hugging Face causal model and a tokenizer that has a chat template. tree_rollout samples trees of episodes (for
CARL), beliefs reads how much a model believes in the gold answer after each turn (for A2TGPO). The section on the built-in agent
makes the pair that the default run uses, and the demonstrations that teach it to answer in the right format. Shapes as in
actfocus.py. `python rollout.py` measures tokens per second beside a loop around model.generate.
"""

import argparse
import copy
import inspect
import re
import statistics
import time
import warnings
import weakref
from dataclasses import dataclass, fields
from functools import partial
from itertools import accumulate

import torch
from jinja2 import TemplateError
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from tqdm import tqdm
from transformers import (AttentionInterface, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config,
                          Qwen2ForCausalLM)
from transformers.cache_utils import Cache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from env import make, response
from kernels import token_stats

ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


@dataclass
class Trajectories:
    """A batch of played episodes; rows are padded on the right, where every mask is False."""

    ids: torch.Tensor  # [B, T] int64: prompts, responses and observations in the order the model saw them
    response_mask: torch.Tensor  # [B, T] bool: sampled by the policy, the end-of-turn token included
    action_mask: torch.Tensor  # [B, T] bool: sampled, and holding a character between <answer> and </answer>
    turn_ids: torch.Tensor  # [B, T] int64: turn of a response token, from 0; -1 elsewhere
    logprobs: torch.Tensor  # [B, T] float32: log-prob of each response token as it was sampled, at its temperature
    lengths: torch.Tensor  # [B] int64: tokens that are not padding
    returns: torch.Tensor  # [B] float32: sum of the episode's rewards
    success: torch.Tensor  # [B] bool
    valid: torch.Tensor  # [B] float32: share of the responses that paid no format penalty
    turns: torch.Tensor  # [B] int64: responses given
    facts_stated: torch.Tensor  # [B] int64: sentences of the reasoning that the environment can check
    facts_true: torch.Tensor  # [B] int64: those of them that held when they were written
    outcome: dict[str, torch.Tensor]  # name -> [B] float32: what the environment's `outcome` says of the finished episodes
    probes: list  # B lists of Probe, one before the first turn and one after each, where the task has a gold answer
    edges: list  # B lists of Edge, one a turn that the row sampled, where the rows form trees (tree_rollout)

    def __len__(self):
        return len(self.ids)

    def select(self, rows):
        """The given rows (indices), without the padding that none of them needs."""
        rows = torch.as_tensor(rows)

        def pick(x):
            if isinstance(x, dict):
                return {name: pick(value) for name, value in x.items()}
            return [x[row] for row in rows.tolist()] if isinstance(x, list) else x[rows]
        picked = Trajectories(**{field.name: pick(getattr(self, field.name)) for field in fields(self)})
        longest = int(picked.lengths.max()) if len(picked) else 0
        for name in ("ids", "response_mask", "action_mask", "turn_ids", "logprobs"):
            setattr(picked, name, getattr(picked, name)[:, :longest])
        return picked


@dataclass(frozen=True)
class Probe:
    """Where the belief in the gold answer is read: after the first `length` ids of a trajectory, and `more`."""

    length: int
    more: list[int]  # ids up to where a response would begin
    gold: str


@dataclass
class Edge:
    """One response in a tree of rollouts."""

    parent: int  # the edge of the same tree that it continues, -1 at the root
    turn: int  # its tokens are those of its row with this turn id
    nll: float  # minus the mean log-prob of its tokens
    returns: float  # the episode's return where it ended the episode, else nan
    forked: bool = False  # whether the state it starts from was picked for a fork


# Text and tokens ------------------------------------------------------------------------------------------------------


class Chat:
    """The tokens around the responses, taken from the tokenizer's chat template."""

    def __init__(self, tokenizer, system_prompt, stop_ids=()):
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError("the tokenizer has no chat template: use an instruction-tuned model")
        self.tokenizer, self.system = tokenizer, [{"role": "system", "content": system_prompt}]
        self.stop_ids = {tokenizer.eos_token_id, *stop_ids}  # what ends a response: the first closes a turn of the template
        self.pieces = {}  # id -> its text

    def _encode(self, messages, after=None):
        try:
            text = self.tokenizer.apply_chat_template(self.system + messages, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:  # some know no system role, say
            raise ValueError(f"the tokenizer's chat template refuses the conversation: {error}") from None
        if after is not None:
            text = text[text.index(after) + len(after):]
        return self.tokenizer(text, add_special_tokens=False).input_ids

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

    def text(self, ids):
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def spans(self, ids):
        """[(start, end) of each token in the text]; tokens that share a character (split UTF-8) all span it."""
        text = self.text(ids)
        for i in ids:
            if i not in self.pieces:
                self.pieces[i] = self.text([i])
        if "".join(self.pieces[i] for i in ids) == text:
            ends = list(accumulate(len(self.pieces[i]) for i in ids))
            return list(zip([0, *ends[:-1]], ends))
        # A token's text depends on its neighbours: decode every prefix. An unfinished character shows as U+FFFD, no text yet.
        ends = [len(self.text(ids[: n + 1]).rstrip("\ufffd")) for n in range(len(ids))]
        return [(start, max(end, start + 1)) for start, end in zip([0, *ends[:-1]], ends)]

    def actions(self, ids):
        """Which of a response's ids hold a character strictly between <answer> and </answer>."""
        inside = [match.span(1) for match in ANSWER.finditer(self.text(ids))]
        spans = self.spans(ids) if inside else [(0, 0)] * len(ids)
        return [any(max(start, a) < min(end, b) for a, b in inside) for start, end in spans]


class Transcript:
    """One episode as it grows: the ids so far and what is known of each."""

    def __init__(self, chat, env, seed, max_context, max_response_tokens):
        self.chat, self.env, self.max_length = chat, env, max_context - max_response_tokens
        self.ids, self.turn, self.action, self.logprobs = [], [], [], []
        self.rewards, self.valid, self.success, self.fed, self.facts = [], [], False, 0, [0, 0]
        self.probes, self.states = [], None  # states: a snapshot before each response, where they are asked for
        observation, _ = env.reset(seed=seed)
        self._append(chat.opening(observation))
        if len(self.ids) > self.max_length:
            raise ValueError(f"the first prompt has {len(self.ids)} tokens: with {max_response_tokens} for the response it "
                             f"does not fit a context of {max_context}")
        self._probe([])

    def fork(self):
        """The episode as it stands now, to be continued: what was sampled so far is context to it, no response of its own."""
        other = copy.copy(self)
        for name in ("ids", "action", "logprobs", "rewards", "probes"):
            setattr(other, name, list(getattr(self, name)))
        other.action, other.turn = [False] * len(self.ids), [-1] * len(self.ids)
        other.env, other.valid, other.facts, other.fed, other.states = copy.deepcopy(self.env), [], [0, 0], 0, []
        return other

    def _probe(self, more):
        if (gold := self.env.gold()) is not None:
            self.probes.append(Probe(len(self.ids), more, gold))

    def _append(self, ids, turn=-1, action=None, logprobs=None):
        self.ids += ids
        self.turn += [turn] * len(ids)
        self.action += action or [False] * len(ids)
        self.logprobs += logprobs or [0.0] * len(ids)

    def respond(self, ids, logprobs=None):
        """Record a response, play it, and append what the environment says -> whether the episode goes on."""
        if self.states is not None:
            self.states.append(self.fork())
        stopped = ids[-1] in self.chat.stop_ids
        words = ids[:-1] if stopped else ids
        self._append(ids, len(self.rewards), self.chat.actions(words) + [False] * stopped, logprobs)
        observation, reward, terminated, truncated, info = self.env.step(self.chat.text(words))
        self.rewards.append(reward)
        self.valid.append(info["valid"])
        self.success = info["success"]
        self.facts = [total + new for total, new in zip(self.facts, info["facts"])]
        over = terminated or truncated
        if over and not self.probes:  # nobody will read what comes after the last response
            return False
        bridge = self.chat.bridge(observation, ended=ids[-1] == self.chat.tokenizer.eos_token_id)
        if over or len(self.ids) + len(bridge) > self.max_length:  # no room for another turn
            self._probe(bridge)
            return False
        self._append(bridge)
        self._probe([])
        return True


def pack(transcripts, pad_id):
    """Transcripts -> Trajectories."""
    lengths = torch.tensor([len(t.ids) for t in transcripts])
    shape = (len(transcripts), int(lengths.max()))
    ids, turn = torch.full(shape, pad_id), torch.full(shape, -1)
    action, logprobs = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape)
    for row, t in enumerate(transcripts):
        n = len(t.ids)
        ids[row, :n], turn[row, :n] = torch.tensor(t.ids), torch.tensor(t.turn)
        action[row, :n], logprobs[row, :n] = torch.tensor(t.action), torch.tensor(t.logprobs)
    return Trajectories(
        ids=ids, response_mask=turn >= 0, action_mask=action, turn_ids=turn, logprobs=logprobs, lengths=lengths,
        returns=torch.tensor([sum(t.rewards) for t in transcripts], dtype=torch.float32),
        success=torch.tensor([t.success for t in transcripts]),
        valid=torch.tensor([sum(t.valid) / len(t.valid) for t in transcripts]),
        turns=torch.tensor([len(t.valid) for t in transcripts]),
        facts_stated=torch.tensor([t.facts[0] for t in transcripts]), facts_true=torch.tensor([t.facts[1] for t in transcripts]),
        outcome={name: torch.tensor([t.env.outcome()[name] for t in transcripts], dtype=torch.float32)
                 for name in transcripts[0].env.outcome()},
        probes=[t.probes for t in transcripts], edges=[[] for _ in transcripts])


# Sampling -------------------------------------------------------------------------------------------------------------


def sample(logits, temperature, generator):
    """logits [rows, V] -> sampled tokens [rows], their log-probs [rows]."""
    logprobs = torch.log_softmax(logits / temperature, -1)
    if torch.isnan(logprobs).any():
        raise FloatingPointError("the model's logits are not finite")
    # The inverse of the distribution function: torch.multinomial draws a number for every word, a tenth of a rollout's time.
    below = logprobs.double().exp().cumsum(-1)  # [rows, V]
    drawn = torch.rand(len(logits), 1, dtype=torch.float64, device=logits.device, generator=generator) * below[:, -1:]
    token = torch.searchsorted(below, drawn, right=True).clamp(max=logits.shape[-1] - 1)  # right: never a word of mass 0
    return token[:, 0], logprobs.gather(1, token)[:, 0]


def sample_turn(decoder, prompts, stop_ids, pad_id, temperature, max_tokens, generator):
    """One response for each row of the decoder, given its prompt (ids not yet fed) -> {row: (ids, log-probs)}.

    A row ends with one of stop_ids or after max_tokens. Its last token is not fed: it opens the next prompt.
    """
    width = max(map(len, prompts))
    ids = torch.tensor([[pad_id] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[False] * (width - len(p)) + [True] * len(p) for p in prompts])
    if decoder.captures:  # memory that grew within the turn would not be the CUDA graph's
        decoder.reserve(width + max_tokens)
    logits = decoder.feed(ids, mask)
    stops = torch.tensor(sorted(stop_ids), device=logits.device)
    responses = {row: ([], []) for row in decoder.rows}
    running = torch.ones(len(prompts), dtype=torch.bool, device=logits.device)
    for step in range(max_tokens):
        tokens, logprobs = sample(logits, temperature, generator)
        for row, going, token, logprob in zip(decoder.rows, running.tolist(), tokens.tolist(), logprobs.tolist()):
            if going:
                responses[row][0].append(token)
                responses[row][1].append(logprob)
        running = running & ~torch.isin(tokens, stops)
        left = int(running.sum())
        if step + 1 == max_tokens or not left:
            return responses
        # The others go to the end of the cache, where they cost nothing until the next turn. (Fewer rows need another graph.)
        if left < (0.5 if decoder.captures else 0.75) * len(running):
            first, last = running[:left], running[left:]
            decoder.swap((~first).nonzero()[:, 0], left + last.nonzero()[:, 0])
            tokens, running = tokens[:left].masked_scatter(~first, tokens[left:][last]), torch.ones_like(first)
        logits = decoder.feed(torch.where(running, tokens, pad_id)[:, None], running[:, None])


@torch.no_grad()
def rollout(model, tokenizer, envs, *, seeds, temperature, max_response_tokens, generator, max_context=None):
    """Play one episode in each of envs -> Trajectories, in their order, on the CPU.

    model: Hugging Face causal LM; tokenizer: its tokenizer, with a chat template. envs: B environments, envs[i] is reset with
    seeds[i]: equal seeds give the G rollouts of a group the same instance. temperature > 0, for sampling and for `logprobs`;
    the distribution is not truncated (no top-k, no top-p), so the log-probs are the policy's. max_response_tokens: a longer
    response is cut, and lacks its end-of-turn token. generator: torch.Generator on the model's device. max_context: an episode
    ends where the next turn might not fit; the model's own limit by default. FloatingPointError: logits that are not finite.
    """
    sampler = Sampler(model, tokenizer, temperature, max_response_tokens, generator)
    transcripts = sampler.open(envs, seeds, max_context)
    sampler.finish(transcripts)
    return pack(transcripts, sampler.pad_id)


class Sampler:
    """A model with its tokenizer and how it is sampled from; plays episodes to their end."""

    def __init__(self, model, tokenizer, temperature, max_response_tokens, generator):
        if not 0 < temperature < float("inf"):
            raise ValueError(f"temperature must be positive, got {temperature}")
        if max_response_tokens < 1:
            raise ValueError(f"max_response_tokens must be at least 1, got {max_response_tokens}")
        self.model, self.tokenizer, self.temperature = model, tokenizer, temperature
        self.max_response_tokens, self.generator = max_response_tokens, generator
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        also = getattr(model.generation_config, "eos_token_id", None)
        self.stop_ids = {tokenizer.eos_token_id, *(also if isinstance(also, list) else [also])} - {None}

    def open(self, envs, seeds, max_context=None):
        """A Transcript of each environment, up to where the first response begins."""
        if len(envs) != len(seeds) or not envs:
            raise ValueError(f"need one seed an environment and at least one, got {len(envs)} and {len(seeds)}")
        max_context = max_context or getattr(self.model.config, "max_position_embeddings", None) or 2**31
        chats = {env.system_prompt: Chat(self.tokenizer, env.system_prompt, self.stop_ids) for env in envs}
        return [Transcript(chats[env.system_prompt], env, seed, max_context, self.max_response_tokens)
                for env, seed in zip(envs, seeds)]

    def finish(self, transcripts):
        """Play all of them on to the end of their episodes."""
        was_training, attention = self.model.training, self.model.config._attn_implementation
        self.model.eval()
        if attention != "eager":
            self.model.set_attn_implementation("decode")
        try:
            decoder, playing = Decoder(self.model, len(transcripts)), list(range(len(transcripts)))
            while playing:
                decoder.keep(playing)
                prompts = [transcripts[i].ids[transcripts[i].fed:] for i in playing]
                sampled = sample_turn(decoder, prompts, self.stop_ids, self.pad_id, self.temperature, self.max_response_tokens,
                                      self.generator)
                going_on = []
                for i in playing:
                    t, (ids, logprobs) = transcripts[i], sampled[i]
                    t.fed = len(t.ids) + len(ids) - 1
                    if t.respond(ids, logprobs):
                        going_on.append(i)
                playing = going_on
        finally:
            self.model.set_attn_implementation(attention)
            self.model.train(was_training)


# The cache ------------------------------------------------------------------------------------------------------------

CACHE_BLOCK = 64  # columns that the cache grows by


class Slots(DynamicLayer):
    """A layer's keys and values, in memory that a decode step neither moves nor allocates: new ones go into the columns that
    the decoder names. It hands out all columns, those not yet used among them, which the mask hides: memory without gaps is
    read twice as fast as slices of it."""

    def __init__(self, decoder):
        super().__init__()
        self.decoder = decoder

    def update(self, key_states, value_states, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            device = key_states.device.type  # under autocast, attention reads what it casts: keep it so
            dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else key_states.dtype
            rows, columns = self.decoder.held.shape
            self.stores = [x.new_zeros(rows, x.shape[1], columns, x.shape[3], dtype=dtype) for x in (key_states, value_states)]
        rows = len(key_states)
        for store, new in zip(self.stores, (key_states, value_states)):
            store[:rows].index_copy_(2, self.decoder.columns, new.to(store.dtype))
        return [store[:rows] for store in self.stores]

    def get_seq_length(self):
        return self.decoder.used

    def grow(self, columns):
        self.stores = [nn.functional.pad(store, (0, 0, 0, columns - store.shape[2])) for store in self.stores]

    def swap(self, places, others):
        for store in self.stores:
            used = store[:, :, : self.decoder.used]
            used[torch.cat([places, others])] = used[torch.cat([others, places])]

    def keep(self, places, columns):
        """Keep the rows at `places` [R], and of each of them its columns [R, C]."""
        heads = torch.arange(self.stores[0].shape[1], device=places.device)
        self.stores = [store[places[:, None, None], heads[:, None], columns[:, None]] for store in self.stores]


def decode_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """sdpa; but a single query a row is two plain products, for which sdpa's kernel on a CPU takes twice as long, and for which
    Transformers first copies keys and values that heads share to each of them."""
    rows, heads, queries, size = query.shape
    if queries > 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    grouped = query.view(rows, key.shape[1], -1, size) * (scaling or size**-0.5)  # query heads that share a key head together
    scores = (grouped @ key.transpose(2, 3)).masked_fill(~attention_mask, -torch.inf)
    weights = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
    return (weights @ value).view(rows, 1, heads, size), None


AttentionInterface.register("decode", decode_attention)


class Captured:
    """A function of tensors, captured as a CUDA graph and replayed: a decode step is hundreds of small kernels, and starting them
    one by one from Python takes longer than their work."""

    proved = False

    def __init__(self, function, inputs):
        self.inputs, self.graph = [x.clone() for x in inputs], torch.cuda.CUDAGraph()
        # The outer context restores the stream, which the inner one does not do where capturing fails.
        with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(self.graph):
            self.output = function(*self.inputs)

    def __call__(self, *inputs):
        for own, new in zip(self.inputs, inputs):
            own.copy_(new)
        self.graph.replay()
        return self.output


class Decoder:
    """A model with its key-value cache. A row keeps the number it began with, wherever it comes to lie in the cache."""

    def __init__(self, model, rows):
        self.model, self.device, self.rows = model, model.device, list(range(rows))  # rows[place] = number
        self.held = torch.full((rows, 0), -1, device=self.device)  # [rows, columns]: position of the token there, -1 = none
        self.used = 0  # columns; the others are room
        self.lengths = torch.zeros(rows, dtype=torch.long, device=self.device)
        self.cache = Cache(layer_class_to_replicate=partial(Slots, weakref.proxy(self)))  # no cycle: memory goes at once
        # transformers 5.24 renamed the argument
        self.cache_name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
        self.captures = self.device.type == "cuda"  # decode steps; a CPU has nothing to gain from it
        self.captured = None

    def reserve(self, more):
        """Room for `more` columns."""
        columns = -(-(self.used + more) // CACHE_BLOCK) * CACHE_BLOCK
        if columns > self.held.shape[1]:
            self.held, self.captured = nn.functional.pad(self.held, (0, columns - self.held.shape[1]), value=-1), None
            for layer in self.cache.layers:
                layer.grow(columns)

    def feed(self, ids, mask):
        """Append columns ids[n, c] to the first n rows; mask[n, c] marks the real ones -> float32 logits after the last, [n, V]."""
        n, width = ids.shape
        self.reserve(width)
        ids, mask = ids.to(self.device), mask.to(self.device)
        positions = (self.lengths[:n, None] + mask.cumsum(1) - 1).clamp(min=0)
        self.held[:n, self.used:self.used + width] = torch.where(mask, positions, -1)
        self.lengths[:n] += mask.sum(1)
        columns = torch.arange(self.used, self.used + width, device=self.device)
        logits = (self.replay if self.captures and width == 1 else self.logits)(ids, positions, columns)
        self.used += width
        return logits

    def logits(self, ids, positions, columns):
        """ids and their positions [n, c] go into columns [c] of the cache -> logits after the last of them, [n, V]."""
        self.columns = columns  # for the layers
        out = self.model(input_ids=ids, attention_mask=self.mask(positions), position_ids=positions, use_cache=True,
                         logits_to_keep=1, **{self.cache_name: self.cache})
        return out.logits[:, -1].float()

    def mask(self, positions):
        """What tokens at positions [n, c] attend to, [n, 1, c, columns]; by kind of layer, where a model has several."""
        held, at, config = self.held[: len(positions), None, None], positions[:, None, :, None], self.model.config
        seen = (held >= 0) & (held <= at)
        window = getattr(config, "sliding_window", None)
        masks = {kind: seen if window is None or kind == "full_attention" else seen & (held > at - window)
                 for kind in getattr(config, "layer_types", None) or ["sliding_attention"]}
        if config._attn_implementation == "eager":  # it adds the mask to the scores
            masks = {kind: torch.where(mask, 0.0, torch.finfo(self.model.dtype).min) for kind, mask in masks.items()}
        return masks if len(masks) > 1 else masks.popitem()[1]

    def replay(self, *inputs):
        """`logits` from a CUDA graph of it, once that has agreed with the model on a step that it was not captured on."""
        captured = self.captured if self.captured and len(self.captured.output) == len(inputs[0]) else None
        if captured and captured.proved:
            return captured(*inputs)
        logits = self.logits(*inputs)
        try:
            if captured is None:
                self.captured = Captured(self.logits, inputs)
            elif torch.allclose(captured(*inputs), logits, rtol=0.05, atol=0.05):
                captured.proved = True
            else:
                raise RuntimeError("the graph gives other logits than the model")
        except RuntimeError as error:
            self.captures = False
            warnings.warn(f"decode steps of this model cannot be captured, so rollouts are slower than they could be: {error}")
        return logits

    def swap(self, places, others):
        """The rows at `places` [n] and at `others` [n] trade them."""
        there, here = torch.cat([places, others]), torch.cat([others, places])
        self.held[there], self.lengths[there] = self.held[here], self.lengths[here]
        before = list(self.rows)
        for to, origin in zip(there.tolist(), here.tolist()):
            self.rows[to] = before[origin]
        for layer in self.cache.layers:
            layer.swap(places, others)

    def keep(self, rows):
        """Forget all other rows, and then the columns that hold nothing."""
        if rows == self.rows and (self.held[:, : self.used] >= 0).all():
            return
        places = torch.tensor([self.rows.index(row) for row in rows], device=self.device)
        self.rows, self.held, self.lengths, self.captured = list(rows), self.held[places], self.lengths[places], None
        # What holds something last, in its order; then the columns that hold something in some row.
        columns = (self.held[:, : self.used] >= 0).int().argsort(dim=1, stable=True)[:, self.used - int(self.lengths.max()):]
        self.held, self.used = self.held.gather(1, columns), columns.shape[1]
        for layer in self.cache.layers:
            layer.keep(places, columns)


# Trees (CARL) ---------------------------------------------------------------------------------------------------------


class Tree:
    """Rollouts of one prompt that branch; a node is a state in which the policy responded, an edge a response."""

    def __init__(self):
        self.edges = []  # of all rows, in the order they were sampled
        self.nodes = []  # [snapshot, edge that led to it, edges sampled from it]

    def grow(self, transcript, node=None):
        """Add a finished transcript that began at a node (None: at the root) -> its edges, one a turn."""
        if node is None:
            if not self.nodes:
                self.nodes.append([transcript.states[0], -1, []])
            node = self.nodes[0]
        own, first = [], len(transcript.rewards) - len(transcript.valid)
        for turn, snapshot in enumerate(transcript.states, first):
            if own:
                node = [snapshot, len(self.edges) - 1, []]
                self.nodes.append(node)
            logprobs = [x for x, k in zip(transcript.logprobs, transcript.turn) if k == turn]
            own.append(Edge(parent=node[1], turn=turn, nll=-sum(logprobs) / len(logprobs), returns=float("nan")))
            node[2].append(own[-1])
            self.edges.append(own[-1])
        own[-1].returns = float(sum(transcript.rewards))
        return own

    def critical(self):
        """The node that is forked next: the largest H / n, H = mean NLL of the n responses there; the oldest of equals."""
        return max(self.nodes, key=lambda node: statistics.fmean(edge.nll for edge in node[2]) / len(node[2]))


@torch.no_grad()
def tree_rollout(model, tokenizer, envs, *, seeds, roots, forks, temperature, max_response_tokens, generator, max_context=None):
    """A tree of rollouts for each seed, by CARL's rule -> Trajectories of P * (roots + forks) rows, tree by tree.

    `roots` episodes from the start, then `forks` times: the most critical state of each tree (Tree.critical) is restored, from
    the kept ids and a copy of the environment, and one more episode is played from it to the end. The forks of one round are
    sampled together across trees. envs: P * roots environments, seeds: P. A row's response_mask covers what that row sampled;
    the ids before are another row's. `edges` tells how rows hang together.
    """
    sampler = Sampler(model, tokenizer, temperature, max_response_tokens, generator)
    opened = sampler.open(envs, [seed for seed in seeds for _ in range(roots)], max_context)
    for transcript in opened:
        transcript.states = []
    sampler.finish(opened)
    trees, rows = [Tree() for _ in seeds], [[] for _ in seeds]  # rows: (transcript, its edges)
    for i, transcript in enumerate(opened):
        rows[i // roots].append((transcript, trees[i // roots].grow(transcript)))
    for _ in range(forks):
        nodes = [tree.critical() for tree in trees]
        continued = [node[0].fork() for node in nodes]
        sampler.finish(continued)
        for tree, row, node, transcript in zip(trees, rows, nodes, continued):
            row.append((transcript, tree.grow(transcript, node)))
            for edge in node[2]:
                edge.forked = True
    trajectories = pack([transcript for row in rows for transcript, _ in row], sampler.pad_id)
    trajectories.edges = [edges for row in rows for _, edges in row]
    return trajectories


# Scoring --------------------------------------------------------------------------------------------------------------


@dataclass
class TokenStats:
    logprobs: torch.Tensor  # [B, T], of each response token; 0 elsewhere, as are the next two
    logsumexp: torch.Tensor  # [B, T]
    entropy: torch.Tensor  # [B, T]
    hidden: torch.Tensor  # [N, H], the states that predict the N response tokens


def score(model, ids, response_mask, temperature=1.0):
    """Statistics of every response token under a model: column t is of token t, predicted from the state at t - 1."""
    hidden = model.base_model(input_ids=ids[:, :-1]).last_hidden_state  # [B, T - 1, H]
    here = response_mask[:, 1:]
    hidden, head = hidden[here], model.get_output_embeddings()  # [N, H]
    weight = head.weight
    if torch.is_autocast_enabled(ids.device.type):  # token_stats takes what it is given
        hidden, weight = (x.to(torch.get_autocast_dtype(ids.device.type)) for x in (hidden, weight))
    stats = token_stats(hidden, weight, ids[:, 1:][here], bias=head.bias, temperature=temperature)
    blank = torch.zeros(ids.shape, device=ids.device)
    return TokenStats(*(blank.masked_scatter(response_mask, values) for values in stats), hidden)


SCAFFOLD = "<think></think><answer>"  # closes the reasoning and opens the answer


@torch.no_grad()
def beliefs(model, tokenizer, trajectories, micro_batch=16):
    """Mean log-prob of the gold answer before the first turn and after each, [B, K + 1] float32; 0 past a row's last turn.

    Teacher-forced: the gold answer follows the context and SCAFFOLD (A2TGPO). What is equal, the prompts of a group say, is
    read once. With nothing left to answer (a solved Sudoku) the belief is 0, the log of certainty.
    """
    encode = lambda text: tokenizer(text, add_special_tokens=False).input_ids
    scaffold, wanted, places = encode(SCAFFOLD), {}, []
    for row, probes in enumerate(trajectories.probes):
        ids = trajectories.ids[row].tolist()
        for k, probe in enumerate(probes):
            if probe.gold:
                places.append((row, k, (tuple(ids[: probe.length] + probe.more + scaffold), tuple(encode(probe.gold)))))
                wanted[places[-1][2]] = 0.0
    queue = sorted(wanted, key=lambda pair: len(pair[0]) + len(pair[1]))
    for start in range(0, len(queue), micro_batch):
        part = queue[start:start + micro_batch]
        ids, gold = (nn.utils.rnn.pad_sequence([torch.tensor(value) for value in values], batch_first=True) for values in (
            [context + answer for context, answer in part],
            [[False] * len(context) + [True] * len(answer) for context, answer in part]))
        logprobs = score(model, ids.to(model.device), gold.to(model.device)).logprobs.cpu()
        wanted.update(zip(part, (logprobs.sum(1) / gold.sum(1)).tolist()))
    out = torch.zeros(len(trajectories), max(map(len, trajectories.probes), default=0))
    for row, k, pair in places:
        out[row, k] = wanted[pair]
    return out


# The built-in agent ---------------------------------------------------------------------------------------------------

CHAT_TEMPLATE = (  # the shape of Qwen2.5's
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
WORDS = r" ?[A-Z]?[a-z]+| ?\d| ?\|\||[:.]\n|\s|[^\s]"  # board symbols and digits stay apart, words keep their space


def tiny_tokenizer(texts, phrases=()):
    """A small byte-level tokenizer whose vocabulary is the words of `texts`; any other text falls back to bytes.

    phrases: strings that become one token each. The instructions that open every prompt are the same in every episode, so a
    model trained on one environment need not spell them out.
    """
    splitter = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(WORDS), "isolated"),
                                        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    words = {piece for text in texts for piece, _ in splitter.pre_tokenize_str(text)}
    vocabulary = sorted(pre_tokenizers.ByteLevel.alphabet()) + sorted(word for word in words if len(word) > 1)
    # ignore_merges: a known word is one token as it stands, so no merge table is needed to build it up from bytes.
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(vocabulary)}, [], ignore_merges=True))
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tags = ["<think>", "</think>", "<answer>", "</answer>"]
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in [*tags, *phrases]])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>",
                                   chat_template=CHAT_TEMPLATE, clean_up_tokenization_spaces=False)


def tiny_model(tokenizer, *, width=64, layers=2, heads=2, seed=0):
    """A small untrained Qwen2ForCausalLM for `tokenizer`, the same for the same seed."""
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=2048, tie_word_embeddings=True,
        # The default 0.02 is meant for widths in the thousands; at this width training stalls with it.
        initializer_range=0.08, bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen2ForCausalLM._from_config(config, attn_implementation="sdpa").float()


FILLERS = ["Let me look at the board.", "I should plan ahead.", "One wrong step can spoil the game.",
           "Let me check every move.", "First I look, then I move.", "There is no need to hurry."]


def demonstration(env, rng, noise, plan_in="answer"):
    """A response that states facts, with empty phrases in between, and plays the oracle's moves.

    Each move is a random one instead with probability `noise`. plan_in: where the moves are decided, in the "answer" or
    already in a last sentence of the reasoning ("think"), which the answer copies.
    """
    opening, closing = rng.choice(FILLERS, 2)
    sentences = [opening, *env.facts(), closing]
    ahead, actions = copy.deepcopy(env), []
    while len(actions) < env.actions_per_turn and not (ahead.solved() or ahead.failed()):
        plan = ahead.oracle()
        actions.append(plan[0] if plan and rng.random() >= noise else ahead.random_action(rng))
        ahead.move(actions[-1])
    if plan_in == "think":
        sentences.append(f"So I play {' and '.join(actions)}.")
    return response(actions, think=" ".join(sentences))


def demonstrations(env, tokenizer, seeds, rng, noise, plan_in, desc):
    """One demonstrated episode a seed -> Trajectories."""
    chat, transcripts = Chat(tokenizer, env.system_prompt), []
    for seed in tqdm(seeds, desc=desc, unit="episode", leave=False, disable=None):
        transcript = Transcript(chat, env, seed, max_context=10**9, max_response_tokens=0)
        while transcript.respond(tokenizer(demonstration(env, rng, noise, plan_in)).input_ids + [tokenizer.eos_token_id]):
            pass
        transcripts.append(transcript)
    return pack(transcripts, tokenizer.pad_token_id)


def imitate(model, data, steps, lr, rng, desc, batch=16, action_weight=8.0):
    """Supervised training on the responses of `data`; learning rate falls linearly to a twentieth."""
    optimizer = torch.optim.Adam(model.parameters(), lr, betas=(0.9, 0.95))
    by_length = data.lengths.argsort()  # neighbours are of like length, so a batch has little padding
    bar = tqdm(range(steps), desc=desc, unit="update", leave=False, disable=None)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 50) * max(0.05, 1 - step / steps)
        start = int(rng.integers(len(data) - batch + 1))
        rows = data.select(by_length[start:start + batch])
        stats = score(model, rows.ids, rows.response_mask)
        # Action tokens are few but decide the game; unweighted, they are learnt last.
        weights = rows.response_mask + (action_weight - 1) * rows.action_mask
        loss = -(weights * stats.logprobs).sum() / weights.sum()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.2f}")


# Any agent ------------------------------------------------------------------------------------------------------------


def load_tokenizer(path):
    try:  # tokenizer.json as it stands: AutoTokenizer may rebuild it by model type, and then the ids are others
        return PreTrainedTokenizerFast.from_pretrained(path)
    except (OSError, ValueError):
        return AutoTokenizer.from_pretrained(path)


def load_agent(path, device):
    """(model in float32, tokenizer) from a directory or a Hugging Face id; ValueError if `score` would be wrong for it."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa").to(device)
    model.eval()
    for module in model.modules():  # with dropout, the ratio would compare the policy with another draw of itself
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if getattr(module, "attention_dropout", 0.0):
            module.attention_dropout = 0.0
    ids = torch.arange(8, device=device)[None]  # [1, 8]
    everywhere = torch.ones_like(ids, dtype=torch.bool)
    everywhere[:, 0] = False
    with torch.no_grad():
        logsumexp = torch.logsumexp(model(ids).logits.float(), -1)[:, :-1]
        if not torch.allclose(score(model, ids, everywhere).logsumexp[:, 1:], logsumexp, atol=1e-2):
            raise ValueError(f"{path}: this model's logits are more than its output embedding of the last hidden state")
    return model, load_tokenizer(path)


# The benchmark --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def rollout_by_generate(model, tokenizer, envs, *, seeds, temperature, max_response_tokens):
    """What `rollout` is measured against: every turn encodes the whole conversation again and calls `model.generate`.

    -> tokens generated. The responses follow the same distribution, end-of-turn token included.
    """
    chats = [[{"role": "system", "content": env.system_prompt}, {"role": "user", "content": env.reset(seed=seed)[0]}]
             for env, seed in zip(envs, seeds)]
    active, generated = list(range(len(envs))), 0
    while active:
        texts = [tokenizer.apply_chat_template(chats[i], tokenize=False, add_generation_prompt=True) for i in active]
        batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
        out = model.generate(input_ids=batch.input_ids.to(model.device), attention_mask=batch.attention_mask.to(model.device),
                             do_sample=True, temperature=temperature, top_k=0, top_p=1.0, max_new_tokens=max_response_tokens,
                             pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id)
        going_on = []
        for i, ids in zip(active, out[:, batch.input_ids.shape[1]:].tolist()):
            ids = ids[: ids.index(tokenizer.eos_token_id) + 1] if tokenizer.eos_token_id in ids else ids
            generated += len(ids)
            text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            observation, _, terminated, truncated, _ = envs[i].step(text)
            if not (terminated or truncated):
                chats[i] += [{"role": "assistant", "content": text}, {"role": "user", "content": observation}]
                going_on.append(i)
        active = going_on
    return generated


def positive(text):
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def main():
    parser = argparse.ArgumentParser(description="Tokens per second of rollout() and of model.generate on the re-encoded "
                                     "conversation: the built-in agent, untrained, on Sokoban; medians of alternating runs.")
    parser.add_argument("--batch", type=positive, default=128, help="episodes played side by side (default: 128)")
    parser.add_argument("--turns", type=positive, nargs="+", default=[2, 4, 5, 8, 9], help="turns an episode (default: 2 4 5 8 9)")
    parser.add_argument("--tokens", type=positive, default=60, help="longest response (default: 60)")
    parser.add_argument("--rounds", type=positive, default=3, help="measured runs of each (default: 3)")
    parser.add_argument("--width", type=positive, default=64, help="hidden size, a multiple of 32 (default: 64)")
    parser.add_argument("--layers", type=positive, default=2, help="default: 2; a model of Qwen2.5-0.5B's shape has 24, 896 wide")
    options = parser.parse_args()
    if options.width % 32:
        parser.error("--width must be a multiple of 32")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads, {options.batch} episodes, responses of at "
          f"most {options.tokens} tokens, {options.layers} layers of width {options.width}")
    print("| turns | rollout, tokens/s | generate, tokens/s | ratio | rollout, s a turn |")
    print("|---|---|---|---|---|")
    for turns in options.turns:
        envs = [make("sokoban", walls=0, observation="coordinates", max_turns=turns, max_actions=2 * turns, max_moves=4)
                for _ in range(options.batch)]
        seeds = range(options.batch)
        texts = ["system", "user", "assistant", *FILLERS]
        for seed in seeds:
            texts += [envs[0].reset(seed=seed)[0], response(envs[0].actions, " ".join(envs[0].facts()))]
        tokenizer = tiny_tokenizer(texts, phrases=envs[0].phrases)
        model = tiny_model(tokenizer, width=options.width, layers=options.layers, heads=options.width // 32).to(device).eval()
        runs = {"rollout": [], "generate": []}
        for turn in range(options.rounds + 1):  # the first warms up
            torch.manual_seed(turn)
            shared = dict(seeds=seeds, temperature=1.0, max_response_tokens=options.tokens)
            started = time.perf_counter()
            played = rollout(model, tokenizer, envs, **shared, generator=torch.Generator(device).manual_seed(turn))
            middle = time.perf_counter()
            generated = rollout_by_generate(model, tokenizer, envs, **shared)
            ended = time.perf_counter()
            runs["rollout"].append((int(played.response_mask.sum()) / (middle - started), (middle - started) / turns))
            runs["generate"].append((generated / (ended - middle), 0))
        speed = {name: statistics.median(rate for rate, _ in values[1:]) for name, values in runs.items()}
        print(f"| {turns} | {speed['rollout']:.0f} | {speed['generate']:.0f} | {speed['rollout'] / speed['generate']:.1f} | "
              f"{statistics.median(seconds for _, seconds in runs['rollout'][1:]):.2f} |", flush=True)


if __name__ == "__main__":
    main()
