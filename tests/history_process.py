"""A host process that takes part in histories: `python -m history_process [FAKE_VMM]`, orders on stdin, answers on stdout, a line of JSON each.

It lives through many histories, so that the guests of the fake VMMs that it started answer as long as anybody may ask them.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec

from coppice.errors import CoppiceError
from coppice.host import AsyncHost
from coppice.model import Record, State
from fakes.driver import FakeDriver
from fakes.hosting import make
from fakes.rooms import DEADLINES, open_rooms
from histories import SOURCE, Call, Done


class Order(Record, frozen=True, kw_only=True):
    """`open` a data directory, `make` the source there in a state, `go`: do the calls, or `close`."""

    what: str
    home: str = ""
    state: str = ""
    calls: tuple[Call, ...] = ()


class Answer(Record, frozen=True, kw_only=True):
    """What was done."""

    done: tuple[Done, ...] = ()


async def _get(host: AsyncHost, call: Call) -> State:
    return (await host.get(call.name)).state


_CALLS: dict[str, Callable[[AsyncHost, Call], Awaitable[object]]] = {
    "get": _get,
    "promote": lambda host, call: host.promote(call.name),
    "demote": lambda host, call: host.demote(call.name),
    "standby": lambda host, call: host.standby(call.name),
    "restore": lambda host, call: host.restore(call.name),
    "stop": lambda host, call: host.stop(call.name, grace_s=0),
    "start": lambda host, call: host.start(call.name),
    "rm": lambda host, call: host.rm(call.name),
    "fork": lambda host, call: host.fork(SOURCE, names=[call.name], target=State.STANDBY, atomic=True),
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
    """Obey until stdin ends."""
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
            raise AssertionError("a data directory is opened first")
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
