"""The built-in agents: a small Qwen2 with its own tokenizer, taught a game and then to play it badly.

    python -m extras.agent sokoban                                 # anew, into extras/agents/sokoban (minutes)
    python -m extras.agent sokoban --plan-in-think 1 --out DIR     # one that decides while it reasons; then --model DIR
    python -m extras.agent mygame:Game --out DIR                   # an environment of your own, as module:Class

The two stages matter: an agent that is weak because it never learnt the game has nothing that reinforcement could bring
out. This one knows the game (stage 1, an oracle's moves with some noise) and plays it badly (stage 2, poor
demonstrations), as an instruction-tuned model does. The shipped ones were taught once: on another machine the same
command gives another agent.
"""

import copy
import json
from pathlib import Path

import numpy as np
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from env import draw_boards, response
from extras.facts import facts
from extras.options import OneLineParser
from rollout import Chat, Transcript, pack, score
from train import AGENTS, DEFAULTS, EVALUATION_SEED, Settings

# The boards on which the agent learns in minutes, and what differs from the defaults of `teach` in its two stages
TAUGHT = {"sokoban": ({"walls": 0, "min_moves": 2, "max_moves": 6, "max_turns": 4, "max_actions": 8,
                       "observation": "coordinates"}, {}),
          "frozenlake": ({}, {"worse_noise": 0.95}),
          # A wrong number is hard to mend.
          "sudoku": ({"hint": True, "max_turns": 4, "max_actions": 8}, {"worse_noise": 0.3}),
          "shop": ({"products": 60, "page": 3}, {"noise": 0.1, "worse_noise": 0.6, "episodes": 2000})}
# `--teach`: share of random moves, episodes an update, learning rate times the model's width
FORMAT_NOISE, FORMAT_BATCH, LR_WIDTH = 0.75, 2, 0.1
CHAT_TEMPLATE = (  # the shape of Qwen2.5's
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
WORDS = r" ?[A-Z]?[a-z]+| ?\d| ?\|\||[:.]\n|\s|[^\s]"  # board symbols and digits stay apart, words keep their space


def tiny_tokenizer(texts, phrases=()):
    """A small byte-level tokenizer whose vocabulary is the words of `texts`; any other text falls back to bytes.

    phrases: strings that become one token each. The instructions that open every prompt are the same in every episode,
    so a model trained on one environment need not spell them out.
    """
    splitter = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(WORDS), "isolated"),
                                        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    words = {piece for text in texts for piece, _ in splitter.pre_tokenize_str(text)}
    vocabulary = sorted(pre_tokenizers.ByteLevel.alphabet()) + sorted(word for word in words if len(word) > 1)
    # ignore_merges: a known word is one token as it stands, so no merge table is needed to build it up from bytes.
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(vocabulary)}, [], ignore_merges=True))
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tags = ["<think>", "</think>", "<answer>", "</answer>"]
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in [*tags, *phrases]])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>",
                                   chat_template=CHAT_TEMPLATE, clean_up_tokenization_spaces=False)


def tiny_model(tokenizer, *, width=64, layers=2, heads=4, seed=0):
    """A small untrained Qwen2ForCausalLM for `tokenizer`, the same for the same seed.

    All query heads share one key-value head: on a CPU, what a rollout waits for is the reading of its cache.
    """
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=1, max_position_embeddings=2048, tie_word_embeddings=True,
        # The default 0.02 is meant for widths in the thousands; at this width training stalls with it.
        initializer_range=0.08,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen2ForCausalLM._from_config(config, attn_implementation="sdpa").float()


FILLERS = ["Let me look at the board.", "I should plan ahead.", "One wrong step can spoil the game.",
           "Let me check every move.", "First I look, then I move.", "There is no need to hurry."]


def demonstration(env, rng, noise, plan_in="answer"):
    """A response that states facts, with empty phrases in between, and plays the oracle's moves.

    Each move is a random one instead with probability `noise`. plan_in: where the moves are decided, in the "answer" or
    already in a last sentence of the reasoning ("think"), which the answer copies.
    """
    opening, closing = rng.choice(FILLERS, 2)
    sentences = [opening, *facts(env), closing]
    ahead, actions = copy.deepcopy(env), []
    while len(actions) < env.actions_per_turn and not (ahead.solved() or ahead.failed()):
        try:
            plan = ahead.oracle()
        except NotImplementedError:
            raise ValueError(f"{type(env).__name__} has no oracle() to demonstrate with") from None
        actions.append(plan[0] if plan and rng.random() >= noise else ahead.random_action(rng))
        ahead.move(actions[-1])
    if plan_in == "think":
        sentences.append(f"So I play {' and '.join(actions)}.")
    return response(actions, think=" ".join(sentences))


def demonstrations(env, tokenizer, seeds, rng, noise, desc, plan_in_think=0.0, limit=None):
    """One demonstrated episode a seed, that share of them with the plan in the reasoning -> Trajectories.

    ValueError: a response takes more tokens than `limit`, the environment's by default.
    """
    limit = limit or env.response_limit
    chat, transcripts = Chat(tokenizer, env.system_prompt), []
    encode = lambda text: tokenizer(text, add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
    for seed in tqdm(seeds, desc=desc, unit="episode", leave=False, disable=None):
        transcript = Transcript(chat, env, seed, max_context=10**9, max_response_tokens=0)
        plan_in = "think" if plan_in_think and rng.random() < plan_in_think else "answer"
        while transcript.respond(encode(demonstration(env, rng, noise, plan_in))):
            pass
        transcripts.append(transcript)
    data = pack(transcripts)
    longest = max(int((data.turn_ids == turn).sum(1).max()) for turn in range(int(data.turns.max())))
    if longest > limit:
        raise ValueError(f"a demonstrated response takes {longest} of this model's tokens, max_response_tokens is "
                         f"{limit} (extras.agent: --env-options response_limit=N)")
    return data


def imitate(model, data, steps, lr, rng, desc, batch=16, action_weight=8.0, warmup=50):
    """Supervised training on the responses of `data`; learning rate falls linearly to a twentieth."""
    optimizer = torch.optim.Adam(model.parameters(), lr, betas=(0.9, 0.95))
    by_length = data.lengths.argsort()  # neighbours are of like length, so a batch has little padding
    bar = tqdm(range(steps), desc=desc, unit="update", leave=False, disable=None)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / warmup) * max(0.05, 1 - step / steps)
        start = int(rng.integers(max(len(data) - batch, 0) + 1))
        rows = data.select(by_length[start:start + batch]).to(model.device)
        stats = score(model, rows.ids, rows.response_mask)
        # Action tokens are few but decide the game; unweighted, they are learnt last.
        weights = rows.response_mask + (action_weight - 1) * rows.action_mask
        loss = -(weights * stats.logprobs).sum() / weights.sum()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.2f}")


HOW = {"width": "of the model", "layers": "of the model",
       "episodes": "demonstrations of the first stage, the second has half",
       "steps": "updates of the first stage", "noise": "share of random moves in its demonstrations",
       "worse_steps": "updates of the second stage", "worse_noise": "share of random moves in its demonstrations",
       "plan_in_think": "share of the demonstrations that decide in the reasoning, which the answer copies"}


def teach(env, held_out, *, width=64, layers=2, episodes=3000, steps=1200, noise=0.2, worse_steps=80, worse_noise=0.75,
          plan_in_think=0.0):
    """An agent for those boards of `env` whose first observation is not in held_out -> (model, tokenizer); see HOW."""
    rng = np.random.default_rng(0)
    texts = ["system", "user", "assistant", *FILLERS]
    for seed in range(100):
        observation, _ = env.reset(seed=seed)
        over = False
        while not over:
            answer = demonstration(env, rng, 0.5, "think" if plan_in_think else "answer")
            texts += [observation, answer]
            observation, _, terminated, truncated, _ = env.step(answer)
            over = terminated or truncated
    tokenizer = tiny_tokenizer(texts, phrases=[env.system_prompt, env.format_reminder, *getattr(env, "phrases", [])])
    model = tiny_model(tokenizer, width=width, layers=layers, heads=width // 16)
    boards = draw_boards(env, rng, episodes, EVALUATION_SEED, held_out)
    good = demonstrations(env, tokenizer, boards, rng, noise, "demonstrations", plan_in_think)
    imitate(model, good, steps, 3e-3, rng, "1 of 2: know the game")
    if worse_steps:
        boards = draw_boards(env, rng, episodes // 2, EVALUATION_SEED, held_out)
        bad = demonstrations(env, tokenizer, boards, rng, worse_noise, "poor demonstrations", plan_in_think)
        imitate(model, bad, worse_steps, 1e-3, rng, "2 of 2: play it badly")
    return model, tokenizer


def format_lessons(settings, tokenizer):
    """`train.py --teach N`: N demonstrated episodes -> Trajectories. They show how to answer, not how to win.

    ValueError: there is nothing to demonstrate with, or a response would not fit.
    """
    s, rng, env = settings, np.random.default_rng(0), settings.make_env()
    held_out = {env.reset(seed=seed)[0] for seed in s.evaluation_seeds()}
    try:
        boards = draw_boards(env, rng, s.teach, EVALUATION_SEED, held_out)
        return demonstrations(env, tokenizer, boards, rng, FORMAT_NOISE, "demonstrations", limit=s.max_response_tokens)
    except ValueError as error:
        raise ValueError(f"teach: {error}") from None


def teach_format(settings, model, tokenizer, data):
    """Fine-tune any model on format_lessons, into settings.agent."""
    s, rng = settings, np.random.default_rng(0)
    width, steps = model.get_input_embeddings().weight.shape[1], -(-s.teach // FORMAT_BATCH)
    with s.autocast():
        imitate(model.to(s.torch_device), data, steps, LR_WIDTH / width, rng,
                f"teaching the format, {s.teach} episodes",
                batch=FORMAT_BATCH, action_weight=1.0, warmup=max(steps // 5, 1))
    part = Path(f"{s.agent}.part")
    save(s, model, tokenizer, part)
    part.rename(s.agent)  # whole or not at all


def save(settings, model, tokenizer, out):
    """The agent, and the boards that it knows: with --model `out`, they are the default."""
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    # With the length that it is told: part of a phrase that is one token to a built-in agent, so another would be new.
    (out / "env.json").write_text(json.dumps({settings.env: settings.board_options()}, indent=1) + "\n")


def main():
    parser = OneLineParser("python -m extras.agent", description=__doc__.split("\n\n")[0])
    parser.add_argument("env", help="environment, or module:Class")
    parser.add_argument("--out", type=Path, help="directory (default: extras/agents/ENV)")
    parser.add_argument("--env-options", nargs="+", metavar="KEY=VALUE", help="other boards than the shipped agent's")
    for name, text in HOW.items():
        default = teach.__kwdefaults__[name]
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default),
                            metavar="N" if isinstance(default, int) else "SHARE",
                            help=f"{text} (default: {default}, or the game's own in TAUGHT)")
    options = parser.parse_args()
    boards, how = TAUGHT.get(options.env, ({}, {}))
    how = how | {name: getattr(options, name) for name in HOW if getattr(options, name) is not None}
    for name, share in how.items():
        if isinstance(share, float) and not 0 <= share <= 1:
            parser.error(f"{name}: {share} is not in [0, 1]")
    try:
        given = options.env_options or [f"{key}={json.dumps(value)}" for key, value in boards.items()]
        settings = Settings(env=options.env, env_options=tuple(given), **DEFAULTS.get(options.env, {}))
        env, out = settings.make_env(), options.out or AGENTS / options.env
        held_out = {env.reset(seed=seed)[0] for seed in settings.evaluation_seeds()}
        model, tokenizer = teach(env, held_out, **how)
        save(settings, model, tokenizer, out)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(f"{sum(p.numel() for p in model.parameters())} parameters, written to {out}")


if __name__ == "__main__":
    main()
