"""Facts about a state, as sentences: demonstrations reason in them, and an agent's reasoning is held to them.

An environment may define `facts()`, true sentences about its state, and `fact_pattern`, what a sentence looks like that
claims one, true or not. Sokoban's stand here, so that env.py has the game alone.
"""

import copy
import re

from env import MOVES, Sokoban, push


def relations(a, at, b, other):
    """Where `a` is seen from `b`, row then column: the two facts that decide a move on a grid."""
    (row, column), (other_row, other_column) = at, other
    vertical = "above" if row < other_row else "below" if row > other_row else "in the row of"
    horizontal = "left of" if column < other_column else "right of" if column > other_column else "in the column of"
    return [f"The {a} is {vertical} the {b}.", f"The {a} is {horizontal} the {b}."]


def grid_pattern(*of_moves):
    """What a fact about a grid looks like: a relation, or a move and what it would do."""
    thing = r"(?:player|goal|hole|box|target)(?: \d)?"
    return re.compile(rf"The {thing} is (?:above|below|in the row of|left of|right of|in the column of) the {thing}\."
                      rf"|(?:{'|'.join(MOVES)}) (?:{'|'.join(map(re.escape, of_moves))})\.")


WALL, PUSH, BLOCKED = "is a wall", "pushes the box", "is blocked by the box"  # a free cell is not worth a sentence
SOKOBAN = grid_pattern(WALL, PUSH, BLOCKED)


def sokoban_facts(env):
    boxes, targets = env.things()
    sentences = []
    for (box, at), (target, goal) in zip(boxes, targets):
        sentences += relations(box, at, "player", env.player) + relations(target, goal, box, at)
    for action, (d_row, d_column) in MOVES.items():
        ahead = (env.player[0] + d_row, env.player[1] + d_column)
        if ahead in env.walls:
            sentences.append(f"{action} {WALL}.")
        elif ahead in env.boxes:
            stuck = push(env.player, env.boxes, env.walls, action)[0] == env.player
            sentences.append(f"{action} {BLOCKED if stuck else PUSH}.")
    return sentences


def facts(env):
    """True sentences about the state of an environment: what a careful reasoner would write down."""
    return env.facts() if hasattr(env, "facts") else sokoban_facts(env) if isinstance(env, Sokoban) else []


def check(env, text):
    """(stated, true): how many sentences of a text are of the kind that `facts` writes, and how many of them hold."""
    pattern = getattr(env, "fact_pattern", SOKOBAN if isinstance(env, Sokoban) else re.compile("(?!)"))
    holding, sentences = set(facts(env)), re.split(r"(?<=\.)\s+|[<>]", text)
    stated = [sentence for sentence in sentences if sentence in holding or pattern.fullmatch(sentence)]
    return len(stated), sum(sentence in holding for sentence in stated)


def accuracy(played, env):
    """Trajectories, played again on a copy of `env` -> metrics: facts stated a response, and the share that is true."""
    stated, true, env = 0, 0, copy.deepcopy(env)
    for row, seed in enumerate(played.seeds.tolist()):
        env.reset(seed=seed)
        for text in played.texts[row]:
            counts = check(env, text)
            stated, true = stated + counts[0], true + counts[1]
            env.step(text)
    return {"facts": stated / max(int(played.turns.sum()), 1), "fact_accuracy": true / stated if stated else None}
