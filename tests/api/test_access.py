"""Tokens: who may call a server, and what the caller sees."""

from __future__ import annotations

from pathlib import Path

import httpx
import jwt
import pytest

from conftest import HostFactory
from coppice.client.connecting import connect_async
from coppice.errors import Forbidden, NotFound, Unauthorized, UsageError
from coppice.server.auth import load_key, make_token, read_token
from fakes.hosting import boot
from servers import KEY


def bearer(token: str) -> dict[str, str]:
    """Return the header of a request with a token."""
    return {"authorization": f"Bearer {token}"}


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Basic dXNlcjpwYXNz"},
        bearer("nonsense"),
        bearer(jwt.encode({"sub": "ann"}, b"another key, which also has at least 32 bytes", algorithm="HS256")),
        bearer(jwt.encode({"sub": "ann"}, None, algorithm="none")),
        bearer(jwt.encode({"exp": 1}, KEY, algorithm="HS256")),
        bearer(jwt.encode({"repos": ["x"]}, KEY, algorithm="HS256")),
        bearer(jwt.encode({"permissions": "all"}, KEY, algorithm="HS256")),
        bearer(jwt.encode({"sub": "../x"}, KEY, algorithm="HS256")),
    ],
    ids=["none", "basic", "nonsense", "other key", "unsigned", "expired", "registry", "bad scopes", "bad owner"],
)
async def test_a_request_without_a_valid_token_is_refused(tcp_address: str, headers: dict[str, str]) -> None:
    """The answer is 401 in the shape of all errors, and does not repeat the token."""
    async with httpx.AsyncClient(base_url=tcp_address, headers=headers) as client:
        for path in ("/call/ls", "/call/run", "/operations"):
            answer = await client.post(path, json={}) if "call" in path else await client.get(path)
            assert answer.status_code == 401
            assert answer.json()["code"] == "unauthorized"
            assert answer.headers["x-should-retry"] == "false"
            assert headers.get("authorization", "Bearer -").split()[1] not in answer.text
        assert (await client.get("/health")).json() == {"status": "ok"}


async def test_a_token_allows_its_scopes_only(tcp_address: str, make_host: HostFactory) -> None:
    """A token for reading lists machines, and cannot remove one or run a command in it."""
    async with make_host() as local:
        await boot(local)
    async with connect_async(tcp_address, token=make_token(KEY, owner=None, scopes=["instance:read"])) as host:
        (vm,) = await host.ls()
        for refused in (vm.rm, vm.stop, lambda: vm.exec(["hostname"]), host.images.ls):
            with pytest.raises(Forbidden, match="missing required scope"):
                await refused()
        with pytest.raises(Forbidden):
            async with vm.open_exec(["hostname"]):
                pass
        with pytest.raises(Forbidden):
            async with vm.connect(80):
                pass
        assert (await vm.refresh()).name == "oak"


async def test_a_token_sees_only_operations_that_it_may_begin(tcp_address: str, make_host: HostFactory) -> None:
    """The result of a command, and its end, are for tokens that may run commands."""
    async with make_host() as local:
        await boot(local)
    async with httpx.AsyncClient(base_url=tcp_address) as client:
        may = bearer(make_token(KEY, owner=None, scopes=["instance:write"]))
        may_not = bearer(make_token(KEY, owner=None, scopes=["instance:read", "volume:write"]))
        body = {"instance": "oak", "argv": ["hostname"]}
        ran = await client.post("/call/exec", json=body, headers=may)
        url = f"/operations/{ran.headers['coppice-operation']}"
        assert (await client.get(url, headers=may)).json()["result"]["exit_code"] == 0
        assert [each["operation"] for each in (await client.get("/operations", headers=may)).json()] == ["exec"]
        assert (await client.get("/operations", headers=may_not)).json() == []
        for answer in (await client.get(url, headers=may_not), await client.delete(url, headers=may_not)):
            assert (answer.status_code, answer.json()["code"]) == (403, "forbidden")


async def test_an_owner_sees_only_its_own(tcp_address: str, make_host: HostFactory) -> None:
    """Another owner's machine is not found, not listed, and cannot be followed."""
    async with make_host() as local:
        await boot(local)
    async with connect_async(tcp_address, token=make_token(KEY, owner="ann")) as host:
        assert await host.ls() == []
        assert await host.tree() == []
        with pytest.raises(NotFound):
            await host.get("oak")
    async with connect_async(tcp_address, token=make_token(KEY, owner=None)) as host:
        assert [vm.name for vm in await host.ls()] == ["oak"]


async def test_a_client_without_a_token_learns_how_to_get_one(
    tcp_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hint names the command. The variable COPPICE_TOKEN serves as well as the parameter."""
    monkeypatch.delenv("COPPICE_TOKEN", raising=False)
    async with connect_async(tcp_address) as host:
        with pytest.raises(Unauthorized, match="coppice token create"):
            await host.ls()
    monkeypatch.setenv("COPPICE_TOKEN", make_token(KEY, owner=None))
    async with connect_async(tcp_address) as host:
        assert await host.ls() == []


def test_a_key_is_made_once_and_is_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Later calls read the same key. A short key is refused."""
    monkeypatch.delenv("COPPICE_SERVER_KEY", raising=False)
    key = load_key(tmp_path / "home")
    assert load_key(tmp_path / "home") == key
    assert (tmp_path / "home" / "server.key").stat().st_mode & 0o777 == 0o600
    assert [each.name for each in (tmp_path / "home").iterdir()] == ["server.key"]
    (tmp_path / "home" / "server.key").write_text("short\n")
    with pytest.raises(UsageError, match="has 5 bytes"):
        load_key(tmp_path / "home")
    monkeypatch.setenv("COPPICE_SERVER_KEY", "x" * 40)
    assert load_key(tmp_path / "home") == b"x" * 40


def test_a_token_carries_its_owner_and_scopes() -> None:
    """What `make_token` puts in, `read_token` finds."""
    caller = read_token(KEY, f"Bearer {make_token(KEY, owner='ann', scopes=['instance:read'], ttl_s=60)}")
    assert (caller.owner, caller.may("instance:read"), caller.may("instance:write")) == ("ann", True, False)
    assert read_token(KEY, f"bearer {make_token(KEY, owner=None)}").may("instance:write")
    with pytest.raises(UsageError, match="no scope"):
        make_token(KEY, owner=None, scopes=["everything"])
    with pytest.raises(UsageError, match="cannot live"):
        make_token(KEY, owner=None, ttl_s=0)
