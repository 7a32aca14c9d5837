"""The machines of a benchmark go away with it, whatever happens."""

from __future__ import annotations

import contextlib

import pytest

from coppice.bench.trial import tagged
from coppice.errors import Busy
from coppice.host import AsyncHost
from coppice.host.base import Reference
from coppice.model import Instance
from fakes.hosting import assert_tidy, boot


async def test_a_machine_that_stays_keeps_no_other(fake_host: AsyncHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that somebody else holds is said, and the rest of the run's machines do not run on for it."""
    rm = fake_host.rm

    async def removed(reference: Reference) -> None:
        if isinstance(reference, Instance) and reference.name == "fir":
            raise Busy("somebody holds it", hint="wait")
        await rm(reference)

    monkeypatch.setattr(fake_host, "rm", removed)
    async with contextlib.AsyncExitStack() as stack:
        tags = await stack.enter_async_context(tagged(fake_host))
        for name in ("elm", "fir"):
            await boot(fake_host, name, tags=tags)
        with pytest.raises(Busy):
            await stack.aclose()
    await assert_tidy(fake_host, "fir")
