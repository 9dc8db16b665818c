"""Models of many families, untrained and tiny: each is played and scored as it would be alone, or refused in a line."""

import shutil

import pytest
import torch
from helpers import assert_logprobs_are_those_of_a_plain_forward_pass
from test_rollout import ragged_envs, wordy_envs
from safetensors.torch import save_file
from test_train import RETURNS, batch_of, scripted
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from extras import guard
from rollout import load_agent, rollout, score
from train import AGENTS, Arm, Settings

# Each family knows some of these; sliding windows are short enough to be left.
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8,
         "num_key_value_heads": 2, "max_position_embeddings": 2048, "sliding_window": 16, "bos_token_id": None,
         "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 2048, "n_inner": 48, "rotary_dim": 4, "ffn_dim": 48,
         "word_embed_proj_dim": 32, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2,
         "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "query_pre_attn_scalar": 8,
         "hidden_size_per_layer_input": 8, "d_model": 32, "n_heads": 4, "n_layers": 2, "mlp_ratio": 1.0}
PLAYED = ["arcee", "biogpt", "codegen", "ernie4_5", "exaone4", "falcon", "gemma", "gemma3_text", "glm", "glm4", "gpt2",
          "gpt_bigcode", "gpt_neox", "gptj", "granite", "granitemoe", "helium", "llama", "ministral", "mistral", "mixtral",
          "nemotron", "olmo", "olmo2", "olmo3", "olmoe", "opt", "persimmon", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3",
          "qwen3_moe", "seed_oss", "smollm3", "stablelm", "starcoder2"]
REFUSED = ["bart", "bert-generation", "cohere", "cohere2", "falcon_h1", "jamba", "llama4_text", "nemotron_h", "qwen3_5_text",
           "qwen3_next", "recurrent_gemma", "roberta"]


def tiny(name, tokenizer, **more):
    """A model of the family, or a skip where this version of transformers has none or wants another configuration."""
    if name not in CONFIG_MAPPING:
        pytest.skip(f"no {name} here")
    known = CONFIG_MAPPING[name]().to_dict()
    small = SMALL | {"vocab_size": len(tokenizer), "vocab_size_per_layer_input": len(tokenizer),
                     "pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    if isinstance(known.get("layer_types"), list):
        small["layer_types"] = [known["layer_types"][0], known["layer_types"][-1]]
    names = {*known, *getattr(CONFIG_MAPPING[name], "attribute_map", {})}
    torch.manual_seed(0)
    config = CONFIG_MAPPING[name](**{key: x for key, x in small.items() if key in names} | more)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").float().eval()
    for x in model.parameters():
        if x.dim() > 1:
            torch.nn.init.normal_(x, std=0.2)
    return model


@pytest.fixture(scope="module")
def tokenizer():
    return guard.load_tokenizer(str(AGENTS / "sokoban"))


def play(model, tokenizer, envs):
    return rollout(model, tokenizer, envs, seeds=range(len(envs)), temperature=1.0, max_response_tokens=15,
                   generator=torch.Generator().manual_seed(0))


@pytest.mark.slow
@pytest.mark.parametrize("name", PLAYED)
def test_a_family_is_played_and_scored_as_its_model_does_alone(name, tokenizer):
    model = tiny(name, tokenizer)
    guard.check_agent(model, tokenizer)
    for envs in (ragged_envs(), wordy_envs()):
        played = play(model, tokenizer, envs)
        assert_logprobs_are_those_of_a_plain_forward_pass(model, played, atol=1e-3)
        with torch.no_grad():
            scored = score(model, played.ids, played.response_mask)
        torch.testing.assert_close(scored.logprobs, played.logprobs, atol=1e-3, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_a_family_that_would_be_played_or_scored_wrongly_is_refused_in_a_line(name, tokenizer, tmp_path):
    tiny(name, tokenizer).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError) as refused:
        load_agent(str(tmp_path), "cpu")
    assert str(refused.value).count("\n") == 0 and str(tmp_path) in str(refused.value)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "gemma3_text", "olmo2", "smollm3"])
@pytest.mark.parametrize("algo", ["ppo", "grpo"])
def test_a_family_is_trained(name, algo, tokenizer, tmp_path):
    """In a step the ratio starts at 1, and the gradient moves the policy."""
    tiny(name, tokenizer).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    settings = Settings(model=str(tmp_path), prompts=2, rollouts=3, keep=1.0, max_response_tokens=30, lr=1e-3)
    arm = scripted(Arm(settings, algo, "actfocus", 0), RETURNS)
    before = batch_of(arm, RETURNS).old_logprobs
    metrics = arm.step()
    assert metrics["updates"] == 1 and metrics["ratio_mean"] == pytest.approx(1, abs=1e-4) and metrics["grad_norm"] > 0
    assert (batch_of(arm, RETURNS).old_logprobs - before).abs().max() > 1e-3


@pytest.mark.parametrize("change, words", [
    ({"vocab_size": 100, "pad_token_id": 1, "eos_token_id": 2}, "embedding ends at 99"), ({"attention_dropout": 0.3}, None),
    ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0,
                          "original_max_position_embeddings": 128}, "max_position_embeddings": 4096}, None)])
def test_a_model_that_does_not_fit_its_tokenizer_is_refused_and_noise_is_switched_off(change, words, tokenizer):
    model = tiny("llama", tokenizer, **change)
    if words:
        with pytest.raises(ValueError, match=words):
            guard.check_agent(model, tokenizer)
        return
    guard.check_agent(model, tokenizer)  # in training mode, too, two passes agree
    if "rope_parameters" in change:
        assert model.config.max_position_embeddings == 128  # beyond, a long text would change its batch's log-probs


def test_what_turns_with_the_length_in_some_layers_alone_is_held_to_the_shorter_one(tokenizer):
    plain = {"rope_type": "default", "rope_theta": 10000.0}
    long = plain | {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "factor": 4.0,
                    "original_max_position_embeddings": 700}
    model = tiny("gemma3_text", tokenizer, rope_parameters={"sliding_attention": plain, "full_attention": long})
    guard.check_agent(model, tokenizer)
    assert model.config.max_position_embeddings == 700


def test_weights_that_are_missing_are_not_drawn_at_random(tokenizer, tmp_path):
    model = tiny("llama", tokenizer)
    model.config.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    save_file({name: x.clone() for name, x in model.state_dict().items() if "layers.1" not in name}, tmp_path / "model.safetensors",
              {"format": "pt"})
    with pytest.raises(ValueError, match="9 of its weights are missing") as refused:
        load_agent(str(tmp_path), "cpu")
    assert "\n" not in str(refused.value)


def test_a_tokenizer_that_lost_its_vocabulary_is_refused(tmp_path):
    """Its template still renders, but what the model would read is empty."""
    shutil.copytree(AGENTS / "sokoban", tmp_path, dirs_exist_ok=True)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="cannot use") as refused:
        load_agent(str(tmp_path), "cpu")
    assert "\n" not in str(refused.value)


CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}" \
         "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


@pytest.mark.parametrize("template, words", [
    (CHATML, None),
    (CHATML.replace("for m in messages", "for m in messages if m.role != 'system'"), "system text once"),
    ("{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n{% if loop.last %}{{ messages[0].content }}"
     "{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n", "system text once"),
    (CHATML.split("{% if add")[0], "does not open a response"),
    (CHATML.replace("assistant\n{% endif", "assistant\n<think>\n{% endif"), "opens the reasoning"),
    (CHATML.replace("{{ m.content }}", "{{ m.content }}{% if loop.first %} {{ m.content }}{% endif %}"), "system text once"),
    (CHATML.replace("assistant\n{% endif", "user\n{% endif"), "does not open a response"),
    (CHATML.replace("{% if add", "{% if messages|length < 3 and add"), "open each response alike"),
    (CHATML.replace("{{ m.content }}", "{% if m.role != 'user' or loop.index0 < 2 %}{{ m.content }}{% endif %}"), "open each response alike"),
    (CHATML.replace("{{ m.content }}", "{% if m.role == 'user' %}[{{ loop.index0 }}]{% endif %}{{ m.content }}"), "open each response alike"),
    (CHATML.replace("{{ m.content }}", "{% if m.role == 'assistant' %}<think> So {% endif %}{{ m.content }}")
     .replace("assistant\n{% endif", "assistant\n<think> So {% endif"), "opens the reasoning"),
    (CHATML.replace("{{ m.content }}", "{{ m.content | upper }}"), "does not open a response"),
    ("{{ raise_exception('no system role') }}", "refuses the conversation"), (None, "no chat template")])
def test_the_rendered_conversation_is_looked_at(template, words, tokenizer):
    before, tokenizer.chat_template = tokenizer.chat_template, template
    try:
        if words is None:
            guard.check_template(tokenizer)
        else:
            with pytest.raises(ValueError, match=words):
                guard.check_agent(tiny("llama", tokenizer), tokenizer)
    finally:
        tokenizer.chat_template = before


def scored_otherwise(*arguments):
    stats = score(*arguments)
    return stats._replace(logprobs=stats.logprobs + 0.01)


def sampled_otherwise(*arguments, original=guard.sample_turn):
    return {row: (ids, [x + 0.01 for x in logprobs]) for row, (ids, logprobs) in original(*arguments).items()}


def noisy(model):
    model.model.norm.register_forward_hook(lambda module, _, out: out + 0.1 * torch.randn_like(out) * module.training)


def shifted(model):
    model.model.norm.register_forward_hook(lambda module, _, out: out * (1 + 0.1 * module.training))


def talkative(model):
    model.lm_head = torch.nn.Linear(32, model.config.vocab_size + 3, bias=False)


@pytest.mark.parametrize("change, patched, words", [
    (None, ("score", scored_otherwise), "depend on the others"), (None, ("sample_turn", sampled_otherwise), "key-value cache"),
    (noisy, None, "training mode"), (shifted, None, "training mode"), (talkative, None, "embedding does not know")])
def test_each_way_of_going_wrong_is_named(change, patched, words, tokenizer, monkeypatch):
    model = tiny("llama", tokenizer)
    guard.check_agent(model, tokenizer)
    if change:
        change(model)
    if patched:
        monkeypatch.setattr(guard, *patched)
    with pytest.raises(ValueError, match=words):
        guard.check_agent(model, tokenizer)


def test_the_embedding_may_end_with_the_tokenizers_last_word_and_not_before(tokenizer):
    last = max(tokenizer.get_vocab().values())
    guard.check_agent(tiny("llama", tokenizer, vocab_size=last + 1), tokenizer)
    with pytest.raises(ValueError, match="embedding ends"):
        guard.check_agent(tiny("llama", tokenizer, vocab_size=last), tokenizer)
