"""Commands from typed functions: the annotation of each parameter describes its argument or option.

click parses, prints help and completes. A command's module is imported, and its parser built, when
the command is looked up.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Final, Literal, Union, dataclass_transform, get_args, get_origin, get_type_hints

import click

from coppice.cli import output, start
from coppice.cli.habits import ALIASES, ALIASES_IN_GROUPS, advice
from coppice.errors import UsageError

Completer = Callable[[click.Context, str], list[str]]
"""Returns the values that begin with the typed text."""

_HELP, _HELP_TEXT = ("--help", "-h"), "Show this message and exit."
_REQUIRED: Final = object()  # in place of a default

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


@dataclass_transform(frozen_default=True, kw_only_default=True)
class Values:
    """A value with named fields: the annotated attributes of a subclass, with their defaults.

    It is no dataclass, because Python would compile its methods in every process that starts.
    """

    def __init__(self, **values: Any) -> None:
        vars(self).update(values)


def _completion(complete: Completer | None) -> dict[str, Any]:
    return {} if complete is None else {"shell_complete": lambda ctx, _, incomplete: complete(ctx, incomplete)}


class Commands(click.Group):
    """A group of commands.

    Each is a function, or the place (`module:name`) of one or of a group.
    """

    def __init__(self, name: str | None = None, places: Mapping[str, str] | None = None, **settings: Any) -> None:
        super().__init__(name, no_args_is_help=False, add_help_option=False, **settings)
        self.params.append(flag(*_HELP, help=_HELP_TEXT, action=_show_help))
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

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[Any, Any, list[str]]:
        """Return the command that the first words name, also by an alias that users of other programs type.

        :raises UsageError: there is no such command; the hint suggests one
        """
        word, known = args[0], self.list_commands(ctx)
        means = ctx.parent is None or word in ALIASES_IN_GROUPS
        if word not in known and means and (meant := ALIASES.get(word)) and meant[0] in known:
            args = [*meant, *args[1:]]
        elif word not in known and not word.startswith("-"):
            raise UsageError(f"no such command {word!r}", hint=advice(word, ctx.command_path, known))
        return super().resolve_command(ctx, args)

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


class _Option(click.Option):
    def __init__(self, *words: Any, help: str, **settings: Any) -> None:
        super().__init__(*words, **settings)
        self.help = help  # click would clean it, and import `inspect` for that


class _Positional(click.Argument):
    def __init__(self, *words: Any, help: str, **settings: Any) -> None:
        super().__init__(*words, **settings)
        self.help = help

    def make_metavar(self, ctx: click.Context) -> str:  # noqa: ARG002 - click's signature
        """Return the argument's form in the usage line: `NAME`, `[NAME]`, `NAME...`."""
        shown = self.human_readable_name if self.required else f"[{self.human_readable_name}]"
        return shown if self.nargs == 1 else f"{shown}..."


def flag(*names: str, help: str, action: Callable[[click.Context], None]) -> click.Option:
    """Return an option that does its action instead of the command, such as `--help`."""

    def called(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
        if wanted and not ctx.resilient_parsing:
            action(ctx)
            raise ProgramExit(0)

    return _Option(names, help=help, is_flag=True, is_eager=True, expose_value=False, callback=called)


def _show_help(ctx: click.Context) -> None:
    output.line(ctx.get_help())


def command(name: str, function: Callable[..., None]) -> click.Command:
    """Return the command that calls a function.

    The function's first parameter is the context; all others are annotated with Option or Argument.
    """
    return click.Command(
        name,
        params=[*parameters(function), flag(*_HELP, help=_HELP_TEXT, action=_show_help)],
        callback=_called(function),
        help=function.__doc__,
        add_help_option=False,
        context_settings={
            "allow_interspersed_args": vars(function).get("interspersed", True),
            "show_default": True,
        },
    )


def parameters(function: Callable[..., Any]) -> list[click.Parameter]:
    """Return click's parameters of a function, without the context. A value adds its fields."""
    found: list[click.Parameter] = []
    for name, (hint, default) in _declared(function).items():
        if _has_fields(hint):
            found += parameters(hint)
        else:
            found.append(_parameter(name, hint, default))
    return found


def _has_fields(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, Values)


@functools.cache
def _declared(place: Any) -> dict[str, tuple[Any, Any]]:
    """Return the annotation and the default of each parameter of a command without the context, or
    of each field.
    """
    hints = get_type_hints(place, include_extras=True)
    if isinstance(place, type):
        return {name: (hint, getattr(place, name)) for name, hint in hints.items()}
    # As `inspect.signature` does, whose import takes milliseconds.
    code = place.__code__
    positional, names = code.co_argcount, code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    given = zip(reversed(names[:positional]), reversed(place.__defaults__ or ()), strict=False)
    defaults = {**dict(given), **(place.__kwdefaults__ or {})}
    return {name: (hints[name], defaults.get(name, _REQUIRED)) for name in names[1:]}


def _called(function: Callable[..., None]) -> Callable[..., None]:
    def called(ctx: click.Context, /, **values: Any) -> None:
        start.import_small("msgspec")
        given = {key: list(each) if isinstance(each, tuple) else each for key, each in values.items()}
        for name, (hint, _) in _declared(function).items():
            if _has_fields(hint):
                given[name] = hint(**{key: given.pop(key) for key in _declared(hint)})
        function(ctx, **given)

    return click.pass_context(called)


def _parameter(name: str, hint: Any, default: Any) -> click.Parameter:
    if get_origin(hint) is not Annotated:
        raise TypeError(f"annotate the parameter {name} with Option or Argument")
    kind, declared = get_args(hint)
    kind, many = _single(kind)
    required = default is _REQUIRED
    if isinstance(declared, Argument):
        settings = {"type": _type(kind, None), "required": required, "nargs": -1 if many else 1, **declared.settings}
        return _Positional([name], **settings)
    given: dict[str, Any] = {} if required or many or default is None else {"default": default}
    if kind is bool:
        given = {"default": default, "is_flag": True}
    else:
        given |= {"type": _type(kind, declared.min), "multiple": many}
    return _Option([name, *declared.names], required=required, **given, **declared.settings)


class _Path(click.ParamType[Path]):
    """A path, as click's own type, which however translates its name, and imports `locale` for that."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:  # noqa: ARG002 - click's signature
        """Return the word as a path."""
        return Path(value)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Any]:  # noqa: ARG002 - click's signature
        """Leave the completion to the shell."""
        from click.shell_completion import CompletionItem

        return [CompletionItem(incomplete, type="file")]


def _single(kind: Any) -> tuple[Any, bool]:
    """Return a type without None and list, and whether it was a list."""
    if get_origin(kind) in (Union, UnionType):
        (kind,) = (each for each in get_args(kind) if each is not NoneType)
    return (get_args(kind)[0], True) if get_origin(kind) is list else (kind, False)


def _type(kind: Any, least: int | None) -> click.ParamType[Any]:
    if get_origin(kind) is Literal:
        return click.Choice(get_args(kind))
    if kind is Path:
        return _Path()
    if kind is int and least is not None:
        return click.IntRange(min=least)
    return {str: click.STRING, int: click.INT, float: click.FLOAT}[kind]
