"""The policies of an instance as parameters of requests. Several requests have the same ones."""

from typing import Annotated, Final, Protocol

import msgspec
from msgspec import Meta

from coppice.commands import check_workdir
from coppice.errors import UsageError
from coppice.model import HealthCheck, RestartPolicy, Supervision
from coppice.model.supervision import OnExpiry
from coppice.names import MAX_SECONDS, check_argv, check_recorded

_LONGEST_TEXT: Final = 500

TtlS = Annotated[
    float | None, Meta(description="Seconds from now after which the instance expires; 0: never. Default: unchanged.")
]
ExpiresAt = Annotated[
    float | None, Meta(description="Time at which the instance expires, in seconds since the epoch; instead of a TTL.")
]
OnExpiryOption = Annotated[
    OnExpiry | None,
    Meta(description="What happens then: `remove`, `standby` or `stop`. Default: unchanged, or remove."),
]


Restart = Annotated[
    RestartPolicy | None,
    Meta(description="When a machine that ended by itself is started again. Default: never; a fork: its source's."),
]
HealthCheckOption = Annotated[
    HealthCheck | None,
    Meta(description="How to find out whether its service works. Default: no check; a fork: its source's."),
]


AutoStandbyS = Annotated[
    float | None,
    Meta(
        description="Put the machine into standby after so many seconds without a session, a running command or a "
        "connection to a published TCP port, and wake it at the next connection; 0: never. Default: never; a fork: its source's."
    ),
]


class Expiring(Protocol):
    """A request that can set an expiry."""

    @property
    def ttl_s(self) -> float | None: ...
    @property
    def expires_at(self) -> float | None: ...
    @property
    def on_expiry(self) -> OnExpiry | None: ...


class Supervising(Expiring, Protocol):
    """A request that can set all policies."""

    @property
    def restart(self) -> RestartPolicy | None: ...
    @property
    def health_check(self) -> HealthCheck | None: ...
    @property
    def auto_standby_s(self) -> float | None: ...


def check_policies(request: Supervising) -> None:
    """Check the policies of a request.

    :raises UsageError: a value is missing or out of range
    """
    check_expiry(request)
    if (restart := request.restart) is not None:
        _in_range("back-off", restart.backoff_s, 0.1, 86400)
        _in_range("time until a run counts as stable", restart.stable_after_s, 1, MAX_SECONDS)
        _in_range("number of attempts", restart.max_attempts, 0, 1_000_000)
    if request.auto_standby_s:
        _in_range("time until an automatic standby", request.auto_standby_s, 1, MAX_SECONDS)
    if (check := request.health_check) is not None:
        _check_health(check)


def _check_health(check: HealthCheck) -> None:
    _in_range("interval of the health check", check.interval_s, 0.5, 86400)
    _in_range("timeout of the health check", check.timeout_s, 0.1, 3600)
    _in_range("start period", check.start_period_s, 0, 86400)
    _in_range("number of failures", check.failures, 1, 1000)
    _in_range("number of successes", check.successes, 1, 1000)
    check_argv(check.command)
    check_workdir(check.workdir or None)
    check_recorded(*check.command, check.workdir, check.path, check.text)
    if check.kind == "exec" and not check.command:
        raise UsageError("a health check needs a command", hint="give its words, such as ['curl', '-f', 'localhost']")
    if check.kind == "log" and (not check.text.isprintable() or not 0 < len(check.text) <= _LONGEST_TEXT):
        raise UsageError(
            f"{check.text[:80]!r} is not a part of a line",
            hint=f"give 1 to {_LONGEST_TEXT} characters that the console shows, such as 'ready to accept'",
        )
    if check.kind in ("tcp", "http"):
        _in_range("port of the health check", check.port, 1, 65535)
    if check.kind == "http":
        if not check.path.startswith("/") or not check.path.isascii() or not check.path.isprintable():
            raise UsageError(f"{check.path[:80]!r} is not a path of a URL", hint="write it as /health")
        if check.expected_status and not 100 <= check.expected_status <= 599:
            raise UsageError(f"{check.expected_status} is not an HTTP status", hint="give 100 to 599, or 0")


def _in_range(what: str, value: float, least: float, most: float) -> None:
    if not least <= value <= most:
        raise UsageError(f"the {what} is {value:g}", hint=f"give {least:g} to {most:g}")


def check_expiry(request: Expiring) -> None:
    """Check the expiry of a request, but not whether its time is in the future.

    :raises UsageError: it has both forms of a time, or the time is out of range
    """
    ttl, at = request.ttl_s, request.expires_at
    if ttl is not None and at is not None:
        raise UsageError("a TTL and a time of expiry exclude each other", hint="give one of them")
    if ttl is not None and not 0 <= ttl <= MAX_SECONDS:
        raise UsageError(f"a TTL of {ttl:g} s is out of range", hint="give 0 s to 366 days")
    if at is not None and not 0 < at < 1e11:
        raise UsageError(f"{at:g} is not a time", hint="give seconds since the epoch")


def with_expiry(policies: Supervision | None, request: Expiring, now: float) -> Supervision | None:
    """Return policies with the expiry of a request. None: there is nothing to supervise.

    :raises UsageError: the time of expiry is not in the future
    """
    changed = policies or Supervision()
    if request.expires_at is not None and request.expires_at <= now:
        raise UsageError("the time of expiry is not in the future", hint="give a later time, or a TTL")
    if request.ttl_s is not None:
        changed = msgspec.structs.replace(changed, expires_at=now + request.ttl_s if request.ttl_s else None)
    if request.expires_at is not None:
        changed = msgspec.structs.replace(changed, expires_at=request.expires_at)
    if request.on_expiry is not None:
        changed = msgspec.structs.replace(changed, on_expiry=request.on_expiry)
    return changed if changed != Supervision() else None


def with_policies(policies: Supervision | None, request: Supervising, now: float) -> Supervision | None:
    """Return policies with those of a request. None: there is nothing to supervise.

    :raises UsageError: the time of expiry is not in the future
    """
    changed = with_expiry(policies, request, now) or Supervision()
    if request.restart is not None:
        changed = msgspec.structs.replace(changed, restart=request.restart)
    if request.health_check is not None:
        changed = msgspec.structs.replace(changed, health_check=request.health_check)
    if request.auto_standby_s is not None:
        changed = msgspec.structs.replace(changed, auto_standby_s=request.auto_standby_s)
    return changed if changed != Supervision() else None


def inherited(policies: Supervision | None) -> Supervision | None:
    """Return the policies of a fork: those of its source, without the expiry."""
    if policies is None:
        return None
    kept = msgspec.structs.replace(policies, expires_at=None, on_expiry="remove")
    return kept if kept != Supervision() else None
