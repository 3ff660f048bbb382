"""What the sub-commands share: exit codes, one-line errors, arguments that several take."""

import argparse
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from lut_ds.errors import UserError

DONE, FAULT, BAD_INPUT, STOPPED = 0, 1, 2, 3

Answer = tuple[dict[str, Any], str, int]  # for --json, for people, exit code


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")

    def parse(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """Arguments, with `section.key=value` anywhere after the recipe: argparse takes them only in one place."""
        args, rest = self.parse_known_args(argv)
        unknown = [word for word in rest if word.startswith("-") or not hasattr(args, "override")]
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        if rest:
            args.override = [*args.override, *rest]
        return args


class Commands:
    """Sub-commands of a parser; `add` makes one from a function, `group` a level below."""

    def __init__(self, actions: "argparse._SubParsersAction[Parser]") -> None:
        self._actions = actions

    def add(self, function: Callable[[argparse.Namespace], Answer], name: str | None = None) -> Parser:
        """A sub-command that calls `function`; its docstring is the help. Every one takes --json."""
        doc = (function.__doc__ or "").strip()
        sub = self._actions.add_parser(name or function.__name__, help=doc.splitlines()[0], description=doc)
        sub.set_defaults(function=function)
        sub.add_argument("--json", action="store_true", help="print one JSON object on standard output")
        return sub

    def group(self, name: str, description: str) -> "Commands":
        """A sub-command that has sub-commands of its own, such as `lut-ds data verify`."""
        return add_commands(self._actions.add_parser(name, help=description, description=description))


def add_commands(parser: Parser) -> Commands:
    """Let `parser` take sub-commands."""
    return Commands(parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser))


def positive(text: str) -> int:
    """A whole number from 1, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, found {text!r}")
    return int(text)


def add_overrides(sub: Parser, what: str = "the recipe") -> None:
    """Let a sub-command take `section.key=value` words."""
    sub.add_argument("override", nargs="*", default=[], metavar="section.key=value", help=f"change a value of {what}")


def add_recipe(sub: Parser) -> None:
    """Let a sub-command take a recipe and overrides."""
    sub.add_argument("recipe", help="name of a shipped recipe, or a .yaml file")
    add_overrides(sub)
