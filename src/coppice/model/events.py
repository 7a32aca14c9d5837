"""Events: what happened to instances, in order."""

from typing import Literal

from coppice.model.instance import State
from coppice.model.record import Record

Kind = Literal["made", "state", "policies", "restart", "health", "exited", "removed", "lost"]


class Event(Record, frozen=True, kw_only=True):
    """One change of one instance.

    `policies`: what the supervisor does with it was changed. `restart`: the supervisor starts it
    again, or gave up. `health`: its health changed. `exited`: its process has ended, as `detail`
    says. `lost` concerns no instance: older events than
    this one are no longer kept, so list the instances again.
    """

    id: int  # counts up in the data directory
    at: float
    kind: Kind
    instance: str = ""  # id
    name: str = ""
    owner: str | None = None
    state: State | None = None  # afterwards; before its removal, if it was removed
    parent: str | None = None  # id of the instance it was forked from
    detail: str = ""  # of `restart`, `health` and `exited`
