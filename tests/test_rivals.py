"""CARL and A2TGPO: trees worked by hand, naive references, finite differences, and what the sampler records for them."""

import copy
import math
import random
import statistics

import numpy as np
import pytest
import torch
from test_train import credit_of, learner, trajectories_of

import env as environments
import train
from actfocus import (
    group_advantages,
    tree_advantages,
    turn_clip_scale,
    turn_gain_advantages,
    turn_logprobs,
    weighted_policy_loss,
)
from rollout import SCAFFOLD, Chat, Transcript, Tree, beliefs, demonstration, pack, tree_rollout
from train import Settings, tree_credit, turn_credit

NAN = float("nan")


def tree(*edges):
    """Advantages of (parent, return or None) pairs."""
    parents, returns = zip(*edges)
    return tree_advantages(torch.tensor(parents), torch.tensor([NAN if r is None else r for r in returns], dtype=torch.float64))


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
    """Two coin flips, return 4 a + b: the state after a is worth 4 a + 0.5, the start 2.5. A state's value is the mean over its
    n edges, the edge itself among them, so its advantage is (n - 1) / n of the true one in expectation."""
    chance, sums = random.Random(0), {0: [], 1: []}
    for _ in range(4000):
        first = [chance.randrange(2) for _ in range(3)]
        edges = [(-1, None), (-1, None), (-1, None), *((e, 4.0 * first[e] + chance.randrange(2)) for e in (0, 0, 0, 1, 2))]
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
        transcript.states = [f"state {first + k}" for k in range(len(nlls))]
        transcript.turn = [first + k for k in range(len(nlls)) for _ in range(2)]
        transcript.logprobs = [-x for x in nlls for _ in range(2)]
        transcript.rewards, transcript.valid = [0.0] * (first + len(nlls)), [True] * len(nlls)
        made.grow(transcript, made.nodes[at] if at is not None else None)
        for node in made.nodes:
            if len(node) == 3:
                node.append(made.edges[node[1]].turn + 1 if node[1] >= 0 else 0)
    return made


def test_the_fork_goes_where_a_hand_count_says():
    one = grown((None, [1.0, 3.0, 2.0]))  # H / n: 1, 3, 2
    assert one.critical() is one.nodes[1]
    two = grown((None, [1.0, 3.0, 2.0]), (1, [1.5, 1.0]))  # 1, ((3 + 1.5) / 2) / 2 = 1.125, 2, and 1 for the new state
    assert two.critical() is two.nodes[2]
    three = grown((None, [4.0, 1.0]), (None, [2.0, 1.6]))  # root: ((4 + 2) / 2) / 2 = 1.5, then 1 and 1.6
    assert three.critical() is three.nodes[2]
    assert grown((None, [1.0, 1.0])).critical()[1] == -1  # of equals the oldest


@pytest.fixture(scope="module")
def forest(agent):
    """Two trees of 3 + 4 rows of the untrained agent."""
    model, tokenizer, make_env = agent
    return tree_rollout(model, tokenizer, [make_env() for _ in range(6)], seeds=[5, 6], roots=3, forks=4, temperature=1.0,
                        max_response_tokens=12, generator=torch.Generator().manual_seed(0))


def test_a_fork_continues_ids_that_another_row_sampled(agent, forest):
    assert len(forest) == 14
    for start in (0, 7):
        rows = range(start, start + 7)
        flat = [(row, edge) for row in rows for edge in forest.edges[row]]
        for row in rows:
            first = forest.edges[row][0]
            sampled = forest.response_mask[row].nonzero()[:, 0]
            assert sorted(set(forest.turn_ids[row][sampled].tolist())) == [edge.turn for edge in forest.edges[row]]
            if first.parent >= 0:  # its context ends where the parent's response and the observation after it end
                other = flat[first.parent][0]
                n = int(sampled[0])
                assert torch.equal(forest.ids[row, :n], forest.ids[other, :n]) and first.turn > 0
                assert not forest.response_mask[row, :n].any()
            assert math.isfinite(forest.edges[row][-1].returns)
            assert forest.edges[row][-1].returns == pytest.approx(forest.returns[row].item())


def test_forked_edges_are_those_at_states_that_were_picked(forest):
    """N + 1 <= size <= 2 N: each fork adds an edge, and its state had at least one before."""
    for start in (0, 7):
        flat = [edge for row in range(start, start + 7) for edge in forest.edges[row]]
        forked = [edge for edge in flat if edge.forked]
        assert 5 <= len(forked) <= 8
        states = {edge.parent for edge in forked}
        assert all(edge.forked == (edge.parent in states) for edge in flat)


def test_a_restored_environment_goes_on_as_the_original_would(agent):
    """FrozenLake's luck included: a fork that plays the same response ends in the same state."""
    _, tokenizer, _ = agent
    for seed in range(20):
        env = environments.make("frozenlake", intended=0.4)
        transcript = Transcript(Chat(tokenizer, "rules"), env, seed, 10**6, 100)
        before, fork = list(transcript.ids), transcript.fork()
        answer = tokenizer("<think>x</think><answer>Left || Down</answer>").input_ids + [tokenizer.eos_token_id]
        assert transcript.respond(answer) == fork.respond(answer)
        assert transcript.ids == fork.ids and transcript.rewards == fork.rewards and transcript.env is not fork.env
        assert fork.turn[: len(before)] == [-1] * len(before)


def scripted_tree(agent, answers, noise=0.0):
    """A tree of two full episodes and a fork at the second turn of the first, of oracle play or of bad answers."""
    _, tokenizer, make_env = agent
    chat, rng = Chat(tokenizer, make_env().system_prompt), np.random.default_rng(0)
    grow, rows = Tree(), []

    def play(transcript, answer):
        while True:
            words = demonstration(transcript.env, rng, noise) if answer is None else answer
            ids = tokenizer(words).input_ids + [tokenizer.eos_token_id]
            if not transcript.respond(ids, [-1.0] * len(ids)):
                return transcript
    for answer in answers[:2]:
        transcript = Transcript(chat, make_env(), 11, 10**6, 100)
        transcript.states = []
        rows.append((play(transcript, answer), None))
        grow_edges = grow.grow(rows[-1][0])
        rows[-1] = (rows[-1][0], grow_edges)
    node = grow.nodes[1]
    fork = play(node[0].fork(), answers[2])
    rows.append((fork, grow.grow(fork, node)))
    for edge in node[2]:
        edge.forked = True
    data = pack([transcript for transcript, _ in rows], tokenizer.pad_token_id)
    data.edges = [edges for _, edges in rows]
    return data


BAD = "<think>Hm.</think><answer>nothing</answer>"
IDLE = "<think>Hm.</think><answer>Up</answer>"


def test_only_responses_at_forked_states_are_trained(agent):
    data = scripted_tree(agent, [BAD, BAD, None])
    kept, tensors = tree_credit(data, data.returns[None], None)
    for row, turn in ((0, 1), (2, 1)):
        here = kept.turn_ids[row] == turn
        assert torch.equal(kept.response_mask[row], here & data.response_mask[row])
    assert not kept.response_mask[1].any() and not (kept.action_mask & ~kept.response_mask).any()
    bad, good = tensors["advantages"][0][kept.response_mask[0]], tensors["advantages"][2][kept.response_mask[2]]
    half = (data.returns[2] - data.returns[0]).item() / 2
    assert half > 0 and torch.allclose(good, torch.tensor(half)) and torch.allclose(bad, torch.tensor(-half))
    made = learner(agent, credit="carl+actfocus")
    before = copy.deepcopy(made.policy.state_dict())
    metrics = made.update(kept.select(torch.tensor([0, 2])), {"advantages": tensors["advantages"][[0, 2]]},
                          np.random.default_rng(0))
    assert metrics["updated_tokens"] == int(kept.response_mask.sum()) and metrics["grad_norm"] > 0
    assert any(not torch.equal(before[name], x) for name, x in made.policy.state_dict().items())


@pytest.mark.parametrize("own, expected", [({}, (8, 8)), ({"rollouts": 6}, (3, 3)), ({"rollouts": 2}, (1, 1)),
                                           ({"tree_roots": 1}, (1, 15)), ({"tree_roots": 8, "tree_forks": 16}, (8, 16)),
                                           ({"tree_roots": 16}, (16, 1))])
def test_a_tree_has_as_many_leaves_as_a_group_unless_told_otherwise(own, expected):
    assert Settings(algos=("grpo",), credits=("carl",), **own).tree() == expected


def test_a_tree_whose_leaves_agree_gives_no_update_and_says_so(agent, tmp_path):
    """An agent that never answers: every leaf pays the same, the step is skipped and counted."""
    model, tokenizer, _ = agent
    model.save_pretrained(tmp_path / "agent")
    tokenizer.save_pretrained(tmp_path / "agent")
    settings = Settings(model=str(tmp_path / "agent"), algos=("grpo",), credits=("carl",), steps=1, prompts=2, tree_roots=1,
                        tree_forks=2, eval_boards=1, eval_rollouts=1, max_response_tokens=5, out=str(tmp_path))
    lines = []
    train.train_arm(settings, settings.model, "grpo", "carl", 0, lines.append)
    assert lines[1]["updates"] == 0 and lines[1]["zero_spread_groups"] == 2


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
        turn_gain_advantages(arguments.pop("gain"), arguments.pop("turn_mask"), arguments.pop("returns"), arguments.pop("group"),
                             **arguments)


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
        up, down = (weighted_policy_loss(fixed + sign * nudge, old, advantages, weights, **options)[0] for sign in (1, -1))
        assert gradient[b, t].item() == pytest.approx((up - down).item() / 2e-6, abs=1e-7)


def test_a_clip_range_for_each_token(randn):
    logprobs, old, advantages = 0.3 * randn(2, 7), 0.3 * randn(2, 7), randn(2, 7)
    low, high, weights = torch.full((2, 7), 0.2), torch.full((2, 7), 0.28), torch.ones(2, 7)
    expected = weighted_policy_loss(logprobs, old, advantages, weights)
    actual = weighted_policy_loss(logprobs, old, advantages, weights, clip_low=low, clip_high=high)
    torch.testing.assert_close(actual[0], expected[0])
    high[0, 0] = 0.0
    row = weighted_policy_loss(logprobs[:1, :1], old[:1, :1], advantages[:1, :1], weights[:1, :1], clip_low=0.2, clip_high=0.0)
    only_first = torch.zeros(2, 7)
    only_first[0, 0] = 1.0
    part = weighted_policy_loss(logprobs, old, advantages, only_first, clip_low=low, clip_high=high)
    torch.testing.assert_close(part[0], row[0])
    with pytest.raises(ValueError, match="clip_low"):
        weighted_policy_loss(logprobs, old, advantages, weights, clip_low=low + 1)


def played(agent, name, seeds, noise=0.5, **options):
    """Demonstrated episodes of an environment with a gold answer, spelt in bytes by the Sokoban agent's tokenizer."""
    _, tokenizer, _ = agent
    rng, chat = np.random.default_rng(0), Chat(tokenizer, "rules")
    transcripts = []
    for seed in seeds:
        transcript = Transcript(chat, environments.make(name, **options), seed, 10**6, 100)
        while transcript.respond(tokenizer(demonstration(transcript.env, rng, noise)).input_ids + [tokenizer.eos_token_id]):
            pass
        transcripts.append(transcript)
    return pack(transcripts, tokenizer.pad_token_id)


@pytest.mark.parametrize("name, options", [("sudoku", {"max_turns": 3}), ("shop", {"products": 30, "page": 3})])
def test_beliefs_are_teacher_forced_mean_logprobs_of_the_gold_answer(agent, name, options):
    model, tokenizer, _ = agent
    model = copy.deepcopy(model)
    data = played(agent, name, [1, 1, 2], **options)
    actual = beliefs(model, tokenizer, data, micro_batch=2)
    assert actual.shape == (3, int(data.turns.max()) + 1)
    for row in range(3):
        assert len(data.probes[row]) == data.turns[row] + 1
        assert not actual[row, len(data.probes[row]):].any()
        for k in (0, 1, len(data.probes[row]) - 1):
            probe = data.probes[row][k]
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
    assert environments.make("sokoban").gold() is None and environments.make("frozenlake").gold() is None


def test_turns_get_their_own_advantage_and_clip_range(agent):
    model, tokenizer, _ = agent
    data = played(agent, "sudoku", [3] * 4, noise=0.7, max_turns=4, max_actions=8)
    settings = Settings(env="sudoku", algos=("grpo",), credits=("a2tgpo",))
    _, tensors = turn_credit(data, data.returns[None], (copy.deepcopy(model), tokenizer, settings))
    outcome = group_advantages(data.returns[None])[0]
    for row in range(4):
        last = data.turn_ids[row].max()
        for turn in range(int(last) + 1):
            here = data.turn_ids[row] == turn
            assert tensors["advantages"][row][here].unique().numel() == tensors["clip_scale"][row][here].unique().numel() == 1
        assert tensors["advantages"][row][data.turn_ids[row] == last][0] == pytest.approx(outcome[row].item(), abs=1e-5)
    assert not tensors["advantages"][~data.response_mask].any()


@pytest.mark.parametrize("clip, fraction", [("paper", 1.0), ("common", 0.0)])
def test_the_turn_clip_is_the_papers_or_the_common_one(agent, clip, fraction):
    """A policy whose turns' ratios are 1.05: outside 0.003, inside 0.2."""
    made = learner(agent, credit="a2tgpo", turn_clip=clip)
    data = trajectories_of(agent, [1.0, -1.0])
    scale = torch.ones(data.ids.shape)
    batch = made.prepare(data, credit_of(data, [1.0, -1.0]) | {"clip_scale": scale})
    batch["old_logprobs"] = batch["old_logprobs"] - math.log(1.05) * data.response_mask
    log = made.minibatch_gradient(batch, torch.arange(2))
    assert log["clip_fraction"] / log["n"] == pytest.approx(fraction)


@pytest.mark.parametrize("credits, words", [
    (("carl+a2tgpo",), "credits"), (("actfocus+actfocus",), "credits"), (("carl+magic",), "credits"),
    (("a2tgpo",), "gold answer"), (("carl:tree_forks=-1",), "tree_forks"), (("",), "credits")])
def test_credits_that_cannot_be_are_refused(credits, words):
    with pytest.raises(ValueError, match=words):
        Settings(algos=("grpo",), credits=credits)
    with pytest.raises(ValueError, match="--algos grpo"):
        Settings(credits=("carl",))
