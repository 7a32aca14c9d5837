"""The transition table covers every operation in every state."""

from __future__ import annotations

import msgspec
import pytest

from coppice.errors import IllegalTransition, InUse
from coppice.model import MachineSpec, State, VolumeDisk
from coppice.model.lifecycle import Operation, legal_states, require
from fakes.records import make_instance

# Written a second time by hand, from the design, not from the code's table.
ALLOWED: dict[Operation, dict[State, State]] = {
    Operation.START: {State.STOPPED: State.RUNNING, State.RUNNING: State.RUNNING},
    Operation.STOP: {
        State.INITIALIZING: State.STOPPED,
        State.RUNNING: State.STOPPED,
        State.PAUSED: State.STOPPED,
        State.SHUTDOWN: State.STOPPED,
        State.STOPPED: State.STOPPED,
    },
    Operation.STANDBY: {
        State.RUNNING: State.STANDBY,
        State.PAUSED: State.STANDBY,
        State.STANDBY: State.STANDBY,
    },
    Operation.RESTORE: {State.STANDBY: State.RUNNING, State.RUNNING: State.RUNNING},
    Operation.PROMOTE: {State.STANDBY: State.TEMPLATE, State.TEMPLATE: State.TEMPLATE},
    Operation.DEMOTE: {State.TEMPLATE: State.STANDBY, State.STANDBY: State.STANDBY},
    Operation.FORK: {
        State.STOPPED: State.STOPPED,
        State.STANDBY: State.STANDBY,
        State.TEMPLATE: State.TEMPLATE,
    },
    Operation.FORK_RUNNING: {State.RUNNING: State.RUNNING},
    Operation.EXPORT: {State.STANDBY: State.STANDBY, State.TEMPLATE: State.TEMPLATE},
    Operation.EXEC: {State.RUNNING: State.RUNNING},
    Operation.SNAPSHOT: {
        State.RUNNING: State.RUNNING,
        State.STANDBY: State.STANDBY,
        State.TEMPLATE: State.TEMPLATE,
        State.STOPPED: State.STOPPED,
    },
    Operation.SNAPSHOT_RESTORE: {
        State.RUNNING: State.STANDBY,
        State.PAUSED: State.STANDBY,
        State.STANDBY: State.STANDBY,
        State.STOPPED: State.STANDBY,
    },
    Operation.EGRESS: {state: state for state in State},
    Operation.UPDATE: {state: state for state in State},
    Operation.REMOVE: {state: state for state in State},
}
EVERY_PAIR = [(operation, state) for operation in Operation for state in State]


def test_every_operation_has_its_row() -> None:
    """An operation that is added without a decision for each state fails here."""
    assert set(ALLOWED) == set(Operation)


@pytest.mark.parametrize(("operation", "state"), EVERY_PAIR)
def test_each_pair_is_decided(operation: Operation, state: State) -> None:
    """A legal pair leads to the design's state; any other pair is refused with a remedy, and the
    error names the instance and its state.
    """
    instance = make_instance("oak", state)
    target = ALLOWED[operation].get(state)
    assert (state in legal_states(operation)) == (target is not None)
    if target is not None:
        assert require(operation, instance) is target
        return
    with pytest.raises(IllegalTransition) as refusal:
        require(operation, instance)
    assert "oak" in refusal.value.message
    assert state in refusal.value.message
    assert refusal.value.hint


def test_a_template_is_only_forked_kept_demoted_or_removed() -> None:
    """A template never runs: a second VM on the disk of its mem-file would break every later fork."""
    legal = {operation for operation in Operation if State.TEMPLATE in legal_states(operation)}
    kept = {
        Operation.PROMOTE,
        Operation.DEMOTE,
        Operation.SNAPSHOT,
        Operation.EXPORT,
        Operation.EGRESS,
        Operation.UPDATE,
    }
    assert legal == {Operation.FORK, Operation.REMOVE, *kept}


@pytest.mark.parametrize(("operation", "state"), EVERY_PAIR)
def test_a_writer_of_a_volume_is_never_multiplied(operation: Operation, state: State) -> None:
    """An operation that would give a second machine the same writable disks is refused in every
    state. Other operations, and machines that only read volumes, are not affected.
    """
    disk = VolumeDisk(volume_id="v" * 24, volume_name="data", size_bytes=1, mount_path="/data", readonly=False)
    writer = make_instance(state=state, machine=MachineSpec(volumes=(disk,)))
    multiplies = {
        Operation.FORK, Operation.FORK_RUNNING, Operation.PROMOTE, Operation.SNAPSHOT, Operation.EXPORT,
    }  # fmt: skip
    if operation in multiplies:
        with pytest.raises(InUse, match="data"):
            require(operation, writer)
    reader = make_instance(state=state, machine=MachineSpec(volumes=(msgspec.structs.replace(disk, readonly=True),)))
    for instance in [reader] + ([] if operation in multiplies else [writer]):
        if state in ALLOWED[operation]:
            assert require(operation, instance) is ALLOWED[operation][state]
        else:
            with pytest.raises(IllegalTransition):
                require(operation, instance)
