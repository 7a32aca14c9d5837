"""Histories of several host processes that work on one source concurrently, and a search for a
sequential order that explains every outcome.

Each process does its operations one after the other; an operation takes effect at one instant
between its begin and its end (Herlihy and Wing, "Linearizability", 1990). A process has at most one
operation in progress, so the search for an order only has to choose which process's next operation
comes first.
"""

from __future__ import annotations

from collections.abc import Sequence

from coppice.model import Record

SOURCE = "oak"
FORKS = ("elm", "fir", "yew")
TRANSIENT = frozenset({"Created", "Initializing", "Shutdown"})  # between two stable states


class Call(Record, frozen=True, kw_only=True):
    """One operation of a process; `name` is a fork's if the operation concerns one."""

    what: str
    name: str = SOURCE


class Done(Record, frozen=True, kw_only=True):
    """The outcome of a call and its times, on the clock that all processes share. `outcome` is ok,
    the code of an error, or the state that `get` returned.
    """

    call: Call
    outcome: str
    begin: float
    end: float


class World(Record, frozen=True, kw_only=True):
    """The state that the operations act on: the source's state (None if it is removed) and the
    existing forks.
    """

    source: str | None
    forks: frozenset[str] = frozenset()


_GOES = {  # operation: {state of the source: state after it}; any other state is refused
    "promote": {"Standby": "Template", "Template": "Template"},
    "demote": {"Template": "Standby", "Standby": "Standby"},
    "standby": {"Running": "Standby", "Standby": "Standby"},
    "restore": {"Standby": "Running", "Running": "Running"},
    "stop": {"Running": "Stopped", "Stopped": "Stopped"},
    "start": {"Stopped": "Running", "Running": "Running"},
}


def apply(world: World, done: Done) -> World | None:
    """Return the world after an operation, or None if it could not have ended so in this world."""
    call, outcome = done.call, done.outcome
    if call.name != SOURCE and call.what == "rm":
        if call.name not in world.forks:
            return world if outcome == "not_found" else None
        return World(source=world.source, forks=world.forks - {call.name}) if outcome == "ok" else None
    if world.source is None:
        # The maker of a fork gets the same error if another process removed the fork before the
        # maker held it.
        return world if outcome == "not_found" else None
    if call.what == "get":
        return world if outcome == world.source or outcome in TRANSIENT else None
    if call.what == "fork":
        return _fork(world, call.name, outcome)
    if call.what in ("demote", "rm") and world.source == "Template" and world.forks:
        return world if outcome == "in_use" else None
    if call.what == "rm":
        return World(source=None, forks=world.forks) if outcome == "ok" else None
    after = _GOES[call.what].get(world.source)
    if after is None:
        return world if outcome == "invalid_state" else None
    return World(source=after, forks=world.forks) if outcome == "ok" else None


def _fork(world: World, name: str, outcome: str) -> World | None:
    if world.source not in ("Standby", "Template"):
        return world if outcome == "invalid_state" else None
    if name in world.forks:
        return world if outcome == "name_conflict" else None
    # The fork existed for a moment: another process removed it before its maker held it.
    return World(source=world.source, forks=world.forks | {name}) if outcome in ("ok", "not_found") else None


def explained(first: World, processes: Sequence[Sequence[Done]], last: World) -> bool:
    """Return whether some sequential order agrees with every outcome and with the final world."""
    todo = [((0,) * len(processes), first)]
    seen = set(todo)
    while todo:
        at, world = todo.pop()
        following = [done[i] if i < len(done) else None for done, i in zip(processes, at, strict=True)]
        if not any(following) and world == last:
            return True
        for process, done in enumerate(following):
            # An operation that ended before this one began comes before it.
            if done is None or any(other and other.end < done.begin for other in following):
                continue
            after = apply(world, done)
            if after is not None:
                step = (tuple(i + (number == process) for number, i in enumerate(at)), after)
                if step not in seen:
                    seen.add(step)
                    todo.append(step)
    return False


def told(processes: Sequence[Sequence[Done]]) -> str:
    """Return a history as text, in the order in which the operations began."""
    began = min((done.begin for each in processes for done in each), default=0.0)
    lines = sorted(
        (done.begin - began, done.end - began, number, done.call.what, done.call.name, done.outcome)
        for number, each in enumerate(processes)
        for done in each
    )
    return "\n".join(
        f"{begin:8.4f}-{end:8.4f} {number}: {what} {name}: {outcome}"
        for begin, end, number, what, name, outcome in lines
    )
