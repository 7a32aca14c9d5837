"""A fuzz of the guest agent: whatever hosts send, it does not crash, hang or grow. `make fuzz` plays many
more inputs.
"""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from agent_fuzzing import fuzz_agent, record
from hostile_requests import OPERATIONS


@pytest.fixture(scope="module")
async def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Record what real hosts send to a real agent."""
    directory = tmp_path_factory.mktemp("corpus")
    await record(directory)
    return directory


def _types(data: bytes) -> set[int]:
    """Return the types of the frames in a recording."""
    types, at = set(), 0
    while at + 6 <= len(data):
        kind, _, size = struct.unpack_from("<BHH", data, at)
        if kind and data[at + 5 + size : at + 6 + size] == b"\xa5":
            types.add(kind)
            at += size + 6
        else:
            at += 1
    return types


def test_the_corpus_has_every_request(corpus: Path) -> None:
    """A new request needs a line in a host of `agent_fuzzing.HOSTS`."""
    types = set().union(*(_types(path.read_bytes()) for path in corpus.iterdir()))
    assert {kind.name for kind in OPERATIONS if kind not in types} == set()


@pytest.mark.timeout(400)
def test_changed_recordings(corpus: Path) -> None:
    """The same inputs in every run, from a new recording. It takes seconds, and minutes on a busy machine."""
    fuzz_agent(corpus, inputs=3000, seed=0, timeout_s=300)
