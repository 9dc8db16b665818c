"""What the README says is so: its links, its snippets, its defaults, and that the method's files stand alone."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import env as environments
import train
from rollout import demonstration

ROOT = Path(train.__file__).parent
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_links_point_at_the_functions_they_name():
    links = re.findall(r"\[`(\w+)`\]\((\w+\.py)#L(\d+)\)", README)
    assert len(links) >= 6
    for name, file, line in links:
        text = (ROOT / file).read_text().splitlines()[int(line) - 1]
        assert re.match(rf"(def|class) {name}\b", text), f"{file}:{line} is {text!r}, not {name}"


def test_sections_that_are_linked_exist():
    slug = lambda title: re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-")
    titles = {slug(title) for title in re.findall(r"^#+ (.*)", re.sub(r"```.*?```", "", README, flags=re.DOTALL), re.MULTILINE)}
    linked = set(re.findall(r"\]\(#([^)]*)\)", README))
    assert len(linked) > 10 and linked <= titles


def test_files_that_are_named_exist():
    for path in re.findall(r"\]\((\w[\w./]*)\)", README):
        assert (ROOT / path).exists(), path


def test_the_environment_snippet_runs():
    snippet = next(s for s in SNIPPETS if "env.step(text)" in s)
    names = {}
    exec(snippet, names)
    assert names["reward"] == pytest.approx(-0.2, abs=1.2) and names["info"]["valid"]


def test_the_bandit_is_an_environment(monkeypatch):
    """The README's example plays, has a floor below its ceiling, and demonstrations can be made from it."""
    monkeypatch.setattr(environments, "ENVS", dict(environments.ENVS))
    exec(next(s for s in SNIPPETS if "class Bandit" in s), {})
    env = environments.make("bandit")
    floor, ceiling = environments.random_floor(env, range(20)), environments.mean_ceiling(env, range(20))
    assert 0.5 < floor < 1 == ceiling
    env.reset(seed=0)
    rng = np.random.default_rng(0)
    *_, info = env.step(demonstration(env, rng, noise=0.0))
    assert info["valid"] and len(set(info["actions"])) == 1


@pytest.mark.parametrize("function", ["token_weights", "group_advantages", "gae"])
def test_worked_examples_print_what_the_readme_says(function, capsys):
    snippet, = [s for s in SNIPPETS if "print(" in s and f"from actfocus import {function}" in s]
    exec(snippet, {})
    expected = re.findall(r"^# (tensor.*|\s+\[.*)$", snippet, re.MULTILINE)
    assert expected and capsys.readouterr().out.splitlines() == expected


def test_the_tables_are_those_of_the_results():
    """Every number in them: `python results/report.py --write` makes them anew."""
    spec = importlib.util.spec_from_file_location("report", ROOT / "results" / "report.py")
    report = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(report)
    assert README.count("<!-- table: ") >= 5 and report.filled(README) == README


def test_the_main_table_holds_the_mean_final_success_of_every_arm():
    summary = json.loads((ROOT / "results" / "main" / "summary.json").read_text())
    finals = {}
    for arm in summary["arms"]:
        finals.setdefault((arm["algo"], arm["credit"]), []).append(arm["final_success"])
    assert len(finals) == 4
    for (algo, credit), values in finals.items():
        row, = [line for line in README.splitlines()
                if line.startswith(f"| {algo.upper()}, {credit.replace('actfocus', 'ActFocus')} |") and line.count("|") == 10]
        assert len(values) == 5 and f"| {100 * np.mean(values):.1f} (" in row


def test_the_lifting_snippet_runs():
    snippet = next(s for s in SNIPPETS if "ref_logits" in s)
    torch.manual_seed(0)
    response_mask = torch.tensor([[False, True, True, True, True]] * 2)
    names = {"ids": torch.randint(7, (2, 5)), "response_mask": response_mask, "ref_logits": torch.randn(2, 5, 7),
             "action_mask": torch.tensor([[False, False, False, True, True]] * 2),
             "logits": torch.randn(2, 5, 7, requires_grad=True), "old_logprobs": torch.full((2, 4), -2.0),
             "advantages": torch.tensor([[1.0], [-1.0]]).expand(2, 4), "minibatch_weight_sum": None}
    exec(snippet, names)
    assert torch.isfinite(names["loss"]) and names["logits"].grad[:, :4].abs().sum() > 0


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


def test_settings_that_the_readme_quotes_are_the_defaults():
    settings = train.Settings()
    assert f"`alpha = {settings.alpha}`, `beta = {settings.beta}`" in README
    assert f"learning rate {settings.lr:.0e}".replace("e-0", "e-") in README
    assert f"{settings.steps} steps instead of 200" in README
    assert f"{settings.eval_boards} x {settings.eval_rollouts}\n  evaluation episodes" in README
