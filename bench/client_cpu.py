"""CPU time of the client process of `coppice ls`, `fork`, `exec`, `rm`, `stats` and `tree`, on the data
directory and through a server (`--host`) over it, compared with an empty program.

    python -m bench.client_cpu [--home DIR --image IMAGE] [--before DIR] --output benchmarks/client-cpu.json

With an image, a machine of it is captured and forked. `--before` names another checkout, whose commands
take turns with those of this one; with an image both use the same data directory, so both must know its
schema. Compare figures within one run only: the speed of a shared host changes.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from bench.accounting import host_facts
from bench.records import HostFacts, write_report
from coppice.client import AsyncHost
from coppice.model import Record

EMPTY = "python -c pass"
BEFORE = "before: "
HOST = "--host "
_BASELINES = {
    EMPTY: [sys.executable, "-c", "pass"],
    "python -c 'import asyncio'": [sys.executable, "-c", "import asyncio"],
    "python -c 'import typer' and a command": [
        sys.executable,
        "-c",
        "import typer; app = typer.Typer(); app.command()(lambda: None); app([], standalone_mode=False)",
    ],
}
_TEMPLATE = "client-cpu"


class Cost(Record, frozen=True, kw_only=True):
    """CPU milliseconds, user and system, of one command line."""

    median_ms: float
    least_ms: float
    ratio: float  # its median divided by that of the empty program
    samples_ms: tuple[float, ...]


class ClientCpuReport(Record, frozen=True, kw_only=True):
    """One run with alternating command lines."""

    host: HostFacts | None = None  # older checkouts do not say it (see `side_by_side`)
    python: str
    samples: int
    costs: dict[str, Cost]


def cpu_ms(argv: Sequence[str], env: Mapping[str, str]) -> float:
    """Run a process; return its CPU time in ms, with that of the children that it waited for."""
    process = subprocess.Popen(argv, env=env, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(argv)} ended with status {process.returncode}")
    return (usage.ru_utime + usage.ru_stime) * 1000


def measure(
    lines: Mapping[str, Sequence[str]],
    samples: int,
    env: Mapping[str, str],
    *,
    variables: Mapping[str, Mapping[str, str]] = MappingProxyType({}),
    prepare: Callable[[str], None] = lambda _: None,
) -> ClientCpuReport:
    """Run each command line `samples` times, in turns, after one round to fill caches.

    :param variables: more variables of the environment, by the name of a line
    :param prepare: called with the name of each line before that line runs
    """
    taken: dict[str, list[float]] = {name: [] for name in lines}
    for number in range(samples + 1):
        for name, argv in lines.items():
            prepare(name)
            spent = cpu_ms(argv, {**env, **variables.get(name, {})})
            if number:
                taken[name].append(round(spent, 1))
    empty = statistics.median(taken[EMPTY])
    return ClientCpuReport(
        host=asyncio.run(_facts(Path(env["COPPICE_HOME"]))),
        python=sys.version.split()[0],
        samples=samples,
        costs={
            name: Cost(
                median_ms=round(statistics.median(spent), 1),
                least_ms=min(spent),
                ratio=round(statistics.median(spent) / empty, 1),
                samples_ms=tuple(spent),
            )
            for name, spent in taken.items()
        },
    )


async def _facts(home: Path) -> HostFacts:
    async with AsyncHost(home, background="off", spares=0) as host:
        return await host_facts(host)


def baselines() -> dict[str, list[str]]:
    """Return the programs to compare the commands with; one needs typer, if that is installed."""
    try:
        import typer  # noqa: F401 - only a test whether it is installed
    except ImportError:
        return {name: argv for name, argv in _BASELINES.items() if "typer" not in name}
    return dict(_BASELINES)


def coppice(*words: str) -> list[str]:
    """Return a command line of this Coppice."""
    return [sys.executable, "-m", "coppice", *words]


def commands(label: str, *, forks: bool) -> dict[str, list[str]]:
    """Return the words of each measured command by its name; those of forks use the template."""
    fork = f"{_TEMPLATE}-{'fork' if not label else 'before'}"
    of_forks = {"fork": ["fork", _TEMPLATE, "--name", fork], "exec": ["exec", fork, "true"], "rm": ["rm", fork]}
    lists = {name: [name] for name in ("ls", "stats", "tree")}
    return {"--version": ["--version"], **lists, **(of_forks if forks else {})}


def remote_commands(address: str, *, forks: bool) -> dict[str, list[str]]:
    """Return the words of the same commands through a server."""
    words = commands("", forks=forks)
    del words["--version"]
    return {f"{HOST}{name}": ["--host", address, *each] for name, each in words.items()}


@contextlib.contextmanager
def served(socket: Path, env: Mapping[str, str]) -> Iterator[str]:
    """Run a server on a unix socket for a block. Yield its address."""
    address = f"unix:{socket}"
    argv = coppice("serve", "--listen", address, "--spares", "0")
    with subprocess.Popen(argv, env=env, stdout=subprocess.PIPE) as process:
        try:
            if process.stdout is None or not process.stdout.readline():
                raise SystemExit("the server did not start")
            yield address
        finally:
            process.terminate()


@contextlib.contextmanager
def template(image: str | None, env: Mapping[str, str]) -> Iterator[None]:
    """Keep a template of an image for a block, and remove it with its forks."""
    if image is None:
        yield
        return
    try:
        for words in (("run", image, "--name", _TEMPLATE), ("standby", _TEMPLATE), ("promote", _TEMPLATE)):
            subprocess.run(coppice(*words), env=env, check=True)
        yield
    finally:
        leftovers = [f"{_TEMPLATE}-fork", f"{_TEMPLATE}-before", _TEMPLATE]
        subprocess.run(coppice("rm", "-f", *leftovers), env=env, check=False)


def show(report: ClientCpuReport) -> None:
    """Print the figures."""
    for name, cost in report.costs.items():
        figures = f"{cost.median_ms:7.1f} ms, least {cost.least_ms:7.1f} ms, {cost.ratio:4.1f} times `{EMPTY}`"
        sys.stdout.write(f"{name:40} {figures}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, help="data directory with the image")
    parser.add_argument("--image", help="fork a machine of this image too")
    parser.add_argument("--before", type=Path, help="another checkout of Coppice")
    parser.add_argument("--samples", type=int, default=15)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        home = options.home or Path(temporary) / "home"
        # Keep compiled modules, as an installation does.
        env = {**os.environ, "COPPICE_HOME": str(home)}
        env.pop("PYTHONDONTWRITEBYTECODE", None)
        checkouts: dict[str, dict[str, str]] = {"": {}}
        if options.before:
            checkouts[BEFORE] = {"PYTHONPATH": str(options.before / "src")}
            if not options.image:
                checkouts[BEFORE]["COPPICE_HOME"] = str(Path(temporary) / "before")
        lines, variables = baselines(), {}
        for label, own in checkouts.items():
            for name, words in commands(label, forks=bool(options.image)).items():
                lines[f"{label}coppice {name}"] = coppice(*words)
                variables[f"{label}coppice {name}"] = own
        with template(options.image, env), served(Path(temporary) / "server.sock", env) as address:
            for name, words in remote_commands(address, forks=bool(options.image)).items():
                lines[f"coppice {name}"] = coppice(*words)
            report = measure(lines, options.samples, env, variables=variables)
    show(report)
    if options.output:
        write_report(report, options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
