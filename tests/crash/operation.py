"""What an operation is in which a process is killed: the state before, the call, and the states
allowed afterwards.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

from coppice.client import AsyncHost
from coppice.model import State
from crash.kinds import Kind

STUMP, OAK, SAP = "stump", "oak", "sap"
SEED = "seed"  # a snapshot of the stump that always exists

Act = Callable[[AsyncHost, Kind], Awaitable[object]]
States = frozenset[State | None]
"""States that a machine may be found in; None: it does not exist."""


def may(*states: State | None) -> States:
    """Return the states that an operation may leave a machine in."""
    return frozenset(states)


@dataclass(frozen=True)
class Operation:
    """One operation of a host process that will be killed."""

    name: str
    prepare: Act
    act: Act
    after: dict[str, States]  # allowed states by name, of all instances except the stump
    snapshots: frozenset[str] = frozenset()  # exist before and after
    may_have: frozenset[str] = frozenset()  # snapshots that may exist afterwards
    volumes: frozenset[str] = frozenset()  # exist before and after
    may_have_volumes: frozenset[str] = frozenset()
    memory: str = STUMP  # the text in its machines' memory
    disk: str = STUMP
    volume: str = ""  # the text on the volumes of its machines
    boots: bool = False  # takes seconds with a real machine
    of_layers: bool = False  # makes, merges, flattens, gives back or removes layers of memory or disks; see `plan`
    end: State | None = None  # of the oak, if `after` leaves a choice
    removes: bool = False  # the oak, or else its snapshots or volumes of `may_have`
    repeatable: bool = True  # by a client whose server was killed
    steps: int = 0  # estimates of the steps and seconds, for runs that do not measure them
    seconds: float = 0.0

    def carried_out(self) -> Operation:
        """Return the operation with what must be found after it has succeeded, and nothing else."""
        ends = {name: states - {None} for name, states in self.after.items()}
        if self.end is not None:
            ends[OAK] = frozenset({self.end})
        if self.removes:
            ends.pop(OAK, None)
        assert all(len(states) == 1 for states in ends.values()), f"{self.name} has no one end"
        return replace(
            self,
            after=ends,
            snapshots=self.snapshots | (frozenset() if self.removes else self.may_have),
            may_have=frozenset(),
            volumes=self.volumes | (frozenset() if self.removes else self.may_have_volumes),
            may_have_volumes=frozenset(),
        )
