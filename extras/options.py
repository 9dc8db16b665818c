"""The command line: an option for each field of train.Settings, and errors of one line."""

import argparse
from dataclasses import fields

from train import DEFAULTS, Settings


class OneLineParser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: {' '.join(message.split())}\n")


class SettingsParser(OneLineParser):
    """Settings from the command line; what is not given is the environment's default or the field's."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, allow_abbrev=False, **options)
        for f in fields(Settings):
            many, choices = isinstance(f.default, tuple), f.metadata["choices"]
            shown = " ".join(map(str, f.default)) if many else f.default
            text = f"{f.metadata['help']}{' (' + ', '.join(choices) + ')' if choices else ''} (default: {shown})"
            kind = {"action": argparse.BooleanOptionalAction} if isinstance(f.default, bool) else {
                "type": type(f.default[0]) if many and f.default else str if many else type(f.default),
                "nargs": "+" if many else None, "metavar": f.name.split("_")[-1].upper()}
            self.add_argument("--" + f.name.replace("_", "-"), default=argparse.SUPPRESS, help=text.replace("%", "%%"), **kind)

    def parse_settings(self, arguments=None, **settings):
        """-> (Settings, the options that are none). settings: values that go before those of the command line."""
        options = self.parse_args(arguments)
        given = {f.name: vars(options).pop(f.name) for f in fields(Settings) if f.name in options}
        values = settings | DEFAULTS.get(given.get("env"), {}) | given
        try:
            return Settings(**{name: tuple(x) if isinstance(x, list) else x for name, x in values.items()}), options
        except (ValueError, RuntimeError) as error:  # RuntimeError: a device, or no board, that torch or the environment refuses
            self.error(str(error))
