"""A benchmark's machines are removed when it ends, even when it fails."""

from __future__ import annotations

import contextlib

import pytest

from bench import trial
from bench.trial import Guest, tagged
from coppice.client import AsyncHost
from coppice.errors import Busy, NotFound
from coppice.host.removal import Removal
from coppice.model import MIB
from coppice.requests import GetRequest, RmRequest
from fakes.hosting import assert_tidy, boot
from fakes.rooms import IMAGE


async def test_a_machine_that_cannot_be_removed_keeps_no_other(
    fake_host: AsyncHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that another process holds is reported, and the other machines of the benchmark are
    removed all the same.
    """
    rm = fake_host.local.group(Removal).rm

    async def removed(request: RmRequest) -> None:
        if (await fake_host.call(GetRequest(instance=request.instance))).name == "fir":
            raise Busy("another process holds it", hint="wait")
        await rm(request)

    monkeypatch.setattr(fake_host.local.group(Removal), "rm", removed)
    async with contextlib.AsyncExitStack() as stack:
        tags = await stack.enter_async_context(tagged(fake_host))
        for name in ("elm", "fir"):
            await boot(fake_host, name, tags=tags)
        with pytest.raises(Busy):
            await stack.aclose()
    await assert_tidy(fake_host, "fir")


async def test_the_guest_kernel_can_be_chosen(fake_host: AsyncHost) -> None:
    """A kernel that the data directory lacks is refused by name, so the choice is used."""
    guest = Guest(image=IMAGE, kernel="f00dfeed", memory_bytes=64 * MIB)
    with pytest.raises(NotFound, match="f00dfeed"):
        await trial.boot(fake_host, guest, {})
