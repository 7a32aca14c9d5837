"""Habits of docker users: a docker command works, or the error names a command that does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cli_host import FakeHost, instance
from cli_lines import output_of, run
from command_lines import wrong_with
from coppice.cli import habits
from coppice.cli.app import app
from coppice.model import State

COMMANDS = app.list_commands(app.make_context("coppice", [], resilient_parsing=True))


@pytest.mark.parametrize(
    ("words", "asked"),
    [
        (["ps"], "ls"),
        (["ps", "-a"], "ls"),
        (["list"], "ls"),
        (["images"], "image_ls"),
        (["images", "-a"], "image_ls"),
        (["image", "list"], "image_ls"),
        (["volume", "remove", "data"], "volume_rm"),
        (["pull", "-q", "debian"], "image_pull"),
        (["stats", "--no-stream"], "stats"),
        (["run", "--restart", "unless-stopped", "debian"], "run"),
        (["rmi", "-f", "debian"], "image_rm"),
        (["run", "-d", "debian"], "run"),
        (["create", "debian"], "run"),
        (["stop", "-t", "3", "vm"], "stop"),
        (["unpause", "vm"], "restore"),
        (["logs", "-f", "--tail", "5", "vm"], "logs"),
        (["cp", "-r", "here", "vm:/there"], "cp_in"),
        (["cp", "-a", "vm:/there", "here"], "cp_out"),
        (["exec", "nobody", "true"], "open_exec"),
        (["exec", "-it", "nobody", "true"], "open_exec"),
        (["inspect", "vm"], "inspect"),
    ],
    ids=" ".join,
)
def test_dockers_words_work(words: list[str], asked: str) -> None:
    """Docker's words have docker's effect."""
    made = instance("vm")
    host = FakeHost(
        ls=[],
        image_ls=[],
        image_rm=None,
        image_pull={},
        volume_rm=None,
        stats={},
        run=made,
        stop=made,
        restore=made,
        logs=[],
        cp_in=1,
        cp_out=1,
        inspect=made,
    )
    if "-f" in words and asked == "logs":
        words = [word for word in words if word != "-f"]
    run(host, *(() if asked == "open_exec" else ("--json",)), *words)
    assert host.operations == [asked]


def test_create_is_a_run_without_a_start() -> None:
    """As in docker."""
    host = FakeHost(run=instance("vm", State.STOPPED))
    run(host, "create", "debian")
    assert host.asked("run")["start"] is False


def test_kill_does_not_take_a_machine_for_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    """An empty variable in `kill vm $ID` does no harm to the machine. The hint has docker's meaning."""
    host = FakeHost()
    assert run(host, "kill", "vm") == 2
    assert "`coppice stop --grace 0 vm` ends the machine at once" in capsys.readouterr().err
    assert host.calls == []


@pytest.mark.parametrize("word", sorted(habits._MEANT))
def test_a_missing_command_is_answered_with_one_that_exists(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A word that is not a command gets an answer that can be typed; none of these words hides a
    command.
    """
    assert word not in COMMANDS
    assert word not in habits.ALIASES
    assert run(FakeHost(), word, "x") == 2
    shown = capsys.readouterr().err
    assert f"no such command '{word}'" in shown
    for line in re.findall(r"`(coppice [^`]+)`", shown):
        assert wrong_with(line) is None, line


@pytest.mark.parametrize(("group", "word"), sorted(habits._MEANT_IN_GROUPS))
def test_a_missing_command_of_a_group_is_answered_too(
    group: str, word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A word that a group does not have gets an answer that can be typed."""
    assert run(FakeHost(), group, word, "x") == 2
    shown = capsys.readouterr().err
    assert shown == f"coppice: no such command '{word}'; {habits._MEANT_IN_GROUPS[group, word]}\n"
    for line in re.findall(r"`(coppice [^`]+)`", shown):
        assert wrong_with(line) is None, line


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["volume", "insepct", "data"], "did you mean 'inspect'"),
        (["volume", "zzz"], "`coppice volume --help` lists commands"),
        (["snapshot", "schedule", "zzz"], "`coppice snapshot schedule --help` lists commands"),
        (["zzz"], "`coppice --help` lists commands"),
        (["swarm", "init"], "there is no equivalent"),
        (["context", "ls"], "COPPICE_HOST"),
    ],
)
def test_words_without_a_meaning(words: list[str], hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The nearest command of the same group is offered, and none for what Coppice does not have."""
    assert run(FakeHost(), *words) == 2
    shown = capsys.readouterr().err
    assert hint in shown
    assert ("did you mean" in shown) == ("did you mean" in hint)


@pytest.mark.parametrize(("option", "value"), sorted(habits._VALUES))
def test_a_value_of_docker_is_answered(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A network that Coppice does not have is refused with one that it has, before any request."""
    host = FakeHost()
    assert run(host, "run", option, value, "debian") == 2
    assert capsys.readouterr().err.endswith(f"; {habits._VALUES[option, value]}\n")
    assert not host.calls


@pytest.mark.parametrize("mount", ["/tmp:/b", "./x:/b", "../x:/b", "~/x:/b", "a/b:/b", "/data"])
def test_a_directory_of_the_host_is_not_a_volume(mount: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The refusal says what to do instead."""
    host = FakeHost()
    assert run(host, "run", "-v", mount, "debian") == 2
    shown = capsys.readouterr().err
    assert "cannot be mounted" in shown
    for line in re.findall(r"`(coppice [^`]+)`", shown):
        assert wrong_with(line) is None, line
    assert not host.calls


@pytest.mark.parametrize(("command", "option"), sorted(habits._OPTIONS))
def test_a_missing_option_is_answered_with_one_that_exists(
    command: str, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A docker option that coppice lacks gets an answer that can be typed."""
    assert run(FakeHost(), *([] if command == "coppice" else command.split()), option, "x", "y", "z") == 2
    shown = capsys.readouterr().err
    assert shown == f"coppice: no such option '{option}'; {habits._OPTIONS[command, option]}\n"
    for line in re.findall(r"`(coppice [^`]+)`", shown):
        assert wrong_with(line) is None, line


@pytest.mark.parametrize(("command", "argument"), sorted(habits._ARGUMENTS))
def test_a_missing_argument_is_answered_with_a_command(
    command: str, argument: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A docker command without the argument gets an answer that can be typed."""
    assert run(FakeHost(), command, "vm") == 2
    shown = capsys.readouterr().err
    assert shown.endswith(f"; {habits._ARGUMENTS[command, argument]}\n")
    for line in re.findall(r"`(coppice [^`]+)`", shown):
        assert wrong_with(line) is None, line


def test_aliases_lead_to_commands() -> None:
    """Each alias stands for a line that can be typed."""
    for word, meant in habits.ALIASES.items():
        assert word not in COMMANDS
        assert wrong_with("coppice " + " ".join(meant)) in (None, "an argument is missing"), word


@pytest.mark.parametrize("word", ["resume", "unpause", "clone"])
def test_an_alias_of_a_machine_is_none_in_a_group(word: str) -> None:
    """`snapshot restore` resets a machine: who types `snapshot resume` means another thing."""
    host = FakeHost()
    assert run(host, "snapshot", word, "s1") == 2
    assert not host.calls


@pytest.mark.parametrize("word", ["satrt", "inspet", "snapshto"])
def test_a_misspelt_command_is_answered_with_the_nearest(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The error offers the nearest command."""
    assert run(FakeHost(), word) == 2
    assert "did you mean '" in capsys.readouterr().err


def test_each_shell_has_a_completion_script(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Each shell gets its script. In bash and zsh no space follows `NAME:`, and without an offered
    path local paths are completed.
    """
    scripts = {shell: output_of(capsys, FakeHost(), "completion", shell) for shell in ("bash", "zsh", "fish")}
    assert "compopt -o nospace" in scripts["bash"]
    assert "complete -o default" in scripts["bash"]
    assert "compadd -U -V unsorted -S '' -a open" in scripts["zsh"]
    assert "_files" in scripts["zsh"]
    assert "complete --no-files" in scripts["fish"]
