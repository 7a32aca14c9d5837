"""The demo: warm up one machine, freeze it, fork it sixteen times, and let all forks work at once.

The machine runs a Python process that has numpy loaded. A cold start loads it each time. A fork
does not: it has the process in the state of the template, and shares its memory. All times are
measured in this run. Everything is removed at the end, except for the cached image and kernel.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.status import Status
from rich.table import Table

from coppice import AsyncForks, AsyncHost, AsyncMachine, CoppiceError, NotFound, Progress

FORKS = 16
IMAGE = "demo-numpy"
PACKAGES = ("python3", "python3-numpy")
TAGS = {"demo": "warm-numpy"}
MIB = 1 << 20
DEADLINE_S = 180.0
HERE = Path(__file__).parent
WARM_SERVER = (HERE / "warm_server.py").read_text()
ASK = ["sh", "-c", 'printf "%s\\n" "$1" >/run/ask; cat /run/answer', "ask"]
FIRST = 60  # fibonacci(92) is the last one that fits into 64 bits

console = Console(highlight=False)


def step(text: str) -> Status:
    """Show what the block does: a spinner on a terminal, otherwise a line."""
    if not console.is_terminal:
        console.print(f"[dim]{text} ...")
    return console.status(text)


def fibonacci(n: int) -> int:
    """Return the expected answer."""
    a, b = 0, 1
    for _ in range(n):
        a, b = b, a + b
    return a


def question(n: int) -> str:
    """Return an expression with which numpy computes the answer in a guest."""
    return f"numpy.linalg.matrix_power(numpy.array([[1, 1], [1, 0]]), {n})[0, 1]"


async def ask(vm: AsyncMachine, expression: str) -> str:
    """Evaluate an expression in the warm process of a machine."""
    result = await vm.exec([*ASK, expression], timeout_s=DEADLINE_S)
    if result.exit_code:
        raise SystemExit(f"{vm.name}: {result.stderr.decode(errors='replace')}")
    return result.stdout.decode().strip()


async def prepare_image(host: AsyncHost) -> None:
    """Return an image of Debian with numpy, built once and kept."""
    try:
        image = await host.images.inspect(IMAGE)
        console.print(f"[dim]image {IMAGE}: {image.size_bytes / MIB:.0f} MiB, from the last time")
    except NotFound:
        with step("building an image of Debian with numpy, which takes a minute or two") as status:

            def show(step: Progress) -> None:
                of = f" of {step.total}" if step.total and step.unit == "items" else ""
                amount = f"{step.done / MIB:.0f} MiB" if step.unit == "bytes" else f"{step.done}{of}"
                status.update(f"building an image of Debian with numpy: {step.stage} {amount if step.done else ''}")

            start = time.perf_counter()
            image = await host.images.build(IMAGE, include=PACKAGES, progress=show)
        took = time.perf_counter() - start
        console.print(
            f"[dim]image {IMAGE}: {image.size_bytes / MIB:.0f} MiB, built in {took:.0f} s and kept for the next time"
        )
    with step("fetching a kernel"):
        kernel = await host.kernels.fetch()
    console.print(f"[dim]kernel {kernel.version}")


async def cold_start(host: AsyncHost) -> tuple[AsyncMachine, float]:
    """Boot, load numpy, and answer; return the machine and the seconds until the answer."""
    start = time.perf_counter()
    vm = await host.run(IMAGE, ["python3", "-c", WARM_SERVER], name="warm", tags=TAGS)
    async with asyncio.timeout(DEADLINE_S):
        async for line in vm.logs(follow=True):
            if b"is loaded" in line:
                break
    if int(await ask(vm, question(50))) != fibonacci(50):
        raise SystemExit("the guest's first answer is wrong")
    return vm, time.perf_counter() - start


async def one_fork(template: AsyncMachine) -> float:
    """Return the seconds from the request for a fork until its warm process has answered."""
    start = time.perf_counter()
    async with template.fork_one() as vm:
        await ask(vm, question(51))
        return time.perf_counter() - start


async def fan_out(template: AsyncMachine) -> tuple[AsyncForks, list[str], float]:
    """Fork sixteen times and ask each fork a question; return the answers, and seconds until the
    last.
    """
    start = time.perf_counter()
    forks = await template.fork(FORKS, names=["fork"], tags=TAGS, atomic=True)
    answers = await asyncio.gather(*(ask(vm, question(FIRST + n)) for n, vm in enumerate(forks)))
    return forks, list(answers), time.perf_counter() - start


def print_forks(forks: AsyncForks, answers: list[str]) -> None:
    """Print one line per fork. End the demo if an answer is wrong."""
    table = Table("fork", "memory", box=None, header_style="dim")
    for heading in ("running after", "asked for", "answered"):
        table.add_column(heading, justify="right")
    for n, (result, answer) in enumerate(zip(forks.report.results, answers, strict=True), FIRST):
        table.add_row(result.name, str(result.sharing), f"{result.total_ms:.0f} ms", f"fibonacci({n})", answer)
    console.print(table)
    if [int(answer) for answer in answers] != [fibonacci(FIRST + n) for n in range(FORKS)]:
        raise SystemExit("an answer is wrong")
    console.print(f"all {FORKS} answers are right\n")


async def remove_all(host: AsyncHost) -> None:
    """Remove the machines of this demo and of killed earlier ones, forks before their template."""
    for vm in reversed(await host.ls(tags=TAGS)):
        await vm.rm()


async def demo() -> None:
    """Run the demo."""
    async with AsyncHost() as host:
        console.rule("[bold]One warm machine, sixteen forks", align="left")
        await remove_all(host)
        await prepare_image(host)
        try:
            with step("booting a machine, and loading numpy in it"):
                vm, cold_s = await cold_start(host)
            console.print(f"\ncold start: boot, load numpy, answer: [bold]{cold_s:.2f} s")
            with step("freezing it"):
                capture = await vm.standby()
                template = await vm.promote()
            console.print(
                f"frozen into a template: paused for {capture.pause_ms:.0f} ms, {capture.ram_bytes_written} bytes of RAM written"
            )
            with step("growing one fork, five times"):
                fork_s = statistics.median([await one_fork(template) for _ in range(5)])
            console.print(
                f"one fork: ask for it, and the process in it answers: [bold]{fork_s:.2f} s[/] (median of 5)\n"
            )
            with step(f"growing {FORKS} forks"):
                forks, answers, all_s = await fan_out(template)
            print_forks(forks, answers)
            console.print("[dim]$ coppice tree")
            tree = await asyncio.create_subprocess_exec(sys.executable, "-m", "coppice", "--home", host.home, "tree")
            await tree.wait()
            memory = [report for name, report in (await host.stats()).items() if name != template.name]
            mapped, own = sum(report.mapped_bytes for report in memory), sum(report.unique_bytes for report in memory)
            console.print(
                f"\nA fork answered [bold]{cold_s / fork_s:.0f} times[/] sooner than a cold start: {fork_s:.2f} s, not {cold_s:.2f} s.\n"
                f"{FORKS} forks at once had all answered after [bold]{all_s:.2f} s[/]. They see {mapped / MIB:.0f} MiB of RAM;\n"
                f"[bold]{own / MIB:.0f} MiB[/] of it are their own by now, and the rest is one file, shared."
            )
        finally:
            with step("removing the machines"):
                await remove_all(host)


if __name__ == "__main__":
    try:
        asyncio.run(demo())
    except CoppiceError as error:
        sys.exit(f"demo: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
