"""Train a language-model agent with PPO and GRPO, under uniform credit and under ActFocus, and compare.

    python train.py                                   # four arms on Sokoban, a built-in agent, no downloads
    python train.py --env frozenlake --algos grpo     # `--help` lists every setting with its default
    python train.py --algos grpo --credits uniform actfocus carl carl+actfocus        # beside a rival

An arm is one (algorithm, credit, seed), and `Arm.step` one step of its training: play P boards G times (rollout.py),
keep the groups with the largest spread, score their tokens under the old policy and the frozen reference, turn returns
into advantages and energies into weights (actfocus.py), update on minibatches. All arms of a seed start from the same
agent; those that keep equally many trajectories in every step also see the same boards.

The output directory gets metrics.jsonl (a line for each step of each arm) and summary.json, and in arms/ the log and
the last checkpoint of each arm, from which `--resume` goes on to the same metrics as if nothing had happened.
"""

import copy
import importlib
import json
import math
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn

import env as environments
from actfocus import CREDITS, SIGNALS, Credit, Critic, check_tensors, gae, token_logprobs, weighted_policy_loss
from kernels import logits_by_block, token_stats, weighted_loss
from rollout import Trajectories, load_agent, rollout, score, states, to_tokens

AGENTS = Path(__file__).resolve().parent / "extras" / "agents"  # the built-in ones, taught by `python -m extras.agent`
# An environment's own: no filter on FrozenLake (in the paper, under GRPO) and in the shop; Sudoku is wordy.
DEFAULTS = {"frozenlake": {"keep": 1.0}, "shop": {"keep": 1.0}, "sudoku": {"max_response_tokens": 140}}
EVALUATION_SEED, VALIDATION_SEED = 1_000_000_000, 2_000_000_000  # training boards are drawn from below both
EVAL_TEMPERATURE = 0.5  # as in the paper
VALUE_CLIP = 0.5  # PPO: nothing is gained by moving a value further than this from its old one
MAX_GRAD_NORM = 1.0  # gradients are scaled down to this norm


def extra(name):
    """A module of extras/, imported when it is asked for: none is needed to understand this file."""
    return importlib.import_module(f"extras.{name}")


def setting(default, help, low=0, high=None, choices=None):
    """A field of Settings: its comment is its --help text, its bounds are checked."""
    return field(default=default, metadata={"help": help, "low": low, "high": high, "choices": choices})


@dataclass(frozen=True)
class Settings:
    """Everything that decides a run; the command line adds DEFAULTS. Where the paper's value differs, it is named."""

    env: str = setting("sokoban", f"environment: {', '.join(environments.ENVS)}, or module:Class")
    env_options: tuple[str, ...] = setting((), "its options, KEY=VALUE, in place of the built-in agent's own boards")
    model: str = setting("tiny", "'tiny' (built in) or a Hugging Face id or directory (paper: Qwen2.5 Instruct)")
    teach: int = setting(0, "demonstrated episodes that teach the model to answer in the format, before training", 0)
    algos: tuple[str, ...] = setting(("ppo", "grpo"), "algorithms to compare", choices=("ppo", "grpo"))
    credits: tuple[str, ...] = setting(("uniform", "actfocus"), f"of {', '.join(CREDITS)}, module:Class; + joins some, "
                                       "each with settings of its own if wanted: actfocus:alpha=0.3,lr=3e-5")
    seeds: tuple[int, ...] = setting((0,), "seeds, one arm each for every algorithm and credit", 0, 2**63 - 1)
    out: str = setting("runs/latest", "output directory")
    # the method
    alpha: float = setting(0.1, "ActFocus: weight of reasoning tokens", 0, 1)
    beta: float = setting(0.5, "ActFocus: how far the signal raises the weight of action tokens", 0)
    signal: str = setting("energy", f"ActFocus: what ranks the action tokens: {', '.join(SIGNALS)}")
    # the loop
    steps: int = setting(60, "rollout-update iterations (paper 200)", 0)
    prompts: int = setting(8, "boards a step, P", 1)
    rollouts: int = setting(16, "trajectories a board, G", 2)
    keep: float = setting(0.25, "share of the groups kept, those with the largest spread; 1: no filter", 0.01, 1)
    minibatch: int = setting(32, "trajectories an optimiser update; a step's batch is passed through once", 1)
    micro_batch: int = setting(16, "trajectories a forward pass; changes memory and speed, not the result", 1)
    lr: float = setting(1e-4, "Adam's learning rate of the policy (paper 1e-6, for models a thousand times larger)", 0)
    critic_lr: float = setting(3e-3, "PPO: learning rate of the critic (paper 1e-5)", 0)
    clip_low: float = setting(0.2, "ratio is clipped below at 1 - this", 0, 1)
    clip_high: float = setting(0.28, "ratio is clipped above at 1 + this", 0)
    gamma: float = setting(1.0, "PPO: discount a token", 0, 1)
    lam: float = setting(1.0, "PPO: GAE's lambda", 0, 1)
    entropy_coef: float = setting(0.001, "entropy bonus: a plain mean over the tokens that have weight", 0)
    kl_coef: float = setting(0.0, "penalty on the KL to the frozen reference (paper 0; 0.001 on WebShop)", 0)
    temperature: float = setting(1.0, "of the training rollouts", 0.01)
    max_response_tokens: int = setting(100, "length at which a response is cut (paper 400)", 1)
    # evaluation
    eval_every: int = setting(10, "steps between evaluations and checkpoints; also at the start and the end", 1)
    eval_boards: int = setting(64, "fixed boards, never trained on (paper 32)", 1)
    eval_rollouts: int = setting(4, "trajectories a board (paper 16)", 1)
    boards: str = setting("evaluation", "which boards evaluations play", choices=("evaluation", "validation"))
    # the machine
    device: str = setting("auto", "auto, cpu or cuda; on a GPU, forward passes compute in bfloat16")
    gradient_checkpointing: bool = setting(False, "recompute layers in the backward pass: less memory, more time")
    jobs: int = setting(0, "arms trained side by side; 0: one a CPU core, one in all for --model on a GPU", 0)

    def __post_init__(self):
        extra("options").check(self)  # ValueError, in one line

    @property
    def base(self):
        """Directory, or Hugging Face id, of the model as it was given."""
        return self.model if self.model != "tiny" else str(AGENTS / self.env)

    @property
    def agent(self):
        """Directory, or Hugging Face id, of the agent that training starts from."""
        return str(Path(self.out).resolve() / "agent") if self.teach else self.base

    def board_options(self):
        """Options of the environment: the given ones, or else those that the agent was taught on."""
        taught = Path(self.base) / "env.json"  # what `python -m extras.agent` leaves: {environment: its options}
        known = json.loads(taught.read_text()) if taught.exists() and not self.env_options else {}
        options = known.get(self.env, extra("options").key_values(self.env_options))
        return {"response_limit": self.max_response_tokens, **options}

    def make_env(self):
        return environments.make(self.env, **self.board_options())

    @property
    def torch_device(self):
        return torch.device(self.device if self.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")

    def autocast(self):
        """The context of a forward pass. Weights and Adam's state stay float32: 1e-6 would round to nothing."""
        return torch.autocast(self.torch_device.type, torch.bfloat16, enabled=self.torch_device.type == "cuda")

    def evaluation_seeds(self):
        start = EVALUATION_SEED if self.boards == "evaluation" else VALIDATION_SEED
        return range(start, start + self.eval_boards)


@dataclass
class Batch(Trajectories):
    """The trajectories of a step with what stays fixed during its updates: [B, T] each, 0 outside the response."""

    old_logprobs: torch.Tensor  # of the policy that sampled
    old_entropy: torch.Tensor  # nats
    energy: torch.Tensor  # of the frozen reference, nats
    signal: torch.Tensor  # what ActFocus ranks action tokens by: the energy, or another of SIGNALS
    ref_logprobs: torch.Tensor  # of the frozen reference
    old_values: torch.Tensor  # PPO: V before each token
    gae_advantages: torch.Tensor = None  # PPO, not yet whitened
    value_targets: torch.Tensor = None  # PPO
    advantages: torch.Tensor = None
    weights: torch.Tensor = None  # 0: the policy's loss leaves the token out


@torch.no_grad()
def score_logits(model, ids, response_mask, old_logprobs, *functions):
    """Each function(logits[n, V], targets[n], old_logprobs[n]) -> [n], of a model's raw logits, as [B, T] tensors."""
    hidden, weight, bias, targets = states(model, ids, response_mask)
    old_logprobs = old_logprobs[response_mask]
    made = {function: torch.zeros(len(targets), device=ids.device) for function in functions}  # equal ones run once
    with torch.autocast(ids.device.type, enabled=False):
        for rows, logits in logits_by_block(hidden, weight, bias):
            for function, values in made.items():
                values[rows] = function(logits, targets[rows], old_logprobs[rows]).float()
    return [to_tokens(made[function], response_mask) for function in functions]


class Arm:
    """One (algorithm, credit, seed): its agent, its optimisers and its luck."""

    def __init__(self, settings, algo, credit, seed):
        self.credit = extra("options").make_credit(credit, algo, settings)
        self.settings = s = self.credit.settings
        torch.manual_seed(seed)
        self.policy, self.tokenizer = load_agent(s.agent, s.torch_device)
        self.agent = extra("runs").fingerprint(self.policy, self.tokenizer)  # a checkpoint is of this one alone
        self.reference = copy.deepcopy(self.policy).requires_grad_(False)
        if s.torch_device.type == "cuda":  # never updated: half the memory, a little more rounding
            self.reference.bfloat16()
        if s.gradient_checkpointing:
            extra("guard").recompute_layers(self.policy)
        self.critic = Critic(self.policy) if algo == "ppo" else None
        learning = [(self.policy, s.lr)] + ([(self.critic, s.critic_lr)] if self.critic else [])
        self.optimizers = [torch.optim.Adam(x.parameters(), rate) for x, rate in learning]
        self.learners = [self.policy, *self.optimizers, *filter(None, [self.critic])]  # what a checkpoint holds
        self.env = s.make_env()
        self.held_out = {self.env.reset(seed=seed)[0] for seed in s.evaluation_seeds()}
        self.rng = np.random.default_rng(seed)  # boards and minibatches
        self.generator = torch.Generator(s.torch_device).manual_seed(seed)  # tokens
        self.micro_batch, self.bad_updates = s.micro_batch, 0  # halved when memory runs out; how many came in a row

    def play(self, seeds, temperature, generator, **options):
        """One episode a seed -> Trajectories."""
        with self.settings.autocast():
            return rollout(self.policy, self.tokenizer, [copy.deepcopy(self.env) for _ in seeds], seeds=seeds,
                           temperature=temperature, max_response_tokens=self.settings.max_response_tokens,
                           generator=generator, **options)

    def step(self):
        """One step of training -> metrics."""
        started, s, metrics_of = time.perf_counter(), self.settings, extra("metrics")
        boards = environments.draw_boards(self.env, self.rng, s.prompts, EVALUATION_SEED, self.held_out)
        played = self.credit.play(self, boards)  # P * G episodes
        metrics = metrics_of.episodes(played) | {"rollout_seconds": time.perf_counter() - started, "updates": 0}
        chosen = self.credit.filter(played)
        metrics |= metrics_of.groups(played, chosen, s.prompts)
        if len(chosen):  # else there is nothing to learn from: every group got one return
            batch, totals = self.make_batch(chosen), Counter()
            batch.advantages = self.credit.advantages(batch)  # [B, T]
            batch.weights = self.credit.weights(batch).where(batch.response_mask, 0.0)  # [B, T]
            check_tensors(batch.ids, where=batch.weights > 0, advantages=batch.advantages)  # maybe a user's own
            order = torch.from_numpy(self.rng.permutation(len(batch))).to(batch.ids.device)
            for minibatch in map(batch.select, order.split(s.minibatch)):
                if minibatch.weights.any():  # else Adam's momentum alone would move the policy
                    totals.update(self.update(self.gradient(minibatch)))
            metrics |= metrics_of.updates(batch, totals) | self.credit.metrics(batch)
        return metrics | {"seconds": time.perf_counter() - started,
                          "tokens_per_second": metrics["generated_tokens"] / metrics["rollout_seconds"]}

    @torch.no_grad()
    def make_batch(self, chosen):
        """Trajectories -> Batch: log-probs, energies and values, which stay fixed during the updates."""
        s = self.settings
        def fixed(part):
            # Not the sampler's: the same forward pass for old and new makes the first ratio 1 up to rounding.
            old = score(self.policy, part.ids, part.response_mask, s.temperature)
            of_reference = score_logits(self.reference, part.ids, part.response_mask, old.logprobs, SIGNALS["energy"],
                                        SIGNALS[s.signal], lambda z, y, _: token_logprobs(z / s.temperature, y))
            values = self.critic(part.ids, part.response_mask) if self.critic else torch.zeros_like(old.logprobs)
            return old.logprobs, old.entropy, *of_reference, values
        chosen, batch = chosen.to(s.torch_device), Batch.__new__(Batch)
        with s.autocast():
            scores = chosen.in_parts(fixed, self.micro_batch)
        names = ("old_logprobs", "old_entropy", "energy", "signal", "ref_logprobs", "old_values")
        vars(batch).update(vars(chosen) | dict(zip(names, scores)))  # no __init__: what a credit attached comes along
        if self.critic:
            if not torch.isfinite(batch.old_values).all():
                raise FloatingPointError("the critic's values are not finite")
            mask = batch.response_mask
            last = mask & (mask.flip(1).cumsum(1).flip(1) == 1)  # the return is paid on the last response token
            batch.gae_advantages, batch.value_targets = gae(last * batch.returns[:, None], batch.old_values, mask,
                                                            gamma=s.gamma, lam=s.lam)
        return batch

    def gradient(self, minibatch):
        """Gradients of a minibatch's loss, added up over micro-batches -> sums for the log."""
        totals = Counter()
        for _, part in minibatch.parts(self.micro_batch):
            with self.settings.autocast():
                loss, hidden, log = self.loss(part, minibatch)
            hidden.retain_grad()
            loss.backward()
            squares = hidden.grad.float().square().sum(-1)  # [N]
            log |= {"grad_action": squares[part.action_mask[part.response_mask]].sum(), "grad_all": squares.sum()}
            totals.update({name: float(value) for name, value in log.items()})
        return totals

    def loss(self, part, minibatch):
        """A micro-batch's share of its minibatch's loss -> (loss, hidden[N, H], sums for the log)."""
        s, mask, trained = self.settings, part.response_mask, part.weights > 0
        n, tokens = trained.sum(), (minibatch.weights > 0).sum().clamp(min=1)
        weight_sum, entropy_share = self.credit.normaliser(minibatch), s.entropy_coef / tokens
        hidden, weight, bias, targets = states(self.policy, part.ids, mask)
        if type(self.credit).ratio is Credit.ratio and not s.kl_coef:  # the usual ratio, no other loss: one pass
            loss, stats = weighted_loss(hidden, weight, targets, part.old_logprobs[mask], part.advantages[mask],
                                        part.weights[mask], bias=bias, temperature=s.temperature, clip_low=s.clip_low,
                                        clip_high=s.clip_high, weight_sum=weight_sum, entropy_coef=entropy_share)
            policy_loss = loss + entropy_share * stats["entropy"].sum()  # for the log: without the bonus
        else:  # a ratio of several tokens, or a second loss
            made = token_stats(hidden, weight, targets, bias=bias, temperature=s.temperature)  # [N] each
            new, _, entropy = (to_tokens(values, mask) for values in made)
            logprobs, clip_low, clip_high = self.credit.ratio(new, part)
            policy_loss, stats = weighted_policy_loss(logprobs, part.old_logprobs, part.advantages, part.weights,
                                                      clip_low=clip_low, clip_high=clip_high, weight_sum=weight_sum)
            # Squared log-ratio / 2: unlike the paper's k1, its gradient on the policy's own samples is the KL's.
            kl = 0.5 * (new - part.ref_logprobs)[trained].square().sum() / tokens if s.kl_coef else 0.0
            loss = policy_loss - entropy_share * entropy[trained].sum() + s.kl_coef * kl
        log = {"policy_loss": policy_loss.detach(), "n": n}
        log |= {name: stats[name] * n for name in ("approx_kl", "clip_fraction", "ratio_mean")}
        if self.critic:
            values, old, target = self.critic(part.ids, part.response_mask), part.old_values, part.value_targets
            clipped = old + (values - old).clamp(-VALUE_CLIP, VALUE_CLIP)
            error = torch.maximum((values - target) ** 2, (clipped - target) ** 2).sum()
            value_loss = 0.5 * error / minibatch.response_mask.sum()
            log["value_loss"] = value_loss.detach()
            loss = loss + value_loss
        return loss, hidden, log

    def update(self, log):
        """A step of the optimisers, or none where a number is not finite -> the log of it."""
        norms = [float(nn.utils.clip_grad_norm_(group["params"], MAX_GRAD_NORM))
                 for optimizer in self.optimizers for group in optimizer.param_groups]
        finite = all(map(math.isfinite, [*norms, *log.values()]))
        for optimizer in self.optimizers:
            if finite:
                optimizer.step()
            optimizer.zero_grad()
        self.bad_updates = 0 if finite else self.bad_updates + 1
        if self.bad_updates == 3:
            raise FloatingPointError("three updates in a row had a loss or gradient that is not finite")
        return {**log, "grad_norm": norms[0], "updates": 1, "skipped_updates": 0} if finite else {"skipped_updates": 1}

    def evaluate(self):
        """Success on the evaluation boards -> metrics; the generator starts from one seed each time."""
        s = self.settings
        played = self.play([seed for seed in s.evaluation_seeds() for _ in range(s.eval_rollouts)], EVAL_TEMPERATURE,
                           torch.Generator(s.torch_device).manual_seed(0))
        wins = played.success.view(s.eval_boards, s.eval_rollouts).float().mean(1)  # [boards]
        metrics = extra("metrics").episodes(played) | extra("facts").accuracy(played, self.env)
        return {f"eval_{name}": x for name, x in metrics.items()} | {"eval_board_success": wins.tolist()}


def train_arm(settings, algo, credit, seed):
    """Train one arm, from its checkpoint where there is one."""
    runs, s = extra("runs"), settings
    arm, files = Arm(s, algo, credit, seed), runs.ArmFiles(s.out, algo, credit, seed)
    arm.make_batch, arm.gradient = runs.saving_memory(arm, arm.make_batch), runs.saving_memory(arm, arm.gradient)
    for step in range(files.restore(arm), s.steps + 1):  # step 0: the evaluation before training
        line, evaluating = {"algo": algo, "credit": credit, "seed": seed, "step": step}, step % s.eval_every == 0
        arm.credit.step = step
        try:
            line |= arm.step() if step else {}
            line |= arm.evaluate() if evaluating or step == s.steps else {}
        except Exception as error:  # a credit, an environment or a model may be the user's own
            raise ValueError(f"{algo} {credit} seed {seed}, step {step}: {runs.located(error)}") from error
        if files.record(line, arm, checkpoint=evaluating or step == s.steps):
            return


def main(arguments=None):
    parser, runs = extra("options").SettingsParser("train.py", description=__doc__.split("\n\n")[0]), extra("runs")
    parser.add_argument("--resume", action="store_true", help="go on with a run, or add seeds, credits, algos, steps")
    settings, options = parser.parse_settings(arguments)
    try:
        agent, _lock = runs.open_run(settings, options.resume)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    try:
        runs.compare(train_arm, settings, agent)
    except (OSError, ValueError) as error:  # numbers gone bad; a full disk, a directory that went away
        sys.exit(f"train.py: {error}")


if __name__ == "__main__":
    from train import main  # extras import this file as `train`: there must be one Settings, not two
    main()
