"""Words of docker, podman and virsh users: aliases that work here, and hints for the others."""

from __future__ import annotations

from collections.abc import Sequence

ALIASES = {
    "ps": ("ls",),
    "list": ("ls",),
    "images": ("image", "ls"),
    "rmi": ("image", "rm"),
    "create": ("run", "--no-start"),
    "remove": ("rm",),
    "delete": ("rm",),
    "clone": ("fork",),
    "resume": ("restore",),
    "unpause": ("restore",),
}
"""Alternative names of commands."""

_LOGINS = "`skopeo login REGISTRY` saves a login, which `coppice pull` uses"
_IMAGES = "`coppice pull NAME` gets an image from a registry, `coppice image build NAME` makes one of Debian"
_SHELL = "`coppice exec -it NAME -- sh` opens a terminal"
_MEANT = {
    "pause": "`coppice standby NAME` saves the memory to disk and ends the process; `coppice restore NAME` continues",
    "suspend": "`coppice standby NAME` saves the memory to disk; `coppice restore NAME` continues",
    "freeze": "`coppice standby NAME`, then `coppice promote NAME`, makes a template",
    "template": "`coppice standby NAME`, then `coppice promote NAME`, makes a template",
    "restart": "`coppice stop NAME`, then `coppice start NAME`",
    "reboot": "`coppice stop NAME`, then `coppice start NAME`",
    "shutdown": "`coppice stop NAME` powers a guest off",
    "destroy": "`coppice stop --grace 0 NAME` ends a guest at once, `coppice rm NAME` removes it",
    "console": f"{_SHELL}; `coppice logs -f NAME` follows its console",
    "shell": _SHELL,
    "sh": _SHELL,
    "bash": _SHELL,
    "ssh": _SHELL,
    "enter": _SHELL,
    "login": _LOGINS,
    "logout": "`skopeo logout REGISTRY` removes a saved login",
    "push": "images stay on this host",
    "search": _IMAGES,
    "build": "`coppice image build NAME` makes an image of Debian",
    "buildx": "`coppice image build NAME` makes an image of Debian",
    "load": "`coppice image import NAME PATH` takes a tar archive, a `docker save` archive or an OCI layout",
    "tag": "`coppice image tag IMAGE NAME` gives an image another name",
    "history": "`coppice image inspect IMAGE` shows an image",
    "commit": "`coppice snapshot create NAME` saves a machine's current state",
    "checkpoint": "`coppice snapshot create NAME` saves a machine's current state",
    "snapshots": "`coppice snapshot ls` lists snapshots",
    "volumes": "`coppice volume ls` lists volumes",
    "kernels": "`coppice kernel ls` lists kernels",
    "save": "`coppice export NAME` writes a template to a file, `coppice cp NAME:PATH DIR` copies files out of a machine",
    "diff": "`coppice inspect NAME` shows how much of its disk a machine has written",
    "forward": "`coppice port-forward NAME PORT` forwards a port of this machine to one of the guest",
    "nc": "`coppice connect NAME PORT` is a connection to a port of the guest",
    "port": "`coppice inspect NAME` shows published ports",
    "show": "`coppice inspect NAME`",
    "describe": "`coppice inspect NAME`",
    "info": "`coppice doctor` checks this host, `coppice inspect NAME` shows a machine",
    "dominfo": "`coppice inspect NAME`",
    "jobs": "`coppice commands NAME` lists the commands of a machine",
    "top": "`coppice exec NAME -- top -b -n 1` lists processes, `coppice stats` shows memory",
    **dict.fromkeys(("container", "vm", "instance"), "leave it out: `coppice ls`, `coppice rm NAME`"),
    "system": "`coppice gc` frees space, `coppice doctor` checks this host",
    "prune": "`coppice gc --caches` frees space",
    "df": "`coppice stats --budget` shows memory and disk",
    "network": "`coppice run --publish HOST:GUEST IMAGE` publishes a port",
    "rename": "a machine keeps its name",
    "help": "`coppice --help` lists commands, `coppice run --help` describes one",
    "version": "`coppice --version`",
}
"""Hints for words that are not commands here."""

_OPTIONS = {
    ("coppice", "-v"): "`coppice --version`",
    ("coppice", "-H"): "write --host URL",
    ("coppice", "-D"): "write --debug",
    ("update", "--memory"): "a machine keeps its size; `coppice run --memory SIZE IMAGE` makes another machine",
    ("update", "--cpus"): "a machine keeps its size; `coppice run --cpus N IMAGE` makes another machine",
    ("run", "-i"): "run returns when the machine is up; `coppice exec -it NAME -- sh` opens a terminal in it",
    ("run", "-t"): "run returns when the machine is up; `coppice exec -it NAME -- sh` opens a terminal in it",
    ("run", "--interactive"): "`coppice exec -it NAME -- sh` opens a terminal in a machine that runs",
    ("run", "--tty"): "`coppice exec -it NAME -- sh` opens a terminal in a machine that runs",
    ("run", "--rm"): "a machine exists until `coppice rm NAME`",
    ("run", "--mount"): "write --volume NAME:PATH",
    ("run", "-l"): "write --tag KEY=VALUE",
    ("run", "--label"): "write --tag KEY=VALUE",
    ("run", "-c"): "options go before `--`, the machine's command after it",
    ("ls", "--filter"): "write --state STATE or --tag KEY=VALUE",
    ("ls", "-f"): "write --state STATE or --tag KEY=VALUE",
    ("ls", "--format"): "`coppice --json ls` prints all fields",
    ("inspect", "--format"): "`coppice --json inspect NAME` prints all fields",
    ("inspect", "-f"): "`coppice --json inspect NAME` prints all fields",
    ("rm", "-v"): "volumes outlive machines; `coppice volume rm VOLUME` removes one",
    ("attach", "--sig-proxy"): "write -n: pass neither input nor signals on",
    ("attach", "--detach-keys"): "`~.` at the start of a line leaves the command",
    ("cp", "-L"): "links stay links; copy the link's target instead",
}
"""Hints for options that other programs' commands have."""


def advice(word: str, commands: Sequence[str]) -> str:
    """Return a hint for a word that is not a command."""
    if word in _MEANT:
        return _MEANT[word]
    from difflib import get_close_matches

    close = get_close_matches(word, [*commands, *ALIASES])
    return f"did you mean {' or '.join(map(repr, close))}?" if close else "`coppice --help` lists commands"


_ARGUMENTS = {
    (
        "attach",
        "command",
    ): "`coppice commands NAME` lists commands; `coppice logs -f NAME` follows the machine's own process",
}
"""Hints for arguments that other programs' commands do without."""


def argument_advice(command: str, argument: str) -> str | None:
    """Return a hint for an argument that is missing, or None."""
    return _ARGUMENTS.get((command, argument))


def option_advice(command: str, option: str) -> str | None:
    """Return a hint for an option that a command does not have, or None."""
    return _OPTIONS.get((command, option))
