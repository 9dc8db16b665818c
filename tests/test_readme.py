"""What the README and results/README.md say is so: links, limits, snippets, tables, defaults, and that files copy out."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import scripted

import actfocus
import train
from extras import agent as teacher
from extras import report
from extras.facts import facts
from rollout import pack, score

ROOT = Path(train.__file__).parent
README, RESULTS = ((ROOT / name).read_text() for name in ("README.md", "results/README.md"))
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def snippet(text):
    found, = [block for block in SNIPPETS if text in block]
    return found


def slugs(text):
    """The anchors of a page's sections."""
    titles = re.findall(r"^#+ (.*)", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^a-z0-9 _-]", "", title.lower()).replace(" ", "-") for title in titles}


# The pages


def test_the_readme_is_short():
    lines = README.splitlines()
    assert len(lines) <= 260
    assert [line for line in lines if len(line) > 120] == []


@pytest.mark.parametrize("page", ["README.md", "results/README.md"])
def test_files_and_sections_that_are_linked_exist(page):
    text, here = (ROOT / page).read_text(), (ROOT / page).parent
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("http")]
    assert len(links) >= 5
    for link in links:
        path, _, section = link.partition("#")
        assert not path or (here / path).exists(), link
        assert not section or section in slugs((here / path).read_text() if path else text), link


def test_files_and_functions_that_the_readme_names_exist():
    for path in re.findall(r"`((?:extras/|results/)?\w+\.(?:py|md|txt))`", README):
        assert (ROOT / path).exists() or path in ("bandit.py", "trl_run.py"), path
    code = "\n".join(path.read_text() for path in [*ROOT.glob("*.py"), *(ROOT / "extras").glob("*.py")])
    for name in re.findall(r"\b(?:Arm|Credit|Chat|Sokoban)\.(\w+)", README):
        assert f"def {name}(" in code, name


def test_every_field_of_the_log_is_explained(tmp_path):
    tiny = train.Settings(algos=("ppo",), prompts=2, rollouts=4, minibatch=4, keep=1.0, max_response_tokens=30, eval_boards=2,
                          eval_rollouts=1)
    arm = train.Arm(tiny, "ppo", "actfocus", 0)
    fields = {**arm.step(), **arm.evaluate()}.keys()
    assert "value_loss" in fields and "eval_fact_accuracy" in fields  # what PPO and an evaluation add
    table = README[README.index("| field |"):README.index("## When something goes wrong")]
    explained = set(re.findall(r"`(\w+)`", table))
    for field in fields - {"eval_board_success"}:
        assert field in explained or field.removeprefix("eval_") in explained, field
    assert {name for name in explained if not name.startswith("eval_")} <= fields


def test_settings_that_the_readme_quotes_are_the_defaults():
    s, words = train.Settings(), " ".join(README.split())
    assert f"alpha = {s.alpha}, beta = {s.beta}" in words
    assert f"clip(rho_t, 1 - {s.clip_low}, 1 + {s.clip_high})" in words
    assert f"{s.prompts} boards, {s.rollouts} rollouts of each" in words
    assert f"{s.steps} steps instead of 200" in words
    assert f"learning rate {s.lr:.0e}".replace("e-0", "e-") in words
    assert f"responses of {s.max_response_tokens} tokens" in words
    assert f"{s.eval_boards} x {s.eval_rollouts} evaluation episodes" in words
    assert s.keep == 0.25 and "the quarter of the groups" in words
    board = s.board_options()
    assert f"{board['min_moves']} to {board['max_moves']} moves, {board['max_turns']} turns" in words and board["walls"] == 0


def test_commands_of_both_pages_are_understood():
    """Every `python train.py ...` parses; what is trained is not looked at."""
    text = re.sub(r"\\\n\s*", "", README + RESULTS)
    commands = re.findall(r"python train\.py((?: [^\s`#&)]+)*)", text)
    assert len(commands) > 15
    for command in commands:
        arguments = [word for word in command.split() if "mine:" not in word and word != "--resume"]
        for option in ("--model", "--env"):  # an agent, or an environment, that is not at hand
            if option in arguments and arguments[arguments.index(option) + 1] not in ("sudoku", "frozenlake", "shop"):
                del arguments[arguments.index(option):arguments.index(option) + 2]
        train.extra("options").SettingsParser("train.py").parse_settings(arguments)


# The tables


def test_the_tables_are_those_of_the_results():
    """Every number in them: `python -m extras.report --write` makes them anew."""
    assert RESULTS.count("<!-- table: ") == 14
    assert report.filled(RESULTS) == RESULTS


def test_a_number_that_was_changed_by_hand_is_put_right():
    row = next(line for line in RESULTS.splitlines() if line.startswith("| PPO, ActFocus | 21.5"))
    start, end = RESULTS.index("<!-- table: main -->"), RESULTS.index("## Four times the updates")
    table = RESULTS[start:end]
    wrong = table.replace(row, row.replace("44.2", "99.9"))
    assert wrong != table and report.filled(wrong) == table


def test_the_main_table_holds_the_mean_final_success_of_every_arm():
    summary = json.loads((ROOT / "results" / "main" / "summary.json").read_text())
    finals = {}
    for arm in summary["arms"]:
        finals.setdefault((arm["algo"], arm["credit"]), []).append(arm["final_success"])
    assert len(finals) == 4
    for (algo, credit), values in finals.items():
        row, = [line for line in RESULTS.splitlines()
                if line.startswith(f"| {algo.upper()}, {credit.replace('actfocus', 'ActFocus')} |") and line.count("|") == 11]
        assert len(values) == 5 and f"| {100 * np.mean(values):.1f} (" in row


# The snippets


def test_worked_examples_print_what_the_readme_says(capsys):
    example = snippet("print(token_weights(")
    exec(example, {})
    expected = re.findall(r"^# (tensor.*|\s+\[.*)$", example, re.MULTILINE)
    assert len(expected) == 5 and capsys.readouterr().out.splitlines() == expected


@pytest.fixture(scope="module")
def copied():
    """What the loop that is to be copied has made of four trajectories, in two groups, of two turns each."""
    model, tokenizer = train.load_agent(train.Settings().agent, "cpu")
    env = train.Settings().make_env()
    played = []
    for i, act in enumerate((["Up"], ["Left", "Up"], ["Down"], ["Right"])):
        transcript = scripted(tokenizer, env, i // 2, [f"<think>{i}</think><answer>{' || '.join(act)}</answer>", "<answer>Up"])
        turn, parts = -2, []
        for token, of_turn in zip(transcript.ids, transcript.turn_ids):
            if of_turn != turn:
                parts.append(([], of_turn >= 0))
            parts[-1][0].append(token)
            turn = of_turn
        played.append((transcript, parts))
    before = {name: x.clone() for name, x in model.state_dict().items()}
    torch.manual_seed(0)
    names = {"policy": model, "reference": train.copy.deepcopy(model), "tokenizer": tokenizer,
             "trajectories": [parts for _, parts in played], "returns": torch.tensor([[1.0, 0.0], [0.5, 2.0]]),
             "optimizer": torch.optim.Adam(model.parameters(), 1e-3)}
    exec(snippet("actions = action_mask("), names)
    return names | {"transcripts": [transcript for transcript, _ in played], "before": before}


def test_the_copied_loop_finds_the_masks_and_updates(copied):
    for row, transcript in enumerate(copied["transcripts"]):
        n = len(transcript.ids)
        assert copied["ids"][row, :n].tolist() == transcript.ids
        assert torch.equal(copied["actions"][row, :n], pack([transcript]).action_mask[0]) and copied["actions"][row].any()
        assert copied["response_mask"][row].tolist()[:n] == [turn >= 0 for turn in transcript.turn_ids]
        assert not copied["response_mask"][row, n:].any()
    assert any(not torch.equal(x, copied["before"][name]) for name, x in copied["policy"].state_dict().items())
    assert torch.isfinite(copied["loss"]) and copied["stats"]["ratio_mean"] == pytest.approx(1, abs=1e-4)


def test_the_copied_loop_scores_as_kernels_does(copied):
    """Log-probs and energies of the loop, of the three lines for token_stats, and of rollout.score."""
    stats = score(copied["reference"], copied["ids"], copied["response_mask"])
    mask = copied["response_mask"]
    torch.testing.assert_close(copied["energy"][mask[:, 1:]], -stats.logsumexp[mask], atol=1e-4, rtol=0)
    torch.testing.assert_close(copied["old_logprobs"][mask[:, 1:]], stats.logprobs[mask], atol=1e-4, rtol=0)
    names = {**copied, "policy": copied["reference"]}
    exec(snippet("def states("), names)
    expected, _ = actfocus.weighted_policy_loss(stats.logprobs[:, 1:], stats.logprobs[:, 1:], copied["advantages"],
                                                copied["weights"])
    torch.testing.assert_close(names["loss"], expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(names["old"], stats.logprobs[mask], atol=1e-4, rtol=0)
    torch.testing.assert_close(names["energy"], torch.where(mask, -stats.logsumexp, 0.0)[:, 1:], atol=1e-4, rtol=0)


def test_a_credit_of_ones_own_is_trained(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(snippet("class LastTurn("))
    monkeypatch.syspath_prepend(tmp_path)
    names = ("uniform", "mine:LastTurn", "mine:LastTurn:alpha=0.3")
    settings = train.Settings(algos=("grpo",), credits=names, prompts=2, rollouts=4, minibatch=8, keep=1.0)
    arm, seen = train.Arm(settings, "grpo", names[2], 0), []
    monkeypatch.setattr(arm, "gradient", lambda batch: seen.append(batch) or train.Arm.gradient(arm, batch))
    assert arm.step()["updates"] == 1
    batch, = seen
    last = batch.turn_ids == batch.turns[:, None] - 1
    assert (batch.turns > 1).any()
    assert (batch.weights[batch.response_mask & ~last] == torch.tensor(0.3)).all()
    assert (batch.weights[batch.action_mask & last] > 1).all() and (batch.weights[~batch.response_mask] == 0).all()


@pytest.fixture
def bandit(tmp_path, monkeypatch):
    """The directory that holds the README's bandit.py, from which it can be imported."""
    (tmp_path / "bandit.py").write_text(snippet("class Bandit("))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "bandit", raising=False)
    return tmp_path


def test_the_bandit_is_an_environment_and_trains(bandit, monkeypatch):
    """It has a floor below its ceiling, an agent is taught to play it, and its first two steps make updates."""
    env = train.Settings(env="bandit:Bandit").make_env()
    assert 0.2 < report.random_floor(env, range(20)) < 0.6 < 1 == report.mean_ceiling(env, range(20))
    env.reset(seed=0)
    *_, info = env.step(teacher.demonstration(env, np.random.default_rng(0), noise=0.0))
    assert info["valid"] and len(set(info["actions"])) == 1 and facts(env) == []
    assert len({env.reset(seed=seed)[0] for seed in range(5)}) == 1  # the first observation says nothing of the instance

    out = bandit / "agent"
    monkeypatch.setattr(sys, "argv", ["agent", "bandit:Bandit", "--out", str(out), "--episodes", "60", "--steps", "90",
                                      "--worse-steps", "0", "--layers", "1"])
    teacher.main()
    settings = train.Settings(env="bandit:Bandit", model=str(out), algos=("grpo",), prompts=2, rollouts=8, max_response_tokens=40)
    arm = train.Arm(settings, "grpo", "actfocus", 0)
    assert [arm.step()["updates"] > 0 for _ in range(2)] == [True, True]


@pytest.mark.slow
def test_the_bandits_commands_run(bandit):
    def run(*arguments):
        result = subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=300,
                                env={**os.environ, "PYTHONPATH": str(bandit)})
        assert result.returncode == 0, result.stderr
    run("-m", "extras.agent", "bandit:Bandit", "--out", bandit / "agent", "--episodes", 60, "--steps", 20, "--worse-steps", 0)
    run("train.py", "--env", "bandit:Bandit", "--model", bandit / "agent", "--algos", "grpo", "--steps", 2, "--prompts", 2,
        "--rollouts", 8, "--eval-boards", 4, "--eval-rollouts", 2, "--out", bandit / "run")
    assert len((bandit / "run" / "metrics.jsonl").read_text().splitlines()) == 6


# The files


@pytest.mark.parametrize("name", ["actfocus", "kernels"])
def test_a_copied_file_works_alone(name, tmp_path):
    """In an empty directory, with nothing of this project in reach and torch as the only third-party import."""
    shutil.copy(ROOT / f"{name}.py", tmp_path)
    use = {"actfocus": "actfocus.token_weights(torch.zeros(1, 2), m, m)",
           "kernels": "kernels.token_stats(torch.zeros(2, 3), torch.zeros(4, 3), torch.zeros(2, dtype=torch.long))"}[name]
    code = (f"import sys, torch; before = set(sys.modules); import {name}; m = torch.ones(1, 2, dtype=torch.bool); {use}; "
            f"new = {{n.split('.')[0] for n in set(sys.modules) - before}} - set(sys.stdlib_module_names); "
            f"assert new <= {{'{name}', 'torch'}}, new")
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_the_snippet_for_trl_trains(tmp_path):
    pytest.importorskip("trl")
    code = snippet("ActFocusTrainer(model=model").replace("runs/trl", str(tmp_path)).replace("max_steps=20", "max_steps=1, logging_steps=1")
    (tmp_path / "mine.py").write_text(code)
    done = subprocess.run([sys.executable, tmp_path / "mine.py"], cwd=tmp_path, capture_output=True, text=True, timeout=200,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0 and "success" in done.stdout and "actfocus/action_weight" in done.stdout, done.stderr[-2000:]
