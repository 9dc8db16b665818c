"""Multi-turn sampling: what is recorded is what the model saw, and spans are where the tags are."""

import copy
import inspect

import pytest
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

import env as environments
import rollout as sampling
from rollout import Chat, Transcript, rollout


def run(agent, n=6, temperature=1.0, seed=0, max_response_tokens=25, envs=None, **options):
    model, tokenizer, make_env = agent
    return rollout(model, tokenizer, envs or [make_env() for _ in range(n)], seeds=range(n), temperature=temperature,
                   max_response_tokens=max_response_tokens, generator=torch.Generator().manual_seed(seed), **options)


class Scripted(environments.Sokoban):
    """Ends after a number of turns that depends on the seed, so that rows leave the batch one by one."""

    def reset(self, *, seed=None, options=None):
        result = super().reset(seed=seed)
        self.max_turns = 1 + seed % 4
        return result


def ragged_envs():
    return [Scripted(walls=0, max_moves=2, observation="both") for _ in range(6)]


@pytest.fixture(scope="module")
def ragged(agent):
    return run(agent, envs=ragged_envs())


def assert_logprobs_are_those_of_a_plain_forward_pass(model, played, atol=2e-5):
    for row, n in enumerate(played.lengths.tolist()):
        ids, mask = played.ids[row, :n], played.response_mask[row, 1:n]
        with torch.no_grad():
            logprobs = torch.log_softmax(model(ids[None]).logits[0, :-1].float(), -1).gather(-1, ids[1:, None])[:, 0]
        torch.testing.assert_close(played.logprobs[row, 1:n][mask], logprobs[mask], atol=atol, rtol=0)
        assert not played.logprobs[row, 1:n][~mask].any()


def test_sampled_logprobs_are_those_of_one_plain_forward_pass(agent, ragged):
    """The cache over several turns, the padding columns and the shrinking batch change nothing."""
    assert ragged.turns.tolist() == [1, 2, 3, 4, 1, 2]
    assert_logprobs_are_those_of_a_plain_forward_pass(agent[0], ragged)


class Counting(torch.nn.Module):
    """A model that notes the [rows, columns] of every call."""

    def __init__(self, model):
        super().__init__()
        self.model, self.calls, self.config, self.generation_config = model, [], model.config, model.generation_config
        self.device, self.set_attn_implementation = model.device, model.set_attn_implementation

    def forward(self, input_ids, attention_mask, position_ids, use_cache, logits_to_keep, cache=None, past_key_values=None):
        self.calls.append(tuple(input_ids.shape))
        name = "cache" if "cache" in inspect.signature(self.model.forward).parameters else "past_key_values"
        return self.model(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=use_cache,
                          logits_to_keep=logits_to_keep, **{name: cache if past_key_values is None else past_key_values})


def test_a_rollouts_work_grows_linearly_with_turns(agent):
    """Each turn feeds its own tokens, whatever came before: the columns of turn 8 are those of turn 2."""
    model, tokenizer, _ = agent
    counting = Counting(model)
    made = [environments.make("sokoban", walls=0, max_moves=2, observation="both", max_turns=8, max_actions=16) for _ in range(3)]
    played = rollout(counting, tokenizer, made, seeds=[1, 2, 3], temperature=1.0, max_response_tokens=5,
                     generator=torch.Generator().manual_seed(0))
    assert played.turns.tolist() == [8, 8, 8]
    prompts = [columns for _, columns in counting.calls if columns > 1]
    assert len(prompts) == 8 and max(prompts[1:]) <= min(prompts[1:]) + 5
    fed = sum(rows * columns for rows, columns in counting.calls)
    assert fed <= 1.1 * int(played.lengths.sum()) + 8 * 3 * 5  # each token once, and some padding


def test_rows_that_are_done_leave_the_batch(agent):
    """Seven rows end their responses at once, one goes on: its tokens are decoded alone."""
    model, tokenizer, make_env = agent
    sampler = sampling.Sampler(model, tokenizer, 1.0, 20, torch.Generator().manual_seed(0))
    transcripts = sampler.open([make_env() for _ in range(8)], range(8))
    counting, stop = Counting(model), tokenizer.eos_token_id

    def scripted(logits, temperature, generator):
        tokens = torch.full((len(logits),), stop)
        tokens[0 if len(logits) == 1 else 5] = tokenizer.convert_tokens_to_ids("The")
        return tokens, torch.zeros(len(logits))
    decoder = sampling.Decoder(counting, 8)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(sampling, "sample", scripted)
        responses = sampling.sample_turn(decoder, [t.ids for t in transcripts], {stop}, 0, 1.0, 20, None)
    assert [rows for rows, _ in counting.calls] == [8] + [1] * 19
    assert {row: len(ids) for row, (ids, _) in responses.items()} == {row: 20 if row == 5 else 1 for row in range(8)}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kinds", [["full_attention"] * 2, ["sliding_attention"] * 2, ["full_attention", "sliding_attention"]])
def test_layers_of_any_kind_see_in_the_cache_what_they_see_without_one(agent, kinds, attention):
    """A window counts tokens of the row, whatever padding lies between them in the cache."""
    tokenizer = agent[1]
    config = Qwen2Config(**sampling.tiny_model(tokenizer).config.to_dict() | {
        "use_sliding_window": True, "sliding_window": 7, "layer_types": kinds})
    torch.manual_seed(0)
    model = Qwen2ForCausalLM._from_config(config, attn_implementation=attention).eval()
    assert_logprobs_are_those_of_a_plain_forward_pass(model, run((model, tokenizer, None), envs=ragged_envs()))
    assert model.config._attn_implementation == attention


class Rehearsal:
    """A captured step as it would be on a GPU: it has its own inputs and output, and reads and writes the memory of when it was made."""

    made, replays, error, wrong, proved = 0, 0, None, 0.0, False

    def __init__(self, function, inputs):
        if Rehearsal.error:
            raise RuntimeError(Rehearsal.error)
        self.function, self.inputs = function, [x.clone() for x in inputs]
        self.memory, self.output = self.addresses(), function(*self.inputs)
        Rehearsal.made += 1

    def addresses(self):
        decoder = self.function.__self__
        return [decoder.held.data_ptr(), *(store.data_ptr() for layer in decoder.cache.layers for store in layer.stores)]

    def __call__(self, *inputs):
        assert self.addresses() == self.memory
        for own, new in zip(self.inputs, inputs):
            own.copy_(new)
        Rehearsal.replays += 1
        return self.output.copy_(self.function(*self.inputs) + Rehearsal.wrong)


@pytest.fixture
def rehearsal(monkeypatch):
    class Capturing(sampling.Decoder):
        def __init__(self, model, rows):
            super().__init__(model, rows)
            self.captures = True
    for name, value in {"made": 0, "replays": 0, "error": None, "wrong": 0.0}.items():
        monkeypatch.setattr(Rehearsal, name, value)
    monkeypatch.setattr(sampling, "Captured", Rehearsal)
    monkeypatch.setattr(sampling, "Decoder", Capturing)
    return Rehearsal


@pytest.mark.parametrize("half, atol", [(False, 2e-5), (True, 0.08)])
def test_captured_decode_steps_give_the_models_logprobs(agent, rehearsal, recwarn, half, atol):
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        assert_logprobs_are_those_of_a_plain_forward_pass(agent[0], run(agent, envs=ragged_envs()), atol)
    assert rehearsal.replays > 10 * rehearsal.made > 0 and not recwarn.list


@pytest.mark.parametrize("problem", [{"error": "operation not permitted when stream is capturing"}, {"wrong": 1.0}])
def test_a_graph_that_fails_or_is_wrong_is_named_and_not_used(agent, rehearsal, problem):
    for name, value in problem.items():
        setattr(rehearsal, name, value)
    with pytest.warns(UserWarning, match="cannot be captured"):
        played = run(agent, envs=ragged_envs())
    assert_logprobs_are_those_of_a_plain_forward_pass(agent[0], played)
    assert rehearsal.replays <= 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_decode_steps_are_captured_and_give_the_models_logprobs(agent, recwarn, monkeypatch):
    replays = []
    call = sampling.Captured.__call__
    monkeypatch.setattr(sampling.Captured, "__call__", lambda self, *inputs: replays.append(1) or call(self, *inputs))
    model, tokenizer, _ = agent
    model = copy.deepcopy(model).cuda()
    played = rollout(model, tokenizer, ragged_envs(), seeds=range(6), temperature=1.0, max_response_tokens=25,
                     generator=torch.Generator("cuda").manual_seed(0))
    assert len(replays) > 50 and not recwarn.list
    assert_logprobs_are_those_of_a_plain_forward_pass(model.cpu(), played, atol=1e-3)


@pytest.mark.parametrize("heads, shared", [(4, 4), (4, 2), (4, 1)])
def test_decode_attention_is_sdpas(heads, shared):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(3, n, t, 8, generator=generator) for n, t in ((heads, 1), (shared, 70), (shared, 70)))
    mask = torch.rand(3, 1, 1, 70, generator=generator) < 0.7
    ours, _ = sampling.decode_attention(None, query, key, value, mask, scaling=0.3)
    repeat = lambda x: x.repeat_interleave(heads // shared, 1)
    theirs = torch.nn.functional.scaled_dot_product_attention(query, repeat(key), repeat(value), mask, scale=0.3)
    torch.testing.assert_close(ours, theirs.transpose(1, 2), atol=1e-6, rtol=1e-5)


def test_sampling_leaves_the_model_as_it_was(agent):
    model = agent[0]
    model.train()
    run(agent, n=1)
    assert model.training and model.config._attn_implementation == "sdpa"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(FloatingPointError):  # in the middle of a rollout, too
        patch.setattr(sampling.Decoder, "logits", lambda self, ids, *_: torch.full((len(ids), 9), torch.nan))
        run(agent, n=1)
    assert model.training and model.config._attn_implementation == "sdpa"
    model.eval()


def test_temperature_is_applied_to_the_recorded_logprobs(agent):
    model = agent[0]
    cool = run(agent, n=2, temperature=0.5)
    n = cool.lengths[0]
    with torch.no_grad():
        logprobs = torch.log_softmax(model(cool.ids[:1, :n]).logits[0, :-1] / 0.5, -1).gather(-1, cool.ids[0, 1:n, None])[:, 0]
    mask = cool.response_mask[0, 1:n]
    torch.testing.assert_close(cool.logprobs[0, 1:n][mask], logprobs[mask], atol=2e-5, rtol=0)


def test_a_trajectory_reads_as_the_chat_template_writes_it(agent, ragged):
    """Decoding the ids gives the template's own text of the same conversation."""
    _, tokenizer, _ = agent
    for row in range(6):
        env = Scripted(walls=0, max_moves=2, observation="both")
        messages = [{"role": "system", "content": env.system_prompt}, {"role": "user", "content": env.reset(seed=row)[0]}]
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
    assert torch.equal(ragged.response_mask, ragged.turn_ids >= 0) and not (ragged.action_mask & ~ragged.response_mask).any()


def test_selecting_rows_drops_their_needless_padding(ragged):
    part = ragged.select(torch.tensor([0, 4]))
    assert len(part) == 2 and part.ids.shape[1] == part.lengths.max() < ragged.ids.shape[1]
    assert torch.equal(part.ids[0], ragged.ids[0, : part.ids.shape[1]])


def test_an_episode_ends_where_the_next_turn_might_not_fit(agent):
    long = run(agent, n=2)
    limit = int(long.lengths.min()) - 5
    short = run(agent, n=2, max_context=limit)
    assert (short.lengths <= limit).all() and (short.turns < long.turns).all()
    with pytest.raises(ValueError, match="context"):
        run(agent, n=2, max_context=30)


@pytest.mark.parametrize("change", [{"temperature": 0.0}, {"max_response_tokens": 0}, {"n": 0, "envs": [1]}])
def test_bad_arguments_are_refused(agent, change):
    with pytest.raises(ValueError):
        run(agent, **change)


@pytest.mark.parametrize("template", [None, "{{ raise_exception('System role not supported') }}"])
def test_a_tokenizer_that_cannot_chat_is_refused(agent, template):
    other = PreTrainedTokenizerFast(tokenizer_object=agent[1].backend_tokenizer, eos_token="<|im_end|>", chat_template=template)
    with pytest.raises(ValueError, match="chat template"):
        Chat(other, "").opening("")


# Spans


def bpe(merged):
    """A byte-level tokenizer in which the given strings are single tokens, tags not among them unless named."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words = [byte_level.pre_tokenize_str(text)[0][0] for text in merged]
    tokenizer = Tokenizer(models.BPE({w: i for i, w in enumerate(alphabet + words)}, [], ignore_merges=True))
    pattern = "|".join(sorted(map(lambda w: "".join("\\" + c if c in "|.()" else c for c in w), merged), key=len, reverse=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(pattern + r"|[\s\S]" if merged else r"[\s\S]"), "isolated"), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|im_end|>")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>",
                                   chat_template=sampling.CHAT_TEMPLATE)


@pytest.mark.parametrize("merged", [[], [">Up", "Up<"], ["><", ">U", "p</"], ["answer>Up || Left</answer"], ["> ", " Up"]])
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
    assert Chat(tokenizer, "").actions(ids) == expected


def test_a_token_without_text_is_no_action_token():
    class Silent:  # models pad their vocabulary: ids beyond the tokenizer's decode to nothing
        chat_template, eos_token_id, table = "x", 0, {1: "<answer>", 2: "Up", 3: "</answer>", 9: ""}

        def decode(self, ids, **options):
            return "".join(self.table[i] for i in ids)
    assert Chat(Silent(), "").actions([9, 1, 9, 2, 9, 3, 9]) == [False, False, False, True, False, False, False]


def test_any_stop_token_ends_a_response_and_the_turn_is_closed_as_the_template_does(agent):
    _, tokenizer, make_env = agent
    other = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    transcript = Transcript(Chat(tokenizer, "rules", {other}), make_env(), 0, 10**6, 100)
    answer = tokenizer("<think>x</think><answer>Up</answer>").input_ids + [other]
    before = len(transcript.ids)
    assert transcript.respond(answer) and transcript.valid == [True]
    assert transcript.turn[before:before + len(answer)] == [0] * len(answer)
    after = transcript.ids[before + len(answer):]
    assert after[0] == tokenizer.eos_token_id and transcript.turn[before + len(answer)] == -1


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
        chat_template=sampling.CHAT_TEMPLATE.replace("message['content']", "(message['content'].split('</think>')[-1] if "
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
    one, two, other = (sampling.tiny_model(tokenizer, seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)
