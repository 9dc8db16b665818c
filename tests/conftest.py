import os
import sys
from pathlib import Path

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # a test that needs the network is a broken test
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import env as environments  # noqa: E402
import rollout as sampling  # noqa: E402


@pytest.fixture
def randn():
    """Seeded float64 normal tensors: randn(2, 3)."""
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.fixture(scope="session")
def agent():
    """An untrained built-in agent for small Sokoban boards: (model, tokenizer, make_env)."""
    def make_env():
        return environments.make("sokoban", walls=0, min_moves=2, max_moves=6, max_turns=3, observation="coordinates")
    env = make_env()
    observation, _ = env.reset(seed=0)
    texts = ["system", "user", "assistant", observation, environments.response(env.actions, " ".join(env.facts()))]
    tokenizer = sampling.tiny_tokenizer(texts, phrases=[env.system_prompt, env.format_reminder])
    return sampling.tiny_model(tokenizer), tokenizer, make_env
