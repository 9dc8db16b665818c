import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # a test that needs the network is a broken test
os.environ.setdefault("OMP_NUM_THREADS", "1")  # here and in the processes that tests start: sums are rounded alike
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pytest  # noqa: E402
import torch  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: E402
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM  # noqa: E402

import env as environments  # noqa: E402
from extras.agent import tiny_model, tiny_tokenizer  # noqa: E402
from extras.facts import facts  # noqa: E402


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the slow tests, too (`--slow -m slow`: them alone)")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes long; run with --slow only")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))


@pytest.fixture
def randn():
    """Seeded float64 normal tensors: randn(2, 3)."""
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


QWEN_TEMPLATE = (  # Qwen2.5's, as far as a chat without tools goes: without a system message, it adds one of its own
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


@pytest.fixture(scope="session")
def instruct_model(tmp_path_factory):
    """Directory of an untrained Qwen2 chat model with a trained byte-level BPE tokenizer, as if downloaded."""
    texts = []
    for name in environments.ENVS:
        env = environments.make(name)
        answer = environments.response(["Up"], "x")
        texts += [env.system_prompt] + [env.reset(seed=seed)[0] + answer for seed in range(20)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=600, special_tokens=special,
                                                             initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>",
                                        chat_template=QWEN_TEMPLATE, clean_up_tokenization_spaces=False)
    config = Qwen2Config(vocab_size=len(tokenizer) + 8, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=4096,
                         tie_word_embeddings=True, attention_dropout=0.1, eos_token_id=tokenizer.eos_token_id,
                         pad_token_id=tokenizer.pad_token_id)
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("instruct")
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def agent():
    """An untrained built-in agent for small Sokoban boards: (model, tokenizer, make_env)."""
    def make_env():
        return environments.make("sokoban", walls=0, min_moves=2, max_moves=6, max_turns=3, observation="coordinates")
    env = make_env()
    observation, _ = env.reset(seed=0)
    texts = ["system", "user", "assistant", observation, environments.response(env.actions, " ".join(facts(env)))]
    tokenizer = tiny_tokenizer(texts, phrases=[env.system_prompt, env.format_reminder])
    return tiny_model(tokenizer), tokenizer, make_env
