"""The transition table: the states in which an operation is legal, and the states that it leads to.

An operation calls `require` before its first side effect.
"""

from enum import StrEnum

from coppice.errors import IllegalTransition, InUse
from coppice.model import Instance, State


class Operation(StrEnum):
    """An operation on an instance."""

    START = "start"
    STOP = "stop"
    STANDBY = "standby"
    RESTORE = "restore"
    PROMOTE = "promote"
    DEMOTE = "demote"
    FORK = "fork"
    FORK_RUNNING = "fork --from-running"
    EXPORT = "export"
    EXEC = "exec"
    EGRESS = "egress"
    UPDATE = "update"
    SNAPSHOT = "snapshot create"
    SNAPSHOT_RESTORE = "snapshot restore"
    REMOVE = "rm"


_S = State
_LEGAL: dict[Operation, dict[State, State]] = {
    # operation: {legal state: resulting state}
    Operation.START: {_S.STOPPED: _S.RUNNING, _S.RUNNING: _S.RUNNING},
    Operation.STOP: {
        _S.RUNNING: _S.STOPPED,
        _S.PAUSED: _S.STOPPED,
        _S.INITIALIZING: _S.STOPPED,
        _S.SHUTDOWN: _S.STOPPED,
        _S.STOPPED: _S.STOPPED,
    },
    Operation.STANDBY: {_S.RUNNING: _S.STANDBY, _S.PAUSED: _S.STANDBY, _S.STANDBY: _S.STANDBY},
    Operation.RESTORE: {_S.STANDBY: _S.RUNNING, _S.RUNNING: _S.RUNNING},
    Operation.PROMOTE: {_S.STANDBY: _S.TEMPLATE, _S.TEMPLATE: _S.TEMPLATE},
    Operation.DEMOTE: {_S.TEMPLATE: _S.STANDBY, _S.STANDBY: _S.STANDBY},
    Operation.FORK: {_S.STOPPED: _S.STOPPED, _S.STANDBY: _S.STANDBY, _S.TEMPLATE: _S.TEMPLATE},
    Operation.FORK_RUNNING: {_S.RUNNING: _S.RUNNING},
    Operation.EXPORT: {_S.STANDBY: _S.STANDBY, _S.TEMPLATE: _S.TEMPLATE},
    Operation.EGRESS: {state: state for state in State},
    Operation.UPDATE: {state: state for state in State},
    Operation.EXEC: {_S.RUNNING: _S.RUNNING},
    Operation.SNAPSHOT: {state: state for state in (_S.RUNNING, _S.STANDBY, _S.TEMPLATE, _S.STOPPED)},
    Operation.SNAPSHOT_RESTORE: {  # a snapshot with memory; one of a disk alone leads to Stopped
        _S.RUNNING: _S.STANDBY,
        _S.PAUSED: _S.STANDBY,
        _S.STANDBY: _S.STANDBY,
        _S.STOPPED: _S.STANDBY,
    },
    Operation.REMOVE: {state: state for state in State},
}

# Operations that lead to another machine with the same disks, at once or later.
_MULTIPLIES = frozenset(
    {Operation.FORK, Operation.FORK_RUNNING, Operation.PROMOTE, Operation.SNAPSHOT, Operation.EXPORT}
)

_HINTS: dict[tuple[Operation, State], str] = {
    (Operation.FORK, _S.RUNNING): "use --from-running, or put it into standby first: `coppice standby`",
    (Operation.START, _S.STANDBY): "use `coppice restore`",
    (Operation.RESTORE, _S.STOPPED): "use `coppice start`",
    (Operation.EXEC, _S.STANDBY): "restore it first: `coppice restore`",
    (Operation.EXEC, _S.STOPPED): "start it first: `coppice start`",
    (Operation.EXPORT, _S.RUNNING): "make it a template first: `coppice standby`, then `coppice promote`",
    (Operation.PROMOTE, _S.RUNNING): "put it into standby first: `coppice standby`",
    (Operation.STANDBY, _S.STOPPED): "start it first: `coppice start`",
    (Operation.STOP, _S.STANDBY): "it has no VMM to stop; restore it, or remove it",
}


def require(operation: Operation, instance: Instance, *, clones_volumes: bool = False) -> State:
    """Return the state that the operation leads to. The current state means that there is nothing
    to do.

    :param clones_volumes: the other machine gets clones of the volumes that the instance writes to
    :raises IllegalTransition: the operation is not legal in the instance's state
    :raises InUse: the instance writes to a volume, and the operation would lead to a second writer
    """
    if operation in _MULTIPLIES and not clones_volumes:
        _require_no_writable_volume(operation, instance)
    legal = _LEGAL[operation]
    if instance.state in legal:
        return legal[instance.state]
    hint = _HINTS.get((operation, instance.state))
    if hint is None and instance.state is State.TEMPLATE:
        hint = "a template is fork-only: fork it, or demote it first"
    if hint is None:
        hint = "its state must be " + " or ".join(legal)
    raise IllegalTransition(f"{instance.name} is {instance.state}: {operation} is not possible", hint=hint)


def _require_no_writable_volume(operation: Operation, instance: Instance) -> None:
    """Refuse a second writer: two machines that cache and write the same file system destroy it."""
    for disk in instance.machine.volumes:
        if not disk.readonly and not disk.private:
            forks = operation in (Operation.FORK, Operation.FORK_RUNNING)
            clone = "give each fork a clone of it (--volume-policy clone), or " if forks else ""
            raise InUse(
                f"{instance.name} is the only writer of the volume {disk.volume_name}: {operation} is not possible",
                hint=f"{clone}use a machine without the volume, or one that only reads it "
                f"(--volume {disk.volume_name}:{disk.mount_path}:ro)",
            )


def legal_states(operation: Operation) -> frozenset[State]:
    """Return the states in which the operation is legal."""
    return frozenset(_LEGAL[operation])
