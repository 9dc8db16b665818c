"""The command line: an option for each field of train.Settings, what a credit's text means, and errors of one line."""

import argparse
import difflib
import itertools
import json
import pkgutil
import re
import sys
from dataclasses import fields, replace

import torch

from actfocus import CREDITS, SIGNALS, Credit
from train import DEFAULTS, Settings

OWN_SETTINGS = ("alpha", "beta", "signal", "keep", "minibatch", "lr", "critic_lr", "clip_low", "clip_high", "gamma",
                "lam", "entropy_coef", "kl_coef")  # those of train.Settings that a credit may have for itself
MOST = 100_000  # boards, steps, trajectories: more is a slip of the keyboard, which would draw boards for hours
SWITCH = {"true": True, "false": False}
SYNTAX = "settings: NAME:KEY=VALUE,KEY=VALUE; joined: NAME+NAME; several: a space between"


def make_credit(text, algo, settings):
    """'carl+actfocus:alpha=0.3,tree_forks=16' -> a Credit that answers as both do, with settings of its own."""
    name, _, own = text.rpartition(":") if "=" in text and ":" in text else (text, "", "")
    own = [option.partition("=")[::2] for option in own.split(",") if option]
    parts = [CREDITS.get(part, part) for part in name.split("+")]
    if unknown := [part for part in parts if isinstance(part, str) and ":" not in part]:
        raise ValueError(f"credits: {unknown[0]!r} is not one of {', '.join(CREDITS)}, or module:Class ({SYNTAX})")
    try:
        parts = [pkgutil.resolve_name(part) if isinstance(part, str) else part for part in parts]
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"credits: {name!r} cannot be imported: {error} ({SYNTAX})") from None
    if not all(isinstance(part, type) and issubclass(part, Credit) for part in parts):
        raise ValueError(f"credits: {name!r} is no subclass of Credit ({SYNTAX})")
    if len(own) > len(dict(own)):
        raise ValueError(f"credits: {text!r} has a setting twice")
    answers = [answer for answer in vars(Credit) if answer[0] != "_"]
    own_answers = [x for part in parts for x in answers if part is Credit or getattr(part, x) is not getattr(Credit, x)]
    if twice := {answer for answer in own_answers if own_answers.count(answer) > 1} - {"check", "algos"}:
        raise ValueError(f"credits: {name!r} joins methods that both have {', '.join(sorted(twice))} of their own")
    own_methods = ((part, x) for part in parts for x in dir(part)
                   if x[0] != "_" and not hasattr(Credit, x) and callable(getattr(part, x)))
    for part, x in own_methods:
        if meant := difflib.get_close_matches(x, answers, 1, cutoff=0.85):
            raise ValueError(f"credits: nobody asks {part.__name__} for {x}: is {meant[0]} meant?")
    try:
        # Each answers where it differs from plain PPO and GRPO, and goes with what all of them go with.
        algos = tuple(name for name in Credit.algos if all(name in part.algos for part in parts))
        credit = type(name, tuple(parts), {"algos": algos})(algo, settings)
    except TypeError as error:
        raise ValueError(f"credits: {name!r} cannot be made: {error}") from None
    for key, value in own:
        is_credits = key[:1] != "_" and type(getattr(type(credit), key, None)) in (str, int, float, bool)
        unread = key in ("alpha", "beta", "signal") and type(credit).weights is Credit.weights
        if unread or not is_credits and key not in OWN_SETTINGS:
            whose = name if unread else "a credit"
            raise ValueError(f"credits: {key!r} in {text!r} is not a setting that {whose} can have for itself")
        try:
            kind = type(getattr(credit if is_credits else settings, key))
            value = SWITCH[value.lower()] if kind is bool else kind(value)
        except (KeyError, ValueError):
            raise ValueError(f"credits: {value!r} is no value for {key} in {text!r}") from None
        if is_credits:
            setattr(credit, key, value)
        else:
            # credits: by its name alone, else the check of these settings would end here again
            credit.settings = replace(credit.settings, credits=(name,), **{key: value})
    return credit


def key_values(options):
    """("size=6", "hint=true") -> {"size": 6, "hint": True}."""
    values = {}
    for option in options:
        key, equals, text = option.partition("=")
        if not equals or key in values:
            raise ValueError(f"env_options: {option!r} {'comes a second time' if equals else 'is not KEY=VALUE'}")
        try:
            values[key] = json.loads(text)
        except json.JSONDecodeError:
            values[key] = text
    return values


def check(settings):
    """ValueError, in one line, for a value that no run can have."""
    for f in fields(settings):
        values = getattr(settings, f.name)
        low, high, choices = f.metadata["low"], f.metadata["high"], f.metadata["choices"]
        for value in values if isinstance(values, tuple) else (values,):
            high = high or (MOST if isinstance(value, int) else sys.float_info.max)
            if choices and value not in choices:
                advice = " (a method of your own is a credit)" if f.name == "algos" else ""
                raise ValueError(f"{f.name}: {value!r} is not one of {', '.join(choices)}{advice}")
            if not isinstance(value, str) and not low <= value <= high:
                bounds = f"in [{low}, {high}]" if high < sys.float_info.max else f"a finite number of at least {low}"
                raise ValueError(f"{f.name}: {value} is not {bounds}")
        if isinstance(values, tuple) and f.name != "env_options" and not 0 < len(values) == len(set(values)):
            raise ValueError(f"{f.name}: name at least one, and none twice")
    if settings.signal not in SIGNALS:
        raise ValueError(f"signal: {settings.signal!r} is not one of {', '.join(SIGNALS)}")
    if settings.signal == "shift" and settings.temperature != 1:
        raise ValueError("signal: shift reads the reference at temperature 1, so it needs --temperature 1")
    if settings.torch_device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: torch finds no GPU here")
    torch.empty(0, device=settings.torch_device)  # fails here where there is no such device
    env = settings.make_env()
    env.reset(seed=0)  # as are options that admit no board
    for name, algo in itertools.product(settings.credits, settings.algos):
        make_credit(name, algo, settings).check(env)


class OneLineParser(argparse.ArgumentParser):
    def error(self, message):
        commas = re.search(r"invalid \w+ value: '[^']*,", message)  # argparse's own words for --seeds 0,1
        advice = " (a space between several)" if commas else ""
        self.exit(2, f"{self.prog}: {' '.join(message.split())}{advice}\n")


class SettingsParser(OneLineParser):
    """Settings from the command line; what is not given is the environment's default or the field's."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, allow_abbrev=False, **options)
        for f in fields(Settings):
            many, choices = isinstance(f.default, tuple), f.metadata["choices"]
            shown = " ".join(map(str, f.default)) if many else f.default
            text = f"{f.metadata['help']}{' (' + ', '.join(choices) + ')' if choices else ''}"
            own = [f"; {values[f.name]} with --env {env}" for env, values in DEFAULTS.items() if f.name in values]
            text += f" (default: {shown}{''.join(own)})" * (f.default != ())
            kind = {"action": argparse.BooleanOptionalAction} if isinstance(f.default, bool) else {
                "type": type(f.default[0]) if many and f.default else str if many else type(f.default),
                "nargs": "+" if many else None, "metavar": f.name.split("_")[-1].upper()}
            self.add_argument("--" + f.name.replace("_", "-"), default=argparse.SUPPRESS,
                              help=text.replace("%", "%%"), **kind)

    def parse_known_args(self, args=None, namespace=None):  # --eval_boards is --eval-boards
        given = sys.argv[1:] if args is None else args
        args = [re.sub("^--[a-z_]+", lambda name: name[0].replace("_", "-"), x) for x in given]
        return super().parse_known_args(args, namespace)

    def parse_settings(self, arguments=None, **settings):
        """-> (Settings, the options that are none). settings: values that go before those of the command line."""
        options = self.parse_args(arguments)
        given = {f.name: vars(options).pop(f.name) for f in fields(Settings) if f.name in options}
        known = {f.name: settings[f.name] for f in fields(Settings) if f.name in settings}  # less an older version's
        values = known | DEFAULTS.get(given.get("env"), {}) | given
        try:
            return Settings(**{name: tuple(x) if isinstance(x, list) else x for name, x in values.items()}), options
        except (ValueError, RuntimeError) as error:  # RuntimeError: torch refuses the device, or no board can be drawn
            self.error(str(error))
