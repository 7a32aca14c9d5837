"""Policies of an instance in the hypeman API: lifetime, restarts, health checks."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, UnsetType

from coppice import model
from coppice.errors import NotSupported
from coppice.model import Record
from coppice.server.hypeman.paths import go_duration, moment_if, seconds

_WHEN: dict[str, Literal["never", "always", "on-failure"]] = {
    "never": "never",
    "always": "always",
    "on_failure": "on-failure",
}


class RestartPolicy(Record, frozen=True, kw_only=True):
    """When an instance that ended by itself is started again."""

    policy: Literal["never", "always", "on_failure"] = "never"
    backoff: str = "5s"
    max_attempts: int = 0
    stable_after: str = "1m"


class ExecCheck(Record, frozen=True, kw_only=True):
    """A command in the guest."""

    command: list[str]
    working_dir: str = ""


class TcpCheck(Record, frozen=True, kw_only=True):
    """A connection to a port of the guest."""

    port: int


class HttpCheck(Record, frozen=True, kw_only=True):
    """A request to a port of the guest. `https` is not supported."""

    port: int
    path: str = "/"
    expected_status: int | None = None
    scheme: Literal["http", "https"] = "http"


class HealthCheck(Record, frozen=True, kw_only=True):
    """How the health of an instance is checked."""

    type: Literal["none", "http", "tcp", "exec"] = "none"
    exec: ExecCheck | UnsetType = UNSET
    tcp: TcpCheck | UnsetType = UNSET
    http: HttpCheck | UnsetType = UNSET
    interval: str = "30s"
    timeout: str = "5s"
    start_period: str = "0s"
    failure_threshold: int = 3
    success_threshold: int = 1


class HealthStatus(Record, frozen=True, kw_only=True):
    """What the checks have found."""

    status: Literal["disabled", "starting", "healthy", "unhealthy", "unknown"]
    consecutive_failures: int = 0
    consecutive_successes: int = 0
    last_checked_at: datetime | UnsetType = UNSET
    last_error: str | UnsetType = UNSET


class RestartStatus(Record, frozen=True, kw_only=True):
    """What was done to start an instance again."""

    attempts: int = 0
    blocked_reason: Literal["manual_stop", "max_attempts_exceeded"] | UnsetType = UNSET
    last_attempt_at: datetime | UnsetType = UNSET
    next_attempt_at: datetime | UnsetType = UNSET


class AutoStandby(Record, frozen=True, kw_only=True):
    """When an idle instance is put into standby."""

    enabled: bool = False
    idle_timeout: str = "5m"
    ignore_source_cidrs: list[str] = []
    ignore_destination_ports: list[int] = []


class PolicyFields(Record, frozen=True, kw_only=True):
    """The policies that a request can set."""

    ttl: str | None = None
    expires_at: Annotated[datetime, Meta(tz=True)] | None = None
    restart_policy: RestartPolicy | None = None
    health_check: HealthCheck | None = None
    auto_standby: AutoStandby | None = None


def policies_of(data: PolicyFields) -> dict[str, Any]:
    """Return the policies of a body as parameters of a request.

    :raises UsageError: a duration or the body of a check is not valid
    :raises NotSupported: a check by https
    """
    return {
        "ttl_s": None if data.ttl is None else seconds(data.ttl),
        "expires_at": None if data.expires_at is None else data.expires_at.timestamp(),
        "restart": None if data.restart_policy is None else _restart(data.restart_policy),
        "health_check": None if data.health_check is None else _check(data.health_check),
        "auto_standby_s": None if data.auto_standby is None else _idle(data.auto_standby),
    }


def _idle(given: AutoStandby) -> float:
    if given.ignore_source_cidrs or given.ignore_destination_ports:
        raise NotSupported("every connection keeps an instance awake", hint="leave out the ignore lists")
    return seconds(given.idle_timeout) if given.enabled else 0.0


def auto_standby_of(record: model.Instance) -> AutoStandby | UnsetType:
    """Return the policy of automatic standby for a client."""
    limit = record.supervision.auto_standby_s if record.supervision else 0.0
    return AutoStandby(enabled=True, idle_timeout=go_duration(limit)) if limit else UNSET


def _restart(given: RestartPolicy) -> model.RestartPolicy:
    return model.RestartPolicy(
        when=_WHEN[given.policy],
        max_attempts=given.max_attempts,
        backoff_s=seconds(given.backoff),
        stable_after_s=seconds(given.stable_after),
    )


def _check(given: HealthCheck) -> model.HealthCheck:
    http = given.http or HttpCheck(port=0)
    if http.scheme == "https":
        raise NotSupported("health checks by https are not supported", hint="use http, tcp or exec")
    run = given.exec or ExecCheck(command=[])
    tcp = given.tcp or TcpCheck(port=0)
    return model.HealthCheck(
        kind=given.type,
        command=tuple(run.command),
        workdir=run.working_dir,
        port=tcp.port if given.type == "tcp" else http.port,
        path=http.path,
        expected_status=http.expected_status or 0,
        interval_s=seconds(given.interval),
        timeout_s=seconds(given.timeout),
        failures=given.failure_threshold,
        successes=given.success_threshold,
        start_period_s=seconds(given.start_period),
        restart=True,  # there an unhealthy instance enters its restart policy
    )


def restart_policy_of(record: model.Instance) -> RestartPolicy | UnsetType:
    """Return the restart policy for a client."""
    policy = record.restart
    if policy.when == "never":
        return UNSET
    return RestartPolicy(
        policy="on_failure" if policy.when == "on-failure" else policy.when,
        backoff=go_duration(policy.backoff_s),
        max_attempts=policy.max_attempts,
        stable_after=go_duration(policy.stable_after_s),
    )


def restart_status_of(record: model.Instance) -> RestartStatus | UnsetType:
    """Return what was done to start an instance again."""
    if record.restart.when == "never":
        return UNSET
    seen = record.observed or model.Observed()
    return RestartStatus(
        attempts=seen.attempts,
        blocked_reason="max_attempts_exceeded"
        if seen.gave_up
        else "manual_stop"
        if record.ending == "asked"
        else UNSET,
        last_attempt_at=moment_if(seen.last_attempt_at),
        next_attempt_at=moment_if(seen.next_attempt_at),
    )


def health_check_of(record: model.Instance) -> HealthCheck | UnsetType:
    """Return the health check for a client."""
    check = record.health_check
    if check is None or check.kind == "log":  # hypeman has no such check
        return UNSET
    http = HttpCheck(port=check.port, path=check.path, expected_status=check.expected_status or None)
    return HealthCheck(
        type=check.kind,
        exec=ExecCheck(command=list(check.command), working_dir=check.workdir) if check.kind == "exec" else UNSET,
        tcp=TcpCheck(port=check.port) if check.kind == "tcp" else UNSET,
        http=http if check.kind == "http" else UNSET,
        interval=go_duration(check.interval_s),
        timeout=go_duration(check.timeout_s),
        start_period=go_duration(check.start_period_s),
        failure_threshold=check.failures,
        success_threshold=check.successes,
    )


def health_status_of(record: model.Instance) -> HealthStatus | UnsetType:
    """Return what the checks have found."""
    if record.health_check is None:
        return UNSET
    seen = record.observed or model.Observed()
    return HealthStatus(
        status=seen.health or "unknown" if record.state is model.State.RUNNING else "unknown",
        consecutive_failures=seen.failures,
        consecutive_successes=seen.successes,
        last_checked_at=moment_if(seen.checked_at),
        last_error=seen.health_error or UNSET,
    )
