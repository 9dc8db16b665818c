"""The environments under Gymnasium, where that is installed: import this module, then

    gymnasium.make("actfocus/sokoban", size=5)          # any name of env.ENVS, with its options
    TextEnv("bandit:Bandit")                            # one of your own

Observations and actions are text, in Gymnasium's `Text` spaces; an action is the agent's whole response.
"""

import string

import gymnasium
from gymnasium.spaces import Text

import env as environments

CHARACTERS = string.printable + "√"
LONGEST = 10_000  # characters


class TextEnv(gymnasium.Env):
    """An environment of env.py: `name` and `options` as env.make takes them. characters: what observations may hold."""

    metadata = {"render_modes": ["ansi"], "render_fps": 1}

    def __init__(self, name, *, render_mode=None, characters=CHARACTERS, **options):
        self.env, self.render_mode = environments.make(name, **options), render_mode
        self.observation_space = self.action_space = Text(LONGEST, min_length=0, charset=characters)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.env.reset(seed=int(self.np_random.integers(2**63)) if seed is None else seed)

    def step(self, action):
        return self.env.step(action)

    def render(self):
        return self.env.render()


for name in environments.ENVS:
    gymnasium.register(f"actfocus/{name}", entry_point=TextEnv, kwargs={"name": name})
