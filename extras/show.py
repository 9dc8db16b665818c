"""One episode, turn by turn, each token shaded by its ActFocus weight: in the terminal, or as an SVG.

    python -m extras.show                                                         # the built-in agent
    python -m extras.show --checkpoint runs/latest/arms/grpo-actfocus-0.pt        # after training
    python -m extras.show --svg results/episode.svg                               # the picture in the README

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
from pathlib import Path

from actfocus import group_advantages
from env import draw_boards
from extras.options import SettingsParser
from extras.runs import load_checkpoint
from train import EVALUATION_SEED, Arm

SHADES = (229, 222, 215, 208, 202, 196)  # of the terminal's 256 colours, pale to red


def saved_settings(checkpoint):
    """The settings of the run that a checkpoint belongs to: they stand in settings.json beside its folder."""
    out = Path(checkpoint).parent.parent  # where it is now: a directory may have been moved
    path = out / "settings.json"
    return {**json.loads(path.read_text()), "out": str(out)} if path.exists() else {}


def agent_at(parser, checkpoint, algo="grpo", credit="actfocus", arguments=None):
    """(Arm, options): the agent that training starts from, or the policy of one of its checkpoints."""
    if checkpoint and not Path(checkpoint).is_file():
        parser.error(f"there is no checkpoint {checkpoint!r}")
    settings, options = parser.parse_settings(arguments, **(saved_settings(checkpoint) if checkpoint else {}))
    try:
        arm = Arm(settings, algo, credit, settings.seeds[0])
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if checkpoint:
        saved = load_checkpoint(Path(checkpoint), settings.torch_device)
        if saved is None:
            parser.error(f"there is no whole checkpoint at {checkpoint}")
        if saved["agent"] != arm.agent:
            parser.error(f"{checkpoint} was trained from agent {saved['agent']}, but {settings.agent} is {arm.agent}")
        arm.policy.load_state_dict(saved["learners"][0])
    return arm, options


def best_of_group(arm, seed):
    """A group played on the board of `seed` -> (its Batch, the row with the largest advantage, advantages[G])."""
    batch = arm.score(arm.play([seed] * arm.settings.rollouts, arm.settings.temperature, arm.generator))
    batch.weights, advantages = arm.credit.weights(batch), group_advantages(batch.returns[None])[0]
    return batch, int(advantages.argmax()), advantages


def turns(arm, batch, row):
    """[(board's lines, [(text, weight, is action)] of the response, reward)] of an episode, and the board at its end."""
    env, shown = copy.deepcopy(arm.env), []
    if hasattr(env, "observation"):  # people read grids
        env.observation = "grid"
    env.reset(seed=int(batch.seeds[row]))
    decode = lambda ids: arm.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    for turn in range(int(batch.turns[row])):
        where = (batch.turn_ids[row] == turn).nonzero()[:, 0]
        tokens = [(decode([int(batch.ids[row, t])]), float(batch.weights[row, t]), bool(batch.action_mask[row, t])) for t in where]
        board, ids = env.render().splitlines(), batch.ids[row, where].tolist()
        reward = env.step(decode(ids[:-1] if ids[-1] in arm.tokenizer.all_special_ids else ids))[1]
        shown.append((board, tokens, reward))
    return shown, env.render().splitlines()


def shaded(text, weight, is_action, beta, colour):
    """(what can be seen of a token, what is printed): reasoning dim, action tokens the redder the more they weigh, or marked."""
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
        if length and length + len(seen) > room and (seen[:1].isspace() or length + len(seen) > room + 1):  # a full stop may
            lines, length = [*lines, ""], 0
            if seen[:1].isspace():
                seen, printed = seen[1:], printed.replace(seen[0], "", 1)
        lines[-1] += printed
        length += len(seen)
    if below:
        return [*board, *filter(None, lines)]
    return [f"{a:{left}}{b}".rstrip() for a, b in itertools.zip_longest(board, lines, fillvalue="")]


def lines_of(tokens, columns):
    """Tokens (text, weight, is action) broken before a space into lines of at most `columns` characters, where they have one."""
    lines, length = [[]], 0
    for token in tokens:
        if length + len(token[0]) > columns and token[0][:1].isspace():
            lines, length, token = [*lines, []], 0, (token[0][1:], *token[1:])
        lines[-1].append(token)
        length += len(token[0])
    return lines


def svg(shown, last, title, beta):
    """The episode as an SVG whose text is text: reasoning grey, action tokens on a background as red as they weigh much."""
    wide, high, columns, shades, out = 7.25, 18, 110, [], []  # pixels a character, pixels a line, characters a line
    left = max(len(line) for board, *_ in shown for line in board) + 3

    def put(row, column, words, kind="", weight=None):
        words = "".join(c if c.isprintable() else " " for c in words)
        x, y, length = 12 + column * wide, 26 + row * high, len(words) * wide
        if weight is not None:
            share = min(max((weight - 1) / beta, 0), 1) if beta else 1
            shades.append(f'<rect x="{x:.1f}" y="{y - 13:.0f}" width="{length:.1f}" height="{high - 1}" rx="2" '
                       f'fill="rgb(255,{224 - 144 * share:.0f},{186 - 142 * share:.0f})"/>')
        # textLength: whatever monospaced font there is, a word fills its background
        out.append(f'<text x="{x:.1f}" y="{y:.0f}" textLength="{length:.1f}" lengthAdjust="spacingAndGlyphs" '
                   f'xml:space="preserve" class="{kind}">{html.escape(words)}</text>')

    put(0, 0, title, "title")
    alpha = min(weight for _, tokens, _ in shown for _, weight, _ in tokens)
    put(1.2, 0, f"reasoning and tags: weight {alpha:g}", "grey")
    put(1.2, 36, "action tokens: weight")
    for i in range(3):
        put(1.2, 58 + 7 * i, f" {1 + beta * i / 2:.2f} ", weight=1 + beta * i / 2)
    row = 3
    for number, (board, tokens, reward) in enumerate([*shown, (last, [], None)], 1):
        for i, line in enumerate(board):
            put(row + i, 0, line)
        text = lines_of(tokens, columns - left) if tokens else []
        for i, line in enumerate(text):
            column = left
            for (weight, is_action), run in itertools.groupby(line, key=lambda token: token[1:]):
                words = "".join(word for word, *_ in run)
                put(row + i, column, words, *(("", weight) if is_action else ("grey",)))
                column += len(words)
        weights = ", ".join(f"{words.strip()} {weight:.2f}" for words, weight, is_action in tokens if is_action)
        put(row + len(text) + 0.2 * bool(text), left, f"turn {number}: {weights}; reward {reward:+.1f}" if tokens else
            f"return {sum(reward for *_, reward in shown):+.1f}", "note")
        row += max(len(board), len(text) + 1.2) + 0.8
    width, height = 24 + columns * wide, row * high + 12
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" font-size="12" '
            'font-family="ui-monospace, SFMono-Regular, Menlo, Consolas, monospace">\n<style>text{fill:#1f2328} .grey{fill:#767c85} '
            '.title{font-weight:bold} .note{fill:#57606a;font-style:italic}</style>\n<rect width="100%" height="100%" fill="#fff"/>\n'
            + "\n".join(shades + out).replace(' class=""', "") + "\n</svg>\n")


def main(arguments=None):
    parser = SettingsParser("python -m extras.show", description=__doc__.split("\n\n")[0])
    parser.add_argument("--checkpoint", help="an arm's, DIR/arms/*.pt; its run's settings are used (default: the agent before training)")
    parser.add_argument("--seed", type=int, help="the board (default: the first that training draws)")
    parser.add_argument("--svg", type=Path, help="write a picture instead of printing")
    arm, options = agent_at(parser, parser.parse_args(arguments).checkpoint, arguments=arguments)
    s, seed = arm.settings, options.seed
    if seed is None:
        seed, = draw_boards(arm.env, arm.rng, 1, EVALUATION_SEED, arm.held_out)
    if not 0 <= seed < 2**63:
        parser.error(f"seed: {seed} is not in [0, {2**63 - 1}]")
    batch, row, advantages = best_of_group(arm, seed)
    shown, last = turns(arm, batch, row)
    title = f"{s.env}, board of seed {seed}, {options.checkpoint or 'the agent before training'}: the best of {s.rollouts} episodes"
    if options.svg:
        try:
            options.svg.write_text(svg(shown, last, title, s.beta), encoding="utf-8")
        except OSError as error:
            parser.error(f"svg: {error}")
        return
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that knows no √
    colour, width = sys.stdout.isatty() and not os.environ.get("NO_COLOR"), shutil.get_terminal_size((110, 24)).columns
    say = lambda text: print(textwrap.fill(text, width))
    say(f"{title}. Reasoning weighs {s.alpha}, action tokens 1 to {1 + s.beta}, "
        + ("the redder the more." if colour else "as in [Up 1.23]."))
    for line in arm.env.system_prompt.splitlines():
        if line.startswith("Symbols:"):
            say(line)
    if not batch.valid.any():
        say("Not one response of the group has the format: nothing can be learnt from it (train.py --teach 32 mends that).")
    for number, (board, tokens, reward) in enumerate(shown, 1):
        print(f"\nturn {number}")
        print("\n".join(beside(board, [shaded(*token, s.beta, colour) for token in tokens], width)))
        print(f"reward {reward:+.1f}")
    print("\n" + "\n".join(last))
    say(f"return {float(batch.returns[row]):+.1f}, advantage {float(advantages[row]):+.2f} (the group's returns: "
        f"{' '.join(f'{value:.1f}' for value in batch.returns.tolist())}), " + ("solved" if batch.success[row] else "not solved"))


if __name__ == "__main__":
    main()
