"""What a page or a message tells somebody to type can be typed: the command is there, with those options and all of its arguments."""

from __future__ import annotations

import ast
import functools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from coppice.bench.cli import app as bench_app
from coppice.cli.app import app

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted(path for path in (ROOT / "docs").glob("*.md") if path.name != "cli.md")]
SOURCES = [*sorted((ROOT / "src").rglob("*.py")), ROOT / "demo" / "demo.py"]
_SHOWN = re.compile(r"`(coppice [^`]+)`")
_TYPED = re.compile(r"^\$ (coppice .*)$", re.MULTILINE)
_FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_END = ("|", "<", ">", "&&", "||", "...", "--help")  # what follows is not the command's, or is left to the reader
_ANYTHING = "{}"  # what an f-string puts in


def lines_of(page: Path) -> list[str]:
    """The command lines of a page: in its text, and behind the prompt of a console."""
    text = page.read_text()
    return [*_SHOWN.findall(_FENCE.sub("", text)), *_TYPED.findall(text)]


def lines_in(source: Path) -> list[str]:
    """The command lines in the strings of a module: messages, hints, help and docstrings."""
    return [line for text in strings(ast.parse(source.read_text())) for line in _SHOWN.findall(text)]


def strings(tree: ast.AST) -> Iterator[str]:
    """All strings, whole: of an f-string not the parts alone."""
    if isinstance(tree, ast.JoinedStr):
        yield "".join(str(part.value) if isinstance(part, ast.Constant) else _ANYTHING for part in tree.values)
        return
    if isinstance(tree, ast.Constant) and isinstance(tree.value, str):
        yield tree.value
    for node in ast.iter_child_nodes(tree):
        yield from strings(node)


@functools.cache
def root() -> Any:
    """The whole command line."""
    command: Any = typer.main.get_command(app)
    command.commands["bench"] = typer.main.get_command(bench_app)
    return command


def wrong_with(line: str) -> str | None:
    """Why a command line cannot be typed so; None where it can, or where it only names a command."""
    words = shlex.split(line)[1:]
    words = words[: next((at for at, word in enumerate(words) if word in _END), len(words))]
    command = root()
    while hasattr(command, "commands"):
        words, _, problem = taken(command, words, at_first_argument=True)
        if problem or not words or words[0] == _ANYTHING:
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
    """Take a command's own options; return the words that are left, the arguments, and what is wrong with the options."""
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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_of_the_pages_can_be_typed(page: Path) -> None:
    """A reader who copies a line is not told that there is no such option."""
    assert {line: problem for line in lines_of(page) if (problem := wrong_with(line))} == {}


def test_commands_in_messages_can_be_typed() -> None:
    """A hint that cannot be followed is none: `coppice logs --vmm` lacks the name of the instance."""
    found = {line: source.name for source in SOURCES for line in lines_in(source)}
    assert len(found) > 40
    assert {line: (name, problem) for line, name in found.items() if (problem := wrong_with(line))} == {}


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("coppice logs --vmm", "argument is missing"),
        ("coppice logs --vmm box", None),
        ("coppice logs --vm box", "no option --vm"),
        ("coppice exec -it box -- bash -l", None),
        ("coppice exec -ix box -- bash", "no option -x"),
        ("coppice snapshot grow box", "no command grow"),
        ("coppice --json snapshot ls --tag", "--tag has no value"),
        ("coppice demote box other", "too many"),
        ("coppice restore", None),
    ],
)
def test_what_cannot_be_typed_is_seen(line: str, problem: str | None) -> None:
    """The check of these tests itself: it finds what it is for."""
    found = wrong_with(line)
    assert (problem in (found or "")) if problem else found is None
