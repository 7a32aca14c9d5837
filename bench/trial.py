"""Helpers of both benchmarks: machines with the run's tag, which are removed however the run
ends.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import AsyncIterator, Callable

from coppice.client import AsyncHost, AsyncMachine
from coppice.completion import complete
from coppice.errors import CoppiceError, GuestError
from coppice.model import MIB, Record
from coppice.names import new_name

TAG = "coppice.bench"
EXEC_DEADLINE_S = 300.0

Say = Callable[[str], None]
"""Receives a line for each measurement."""


@contextlib.asynccontextmanager
async def tagged(host: AsyncHost) -> AsyncIterator[dict[str, str]]:
    """Yield the tags for all machines of one run; remove these machines at the end of the block."""
    tags = {TAG: secrets.token_hex(8)}
    try:
        yield tags
    finally:
        await complete(remove_tagged(host, tags))


async def remove_tagged(host: AsyncHost, tags: dict[str, str]) -> None:
    """Remove the machines with these tags, youngest first, since a template goes after its forks.

    :raises CoppiceError: a machine could not be removed; the others were
    """
    failure: CoppiceError | None = None
    for machine in reversed(await host.ls(tags=tags)):
        try:
            await machine.rm()
        except CoppiceError as error:
            failure = failure or error
    if failure is not None:
        raise failure


class Guest(Record, frozen=True, kw_only=True):
    """A machine to boot. `kernel` is the key of a kernel; None is Debian's. `network` None is the
    host's default.
    """

    image: str
    kernel: str | None
    network: str | None = None
    memory_bytes: int


async def boot(host: AsyncHost, guest: Guest, tags: dict[str, str]) -> AsyncMachine:
    """Boot a machine; return it when its agent has answered."""
    return await host.run(
        guest.image,
        name=new_name("bench"),
        kernel=guest.kernel,
        memory_bytes=guest.memory_bytes,
        network=guest.network,
        tags=tags,
    )


async def make_template(host: AsyncHost, guest: Guest, tags: dict[str, str]) -> AsyncMachine:
    """Make a template whose guest has run the benchmark's commands once: their code is in its
    memory.
    """
    source = await boot(host, guest, tags)
    await answer(source)
    await dirty(source, MIB)
    return await source.freeze()


async def answer(machine: AsyncMachine) -> None:
    """Run a command in the guest; return when its exit status has arrived.

    :raises GuestError: it failed
    """
    await _command(machine, "true")


async def dirty(machine: AsyncMachine, size_bytes: int) -> None:
    """Run a process in the guest that fills `size_bytes` with random bytes and ends. Its pages stay
    dirty.

    :raises GuestError: it failed
    """
    await _command(machine, "dd", "if=/dev/urandom", "of=/dev/null", f"bs={size_bytes}", "count=1", "iflag=fullblock")


async def _command(machine: AsyncMachine, *argv: str) -> None:
    result = await machine.exec(argv, timeout_s=EXEC_DEADLINE_S)
    if result.exit_code:
        said = result.stderr.decode(errors="replace").strip()[-200:]
        raise GuestError(
            f"`{argv[0]}` failed in {machine.name} ({result.exit_code}): {said}",
            hint="use an image that has coreutils",
        )
