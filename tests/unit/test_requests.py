"""Requests are the one definition of each operation: they are valid, documented, and hide secrets."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_type_hints

import msgspec
import pytest

from coppice import requests
from coppice.errors import InvalidName, UsageError
from coppice.host import group_of
from coppice.model import HealthCheck, Publish, State
from coppice.requests import (
    CommandStartRequest,
    CpInRequest,
    ExecRequest,
    FanOut,
    ForkRequest,
    GcRequest,
    LogsRequest,
    LsRequest,
    OpenExecRequest,
    Request,
    RunRequest,
    SnapshotForkRequest,
    StartAheadRequest,
    StopRequest,
    StreamRequest,
    VolumeCreateRequest,
    WaitRequest,
    WriteFileRequest,
)
from coppice.requests.base import description_of, fields_of, result_of

KINDS: list[type[Request[Any]]] = [
    kind
    for kind in (getattr(requests, name) for name in requests.__all__ if name.endswith("Request"))
    if kind not in (Request, StreamRequest)
]


@pytest.mark.parametrize("kind", KINDS)
def test_the_host_has_a_method_for_each_request(kind: type[Request[Any]]) -> None:
    """The method has the operation's name, takes that request, and a progress sink if the operation
    reports progress, and returns the declared result.
    """
    operation = str(kind.__struct_config__.tag)
    method = getattr(group_of(operation), operation)
    hints = get_type_hints(method)
    found = hints.pop("return")
    names = list(inspect.signature(method).parameters)[1:]
    assert hints[names[0]] is kind
    assert names[1:] == (["progress"] if kind.reports_progress else [])
    if issubclass(kind, StreamRequest):
        (found,) = get_args(found)
    wanted = result_of(kind)
    assert found in (wanted, type(None) if wanted is None else wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_each_request_is_documented(kind: type[Request[Any]]) -> None:
    """The docstring and each field's description become the documentation of a method and the JSON
    schema.
    """
    assert (kind.__doc__ or "").count(".") >= 1
    for name, annotation in fields_of(kind).items():
        assert description_of(annotation).endswith("."), f"{kind.__name__}.{name}"
    schema = msgspec.json.schema(kind)
    assert kind.__name__ in schema["$defs"]


def test_requests_survive_json() -> None:
    """A server decodes the record that a client has encoded, and refuses unknown fields."""
    fork = ForkRequest(
        instance="oak", count=2, payloads=[b"\x00", b"\xff"], publish=[Publish(host_port=0, guest_port=80)]
    )
    text = msgspec.json.encode(fork)
    assert msgspec.json.decode(text)["operation"] == "fork"
    assert msgspec.json.decode(text, type=ForkRequest | RunRequest) == fork
    with pytest.raises(msgspec.ValidationError, match="unknown field"):
        msgspec.json.decode(b'{"operation": "fork", "instance": "oak", "cuont": 2}', type=ForkRequest)
    with pytest.raises(UsageError, match="0 forks"):
        msgspec.json.decode(b'{"operation": "fork", "instance": "oak", "count": 0}', type=ForkRequest)


# Values that type checkers refuse, as callers without types may pass them.
WRONG: list[tuple[Callable[[], object], str]] = [
    (lambda: ExecRequest(instance="vm", argv=["ls", 1]), r"item at \[1\] that must be str, not int"),  # type: ignore[list-item]
    (lambda: ExecRequest(instance="vm", argv="ls -l"), "argv of exec must be list, not str"),
    (lambda: ExecRequest(instance="vm", argv=None), "argv of exec must be list, not NoneType"),  # type: ignore[arg-type]
    (lambda: ExecRequest(instance="vm", argv=["ls"], env={"A": 1}), "that must be str, not int"),  # type: ignore[dict-item]
    (lambda: ExecRequest(instance="vm", argv=["ls"], env=["A=1"]), "env of exec must be dict, not list"),  # type: ignore[arg-type]
    (lambda: ExecRequest(instance="vm", argv=["cat"], stdin="text"), "must be bytes or None, not str"),  # type: ignore[arg-type]
    (
        lambda: ExecRequest(instance="vm", argv=["ls"], timeout_s="1"),  # type: ignore[arg-type]
        "timeout_s of exec must be float or None, not str",
    ),
    (lambda: ExecRequest(instance=7, argv=["ls"]), "instance of exec must be str, not int"),  # type: ignore[arg-type]
    (lambda: OpenExecRequest(instance="vm", argv=["ls"], size=(24,)), "size of open_exec"),  # type: ignore[arg-type]
    (lambda: ForkRequest(instance="vm", payload="text"), "payload of fork must be bytes or None, not str"),  # type: ignore[arg-type]
    (lambda: ForkRequest(instance="vm", payloads=["text"]), r"item at \[0\] that must be bytes, not str"),  # type: ignore[list-item]
    (lambda: ForkRequest(instance="vm", payload=object()), "payload of fork cannot be a object"),  # type: ignore[arg-type]
    (lambda: ForkRequest(instance="vm", count="4"), "count of fork must be int, not str"),  # type: ignore[arg-type]
    (lambda: ForkRequest(instance="vm", count=True), "count of fork must be int, not bool"),
    (lambda: ForkRequest(instance="vm", names="elm"), "names of fork must be list, not str"),
    (lambda: ForkRequest(instance="vm", target="Runing"), "target of fork is invalid"),  # type: ignore[arg-type]
    (lambda: ForkRequest(instance="vm", publish=[Publish(host_port="80", guest_port=1)]), r"that must be int, not str"),  # type: ignore[arg-type]
    (lambda: SnapshotForkRequest(snapshot=None), "snapshot of snapshot_fork must be str, not NoneType"),  # type: ignore[arg-type]
    (lambda: RunRequest(image="debian", cpus=1.5), "cpus of run must be int, not float"),  # type: ignore[arg-type]
    (lambda: RunRequest(image="debian", tags={1: "a"}), "that must be str, not int"),  # type: ignore[dict-item]
    (lambda: WriteFileRequest(instance="vm", path="/x", data="text"), "data of write_file must be bytes, not str"),  # type: ignore[arg-type]
    (lambda: WriteFileRequest(instance="vm", path="/x", data=b"", mode=-1), "not a file mode"),
    (lambda: StopRequest(instance="vm", grace_s=-1), "grace period cannot be -1"),
    (lambda: StopRequest(instance="vm", grace_s=float("nan")), "grace period cannot be nan"),
    (lambda: WaitRequest(instance="vm", deadline_s=0), "not a time limit"),
    (lambda: StartAheadRequest(instance="vm", count=99), "cannot keep 99 spares"),
    (lambda: LogsRequest(instance="vm", source="kernel"), "source of logs is invalid"),  # type: ignore[arg-type]
    (lambda: LogsRequest(instance="vm", tail=-1), "limit cannot be -1"),
    (lambda: LsRequest(state="Running?"), "state of ls is invalid"),  # type: ignore[arg-type]
    (lambda: GcRequest(dry_run="yes"), "dry_run of gc must be bool, not str"),  # type: ignore[arg-type]
    (lambda: VolumeCreateRequest(name="data", size_bytes=1), "out of bounds"),
    (lambda: FanOut(count=2, payloads=[b""]), "1 payloads for 2 forks"),
    (lambda: FanOut(target=State.STANDBY, payload=b""), "cannot have a payload"),
]


@pytest.mark.parametrize(("make", "words"), WRONG)
def test_an_invalid_value_is_a_usage_error_with_a_hint(make: Callable[[], object], words: str) -> None:
    """The error names the field and its valid values, instead of a TypeError from a lower layer or
    a silent misreading.
    """
    with pytest.raises(UsageError, match=words) as refusal:
        make()
    assert refusal.value.hint


@pytest.mark.parametrize(
    "kind", [kind for kind in KINDS if {"instance", "snapshot", "volume"} & {*kind.__struct_fields__}]
)
def test_a_reference_is_a_name_or_an_id(kind: type[Request[Any]]) -> None:
    """A path, an option or a text with a NUL never reaches a file name or a command line."""
    field = next(each for each in ("instance", "snapshot", "volume") if each in kind.__struct_fields__)
    fillers = {
        "argv": ["ls"],
        "path": "/x",
        "destination": "/y",
        "data": b"",
        "host_path": "x",
        "guest_path": "/x",
        "deadline_s": 1.0,
        "to": 80,
        "command": "a",
        "interval_s": 60.0,
        "max_count": 1,
    }
    required = kind.__struct_fields__[: len(kind.__struct_fields__) - len(kind.__struct_defaults__)]
    wanted = (
        name for name in kind.__struct_fields__ if name in required or name != "command"
    )  # of `start` it is words
    others = {name: fillers[name] for name in wanted if name in fillers and name != field}
    assert kind(**{field: "oak", **others})
    for reference in ("../x", "-oak", "o/ak", "OAK", "", "oak\0"):
        with pytest.raises(InvalidName):
            kind(**{field: reference, **others})


def test_a_request_shares_nothing_with_its_caller() -> None:
    """Later changes by the caller do not change the request."""
    argv, env = ["ls"], {"A": "1"}
    request = ExecRequest(instance="vm", argv=argv, env=env)
    argv.append("-l")
    env["B"] = "2"
    assert (request.argv, request.env) == (("ls",), {"A": "1"})


def test_paths_are_stored_as_text() -> None:
    """A Path is equal to its text; a trailing slash is kept, because it has a meaning in `cp`."""
    assert CpInRequest(instance="vm", host_path=Path("/srv/x"), guest_path="/y").host_path == "/srv/x"  # type: ignore[arg-type]
    assert CpInRequest(instance="vm", host_path="x/.", guest_path="/y/").guest_path == "/y/"


def test_secrets_are_not_shown() -> None:
    """Payloads, environments, input and contents appear in no log or traceback; the other fields
    do.
    """
    hidden = "hunter2"
    shown = [
        repr(ForkRequest(instance="oak", payload=hidden.encode())),
        repr(SnapshotForkRequest(snapshot="noon", count=2, payloads=[hidden.encode()] * 2)),
        repr(ExecRequest(instance="oak", argv=["env"], env={"KEY": hidden}, stdin=hidden.encode())),
        repr(RunRequest(image="debian", env={"KEY": hidden})),
        repr(WriteFileRequest(instance="oak", path="/key", data=hidden.encode())),
    ]
    assert not [text for text in shown if hidden in text]
    assert shown[0].startswith("ForkRequest(count=1, names=(), target=")
    with pytest.raises(UsageError) as refusal:
        ForkRequest(instance="oak", payload=hidden)  # type: ignore[arg-type]
    assert hidden not in str(refusal.value)


@pytest.mark.parametrize(
    "made",
    [
        lambda path: RunRequest(image="tiny", workdir=path),
        lambda path: ExecRequest(instance="oak", argv=["ls"], workdir=path),
        lambda path: OpenExecRequest(instance="oak", argv=["ls"], workdir=path),
        lambda path: CommandStartRequest(instance="oak", argv=["ls"], workdir=path),
        lambda path: RunRequest(image="tiny", health_check=HealthCheck(kind="exec", command=("ls",), workdir=path)),
    ],
)
def test_a_working_directory_is_absolute(made: Callable[[str], object]) -> None:
    """There is nothing that a relative one could be relative to, so it would fail at the start or mean another."""
    for path in ("relative", "./x", "~", "/a\0b"):
        with pytest.raises(UsageError, match="is not an absolute path; write one such as /srv/app"):
            made(path)
    made("/srv/app")
    made("")  # the image's own, as from clients that send all fields
