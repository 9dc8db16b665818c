"""Where is the return decided, in the reasoning or in the answer? Estimated before any training, by nested sampling.

ActFocus holds the reasoning's gradient back, which costs nothing where the agent decides in its answer, and much where
it decides while it reasons. For each of n states (boards, at one of their turns): m reasonings, up to and with
`</think>`; for each, k answers; for each of those, c continuations of the episode, each with luck of its own.
R[n, m, k, c] is the return. With MS the mean over states of sample variances, unbiased components of a nested analysis
of variance are

    later      s2_l = MS_c(R)
    answer     s2_a = MS_k(mean_c R) - s2_l / c
    reasoning  s2_z = MS_m(mean_kc R) - s2_a / k - s2_l / (k c)
    share      s2_a / (s2_a + s2_z)

A component that is 0 is estimated around 0, also below; the share may then lie outside [0, 1].
"""

import copy

import numpy as np
import torch
from tqdm import tqdm

from actfocus import token_spans
from env import draw_boards
from rollout import decoder_for, open_transcripts, play_on, sample_turn
from train import EVALUATION_SEED

CLOSING = "</think>"
FEWEST = 10  # states whose returns vary: of fewer, a bootstrap over states says little, of one nothing at all


def components(returns):
    """R[n, m, k, c] -> {"reasoning", "answer", "later"}: unbiased components of its variance; m, k and c at least 2."""
    n, m, k, c = returns.shape
    later = returns.var(3, ddof=1).mean()
    answer = returns.mean(3).var(2, ddof=1).mean() - later / c
    reasoning = returns.mean((2, 3)).var(1, ddof=1).mean() - answer / k - later / (k * c)
    return {"reasoning": float(reasoning), "answer": float(answer), "later": float(later)}


def share(of):
    total = of["answer"] + of["reasoning"]
    return of["answer"] / total if total > 0 else None


def with_interval(returns, rng, draws=2000):
    """The components, the share decided in the answer and its 95 % interval; states are drawn again.

    None instead of an interval: the returns of too few states vary for it to hold what it promises.
    """
    again = (share(components(returns[rng.integers(len(returns), size=len(returns))])) for _ in range(draws))
    again, varying = [x for x in again if x is not None], int((np.ptp(returns, (1, 2, 3)) > 1e-9).sum())
    enough, found = varying >= FEWEST and len(again) > draws / 2, components(returns)
    bounds = np.percentile(again, [2.5, 97.5]).tolist() if enough else [None, None]
    return found | {"share": share(found), "interval": bounds, "states": [varying, len(returns)]}


def verdict(found):
    low, high = found["interval"]
    if low is not None and low > 0.5:
        return "hold the reasoning back: the answer decides"
    if high is not None and high < 0.5:
        return "do not hold the reasoning back: it decides, and the answer follows it"
    return "cannot tell: more boards narrow the interval"


def reasoning_length(tokenizer, ids, pieces):
    """How many ids of a response reach up to the end of `</think>`; all where it has none."""
    text, _, ends = token_spans(tokenizer, ids, pieces)
    place = text.find(CLOSING)
    return len(ids) if place < 0 else next(n for n, end in enumerate(ends, 1) if end >= place + len(CLOSING))


@torch.no_grad()
def nested_returns(arm, turn, boards, m, k, c):
    """R[n, m, k, c], float64, from the states before the `turn`-th response (from 0) of those boards that get there."""
    s = arm.settings
    envs = [copy.deepcopy(arm.env) for _ in boards]
    states = open_transcripts(arm.policy, arm.tokenizer, envs, boards, s.max_response_tokens)
    stop_ids, pieces, context = states[0].chat.stop_ids, {}, states[0].longest_prompt + s.max_response_tokens

    def responses(texts, room=s.max_response_tokens):
        """A sampled continuation of each text [ids so far], up to the end of its turn or `room` tokens."""
        if not texts:
            return []
        decoder = decoder_for(arm.policy)(arm.policy, s.temperature, arm.generator)
        drawn = sample_turn(decoder, dict(enumerate(texts)), stop_ids, room)
        return [drawn[row][0] for row in range(len(texts))]

    for _ in range(turn):
        states = [state for state, ids in zip(states, responses([state.ids for state in states])) if state.respond(ids)]
        if not states:
            return np.zeros((0, m, k, c))
    reasonings = []
    for state, ids in zip(np.repeat(states, m), responses([state.ids for state in states for _ in range(m)])):
        n = reasoning_length(arm.tokenizer, ids, pieces)
        reasonings.append((state, ids[:n], n == len(ids)))  # one that is nothing but reasoning has no answer to draw
    pairs = [pair for pair in reasonings for _ in range(k)]
    begun = [(state.ids, ids) for state, ids, whole in pairs if not whole]
    room = s.max_response_tokens - min((len(ids) for _, ids in begun), default=0)
    room = min(room, context - max((len(before) + len(ids) for before, ids in begun), default=0))
    answers = iter(responses([before + ids for before, ids in begun], room))
    playing, everyone = [], []
    for state, ids, whole in pairs:
        answer = [] if whole else next(answers)
        for _ in range(c):
            other = copy.deepcopy(state, {id(state.chat): state.chat})
            other.env.rng = np.random.default_rng(arm.rng.integers(2**63))  # its own luck, from this turn on
            everyone.append(other)
            if other.respond((ids + answer)[:s.max_response_tokens]):
                playing.append(other)
    if playing:
        play_on(arm.policy, playing, s.temperature, s.max_response_tokens, arm.generator)
    return np.array([sum(x.rewards) for x in everyone]).reshape(len(states), m, k, c)


def decided(arm, boards, m=6, k=4, c=2, batch=8):
    """{"first turn", "all turns"}: components, share and interval at the first turn, and over states of all turns."""
    seeds, rng = draw_boards(arm.env, arm.rng, boards, EVALUATION_SEED, arm.held_out), np.random.default_rng(0)
    parts = [seeds[i:i + batch] for i in range(0, boards, batch)]
    of_turn = [[] for _ in range(arm.env.max_turns)]
    arm.policy.eval()
    with arm.settings.autocast():
        for part in tqdm(parts, desc="nested sampling", unit="batch", leave=False, disable=None):
            for turn, found in enumerate(of_turn):
                returns = nested_returns(arm, turn, part, m, k, c)
                if not len(returns):
                    break
                found.append(returns)
    of_turn = [np.concatenate(found) for found in of_turn if found]
    found = {"first turn": with_interval(of_turn[0], rng), "all turns": with_interval(np.concatenate(of_turn), rng)}
    return found | {"episodes": sum(x.size for x in of_turn), "design": [boards, m, k, c]}
