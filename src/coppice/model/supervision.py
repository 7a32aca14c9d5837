"""The policies of an instance, which the supervisor follows, and the supervisor's observations."""

from typing import Literal

from coppice.model.record import Record

OnExpiry = Literal["remove", "standby", "stop"]
Ending = Literal["asked", "clean", "failed"]
"""How the last run of a machine ended: by a command, by its guest's own will, or by a failure."""
HealthState = Literal["starting", "healthy", "unhealthy"]


class RestartPolicy(Record, frozen=True, kw_only=True):
    """When a machine that ended by itself is started again."""

    when: Literal["never", "on-failure", "always"] = "never"
    max_attempts: int = 0  # in a row; 0: any number
    backoff_s: float = 1.0  # before the first attempt; twice as long before each further one
    stable_after_s: float = 60.0  # a run this long ends the row of attempts


class HealthCheck(Record, frozen=True, kw_only=True):
    """How the supervisor finds out whether the service in a machine works."""

    kind: Literal["none", "exec", "tcp", "http", "log"] = "none"
    command: tuple[str, ...] = ()  # of exec: its exit status 0 is a success
    workdir: str = ""
    port: int = 0  # of the guest
    path: str = "/"
    expected_status: int = 0  # of http; 0: any from 200 to 399
    text: str = ""  # of log: a part of a line of the console
    interval_s: float = 30.0
    timeout_s: float = 5.0
    failures: int = 3  # in a row, until the machine is unhealthy
    successes: int = 1  # in a row, until it is healthy
    start_period_s: float = 0.0  # in which failures do not count
    restart: bool = False  # whether an unhealthy machine is a failed one for the restart policy


class Supervision(Record, frozen=True, kw_only=True):
    """The policies of one instance."""

    expires_at: float | None = None
    on_expiry: OnExpiry = "remove"
    restart: RestartPolicy = RestartPolicy()
    health_check: HealthCheck = HealthCheck()
    auto_standby_s: float = 0.0  # of idleness, until it is put into standby; 0: never


class Observed(Record, frozen=True, kw_only=True):
    """What the supervisor has seen of one instance, and done with it."""

    attempts: int = 0  # to start it again, in a row
    next_attempt_at: float | None = None
    last_attempt_at: float | None = None
    gave_up: bool = False  # it was started again too often
    gave_up_on: float | None = None  # the start of its last run then
    health: HealthState | None = None
    health_of: float | None = None  # the start of the run that the health belongs to
    failures: int = 0  # of checks, in a row
    successes: int = 0
    checked_at: float | None = None
    health_error: str = ""  # of the latest failed check
    active_at: float | None = None  # when a connection or a session was last seen
