"""CARL and A2TGPO: trees worked by hand, naive references, finite differences, and what is recorded for them."""

import copy
import itertools
import math
import random
import statistics
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import assert_logprobs_are_those_of_a_plain_forward_pass, respond, scripted

import env as environments
from actfocus import group_advantages, token_weights, weighted_policy_loss
from extras import rivals
from extras.agent import demonstration
from extras.options import make_credit
from extras.rivals import (
    SCAFFOLD,
    Branch,
    Carl,
    Probed,
    Tree,
    beliefs,
    tree_advantages,
    tree_rollout,
    turn_clip_scale,
    turn_gain_advantages,
    turn_logprobs,
)
from rollout import Transcript, load_agent, pack
from train import AGENTS, DEFAULTS, Arm, Settings

NAN = float("nan")


def tree(*edges):
    """Advantages of (parent, return or None) pairs."""
    parents, returns = zip(*edges)
    returns = torch.tensor([NAN if r is None else r for r in returns], dtype=torch.float64)
    return tree_advantages(torch.tensor(parents), returns)


# CARL: values


def test_a_tree_of_depth_3_worked_by_hand():
    #                root: edges 0 and 5; after 0: 1 and 3; after 1: 2 and 4
    advantages = tree((-1, None), (0, None), (1, 1.0), (0, 4.0), (1, 3.0), (-1, 0.0))
    # V: leaves 1 4 3 0; after 1: (1 + 3) / 2 = 2; after 0: (2 + 4) / 2 = 3; root: (3 + 0) / 2 = 1.5
    assert advantages.tolist() == [1.5, -1.0, -1.0, 1.0, 1.0, -1.5] and advantages.dtype == torch.float32


def test_equal_responses_count_as_often_as_they_were_sampled():
    """Three responses to one end and one to another: the mean is over samples, not over distinct ends."""
    assert tree((-1, 1.0), (-1, 1.0), (-1, 1.0), (-1, -3.0)).tolist() == [1.0, 1.0, 1.0, -3.0]


def test_a_lone_chain_has_nothing_to_credit():
    assert tree((-1, None), (0, None), (1, 7.0)).tolist() == [0.0, 0.0, 0.0]
    assert tree_advantages(torch.zeros(0, dtype=torch.long), torch.zeros(0)).tolist() == []
    assert tree_advantages([], []).tolist() == []


def naive_tree(parents, returns):
    def value(e):
        children = [c for c, up in enumerate(parents) if up == e]
        return returns[e] if not children else sum(map(value, children)) / len(children)
    return [value(e) - value(up) for e, up in enumerate(parents)]


def test_random_trees_against_a_recursive_reference():
    chance = random.Random(0)
    for _ in range(50):
        parents = [-1]
        while len(parents) < 40:
            parents.append(chance.randrange(-1, len(parents)))
        returns = [NAN if e in parents else chance.gauss(0, 3) for e in range(40)]
        actual = tree_advantages(torch.tensor(parents), torch.tensor(returns, dtype=torch.float64))
        assert actual.tolist() == pytest.approx(naive_tree(parents, returns), abs=1e-5)


def test_advantages_are_unbiased_on_a_small_mdp():
    """Two coin flips, return 4 a + b: the state after a is worth 4 a + 0.5, the start 2.5. A state's value is the mean
    over its n edges, the edge itself among them, so its advantage is (n - 1) / n of the true one in expectation."""
    chance, sums = random.Random(0), {0: [], 1: []}
    for _ in range(4000):
        first = [chance.randrange(2) for _ in range(3)]
        leaves = [(e, 4.0 * first[e] + chance.randrange(2)) for e in (0, 0, 0, 1, 2)]
        edges = [(-1, None), (-1, None), (-1, None), *leaves]
        for a, advantage in zip(first, tree(*edges)):
            sums[a].append(advantage.item())
    for a, true in ((0, -2.0), (1, 2.0)):
        assert statistics.fmean(sums[a]) == pytest.approx(true * 2 / 3, abs=0.06)


@pytest.mark.parametrize("parents, returns, words", [
    ([-1, 1], [NAN, 1.0], "earlier"), ([-2], [1.0], "earlier"), ([1, -1], [1.0, NAN], "earlier"),
    ([-1, 0], [2.0, 1.0], "goes on"), ([-1, -1], [1.0, NAN], "without a return"), ([-1], [math.inf], "infinite"),
    ([-1, 0], [1.0], "parent"), ([[-1]], [[1.0]], "parent"), ([-1.0], [1.0], "parent")])
def test_bad_trees_are_refused(parents, returns, words):
    with pytest.raises(ValueError, match=words):
        tree_advantages(torch.tensor(parents), torch.tensor(returns))


# CARL: sampling


def grown(*rows):
    """A Tree of transcripts given as lists of mean NLLs, one a turn; `at` names the node a row begins at."""
    made = Tree()
    for at, nlls in rows:
        first = made.nodes[at][3] if at is not None else 0
        transcript = Transcript.__new__(Transcript)
        transcript.notes = [f"state {first + k}" for k in range(len(nlls))]
        transcript.turn_ids = [first + k for k in range(len(nlls)) for _ in range(2)]
        transcript.logprobs = [-x for x in nlls for _ in range(2)]
        transcript.rewards, transcript.valid = [0.0] * (first + len(nlls)), [True] * len(nlls)
        made.grow(transcript, made.nodes[at] if at is not None else None)
        for node in made.nodes:
            if len(node) == 3:
                node.append(made.edges[node[1]].turn + 1 if node[1] >= 0 else 0)
    return made


def test_the_fork_goes_where_a_hand_count_says():
    one = grown((None, [1.0, 3.0, 2.0]))  # H / n: 1, 3, 2
    assert one.critical() is one.nodes[1] and [node[0] for node in one.nodes] == ["state 0", "state 1", "state 2"]
    two = grown((None, [1.0, 3.0, 2.0]), (1, [1.5, 1.0]))  # 1, ((3 + 1.5) / 2) / 2 = 1.125, 2, and 1 for the new state
    assert two.critical() is two.nodes[2]
    three = grown((None, [4.0, 1.0]), (None, [2.0, 1.6]))  # root: ((4 + 2) / 2) / 2 = 1.5, then 1 and 1.6
    assert three.critical() is three.nodes[2]
    assert grown((None, [1.0, 1.0])).critical()[1] == -1  # of equals the oldest


@pytest.fixture(scope="module")
def forest(agent):
    """Two trees of 3 + 4 rows of the untrained agent."""
    model, tokenizer, make_env = agent
    return tree_rollout(model, tokenizer, [make_env() for _ in range(6)], seeds=[5, 6], roots=3, forks=4,
                        temperature=1.0, max_response_tokens=12, generator=torch.Generator().manual_seed(0))


def test_a_fork_continues_ids_that_another_row_sampled(agent, forest):
    assert len(forest) == 14
    for start in (0, 7):
        rows = range(start, start + 7)
        flat = [(row, edge) for row in rows for edge in forest.notes[row]]
        for row in rows:
            first = forest.notes[row][0]
            sampled = forest.response_mask[row].nonzero()[:, 0]
            assert sorted(set(forest.turn_ids[row][sampled].tolist())) == [edge.turn for edge in forest.notes[row]]
            if first.parent >= 0:  # its context ends where the parent's response and the observation after it end
                other = flat[first.parent][0]
                n = int(sampled[0])
                assert torch.equal(forest.ids[row, :n], forest.ids[other, :n]) and first.turn > 0
                assert not forest.response_mask[row, :n].any()
            assert math.isfinite(forest.notes[row][-1].returns)
            assert forest.notes[row][-1].returns == pytest.approx(forest.returns[row].item())


def test_a_fork_at_the_root_begins_where_the_episode_began(agent, monkeypatch):
    model, tokenizer, make_env = agent
    monkeypatch.setattr(Tree, "critical", lambda tree: tree.nodes[0])
    played = tree_rollout(model, tokenizer, [make_env()], seeds=[5], roots=1, forks=3, temperature=1.0, max_response_tokens=12,
                          generator=torch.Generator().manual_seed(0))
    assert (played.turns > 1).all()
    starts = played.response_mask.int().argmax(1)
    for row, edges in enumerate(played.notes):
        assert edges[0].parent == -1 and edges[0].turn == 0 and starts[row] == starts[0]
        assert torch.equal(played.ids[row, :starts[0]], played.ids[0, :starts[0]])


def test_forked_edges_are_those_at_states_that_were_picked(forest):
    """N + 1 <= size <= 2 N: each fork adds an edge, and its state had at least one before."""
    for start in (0, 7):
        flat = [edge for row in range(start, start + 7) for edge in forest.notes[row]]
        forked = [edge for edge in flat if edge.forked]
        assert 5 <= len(forked) <= 8
        states = {edge.parent for edge in forked}
        assert all(edge.forked == (edge.parent in states) for edge in flat)


def test_log_probs_of_a_fork_are_those_of_one_plain_forward_pass(agent, forest):
    assert_logprobs_are_those_of_a_plain_forward_pass(agent[0], forest)
    for row, edges in enumerate(forest.notes):
        for edge in edges:
            nll = -forest.logprobs[row][forest.turn_ids[row] == edge.turn].mean().item()
            assert edge.nll == pytest.approx(nll, abs=1e-5)


def test_trees_do_not_share_their_luck_with_their_order(agent, forest):
    """Rows of a tree stand together, of the board that its seed names."""
    assert forest.seeds.tolist() == [5] * 7 + [6] * 7
    env = agent[2]()
    for row, seed in enumerate(forest.seeds.tolist()):
        opening = env.reset(seed=seed)[0]
        assert opening in agent[1].decode(forest.ids[row, : forest.lengths[row]])


def test_a_restored_environment_goes_on_as_the_original_would(agent):
    """FrozenLake's luck included: a fork that plays the same response ends in the same state."""
    _, tokenizer, _ = agent
    for seed in range(20):
        transcript = scripted(tokenizer, environments.make("frozenlake", intended=0.4), seed, [], Branch)
        before, fork = list(transcript.ids), transcript.fork()
        answer = environments.response(["Left", "Down"], "x")
        assert respond(transcript, tokenizer, answer) == respond(fork, tokenizer, answer)
        assert transcript.ids == fork.ids and transcript.rewards == fork.rewards and transcript.env is not fork.env
        assert fork.turn_ids[: len(before)] == [-1] * len(before)


def test_snapshots_are_the_states_in_which_the_policy_responded(agent):
    _, tokenizer, make_env = agent
    transcript = scripted(tokenizer, make_env(), 4, itertools.repeat(BAD), Branch)
    assert len(transcript.notes) == len(transcript.rewards) == 3
    for turn, snapshot in enumerate(transcript.notes):
        start = transcript.turn_ids.index(turn)
        assert snapshot.ids == transcript.ids[:start] and snapshot.rewards == transcript.rewards[:turn]
        assert snapshot.env.turn == turn and not snapshot.notes and max(snapshot.turn_ids) < 0


BAD = "<think>Hm.</think><answer>nothing</answer>"


def oracle(env):
    return demonstration(env, np.random.default_rng(0), 0.0)


def scripted_tree(tokenizer, make_env, answers):
    """A tree of two full episodes and a fork at the second turn of the first, given the same answer in every turn."""
    tree, rows = Tree(), []
    for answer in answers[:2]:
        transcript = scripted(tokenizer, make_env(), 11, itertools.repeat(answer), Branch)
        rows.append((transcript, tree.grow(transcript)))
    node = tree.nodes[1]
    fork = node[0].fork()
    while respond(fork, tokenizer, answers[2]):
        pass
    rows.append((fork, tree.grow(fork, node)))
    for edge in node[2]:
        edge.forked = True
    returns = torch.tensor([edge.returns for edge in tree.edges])
    advantages = tree_advantages([edge.parent for edge in tree.edges], returns)
    for edge, advantage in zip(tree.edges, advantages.tolist()):
        edge.advantage = advantage
    data = pack([transcript for transcript, _ in rows])
    data.notes = [edges for _, edges in rows]
    return data


def arm_of(credit, **settings):
    """An arm of the shipped agent."""
    env = settings.get("env", "sokoban")
    made = {"algos": ("grpo",), "lr": 1e-3, "eval_boards": 2} | DEFAULTS.get(env, {}) | settings
    return Arm(Settings(**made), "grpo", credit, 0)


def test_only_responses_at_forked_states_are_trained():
    arm = arm_of("carl+actfocus", prompts=1)
    data = scripted_tree(arm.tokenizer, lambda: copy.deepcopy(arm.env), [BAD, BAD, oracle])
    kept = arm.credit.filter(data)
    assert len(kept) == 2  # the second episode met no forked state
    assert data.response_mask[0].sum() > kept.response_mask[0].sum() > 0  # and what was handed over is as it was
    for row, (source, turn) in enumerate(((0, 1), (2, 1))):
        here = (data.turn_ids[source] == turn)[: kept.ids.shape[1]]
        assert torch.equal(kept.response_mask[row], here) and torch.equal(kept.ids[row], data.ids[source, : len(here)])
        assert torch.equal(kept.action_mask[row], here & data.action_mask[source, : len(here)])
    batch = arm.make_batch(kept)
    batch.advantages, batch.weights = arm.credit.advantages(batch), arm.credit.weights(batch)
    half = (data.returns[2] - data.returns[0]).item() / 2
    expected = torch.tensor([[-half], [half]]) * kept.response_mask
    assert half > 0
    torch.testing.assert_close(batch.advantages, expected)
    assert torch.equal(batch.weights, token_weights(batch.energy, kept.action_mask, kept.response_mask))
    before = copy.deepcopy(arm.policy.state_dict())
    log = arm.update(arm.gradient(batch))
    assert log["n"] == int(kept.response_mask.sum()) and log["grad_norm"] > 0
    assert any(not torch.equal(before[name], x) for name, x in arm.policy.state_dict().items())


def test_a_tree_in_which_nothing_forked_differs_teaches_nothing():
    credit, tokenizer = Carl("grpo", Settings(algos=("grpo",), prompts=1)), arm_of("carl").tokenizer
    make_env = credit.settings.make_env
    agreed = scripted_tree(tokenizer, make_env, [BAD, oracle, BAD])  # the root was not forked
    assert agreed.returns[1] > agreed.returns[0] == agreed.returns[2]
    assert len(credit.filter(agreed)) == 0
    assert len(credit.filter(scripted_tree(tokenizer, make_env, [BAD, BAD, BAD]))) == 0


@pytest.mark.parametrize("rollouts, text, expected", [
    (16, "carl", (8, 8)), (6, "carl", (3, 3)), (2, "carl", (1, 1)), (16, "carl:tree_roots=1", (1, 15)),
    (16, "carl:tree_roots=8,tree_forks=16", (8, 16)), (16, "carl+actfocus:tree_roots=16", (16, 1))])
def test_a_tree_has_as_many_leaves_as_a_group_unless_told_otherwise(rollouts, text, expected):
    assert make_credit(text, "grpo", Settings(algos=("grpo",), rollouts=rollouts)).tree() == expected


def test_a_tree_whose_leaves_agree_gives_no_update_and_says_so(agent, tmp_path):
    """An agent that never answers: every leaf pays the same, the step is skipped and counted."""
    model, tokenizer, _ = agent
    model.save_pretrained(tmp_path / "agent")
    tokenizer.save_pretrained(tmp_path / "agent")
    arm = arm_of("carl:tree_roots=1,tree_forks=2", model=str(tmp_path / "agent"), prompts=2, max_response_tokens=5)
    before = copy.deepcopy(arm.policy.state_dict())
    metrics = arm.step()
    assert metrics["updates"] == 0 and metrics["zero_spread_groups"] == 2 and metrics["kept_groups"] == 0
    assert all(torch.equal(before[name], x) for name, x in arm.policy.state_dict().items())


@pytest.mark.parametrize("env, options, credit", [
    ("sokoban", ("walls=0", "max_moves=2", "max_turns=2", "observation=coordinates"),
     "carl+actfocus:tree_roots=3,tree_forks=4"),
    ("sudoku", (), "a2tgpo+actfocus")])
def test_a_step_of_training_plays_and_learns(env, options, credit):
    arm = arm_of(credit, env=env, env_options=options, prompts=3, rollouts=3, keep=1.0, minibatch=4)
    before = copy.deepcopy(arm.policy.state_dict())
    played = []
    play = arm.credit.play
    arm.credit.play = lambda *arguments: played.append(play(*arguments)) or played[0]
    metrics = arm.step()
    assert len(played[0]) == (21 if env == "sokoban" else 9) and metrics["updates"] > 0 and metrics["grad_norm"] > 0
    assert metrics["ratio_mean"] == pytest.approx(1, abs=0.3) and metrics["updated_tokens"] > 0
    assert (metrics["updated_tokens"] < metrics["generated_tokens"]) == (env == "sokoban")
    assert any(not torch.equal(before[name], x) for name, x in arm.policy.state_dict().items())


# A2TGPO


def naive_turn_gain(gain, mask, returns, group, gamma, scale):
    rows, turns = len(gain), len(gain[0])
    outcome, z = [0.0] * rows, [[0.0] * turns for _ in range(rows)]
    for b in range(rows):
        peers = [returns[i] for i in range(rows) if group[i] == group[b]]
        mean = sum(peers) / len(peers)
        if len(peers) > 1 and max(peers) > min(peers):
            std = math.sqrt(sum((r - mean) ** 2 for r in peers) / (len(peers) - 1))
            outcome[b] = (returns[b] - mean) / (std + 1e-6)
        for k in range(turns):
            if mask[b][k]:
                values = [gain[i][k] for i in range(rows) if group[i] == group[b] and mask[i][k]]
                mean_gain = sum(values) / len(values)
                std = math.sqrt(sum((v - mean_gain) ** 2 for v in values) / len(values))
                z[b][k] = (gain[b][k] - mean_gain) / (std + 1e-6)
    advantages = [[0.0] * turns for _ in range(rows)]
    for b in range(rows):
        played = [k for k in range(turns) if mask[b][k]]
        for k in played:
            ahead = [j for j in played if j >= k]
            d = sum(gamma ** (j - k) * z[b][j] for j in ahead) / math.sqrt(len(ahead))
            advantages[b][k] = outcome[b] + (0.0 if k == played[-1] else scale * d)
    return advantages, z


@pytest.mark.parametrize("gamma, scale", [(1.0, 0.3), (0.9, 1.0), (0.0, 0.3), (1.0, 0.0)])
def test_turn_advantages_are_the_papers_formula(randn, gamma, scale):
    gain, returns = randn(7, 5), randn(7)
    lengths, group = torch.tensor([5, 3, 1, 4, 5, 2, 5]), torch.tensor([4, 4, 4, 9, 9, 9, 2])
    mask = torch.arange(5) < lengths[:, None]
    advantages, normalised = turn_gain_advantages(gain, mask, returns, group, gamma=gamma, scale=scale)
    naive = naive_turn_gain(gain.tolist(), mask.tolist(), returns.tolist(), group.tolist(), gamma, scale)
    torch.testing.assert_close(advantages, torch.tensor(naive[0]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(normalised, torch.tensor(naive[1]), atol=1e-5, rtol=1e-5)
    polluted = turn_gain_advantages(torch.where(mask, gain, NAN), mask, returns, group, gamma=gamma, scale=scale)
    assert torch.equal(polluted[0], advantages)  # what was not played is not read


def test_a_turn_without_a_peer_has_no_gain():
    mask = torch.tensor([[True, True], [True, False]])
    _, normalised = turn_gain_advantages(torch.tensor([[1.0, 9.0], [2.0, 0.0]]), mask, torch.zeros(2), torch.zeros(2))
    assert normalised[0, 1] == 0 and normalised[0, 0] == pytest.approx(-1, abs=1e-4)


@pytest.mark.parametrize("value", [0.0, 0.7, 1e8])
def test_the_same_gain_everywhere_leaves_the_group_advantage(randn, value):
    returns, mask = randn(2, 4), torch.ones(8, 3, dtype=torch.bool)
    advantages, normalised = turn_gain_advantages(torch.full((8, 3), value), mask, returns.flatten(),
                                                  torch.arange(2).repeat_interleave(4))
    assert not normalised.any()
    torch.testing.assert_close(advantages, group_advantages(returns).flatten()[:, None].expand(8, 3))


@pytest.mark.parametrize("change, words", [
    ({"turn_mask": torch.ones(2, 3)}, "turn_mask"), ({"returns": torch.zeros(3)}, "returns"),
    ({"group": torch.zeros(3)}, "group"),
    ({"gain": torch.full((2, 3), NAN)}, "gain"), ({"gamma": 2.0}, "gamma"), ({"scale": -1.0}, "scale"),
    ({"returns": torch.tensor([NAN, 0.0])}, "returns")])
def test_bad_turns_are_refused(change, words):
    arguments = dict(gain=torch.zeros(2, 3), turn_mask=torch.ones(2, 3, dtype=torch.bool), returns=torch.zeros(2),
                     group=torch.zeros(2)) | change
    with pytest.raises(ValueError, match=words):
        turn_gain_advantages(**arguments)


def test_the_clip_range_at_no_gain_and_at_infinite_gain():
    gain = torch.tensor([[0.0, math.inf, -math.inf, math.inf]])
    assert turn_clip_scale(gain, torch.ones(1, 4, dtype=torch.bool)).tolist()[0] == pytest.approx([1.0, 1.3, 0.7, 1.0])
    assert turn_clip_scale(gain, torch.tensor([[True, True, False, False]])).tolist() == [[1.0, 1.0, 1.0, 1.0]]


TURNS = torch.tensor([[-1, 0, 0, -1, 1, 1, 1], [0, 0, 0, 0, -1, -1, 1]])


def test_the_ratio_of_a_turn_is_the_geometric_mean_of_its_tokens(randn):
    logprobs, old = randn(2, 7), randn(2, 7)
    ratio = (turn_logprobs(logprobs, old, TURNS) - old).exp()
    for b in range(2):
        for turn in (0, 1):
            here = TURNS[b] == turn
            product = math.prod((logprobs[b, here] - old[b, here]).exp().tolist()) ** (1 / int(here.sum()))
            assert ratio[b, here].tolist() == pytest.approx([product] * int(here.sum()))


def test_the_straight_through_gradient_against_finite_differences(randn):
    """The loss in which a token's own log-ratio, not the turn's mean, carries the change."""
    logprobs, old, advantages = (0.1 * randn(2, 7)).requires_grad_(), 0.1 * randn(2, 7), randn(2, 7)
    weights = (TURNS >= 0).double()
    options = dict(clip_low=0.9, clip_high=9.0)
    loss, _ = weighted_policy_loss(turn_logprobs(logprobs, old, TURNS), old, advantages, weights, **options)
    gradient, = torch.autograd.grad(loss, logprobs)
    fixed = turn_logprobs(logprobs, old, TURNS).detach()
    for b, t in ((0, 1), (0, 5), (1, 2), (1, 6), (0, 0)):
        nudge = torch.zeros(2, 7, dtype=torch.float64)
        nudge[b, t] = 1e-6
        up, down = (weighted_policy_loss(fixed + sign * nudge, old, advantages, weights, **options)[0]
                    for sign in (1, -1))
        assert gradient[b, t].item() == pytest.approx((up - down).item() / 2e-6, abs=1e-7)


def test_a_clip_range_for_each_token(randn):
    logprobs, old, advantages = 0.3 * randn(2, 7), 0.3 * randn(2, 7), randn(2, 7)
    low, high, weights = torch.full((2, 7), 0.2), torch.full((2, 7), 0.28), torch.ones(2, 7)
    expected = weighted_policy_loss(logprobs, old, advantages, weights)
    actual = weighted_policy_loss(logprobs, old, advantages, weights, clip_low=low, clip_high=high)
    torch.testing.assert_close(actual[0], expected[0])
    high[0, 0] = 0.0
    alone = (x[:1, :1] for x in (logprobs, old, advantages, weights))
    row = weighted_policy_loss(*alone, clip_low=0.2, clip_high=0.0)
    only_first = torch.zeros(2, 7)
    only_first[0, 0] = 1.0
    part = weighted_policy_loss(logprobs, old, advantages, only_first, clip_low=low, clip_high=high)
    torch.testing.assert_close(part[0], row[0])
    with pytest.raises(ValueError, match="clip_low"):
        weighted_policy_loss(logprobs, old, advantages, weights, clip_low=low + 1)


def played(tokenizer, name, seeds, noise=0.5, **options):
    """Demonstrated episodes of an environment with a gold answer."""
    rng = np.random.default_rng(0)
    answer = lambda env: demonstration(env, rng, noise)
    made = [environments.make(name, **options) for _ in seeds]
    return pack([scripted(tokenizer, env, seed, itertools.repeat(answer), Probed) for env, seed in zip(made, seeds)])


@pytest.mark.parametrize("name, options", [("sudoku", {"max_turns": 3}), ("shop", {"products": 60, "page": 3})])
def test_beliefs_are_teacher_forced_mean_logprobs_of_the_gold_answer(name, options):
    model, tokenizer = load_agent(str(AGENTS / name), "cpu")
    data = played(tokenizer, name, [1, 1, 2], **options)
    actual = beliefs(model, tokenizer, data, micro_batch=2)
    assert actual.shape == (3, int(data.turns.max()) + 1)
    for row in range(3):
        assert len(data.notes[row]) == data.turns[row] + 1
        assert not actual[row, len(data.notes[row]):].any()
        for k in (0, 1, len(data.notes[row]) - 1):
            probe = data.notes[row][k]
            gold = tokenizer(probe.gold).input_ids
            if not gold:
                assert actual[row, k] == 0
                continue
            context = data.ids[row, : probe.length].tolist() + probe.more + tokenizer(SCAFFOLD).input_ids
            assert tokenizer.decode(context).endswith("<|im_start|>assistant\n" + SCAFFOLD)
            with torch.no_grad():
                logprobs = model(torch.tensor([context + gold])).logits[0].double().log_softmax(-1)
            naive = statistics.fmean(logprobs[len(context) + i - 1, token].item() for i, token in enumerate(gold))
            assert actual[row, k].item() == pytest.approx(naive, abs=1e-4)
    assert actual[0, 0] == actual[1, 0] != actual[2, 0]  # b_0 is the prompt's
    torch.testing.assert_close(beliefs(model, tokenizer, data.select([2, 0]), 99)[:, : actual.shape[1]],
                               actual[[2, 0]][:, : int(data.turns[[2, 0]].max()) + 1], atol=1e-5, rtol=0)


def test_where_the_question_does_not_fit_the_context_the_belief_stays_what_it_was():
    model, tokenizer = load_agent(str(AGENTS / "sudoku"), "cpu")
    data = played(tokenizer, "sudoku", [1, 2], max_turns=3)
    whole, lengths = beliefs(model, tokenizer, data), [probe.length for probe in data.notes[0]]
    model.config.max_position_embeddings = lengths[2] + 5  # no room for the third question, nor the fourth
    short = beliefs(model, tokenizer, data)
    torch.testing.assert_close(short[0, :2], whole[0, :2])
    assert len(lengths) == 4 and (short[0, 2:] == short[0, 1]).all()
    assert (short[0, 2:] - whole[0, 2:]).abs().min() > 1e-3


def test_gold_answers_solve():
    for seed in range(20):
        env = environments.make("sudoku")
        env.reset(seed=seed)
        for action in env.gold().split(" || "):
            env.move(action)
        assert env.solved() and env.gold() == ""
        shop = environments.make("shop", page=1000)
        shop.reset(seed=seed)
        shop.move(shop.read(f"search[{shop.query}]"))
        for action in shop.gold().split(" || "):
            shop.move(shop.read(action))
        assert shop.solved()
    assert not hasattr(environments.make("sokoban"), "gold") and not hasattr(environments.make("frozenlake"), "gold")


def test_turns_get_their_own_advantage_and_clip_range(agent):
    """Those of turn_gain_advantages and turn_clip_scale, of the gain in belief that each turn brought."""
    model, tokenizer, _ = agent
    data = played(tokenizer, "sudoku", [3] * 4 + [8] * 4, noise=0.7, max_turns=4, max_actions=8)
    credit = make_credit("a2tgpo", "grpo", Settings(env="sudoku", algos=("grpo",)))
    credit.arm = SimpleNamespace(micro_batch=16, policy=model, tokenizer=tokenizer)
    actual = credit.advantages(data)
    gain, mask = beliefs(model, tokenizer, data).diff(dim=1), torch.arange(4) < data.turns[:, None]
    advantages, normalised = turn_gain_advantages(gain, mask, data.returns, data.seeds)
    scale = turn_clip_scale(normalised, mask)
    outcome = group_advantages(data.returns.view(2, 4)).flatten()
    for row in range(8):
        for turn in range(int(data.turns[row])):
            here = data.turn_ids[row] == turn
            for of_token, of_turn in ((actual, advantages), (data.clip_scale, scale)):
                expected = of_turn[row, turn].expand(int(here.sum()))
                torch.testing.assert_close(of_token[row][here], expected, atol=1e-5, rtol=0)
        assert actual[row][here][0] == pytest.approx(outcome[row].item(), abs=1e-5)
        assert data.clip_scale[row][here][0] == 1
    assert not actual[~data.response_mask].any() and scale.unique().numel() > 8


@pytest.mark.parametrize("clip, fraction", [("paper", 1.0), ("common", 0.0)])
def test_the_turn_clip_is_the_papers_or_the_common_one(clip, fraction):
    """A policy whose turns' ratios are 1.05, of tokens' ratios of a half and of two: outside 0.003, inside 0.2."""
    arm = arm_of(f"a2tgpo:turn_clip={clip}", prompts=1, rollouts=2)
    answers = ["<think>The box.</think><answer>Up</answer>", "<think>Up.</think><answer>Left || Down</answer>"]
    data = pack([scripted(arm.tokenizer, copy.deepcopy(arm.env), row, answers[: 1 + row]) for row in range(2)])
    batch = arm.make_batch(data)
    wobble = torch.zeros(data.ids.shape)  # of log-ratios within a turn, 0 on average
    for row, turn in ((0, 0), (1, 0), (1, 1)):
        here = (data.turn_ids[row] == turn).nonzero()[:, 0]
        wobble[row, here[: len(here) // 2 * 2]] = math.log(2) * torch.tensor([1.0, -1.0]).repeat(len(here) // 2)
    batch.old_logprobs = batch.old_logprobs - (math.log(1.05) + wobble) * data.response_mask
    batch.advantages, batch.weights = torch.tensor([[1.0], [-1.0]]) * data.response_mask, data.response_mask.float()
    batch.clip_scale = torch.ones(data.ids.shape)
    log = arm.gradient(batch)
    assert log["clip_fraction"] / log["n"] == pytest.approx(fraction)
    assert log["ratio_mean"] / log["n"] == pytest.approx(1.05, abs=1e-4)


def test_beliefs_of_the_arm_are_read_of_the_policy_that_played():
    """Of the trajectories that are trained on, before the first update."""
    arm = arm_of("a2tgpo", env="sudoku", prompts=1, rollouts=2, keep=1.0)
    data = arm.credit.play(arm, [3])
    assert data.seeds.tolist() == [3, 3] and [len(probes) - 1 for probes in data.notes] == data.turns.tolist()
    assert torch.equal(arm.credit.advantages(data), arm.credit.advantages(data.select([0, 1])))


@pytest.mark.parametrize("credits, words", [
    (("carl+a2tgpo",), "credits"), (("actfocus+actfocus",), "credits"), (("carl+magic",), "credits"),
    (("a2tgpo",), "gold answer"), (("carl:tree_forks=-1",), "tree_forks"), (("",), "credits")])
def test_credits_that_cannot_be_are_refused(credits, words):
    with pytest.raises(ValueError, match=words):
        Settings(algos=("grpo",), credits=credits)
    with pytest.raises(ValueError, match="--algos grpo"):
        Settings(credits=("carl",))


def test_a_question_that_just_fits_the_context_is_asked():
    model, tokenizer = load_agent(str(AGENTS / "sudoku"), "cpu")
    data = played(tokenizer, "sudoku", [1], max_turns=3)
    data.notes[0] = data.notes[0][:1]
    whole, probe = beliefs(model, tokenizer, data)[0, 0], data.notes[0][0]
    model.config.max_position_embeddings = probe.length + len(tokenizer(SCAFFOLD + probe.gold).input_ids)
    assert beliefs(model, tokenizer, data)[0, 0] == whole != 0
    model.config.max_position_embeddings -= 1
    assert beliefs(model, tokenizer, data)[0, 0] == 0


def test_the_papers_numbers_are_the_defaults(randn):
    a2tgpo = make_credit("a2tgpo", "grpo", Settings(env="sudoku", algos=("grpo",)))
    zero = torch.zeros(1, 2)
    _, low, high = a2tgpo.ratio(zero, SimpleNamespace(old_logprobs=zero, turn_ids=zero.long(), clip_scale=1.0))
    assert (low, high) == (0.003, 0.004)  # and scale 0.3, gamma 1:
    given = randn(4, 3), torch.ones(4, 3, dtype=torch.bool), randn(4), torch.zeros(4)
    assert torch.equal(turn_gain_advantages(*given)[0], turn_gain_advantages(*given, gamma=1.0, scale=0.3)[0])


@pytest.mark.parametrize("name", ["uniform", "carl", "a2tgpo"])
def test_every_credit_samples_at_the_temperature_of_the_settings(monkeypatch, name):
    seen = []
    monkeypatch.setattr(rivals, "tree_rollout", lambda *_, temperature, **__: seen.append(temperature))
    arm = SimpleNamespace(env=None, policy=None, tokenizer=None, generator=None,
                          play=lambda seeds, temperature, *_, **__: seen.append(temperature))
    make_credit(name, "grpo", Settings(env="sudoku", algos=("grpo",), temperature=0.7)).play(arm, [1])
    assert seen == [0.7]
