"""Train a language-model agent with PPO and GRPO, under uniform credit and under ActFocus, and compare.

    python train.py                                   # four arms on Sokoban, a built-in agent, one machine, no downloads
    python train.py --seeds 0 1 2                     # three seeds: what a claim needs
    python train.py --env frozenlake --algos grpo     # `--help` lists every setting with its default
    python train.py --algos grpo --credits uniform actfocus carl carl+actfocus        # beside a rival
    python train.py --show, --diagnose                # one episode with its weights; does energy track reward variance?

One step: play P boards G times (rollout.py), keep the groups with the largest spread, score their tokens under the old policy
and the frozen reference, turn returns into advantages and energies into weights (actfocus.py), update on minibatches. An arm
is one (algorithm, credit, seed); all arms of a seed start from the same agent and see the same boards.

The output directory gets metrics.jsonl (a line for each step of each arm), summary.json and, with matplotlib, curves.png; and a
checkpoint an arm, from which `--resume` goes on to the same metrics as if nothing had happened.
"""

import argparse
import copy
import dataclasses
import hashlib
import inspect
import io
import itertools
import json
import math
import os
import platform
import queue
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import nn
from tqdm import tqdm

import env as environments
import kernels
import rollout as sampling
from actfocus import (SIGNALS, gae, group_advantages, spearman, token_signal, token_weights, tree_advantages, turn_clip_scale,
                      turn_gain_advantages, turn_logprobs, variance_filter, weighted_policy_loss)
from rollout import beliefs, load_agent, score

try:
    import fcntl
except ImportError:  # Windows: two runs on one directory are not told apart there
    fcntl = None

transformers.utils.logging.disable_progress_bar()  # a bar for every loaded file would drown ours
HERE = Path(__file__).resolve().parent
# Boards on which the built-in agent learns in minutes; other models get the paper's. --env-options overrides either.
TINY_BOARDS = {"sokoban": {"walls": 0, "min_moves": 2, "max_moves": 6, "max_turns": 4, "max_actions": 8,
                           "observation": "coordinates"},
               "sudoku": {"hint": True, "max_turns": 4, "max_actions": 8},
               "shop": {"products": 60, "page": 3}}
# Defaults that differ by environment and by --preset; the command line overrides both.
ENV_DEFAULTS = {"frozenlake": {"worse_noise": 0.95, "keep": 1.0},  # the paper's filter is off here (under GRPO) and in the shop
                "shop": {"warm_noise": 0.1, "worse_noise": 0.6, "warm_episodes": 2000, "keep": 1.0},
                "sudoku": {"max_response_tokens": 140, "worse_noise": 0.3}}  # a fact an empty cell; mistakes are hard to mend
PRESETS = {"paper": {"paper_boards": True, "steps": 200, "max_response_tokens": 400, "eval_boards": 32, "eval_rollouts": 16,
                     "width": 128, "layers": 4, "warm_steps": 6000, "warm_episodes": 12000}}
# What a credit may have for itself, as in `--credits uniform uniform:lr=3e-5 actfocus:alpha=0.3,signal=nll`
OWN_SETTINGS = ("alpha", "beta", "signal", "keep", "minibatch", "epochs", "lr", "critic_lr", "clip_low", "clip_high",
                "value_clip", "gamma", "lam", "entropy_coef", "kl_coef", "max_grad_norm", "tree_roots", "tree_forks", "turn_clip")
A2TGPO_CLIP = (0.003, 0.004)  # its paper's range of a turn's ratio
EVALUATION_SEED, VALIDATION_SEED = 1_000_000_000, 2_000_000_000  # training boards are drawn from below both


# Credits --------------------------------------------------------------------------------------------------------------


def group_credit(trajectories, returns, agent):
    """GRPO: one advantage a trajectory. Under PPO the critic's take its place."""
    return trajectories, {"advantages": group_advantages(returns).flatten()[:, None] * trajectories.response_mask}


def tree_credit(trajectories, returns, agent):
    """CARL: responses are credited with what they changed in the tree's values; only those at forked states are trained."""
    advantages, trained = torch.zeros(trajectories.ids.shape), torch.zeros_like(trajectories.response_mask)
    for start in range(0, len(trajectories), returns.shape[1]):
        tree = [(row, edge) for row in range(start, start + returns.shape[1]) for edge in trajectories.edges[row]]
        parents, ends = zip(*((edge.parent, edge.returns) for _, edge in tree))
        for (row, edge), value in zip(tree, tree_advantages(torch.tensor(parents), torch.tensor(ends, dtype=torch.float64))):
            if edge.forked:
                here = trajectories.turn_ids[row] == edge.turn
                advantages[row, here], trained[row, here] = value, True
    trajectories = dataclasses.replace(trajectories, response_mask=trained, action_mask=trajectories.action_mask & trained)
    return trajectories, {"advantages": advantages}


def turn_credit(trajectories, returns, agent):
    """A2TGPO: outcome and information gain of each turn; a turn's gain also widens or narrows its clip range."""
    policy, tokenizer, settings = agent
    with settings.autocast():
        belief = beliefs(policy, tokenizer, trajectories, settings.micro_batch)  # [B, K + 1]
    played = torch.arange(belief.shape[1] - 1) < trajectories.turns[:, None]  # [B, K]
    group = torch.arange(len(returns)).repeat_interleave(returns.shape[1])
    advantages, gain = turn_gain_advantages(belief.diff(dim=1), played, returns.flatten(), group)
    of_token = lambda x: x.gather(1, trajectories.turn_ids.clamp(min=0))  # [B, K] -> [B, T]
    return trajectories, {"advantages": of_token(advantages) * trajectories.response_mask,
                          "clip_scale": of_token(turn_clip_scale(gain, played))}


# (trajectories, returns[P, G], agent) -> (trajectories, their masks narrowed to what is trained; [B, T] tensors for the loss)
METHODS = {"uniform": group_credit, "carl": tree_credit, "a2tgpo": turn_credit}
# A credit is one of these ways to advantages, ActFocus's token weights, or both, joined by +
CREDITS = (*METHODS, "actfocus")


# Settings -------------------------------------------------------------------------------------------------------------


def setting(default, help, *, low=None, high=None, choices=None):
    """A field of Settings: its comment is its --help text, its bounds are checked."""
    return field(default=default, metadata={"help": help, "low": low, "high": high, "choices": choices})


@dataclass(frozen=True)
class Settings:
    """Everything that decides a run. Where the paper's value differs from the default, the text names it."""

    env: str = setting("sokoban", "environment", choices=tuple(environments.ENVS))
    env_options: tuple[str, ...] = setting((), "options of the environment, KEY=VALUE; without any, the built-in agent "
                                               "gets small boards and other models the paper's")
    paper_boards: bool = setting(False, "give the built-in agent the paper's boards, too")
    model: str = setting("tiny", "'tiny' (built in, taught here) or a Hugging Face model id or directory (paper: Qwen2.5 "
                                 "0.5B, 1.5B, 3B Instruct)")
    algos: tuple[str, ...] = setting(("ppo", "grpo"), "algorithms to compare", choices=("ppo", "grpo"))
    credits: tuple[str, ...] = setting(("uniform", "actfocus"), f"credits to compare: any of {', '.join(CREDITS)}, or two "
                                                           "joined by + (carl+actfocus), each with settings of its own if "
                                                           "wanted, as in actfocus:alpha=0.3,lr=3e-5")
    seeds: tuple[int, ...] = setting((0,), "seeds, one arm each for every algorithm and credit", low=0)
    out: str = setting("runs/latest", "output directory")
    # the method
    alpha: float = setting(0.1, "ActFocus: weight of reasoning tokens", low=0, high=1)
    beta: float = setting(0.5, "ActFocus: how far energy raises the weight of action tokens", low=0)
    signal: str = setting("energy", "ActFocus: what ranks the action tokens; random is a control", choices=(*SIGNALS, "random"))
    # the rivals
    tree_roots: int = setting(0, "CARL: trajectories of a board from the start, N0 (paper 1 or 8); 0 = half of --rollouts", low=0)
    tree_forks: int = setting(0, "CARL: trajectories of a board from its most critical states, N (paper 16); 0 = those that are "
                                 "left of --rollouts, so a tree has as many leaves as a group", low=0)
    turn_clip: str = setting("paper", "A2TGPO: its paper's clip range, 0.003 and 0.004, or the common one of the other credits",
                             choices=("paper", "common"))
    # the loop
    steps: int = setting(60, "rollout-update iterations (paper 200)", low=0)
    prompts: int = setting(8, "boards a step, P", low=1)
    rollouts: int = setting(16, "trajectories a board, G", low=2)
    keep: float = setting(0.25, "share of the groups kept, those with the largest spread of returns; 1 = no filter (paper "
                                "0.25 on Sokoban and Sudoku, 1 in the shop and, under GRPO, on FrozenLake)", low=0.01, high=1)
    minibatch: int = setting(32, "trajectories an optimiser update", low=1)
    micro_batch: int = setting(16, "trajectories a forward pass; changes memory and speed, not the result", low=1)
    epochs: int = setting(1, "passes over a step's trajectories", low=1)
    lr: float = setting(1e-4, "Adam's learning rate of the policy (paper 1e-6, for models a thousand times larger)", low=0)
    critic_lr: float = setting(3e-3, "PPO: learning rate of the critic (paper 1e-5)", low=0)
    clip_low: float = setting(0.2, "ratio is clipped below at 1 - this", low=0, high=1)
    clip_high: float = setting(0.28, "ratio is clipped above at 1 + this", low=0)
    value_clip: float = setting(0.5, "PPO: a value moves at most this far from its old one in an update", low=0)
    gamma: float = setting(1.0, "PPO: discount a token", low=0, high=1)
    lam: float = setting(1.0, "PPO: GAE's lambda", low=0, high=1)
    entropy_coef: float = setting(0.001, "entropy bonus, mean over response tokens, the same for every credit", low=0)
    kl_coef: float = setting(0.0, "penalty on the KL to the frozen reference (paper 0; 0.001 on WebShop)", low=0)
    max_grad_norm: float = setting(1.0, "gradients are scaled down to this norm", low=0)
    temperature: float = setting(1.0, "of the training rollouts", low=0.01)
    max_response_tokens: int = setting(100, "length at which a response is cut (paper 400)", low=1)
    # evaluation
    eval_every: int = setting(10, "steps between evaluations; also before the first and after the last", low=1)
    eval_boards: int = setting(64, "fixed boards, never trained on (paper 32)", low=1)
    eval_rollouts: int = setting(4, "trajectories a board (paper 16)", low=1)
    eval_temperature: float = setting(0.5, "of the evaluation rollouts", low=0.01)
    checkpoint_every: int = setting(10, "steps between checkpoints; also when a run is interrupted", low=1)
    boards: str = setting("evaluation", "which boards are evaluated on; choose settings on 'validation'",
                          choices=("evaluation", "validation"))
    # the built-in agent's warm start
    width: int = setting(64, "hidden size of the built-in agent, a multiple of 32", low=32)
    layers: int = setting(2, "layers of the built-in agent", low=1)
    warm_episodes: int = setting(3000, "demonstrations of the first stage: knowing the game", low=32)
    warm_steps: int = setting(1200, "updates of the first stage", low=1)
    warm_noise: float = setting(0.2, "share of random actions in the first stage", low=0, high=1)
    worse_steps: int = setting(80, "updates of the second stage: playing badly while thinking at length", low=0)
    worse_noise: float = setting(0.75, "share of random actions in the second stage", low=0, high=1)
    plan_in: str = setting("answer", "where the taught agent decides on its actions: in the answer, or already in the reasoning, "
                                     "which the answer copies", choices=("answer", "think"))
    # the machine
    device: str = setting("auto", "auto, cpu or cuda")
    precision: str = setting("auto", "what forward passes compute in; weights and Adam's state stay float32, or a rate "
                                     "of 1e-6 would round to nothing. auto: bfloat16 on a GPU",
                             choices=("auto", "float32", "bfloat16"))
    gradient_checkpointing: bool = setting(False, "recompute each layer in the backward pass instead of keeping it: less "
                                                  "memory, a third more time")
    jobs: int = setting(0, "arms trained side by side; 0 = one a CPU core, 1 on a GPU", low=0)
    cache: str = setting(str(HERE / ".cache"), "where the taught agent is kept")

    def __post_init__(self):
        for f in dataclasses.fields(self):
            values = getattr(self, f.name)
            for value in values if isinstance(values, tuple) else (values,):
                low, high, choices = (f.metadata[key] for key in ("low", "high", "choices"))
                if choices and value not in choices:
                    raise ValueError(f"{f.name}: {value!r} is not one of {', '.join(choices)}")
                if not isinstance(value, str) and not (float("-inf") < value < float("inf")):
                    raise ValueError(f"{f.name}: must be finite, got {value}")
                if (low is not None and value < low) or (high is not None and value > high):
                    raise ValueError(f"{f.name}: {value} is not in [{low}, {'inf' if high is None else high}]")
            if isinstance(values, tuple) and len(set(values)) < len(values):
                raise ValueError(f"{f.name}: {' '.join(map(str, values))} names one twice")
        for name in ("algos", "credits", "seeds"):
            if not getattr(self, name):
                raise ValueError(f"{name}: name at least one")
        if self.width % 32:
            raise ValueError(f"width: {self.width} is not a multiple of 32, the size of an attention head")
        env = self.make_env()
        env.reset(seed=0)  # options that admit no board fail here
        for credit in self.credits:
            name, _ = self.of_arm(credit)
            method, _ = split_credit(name)
            if method != "uniform" and self.algos != ("grpo",):
                raise ValueError(f"credits: {name} brings its own advantages and goes with --algos grpo alone")
            if method == "a2tgpo" and env.gold() is None:
                having = [other for other, cls in environments.ENVS.items() if cls.gold is not environments.Env.gold]
                raise ValueError(f"credits: {name} needs an environment with a gold answer ({', '.join(having)}), "
                                 f"{self.env} has none")

    def of_arm(self, credit):
        """'actfocus:alpha=0.3' -> ('actfocus', the settings of that arm)."""
        name, _, text = credit.partition(":")
        split_credit(name)
        own = {}
        for option in text.split(",") if text else ():
            key, _, value = option.partition("=")
            if key not in OWN_SETTINGS:
                raise ValueError(f"credits: {option!r} in {credit!r} is not KEY=VALUE with a key of {', '.join(OWN_SETTINGS)}")
            try:
                own[key] = type(getattr(self, key))(value)
            except ValueError:
                raise ValueError(f"credits: {value!r} is no value for {key} in {credit!r}") from None
        return name, dataclasses.replace(self, credits=(name,), **own) if own else self

    def make_env(self):
        small = self.model == "tiny" and not self.paper_boards and not self.env_options
        options = dict(TINY_BOARDS.get(self.env, {})) if small else {}
        for option in self.env_options:
            key, equals, text = option.partition("=")
            if not equals:
                raise ValueError(f"env_options: {option!r} is not KEY=VALUE")
            try:
                options[key] = json.loads(text)
            except json.JSONDecodeError:
                options[key] = text
        return environments.make(self.env, **{"response_limit": self.max_response_tokens, **options})

    def torch_device(self):
        found = torch.cuda.is_available()
        device = torch.device(("cuda" if found else "cpu") if self.device == "auto" else self.device)
        if device.type == "cuda" and not found:
            raise ValueError("device: torch finds no GPU here")
        torch.empty(0, device=device)  # fails here, not after the warm start, where there is no such device
        return device

    @property
    def half(self):
        return self.precision == "bfloat16" or (self.precision == "auto" and self.torch_device().type == "cuda")

    def autocast(self):
        """The context of a forward pass."""
        return torch.autocast(self.torch_device().type, torch.bfloat16, enabled=self.half)

    def tree(self):
        """CARL's (N0, N) of a board."""
        roots = self.tree_roots or max(1, self.rollouts // 2)
        return roots, self.tree_forks or max(1, self.rollouts - roots)

    def evaluation_seeds(self):
        start = EVALUATION_SEED if self.boards == "evaluation" else VALIDATION_SEED
        return range(start, start + self.eval_boards)


def split_credit(name):
    """'carl+actfocus' -> ('carl', True): the way to advantages, and whether tokens are weighted."""
    parts = name.split("+")
    methods = [part for part in parts if part != "actfocus"]
    if not set(parts) <= set(CREDITS) or len(set(parts)) < len(parts) or len(methods) > 1:
        raise ValueError(f"credits: {name!r} is not one of {', '.join(CREDITS)}, or one of them + actfocus")
    return (methods or ["uniform"])[0], "actfocus" in parts


# The agent ------------------------------------------------------------------------------------------------------------


def teach(settings):
    """The built-in agent: taught the game well, then to play it badly -> (model, tokenizer).

    The two stages matter: an agent that is weak because it never learnt the game has nothing that reinforcement could bring
    out. This one knows the game and plays it badly, as an instruction-tuned model does.
    """
    env, rng = settings.make_env(), np.random.default_rng(0)
    texts = ["system", "user", "assistant", *sampling.FILLERS]
    for seed in range(100):
        observation, _ = env.reset(seed=seed)
        over = False
        while not over:
            answer = sampling.demonstration(env, rng, 0.5, settings.plan_in)
            texts += [observation, answer]
            observation, _, terminated, truncated, _ = env.step(answer)
            over = terminated or truncated
    tokenizer = sampling.tiny_tokenizer(texts, phrases=env.phrases)
    model = sampling.tiny_model(tokenizer, width=settings.width, layers=settings.layers, heads=settings.width // 32)
    held_out, n = first_observations(env, settings), settings.warm_episodes
    good = sampling.demonstrations(env, tokenizer, draw_seeds(env, rng, n, held_out), rng, settings.warm_noise,
                                   settings.plan_in, "demonstrations")
    sampling.imitate(model, good, settings.warm_steps, 3e-3, rng, "warm start, 1 of 2: know the game")
    if settings.worse_steps:
        bad = sampling.demonstrations(env, tokenizer, draw_seeds(env, rng, n // 2, held_out), rng, settings.worse_noise,
                                      settings.plan_in, "poor demonstrations")
        sampling.imitate(model, bad, settings.worse_steps, 1e-3, rng, "warm start, 2 of 2: play it badly")
    return model, tokenizer


def taught_agent(settings):
    """Directory of the built-in agent, taught now unless the cache holds one shaped by the same settings and code."""
    shaping = ("env", "env_options", "paper_boards", "max_response_tokens", "eval_boards", "boards", "width", "layers",
               "warm_episodes", "warm_steps", "warm_noise", "worse_steps", "worse_noise", "plan_in")
    code = [inspect.getsource(part) for part in (environments, sampling, kernels, teach)]
    key = repr([(name, getattr(settings, name)) for name in shaping] + [TINY_BOARDS.get(settings.env), code,
               torch.__version__, transformers.__version__, torch.get_num_threads()])
    path = Path(settings.cache) / f"tiny-{settings.env}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    if not path.exists():
        print(f"teaching the built-in agent (kept in {path} for the next run)", file=sys.stderr)
        path.parent.mkdir(parents=True, exist_ok=True)
        model, tokenizer = teach(settings)
        partial = Path(tempfile.mkdtemp(dir=path.parent))
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        try:
            os.rename(partial, path)  # all or nothing: an interrupted warm start leaves no half-written agent
        except OSError:  # another run was first
            shutil.rmtree(partial)
    return str(path)


def first_observations(env, settings):
    """What the evaluation boards look like: training skips boards that look the same."""
    return {env.reset(seed=seed)[0] for seed in settings.evaluation_seeds()}


def draw_seeds(env, rng, n, held_out):
    """n seeds of boards that are not among the evaluation boards."""
    seeds, draws = [], 0
    while len(seeds) < n:
        seed, draws = int(rng.integers(EVALUATION_SEED)), draws + 1
        if env.reset(seed=seed)[0] not in held_out:
            seeds.append(seed)
        elif draws > 100 * (len(seeds) + 1):
            sys.exit(f"train.py: {env.name} has hardly a board beside the {len(held_out)} it is evaluated on: fewer "
                     "--eval-boards or larger boards are needed")
    return seeds


class Critic(nn.Module):
    """V of the state before each token: the policy's backbone, copied, with a scalar head that starts at 0."""

    def __init__(self, model):
        super().__init__()
        self.backbone = copy.deepcopy(model.base_model)
        self.head = nn.Linear(model.config.hidden_size, 1, device=model.device)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, ids, response_mask):
        """ids[B, T], response_mask[B, T] -> values[B, T], 0 outside the mask."""
        hidden = self.backbone(input_ids=ids[:, :-1]).last_hidden_state  # [B, T - 1, H]
        values = self.head(hidden)[..., 0].float()
        return torch.where(response_mask, nn.functional.pad(values, (1, 0)), 0.0)


# Learning -------------------------------------------------------------------------------------------------------------


def credit_weights(credit, signal, action_mask, response_mask, settings):
    """The token weights of a credit: ActFocus's, or 1 everywhere."""
    alpha, beta = (settings.alpha, settings.beta) if split_credit(credit)[1] else (1.0, 0.0)
    return token_weights(signal, action_mask, response_mask, alpha=alpha, beta=beta)


def scores_of(batch):
    """What the signals are made of."""
    return {name: batch[name] for name in ("old_logprobs", "ref_logprobs", "ref_energy", "ref_entropy")}


def normalise(x, mask):
    """x[B, T] with mean 0 and deviation 1 over the mask, 0 outside."""
    values = x[mask]
    return torch.where(mask, (x - values.mean()) / (values.std(correction=0) + 1e-6), 0.0)


def micro_batches(batch, rows, size):
    """Split rows of a dict of [B, ...] tensors into parts of `size`, of like length, without needless padding."""
    rows = rows[batch["lengths"][rows].argsort(stable=True)]
    for part in rows.split(size):
        longest = int(batch["lengths"][part].max())
        yield {name: x[part][:, :longest] if x.dim() > 1 else x[part] for name, x in batch.items()}


@torch.no_grad()
def token_table(function, batch, size):
    """function(part of batch) -> {name: [b, T]} over micro-batches, put together in batch order."""
    shape, device = batch["ids"].shape, batch["ids"].device
    table = defaultdict(lambda: torch.zeros(shape, device=device))
    everything = torch.arange(shape[0], device=device)
    for part in micro_batches({**batch, "row": everything}, everything, size):
        for name, values in function(part).items():
            table[name][part["row"], :values.shape[1]] = values
    return dict(table)


class Diverged(Exception):
    """An arm that cannot go on: three updates in a row with NaN or infinity, or a policy that cannot be sampled from."""


class Learner:
    """One arm's policy and, under PPO, critic, with their optimisers; `update` is the whole algorithm."""

    def __init__(self, policy, reference, algo, credit, settings):
        self.policy, self.reference, self.settings = policy, reference, settings
        self.algo, self.credit = algo, credit
        self.by_turns = split_credit(credit)[0] == "a2tgpo"  # ratios of whole turns, each with a clip range of its own
        if settings.gradient_checkpointing:
            new, old = "activation_checkpointing_enable", "gradient_checkpointing_enable"  # renamed within transformers 5
            getattr(policy, new if hasattr(policy, new) else old)({"use_reentrant": False})
            policy.train()  # Transformers checkpoints in this mode only; there is no dropout that it could switch on
        self.optimizers = [torch.optim.Adam(policy.parameters(), settings.lr, betas=(0.9, 0.999))]
        self.critic = Critic(policy) if algo == "ppo" else None
        if self.critic:
            self.optimizers.append(torch.optim.Adam(self.critic.parameters(), settings.critic_lr, betas=(0.9, 0.999)))
        self.bad_updates = 0  # in a row
        self.micro_batch = settings.micro_batch  # halved when memory runs out

    def state(self):
        """Everything that an update changes, for a checkpoint."""
        return {"policy": self.policy.state_dict(), "critic": self.critic.state_dict() if self.critic else None,
                "optimizers": [optimizer.state_dict() for optimizer in self.optimizers], "bad_updates": self.bad_updates,
                "micro_batch": self.micro_batch}

    def restore(self, state):
        self.policy.load_state_dict(state["policy"])
        if self.critic:
            self.critic.load_state_dict(state["critic"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        self.bad_updates, self.micro_batch = state["bad_updates"], state["micro_batch"]

    def prepare(self, trajectories, credit):
        """Everything that stays fixed during the updates of a step -> dict of tensors, [B, T] unless said otherwise.

        credit: tensors [B, T] that a method made, `advantages` among them; PPO computes those from the critic instead. None if
        a model's numbers are not finite.
        """
        s, device = self.settings, self.policy.device
        batch = {name: getattr(trajectories, name).to(device)
                 for name in ("ids", "response_mask", "action_mask", "turn_ids", "lengths")}
        batch |= {name: values.to(device) for name, values in credit.items()}
        mask = batch["response_mask"]

        def fixed(part):
            # Not the sampler's log-probs: the same forward pass for old and new makes the first ratio 1 in any precision.
            old = score(self.policy, part["ids"], part["response_mask"], s.temperature)
            ref = score(self.reference, part["ids"], part["response_mask"], s.temperature)
            table = {"old_logprobs": old.logprobs, "old_entropy": old.entropy, "ref_logprobs": ref.logprobs,
                     "ref_energy": -ref.logsumexp, "ref_entropy": ref.entropy}
            if self.critic:
                table["old_values"] = self.critic(part["ids"], part["response_mask"])
            return table

        with s.autocast():
            batch.update(token_table(fixed, batch, self.micro_batch))
        if not all(torch.isfinite(x).all() for x in batch.values()):
            return None
        random = s.signal == "random"
        signal = torch.rand(mask.shape, device=device) if random else token_signal(s.signal, **scores_of(batch))
        batch["weights"] = credit_weights(self.credit, signal, batch["action_mask"], mask, s)
        if self.critic:
            rewards = last_response(mask) * trajectories.returns.to(device)[:, None]  # paid at the very end, as in the paper
            raw, batch["value_targets"] = gae(rewards, batch["old_values"], mask, gamma=s.gamma, lam=s.lam)
            batch["advantages"] = normalise(raw, mask)
        return batch

    def minibatch_loss(self, part, weight_sum, tokens):
        """A micro-batch's share of the minibatch's loss -> (loss, hidden states, sums for the log)."""
        s, mask = self.settings, part["response_mask"]
        new = score(self.policy, part["ids"], mask, s.temperature)
        if not torch.isfinite(new.logprobs).all():
            raise FloatingPointError("the policy's log-probs are not finite")
        logprobs, (low, high) = new.logprobs, (s.clip_low, s.clip_high)
        if self.by_turns:
            logprobs = turn_logprobs(new.logprobs, part["old_logprobs"], part["turn_ids"])
            low, high = (part["clip_scale"] * bound for bound in ((low, high) if s.turn_clip == "common" else A2TGPO_CLIP))
        loss, stats = weighted_policy_loss(logprobs, part["old_logprobs"], part["advantages"], part["weights"],
                                           clip_low=low, clip_high=high, weight_sum=weight_sum)
        n = (part["weights"] > 0).sum()
        log = {name: value * n for name, value in stats.items()} | {"policy_loss": loss.detach(), "n": n}
        loss = loss - s.entropy_coef * new.entropy.sum() / tokens
        if s.kl_coef:
            # Squared log-ratio / 2: unlike k1 (the paper's), its gradient on the policy's own samples is that of the KL.
            loss = loss + s.kl_coef * 0.5 * (new.logprobs - part["ref_logprobs"]).square().sum() / tokens
        if self.critic:
            values, old, target = self.critic(part["ids"], mask), part["old_values"], part["value_targets"]
            clipped = old + (values - old).clamp(-s.value_clip, s.value_clip)
            value_loss = 0.5 * torch.maximum((values - target) ** 2, (clipped - target) ** 2).sum() / tokens
            log["value_loss"] = value_loss.detach()
            loss = loss + value_loss
        return loss, new.hidden, log

    def minibatch_gradient(self, batch, rows):
        """Gradients of a minibatch, added up over micro-batches -> sums for the log."""
        totals = defaultdict(float)
        weight_sum, tokens = batch["weights"][rows].sum(), batch["response_mask"][rows].sum()
        for part in micro_batches(batch, rows, self.micro_batch):
            with self.settings.autocast():
                loss, hidden, log = self.minibatch_loss(part, weight_sum, tokens)
            hidden.retain_grad()
            loss.backward()
            squares = hidden.grad.float().square().sum(-1)  # [N]
            log["grad_action"] = squares[part["action_mask"][part["response_mask"]]].sum()
            log["grad_all"] = squares.sum()
            for name, value in log.items():
                totals[name] += float(value)
        return totals

    def saving_memory(self, function, *arguments):
        """function(*arguments), again with half the micro-batch for as long as memory runs out: the result is the same."""
        while True:
            try:
                return function(*arguments)
            except RuntimeError as error:
                if not out_of_memory(error) or self.micro_batch == 1:
                    raise
                self.micro_batch = max(1, self.micro_batch // 2)
            self.forget_gradients()  # not in the except block: its traceback holds on to what did not fit
            print(f"train.py: out of memory, going on with micro-batches of {self.micro_batch}", file=sys.stderr)

    def forget_gradients(self):
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def update(self, trajectories, credit, rng):
        """All minibatch updates of one step -> metrics. An update with a number that is not finite is skipped and counted."""
        s = self.settings
        batch = self.saving_memory(self.prepare, trajectories, credit)
        totals, updates, skipped = defaultdict(float), 0, 0
        for _ in range(s.epochs):
            order = torch.from_numpy(rng.permutation(len(trajectories))).to(self.policy.device)
            for rows in order.split(s.minibatch):
                try:
                    log = self.saving_memory(self.minibatch_gradient, batch, rows) if batch else {"policy_loss": math.nan}
                except FloatingPointError:
                    log = {"policy_loss": math.nan}
                norms = [float(nn.utils.clip_grad_norm_(group["params"], s.max_grad_norm))
                         for optimizer in self.optimizers for group in optimizer.param_groups]
                if all(map(math.isfinite, [*norms, *log.values()])):
                    for optimizer in self.optimizers:
                        optimizer.step()
                    for name, value in (log | {"grad_norm": norms[0]}).items():
                        totals[name] += value
                    updates, self.bad_updates = updates + 1, 0
                else:
                    skipped, self.bad_updates = skipped + 1, self.bad_updates + 1
                self.forget_gradients()
                if self.bad_updates == 3:
                    raise Diverged("three updates in a row had a loss or gradient that is not finite")
        return (self.metrics(batch, totals, updates) if updates else {"updates": 0}) | {"skipped_updates": skipped}

    def metrics(self, batch, totals, updates):
        mask, action = batch["response_mask"], batch["action_mask"]
        entropy = batch["old_entropy"]
        mean = lambda values: float(values.mean()) if len(values) else None
        out = {"updates": updates, "updated_tokens": int(totals["n"])}
        out |= {name: totals[name] / updates for name in ("policy_loss", "grad_norm")}
        out |= {name: totals[name] / max(totals["n"], 1) for name in ("approx_kl", "clip_fraction", "ratio_mean")}
        out |= {"think_entropy": mean(entropy[mask & ~action]), "action_entropy": mean(entropy[action]),
                "action_energy": mean(batch["ref_energy"][action]),
                "weight_share_action": float(batch["weights"][action].sum() / batch["weights"].sum()),
                "grad_share_action": totals["grad_action"] / max(totals["grad_all"], 1e-30)}
        if self.critic:
            target, error = batch["value_targets"][mask], (batch["value_targets"] - batch["old_values"])[mask]
            variance = float(target.var())
            out |= {"value_loss": totals["value_loss"] / updates,
                    "explained_variance": 1 - float(error.var()) / variance if variance > 0 else None}
        return out


def out_of_memory(error):
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)  # a CPU's has no class of its own


def last_response(mask):
    """1.0 on the last True of each row of mask[B, T]."""
    remaining = mask.flip(1).cumsum(1).flip(1)  # [B, T]: True entries from here on
    return (mask & (remaining == 1)).float()


# Checkpoints ----------------------------------------------------------------------------------------------------------

CHECKPOINT = b"actfocus checkpoint 1 "  # then the SHA-256 of the rest, a newline, and what torch.save wrote


def checkpoint_path(settings, algo, credit, seed):
    return Path(settings.out) / "checkpoints" / f"{algo}-{credit.replace(':', '-')}-{seed}.pt"


def save_checkpoint(path, state):
    """Replace the checkpoint at `path`, all or nothing; the one before stays beside it as `.previous`."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    data = buffer.getvalue()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        file.write(CHECKPOINT + hashlib.sha256(data).hexdigest().encode() + b"\n" + data)
        file.flush()
        os.fsync(file.fileno())  # on the disk before it takes the place of the last one
    if path.exists():
        os.replace(path, path.with_name(path.name + ".previous"))
    os.replace(partial, path)


def load_checkpoint(path, device):
    """The newest whole checkpoint, or None; a damaged one is named on stderr. Nothing in the file is executed."""
    for candidate in (path, path.with_name(path.name + ".previous")):
        if not candidate.exists():
            continue
        head, _, data = candidate.read_bytes().partition(b"\n")
        if head == CHECKPOINT + hashlib.sha256(data).hexdigest().encode():
            return torch.load(io.BytesIO(data), map_location=device, weights_only=True)
        print(f"train.py: {candidate} is damaged or of another version, so it is not used", file=sys.stderr)
    return None


# The comparison -------------------------------------------------------------------------------------------------------


def play(policy, tokenizer, envs, seeds, settings, temperature, generator):
    with settings.autocast():
        return sampling.rollout(policy, tokenizer, envs[: len(seeds)], seeds=seeds, temperature=temperature,
                                max_response_tokens=settings.max_response_tokens, generator=generator)


def describe(trajectories):
    """Plain facts of a batch of trajectories, for the log."""
    response, action = trajectories.response_mask.sum().item(), trajectories.action_mask.sum().item()
    turns, stated = max(int(trajectories.turns.sum()), 1), int(trajectories.facts_stated.sum())
    think = trajectories.logprobs[trajectories.response_mask & ~trajectories.action_mask]
    return {"return": trajectories.returns.mean().item(), "success": trajectories.success.float().mean().item(),
            "format_valid": float((trajectories.valid * trajectories.turns).sum() / turns),
            "turns": turns / len(trajectories), "think_tokens": (response - action) / turns, "action_tokens": action / turns,
            "action_fraction": action / max(response, 1), "think_nll": -think.mean().item() if len(think) else None,
            "facts": stated / turns, "fact_accuracy": int(trajectories.facts_true.sum()) / stated if stated else None} | {
            name: values.mean().item() for name, values in trajectories.outcome.items()}


def load_pair(base, settings):
    """(policy, frozen reference, tokenizer), both models from directory or id `base`."""
    policy, tokenizer = load_agent(base, settings.torch_device())
    reference = copy.deepcopy(policy).requires_grad_(False)
    if settings.half:  # it is never updated, so nothing is lost below bfloat16
        reference.bfloat16()
    return policy, reference, tokenizer


def train_arm(settings, base, algo, credit, seed, report, resume=False, stop=lambda: False):
    """Train one arm from the agent in directory `base`; report(line) gets the metrics of each step, 0 = before training.

    resume: go on from the arm's checkpoint, if there is one; its lines are reported again. stop(): whether to write a
    checkpoint now and return. Diverged: the arm cannot go on; says which, where, and what is left.
    """
    name, s = settings.of_arm(credit)
    device = s.torch_device()
    torch.manual_seed(seed)
    policy, reference, tokenizer = load_pair(base, s)
    learner, method = Learner(policy, reference, algo, name, s), split_credit(name)[0]
    env = s.make_env()
    held_out, (roots, forks) = first_observations(env, s), s.tree()
    envs = [copy.deepcopy(env) for _ in range(max(s.prompts * max(s.rollouts, roots), s.eval_boards * s.eval_rollouts))]
    rng = np.random.default_rng(seed)  # boards and minibatches
    generator = torch.Generator(device).manual_seed(seed)  # tokens
    lines, path = [], checkpoint_path(s, algo, credit, seed)
    if resume and (saved := load_checkpoint(path, device)):
        learner.restore(saved["learner"])
        rng.bit_generator.state = json.loads(saved["rng"])
        generator.set_state(saved["generator"].cpu())
        torch.set_rng_state(saved["torch_rng"].cpu())
        lines = json.loads(saved["lines"])
        for line in lines:
            report(line)

    def learn():
        """Play, and learn from it -> metrics."""
        started = time.perf_counter()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        seeds = draw_seeds(env, rng, s.prompts, held_out)
        if method == "carl":
            with s.autocast():
                trajectories = sampling.tree_rollout(
                    policy, tokenizer, envs[: s.prompts * roots], seeds=seeds, roots=roots, forks=forks,
                    temperature=s.temperature, max_response_tokens=s.max_response_tokens, generator=generator)
        else:
            trajectories = play(policy, tokenizer, envs, np.repeat(seeds, s.rollouts).tolist(), s, s.temperature, generator)
        rollout_seconds = time.perf_counter() - started
        returns = trajectories.returns.view(s.prompts, -1)  # [P, G]
        spread = variance_filter(returns, keep=1)
        kept = variance_filter(returns, keep=s.keep) if s.keep < 1 else torch.arange(s.prompts)
        line = describe(trajectories) | {"generated_tokens": int(trajectories.response_mask.sum())}
        line |= {"zero_spread_groups": s.prompts - len(spread), "kept_groups": len(kept), "updates": 0}
        if len(spread) or (algo == "ppo" and len(kept)):  # else there is nothing to learn from: every group got one return
            rows = (kept[:, None] * returns.shape[1] + torch.arange(returns.shape[1])).flatten()
            chosen, tensors = METHODS[method](trajectories.select(rows), returns[kept], (policy, tokenizer, s))
            trained = chosen.response_mask.any(1).nonzero()[:, 0]  # of a tree, rows may have nothing to train
            if tensors["advantages"].any() or algo == "ppo":
                line |= learner.update(chosen.select(trained), {name: x[trained] for name, x in tensors.items()}, rng)
        if device.type == "cuda":
            line["peak_memory_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
        return line | {"tokens_per_second": trajectories.response_mask.sum().item() / rollout_seconds,
                       "rollout_seconds": rollout_seconds, "seconds": time.perf_counter() - started}

    def evaluate():
        seeds = np.repeat(s.evaluation_seeds(), s.eval_rollouts).tolist()
        # The same luck at every evaluation: differences are the policy's.
        played = play(policy, tokenizer, envs, seeds, s, s.eval_temperature, torch.Generator(device).manual_seed(0))
        wins = played.success.view(s.eval_boards, s.eval_rollouts).float().mean(1)  # [boards]
        return {f"eval_{name}": value for name, value in describe(played).items()} | {"eval_board_success": wins.tolist()}

    for step in range(len(lines), s.steps + 1):
        line = {"algo": algo, "credit": credit, "seed": seed, "step": step}
        try:
            line |= learn() if step else {}
            line |= evaluate() if step % s.eval_every == 0 or step == s.steps else {}
        except (Diverged, FloatingPointError) as error:
            left = f"the last checkpoint is {path}" if path.exists() else "there was no checkpoint yet"
            raise Diverged(f"{algo} {credit} seed {seed}, step {step}: {error}; {left}") from None
        lines.append(line)
        stopping = stop()
        if step and step % s.checkpoint_every == 0 or step == s.steps or stopping:
            save_checkpoint(path, {"learner": learner.state(), "rng": json.dumps(rng.bit_generator.state),
                                   "generator": generator.get_state(), "torch_rng": torch.get_rng_state(),
                                   "lines": json.dumps(lines)})
        report(line)
        if stopping:
            return


def arm_of(line):
    return line["algo"], line["credit"], line["seed"]


def summarise(lines):
    """The lines of one arm -> its entry in summary.json."""
    evaluated = [line for line in lines if "eval_success" in line]
    success = [line["eval_success"] for line in evaluated]
    return dict(zip(("algo", "credit", "seed"), arm_of(lines[0]))) | {
        "eval_steps": [line["step"] for line in evaluated], "eval_success": success, "final_success": success[-1],
        "peak_success": max(success), "final_board_success": evaluated[-1]["eval_board_success"],
        "eval": {name: [line[f"eval_{name}"] for line in evaluated]
                 for name in ("format_valid", "fact_accuracy", "facts", "think_tokens", "think_nll")},
        "eval_generated_tokens": [sum(line.get("generated_tokens", 0) for line in lines if line["step"] <= at["step"])
                                  for at in evaluated],
        "updated_tokens": sum(line.get("updated_tokens", 0) for line in lines),
        "seconds": sum(line.get("seconds", 0) for line in lines),
        "collapsed_at": collapse([(line["step"], line["eval_format_valid"]) for line in evaluated]),
        "skipped_updates": sum(line.get("skipped_updates", 0) for line in lines)}


def collapse(evaluations):
    """[(step, format-valid rate)] -> the step of the third evaluation in a row under 10 %, or None."""
    in_a_row = 0
    for step, valid in evaluations:
        in_a_row = in_a_row + 1 if valid < 0.1 else 0
        if in_a_row == 3:
            return step
    return None


def _worker(settings, base, todo, lines, threads, resume, stop):
    for number in (signal.SIGINT, signal.SIGTERM):  # they may reach the whole process group: the parent says when to stop
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    try:
        while (arm := todo.get()) is not None and not stop.is_set():
            train_arm(settings, base, *arm, report=lines.put, resume=resume, stop=stop.is_set)
    except (Diverged, OSError, ValueError) as error:
        lines.put(error)


def _die_with_parent():
    """A parent that was killed cannot end its children; one that trains on would overwrite the resumed run's checkpoints."""
    torch.multiprocessing.parent_process().join()
    os._exit(1)


def train_arms(settings, base, arms, report, resume=False):
    """Train arms side by side, a process each: a small model cannot keep several cores busy, several arms can.

    -> the signal that stopped it early, after a checkpoint of each arm, or None.
    """
    cores = os.cpu_count() or 1
    # Of the whole run, not of the arms that are left: on as many threads as before, a resumed arm rounds as before.
    every = len(settings.algos) * len(settings.credits) * len(settings.seeds)
    jobs = min(settings.jobs or (1 if settings.torch_device().type == "cuda" else cores), every)
    context = torch.multiprocessing.get_context("spawn")
    stop, received = context.Event(), []

    def finish_the_update(number, _):
        print("\nfinishing this update; a second signal stops at once", file=sys.stderr)
        received.append(number)
        stop.set()
        for other, default in before.items():
            signal.signal(other, default)

    before = {number: signal.signal(number, finish_the_update) for number in (signal.SIGINT, signal.SIGTERM)}
    todo, lines, workers = context.Queue(), context.Queue(), []
    try:
        if jobs <= 1:
            for arm in arms:
                if not stop.is_set():
                    train_arm(settings, base, *arm, report=report, resume=resume, stop=stop.is_set)
            return received[0] if received else None
        for arm in [*arms, *[None] * jobs]:
            todo.put(arm)
        arguments = (settings, base, todo, lines, max(1, cores // jobs), resume, stop)
        workers += [context.Process(target=_worker, args=arguments, daemon=True) for _ in range(min(jobs, len(arms)))]
        for worker in workers:
            worker.start()
        missing = len(arms) * (settings.steps + 1)
        while missing:
            try:
                line = lines.get(timeout=0.5)
                if isinstance(line, Exception):
                    raise line
                report(line)
                missing -= 1
            except queue.Empty:
                if any(worker.exitcode for worker in workers):
                    codes = [worker.exitcode for worker in workers if worker.exitcode]
                    sys.exit(f"train.py: a training process ended with exit code {codes[0]}")
                if received and not any(worker.is_alive() for worker in workers) and lines.empty():
                    return received[0]
        return None
    finally:
        for number, default in before.items():
            signal.signal(number, default)
        for worker in workers:
            if worker.pid:
                worker.kill()  # checkpoints are whole at any moment


def by_algo_and_credit(summary):
    """{(algo, credit): its arms, in the order of the seeds}."""
    groups = defaultdict(list)
    for arm in summary["arms"]:
        groups[arm["algo"], arm["credit"]].append(arm)
    return groups


def paired_gain(arms, rivals, draws=10_000):
    """Mean of final success minus the rivals', with a 95 % interval from a paired bootstrap over seeds and boards.

    Arms and rivals are paired by seed. With few seeds the interval is too narrow: three seeds cannot show how seeds vary.
    """
    difference = np.array([np.subtract(a["final_board_success"], b["final_board_success"]) for a, b in zip(arms, rivals)])
    rng, (seeds, boards) = np.random.default_rng(0), difference.shape
    again = [difference[rng.integers(seeds, size=seeds)][:, rng.integers(boards, size=boards)].mean() for _ in range(draws)]
    return difference.mean(), *np.percentile(again, [2.5, 97.5])


def aligned(rows):
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


def table(summary):
    """The comparison as text: one row an algorithm and credit, means over seeds with their range."""
    percent = lambda values: f"{100 * np.mean(values):5.1f}" + (
        f" ({100 * min(values):.1f}..{100 * max(values):.1f})" if len(values) > 1 else "")
    groups, c = by_algo_and_credit(summary), summary["config"]
    rows, verdicts = [("arm", "before", "final", "peak", "peak to final", "final, against uniform [95 %]")], []
    for (algo, credit), arms in groups.items():
        rivals = groups.get((algo, "uniform"), []) if credit != "uniform" else []
        gain = ""
        if rivals:
            mean, low, high = (100 * x for x in paired_gain(arms, rivals))
            gain = f"{mean:+5.1f} [{low:+.1f}..{high:+.1f}]"
        rows.append((f"{algo} {credit}", percent([a["eval_success"][0] for a in arms]),
                     percent([a["final_success"] for a in arms]), percent([a["peak_success"] for a in arms]),
                     percent([a["final_success"] - a["peak_success"] for a in arms]), gain))
        if rivals and credit == "actfocus":
            won = "ahead of" if mean > 0 else "behind" if mean < 0 else "level with"
            ahead = sum(a["final_success"] > b["final_success"] for a, b in zip(arms, rivals))
            verdicts.append(f"{algo}: ActFocus ends {abs(mean):.1f} points {won} uniform, ahead in {ahead} of {len(arms)} seeds")
    n = len(c["seeds"])
    lines = [f"Success in % on {c['eval_boards']} {c['boards']} boards x {c['eval_rollouts']} rollouts at temperature "
             f"{c['eval_temperature']}, after {c['steps']} steps; mean (range) over seeds {' '.join(map(str, c['seeds']))}; "
             "[95 %]: paired bootstrap over seeds and boards"]
    lines += aligned(rows)
    lines += [f"random actions {100 * summary['floor']:.1f}, best play {100 * summary['ceiling']:.1f}", *verdicts]
    if any(split_credit(credit.partition(":")[0])[0] != "uniform" for _, credit in groups):
        lines += ["", *costs(groups)]
    if n < 3:
        lines.append(f"{n} seed{'s prove' if n > 1 else ' proves'} nothing: run with --seeds 0 1 2 or more")
    return "\n".join(lines)


def costs(groups):
    """Lines of a second table: credits that sample by other rules generate other amounts, so success at equal amounts, too."""
    least = min(arm["eval_generated_tokens"][-1] for arms in groups.values() for arm in arms)
    rows = [("arm", f"success at {least / 1000:.0f}k generated tokens", "generated, k", "updated, k", "minutes")]
    mean = lambda values, scale: f"{np.mean(list(values)) / scale:.1f}"
    for (algo, credit), arms in groups.items():
        rows.append((f"{algo} {credit}",
                     mean((100 * np.interp(least, a["eval_generated_tokens"], a["eval_success"]) for a in arms), 1),
                     mean((a["eval_generated_tokens"][-1] for a in arms), 1000), mean((a["updated_tokens"] for a in arms), 1000),
                     mean((a["seconds"] for a in arms), 60)))
    return aligned(rows)


def pyplot():
    """matplotlib's, drawing to files, or None where it is not installed."""
    try:
        import matplotlib
        matplotlib.use("agg")
        import matplotlib.pyplot
        return matplotlib.pyplot
    except ImportError:
        return None


def plot(summary, path):
    """Success over steps, mean and range over seeds; False where matplotlib is not installed."""
    if not (plt := pyplot()):
        return False
    groups = by_algo_and_credit(summary)
    algos = list(dict.fromkeys(algo for algo, _ in groups))
    figure, axes = plt.subplots(1, len(algos), figsize=(5 * len(algos) + 1.5, 3.6), sharey=True, squeeze=False,
                                layout="constrained")
    for axis, algo in zip(axes[0], algos):
        for credit, arms in ((credit, arms) for (name, credit), arms in groups.items() if name == algo):
            curves = np.array([arm["eval_success"] for arm in arms])  # [seeds, evaluations]
            line, = axis.plot(arms[0]["eval_steps"], curves.mean(0), label=credit)
            axis.fill_between(arms[0]["eval_steps"], curves.min(0), curves.max(0), alpha=0.2, color=line.get_color())
        for name, what, above in (("floor", "random actions", 2), ("ceiling", "best play", -9)):
            axis.axhline(summary[name], color="grey", linestyle=":", linewidth=1)
            axis.annotate(what, (arms[0]["eval_steps"][0], summary[name]), xytext=(2, above), textcoords="offset points",
                          fontsize=7)
        axis.set(title=algo.upper(), xlabel="step", ylim=(0, 1.02))
    axes[0][0].set_ylabel("success on evaluation boards")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right upper")
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True


def finished_arms(settings):
    """Lines of the arms that an interrupted run in settings.out had finished; ValueError if its settings were others.

    The other arms go on from their checkpoints, which hold their lines.
    """
    out = Path(settings.out)
    if not (out / "settings.json").exists():
        return []
    before = json.loads((out / "settings.json").read_text())
    now = json.loads(json.dumps(dataclasses.asdict(settings)))
    changed = [name for name in now if name not in ("out", "cache", "jobs") and now[name] != before.get(name)]
    if changed:
        raise ValueError(f"resume: {settings.out} was begun with another {', '.join(changed)}")
    arms = defaultdict(list)
    for text in (out / "metrics.jsonl").read_text().splitlines() if (out / "metrics.jsonl").exists() else []:
        try:
            arms[arm_of(line := json.loads(text))].append(line)
        except json.JSONDecodeError:  # the line that was being written when the run died
            pass
    return [line for lines in arms.values() if len(lines) == settings.steps + 1 for line in lines]


def only_run(directory):
    """A lock on the output directory that lasts as long as the process; ValueError if another run holds it."""
    lock = open(directory / "lock", "w")
    try:
        if fcntl:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise ValueError(f"out: another run is writing to {directory}") from None
    return lock


def compare(settings, finished=None):
    """Run all arms but those whose lines are in `finished`, and write the output directory -> summary.

    finished: from `finished_arms`, to go on with an interrupted run; None begins anew. -> None if a signal stopped the run.
    """
    out, started, lines, resume = Path(settings.out), time.perf_counter(), list(finished or ()), finished is not None
    if not resume:
        shutil.rmtree(out / "checkpoints", ignore_errors=True)
    write(out / "settings.json", json.dumps(dataclasses.asdict(settings), indent=1) + "\n")
    write(out / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    base = taught_agent(settings) if settings.model == "tiny" else settings.model
    env = settings.make_env()
    floor = environments.random_floor(env, settings.evaluation_seeds())
    ceiling = environments.mean_ceiling(env, settings.evaluation_seeds())
    arms = [(algo, credit, seed) for seed in settings.seeds for algo in settings.algos for credit in settings.credits]
    missing = [arm for arm in arms if arm not in set(map(arm_of, lines))]
    evaluations = defaultdict(list)
    shown = {"success": "success", "valid": "format_valid", **{name: name for name in env.outcome()}}.items()
    with tqdm(total=len(missing) * (settings.steps + 1), desc=f"{len(missing)} arms", unit="step", smoothing=0.05) as bar, \
            open(out / "metrics.jsonl", "a") as file:
        def report(line):
            lines.append(line)
            file.write(json.dumps(line) + "\n")
            file.flush()
            if "eval_success" in line:
                evaluations[arm_of(line)].append((line["step"], line["eval_format_valid"]))
                if collapse(evaluations[arm_of(line)]) == line["step"]:
                    bar.write(f"warning: {' '.join(map(str, arm_of(line)))} has collapsed: under 10 % of its responses were "
                              "valid in three evaluations", file=sys.stderr)
                bar.write(f"{line['algo']:<4} {line['credit']:<8} seed {line['seed']}  step {line['step']:>3}  "
                          + "  ".join(f"{name} {100 * line['eval_' + key]:5.1f} %" for name, key in shown))
            bar.update()
        stopped = train_arms(settings, base, missing, report, resume)
    if stopped:
        print(f"interrupted: the same command with --resume goes on from {out}", file=sys.stderr)
        sys.exit(128 + stopped)
    # Arms that ran side by side have mixed their lines; in the end an arm's lines stand together.
    lines.sort(key=lambda line: (arms.index(arm_of(line)), line["step"]))
    write(out / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    results = [summarise([line for line in lines if arm_of(line) == arm]) for arm in arms]
    summary = {"config": described(settings), "floor": floor, "ceiling": ceiling, "arms": results}
    write(out / "summary.json", json.dumps(summary, indent=1) + "\n")
    print(table(summary))
    drawn = plot(summary, out / "curves.png")
    print(f"{(time.perf_counter() - started) / 60:.1f} minutes; written to {out}: metrics.jsonl, summary.json"
          + (", curves.png" if drawn else ""))
    return summary


def described(settings):
    """A run's settings, less the machine's directories, and what it ran on."""
    config = {name: value for name, value in dataclasses.asdict(settings).items() if name not in ("out", "cache")}
    return config | {"made_with": {"python": platform.python_version(), "torch": torch.__version__, "cores": os.cpu_count(),
                                   "transformers": transformers.__version__, "date": time.strftime("%Y-%m-%d")}}


def write(path, text):
    """Replace a file at once, so that a reader never sees half of it."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


# Evidence -------------------------------------------------------------------------------------------------------------


def agent_at(settings, checkpoint):
    """(policy, reference, tokenizer): the agent that training starts from, or the policy of one of its checkpoints."""
    base = taught_agent(settings) if settings.model == "tiny" else settings.model
    policy, reference, tokenizer = load_pair(base, settings)
    if checkpoint:
        saved = load_checkpoint(Path(checkpoint), settings.torch_device())
        if saved is None:
            raise ValueError(f"there is no whole checkpoint at {checkpoint}")
        try:
            policy.load_state_dict(saved["learner"]["policy"])
        except RuntimeError:
            raise ValueError(f"{checkpoint} is a checkpoint of another agent than these settings give") from None
    return policy, reference, tokenizer


def gradient_shares(learner, batch, rows):
    """{credit: squared gradient norm of the policy loss over `rows`, from (action tokens, reasoning tokens)}.

    Before the first update, so every ratio is 1. Each part keeps the whole's normaliser: the two gradients add up to the loss's.
    """
    parameters = [p for p in learner.policy.parameters() if p.requires_grad]
    shares, mask, action = {}, batch["response_mask"], batch["action_mask"]
    for credit in ("uniform", "actfocus"):
        weights = credit_weights(credit, batch["ref_energy"], action, mask, learner.settings)
        sums = [[torch.zeros_like(p) for p in parameters] for _ in range(2)]
        for part in micro_batches(batch | {"weights": weights}, rows, learner.micro_batch):
            logprobs = score(learner.policy, part["ids"], part["response_mask"], learner.settings.temperature).logprobs
            for total, tokens in zip(sums, (part["action_mask"], ~part["action_mask"])):
                loss, _ = weighted_policy_loss(logprobs, part["old_logprobs"], part["advantages"], part["weights"] * tokens,
                                               weight_sum=weights[rows].sum())
                for sum_, gradient in zip(total, torch.autograd.grad(loss, parameters, retain_graph=True)):
                    sum_ += gradient
        shares[credit] = tuple(sum(float(x.square().sum()) for x in total) for total in sums)
    return shares


def rank_correlation(x, y, rng, draws=1000):
    """Spearman's rho of x[N] and y[N] with a 95 % interval: percentiles over groups drawn again with replacement.

    Where x is nan (a group without an action token), the group is left out.
    """
    x, y = x[~torch.isnan(x)], y[~torch.isnan(x)]
    rho = spearman(x, y)
    if math.isnan(rho):
        return rho, rho, rho
    again = [spearman(x[rows], y[rows]) for rows in torch.from_numpy(rng.integers(len(x), size=(draws, len(x))))]
    return rho, *np.nanpercentile(again, [2.5, 97.5]).tolist()


def diagnose(settings, checkpoint, groups):
    """Print whether the paper's observation holds for an agent: does energy of action tokens track a group's reward variance?

    Plays `groups` boards G times each. Writes diagnosis.json and, with matplotlib, diagnosis.png to the output directory.
    """
    started, s = time.perf_counter(), settings
    policy, reference, tokenizer = agent_at(s, checkpoint)
    learner = Learner(policy, reference, "grpo", "actfocus", dataclasses.replace(s, lr=0.0))
    env, rng = s.make_env(), np.random.default_rng(s.seeds[0])
    torch.manual_seed(s.seeds[0])
    generator = torch.Generator(s.torch_device()).manual_seed(s.seeds[0])
    boards = draw_seeds(env, rng, groups, first_observations(env, s))
    envs = [copy.deepcopy(env) for _ in range(s.prompts * s.rollouts)]
    kinds = {"action tokens": lambda b: b["action_mask"], "reasoning tokens": lambda b: b["response_mask"] & ~b["action_mask"],
             "all response tokens": lambda b: b["response_mask"]}
    means, returns, shares, tokens = defaultdict(list), [], defaultdict(lambda: np.zeros(2)), defaultdict(int)
    for start in tqdm(range(0, groups, s.prompts), desc="playing", unit="batch", leave=False, disable=None):
        seeds = np.repeat(boards[start:start + s.prompts], s.rollouts).tolist()
        played = play(policy, tokenizer, envs, seeds, s, s.temperature, generator)
        returns.append(played.returns.view(-1, s.rollouts))
        batch = learner.prepare(*group_credit(played, returns[-1], None))
        if batch is None:
            raise Diverged("the model's numbers are not finite")
        for name in SIGNALS:
            signal = token_signal(name, **scores_of(batch))
            for kind, mask in kinds.items():
                of_group = lambda x: x.view(-1, s.rollouts * x.shape[1]).sum(1).cpu()  # [B, T] -> [P]
                means[name, kind].append(of_group(signal * mask(batch)) / of_group(mask(batch)))
        for kind, mask in kinds.items():
            tokens[kind] += int(mask(batch).sum())
        kept = variance_filter(returns[-1], keep=s.keep)
        if len(kept):
            rows = (kept[:, None] * s.rollouts + torch.arange(s.rollouts)).flatten().to(policy.device)
            for credit, squares in gradient_shares(learner, batch, rows).items():
                shares[credit] += squares
    returns = torch.cat(returns)  # [groups, G]
    variance = returns.double().var(1)
    means = {key: torch.cat(values) for key, values in means.items()}
    rho = {f"{name}, {kind}": rank_correlation(values, variance, rng) for (name, kind), values in means.items()}
    share = {credit: squares[0] / squares.sum() for credit, squares in shares.items()}
    found = {"agent": checkpoint or "base", "config": described(s), "groups": groups,
             "action_fraction": tokens["action tokens"] / tokens["all response tokens"],
             "groups_with_spread": len(variance_filter(returns, keep=1)), "spearman": rho, "grad_share_action": share,
             "seconds": time.perf_counter() - started}
    write(Path(s.out) / "diagnosis.json", json.dumps(found, indent=1) + "\n")
    drawn = plot_diagnosis(means, variance, rho, Path(s.out) / "diagnosis.png")
    print(f"{groups} groups of {s.rollouts}, {found['agent']} agent, temperature {s.temperature}; {found['groups_with_spread']} "
          f"groups have any spread of returns")
    print(f"action tokens: {100 * found['action_fraction']:.1f} % of what was generated")
    print("Spearman's rho of a group's reward variance with its mean signal, 95 % bootstrap interval over groups:")
    print(f"{'':10}" + "".join(f"{kind:28}" for kind in kinds))
    for name in SIGNALS:
        cells = [rho[f"{name}, {kind}"] for kind in kinds]
        print(f"{name:10}" + "".join(f"{'constant' if math.isnan(r) else f'{r:+.2f} ({low:+.2f}..{high:+.2f})':28}"
                                     for r, low, high in cells).rstrip())
    for credit, value in share.items():
        print(f"share of the squared gradient norm that comes from action tokens, {credit} credit: {100 * value:.1f} %")
    print(f"{found['seconds']:.0f} seconds; written to {s.out}: diagnosis.json" + (", diagnosis.png" if drawn else ""))
    return found


def plot_diagnosis(means, variance, rho, path):
    """Reward variance over mean energy, a point a group; False where matplotlib is not installed."""
    if not (plt := pyplot()):
        return False
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    for axis, kind in zip(axes, ("action tokens", "reasoning tokens")):
        axis.scatter(means["energy", kind], variance, s=9, alpha=0.6)
        axis.set(title=f"{kind}, rho {rho[f'energy, {kind}'][0]:+.2f}", xlabel="mean energy of the group's tokens (nats)")
    axes[0].set_ylabel("variance of the group's returns")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True


SHADES = (229, 222, 215, 208, 202, 196)  # of the terminal's 256 colours, pale to red


def shaded(text, weight, is_action, settings, colour):
    """A token as it is shown: reasoning dim, action tokens the redder the more they weigh; marks instead without colour."""
    if not is_action:
        return f"\x1b[2m{text}\x1b[0m" if colour else text
    if not colour:
        return f"[{text.strip()} {weight:.2f}]"
    place = (weight - 1) / settings.beta if settings.beta else 1.0
    return f"\x1b[30;48;5;{SHADES[min(int(place * len(SHADES)), len(SHADES) - 1)]}m{text}\x1b[0m"


def beside(board, tokens, width):
    """Lines of a board with a text to its right; tokens: [(text as it is, text as it is shown)], broken before a space."""
    left = max(map(len, board), default=0) + 3
    lines, length = [""], 0
    for plain, shown in tokens:
        if length + len(plain) > width - left and (plain[:1].isspace() or length >= width - left):
            lines, length = [*lines, ""], 0
        lines[-1] += shown
        length += len(plain)
    return [f"{a:{left}}{b}".rstrip() for a, b in itertools.zip_longest(board, lines, fillvalue="")]


def show(settings, checkpoint):
    """Print one episode turn by turn, the board beside the response, each token shaded by its ActFocus weight.

    It is the one with the largest advantage of a group of G, on the first of 20 boards that the group wins and loses.
    """
    s, colour = settings, sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    policy, reference, tokenizer = agent_at(s, checkpoint)
    env, rng = s.make_env(), np.random.default_rng(s.seeds[0])
    generator = torch.Generator(s.torch_device()).manual_seed(s.seeds[0])
    for seed in draw_seeds(env, rng, 20, first_observations(env, s)):
        played = play(policy, tokenizer, [copy.deepcopy(env) for _ in range(s.rollouts)], [seed] * s.rollouts, s, s.temperature,
                      generator)
        advantages = group_advantages(played.returns[None])[0]
        if played.success.any() and not played.success.all():
            break
    batch = Learner(policy, reference, "grpo", "actfocus", s).prepare(*group_credit(played, played.returns[None], None))
    if batch is None:
        raise Diverged("the model's numbers are not finite")
    row = int(advantages.argmax())
    if hasattr(env, "observation"):  # people read grids
        env.observation = "grid"
    env.reset(seed=seed)
    width = shutil.get_terminal_size((110, 24)).columns
    print(f"{env.name}, board of seed {seed}, {checkpoint or 'the base agent'}: the best of {s.rollouts} episodes. Reasoning "
          f"weighs {s.alpha}, action tokens 1 to {1 + s.beta}, " + ("the redder the more." if colour else "as in [Up 1.23]."))
    readable = lambda text: "".join(c if c.isprintable() else " " if c.isspace() else "?" for c in text)
    for turn in range(int(played.turns[row])):
        where = (played.turn_ids[row] == turn).nonzero()[:, 0]
        tokens = []
        for t in where.tolist():
            text = readable(tokenizer.decode([int(played.ids[row, t])], clean_up_tokenization_spaces=False))
            tokens.append((text, shaded(text, float(batch["weights"][row, t]), bool(played.action_mask[row, t]), s, colour)))
        print(f"\nturn {turn + 1}")
        print("\n".join(beside(env.render().splitlines(), tokens, width)))
        words = [i for i in played.ids[row, where].tolist() if i != tokenizer.eos_token_id]
        _, reward, *_ = env.step(tokenizer.decode(words, clean_up_tokenization_spaces=False))
        print(f"reward {reward:+.1f}")
    print("\n" + "\n".join(env.render().splitlines()))
    print(f"return {float(played.returns[row]):+.1f}, advantage {float(advantages[row]):+.2f} (the group's returns: "
          f"{' '.join(f'{value:.1f}' for value in played.returns.tolist())}), "
          + ("solved" if played.success[row] else "not solved"))


# The command line -----------------------------------------------------------------------------------------------------


class OneLineParser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: {' '.join(message.split())}\n")


def parse(arguments):
    """Command line -> (Settings, what to do, lock on the output directory, to be held).

    What to do: a namespace of `finished` (lines of finished arms, None to begin anew), `diagnose`, `show` (None, or a
    checkpoint's path, "" for the agent that training starts from) and `groups`. Anything wrong with it ends in one line on
    stderr and exit code 2.
    """
    parser = OneLineParser("train.py", description=__doc__.split("\n\n")[0], allow_abbrev=False,
                           formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for f in dataclasses.fields(Settings):
        if isinstance(f.default, bool):
            parser.add_argument("--" + f.name.replace("_", "-"), action=argparse.BooleanOptionalAction, default=f.default,
                                help=f.metadata["help"])
            continue
        many = isinstance(f.default, tuple)
        kind = type(f.default[0]) if many and f.default else str if many else type(f.default)
        choices = f.metadata["choices"]
        text = f.metadata["help"].replace("%", "%%") + (f" ({', '.join(choices)})" if choices else "")
        parser.add_argument("--" + f.name.replace("_", "-"), type=kind, default=f.default, help=text,
                            nargs="+" if many else None, metavar=f.name.split("_")[-1].upper())
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted run of the same --out and settings")
    parser.add_argument("--preset", choices=PRESETS, help="other defaults. paper: its boards, budgets and numbers of "
                        "steps, with a larger built-in agent; meant for a GPU")
    parser.add_argument("--diagnose", nargs="?", const="", metavar="CHECKPOINT", help="instead of training: measure on the "
                        "agent, or on a checkpoint, how energy and reward variance go together, and who gives the gradient")
    parser.add_argument("--groups", type=int, default=200, help="groups that --diagnose plays")
    parser.add_argument("--show", nargs="?", const="", metavar="CHECKPOINT", help="instead of training: print one episode of "
                        "the agent, or of a checkpoint, with each token's weight")
    known, _ = parser.parse_known_args(arguments)
    parser.set_defaults(**ENV_DEFAULTS.get(known.env, {}) | PRESETS.get(known.preset, {}))
    values = vars(parser.parse_args(arguments))
    resume, _ = values.pop("resume"), values.pop("preset")
    to_do = argparse.Namespace(**{name: values.pop(name) for name in ("diagnose", "groups", "show")})
    looks = [path for path in (to_do.diagnose, to_do.show) if path is not None]
    try:
        if to_do.groups < 2:
            raise ValueError(f"groups: {to_do.groups} is fewer than 2")
        if len(looks) + resume > 1:
            raise ValueError("--diagnose, --show and --resume exclude each other")
        for path in filter(None, looks):
            if not Path(path).is_file():
                raise ValueError(f"there is no checkpoint {path!r}")
        settings = Settings(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})
        settings.torch_device()
        if settings.model != "tiny":
            check_model(settings.model)
        for directory in (settings.out, settings.cache):
            Path(directory).mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=directory).close()
        lock = None if looks else only_run(Path(settings.out))
        to_do.finished = finished_arms(settings) if resume else None
    except (ValueError, OSError, RuntimeError) as error:
        parser.error(str(error))
    return settings, to_do, lock


def check_model(name):
    """ValueError unless the model is a directory, or an id that can be had, with a tokenizer that can chat."""
    if name.startswith(("/", "./", "../", "~")) and not Path(name).is_dir():
        raise ValueError(f"model: there is no directory {name!r}")
    try:
        transformers.AutoConfig.from_pretrained(name)
        chat = sampling.Chat(sampling.load_tokenizer(name), "")
        if chat.text(chat.bridge("", ended=True)).rstrip().endswith("<think>"):
            raise ValueError("its chat template opens the reasoning itself, so every response would lack the tag")
    except (OSError, ValueError) as error:
        raise ValueError(f"model: cannot use {name!r} ({str(error).splitlines()[0]})") from None


def main(arguments=None):
    settings, to_do, _lock = parse(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exit that ends the training processes too
    try:
        if to_do.diagnose is not None:
            diagnose(settings, to_do.diagnose, to_do.groups)
        elif to_do.show is not None:
            show(settings, to_do.show)
        else:
            compare(settings, to_do.finished)
    except KeyboardInterrupt:
        looking = (to_do.diagnose, to_do.show) != (None, None)  # "" stands for the agent that training starts from
        again = "" if looking else f": the same command with --resume goes on from {settings.out}"
        print(f"\ninterrupted{again}", file=sys.stderr)
        sys.exit(130)
    except (Diverged, OSError, ValueError) as error:  # numbers gone bad; a full disk, a directory that went away
        sys.exit(f"train.py: {error}")


if __name__ == "__main__":
    main()
