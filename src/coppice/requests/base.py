"""The base of all requests: validation at construction, and a `repr` without secrets."""

import functools
import os
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Generic, TypeVar, get_args, get_origin, get_type_hints

import msgspec

from coppice.errors import UsageError
from coppice.model import Record
from coppice.names import check_reference

R = TypeVar("R", covariant=True)
_MISMATCH = r"Expected `([^`]*)`, got `([^`]*)`(?: - at (.*))?"
_NAMES = {"array": "list", "object": "dict", "null": "None"}

SECRET = {"secret": True}
"""`extra` of a field whose value is never shown, such as a payload or an environment."""
PATH = {"path": True}
"""`extra` of a field that names a file of this machine. Methods also accept a `Path` for it."""

InstanceKey = Annotated[str, msgspec.Meta(description="Name or id of the instance.")]
Notify = Annotated[
    int | str | None,
    msgspec.Meta(
        description="Address of a process that is warm in the source and is to know of each fork: a port of the "
        "guest's own loopback, or `unix:` and the path of a socket. Each fork of captured memory sends it one HTTP "
        "request, `POST /coppice/fork` with the payload as its body, and is Running only after an answer of 2xx. "
        "`none`: no request. Default: none; a fork: its source's."
    ),
]
Tags = Annotated[Mapping[str, str], msgspec.Meta(description="Tags of the new records.")]
Certificates = Annotated[
    Sequence[str],
    msgspec.Meta(description="PEM texts of authorities to trust, besides those of the image, such as a company's."),
]
TagFilter = Annotated[Mapping[str, str], msgspec.Meta(description="Return only records that have all of these tags.")]


def operation_name(class_name: str) -> str:
    """Return the name of the operation that a request class defines: `VolumeCreateRequest` ->
    `volume_create`.
    """
    return re.sub(r"(?<!^)(?=[A-Z])", "_", class_name.removesuffix("Request")).lower()


class Request(
    Record, Generic[R], frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="operation", tag=operation_name
):
    """A request for one operation, whose result has the type R.

    The constructor validates the values. It copies sequences to tuples and mappings to dicts, so
    that later changes by the caller do not affect the request.
    """

    reports_progress: ClassVar[bool] = False
    """Whether the operation takes long enough to report progress."""
    has_method: ClassVar[bool] = True
    """Whether the Python API has a method for the operation; others are parts of operations."""
    positional: ClassVar[tuple[str, ...]] = ()
    """Parameters with a default that methods also accept by position. All required ones are
    positional.
    """

    def __post_init__(self) -> None:
        defaults = _defaults_of(type(self))
        for name, annotation in fields_of(type(self)).items():
            if getattr(self, name) is defaults.get(name, msgspec.NODEFAULT):
                continue  # most parameters; they need no conversion
            value = _typed(getattr(self, name), annotation, f"{name} of {self.operation}")
            msgspec.structs.force_setattr(self, name, value)
        self.check()

    def check(self) -> None:
        """Raise UsageError or InvalidName for a value that can never be accepted. Types are valid
        here.
        """

    @property
    def operation(self) -> str:
        """The name of the operation, as in the JSON form."""
        return str(self.__struct_config__.tag)

    def __repr__(self) -> str:
        shown = (
            f"{name}={getattr(self, name)!r}"
            for name, annotation in fields_of(type(self)).items()
            if not extra_of(annotation).get("secret")
        )
        return f"{type(self).__name__}({', '.join(shown)})"


class StreamRequest(Request[R], Generic[R], frozen=True, kw_only=True):
    """A request whose result R stays open while it is used: a running command, a followed log."""


class InstanceRequest(Request[R], frozen=True, kw_only=True):
    """A request that concerns one instance."""

    instance: InstanceKey

    def check(self) -> None:
        """Check the name or id."""
        check_reference(self.instance)


@functools.cache
def fields_of(kind: type[Request[Any]]) -> dict[str, Any]:
    """Return the annotations of a request's fields, in the order of their definition."""
    hints = get_type_hints(kind, include_extras=True)
    return {name: hints[name] for name in kind.__struct_fields__}


@functools.cache
def _defaults_of(kind: type[Request[Any]]) -> dict[str, Any]:
    """Return the defaults of a request's fields. A mutable default is a factory, and not among them."""
    fields, defaults = kind.__struct_fields__, kind.__struct_defaults__
    return dict(zip(fields[len(fields) - len(defaults) :], defaults, strict=True))


def result_of(kind: type[Request[Any]]) -> Any:
    """Return the type of the result that a request class names."""
    for each in kind.__mro__:
        for base in getattr(each, "__orig_bases__", ()):
            if issubclass(get_origin(base) or base, Request) and not isinstance(get_args(base)[0], TypeVar):
                return get_args(base)[0]
    raise TypeError(f"{kind.__name__} names no result")


def extra_of(annotation: Any) -> dict[str, Any]:
    """Return the `extra` of a field's annotation: SECRET, PATH or nothing."""
    found: dict[str, Any] = {}
    for meta in getattr(annotation, "__metadata__", ()):
        found |= meta.extra or {}
    return found


def paths_of(kind: type[Request[Any]]) -> list[str]:
    """Return the fields of a request that name a file of the client's machine."""
    return [name for name, annotation in fields_of(kind).items() if extra_of(annotation).get("path")]


def description_of(annotation: Any) -> str:
    """Return the description of a field. The field's own description wins over that of its type's
    alias.
    """
    described = [meta.description for meta in getattr(annotation, "__metadata__", ()) if meta.description]
    return described[-1] if described else ""


def _typed(value: Any, annotation: Any, what: str) -> Any:
    """Convert a value to its annotated type: sequences to tuples, names of enum members to members.

    :raises UsageError: the value has another type
    """
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    hint = description_of(annotation).rstrip(".") or "see the method's documentation"
    try:
        plain = msgspec.to_builtins(_plain(value), builtin_types=(bytes, bytearray, memoryview))
        return _frozen(msgspec.convert(plain, annotation, builtin_types=(bytes,)))
    except msgspec.ValidationError as error:
        raise UsageError(f"the {what} {_explained(str(error), value)}", hint=f"expected: {hint}") from None
    except UnicodeEncodeError:
        raise UsageError(f"the {what} is not UTF-8", hint=f"expected: {hint}") from None
    except (TypeError, ValueError, OverflowError, RecursionError):
        raise UsageError(f"the {what} cannot be a {type(value).__name__}", hint=f"expected: {hint}") from None


def _plain(value: Any) -> Any:
    """Convert a mapping to a dict and a sequence to a list. Text and bytes do not count as
    sequences.
    """
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray | memoryview):
        return list(value)
    return value


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _explained(text: str, value: Any) -> str:
    """Reword a message of msgspec with the names of Python: `must be bytes or None, not str`."""
    found = re.match(_MISMATCH, text)
    if found is None:
        return f"is invalid: {text[:1].lower()}{text[1:]}"
    wanted = " or ".join(_NAMES.get(each, each) for each in found[1].split(" | "))
    place = (found[3] or "").replace("`", "").replace("$", "").replace("key in", "a key").strip()
    where = f" has an item at {place} that" if place.startswith("[") else f" has {place} that" if place else ""
    got = _NAMES.get(found[2], found[2]) if where else type(value).__name__
    return f"{where} must be {wanted}, not {got}".strip()
