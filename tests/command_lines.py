"""Check whether a command line of `coppice` is valid: the command exists, with these options and
all of its arguments.
"""

from __future__ import annotations

import functools
import shlex
from typing import Any

import click

from coppice.cli.app import app
from coppice.cli.habits import ALIASES

# the words after it belong to the shell, or are left to the reader
_END = ("|", "<", ">", "&&", "||", "...", "--help")
ANYTHING = "{}"  # the value of an f-string's field


@functools.cache
def root() -> Any:
    """Return the whole command line."""

    def whole(command: Any) -> Any:
        if isinstance(command, click.Group):
            context = click.Context(command)
            for name in command.list_commands(context):
                command.commands[name] = whole(command.get_command(context, name))
        return command

    return whole(app)


def wrong_with(line: str) -> str | None:
    """Return the defect of a command line; None if it is valid, or if it only names a command."""
    words = shlex.split(line)[1:]
    words = words[: next((at for at, word in enumerate(words) if word in _END), len(words))]
    words = [*ALIASES[words[0]], *words[1:]] if words and words[0] in ALIASES else words
    command = root()
    while hasattr(command, "commands"):
        words, _, problem = taken(command, words, at_first_argument=True)
        if problem or not words or words[0] == ANYTHING:
            return problem
        if words[0] not in command.commands:
            return f"there is no command {words[0]}"
        command, words = command.commands[words[0]], words[1:]
    if not words:
        return None
    _, given, problem = taken(command, words)
    if problem:
        return problem
    arguments = [each for each in command.params if each.param_type_name == "argument"]
    if len(given) < sum(each.required for each in arguments):
        return "an argument is missing"
    if len(given) > len(arguments) and all(each.nargs == 1 for each in arguments):
        return "there is an argument too many"
    return None


def taken(
    command: Any, words: list[str], *, at_first_argument: bool = False
) -> tuple[list[str], list[str], str | None]:
    """Consume a command's own options; return the remaining words, the arguments, and the defect of
    the options.
    """
    options = {
        name: each
        for each in command.params
        if each.param_type_name == "option"
        for name in (*each.opts, *each.secondary_opts)
    }
    given: list[str] = []
    rest = list(words)
    while rest:
        if not rest[0].startswith("-") or rest[0] in ("-", "--"):
            if at_first_argument:
                break
            word = rest.pop(0)
            if word == "--":
                return [], given + rest, None
            given.append(word)
            continue
        word = rest.pop(0)
        names = [word] if word.startswith("--") else [f"-{letter}" for letter in word[1:]]
        for name in names:
            if name not in options:
                return rest, given, f"there is no option {name}"
        if not options[names[-1]].is_flag:
            if not rest:
                return rest, given, f"{names[-1]} has no value"
            rest.pop(0)
    return rest, given, None
