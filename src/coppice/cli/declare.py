"""Commands from typed functions: the annotation of each parameter describes its argument or option.

click parses, prints help and completes. A command's module is imported, and its parser built, when
the command is looked up.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from importlib import import_module
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import click

from coppice.cli import start

Completer = Callable[[click.Context, str], list[str]]
"""Returns the values that begin with the typed text."""

ProgramExit = click.exceptions.Exit
"""Ends the program with an exit status."""


class Argument:
    """A positional parameter."""

    def __init__(self, *, metavar: str, help: str, autocompletion: Completer | None = None) -> None:
        self.settings = {"metavar": metavar, "help": help, **_completion(autocompletion)}


class Option:
    """An option with its names, such as `--count` and `-n`."""

    def __init__(
        self,
        *names: str,
        help: str,
        metavar: str | None = None,
        envvar: str | None = None,
        min: int | None = None,
        hidden: bool = False,
        autocompletion: Completer | None = None,
    ) -> None:
        self.names, self.min = names, min
        more = {"metavar": metavar, "envvar": envvar, "show_envvar": envvar is not None, "hidden": hidden}
        self.settings = {"help": help, **more, **_completion(autocompletion)}


def _completion(complete: Completer | None) -> dict[str, Any]:
    return {} if complete is None else {"shell_complete": lambda ctx, _, incomplete: complete(ctx, incomplete)}


class Commands(click.Group):
    """A group of commands.

    Each is a function, or the place (`module:name`) of one or of a group.
    """

    def __init__(self, name: str | None = None, places: Mapping[str, str] | None = None, **settings: Any) -> None:
        super().__init__(
            name, no_args_is_help=False, context_settings={"help_option_names": ["--help", "-h"]}, **settings
        )
        self._declared: dict[str, str | Callable[..., None]] = dict(places or {})

    def declare(self, name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
        """Return a decorator that makes a function a command of this group."""

        def declared(function: Callable[..., None]) -> Callable[..., None]:
            self._declared[name] = function
            return function

        return declared

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        """Return all names, in the order of their declaration."""
        return list(self._declared)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002 - click's signature
        """Return the command, built at its first use."""
        if cmd_name not in self.commands and (found := self._declared.get(cmd_name)) is not None:
            if isinstance(found, str):
                module, _, attribute = found.partition(":")
                found = getattr(import_module(module), attribute)
            self.commands[cmd_name] = found if isinstance(found, click.Command) else command(cmd_name, found)
        return self.commands.get(cmd_name)


def own_words(function: Callable[..., None]) -> Callable[..., None]:
    """Declare that options end at the first argument. Later ones belong to the guest's command."""
    vars(function)["interspersed"] = False
    return function


class _Positional(click.Argument):
    def make_metavar(self, ctx: click.Context) -> str:  # noqa: ARG002 - click's signature
        """Return the argument's form in the usage line: `NAME`, `[NAME]`, `NAME...`."""
        shown = self.human_readable_name if self.required else f"[{self.human_readable_name}]"
        return shown if self.nargs == 1 else f"{shown}..."


def command(name: str, function: Callable[..., None]) -> click.Command:
    """Return the command that calls a function.

    The function's first parameter is the context; all others are annotated with Option or Argument.
    """
    return click.Command(
        name,
        params=parameters(function),
        callback=_called(function),
        help=inspect.getdoc(function),
        context_settings={
            "help_option_names": ["--help", "-h"],
            "allow_interspersed_args": vars(function).get("interspersed", True),
            "show_default": True,
        },
    )


def parameters(function: Callable[..., Any]) -> list[click.Parameter]:
    """Return click's parameters of a function, without the context. A dataclass adds its fields."""
    found: list[click.Parameter] = []
    for name, hint in _hints(function).items():
        if isinstance(hint, type) and is_dataclass(hint):
            found += parameters(hint)
        else:
            found.append(_parameter(inspect.signature(function).parameters[name], hint))
    return found


@functools.cache
def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    """Return the annotations of a command's parameters without the context, or of a dataclass's
    fields.
    """
    hints = get_type_hints(function, include_extras=True)
    names = list(inspect.signature(function).parameters)
    return {name: hints[name] for name in (names if is_dataclass(function) else names[1:])}


def _called(function: Callable[..., None]) -> Callable[..., None]:
    def called(ctx: click.Context, /, **values: Any) -> None:
        start.import_msgspec()
        given = {key: list(each) if isinstance(each, tuple) else each for key, each in values.items()}
        for name, hint in _hints(function).items():
            if isinstance(hint, type) and is_dataclass(hint):
                given[name] = hint(**{key: given.pop(key) for key in _hints(hint)})
        function(ctx, **given)

    return click.pass_context(called)


def _parameter(parameter: inspect.Parameter, hint: Any) -> click.Parameter:
    if get_origin(hint) is not Annotated:
        raise TypeError(f"annotate the parameter {parameter.name} with Option or Argument")
    kind, declared = get_args(hint)
    kind, many = _single(kind)
    required = parameter.default is parameter.empty
    if isinstance(declared, Argument):
        settings = {"type": _type(kind, None), "required": required, "nargs": -1 if many else 1, **declared.settings}
        return _Positional([parameter.name], **settings)
    default: dict[str, Any] = {} if required or many or parameter.default is None else {"default": parameter.default}
    if kind is bool:
        default = {"default": parameter.default, "is_flag": True}
    else:
        default |= {"type": _type(kind, declared.min), "multiple": many}
    return click.Option([parameter.name, *declared.names], required=required, **default, **declared.settings)


def _single(kind: Any) -> tuple[Any, bool]:
    """Return a type without None and list, and whether it was a list."""
    if get_origin(kind) in (Union, UnionType):
        (kind,) = (each for each in get_args(kind) if each is not NoneType)
    return (get_args(kind)[0], True) if get_origin(kind) is list else (kind, False)


def _type(kind: Any, least: int | None) -> click.ParamType[Any]:
    if get_origin(kind) is Literal:
        return click.Choice(get_args(kind))
    if kind is Path:
        return click.Path(path_type=Path)
    if kind is int and least is not None:
        return click.IntRange(min=least)
    return {str: click.STRING, int: click.INT, float: click.FLOAT}[kind]
