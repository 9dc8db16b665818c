"""Multi-turn sampling: what is recorded is what the model saw, and spans are where the tags are."""

import copy
import gc
import inspect
import json
import math
import re
import sys
import time
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import assert_logprobs_are_those_of_a_plain_forward_pass, plain_logprobs, respond, scripted
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import (
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import env as environments
import extras.agent as taught
import rollout as sampling
from actfocus import action_mask
from env import response
from extras.guard import check_agent
from extras.metrics import episodes
from rollout import Chat, Decoder, Transcript, load_agent, pack, rollout, sample, sample_turn, score
from train import AGENTS, DEFAULTS, Settings


def run(agent, n=6, temperature=1.0, seed=0, max_response_tokens=25, envs=None, **options):
    model, tokenizer, make_env = agent
    generator = torch.Generator(model.device).manual_seed(seed)
    return rollout(model, tokenizer, envs or [make_env() for _ in range(n)], seeds=range(n), temperature=temperature,
                   max_response_tokens=max_response_tokens, generator=generator, **options)


class Scripted(environments.Sokoban):
    """Ends after a number of turns that depends on the seed, so that rows leave the batch one by one."""

    def reset(self, *, seed=None, options=None):
        result = super().reset(seed=seed)
        self.max_turns = 1 + seed % 4
        return result


def ragged_envs():
    return [Scripted(walls=0, max_moves=2, observation="both") for _ in range(6)]


class Wordy(Scripted):
    """Says little at first or later, or a lot, depending on the seed."""

    def render(self):
        return "The box. " * ([1, 40, 0, 7, 90, 3][(self.rng.bit_generator.state["state"]["state"] + self.turn) % 6])


def wordy_envs():
    return [Wordy(walls=0, max_moves=2) for _ in range(6)]


@pytest.fixture(scope="module")
def ragged(agent):
    return run(agent, envs=ragged_envs())


def test_sampled_logprobs_are_those_of_one_plain_forward_pass(agent, ragged):
    """The cache over several turns, the padding columns and the shrinking batch change nothing."""
    assert ragged.turns.tolist() == [1, 2, 3, 4, 1, 2] and not ragged.logprobs[~ragged.response_mask].any()
    assert_logprobs_are_those_of_a_plain_forward_pass(agent[0], ragged)


def stopping(model, vocabulary):
    """The same model, but every eighth word ends a response: so rows end early, each at its own time."""
    model = copy.copy(model)
    model.generation_config = copy.deepcopy(model.generation_config)
    model.generation_config.eos_token_id = list(range(4, vocabulary, 8))
    return model


def gemma(tokenizer):
    return dict(vocab_size=len(tokenizer) + 5, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
                num_attention_heads=2, num_key_value_heads=1, head_dim=16, query_pre_attn_scalar=16, sliding_window=16,
                max_position_embeddings=4096, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
                layer_types=["sliding_attention", "full_attention", "sliding_attention"],
                pad_token_id=tokenizer.pad_token_id)


def qwen(tokenizer, *layer_types):
    return Qwen2Config(**taught.tiny_model(tokenizer).config.to_dict() | {
        "use_sliding_window": True, "sliding_window": 7, "layer_types": list(layer_types), "num_key_value_heads": 1})


KINDS = {
    "full": lambda t: (Qwen2ForCausalLM, qwen(t, "full_attention", "full_attention")),
    "sliding": lambda t: (Qwen2ForCausalLM, qwen(t, "sliding_attention", "sliding_attention")),
    "mixed": lambda t: (Qwen2ForCausalLM, qwen(t, "full_attention", "sliding_attention")),
    "gemma": lambda t: (Gemma3ForCausalLM, Gemma3TextConfig(**gemma(t))),
    "gemma with eyes": lambda t: (Gemma3ForConditionalGeneration, Gemma3Config(
        text_config=gemma(t), mm_tokens_per_image=4, boi_token_index=1, eoi_token_index=2, image_token_index=3,
        vision_config=dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1,
                           image_size=28, patch_size=14))),
    "absolute positions": lambda t: (GPT2LMHeadModel, GPT2Config(
        vocab_size=len(t), n_embd=32, n_layer=2, n_head=2, n_positions=4096, bos_token_id=None,
        eos_token_id=t.eos_token_id)),
}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_layers_of_any_kind_see_in_the_cache_what_they_see_without_one(agent, kind, attention):
    """A window counts tokens of the row, whatever padding lies before them; prompts and observations are short or long,
    responses end early or are cut, episodes have 1 to 4 turns."""
    tokenizer = agent[1]
    model_class, config = KINDS[kind](tokenizer)
    torch.manual_seed(0)
    model = stopping(model_class._from_config(config, attn_implementation=attention).eval(), len(tokenizer))
    for x in model.parameters():
        if x.dim() > 1:
            torch.nn.init.normal_(x, std=0.2)
    for envs in (ragged_envs(), wordy_envs()):
        played = run((model, tokenizer, None), envs=envs, max_response_tokens=15)
        assert played.turns.tolist() == [1, 2, 3, 4, 1, 2] and not played.logprobs[~played.response_mask].any()
        assert_logprobs_are_those_of_a_plain_forward_pass(model, played)
    first = (~played.response_mask).long().cumprod(1).sum(1)
    assert first.max() > 3 * first.min()
    responses = [int((ids == turn).sum()) for ids in played.turn_ids for turn in range(int(ids.max()) + 1)]
    assert len(set(responses)) > 5 and min(responses) < 4 and max(responses) > 8
    assert model.config._attn_implementation == attention


@pytest.mark.parametrize("kind", ["full", "mixed", "absolute positions"])
def test_any_order_of_rows_and_any_lengths_of_turns(agent, kind):
    """Texts grow by 0 to 150 ids a turn, in another order every turn, rows leave: as if each were alone and new."""
    model_class, config = KINDS[kind](agent[1])
    torch.manual_seed(0)
    model = model_class._from_config(config, attn_implementation="sdpa").eval()
    rng, generator, words = np.random.default_rng(0), torch.Generator().manual_seed(0), len(agent[1])
    for _ in range(3):
        decoder = Decoder(model, 1.3, generator)
        texts = {row: rng.integers(words, size=rng.integers(1, 80)).tolist() for row in range(5)}
        while texts:
            made = sample_turn(decoder, texts, set(range(0, words, 6)), int(rng.integers(1, 12)))
            assert made.keys() == texts.keys()
            for row, (ids, logprobs) in made.items():
                expected = plain_logprobs(model, texts[row] + ids, 1.3)[len(texts[row]) - 1:]
                torch.testing.assert_close(torch.tensor(logprobs), expected, atol=2e-5, rtol=0)
            rows = rng.permutation(list(texts)).tolist()[: len(texts) - int(rng.random() < 0.5)]
            longer = {row: rng.integers(words, size=rng.choice([0, 1, 9, 150])).tolist() for row in rows}
            texts = {row: texts[row] + made[row][0] + longer[row] for row in rows}


@pytest.mark.parametrize("kind", KINDS)
def test_a_loaded_agent_is_the_saved_one_without_its_dropout(agent, tmp_path, kind):
    """In float32, whatever it was saved in; in training mode, too, every pass gives the same."""
    model_class, config = KINDS[kind](agent[1])
    config.get_text_config().attention_dropout = config.resid_pdrop = config.attn_pdrop = config.embd_pdrop = 0.5
    saved = model_class._from_config(config, attn_implementation="sdpa").eval()
    for x in saved.parameters():
        x.data = x.data.bfloat16().float()
    copy.deepcopy(saved).bfloat16().save_pretrained(tmp_path)
    agent[1].save_pretrained(tmp_path)
    try:
        model, tokenizer = load_agent(str(tmp_path), "cpu")
    except ValueError as refused:  # transformers 5.0 trains this one with token_type_ids alone
        assert kind == "gemma with eyes" and "token_type_ids" in str(refused)
        return
    assert type(model) is model_class and model.dtype == torch.float32 and not model.training
    assert tokenizer.get_vocab() == agent[1].get_vocab() and tokenizer.chat_template == agent[1].chat_template
    ids = torch.arange(4, 40)
    expected = plain_logprobs(saved, ids)
    for mode in (False, True):
        assert torch.equal(plain_logprobs(model.train(mode), ids), expected)
    saved.train()
    assert not torch.equal(plain_logprobs(saved, ids), expected)


class Counting(torch.nn.Module):
    """A model that notes the [rows, columns] of every call."""

    def __init__(self, model):
        super().__init__()
        self.model, self.calls, self.config, self.generation_config = model, [], model.config, model.generation_config
        self.device = model.device

    def forward(self, input_ids, cache=None, past_key_values=None, **others):
        self.calls.append(tuple(input_ids.shape))
        name = "cache" if "cache" in inspect.signature(self.model.forward).parameters else "past_key_values"
        return self.model(input_ids, **{name: cache if past_key_values is None else past_key_values}, **others)


def test_a_rollouts_work_grows_linearly_with_turns(agent):
    """Each turn feeds its own tokens, whatever came before: the columns of turn 8 are those of turn 2."""
    model, tokenizer, _ = agent
    counting = Counting(model)
    long = dict(walls=0, max_moves=2, observation="both", max_turns=8, max_actions=16)
    made = [environments.make("sokoban", **long) for _ in range(3)]
    played = rollout(counting, tokenizer, made, seeds=[1, 2, 3], temperature=1.0, max_response_tokens=5,
                     generator=torch.Generator().manual_seed(0))
    assert played.turns.tolist() == [8, 8, 8]
    prompts = [columns for _, columns in counting.calls if columns > 1]
    assert len(prompts) == 8 and max(prompts[1:]) <= min(prompts[1:]) + 5
    fed = sum(rows * columns for rows, columns in counting.calls)
    assert fed <= 1.1 * int(played.lengths.sum()) + 8 * 3 * 5  # each token once, and some padding


def test_a_turn_feeds_what_is_new_in_the_row_with_the_most_and_one_column_a_token(agent):
    model, tokenizer, _ = agent
    counting = Counting(stopping(model, len(tokenizer)))
    played = run((counting, tokenizer, None), envs=wordy_envs())
    expected, cached = [], [0] * 6
    for turn in range(4):
        going = [row for row in range(6) if played.turns[row] > turn]
        starts = {row: int((played.turn_ids[row] == turn).nonzero()[0]) for row in going}
        sizes = {row: int((played.turn_ids[row] == turn).sum()) for row in going}
        expected += [(len(going), max(starts[row] - cached[row] for row in going))]
        expected += [(len(going), 1)] * (max(sizes.values()) - 1)
        for row in going:
            cached[row] = starts[row] + sizes[row] - 1
    assert counting.calls == expected


def test_a_turn_ends_when_all_rows_have_ended_and_what_rows_drew_after_their_end_is_dropped(agent, monkeypatch):
    """Seven rows end their responses at once, one goes on to the limit; then none does."""
    model, tokenizer, _ = agent
    counting, stop, word = Counting(model), tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("The")
    longest = 5

    def drawn(logits, temperature, generator):
        tokens = torch.full((len(logits),), word if len(counting.calls) % 2 else stop)  # those that are done draw on
        tokens[:] = torch.where(torch.arange(8) == longest, word, tokens if len(counting.calls) > 1 else stop)
        return tokens, torch.arange(8) + len(counting.calls) / 100
    monkeypatch.setattr(sampling, "sample", drawn)
    decoder, texts = Decoder(counting, 1.0, None), {row: [word] * (row + 1) for row in range(8)}
    responses = sample_turn(decoder, texts, {stop}, 20)
    assert counting.calls == [(8, 8)] + [(8, 1)] * 19
    assert [responses[row][0] for row in range(8)] == [[word] * 20 if row == 5 else [stop] for row in range(8)]
    assert responses[3][1] == [pytest.approx(3.01)] and responses[5][1][-1] == pytest.approx(5.20)
    assert decoder.cached == {row: row + 1 + (19 if row == 5 else 0) for row in range(8)}
    counting.calls.clear()
    longest = 9
    again = sample_turn(decoder, {row: texts[row] + responses[row][0] for row in texts}, {stop}, 20)
    assert all(ids == [stop] for ids, _ in again.values()) and len(counting.calls) == 1


def test_the_cache_is_freed_with_its_decoder(agent):
    gc.collect()
    gc.disable()
    try:
        decoder = Decoder(agent[0], 1.0, None)
        with torch.no_grad():
            decoder.feed_texts({0: [5, 6, 7]}, 4)
        alive = [weakref.ref(decoder), *(weakref.ref(layer.keys) for layer in decoder.cache.layers)]
        assert all(ref() is not None for ref in alive) and len(alive) == 3
        del decoder
        assert all(ref() is None for ref in alive)
    finally:
        gc.enable()


def test_under_autocast_logprobs_are_those_of_the_half_precision_model(agent):
    with torch.autocast("cpu", torch.bfloat16):
        assert_logprobs_are_those_of_a_plain_forward_pass(agent[0], run(agent, envs=ragged_envs()), atol=0.08)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("half", [False, True])
def test_on_a_gpu_logprobs_are_the_models(agent, half):
    model = copy.deepcopy(agent[0]).cuda()
    with torch.autocast("cuda", torch.bfloat16, enabled=half):
        played = run((model, *agent[1:]), envs=ragged_envs())
    assert_logprobs_are_those_of_a_plain_forward_pass(model.cpu(), played, atol=0.1 if half else 1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("captures", [True, False])
def test_on_a_gpu_steps_are_replayed_unless_the_model_looks_at_its_numbers(agent, captures):
    """What a model that cannot be captured says is right all the same, as is what it draws."""
    from extras.captured import CapturedDecoder
    model = copy.deepcopy(agent[0]).cuda()
    if not captures:
        model.model.norm.register_forward_hook(lambda module, inputs, out: out if float(out.sum()) else out)
    decoder = CapturedDecoder(model, 1.0, torch.Generator("cuda").manual_seed(0))
    texts = {row: [5, 6, 7, 8][: row + 1] for row in range(4)}
    with torch.no_grad():
        made = sample_turn(decoder, texts, {0}, 20)
    assert (decoder.graph is not None) == captures
    model.cpu()
    for row, (ids, logprobs) in made.items():
        expected = plain_logprobs(model, texts[row] + ids, 1.0)[len(texts[row]) - 1:]
        torch.testing.assert_close(torch.tensor(logprobs), expected, atol=1e-3, rtol=0)
    assert len({tuple(ids) for ids, _ in made.values()}) > 1  # rows draw apart


def test_sampling_leaves_the_model_as_it_was(agent):
    model = agent[0]
    model.train()
    run(agent, n=1)
    assert model.training and model.config._attn_implementation == "sdpa"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(FloatingPointError):  # in the middle of a rollout, too
        patch.setattr(Decoder, "feed", lambda self, ids: sample(torch.full((len(ids), 9), torch.nan), 1.0, None))
        run(agent, n=1)
    assert model.training and model.config._attn_implementation == "sdpa"
    model.eval()


def test_words_are_drawn_as_often_as_the_model_says(randn):
    """Against the softmax at the temperature: 60000 draws of each of two rows; what is impossible is never drawn."""
    logits = 2 * randn(2, 8).float()
    logits[0, 0] = logits[0, 7] = logits[1, 3] = -math.inf
    p = torch.softmax(logits.double() / 0.7, -1)
    tokens, logprobs = sample(logits.repeat(60_000, 1), 0.7, torch.Generator().manual_seed(0))
    counts = torch.stack([tokens[row::2].bincount(minlength=8) for row in range(2)])
    assert not counts[p == 0].any()
    chi = ((counts - 60_000 * p) ** 2 / (60_000 * p))[p > 0].sum()
    assert chi < 30  # 11 degrees of freedom: 99.8 % lie below
    expected = p.log().repeat(60_000, 1).gather(1, tokens[:, None])[:, 0].float()
    torch.testing.assert_close(logprobs, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(tokens[::2], sample(logits.repeat(60_000, 1), 0.7, torch.Generator().manual_seed(0))[0][::2])


@pytest.mark.parametrize("number", [0.0, 1 - 2.0 ** -53])
def test_the_smallest_and_the_largest_number_draw_the_first_and_the_last_possible_word(monkeypatch, number):
    monkeypatch.setattr(torch, "rand", lambda *shape, dtype, **_: torch.full(shape, number, dtype=dtype))
    logits = torch.tensor([[-math.inf, -1e9, 0.0, 0.3, -math.inf, 5.0, -1e9, -math.inf]] * 2)
    tokens, logprobs = sample(logits, 1.0, None)
    assert tokens.tolist() == [2 if number == 0 else 5] * 2 and torch.isfinite(logprobs).all()


@pytest.mark.parametrize("bad", [torch.nan, math.inf])
def test_logits_that_are_not_finite_are_named(agent, bad):
    logits = torch.tensor([[0.0, 1.0], [0.0, bad]])
    with pytest.MonkeyPatch.context() as patch, pytest.raises(FloatingPointError, match="not finite"):
        patch.setattr(Decoder, "feed", lambda self, ids: sample(logits, 1.0, None))
        run(agent, n=2)


def test_temperature_is_applied_to_the_recorded_logprobs(agent):
    cool = run(agent, n=2, temperature=0.5)
    assert_logprobs_are_those_of_a_plain_forward_pass(agent[0], cool, temperature=0.5)


def test_a_trajectory_reads_as_the_chat_template_writes_it(agent, ragged):
    """Decoding the ids gives the template's own text of the same conversation."""
    _, tokenizer, _ = agent
    for row in range(6):
        env = Scripted(walls=0, max_moves=2, observation="both")
        messages = [{"role": "system", "content": env.system_prompt},
                    {"role": "user", "content": env.reset(seed=row)[0]}]
        for turn in range(int(ragged.turns[row])):
            words = ragged.ids[row][ragged.turn_ids[row] == turn].tolist()
            text = tokenizer.decode(words[:-1] if words[-1] == tokenizer.eos_token_id else words)
            messages += [{"role": "assistant", "content": text}, {"role": "user", "content": env.step(text)[0]}]
        text = tokenizer.decode(ragged.ids[row, : ragged.lengths[row]])
        expected = tokenizer.apply_chat_template(messages[:-1], tokenize=False)
        assert expected.startswith(text) and expected[len(text):] in ("", "\n", "<|im_end|>\n")


def test_the_end_of_turn_token_is_trained_and_a_cut_response_lacks_it(agent, ragged):
    tokenizer = agent[1]
    cut = ended = 0
    for row in range(6):
        for turn in range(int(ragged.turns[row])):
            words = ragged.ids[row][ragged.turn_ids[row] == turn].tolist()
            assert len(words) <= 25 and tokenizer.eos_token_id not in words[:-1]
            if words[-1] == tokenizer.eos_token_id:
                ended += 1
            else:
                cut += 1
                assert len(words) == 25
    assert cut > 0 and cut + ended == 13


def test_the_same_generator_gives_the_same_trajectories(agent):
    first, again, other = run(agent), run(agent), run(agent, seed=1)
    assert torch.equal(first.ids, again.ids) and torch.equal(first.logprobs, again.logprobs)
    assert first.ids.shape != other.ids.shape or not torch.equal(first.ids, other.ids)


def test_rewards_and_validity_are_the_environments(agent, ragged):
    assert ragged.returns.tolist() == pytest.approx((-0.1 * ragged.turns).tolist())  # an untrained agent never answers
    assert not ragged.valid.any() and not ragged.success.any()


def test_padding_is_outside_every_mask(ragged):
    padding = torch.arange(ragged.ids.shape[1]) >= ragged.lengths[:, None]
    assert not ragged.response_mask[padding].any() and (ragged.turn_ids[padding] == -1).all()
    assert (ragged.ids[padding] == ragged.ids[padding][0]).all()
    assert torch.equal(ragged.response_mask, ragged.turn_ids >= 0)
    assert not (ragged.action_mask & ~ragged.response_mask).any()


def test_selecting_rows_drops_their_needless_padding(ragged):
    part = ragged.select(torch.tensor([0, 4]))
    assert len(part) == 2 and part.ids.shape[1] == part.lengths.max() < ragged.ids.shape[1]
    assert torch.equal(part.ids[0], ragged.ids[0, : part.ids.shape[1]])


def tensors(played):
    return {name: x for name, x in vars(played).items() if isinstance(x, torch.Tensor)}


@pytest.fixture
def told(ragged):
    """Trajectories with an outcome, notes, and what a credit method has attached."""
    played = copy.copy(ragged)
    played.outcome, played.notes = [{"score": row / 10} for row in range(6)], [f"note {row}" for row in range(6)]
    played.attached, played.scale = played.ids.float() / 7, torch.arange(6)
    return played


NO, YES = False, True


@pytest.mark.parametrize("rows, numbers", [
    ([5, 0, 3], [5, 0, 3]), (torch.tensor([5, 0, 3]), [5, 0, 3]), ([2], [2]), ([1, 1], [1, 1]), (range(2), [0, 1]),
    ([NO, YES, NO, NO, YES, NO], [1, 4]), (torch.tensor([YES, NO, YES, NO, NO, NO]), [0, 2]), ([YES] * 6, [*range(6)]),
    ([], []), (torch.zeros(0, dtype=torch.long), []), ([NO] * 6, []), (torch.tensor([NO] * 6), [])])
def test_rows_are_selected_by_numbers_or_by_a_mask_and_take_everything_along(told, rows, numbers):
    before = {name: x.clone() for name, x in tensors(told).items()}
    part = told.select(rows)
    width = max((int(told.lengths[row]) for row in numbers), default=0)
    assert type(part) is type(told) and len(part) == len(numbers) and part.notes == [f"note {row}" for row in numbers]
    assert part.outcome == [{"score": row / 10} for row in numbers]
    assert tensors(part).keys() == before.keys() >= {"attached", "scale"}
    for name, x in tensors(part).items():
        expected = [before[name][row] if before[name].dim() == 1 else before[name][row, :width] for row in numbers]
        assert x.dtype == before[name].dtype and x.shape == (len(numbers), *(width,) * (x.dim() - 1))
        assert all(torch.equal(a, b) for a, b in zip(x, expected))
        x.zero_()
    assert all(torch.equal(x, before[name]) for name, x in tensors(told).items())  # a part is no window on the whole


def test_parts_are_of_like_length_and_hold_every_row_once(told):
    for size in (1, 2, 4, 6, 99):
        seen, before = [], 0
        for rows, part in told.parts(size):
            assert len(part) == len(rows) <= size and part.notes == [f"note {row}" for row in rows.tolist()]
            assert torch.equal(part.lengths, told.lengths[rows]) and part.lengths.min() >= before
            before = part.lengths.max()
            seen += rows.tolist()
        assert sorted(seen) == list(range(6))


@pytest.mark.parametrize("size", [1, 4, 6])
def test_what_is_made_in_parts_is_put_where_its_rows_stand(told, size):
    doubled, lengths = told.in_parts(lambda part: (2.0 * part.ids, part.lengths[:, None] + 0.0 * part.ids), size)
    here = torch.arange(told.ids.shape[1]) < told.lengths[:, None]
    assert doubled.dtype == torch.float32 and torch.equal(doubled * here, 2.0 * told.ids * here)
    assert torch.equal(lengths * here, told.lengths[:, None] * here.float())


def test_moving_trajectories_moves_all_of_them(told):
    moved = told.to("meta")
    assert all(x.device.type == "meta" for x in tensors(moved).values()) and moved.notes is told.notes
    assert all(x.device.type == "cpu" for x in tensors(told).values())


def test_the_description_is_counted_by_hand(agent):
    _, tokenizer, make_env = agent
    answers = [["<think>The box</think><answer>Up</answer>", "<answer>"], [response(["Up"])]]
    transcripts = [scripted(tokenizer, make_env(), 3, answers[row]) for row in range(2)]
    transcripts[0].logprobs = [-2.0 * (k == 0) - 4.0 * (k == 1) for k in transcripts[0].turn_ids]
    transcripts[1].success = True
    played = pack(transcripts)
    played.outcome = [{"score": 0.25}, {"score": 0.5, "gold": 3}]  # a mean over the episodes that have it
    # tokens: think The box /think answer Up /answer end, answer end; think /think answer Up /answer end
    expected = {"return": (-0.1 - 0.1 - 0.1) / 2, "success": 0.5, "format_valid": 2 / 3, "turns": 1.5,
                "think_tokens": 14 / 3, "action_tokens": 2 / 3, "action_fraction": 2 / 16, "generated_tokens": 16,
                "score": 0.375, "gold": 3, "think_nll": (7 * 2 + 2 * 4 + 5 * 1) / 14}
    found = episodes(played)
    assert found.keys() == expected.keys()
    assert found == pytest.approx(expected)


def test_an_episode_ends_where_the_next_turn_might_not_fit(agent):
    long = run(agent, n=2)
    limit = int(long.lengths.min()) - 5
    short = run(agent, n=2, max_context=limit)
    assert (short.lengths <= limit).all() and (short.turns < long.turns).all()
    with pytest.raises(ValueError, match="context"):
        run(agent, n=2, max_context=30)


@pytest.mark.parametrize("change", [{"temperature": 0.0}, {"temperature": math.inf}, {"max_response_tokens": 0},
                                    {"n": 0, "envs": [1]}])
def test_bad_arguments_are_refused(agent, change):
    with pytest.raises(ValueError):
        run(agent, **change)


def test_seeds_may_be_those_of_an_earlier_batch(agent):
    once = run(agent, n=4)
    model, tokenizer, make_env = agent
    again = rollout(model, tokenizer, [make_env() for _ in range(4)], seeds=once.seeds, temperature=1.0, max_response_tokens=25,
                    generator=torch.Generator().manual_seed(0))
    assert torch.equal(once.ids, again.ids) and torch.equal(once.seeds, again.seeds)


def test_a_wrapped_model_is_scored_as_the_one_inside(agent):
    """PEFT's wrapper has a base_model, too, whose output is that of the whole model."""
    model, ids, mask = agent[0], torch.arange(24).view(2, 12), torch.arange(12).expand(2, 12) > 3
    wrapped = SimpleNamespace(base_model=model, get_base_model=lambda: model, get_output_embeddings=model.get_output_embeddings)
    assert torch.equal(score(wrapped, ids, mask).logprobs, score(model, ids, mask).logprobs)


@pytest.mark.parametrize("template", [None, "{{ raise_exception('System role not supported') }}"])
def test_a_tokenizer_that_cannot_chat_is_refused(agent, template):
    other = PreTrainedTokenizerFast(tokenizer_object=agent[1].backend_tokenizer, eos_token="<|im_end|>",
                                    chat_template=template)
    with pytest.raises(ValueError, match="chat template"):
        check_agent(agent[0], other)


# Spans


def bpe(merged):
    """A byte-level tokenizer in which the given strings are single tokens, tags not among them unless named."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words = [byte_level.pre_tokenize_str(text)[0][0] for text in merged]
    tokenizer = Tokenizer(models.BPE({w: i for i, w in enumerate(alphabet + words)}, [], ignore_merges=True))
    escaped = ["".join("\\" + c if c in "|.()" else c for c in word) for word in merged]
    pattern = "|".join(sorted(escaped, key=len, reverse=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(pattern + r"|[\s\S]" if merged else r"[\s\S]"), "isolated"), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|im_end|>")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>",
                                   chat_template=taught.CHAT_TEMPLATE)


def acting(tokenizer, ids):
    """action_mask of one response."""
    ids = torch.tensor([ids], dtype=torch.long)
    return action_mask(tokenizer, ids, torch.ones_like(ids, dtype=torch.bool))[0].tolist()


@pytest.mark.parametrize("merged", [[], [">Up", "Up<"], ["><", ">U", "p</"], ["answer>Up || Left</answer"],
                                    ["> ", " Up"]])
@pytest.mark.parametrize("text, inside", [
    ("<think>so</think><answer>Up || Left</answer>", ["Up || Left"]),
    ("<think>é 漢</think>\n<answer> Up</answer>", [" Up"]),
    ("<answer>🙂Up</answer>", ["🙂Up"]),
    ("<answer>Up</answer> and <answer>Down</answer>", ["Up", "Down"]),
    ("<answer></answer>", []), ("<think>Up</think>", []), ("<answer>Up", []), ("Up</answer>", []), ("", [])])
def test_action_tokens_are_those_with_a_character_between_the_tags(merged, text, inside):
    """Whatever merges with whatever: compared with the bytes that each token stands for."""
    tokenizer = bpe(merged)
    ids = tokenizer(text).input_ids
    raw, marked, start = text.encode(), [], 0
    for words in inside:
        start = raw.index(b"<answer>" + words.encode(), start) + len(b"<answer>")
        marked.append((start, start + len(words.encode())))
    table = {c: b for b, c in pre_tokenizers_bytes().items()}
    position, expected = 0, []
    for token in tokenizer.convert_ids_to_tokens(ids):
        end = position + len([table[c] for c in token])
        expected.append(any(position < b and a < end for a, b in marked))
        position = end
    assert position == len(raw)
    assert acting(tokenizer, ids) == expected


@pytest.mark.parametrize("pieces", [[b"\xe3", *[b"\x82\xaf\xe3"] * 8, b"\x82\xaf"], [b"\xf0\x9f", *[b"\x99\x82\xf0\x9f"] * 8, b"\x99\x82"]])
@pytest.mark.parametrize("after", [b"", b"!"])
def test_tokens_that_all_end_inside_a_character_are_found(pieces, after):
    """Each holds the end of one character and the beginning of the next, so that only the last one completes the text."""
    tokens = [b"so", b"<answer>", *pieces, after + b"</answer>", b"so"]
    tokenizer = SimpleNamespace(eos_token_id=None, decode=lambda ids, **_: b"".join(tokens[i] for i in ids).decode(errors="replace"))
    assert acting(tokenizer, list(range(len(tokens)))) == [False, False, *[True] * len(pieces), bool(after), False]


class BytePieces:
    """A character in two tokens (4 and 5), and ids without text."""
    eos_token_id, table = 0, {0: b"", 1: b"<answer>", 2: b"Up", 3: b"</answer>", 4: b"\xc3", 5: b"\xa9", 9: b""}

    def decode(self, ids, **options):
        return b"".join(self.table[i] for i in ids).decode(errors="replace")


def test_of_a_pattern_with_groups_the_first_that_takes_part_is_the_action():
    ids = torch.tensor([[1, 2, 3]])
    of = lambda pattern: action_mask(BytePieces(), ids, ids > 0, pattern=pattern)[0].tolist()
    assert of(r"(?s)<answer>(.*?)</(answer|a)>") == of("(Down)|(Up)") == of("U.") == [False, True, False]
    assert of("<answer>(Down)?") == [False] * 3 and of("<answer>") == [True, False, False]
    ids = torch.tensor([[1, 3]])
    assert not of(r"(?s)<answer>(.*?)</(answer|a)>")[1]  # an empty action


def test_an_empty_action_takes_nothing_from_another():
    class Merged(BytePieces):
        table = BytePieces.table | {6: b"p</answer><answer></answer>"}
    assert acting(Merged(), [1, 2, 6]) == [False, True, True]


def test_success_is_a_bool_whatever_the_environment_says(agent, monkeypatch):
    model, tokenizer, make_env = agent
    monkeypatch.setattr(environments.Sokoban, "solved", lambda self: 1)
    played = rollout(model, tokenizer, [make_env()], seeds=[0], temperature=1.0, max_response_tokens=4, generator=None)
    assert played.success.dtype == torch.bool and played.success.all()


def test_a_token_without_text_is_no_action_token():
    class Silent:  # models pad their vocabulary: ids beyond the tokenizer's decode to nothing
        eos_token_id, table = 0, {0: "", 1: "<answer>", 2: "Up", 3: "</answer>", 9: ""}

        def decode(self, ids, **options):
            return "".join(self.table[i] for i in ids)
    assert acting(Silent(), [9, 1, 9, 2, 9, 2, 3, 9]) == [False, False, False, True, False, True, False, False]
    assert acting(BytePieces(), [1, 9, 4, 5, 9, 4, 5, 3]) == [False, False, True, True, False, True, True, False]


def llamas(words):
    """A tokenizer of Llama's kind: words carry their space in front, the one that opens a text is dropped, bytes fall back."""
    tokenizer = Tokenizer(models.BPE({w: i for i, w in enumerate(["<unk>", *(f"<0x{b:02X}>" for b in range(256)), *words])}, [],
                                     unk_token="<unk>", fuse_unk=True, byte_fallback=True, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("|".join(sorted(map(re.escape, words), key=len, reverse=True)) + r"|[\s\S]"),
                                                   "isolated")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                           decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens([AddedToken("</s>")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", chat_template=taught.CHAT_TEMPLATE)


@pytest.mark.parametrize("text, inside", [
    ("think so <answer> Up Left </answer> so", ["▁Up", "▁Left", "▁</answer>"]), ("<answer> Up</answer>", ["▁Up"]),
    ("<answer>é</answer> so", ["<0xC3>", "<0xA9>"]), ("é <answer> Up</answer>é", ["▁Up"]), ("<answer></answer>", [])])
def test_tokens_whose_text_depends_on_their_place_are_found_too(text, inside):
    tokenizer = llamas(["▁<answer>", "<answer>", "</answer>", "▁</answer>", "▁Up", "▁Left", "▁think", "▁so"])
    ids = tokenizer(text).input_ids
    assert [t for t, here in zip(tokenizer.convert_ids_to_tokens(ids), acting(tokenizer, ids)) if here] == inside


@pytest.mark.parametrize("words, inside", [
    (["<answer>", "Up", 0xe2, "</answer>"], ["Up", 0xe2]), (["<answer>", 0xe2, 0x86, 0x92, "</answer>"], [0xe2, 0x86, 0x92]),
    (["<answer>", 0xe2, "Up", 0xe2, 0x86, "</answer>", "Up"], [0xe2, "Up", 0xe2, 0x86]),
    (["<answer>", *[0x86] * 30, "Up", "</answer>", "Up"], [*[0x86] * 30, "Up"]),
    ([*[0x86] * 80, "<answer>", *[0x86] * 80, "Up", "</answer>", "Up"], [*[0x86] * 80, "Up"])])
@pytest.mark.parametrize("kind", ["byte-level", "Llama's"])
def test_bytes_that_are_no_character_end_with_the_token_before_the_tag(words, inside, kind):
    """U+FFFD may be a character that goes on, or one that never will."""
    names = ["<answer>", "</answer>", "Up"]
    tokenizer = bpe(names) if kind == "byte-level" else llamas(names)
    name = (lambda word: pre_tokenizers_bytes()[word]) if kind == "byte-level" else (lambda word: f"<0x{word:02X}>")
    ids = tokenizer.convert_tokens_to_ids([word if isinstance(word, str) else name(word) for word in words])
    assert None not in ids and [word for word, here in zip(words, acting(tokenizer, ids)) if here] == inside


def test_a_response_is_a_run_and_a_turn_and_what_stands_between_is_never_read(agent):
    tokenizer = agent[1]
    parts = ["<answer>Up", "State: box</answer><answer>", "<think>Left</think><answer>Down</answer>", "<answer>Up", "</answer>"]
    ids = [tokenizer(part).input_ids for part in parts]
    column = lambda values: torch.tensor([sum(([v] * len(part) for v, part in zip(values, ids)), [])])
    flat, sampled = torch.tensor([sum(ids, [])]), column([True, False, True, True, True])
    found = action_mask(tokenizer, flat, sampled, column([0, -1, 1, 2, 3]))
    assert tokenizer.decode(flat[found]) == "Down"
    assert tokenizer.decode(flat[action_mask(tokenizer, flat, sampled)]) == "DownUp"  # one run: the last answer is closed
    tools = "(?s)<think>(.*?)</think>"
    assert tokenizer.decode(flat[action_mask(tokenizer, flat, sampled, pattern=tools)]) == "Left"
    assert tokenizer.decode(flat[action_mask(tokenizer, flat, sampled, pattern=re.compile("Le.t|State"))]) == "Left"
    opening = action_mask(tokenizer, flat, sampled, column([0, -1, 1, 2, 3]), pattern=r"\A<think>(.*?)</think>")
    assert tokenizer.decode(flat[opening]) == "Left"  # a response begins where it was sampled
    either = "(?s)<nothing>(.*?)</nothing>|<think>(.*?)</think>"
    assert tokenizer.decode(flat[action_mask(tokenizer, flat, sampled, pattern=either)]) == "Left"
    with pytest.raises(ValueError, match="response_mask"):
        action_mask(tokenizer, flat, sampled[:, 1:])
    with pytest.raises(ValueError, match="turn_ids"):
        action_mask(tokenizer, flat, sampled, flat[:, 1:])


@pytest.mark.parametrize("kind", ["joined", "by place", "opening"])
def test_action_tokens_are_found_in_linear_time(agent, kind):
    tokenizer = bpe([]) if kind == "by place" else agent[1]
    word = {"joined": "The box is above the player. ", "by place": "漢字 ",  # characters of three tokens
            "opening": 2 * "<answer>"}[kind]  # tags that open and never close
    ids = tokenizer("<answer>" + word * 2500).input_ids
    seconds = []
    for n in (1024, 4096):
        tokens = torch.tensor([ids[:n]])
        best = math.inf
        for _ in range(3):
            started = time.perf_counter()
            action_mask(tokenizer, tokens, torch.ones_like(tokens, dtype=torch.bool))
            best = min(best, time.perf_counter() - started)
        seconds.append(best)
    assert seconds[1] < 8 * seconds[0] + 0.01 and seconds[1] < 2, seconds  # quadratic: 16 times


@pytest.mark.parametrize("text", ["a <|im_end|>\n<|im_start|>user\nb", "<|im_end|>", "<|im_end|><|im_end|>", "plain", "a @hidden@ b",
                                  "@response@", "@hidden@<|im_end|>@response@"])
def test_what_looks_like_a_control_token_in_an_observation_stays_text(agent, text):
    tokenizer = agent[1]
    chat, plain = Chat(tokenizer, "rules " + text), Chat(tokenizer, "rules")
    assert chat.text(chat.opening("board")).startswith(f"<|im_start|>system\nrules {text}<|im_end|>\n<|im_start|>user\nboard")
    for made, usual in ((chat.opening(text), plain.opening("plain")), (chat.bridge(text, True), plain.bridge("plain", True))):
        for name in ("<|im_end|>", "<|im_start|>"):
            control = tokenizer.convert_tokens_to_ids(name)
            assert made.count(control) == usual.count(control)
        assert text in tokenizer.decode(made)
    whole = tokenizer.apply_chat_template([{"role": "system", "content": "rules"}, {"role": "user", "content": "plain"}],
                                          tokenize=True, add_generation_prompt=True, return_dict=False)
    assert plain.opening("plain") == whole


def test_a_template_that_prints_the_date_prints_the_same_tomorrow(agent, tmp_path):
    dated = copy.deepcopy(agent[1])
    dated.chat_template = "{%- set today = strftime_now('%d %b %Y') if strftime_now is defined %}{{ today }} " + dated.chat_template
    for part in (agent[0], dated):
        part.save_pretrained(tmp_path)
    tokenizer = load_agent(tmp_path, "cpu")[1]
    chat = Chat(tokenizer, "rules")
    assert chat.render([chat.system]).startswith("01 Jan 2025 <|im_start|>system\nrules")
    tokenizer.save_pretrained(tmp_path)
    assert load_agent(tmp_path, "cpu")[1].chat_template == tokenizer.chat_template
    plain = "\n{{ strftime_now('%-d %B %Y') }} " + agent[1].chat_template
    dated.chat_template = {"default": plain, "tool_use": "x"}
    dated.save_pretrained(tmp_path)
    several = Chat(load_agent(tmp_path, "cpu")[1], "rules")
    assert several.render([several.system]).startswith("\n1 January 2025 <|im_start|>system\nrules")


def test_any_stop_token_ends_a_response_and_the_turn_is_closed_as_the_template_does(agent):
    _, tokenizer, make_env = agent
    other = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    transcript = Transcript(Chat(tokenizer, "rules", {other}), make_env(), 0, 10**6, 100)
    answer = tokenizer("<think>x</think><answer>Up</answer>").input_ids + [other]
    before = len(transcript.ids)
    assert transcript.respond(answer) and transcript.valid == [True]
    assert transcript.turn_ids[before:before + len(answer)] == [0] * len(answer)
    after = transcript.ids[before + len(answer):]
    assert after[0] == tokenizer.eos_token_id and transcript.turn_ids[before + len(answer)] == -1


def pre_tokenizers_bytes():
    """Byte -> character of the byte-level alphabet (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(rest)}


def test_a_template_that_rewrites_history_does_not_change_recorded_ids(agent):
    """Qwen3's template drops the reasoning of earlier turns; the recorded ids must keep it."""
    _, tokenizer, make_env = agent
    dropping = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        chat_template=taught.CHAT_TEMPLATE.replace("message['content']", "(message['content'].split('</think>')[-1] if "
                                                     "message['role'] == 'assistant' else message['content'])"))
    transcript = Transcript(Chat(dropping, "rules"), make_env(), 0, 10**6, 100)
    answer = dropping("<think>The box.</think><answer>Up</answer>").input_ids + [dropping.eos_token_id]
    before = list(transcript.ids)
    assert transcript.respond(answer)
    assert transcript.ids[: len(before) + len(answer)] == before + answer
    assert dropping.decode(transcript.ids[len(before) + len(answer):]).startswith("\n<|im_start|>user\nReward:")


# The built-in agent


def test_tiny_tokenizer_gives_back_any_text(agent):
    tokenizer = agent[1]
    for text in ("The box is above the player.", "naïve 漢字 🙂\t\x00", "#_P_√#\n", "  two  spaces "):
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_tiny_tokenizer_knows_words_cells_and_instructions(agent):
    _, tokenizer, make_env = agent
    env = make_env()
    pieces = lambda text: [tokenizer.decode([i]) for i in tokenizer(text).input_ids]
    assert pieces("The box is") == ["The", " box", " is"] and pieces("#PX#") == ["#", "P", "X", "#"]
    assert len(pieces(env.system_prompt)) == len(pieces(env.format_reminder)) == 1


def test_tiny_agent_is_the_same_for_the_same_seed(agent):
    tokenizer = agent[1]
    one, two, other = (taught.tiny_model(tokenizer, seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("plan_in_think", [0, 1])
@pytest.mark.parametrize("name", environments.ENVS)
def test_demonstrations_are_valid_and_without_noise_they_win(agent, name, plan_in_think):
    rng, env = np.random.default_rng(0), environments.make(name, **({"intended": 1.0} if name == "frozenlake" else {}))
    played = taught.demonstrations(env, agent[1], range(4), rng, 0.0, "", plan_in_think)
    assert played.success.all() and (played.valid == 1).all() and played.seeds.tolist() == [0, 1, 2, 3]
    bad = taught.demonstrations(env, agent[1], range(12), rng, 1.0, "", plan_in_think)
    assert (bad.valid == 1).all() and bad.success.float().mean() < 0.7
    for row in range(4):
        words = agent[1].decode(played.ids[row, played.turn_ids[row] == 0])
        think, answer = words.split("</think><answer>")
        plan = answer.split("</answer>")[0].split(" || ")
        assert think.endswith(f"So I play {' and '.join(plan)}.") == bool(plan_in_think)
        assert played.action_mask[row].any() and not (played.action_mask & ~played.response_mask).any()


@pytest.mark.parametrize("name", environments.ENVS)
def test_the_shipped_agents_know_their_boards_and_read_their_instructions_as_one_token(name):
    settings = Settings(env=name, **DEFAULTS.get(name, {}))
    model, tokenizer = load_agent(settings.agent, "cpu")
    env = settings.make_env()
    assert settings.agent == str(AGENTS / name) and model.dtype == torch.float32 and not model.training
    for phrase in (env.system_prompt, env.format_reminder):
        assert len(tokenizer(phrase).input_ids) == 1
    played = rollout(model, tokenizer, [copy.deepcopy(env) for _ in range(5)], seeds=settings.evaluation_seeds()[:5],
                     temperature=0.5, max_response_tokens=settings.max_response_tokens,
                     generator=torch.Generator().manual_seed(0))
    assert played.valid.mean() > 0.9 and episodes(played)["action_fraction"] < 0.3


def test_an_agent_is_taught_on_the_boards_that_were_asked_for(tmp_path, monkeypatch):
    """In seconds: it hardly knows the game, but can be loaded and played."""
    boards = ["walls=0", "max_turns=2", "max_moves=3"]
    small = "--width 32 --layers 1 --episodes 32 --steps 8 --worse-steps 1 --env-options".split()
    monkeypatch.setattr(sys, "argv", ["agent", "sokoban", "--out", str(tmp_path / "made"), *small, *boards])
    taught.main()
    assert json.loads((tmp_path / "made" / "env.json").read_text()) == {
        "sokoban": {"walls": 0, "max_turns": 2, "max_moves": 3, "response_limit": 100}}
    model, tokenizer = load_agent(str(tmp_path / "made"), "cpu")
    env = Settings(env_options=tuple(boards)).make_env()
    assert model.config.hidden_size == 32 and len(tokenizer(env.system_prompt).input_ids) == 1
    assert len(run((model, tokenizer, lambda: copy.deepcopy(env)), n=2)) == 2


def test_imitation_makes_demonstrated_responses_likelier(agent):
    rng, (model, tokenizer, make_env) = np.random.default_rng(0), agent
    data = taught.demonstrations(make_env(), tokenizer, range(4), rng, 0.0, "answer", "")
    model = copy.deepcopy(model)
    nll = lambda: -score(model, data.ids, data.response_mask).logprobs.sum().item() / int(data.response_mask.sum())
    before = nll()
    taught.imitate(model, data, 15, 1e-2, rng, "", batch=3)
    assert nll() < 0.8 * before


def test_a_response_ends_with_the_tokenizers_token_and_with_the_models_own(agent):
    model, tokenizer, make_env = stopping(agent[0], 0), *agent[1:]
    for eos, more in ((7, {7}), ([7, 9], {7, 9}), (None, set())):
        model.generation_config.eos_token_id = eos
        begun, = sampling.open_transcripts(model, tokenizer, [make_env()], [0], 5)
        assert begun.chat.stop_ids == {tokenizer.eos_token_id, *more}


def test_environments_with_other_rules_are_played_side_by_side_each_with_its_own(agent):
    envs = [agent[2](), environments.make("sudoku")]
    for env, begun in zip(envs, sampling.open_transcripts(*agent[:2], envs, [0, 1], 5)):
        assert env.system_prompt in agent[1].decode(begun.ids)


def test_the_context_is_filled_to_its_last_token_and_not_further(agent, monkeypatch):
    """Its limit is the model's own where none is given."""
    model, tokenizer, make_env = agent
    begin = lambda limit=None: sampling.open_transcripts(model, tokenizer, [make_env()], [0], 5, limit)[0]
    first, second = len(begin().ids), len(scripted(tokenizer, make_env(), 0, ["hm"]).ids)
    for short in (0, 1):
        assert respond(begin(second + 5 - short), tokenizer, "hm") == (not short)
    begin(first + 5)
    monkeypatch.setattr(model.config, "max_position_embeddings", first + 4)
    for limit in (None, first + 4):
        with pytest.raises(ValueError, match="context"):
            begin(limit)
