"""What both benchmarks share: machines that carry the run's tag, and go away with it whatever happens."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import AsyncIterator, Callable

from coppice.completion import complete
from coppice.errors import CoppiceError, GuestError
from coppice.host import AsyncHost
from coppice.model import MIB, Instance
from coppice.names import new_name

TAG = "coppice.bench"
EXEC_DEADLINE_S = 300.0

Say = Callable[[str], None]
"""Told what is being measured, one line each."""


@contextlib.asynccontextmanager
async def tagged(host: AsyncHost) -> AsyncIterator[dict[str, str]]:
    """The tags for all machines of one run; those that have them are removed at the end of the block."""
    tags = {TAG: secrets.token_hex(8)}
    try:
        yield tags
    finally:
        await complete(remove_tagged(host, tags))


async def remove_tagged(host: AsyncHost, tags: dict[str, str]) -> None:
    """Remove the machines that have these tags, youngest first: a template goes after its forks.

    :raises CoppiceError: one could not be removed, which kept nobody from the others
    """
    failure: CoppiceError | None = None
    for instance in reversed(await host.ls(tags=tags)):
        try:
            await host.rm(instance)
        except CoppiceError as error:
            failure = failure or error
    if failure is not None:
        raise failure


async def boot(host: AsyncHost, image: str, memory_bytes: int, tags: dict[str, str]) -> Instance:
    """A freshly booted machine, whose agent has answered."""
    return await host.run(image, name=new_name("bench"), memory_bytes=memory_bytes, tags=tags)


async def make_template(host: AsyncHost, image: str, memory_bytes: int, tags: dict[str, str]) -> Instance:
    """A template whose guest has run the commands of the benchmark once, so that their code is in its memory."""
    source = await boot(host, image, memory_bytes, tags)
    await answer(host, source)
    await dirty(host, source, MIB)
    await host.standby(source)
    return await host.promote(source)


async def answer(host: AsyncHost, instance: Instance) -> None:
    """Return when a command inside has run and its exit status is here.

    :raises GuestError: it failed
    """
    await _command(host, instance, "true")


async def dirty(host: AsyncHost, instance: Instance, size_bytes: int) -> None:
    """Let a process in the guest fill `size_bytes` of memory with random bytes, and end. Its pages stay dirty.

    :raises GuestError: it failed
    """
    await _command(
        host, instance, "dd", "if=/dev/urandom", "of=/dev/null", f"bs={size_bytes}", "count=1", "iflag=fullblock"
    )


async def _command(host: AsyncHost, instance: Instance, *argv: str) -> None:
    result = await host.exec(instance, argv, timeout_s=EXEC_DEADLINE_S)
    if result.exit_code:
        said = result.stderr.decode(errors="replace").strip()[-200:]
        raise GuestError(
            f"`{argv[0]}` failed in {instance.name} ({result.exit_code}): {said}",
            hint="use an image that has coreutils",
        )
