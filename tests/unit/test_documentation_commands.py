"""Every command in a page or message can be typed: it exists, with its options and all of its
arguments.
"""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from command_lines import ANYTHING, wrong_with

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted(path for path in (ROOT / "docs").rglob("*.md") if path.name != "cli.md"),
]
SOURCES = [*sorted((ROOT / "src").rglob("*.py")), ROOT / "demo" / "demo.py"]
_SHOWN = re.compile(r"`(coppice [^`]+)`")
_TYPED = re.compile(r"^\$ (coppice .*)$", re.MULTILINE)
_TESTED = re.compile(r"`\S*python -m pytest ([^`]+)`")
_FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def lines_of(page: Path) -> list[str]:
    """Return the command lines of a page, from its text and after console prompts."""
    text = page.read_text()
    return [*_SHOWN.findall(_FENCE.sub("", text)), *_TYPED.findall(text)]


def lines_in(source: Path) -> list[str]:
    """Return the command lines in the strings of a module: messages, hints, help and docstrings."""
    return [line for text in strings(ast.parse(source.read_text())) for line in _SHOWN.findall(text)]


def strings(tree: ast.AST) -> Iterator[str]:
    """Yield all strings; an f-string is joined from its parts."""
    if isinstance(tree, ast.JoinedStr):
        yield "".join(str(part.value) if isinstance(part, ast.Constant) else ANYTHING for part in tree.values)
        return
    if isinstance(tree, ast.Constant) and isinstance(tree.value, str):
        yield tree.value
    for node in ast.iter_child_nodes(tree):
        yield from strings(node)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_of_the_pages_can_be_typed(page: Path) -> None:
    """A reader who copies a line gets no error about a missing option."""
    assert {line: problem for line in lines_of(page) if (problem := wrong_with(line))} == {}


def test_the_table_of_tests_has_every_folder() -> None:
    """A reader finds the guarantee of each folder of tests."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    holds_tests = {path.parent.name for path in (ROOT / "tests").glob("*/*.py")} - {"fakes"}
    assert set(re.findall(r"^\| `(\w+)/` \|", text, re.MULTILINE)) == holds_tests


def test_commands_in_messages_can_be_typed() -> None:
    """A hint must be complete: `coppice logs --vmm` lacks the name of the instance."""
    found = {line: source.name for source in SOURCES for line in lines_in(source)}
    assert len(found) > 40
    assert {line: (name, problem) for line, name in found.items() if (problem := wrong_with(line))} == {}


@pytest.mark.parametrize("arguments", _TESTED.findall((ROOT / "CONTRIBUTING.md").read_text()))
def test_a_quoted_run_of_pytest_has_tests(arguments: str) -> None:
    """A reader who copies it does not get an empty run."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", *shlex.split(arguments)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=100)
    assert ran.returncode == 0, ran.stdout + ran.stderr


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
        ("coppice demote box other", None),
        ("coppice logs box other", "too many"),
        ("coppice restore", None),
    ],
)
def test_an_invalid_command_is_detected(line: str, problem: str | None) -> None:
    """The check itself detects invalid command lines."""
    found = wrong_with(line)
    assert (problem in (found or "")) if problem else found is None
