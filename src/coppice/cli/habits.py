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

ALIASES_IN_GROUPS = ("ps", "list", "remove", "delete")
"""Those that mean the same in a group that has the command: `volume list`."""

_GC = "`coppice gc --caches` frees space"
_NOT_HERE = "there is no equivalent; `coppice --help` lists commands"
_NOT_OF_A_FILE = (
    "`coppice image build NAME` makes an image of Debian, not of a Dockerfile; `coppice pull REF` gets a built one"
)
_ALL_FIELDS = "`coppice --json inspect NAME` prints all fields"
_ALL_RIGHTS = "leave it out: the guest's root has all rights in the machine"
_OWN_KERNEL = "leave it out: a machine has a kernel of its own"
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
    "top": "`coppice stats` shows memory; `coppice exec NAME -- top -b -n 1` lists processes, if the image has it",
    **dict.fromkeys(("container", "vm", "instance"), "leave it out: `coppice ls`, `coppice rm NAME`"),
    "system": "`coppice gc` frees space, `coppice doctor` checks this host",
    "prune": _GC,
    "builder": _GC,
    "context": "`coppice --host URL ls` uses another host, as COPPICE_HOST does",
    "compose": "`coppice run IMAGE` starts one machine; tags group machines: `coppice rm --tag KEY=VALUE`",
    **dict.fromkeys(
        ("swarm", "service", "stack", "node", "secret", "config", "plugin", "manifest", "trust"), _NOT_HERE
    ),
    "df": "`coppice stats --budget` shows memory and disk",
    "network": "`coppice run --publish HOST:GUEST IMAGE` publishes a port",
    "rename": "a machine keeps its name",
    "help": "`coppice --help` lists commands, `coppice run --help` describes one",
    "version": "`coppice --version`",
}
"""Hints for words that are not commands here."""

_MEANT_IN_GROUPS = {
    ("image", "prune"): _GC,
    ("image", "history"): _MEANT["history"],
    ("image", "save"): "`coppice export NAME` writes a template to a file; an image stays on this host",
    ("image", "load"): _MEANT["load"],
    ("image", "push"): _MEANT["push"],
    ("image", "search"): _IMAGES,
    ("volume", "prune"): "`coppice volume rm VOLUME` removes one: volumes are kept until then",
    ("volume", "update"): "a volume keeps its size; `coppice volume create NAME --size SIZE` makes another",
    ("snapshot", "prune"): "`coppice snapshot rm SNAPSHOT` removes one, `coppice snapshot schedule` some by their age",
}
"""Hints for words that are not commands of a group."""

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
    ("run", "--net"): "write --network nat, or leave it out",
    ("run", "-P"): "write -p auto:PORT for each port; `coppice inspect NAME` shows the picked ones",
    ("run", "--publish-all"): "write -p auto:PORT for each port; `coppice inspect NAME` shows the picked ones",
    ("run", "--expose"): "`coppice port-forward NAME PORT` reaches each port; -p publishes one",
    ("run", "--privileged"): _ALL_RIGHTS,
    ("run", "--cap-add"): _ALL_RIGHTS,
    ("run", "--security-opt"): _OWN_KERNEL,
    (
        "run",
        "--sysctl",
    ): "`coppice exec NAME -- sh -c 'echo VALUE > /proc/sys/KEY'` sets it: a machine has a kernel of its own",
    ("run", "--init"): "leave it out: the machine's own first process does this",
    ("run", "--read-only"): "a machine writes to a disk of its own; --volume NAME:PATH:ro mounts a volume read-only",
    ("run", "--dns"): "`coppice exec NAME -- sh -c 'echo nameserver ADDRESS > /etc/resolv.conf'` selects a name server",
    ("run", "--add-host"): "`coppice exec NAME -- sh -c 'echo ADDRESS HOST >> /etc/hosts'` adds a name",
    ("run", "--platform"): "`coppice pull --platform OS/ARCH REF` selects the image to run",
    ("run", "--shm-size"): "it is half of the machine's memory; write --memory SIZE",
    ("run", "--tmpfs"): "`coppice exec NAME -- mount -t tmpfs tmpfs PATH` mounts one",
    ("run", "--health-cmd"): "write --health exec:COMMAND",
    ("run", "--volumes-from"): "write --volume NAME:PATH for each volume",
    ("run", "--cidfile"): "`run` prints the machine's name: `coppice run IMAGE > FILE`",
    ("logs", "--since"): "the console has no times; -n LINES prints the last lines, `coppice events` has times",
    ("logs", "--until"): "the console has no times; -n LINES prints the last lines, `coppice events` has times",
    ("logs", "-t"): "the console has no times; `coppice events` has those of the machine's changes",
    ("logs", "--timestamps"): "the console has no times; `coppice events` has those of the machine's changes",
    ("ls", "--format"): "`coppice --json ls` prints all fields",
    ("ls", "--no-trunc"): "`coppice --json ls` prints all fields",
    ("ls", "-n"): "`coppice ls -q | tail -n 3` prints the latest: they are listed oldest first",
    ("ls", "--last"): "`coppice ls -q | tail -n 3` prints the latest: they are listed oldest first",
    ("ls", "-l"): "`coppice ls -q | tail -n 1` prints the latest: they are listed oldest first",
    ("ls", "--latest"): "`coppice ls -q | tail -n 1` prints the latest: they are listed oldest first",
    ("ls", "-s"): "`coppice stats` shows memory, `coppice inspect NAME` the disk",
    ("ls", "--size"): "`coppice stats` shows memory, `coppice inspect NAME` the disk",
    ("stats", "-a"): "leave it out: all are shown that have memory",
    ("stats", "--format"): "`coppice --json stats` prints all figures",
    **dict.fromkeys((("inspect", "--format"), ("inspect", "-f")), _ALL_FIELDS),
    **{
        (f"{group} inspect", option): f"`coppice --json {group} inspect NAME` prints all fields"
        for group in ("image", "volume", "snapshot")
        for option in ("--format", "-f")
    },
    **{
        (f"{group} ls", option): f"`coppice --json {group} ls` prints all fields"
        for group in ("image", "volume", "snapshot")
        for option in ("--format", "--no-trunc", "--filter", "-f")
    },
    **dict.fromkeys((("image build", each) for each in ("-t", "--tag", "-f", "--file", "--build-arg")), _NOT_OF_A_FILE),
    ("pull", "-a"): "name each tag: `coppice pull NAME:TAG NAME:TAG`",
    ("volume create", "--name"): "write the name alone: `coppice volume create NAME`",
    ("volume create", "--label"): "write --tag KEY=VALUE",
    ("volume create", "-d"): "leave it out: a volume is a disk on this host",
    ("volume create", "--driver"): "leave it out: a volume is a disk on this host",
    ("exec", "--privileged"): _ALL_RIGHTS,
    ("exec", "--detach-keys"): "`~.` at the start of a line leaves a command with a terminal",
    ("events", "--since"): "write --after ID, the number of an event",
    ("start", "-a"): "`coppice logs -f NAME` follows the machine's process",
    ("start", "-i"): "`coppice exec -it NAME -- sh` opens a terminal in a machine that runs",
    ("stop", "-s"): "`coppice kill NAME main --signal SIGNAL` sends one to the machine's process",
    ("stop", "--signal"): "`coppice kill NAME main --signal SIGNAL` sends one to the machine's process",
    ("rm", "-v"): "volumes outlive machines; `coppice volume rm VOLUME` removes one",
    ("rm", "--volumes"): "volumes outlive machines; `coppice volume rm VOLUME` removes one",
    ("attach", "--sig-proxy"): "write -n: pass neither input nor signals on",
    ("attach", "--detach-keys"): "`~.` at the start of a line leaves the command",
    ("cp", "-L"): "links stay links; copy the link's target instead",
}
"""Hints for options that other programs' commands have."""


_VALUES = {
    ("--network", "host"): "write --network nat, and -p HOST:GUEST for each port that this host is to forward",
    ("--network", "bridge"): "write --network nat",
    ("--network", "default"): "leave it out",
}
"""Hints for values of other programs' options."""


def advice(word: str, path: str, commands: Sequence[str]) -> str:
    """Return a hint for a word that is not a command of `coppice`, or of the group with this path."""
    group = path.removeprefix("coppice").strip()
    meant = _MEANT_IN_GROUPS.get((group, word)) if group else _MEANT.get(word)
    if meant is not None:
        return meant
    from difflib import get_close_matches

    close = get_close_matches(word, [*commands, *(() if group else ALIASES)])
    return f"did you mean {' or '.join(map(repr, close))}?" if close else f"`{path} --help` lists commands"


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


def value_advice(option: str, value: str) -> str | None:
    """Return a hint for a value that an option does not have, or None."""
    return _VALUES.get((option, value))


def option_advice(command: str, option: str) -> str | None:
    """Return a hint for an option that a command does not have, or None."""
    return _OPTIONS.get((command, option))
