"""Cancellation of work in threads: a long loop checks here whether its caller was cancelled.

A thread cannot be cancelled from outside. `completion.in_thread` and `completion.in_own_thread`
give the work a flag, and set it when their caller is cancelled. Blocking code calls `check` where
it could also fail for lack of disk space, since both need the same cleanup.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextvars import ContextVar
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")
_flag: ContextVar[threading.Event | None] = ContextVar("stopping", default=None)


class WorkStopped(BaseException):
    """Ends the work of a cancelled caller.

    The caller sees its own cancellation, never this error.
    """


def run(flag: threading.Event, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call `work`; `check` inside it reads this flag."""
    token = _flag.set(flag)
    try:
        return work(*args, **kwargs)
    finally:
        _flag.reset(token)


def check() -> None:
    """Raise WorkStopped if the caller of this work was cancelled."""
    flag = _flag.get()
    if flag is not None and flag.is_set():
        raise WorkStopped


def pause(seconds: float) -> None:
    """Wait, but not longer than until the caller of this work is cancelled: then raise
    WorkStopped.
    """
    (_flag.get() or threading.Event()).wait(seconds)
    check()
