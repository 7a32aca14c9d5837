"""Check the arguments of public calls that make no request. A request checks its own fields."""

from __future__ import annotations

import builtins
import functools
import os
import types
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final, Literal, ParamSpec, TypeVar, Union, cast, get_args, get_origin

from coppice.errors import UsageError

P = ParamSpec("P")
R = TypeVar("R")

_COROUTINE: Final = 0x80  # inspect.CO_COROUTINE
_ALSO: Final[dict[type, tuple[type, ...]]] = {
    bytes: (bytes, bytearray, memoryview),
    float: (float, int),
    Path: (os.PathLike,),
}


class _Imported(dict[str, Any]):
    """The names that an annotation can use. One that is imported only for the type checker fits any value."""

    def __missing__(self, name: str) -> Any:
        return object


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """Have a function refuse arguments that its annotations exclude, with a UsageError that names the parameter."""
    made = cast(types.FunctionType, function)  # `inspect` has all this too, but its import takes long
    code, annotations = made.__code__, made.__annotations__
    names = code.co_varnames[: code.co_argcount]

    @functools.cache
    def wanted(name: str) -> Any:
        known = _Imported({**vars(builtins), **made.__globals__})
        return eval(annotations[name], {}, known)  # noqa: S307 - a text of this package

    def check(*args: P.args, **kwargs: P.kwargs) -> None:
        for name, value in (*zip(names, args, strict=False), *kwargs.items()):
            if name in annotations and not _fits(value, wanted(name)):
                choices = get_args(wanted(name)) if get_origin(wanted(name)) is Literal else ()
                kinds = " or ".join(map(repr, choices)) or annotations[name].replace(" | ", " or ")
                what = "a host" if made.__name__ == "__init__" else made.__name__
                raise UsageError(
                    f"the {name} of {what} must be {kinds}, not {type(value).__name__}",
                    hint="see the documentation of its parameters",
                )

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        check(*args, **kwargs)
        return function(*args, **kwargs)

    @functools.wraps(function)
    async def call_async(*args: P.args, **kwargs: P.kwargs) -> Any:
        check(*args, **kwargs)
        return await cast(Awaitable[Any], function(*args, **kwargs))

    return cast(Callable[P, R], call_async) if code.co_flags & _COROUTINE else call


def _fits(value: object, annotation: Any) -> bool:
    kind = get_origin(annotation) or annotation
    if kind in (Union, types.UnionType):
        return any(_fits(value, each) for each in get_args(annotation))
    if kind is Literal:
        return value in get_args(annotation)
    if isinstance(value, bool):
        return kind in (bool, object)
    if annotation is None:
        return value is None
    return not isinstance(kind, type) or isinstance(value, _ALSO.get(kind, kind))
