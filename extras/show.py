"""One episode, turn by turn, each token shaded by its ActFocus weight: in the terminal, or as a page for a browser.

    python -m extras.show                                                         # the built-in agent
    python -m extras.show --checkpoint runs/latest/arms/grpo-actfocus-0.pt        # after training
    python -m extras.show --html episode.html      # one file: point at a token, or use the arrow keys, for its numbers

A group of G episodes is played on one board, `--seed`; shown is the one with the largest advantage.
"""

import copy
import html
import itertools
import json
import os
import shutil
import sys
import textwrap
from collections import namedtuple
from pathlib import Path

import torch

from actfocus import ActFocus, Credit, group_advantages
from env import draw_boards
from extras.options import SettingsParser, make_credit
from extras.runs import load_checkpoint, without_format
from train import EVALUATION_SEED, Arm

# logprob: the policy's; reference: the frozen reference's
Token = namedtuple("Token", "text weight is_action energy z logprob reference")
SHADES = (229, 222, 215, 208, 202, 196)  # of the terminal's 256 colours, pale to red
CHECKPOINT = "an arm's, DIR/arms/*.pt, with its settings (default: the agent before training)"


def saved_settings(checkpoint):
    """The settings of the run that a checkpoint belongs to: they stand in settings.json beside its folder."""
    out = Path(checkpoint).parent.parent  # where it is now: a directory may have been moved
    path = out / "settings.json"
    return {**json.loads(path.read_text()), "out": str(out)} if path.exists() else {}


def credit_of(checkpoint, settings):
    """What a checkpoint's arm was trained with, where it weighs as ActFocus and plays plain groups; else ActFocus."""
    log = Path(checkpoint).with_suffix(".jsonl")
    own = json.loads(log.read_text().partition("\n")[0])["credit"] if log.exists() else "actfocus"
    kind = type(make_credit(own, "grpo", settings))
    return own if issubclass(kind, ActFocus) and kind.play is Credit.play else "actfocus"


def agent_at(parser, checkpoint, arguments=None):
    """(Arm, options): the agent that training starts from, or the policy of one of its checkpoints."""
    if checkpoint and not Path(checkpoint).is_file():
        parser.error(f"there is no checkpoint {checkpoint!r}")
    settings, options = parser.parse_settings(arguments, **(saved_settings(checkpoint) if checkpoint else {}))
    try:
        arm = Arm(settings, "grpo", credit_of(checkpoint, settings) if checkpoint else "actfocus", settings.seeds[0])
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if checkpoint:
        saved = load_checkpoint(Path(checkpoint), settings.torch_device)
        if saved is None:
            parser.error(f"there is no whole checkpoint at {checkpoint}")
        if saved["agent"] != arm.agent:
            parser.error(f"{checkpoint} was trained from agent {saved['agent']}, but {settings.agent} is {arm.agent}")
        arm.policy.load_state_dict(saved["learners"][0])
        arm.credit.step = saved["step"]
    return arm, options


def best_of_group(arm, seed):
    """A group played on the board of `seed` -> (its Batch, the row with the largest advantage, advantages[G])."""
    batch = arm.make_batch(arm.play([seed] * arm.settings.rollouts, arm.settings.temperature, arm.generator))
    batch.weights, advantages = arm.credit.weights(batch), group_advantages(batch.returns[None])[0]
    return batch, int(advantages.argmax()), advantages


def turns(arm, batch, row):
    """[(board's lines, the response's Tokens, reward)] of an episode, and the board at its end."""
    env, shown = copy.deepcopy(arm.env), []
    if hasattr(env, "observation"):  # people read grids
        env.observation = "grid"
    env.reset(seed=int(batch.seeds[row]))
    decode = lambda ids: arm.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    ranked = batch.signal[batch.action_mask]
    ranked = ranked if len(ranked) else torch.zeros(1)
    z = (batch.signal - ranked.mean()) / (ranked.var(correction=0) + 1e-6).sqrt()  # as token_weights has it
    columns = (batch.weights, batch.action_mask, batch.energy, z, batch.old_logprobs, batch.ref_logprobs)
    columns = [x[row].tolist() for x in columns]
    for turn in range(int(batch.turns[row])):
        where = (batch.turn_ids[row] == turn).nonzero()[:, 0]
        tokens = [Token(decode([int(batch.ids[row, t])]), *(x[t] for x in columns)) for t in where]
        board = env.render().splitlines()
        shown.append((board, tokens, env.step(batch.texts[row][turn])[1]))
    return shown, env.render().splitlines()


def reasoning_weighs(shown):
    """The weight of an episode's reasoning as text: 0.1, or from the least to the most where a credit varies it."""
    weights = [token.weight for _, tokens, _ in shown for token in tokens if not token.is_action]
    return " to ".join(dict.fromkeys(f"{x:.3g}" for x in (min(weights), max(weights))))


def shaded(text, weight, is_action, beta, colour):
    """(what is seen of a token, what is printed): reasoning dim, actions the redder the more they weigh, or marked."""
    text = "".join(c if c.isprintable() else " " if c.isspace() else "?" for c in text)
    if is_action and not colour:
        text = f"{' ' * text[:1].isspace()}[{text.strip()} {weight:.2f}]"
    if not colour:
        return text, text
    if not is_action:
        return text, f"\x1b[2m{text}\x1b[0m"
    shade = SHADES[min(int((weight - 1) / beta * len(SHADES)) if beta else len(SHADES), len(SHADES) - 1)]
    return text, f"\x1b[30;48;5;{shade}m{text}\x1b[0m"


def beside(board, tokens, width):
    """Lines of a board with a text to its right, or below it where there is no room; tokens: [(seen, printed)]."""
    left = max(map(len, board), default=0) + 3
    below = width - left < 20
    room, lines, length = width if below else width - left, [""], 0
    for seen, printed in tokens:
        over = length + len(seen) - room
        if length and (over > 1 or over == 1 and seen[:1].isspace()):  # a full stop may stand out by one
            lines, length = [*lines, ""], 0
            if seen[:1].isspace():
                seen, printed = seen[1:], printed.replace(seen[0], "", 1)
        lines[-1] += printed
        length += len(seen)
    if below:
        return [*board, *filter(None, lines)]
    return [f"{a:{left}}{b}".rstrip() for a, b in itertools.zip_longest(board, lines, fillvalue="")]


PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>
<style>
body {{ font: 14px/1.6 ui-monospace, Menlo, Consolas, monospace; color: #1f2328;
  max-width: 62rem; margin: 1rem auto 5rem; padding: 0 1rem }}
h1 {{ font-size: 1rem }}
section {{ display: flex; flex-wrap: wrap; gap: 0 2rem; border-top: 1px solid #d0d7de; padding: .5rem 0 }}
section p {{ flex: 1 1 20rem; margin: .2rem 0; white-space: pre-wrap }}
pre {{ margin: .2rem 0; font: inherit; line-height: 1.25 }}
.note {{ color: #57606a; font-style: italic; flex-basis: 100% }}
[data-t] {{ color: #6e7781 }} .act {{ color: #1f2328; border-radius: 2px }}
[data-t]:hover, [data-t]:focus {{ outline: 2px solid #0969da }}
[data-t]:hover::after, [data-t]:focus::after {{ content: attr(data-t); position: fixed; left: 0; right: 0; bottom: 0;
  padding: .6rem 1rem; background: #1f2328; color: #fff; white-space: pre-wrap; font-style: normal }}
table {{ border-spacing: 0 .2rem; width: 100% }}
td {{ padding: 0 .6rem 0 0 }} td + td {{ white-space: nowrap }} td + td + td {{ width: 60% }}
meter {{ width: 100%; height: 1.6rem }}
::-webkit-meter-optimum-value {{ background: #ff7a4d }} ::-moz-meter-bar {{ background: #ff7a4d }}
</style>
<h1>{title}</h1>
<p>Reasoning and tags weigh {alpha}; action tokens 1 to {high:g}, the redder the more. Point at a token for its
numbers, or press Tab and then the arrow keys.</p>
<table><tr><td colspan="3">The action tokens' share in the group's {episodes} episodes</td></tr>
{bars}</table>
{sections}
<script>
addEventListener("keydown", e => {{
  const all = [...document.querySelectorAll("[data-t]")], at = all.indexOf(document.activeElement)
  const step = {{ArrowRight: 1, ArrowLeft: -1}}[e.key]
  if (step && at >= 0) {{ all[Math.min(Math.max(at + step, 0), all.length - 1)].focus(); e.preventDefault() }}
}})
</script>
</html>
"""


def action_shares(arm, batch):
    """[(what of, the action tokens' share of it)] under ActFocus, and last the gradient's under uniform credit.

    Where all returns are alike there is no gradient to speak of, and the last two are left out.
    """
    batch.advantages, weights, uniform = arm.credit.advantages(batch), batch.weights, batch.response_mask.float()
    share = lambda x: float(x[batch.action_mask].sum() / x.sum())
    shares = [("of the tokens", share(uniform)), ("of the weight", share(weights))]
    if not batch.advantages.any():
        return shares
    for name, batch.weights in (("of the same, uniform credit", uniform), ("of the squared gradient", weights)):
        totals = arm.gradient(batch)
        shares.insert(2, (name, totals["grad_action"] / max(totals["grad_all"], 1e-30)))
    return shares


def page(shown, last, title, settings, shares):
    """The episode as HTML that needs nothing else."""
    s, sections = settings, []
    for number, (board, tokens, reward) in enumerate(shown, 1):
        spans = []
        for token in tokens:
            numbers = (f"{token.text.strip() or repr(token.text)[1:-1]}: energy {token.energy:.3f}, z {token.z:+.2f}, "
                       f"weight {token.weight:.3f}, log-prob {token.logprob:.3f}, reference's {token.reference:.3f}")
            share = min(max((token.weight - 1) / s.beta, 0), 1) if s.beta else 1
            colour = f"rgb(255,{224 - 144 * share:.0f},{186 - 142 * share:.0f})"
            shade = f' class="act" style="background: {colour}"' if token.is_action else ""
            spans.append(f'<span tabindex="0" data-t="{html.escape(numbers)}"{shade}>{html.escape(token.text)}</span>')
        sections.append(f"<section><pre>turn {number}\n{html.escape(chr(10).join(board))}</pre><p>{''.join(spans)}</p>"
                        f'<p class="note">reward {reward:+.1f}</p></section>')
    sections.append(f"<section><pre>{html.escape(chr(10).join(last))}</pre><p class=\"note\">return "
                    f"{sum(reward for *_, reward in shown):+.1f}</p></section>")
    bars = "".join(f'<tr><td>{name}</td><td>{100 * x:.0f} %</td>'
                   f'<td><meter value="{x:.4f}">{100 * x:.0f} %</meter></td></tr>\n' for name, x in shares)
    return PAGE.format(title=html.escape(title), alpha=reasoning_weighs(shown), high=1 + s.beta, bars=bars,
                       episodes=s.rollouts, sections="\n".join(sections))


def main(arguments=None):
    parser = SettingsParser("python -m extras.show", description=__doc__.split("\n\n")[0])
    parser.add_argument("--checkpoint", help=CHECKPOINT)
    parser.add_argument("--seed", type=int, help="the board (default: the first that training draws)")
    parser.add_argument("--html", type=Path, help="write a page instead of printing")
    arm, options = agent_at(parser, parser.parse_args(arguments).checkpoint, arguments)
    s, seed = arm.settings, options.seed
    if seed is None:
        seed, = draw_boards(arm.env, arm.rng, 1, EVALUATION_SEED, arm.held_out)
    if not 0 <= seed < 2**63:
        parser.error(f"seed: {seed} is not in [0, {2**63 - 1}]")
    batch, row, advantages = best_of_group(arm, seed)
    shown, last = turns(arm, batch, row)
    title = (f"{s.env}, board of seed {seed}, {options.checkpoint or 'the agent before training'}: the best of "
             f"{s.rollouts} episodes")
    if options.html:
        try:
            options.html.write_text(page(shown, last, title, s, action_shares(arm, batch)), encoding="utf-8")
        except OSError as error:
            parser.error(f"html: {error}")
        return
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that knows no √
    colour, width = sys.stdout.isatty() and not os.environ.get("NO_COLOR"), shutil.get_terminal_size((110, 24)).columns
    say = lambda text: print(textwrap.fill(text, width))
    say(f"{title}. Reasoning weighs {reasoning_weighs(shown)}, action tokens 1 to {1 + s.beta}, "
        + ("the redder the more." if colour else "as in [Up 1.23]."))
    for line in arm.env.system_prompt.splitlines():
        if line.startswith("Symbols:"):
            say(line)
    if not batch.valid.any():
        say(f"Not one response of the group has the format: nothing is learnt from it. {without_format(s)}")
    for number, (board, tokens, reward) in enumerate(shown, 1):
        print(f"\nturn {number}")
        print("\n".join(beside(board, [shaded(*token[:3], s.beta, colour) for token in tokens], width)))
        print(f"reward {reward:+.1f}")
    print("\n" + "\n".join(last))
    returns = " ".join(f"{value:.1f}" for value in batch.returns.tolist())
    say(f"return {float(batch.returns[row]):+.1f}, advantage {float(advantages[row]):+.2f} (the group's returns: "
        f"{returns}), {'solved' if batch.success[row] else 'not solved'}")


if __name__ == "__main__":
    main()
