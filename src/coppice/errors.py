"""The exception tree, and the one map from an error to an exit code and an HTTP status.

    CoppiceError                    exit 1, HTTP 500
    ├── UsageError                  exit 2, HTTP 400   the request itself is wrong
    │   └── InvalidName
    ├── NotFound                    exit 3, HTTP 404
    ├── Refused                     exit 4, HTTP 409   right request, wrong moment
    │   ├── IllegalTransition           not in this state
    │   ├── NameTaken
    │   ├── InUse                       something living depends on it
    │   └── Busy                        another operation holds the lock
    ├── HostCannot                  exit 5, HTTP 503   this machine lacks something
    │   ├── MissingTool
    │   ├── NoSpace                                    HTTP 507
    │   └── NotSupported                               HTTP 501
    ├── ImageError                  exit 1, HTTP 422   corrupt, truncated or unsafe input
    │   ├── DigestMismatch
    │   └── UnsafePath
    ├── VmmError                    exit 1, HTTP 500
    │   ├── VmmDied
    │   └── VmmTimeout                                 HTTP 504
    ├── GuestError                  exit 1, HTTP 502
    │   ├── GuestProtocolError          the guest sent bytes that are not the protocol
    │   ├── GuestRefused                the agent answered: no
    │   │   └── CommandNotStarted       exit 126
    │   │       └── CommandNotFound     exit 127
    │   └── GuestTimeout                               HTTP 504
    └── IntegrityError              exit 1, HTTP 500   a captured file is not what was captured

Every message is one sentence that says what happened, and `hint` says what to do next.
"""

from __future__ import annotations

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


def exit_code_of(code: str) -> int:
    """The exit code of the errors that go by `code`, which reports carry in place of the errors themselves."""
    kinds: list[type[CoppiceError]] = [CoppiceError]
    for kind in kinds:
        if kind.code == code:
            return kind.exit_code
        kinds += kind.__subclasses__()
    return CoppiceError.exit_code


class UsageError(CoppiceError):
    """The request is malformed: repeating it cannot succeed."""

    exit_code = 2
    http_status = 400
    code = "invalid_request"


class InvalidName(UsageError):
    """A name is not `^[a-z0-9]([a-z0-9-]*[a-z0-9])?$`, or is longer than 63."""

    code = "invalid_name"


class NotFound(CoppiceError):
    """No image, instance, snapshot, volume or kernel goes by that name or id."""

    exit_code = 3
    http_status = 404
    code = "not_found"


class Refused(CoppiceError):
    """The request is well formed, but cannot be done in the present state of things."""

    exit_code = 4
    http_status = 409
    code = "conflict"


class IllegalTransition(Refused):
    """The instance's state does not allow the operation."""

    code = "invalid_state"


class NameTaken(Refused):
    """Another instance, snapshot or volume, or another owner's image, has the name."""

    code = "name_conflict"


class InUse(Refused):
    """Something that lives depends on the object; the message names it."""

    code = "in_use"


class Busy(Refused):
    """Another operation holds the object, and did not let go within the deadline."""

    code = "busy"


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
    """The driver or the file system declares that it has no such capability."""

    http_status = 501
    code = "not_supported"


class ImageError(CoppiceError):
    """An archive, layout or root file system cannot be made into an image."""

    http_status = 422
    code = "invalid_image"


class DigestMismatch(ImageError):
    """Bytes do not hash to the digest that names them."""

    code = "digest_mismatch"


class UnsafePath(ImageError):
    """An archive member would land outside of the root."""

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
    """The guest agent did not do what was asked."""

    http_status = 502
    code = "guest_error"


class GuestProtocolError(GuestError):
    """The guest sent bytes that break the agent protocol."""

    code = "guest_protocol_error"


class GuestRefused(GuestError):
    """The agent understood, and answered with an error of the guest's own."""

    code = "guest_refused"

    def __init__(self, message: str, *, errno: int = 0, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.errno = errno


class CommandNotStarted(GuestRefused):
    """A command in the guest could not be started. The exit code is what a shell has for it."""

    exit_code = 126
    code = "command_not_started"


class CommandNotFound(CommandNotStarted):
    """The command, or the directory or the user that it was to have, does not exist in the guest."""

    exit_code = 127
    code = "command_not_found"


class GuestTimeout(GuestError):
    """The guest did not answer within the deadline."""

    http_status = 504
    code = "guest_timeout"


class IntegrityError(CoppiceError):
    """A captured file is missing, or differs from what was captured."""

    code = "integrity_error"
