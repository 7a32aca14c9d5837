"""Fuzz both ends of the agent protocol: `python tests/fuzz.py host|decoder|agent --inputs N --seed S`.

The tests run a slice of each with fixed seeds, and `make fuzz` a million inputs. An input follows from
its seed, and for the agent from the corpus: what fails is printed with the arguments that repeat it.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import struct
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent)]

from agent_fuzzing import fuzz_agent, record
from coppice.agent.protocol import END_BYTE, MAGIC, NONCE_SIZE, Fields, FrameDecoder, FrameType
from coppice.errors import GuestProtocolError
from hostile_guest import GUEST_PAYLOAD_MAX, descriptors, play, playground
from warped_loop import run_warped

_SLICE = 1000  # cases between two reports
_AGENT_SLICE = 10_000
_AGENT_INPUT_S = 0.1


def host(inputs: int, seed: int) -> Counter[str]:
    """Play cases of a hostile guest; return how often each request ended in which way."""
    return run_warped(_host(inputs, seed))


async def _host(inputs: int, seed: int) -> Counter[str]:
    outcomes: Counter[str] = Counter()
    with playground() as directory:
        await play(b"", directory, outcomes)
        open_before = descriptors()
        for number in range(seed, seed + inputs):
            source = random.Random(number)
            try:
                await play(source.randbytes(source.choice((40, 100, 300, 1000))), directory, outcomes)
            except BaseException:
                print(f"failed: python tests/fuzz.py host --inputs 1 --seed {number}", file=sys.stderr)  # noqa: T201
                raise
            assert descriptors() <= open_before, f"case {number} left a descriptor"
            _report("host", number - seed + 1, inputs)
    return outcomes


def decoder(inputs: int, seed: int) -> None:
    """Feed changed frames to the decoder of frames and of fields."""
    nonce = bytes(range(NONCE_SIZE))
    acknowledged = _frame(FrameType.HELLO_ACK, 0, MAGIC + nonce)
    for number in range(seed, seed + inputs):
        source = random.Random(number)
        data = bytearray(acknowledged if source.random() < 0.9 else b"")
        for _ in range(source.randrange(6)):
            fields = b"".join(
                struct.pack("<BI", source.randrange(12), size) + source.randbytes(size)
                for size in (source.choice((0, 1, 8, 8, 40)) for _ in range(source.randrange(4)))
            )
            data += _frame(source.choice(list(FrameType)), source.randrange(4), fields)
        for _ in range(source.choice((0, 0, 1, 1, 3))):
            at = source.randrange(len(data) + 1)
            data[at : at + source.randrange(3)] = source.randbytes(source.randrange(3))
        _decode(bytes(data), nonce, source, number)
        _report("decoder", number - seed + 1, inputs)


def _decode(data: bytes, nonce: bytes, source: random.Random, number: int) -> None:
    decoded, at = FrameDecoder(nonce), 0
    try:
        while at < len(data):
            size = source.choice((1, 7, 100, 5000))
            for frame in decoded.feed(data[at : at + size]):
                fields = Fields(frame.payload)
                fields.texts(2)
                fields.integer(1, 0)
            at += size
            assert len(decoded._buffer) <= GUEST_PAYLOAD_MAX + 6
    except GuestProtocolError:
        pass
    except BaseException:
        print(f"failed: python tests/fuzz.py decoder --inputs 1 --seed {number}", file=sys.stderr)  # noqa: T201
        raise


def agent(inputs: int, seed: int, corpus: Path | None) -> None:
    """Play changed recordings of hosts to the agent, in slices. Without a corpus, record a new one."""
    if corpus is None:
        corpus = Path(tempfile.mkdtemp(prefix="coppice-fuzz-corpus-"))
        asyncio.run(record(corpus))
        print(f"the corpus is in {corpus}", flush=True)  # noqa: T201
    for first in range(seed, seed + inputs, _AGENT_SLICE):
        count = min(_AGENT_SLICE, seed + inputs - first)
        fuzz_agent(corpus, count, first, timeout_s=60 + count * _AGENT_INPUT_S)
        _report("agent", first + count - seed, inputs)


def _frame(kind: int, stream: int, payload: bytes) -> bytes:
    return struct.pack("<BHH", kind, stream, len(payload)) + payload + bytes((END_BYTE,))


_began = time.monotonic()


def _report(what: str, done: int, inputs: int) -> None:
    if __name__ == "__main__" and (done % _SLICE == 0 or done == inputs):
        print(f"{what}: {done} inputs, {time.monotonic() - _began:.0f} s", flush=True)  # noqa: T201


def main() -> None:
    """Run one fuzz."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["host", "decoder", "agent"])
    parser.add_argument("--inputs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--corpus", type=Path, help="of the agent's fuzz; recorded if it is missing")
    given = parser.parse_args()
    if given.what == "host":
        for outcome, count in sorted(host(given.inputs, given.seed).items()):
            print(f"{count:8} {outcome}")  # noqa: T201
    elif given.what == "decoder":
        decoder(given.inputs, given.seed)
    else:
        agent(given.inputs, given.seed, given.corpus)


if __name__ == "__main__":
    main()
