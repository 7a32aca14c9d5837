"""A host process that takes part in histories: `python -m history_process [FAKE_VMM]` reads orders
from stdin and writes answers to stdout, a line of JSON each.

It lives through many histories, because the guests of the fake VMMs that it started must answer as
long as any process may use them.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec

from coppice.client import AsyncHost
from coppice.errors import CoppiceError
from coppice.model import Record, State
from coppice.requests import (
    DemoteRequest,
    ForkRequest,
    GetRequest,
    PromoteRequest,
    RestoreRequest,
    RmRequest,
    StandbyRequest,
    StartRequest,
    StopRequest,
)
from fakes.driver import FakeDriver
from fakes.hosting import make
from fakes.rooms import DEADLINES, open_rooms
from histories import SOURCE, Call, Done


class Order(Record, frozen=True, kw_only=True):
    """`open` a data directory, `make` the source in a state, `go` through the calls, or `close`."""

    what: str
    home: str = ""
    state: str = ""
    calls: tuple[Call, ...] = ()


class Answer(Record, frozen=True, kw_only=True):
    """The outcomes of an order."""

    done: tuple[Done, ...] = ()


async def _get(host: AsyncHost, call: Call) -> State:
    return (await host.call(GetRequest(instance=call.name))).state


_CALLS: dict[str, Callable[[AsyncHost, Call], Awaitable[object]]] = {
    "get": _get,
    "promote": lambda host, call: host.call(PromoteRequest(instance=call.name)),
    "demote": lambda host, call: host.call(DemoteRequest(instance=call.name)),
    "standby": lambda host, call: host.call(StandbyRequest(instance=call.name)),
    "restore": lambda host, call: host.call(RestoreRequest(instance=call.name)),
    "stop": lambda host, call: host.call(StopRequest(instance=call.name, grace_s=0)),
    "start": lambda host, call: host.call(StartRequest(instance=call.name)),
    "rm": lambda host, call: host.call(RmRequest(instance=call.name)),
    "fork": lambda host, call: host.call(
        ForkRequest(instance=SOURCE, names=[call.name], target=State.STANDBY, atomic=True)
    ),
}


async def _do(host: AsyncHost, call: Call) -> Done:
    begin = time.monotonic()
    try:
        result = await _CALLS[call.what](host, call)
        outcome = str(result) if isinstance(result, State) else "ok"
    except CoppiceError as error:
        outcome = error.code
    return Done(call=call, outcome=outcome, begin=begin, end=time.monotonic())


async def main(program: str | None) -> None:
    """Carry out orders until stdin ends."""
    driver = FakeDriver(Path(program)) if program else None
    host: AsyncHost | None = None
    reader = asyncio.StreamReader(limit=1 << 20)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        order = msgspec.json.decode(line, type=Order)
        answer = Answer()
        if order.what == "open":
            fake = AsyncHost(order.home, driver=driver, deadlines=DEADLINES, open_rooms=open_rooms)
            host = await (fake if driver else AsyncHost(order.home)).open()
        elif host is None:
            raise AssertionError("the first order must open a data directory")
        elif order.what == "make":
            await make(host, State(order.state), SOURCE)
        elif order.what == "go":
            answer = Answer(done=tuple([await _do(host, call) for call in order.calls]))
        else:
            await host.close()
        sys.stdout.write(msgspec.json.encode(answer).decode() + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else None))
