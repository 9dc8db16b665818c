"""Two rivals of ActFocus, which change the advantages instead of the weights: CARL and A2TGPO.

CARL (arXiv 2512.04949) credits only responses at states where the policy was unsure. It grows a tree of rollouts for
each board: `tree_roots` episodes from the start, then `tree_forks` forks, each from the state with the largest H / n (H
the mean length-normalised NLL of the n responses sampled there so far). A(u -> v) = V(v) - V(u), V the plain mean over
children; only responses at forked states are trained.

A2TGPO (arXiv 2605.06200) credits turns with what they add to the belief in the right answer: gain_k = b_k - b_(k-1), b
the mean log-prob of the gold answer, forced after each turn. A_k = A_outcome + 0.3 * sum_(j >= k) z(gain_j) /
sqrt(number of terms), without the sum in the last turn, z within (board, turn); the ratio is the turn's geometric mean,
and its clip range widens with the gain. It needs an environment with a gold answer, `gold()`: Sudoku or the shop.

    python train.py --algos grpo --credits uniform actfocus carl carl+actfocus
    python train.py --algos grpo --env sudoku --minibatch 16 --credits uniform a2tgpo a2tgpo:turn_clip=common
"""

import copy
import statistics
from dataclasses import dataclass

import torch
from torch import nn

from actfocus import Credit, check_range, check_tensors, group_advantages, group_spread
from rollout import Transcript, open_transcripts, pack, play_on, score

# CARL -----------------------------------------------------------------------------------------------------------------


@dataclass
class Edge:
    """One response in a tree of rollouts."""

    parent: int  # the edge of the same tree that it continues, -1 at the root
    turn: int  # its tokens are those of its row with this turn id
    nll: float  # minus the mean log-prob of its tokens
    returns: float  # the episode's return where it ended the episode, else nan
    forked: bool = False  # whether the state it starts from was picked for a fork
    advantage: float = 0.0


class Branch(Transcript):
    """A transcript that can be forked at each state in which the policy responded; its notes are snapshots of those."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.notes = []

    def respond(self, ids, logprobs=None):
        self.notes.append(self.fork())
        return super().respond(ids, logprobs)

    def fork(self):
        """The episode as it stands, to be continued: what was sampled so far is context, not its response."""
        other = copy.copy(self)
        other.ids, other.logprobs, other.rewards = list(self.ids), list(self.logprobs), list(self.rewards)
        other.turn_ids, other.env, other.valid = [-1] * len(self.ids), copy.deepcopy(self.env), []
        other.texts, other.notes = [], []
        return other


class Tree:
    """Rollouts of one prompt that branch; a node is a state in which the policy responded, an edge a response."""

    def __init__(self):
        self.edges = []  # of all rows, in the order they were sampled
        self.nodes = []  # [snapshot, edge that led to it, edges sampled from it]

    def grow(self, transcript, node=None):
        """Add a finished transcript that began at a node (None: at the root) -> its edges, one a turn."""
        if node is None:
            if not self.nodes:
                self.nodes.append([transcript.notes[0], -1, []])
            node = self.nodes[0]
        own, first = [], len(transcript.rewards) - len(transcript.valid)
        for turn, snapshot in enumerate(transcript.notes, first):
            if own:
                node = [snapshot, len(self.edges) - 1, []]
                self.nodes.append(node)
            logprobs = [x for x, k in zip(transcript.logprobs, transcript.turn_ids) if k == turn]
            own.append(Edge(parent=node[1], turn=turn, nll=-sum(logprobs) / len(logprobs), returns=float("nan")))
            node[2].append(own[-1])
            self.edges.append(own[-1])
        own[-1].returns = float(sum(transcript.rewards))
        return own

    def critical(self):
        """The node that is forked next: the largest H / n, H = mean NLL of its n responses; the oldest of equals."""
        return max(self.nodes, key=lambda node: statistics.fmean(edge.nll for edge in node[2]) / len(node[2]))


def tree_advantages(parent, returns):
    """CARL: credit of every response in a tree of rollouts, parent[E], returns[E] -> advantages[E] float32.

    An edge is one response; edges stand in the order they were sampled. parent[e]: the edge whose end state e continues
    from, -1 at the root. returns[e]: the episode's return where e ended it, nan elsewhere. With V(leaf) = its return
    and V(state) = the plain mean over the edges sampled from it, A(e) = V(end of e) - V(start of e), not normalised.
    ValueError: an edge before its parent, a return on an edge that others continue, none on one that nothing continues.
    """
    parent, returns = torch.as_tensor(parent), torch.as_tensor(returns)
    if parent.shape != returns.shape or parent.dim() != 1 or (parent.is_floating_point() and len(parent)):
        raise ValueError(f"parent and returns must be [E], parent integers: {parent.dtype}, {tuple(parent.shape)}")
    edges, ends = parent.tolist(), (~torch.isnan(returns)).tolist()
    if any(not -1 <= up < e for e, up in enumerate(edges)):
        raise ValueError("parent must name an earlier edge, or -1 at the root")
    if torch.isinf(returns).any():
        raise ValueError("returns must not be infinite")
    value = returns.double().tolist()  # of each edge's end
    children = [[] for _ in range(len(edges) + 1)]  # the last: the root's, since parent -1 names it
    for e, up in enumerate(edges):
        children[up].append(e)
    for e in reversed(range(len(edges))):  # children come after their parent: leaves first
        if ends[e] == bool(children[e]):
            raise ValueError(f"edge {e} {'has a return but goes on' if ends[e] else 'ends without a return'}")
        if children[e]:
            value[e] = sum(value[c] for c in children[e]) / len(children[e])
    root = sum(value[c] for c in children[-1]) / max(len(children[-1]), 1)
    start = [value[up] if up >= 0 else root for up in edges]
    return torch.tensor([v - u for v, u in zip(value, start)], dtype=torch.float32, device=returns.device)


@torch.no_grad()
def tree_rollout(model, tokenizer, envs, *, seeds, roots, forks, temperature, max_response_tokens, generator):
    """A tree of rollouts for each seed, by CARL's rule -> Trajectories of P * (roots + forks) rows, tree by tree.

    `roots` episodes from the start, then `forks` times: the most critical state of each tree (Tree.critical) is
    restored, from the kept ids and a copy of the environment, and one more episode is played from it to the end. The
    forks of one round are sampled together across trees. envs: P * roots environments, seeds: P. A row's response_mask
    covers what that row sampled; the ids before are another row's. notes: a row's edges, which tell how rows hang
    together, and their advantages.
    """
    repeated = [seed for seed in seeds for _ in range(roots)]
    opened = open_transcripts(model, tokenizer, envs, repeated, max_response_tokens, transcript=Branch)
    play_on(model, opened, temperature, max_response_tokens, generator)
    trees, rows = [Tree() for _ in seeds], [[] for _ in seeds]  # rows: (transcript, its edges)
    for i, transcript in enumerate(opened):
        rows[i // roots].append((transcript, trees[i // roots].grow(transcript)))
    for _ in range(forks):
        nodes = [tree.critical() for tree in trees]
        continued = [node[0].fork() for node in nodes]
        play_on(model, continued, temperature, max_response_tokens, generator)
        for tree, row, node, transcript in zip(trees, rows, nodes, continued):
            row.append((transcript, tree.grow(transcript, node)))
            for edge in node[2]:
                edge.forked = True
    for tree in trees:
        returns = torch.tensor([edge.returns for edge in tree.edges], dtype=torch.float64)
        for edge, advantage in zip(tree.edges, tree_advantages([edge.parent for edge in tree.edges], returns).tolist()):
            edge.advantage = advantage
    trajectories = pack([transcript for row in rows for transcript, _ in row])
    trajectories.notes = [edges for row in rows for _, edges in row]
    return trajectories


class Carl(Credit):
    """CARL in the training loop."""

    algos = ("grpo",)
    tree_roots = 0  # N0 (paper 1 or 8); 0 = half of --rollouts
    tree_forks = 0  # N (paper 16); 0 = those that are left of --rollouts, so that a tree has as many leaves as a group

    def check(self, env):
        super().check(env)
        if self.tree_roots < 0 or self.tree_forks < 0:
            raise ValueError("credits: tree_roots and tree_forks must be at least 0")

    def tree(self):
        """(N0, N) of a board."""
        roots = self.tree_roots or max(1, self.settings.rollouts // 2)
        return roots, self.tree_forks or max(1, self.settings.rollouts - roots)

    def play(self, arm, boards):
        (roots, forks), s = self.tree(), self.settings
        envs = [copy.deepcopy(arm.env) for _ in range(len(boards) * roots)]
        with s.autocast():
            return tree_rollout(arm.policy, arm.tokenizer, envs, seeds=boards, roots=roots, forks=forks,
                                temperature=s.temperature, max_response_tokens=s.max_response_tokens,
                                generator=arm.generator)

    def filter(self, played):
        kept = super().filter(played)
        trained = torch.zeros_like(kept.response_mask)
        for row, edges in enumerate(kept.notes):
            for edge in edges:
                trained[row] |= (kept.turn_ids[row] == edge.turn) & edge.forked
        kept.response_mask, kept.action_mask = trained, kept.action_mask & trained
        learnable = any(edge.forked and edge.advantage for edges in kept.notes for edge in edges)
        return kept.select(trained.any(1) & learnable)

    def advantages(self, batch):
        out = torch.zeros_like(batch.old_logprobs)
        for row, edges in enumerate(batch.notes):
            for edge in edges:
                out[row, batch.turn_ids[row] == edge.turn] = edge.advantage
        return out * batch.response_mask


# A2TGPO ---------------------------------------------------------------------------------------------------------------

SCAFFOLD = "<think></think><answer>"  # closes the reasoning and opens the answer


@dataclass(frozen=True)
class Probe:
    """Where the belief in the gold answer is read: after the first `length` ids of a trajectory, and `more`."""

    length: int
    more: list[int]  # ids up to where a response would begin
    gold: str


class Probed(Transcript):
    """A transcript whose notes are its probes: one before the first turn and one after each."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.notes = [Probe(len(self.ids), [], self.env.gold())]

    def respond(self, ids, logprobs=None):
        goes_on = super().respond(ids, logprobs)
        self.notes.append(Probe(len(self.ids), [] if goes_on else self.bridge(), self.env.gold()))
        return goes_on


@torch.no_grad()
def beliefs(model, tokenizer, trajectories, micro_batch=16):
    """Mean log-prob of the gold answer before the first turn and after each, [B, K + 1]; 0 past a row's last turn.

    Teacher-forced: the gold answer follows the context and SCAFFOLD (A2TGPO). What is equal, the prompts of a group
    say, is read once. With nothing left to answer (a solved Sudoku) the belief is 0, the log of certainty; where the
    question would not fit the model's context, as where an episode ended for lack of room, it is what it was before.
    """
    encode = lambda text: tokenizer(text, add_special_tokens=False).input_ids
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**31
    scaffold, wanted, places = encode(SCAFFOLD), {}, []
    for row, probes in enumerate(trajectories.notes):
        ids = trajectories.ids[row].tolist()
        for k, probe in enumerate(probes):
            if probe.gold:
                pair = tuple(ids[: probe.length] + probe.more + scaffold), tuple(encode(probe.gold))
                if len(pair[0]) + len(pair[1]) <= context:
                    wanted[pair] = 0.0
                places.append((row, k, pair))
    queue = sorted(wanted, key=lambda pair: len(pair[0]) + len(pair[1]))
    for start in range(0, len(queue), micro_batch):
        part = queue[start:start + micro_batch]
        padded = lambda rows: nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
        ids = padded([context + answer for context, answer in part])
        gold = padded([[False] * len(context) + [True] * len(answer) for context, answer in part])
        logprobs = score(model, ids.to(model.device), gold.to(model.device)).logprobs.cpu()
        wanted.update(zip(part, (logprobs.sum(1) / gold.sum(1)).tolist()))
    out = torch.zeros(len(trajectories), max(map(len, trajectories.notes), default=0))
    for row, k, pair in places:
        out[row, k] = wanted.get(pair, out[row, max(k - 1, 0)])
    return out


def turn_gain_advantages(gain, turn_mask, returns, group, *, gamma=1.0, scale=0.3):
    """A2TGPO: outcome plus information gain of each turn -> (advantages[B, K], normalised_gain[B, K]).

    gain[B, K]: how much the mean log-prob of the gold answer rose in turn k (nats); turn_mask[B, K] bool: turns that
    were played; returns[B]; group[B]: trajectories of one prompt share a number. The gain is standardised among the
    same turn of the same group (population deviation + 1e-6; 0 for a turn without a peer or without spread), then D_k =
    sum_{j >= k} gamma^(j - k) gain_j / sqrt(number of terms) over the turns played. A turn's advantage is that of its
    trajectory in the group (group_advantages) + scale * D_k, without the second part in the last turn, whose answer the
    outcome judges already. Both results are 0 outside turn_mask.
    """
    if gain.dim() != 2:
        raise ValueError(f"gain must be [B, K], got shape {tuple(gain.shape)}")
    check_tensors(gain, dtype=torch.bool, turn_mask=turn_mask)
    check_tensors(gain, where=turn_mask, gain=gain)
    check_tensors(gain.sum(1), returns=returns, group=group)
    check_range(0, 1, gamma=gamma)
    check_range(0, scale=scale)
    outcome = torch.zeros_like(returns, dtype=torch.float32)
    normalised = torch.zeros(gain.shape, dtype=torch.float64, device=gain.device)
    for members in (group == g for g in group.unique()):
        outcome[members] = group_advantages(returns[members][None])[0]
        for k in range(gain.shape[1]):
            peers = members & turn_mask[:, k]
            if peers.any():
                values = gain[peers, k].double()
                spread = group_spread(values[None], correction=0)
                normalised[peers, k] = (values - values.mean()) / (spread + 1e-6) if spread > 0 else 0.0
    total, count = torch.zeros_like(outcome, dtype=torch.float64), torch.zeros_like(outcome)  # [B]: of turns after k
    ahead = torch.zeros_like(normalised)
    for k in reversed(range(gain.shape[1])):
        here = turn_mask[:, k]
        total = torch.where(here, normalised[:, k], 0.0) + gamma * total
        count = count + here
        ahead[:, k] = torch.where(here & (count > 1), total / count.clamp(min=1).sqrt(), 0.0)  # count 1: the last turn
    advantages = torch.where(turn_mask, outcome[:, None] + scale * ahead, 0.0)
    return advantages.float(), normalised.float()


def turn_clip_scale(normalised_gain, turn_mask, *, strength=0.3):
    """A2TGPO's adaptive clip: a factor c[B, K], 1 + strength * (2 sigmoid(gain) - 1), and 1 in the last turn.

    The range of a turn is [1 - c * clip_low, 1 + c * clip_high]: wider where a turn brought more than its peers' did.
    """
    check_tensors(normalised_gain, dtype=torch.bool, turn_mask=turn_mask)
    check_range(0, 1, strength=strength)
    factor = 1 + strength * (2 * torch.sigmoid(normalised_gain.float()) - 1)
    last = turn_mask & (turn_mask.flip(1).cumsum(1).flip(1) == 1)
    return torch.where(turn_mask & ~last, factor, 1.0)


def turn_logprobs(logprobs, old_logprobs, turn_ids):
    """Log-probs whose ratio to old_logprobs is the whole turn's, all [B, T], for weighted_policy_loss (A2TGPO, GSPO).

    The ratio's value is exp(mean log-ratio of the turn's tokens), its gradient the token's own (straight-through).
    turn_ids: the turn of each response token, -1 elsewhere. A turn must not be split between calls.
    """
    check_tensors(logprobs, where=turn_ids >= 0, old_logprobs=old_logprobs, turn_ids=turn_ids)
    log_ratio = torch.where(turn_ids >= 0, (logprobs - old_logprobs).detach(), 0.0)  # [B, T]
    turns = int(turn_ids.max()) + 1 if turn_ids.numel() else 0
    place = turn_ids.clamp(min=-1) + 1  # [B, T], 0: no response token
    sums = torch.zeros(len(logprobs), turns + 1, dtype=log_ratio.dtype, device=logprobs.device)
    counts = sums.scatter_add(1, place, torch.ones_like(log_ratio))
    mean = (sums.scatter_add(1, place, log_ratio) / counts.clamp(min=1)).gather(1, place)  # [B, T]
    return torch.where(turn_ids >= 0, logprobs - logprobs.detach() + old_logprobs.detach() + mean, logprobs)


class A2tgpo(Credit):
    """A2TGPO in the training loop."""

    algos = ("grpo",)
    turn_clip = "paper"  # its paper's clip range, made for large models; "common": that of the other credits
    paper_clip = (0.003, 0.004)

    def check(self, env):
        super().check(env)
        if not hasattr(env, "gold"):
            raise ValueError(f"credits: a2tgpo needs an environment with a gold answer: {self.settings.env} has none")
        if self.turn_clip not in ("paper", "common"):
            raise ValueError(f"credits: turn_clip must be paper or common, got {self.turn_clip!r}")

    def play(self, arm, boards):
        self.arm = arm  # beliefs are read later, of the trajectories that are trained on alone
        seeds = [seed for seed in boards for _ in range(self.settings.rollouts)]
        return arm.play(seeds, self.settings.temperature, arm.generator, transcript=Probed)

    def advantages(self, batch):
        with self.settings.autocast():
            belief = beliefs(self.arm.policy, self.arm.tokenizer, batch, self.arm.micro_batch)  # [B, K + 1]
        belief = belief.to(batch.ids.device)
        played = torch.arange(belief.shape[1] - 1, device=belief.device) < batch.turns[:, None]  # [B, K]
        advantages, gain = turn_gain_advantages(belief.diff(dim=1), played, batch.returns, batch.seeds)
        of_token = lambda x: x.gather(1, batch.turn_ids.clamp(min=0))  # [B, K] -> [B, T]
        batch.clip_scale = of_token(turn_clip_scale(gain, played))
        return of_token(advantages) * batch.response_mask

    def ratio(self, logprobs, batch):
        common, scale = (self.settings.clip_low, self.settings.clip_high), batch.clip_scale
        low, high = self.paper_clip if self.turn_clip == "paper" else common
        return turn_logprobs(logprobs, batch.old_logprobs, batch.turn_ids), scale * low, scale * high
