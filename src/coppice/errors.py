"""The exception tree, and the one map from an error to an exit code and an HTTP status.

    CoppiceError                    exit 1, HTTP 500
    ├── UsageError                  exit 2, HTTP 400   the request itself is wrong
    │   ├── InvalidName
    │   └── KeyReused                                  HTTP 422
    ├── NotFound                    exit 3, HTTP 404
    ├── Refused                     exit 4, HTTP 409   valid request, wrong state
    │   ├── IllegalTransition           not in this state
    │   │   └── InStandby
    │   ├── Expired                     its lifetime is over
    │   ├── NameTaken
    │   ├── InUse                       another object depends on it
    │   ├── Busy                        another operation holds the lock
    │   └── TooManyOperations           of one owner   HTTP 429
    ├── HostCannot                  exit 5, HTTP 503   this machine lacks something
    │   ├── MissingTool
    │   ├── NoSpace                                    HTTP 507
    │   ├── NotSupported                               HTTP 501
    │   └── Overloaded                  of all owners  HTTP 503
    ├── ImageError                  exit 1, HTTP 422   corrupt, truncated or unsafe input
    │   ├── DigestMismatch
    │   └── UnsafePath
    ├── VmmError                    exit 1, HTTP 500
    │   ├── VmmDied
    │   └── VmmTimeout                                 HTTP 504
    ├── GuestError                  exit 1, HTTP 502
    │   ├── GuestProtocolError          the guest sent bytes that are not the protocol
    │   ├── GuestRefused                the agent answered with an error
    │   │   └── CommandNotStarted       exit 126
    │   │       └── CommandNotFound     exit 127
    │   └── GuestTimeout                               HTTP 504
    ├── Unauthorized                exit 6, HTTP 401   a server does not know the caller
    │   └── Forbidden                                  HTTP 403
    ├── OutcomeUnknown              exit 1, HTTP 409   the command may have run, or not
    └── IntegrityError              exit 1, HTTP 500   a captured file has changed

Every message is one sentence that says what happened, and `hint` says what to do next.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar


class CoppiceError(Exception):
    """Base of every error that Coppice raises on purpose.

    `hint` is what the user can do next: one sentence, shown after the message.
    """

    exit_code: ClassVar[int] = 1
    http_status: ClassVar[int] = 500
    code: ClassVar[str] = "internal_error"

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}; {self.hint}" if self.hint else self.message

    def reword(self, old: str, new: str) -> None:
        """Replace a text in the message and the hint."""
        self.message = self.message.replace(old, new)
        self.hint = self.hint and self.hint.replace(old, new)


def kinds() -> Iterator[type[CoppiceError]]:
    """Yield all classes of the tree, from its root."""
    found: list[type[CoppiceError]] = [CoppiceError]
    for kind in found:
        yield kind
        found += kind.__subclasses__()


def kind_of(code: str) -> type[CoppiceError]:
    """Return the class of the errors with a code, by which reports and servers name errors."""
    return next((kind for kind in kinds() if kind.code == code), CoppiceError)


class UsageError(CoppiceError):
    """The request is malformed; repeating it cannot succeed."""

    exit_code = 2
    http_status = 400
    code = "invalid_request"


class InvalidName(UsageError):
    """A name is not `^[a-z0-9]([a-z0-9-]*[a-z0-9])?$`, or is longer than 63."""

    code = "invalid_name"


class KeyReused(UsageError):
    """An idempotency key was sent before with another request."""

    http_status = 422
    code = "idempotency_key_reused"


class NotFound(CoppiceError):
    """No image, instance, snapshot, volume or kernel has that name or id."""

    exit_code = 3
    http_status = 404
    code = "not_found"


class Refused(CoppiceError):
    """The request is valid, but not in the object's present state."""

    exit_code = 4
    http_status = 409
    code = "conflict"


class IllegalTransition(Refused):
    """The instance's state does not allow the operation."""

    code = "invalid_state"


class InStandby(IllegalTransition):
    """The instance is in standby, or was being put into it."""

    code = "instance_in_standby"


class Expired(Refused):
    """The lifetime of the instance is over, and it is about to be removed, stopped or captured."""

    code = "instance_expired"


class NameTaken(Refused):
    """Another instance, snapshot or volume, or another owner's image, already has the name."""

    code = "name_conflict"


class InUse(Refused):
    """Another object depends on this one; the message names it."""

    code = "in_use"


class Busy(Refused):
    """Another operation held the object's lock until the deadline."""

    code = "busy"


class TooManyOperations(Refused):
    """An owner has too many operations under way on a server."""

    http_status = 429
    code = "rate_limited"


class HostCannot(CoppiceError):
    """This machine lacks what the operation needs."""

    exit_code = 5
    http_status = 503
    code = "host_cannot"


class MissingTool(HostCannot):
    """A program that the operation runs is not installed."""

    code = "dependency_missing"


class NoSpace(HostCannot):
    """The file system of the data directory is full, or a budget is spent."""

    http_status = 507
    code = "insufficient_resources"


class NotSupported(HostCannot):
    """The driver or the file system does not have this capability."""

    http_status = 501
    code = "not_supported"


class Overloaded(HostCannot):
    """A server has too many operations under way."""

    code = "overloaded"


class ImageError(CoppiceError):
    """An archive, layout or root file system cannot be made into an image."""

    http_status = 422
    code = "invalid_image"


class DigestMismatch(ImageError):
    """Bytes do not hash to the digest that names them."""

    code = "digest_mismatch"


class UnsafePath(ImageError):
    """An archive member would be extracted outside the root."""

    code = "unsafe_path"


class VmmError(CoppiceError):
    """The VMM refused a command, or answered something unexpected."""

    code = "vmm_error"


class VmmDied(VmmError):
    """The VMM process ended while it was needed; the message carries the end of its log."""

    code = "vmm_died"


class VmmTimeout(VmmError):
    """The VMM did not answer within the deadline."""

    http_status = 504
    code = "vmm_timeout"


class GuestError(CoppiceError):
    """The guest agent did not carry out a request."""

    http_status = 502
    code = "guest_error"


class GuestProtocolError(GuestError):
    """The guest sent bytes that break the agent protocol."""

    code = "guest_protocol_error"


class GuestRefused(GuestError):
    """The agent understood the request, and answered with an error of the guest."""

    code = "guest_refused"

    def __init__(self, message: str, *, errno: int = 0, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.errno = errno


class CommandNotStarted(GuestRefused):
    """A command in the guest could not be started. The exit code is the one that a shell uses."""

    exit_code = 126
    code = "command_not_started"


class CommandNotFound(CommandNotStarted):
    """The command, or its directory or user, does not exist in the guest."""

    exit_code = 127
    code = "command_not_found"


class GuestTimeout(GuestError):
    """The guest did not answer, or did not end, within the deadline."""

    http_status = 504
    code = "guest_timeout"


class Unauthorized(CoppiceError):
    """The request to a server has no valid token."""

    exit_code = 6
    http_status = 401
    code = "unauthorized"


class Forbidden(Unauthorized):
    """The token does not allow the request: it lacks a scope, or has an owner who may not do this."""

    http_status = 403
    code = "forbidden"


class OutcomeUnknown(CoppiceError):
    """A server ended during a command. The command may have run, or not."""

    http_status = 409
    code = "outcome_unknown"


class IntegrityError(CoppiceError):
    """A captured file is missing, or differs from its capture.

    `difference` says how, without the file's name; empty if it is not one file that differs.
    """

    code = "integrity_error"

    def __init__(self, message: str, *, difference: str = "", hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.difference = difference
