"""The demo: warm one machine up, freeze it, grow sixteen from it, and let each of them work at once.

The machine runs a Python process that has numpy loaded. Loading is what a cold start pays each time, and a fork never: it finds the process as it
was in the template, with its memory shared. All times are measured in this run. Everything is removed at the end, except for the cached image
and kernel.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from coppice import AsyncHost, CoppiceError, ForkResult, Instance, NotFound, Progress

FORKS = 16
IMAGE = "demo-numpy"
PACKAGES = ("python3", "python3-numpy")
TAGS = {"demo": "warm-numpy"}
MIB = 1 << 20
DEADLINE_S = 180.0
HERE = Path(__file__).parent
WARM_SERVER = (HERE / "warm_server.py").read_text()
ASK = ["sh", "-c", 'printf "%s\\n" "$1" >/run/ask; cat /run/answer', "ask"]
FIRST = 60  # fibonacci(92) is the last that fits into 64 bits

console = Console(highlight=False)


def fibonacci(n: int) -> int:
    """The answer as the host knows it."""
    a, b = 0, 1
    for _ in range(n):
        a, b = b, a + b
    return a


def question(n: int) -> str:
    """The same, to be found by numpy in a guest."""
    return f"numpy.linalg.matrix_power(numpy.array([[1, 1], [1, 0]]), {n})[0, 1]"


async def ask(host: AsyncHost, vm: Instance, expression: str) -> str:
    """Evaluate an expression in the warm process of a machine."""
    result = await host.exec(vm, [*ASK, expression], timeout_s=DEADLINE_S)
    if result.exit_code:
        raise SystemExit(f"{vm.name}: {result.stderr.decode(errors='replace')}")
    return result.stdout.decode().strip()


async def prepare_image(host: AsyncHost) -> None:
    """A Debian with numpy, built once and kept."""
    try:
        image = await host.image_inspect(IMAGE)
        console.print(f"[dim]image {IMAGE}: {image.size_bytes / MIB:.0f} MiB, from the last time")
    except NotFound:
        with console.status("building the image") as status:

            def show(step: Progress) -> None:
                of = f" of {step.total}" if step.total and step.unit == "items" else ""
                amount = f"{step.done / MIB:.0f} MiB" if step.unit == "bytes" else f"{step.done}{of}"
                status.update(f"building an image of Debian with numpy: {step.stage} {amount if step.done else ''}")

            start = time.perf_counter()
            image = await host.image_build(IMAGE, include=PACKAGES, progress=show)
        took = time.perf_counter() - start
        console.print(
            f"[dim]image {IMAGE}: {image.size_bytes / MIB:.0f} MiB, built in {took:.0f} s and kept for the next time"
        )
    with console.status("fetching a kernel"):
        kernel = await host.kernel_fetch()
    console.print(f"[dim]kernel {kernel.version}")


async def cold_start(host: AsyncHost) -> tuple[Instance, float]:
    """Boot, load numpy, and answer; seconds until the answer."""
    start = time.perf_counter()
    vm = await host.run(IMAGE, ["python3", "-c", WARM_SERVER], name="warm", tags=TAGS)
    async with asyncio.timeout(DEADLINE_S):
        async for line in host.logs(vm, follow=True):
            if b"is loaded" in line:
                break
    if int(await ask(host, vm, question(50))) != fibonacci(50):
        raise SystemExit("the guest cannot count")
    return vm, time.perf_counter() - start


async def one_fork(host: AsyncHost, template: Instance) -> float:
    """Seconds from asking for a fork until the warm process in it has answered."""
    start = time.perf_counter()
    async with host.forks(template, 1) as (vm,):
        await ask(host, vm, question(51))
        return time.perf_counter() - start


async def fan_out(host: AsyncHost, template: Instance) -> tuple[tuple[ForkResult, ...], list[str], float]:
    """Sixteen forks, each with its own question; their answers, and seconds until the last."""
    start = time.perf_counter()
    report = await host.fork(template, count=FORKS, names=["fork"], tags=TAGS, atomic=True)
    answers = await asyncio.gather(*(ask(host, vm, question(FIRST + n)) for n, vm in enumerate(report.instances)))
    return report.results, list(answers), time.perf_counter() - start


def print_forks(results: tuple[ForkResult, ...], answers: list[str]) -> None:
    """One line per fork. Ends the demo where an answer is wrong."""
    table = Table("fork", "memory", box=None, header_style="dim")
    for heading in ("running after", "asked for", "answered"):
        table.add_column(heading, justify="right")
    for n, (result, answer) in enumerate(zip(results, answers, strict=True), FIRST):
        table.add_row(result.name, str(result.sharing), f"{result.total_ms:.0f} ms", f"fibonacci({n})", answer)
    console.print(table)
    if [int(answer) for answer in answers] != [fibonacci(FIRST + n) for n in range(FORKS)]:
        raise SystemExit("an answer is wrong")
    console.print(f"all {FORKS} answers are right\n")


async def remove_all(host: AsyncHost) -> None:
    """Remove what this demo, or one before that was killed, has made: forks before their template."""
    for vm in reversed(await host.ls(tags=TAGS)):
        await host.rm(vm)


async def demo() -> None:
    """The whole show."""
    async with AsyncHost() as host:
        console.rule("[bold]One warm machine, sixteen forks", align="left")
        await remove_all(host)
        await prepare_image(host)
        try:
            with console.status("booting a machine, and loading numpy in it"):
                vm, cold_s = await cold_start(host)
            console.print(f"\ncold start: boot, load numpy, answer: [bold]{cold_s:.2f} s")
            vm, capture = await host.standby(vm)
            template = await host.promote(vm)
            console.print(
                f"frozen into a template: paused for {capture.pause_ms:.0f} ms, {capture.ram_bytes_written} bytes of RAM written"
            )
            fork_s = statistics.median([await one_fork(host, template) for _ in range(5)])
            console.print(
                f"one fork: ask for it, and the process in it answers: [bold]{fork_s:.2f} s[/] (median of 5)\n"
            )
            with console.status(f"growing {FORKS} forks"):
                results, answers, all_s = await fan_out(host, template)
            print_forks(results, answers)
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
            with console.status("removing the machines"):
                await remove_all(host)


if __name__ == "__main__":
    try:
        asyncio.run(demo())
    except CoppiceError as error:
        sys.exit(f"demo: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
