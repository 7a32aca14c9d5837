"""Images pulled from Debian's docker-registry, and from one that breaks connections."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import threading
from pathlib import Path

import pytest

from coppice.errors import HostCannot, NotFound, Refused, UsageError
from coppice.images.cache import SLOTS
from coppice.images.registry import Access
from coppice.model import MIB, Progress
from coppice.requests import ImagePullRequest
from image_archives import ARCHITECTURE, INDEX_TYPE, Layout, file, open_catalog, read_erofs, tar
from pulls import fill, layers, pull
from registries import LOGIN, Front, docker_registry, push

OTHER = "arm64" if ARCHITECTURE == "amd64" else "amd64"

pytestmark = pytest.mark.usefixtures("no_saved_logins")


def behind(proxy: Front, name: str) -> str:
    """Return the name of an image at the registry behind a proxy."""
    return name.replace(proxy.address, str(proxy.upstream))


async def test_a_pulled_image_is_that_of_the_registry(tmp_path: Path, proxy: Front) -> None:
    """Its files, its process and the digest of its manifest are those that were pushed. A second
    pull fetches only the manifest, and after a removal only what is no layer.
    """
    name = f"{proxy.address}/team/app:1"
    pushed = fill(tmp_path, behind(proxy, name), *layers(3000, 5000))
    steps: list[Progress] = []
    image = await pull(tmp_path, name, progress=steps.append)
    assert (image.name, image.manifest_digest, image.config.cmd) == (name, pushed, ("/bin/app",))
    assert image.source == name
    catalog = open_catalog(tmp_path)
    assert {"/etc/file0", "/etc/file1"} <= set(read_erofs(catalog.root_file(image)))
    downloads = [step for step in steps if step.stage == "download"]
    assert downloads[-1].done == downloads[-1].total
    assert downloads[-1].unit == "bytes"
    proxy.begun.clear()
    assert (await pull(tmp_path, name)).digest == image.digest
    assert not proxy.begun
    catalog.remove(name)
    assert (await pull(tmp_path, name)).digest == image.digest
    assert all(proxy.begun[digest] == 0 for digest in large(tmp_path, over=2000))
    assert not [path for path in (tmp_path / "images").iterdir() if path.name.startswith(".")]


def large(home: Path, over: int = MIB) -> list[str]:
    """Return the digests of the cached layers of some size."""
    found = (home / "blobs/_/blobs/sha256").iterdir()
    return [f"sha256:{path.name}" for path in found if path.stat().st_size > over]


async def test_short_and_full_names_find_one_image(tmp_path: Path) -> None:
    """`alpine` and docker.io/library/alpine:latest are one name: to look up, to remove, and when a
    later pull moves it.
    """
    catalog = open_catalog(tmp_path)
    path = tmp_path / "a.tar"
    path.write_bytes(tar(file("etc/a", b"a")))
    image = await catalog.import_any("alpine", path)
    for name in ("alpine", "alpine:latest", "library/alpine", "docker.io/alpine", "docker.io/library/alpine:latest"):
        assert catalog.get(name) == image
    for name in ("alpine:3", "localhost/alpine", "quay.io/library/alpine", f"alpine@sha256:{'a' * 64}"):
        with pytest.raises(NotFound):
            catalog.get(name)
    catalog.tag("alpine", "kept")
    catalog.remove("docker.io/library/alpine:latest")
    assert [each.name for each in catalog.list()] == ["kept"]


async def test_a_pull_moves_all_spellings_of_the_name(tmp_path: Path, proxy: Front) -> None:
    """No spelling keeps naming the content of an older pull."""
    name = f"{proxy.address}/team/moved"
    fill(tmp_path, behind(proxy, f"{name}:latest"), *layers(100))
    old = await pull(tmp_path, f"{name}:latest")
    fill(tmp_path, behind(proxy, f"{name}:latest"), *layers(200))
    new = await pull(tmp_path, name)
    assert new.digest != old.digest
    assert {open_catalog(tmp_path).get(each).digest for each in (name, f"{name}:latest")} == {new.digest}


async def test_a_broken_connection_costs_no_complete_layer(tmp_path: Path, proxy: Front) -> None:
    """The connection is cut in the middle of a layer, three times: the pull succeeds, and fetches
    each layer completely once.
    """
    name = f"{proxy.address}/team/cut:1"
    fill(tmp_path, behind(proxy, name), *layers(5 * MIB, 3 * MIB, 100_000, 2000))
    proxy.cuts = 3
    image = await pull(tmp_path, name)
    assert {f"/etc/file{number}" for number in range(4)} <= set(read_erofs(open_catalog(tmp_path).root_file(image)))
    assert proxy.cuts == 0
    for digest in large(tmp_path):
        assert proxy.complete[digest] == 1
        assert proxy.begun[digest] > 1 or sum(proxy.begun.values()) > 5


async def test_a_failed_pull_keeps_its_complete_layers(
    tmp_path: Path, proxy: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When all attempts fail, the error names the registry, and the next pull fetches the rest."""
    monkeypatch.setattr("coppice.images.registry._BACKOFF_S", 0.01)
    name = f"{proxy.address}/team/failed:1"
    fill(tmp_path, behind(proxy, name), *layers(5 * MIB, 2 * MIB))
    proxy.cuts, proxy.cut_over = 1000, 4 * MIB
    with pytest.raises(HostCannot) as failure:
        await pull(tmp_path, name)
    assert proxy.address in str(failure.value)
    assert "complete layers are kept" in str(failure.value)
    (kept,) = large(tmp_path)
    proxy.cuts = 0
    proxy.begun.clear()
    await pull(tmp_path, name)
    assert proxy.begun[kept] == 0


async def test_a_damaged_cached_layer_is_fetched_again(tmp_path: Path, proxy: Front) -> None:
    """A power cut can leave a file with its final name and other content."""
    name = f"{proxy.address}/team/damaged:1"
    fill(tmp_path, behind(proxy, name), *layers(2 * MIB))
    image = await pull(tmp_path, name)
    (digest,) = large(tmp_path)
    (tmp_path / "blobs/_/blobs/sha256" / digest.removeprefix("sha256:")).write_bytes(b"\0" * 4096)
    open_catalog(tmp_path).remove(name)
    assert (await pull(tmp_path, name)).digest == image.digest


async def test_the_manifest_of_this_platform_is_chosen(tmp_path: Path, registry: str) -> None:
    """Of an index, entries of other platforms and attestations are left out. The digest of the
    index and that of the manifest work as references.
    """
    layout = Layout(tmp_path / "layout")
    (mine,), (others,) = layers(1000), layers(2000)
    fitting, other = layout.image(mine), layout.image(others, architecture=OTHER)
    descriptors = [
        {**other, "platform": {"os": "linux", "architecture": OTHER}},
        {**fitting, "platform": {"os": "linux", "architecture": ARCHITECTURE}},
    ]
    index = {"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": descriptors}
    stored = layout.blob(json.dumps(index).encode(), INDEX_TYPE)
    push(layout.index(stored), f"{registry}/team/multi:1", all_platforms=True)
    image = await pull(tmp_path, f"{registry}/team/multi:1")
    assert image.manifest_digest == fitting["digest"]
    for digest in (stored["digest"], fitting["digest"]):
        again = await pull(tmp_path, f"{registry}/team/multi@{digest}", access=Access(platform=f"linux/{ARCHITECTURE}"))
        assert again.digest == image.digest
        assert open_catalog(tmp_path).get(f"{registry}/team/multi@{digest}").digest == image.digest
    with pytest.raises(NotFound, match=r"no image for linux/.*/v9"):
        await pull(tmp_path, f"{registry}/team/multi:1", access=Access(platform=f"linux/{ARCHITECTURE}/v9"))
    for platform in (f"linux/{OTHER}", "windows/amd64", "linux", "linux/"):
        with pytest.raises(UsageError, match=r"platform|cannot run"):
            await pull(tmp_path, f"{registry}/team/multi:1", access=Access(platform=platform))


async def test_a_registry_with_logins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Credentials, or a saved login of docker, open the registry. They are in no argument and no
    file. Without them, and with wrong ones, the error says how to log in.
    """
    with docker_registry(tmp_path / "registry", login=True) as address:
        name = f"{address}/team/secret:1"
        fill(tmp_path, name, *layers(1000), login=LOGIN)
        for access in (Access(), Access(credentials="open:wrong"), Access(saved_logins=True)):
            with pytest.raises(Refused, match=f"skopeo login {address}") as refusal:
                await pull(tmp_path, name, access=access)
            assert "wrong" not in str(refusal.value)
        for words in ("nobody", ":x"):
            with pytest.raises(UsageError) as failure:
                await pull(tmp_path, name, access=Access(credentials=words))
            assert words not in str(failure.value)
        arguments = record_arguments(tmp_path, monkeypatch)
        await pull(tmp_path, name, access=Access(credentials=LOGIN))
        assert len(arguments.read_text().splitlines()) == 2
        assert "sesame" not in arguments.read_text()
        assert base64.b64encode(LOGIN.encode()).decode() not in arguments.read_text()
        login = json.dumps({"auths": {address: {"auth": base64.b64encode(LOGIN.encode()).decode()}}})
        for number, directory in enumerate((tmp_path / "user/.docker", tmp_path / "elsewhere")):
            directory.mkdir(parents=True)
            (directory / "config.json").write_text(login)
            if number:
                (tmp_path / "user/.docker/config.json").unlink()
                monkeypatch.setenv("DOCKER_CONFIG", str(directory))
            home = tmp_path / f"home{number}"
            home.mkdir()
            await pull(home, name, access=Access(saved_logins=True))
            with pytest.raises(Refused):  # saved logins are the operator's
                await pull(home, name, access=Access(), owner="robin")


def record_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put a skopeo before the real one that writes down its arguments and environment."""
    found = tmp_path / "arguments"
    script = tmp_path / "bin/skopeo"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\necho "$*" $(env) >> {found}\nexec /usr/bin/skopeo "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("COPPICE_REGISTRY_CREDS", LOGIN)
    return found


async def test_a_request_does_not_show_its_credentials() -> None:
    """Logs and tracebacks print requests."""
    assert "sesame" not in repr(ImagePullRequest(reference="a", credentials=LOGIN))


async def test_one_reference_pulled_twice_at_once_is_fetched_once(tmp_path: Path, proxy: Front) -> None:
    """Two hosts, as two processes have: the second pull waits, and then only names the image."""
    name = f"{proxy.address}/team/twice:1"
    fill(tmp_path, behind(proxy, name), *layers(2 * MIB))
    first, second = open_catalog(tmp_path), open_catalog(tmp_path)
    images = await asyncio.gather(
        pull(tmp_path, name, catalog=first), pull(tmp_path, name, catalog=second, name="other")
    )
    assert {image.name for image in images} == {name, "other"}
    assert images[0].digest == images[1].digest
    assert [proxy.complete[digest] for digest in large(tmp_path)] == [1]


async def test_only_some_pulls_run_at_once(tmp_path: Path, proxy: Front) -> None:
    """The others wait until a slot is free."""
    names = [f"{proxy.address}/team/many:{number}" for number in range(SLOTS + 2)]
    for name in names:
        fill(tmp_path, behind(proxy, name), *layers(MIB))
    inside: set[str] = set()
    most = [0]
    lock, full = threading.Lock(), threading.Event()

    def before(path: str) -> None:
        if "/blobs/" not in path:
            return
        with lock:
            inside.add(path)
            most[0] = max(most[0], len(inside))
            if len(inside) >= SLOTS:
                full.set()
        full.wait(10)
        with lock:
            inside.discard(path)

    proxy.before = before
    await asyncio.gather(*(pull(tmp_path, name) for name in names))
    assert most[0] == SLOTS  # each pull asks for its layer and then for its config


async def test_a_cancelled_pull_ends_and_leaves_only_cached_layers(tmp_path: Path, proxy: Front) -> None:
    """skopeo is killed while it waits for a layer."""
    name = f"{proxy.address}/team/stuck:1"
    fill(tmp_path, behind(proxy, name), *layers(MIB))
    reached, go_on = threading.Event(), threading.Event()

    def before(path: str) -> None:
        if "/blobs/" in path:
            reached.set()
            go_on.wait(20)

    proxy.before = before
    task = asyncio.ensure_future(pull(tmp_path, name))
    assert await asyncio.to_thread(reached.wait, 20)
    task.cancel()
    done, _ = await asyncio.wait({task}, timeout=10)
    go_on.set()
    assert done
    assert task.cancelled()
    assert list((tmp_path / "images").iterdir()) == []
    await pull(tmp_path, name)


async def test_a_registry_that_stops_sending_is_tried_again(
    tmp_path: Path, proxy: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    """skopeo itself would wait for ever."""
    monkeypatch.setattr("coppice.images.registry._STALL_S", 1.0)
    name = f"{proxy.address}/team/stalled:1"
    fill(tmp_path, behind(proxy, name), *layers(MIB))
    go_on, stalled = threading.Event(), threading.Event()

    def before(path: str) -> None:
        if "/blobs/" in path and not stalled.is_set():
            stalled.set()
            go_on.wait(30)

    proxy.before = before
    await pull(tmp_path, name)
    go_on.set()


async def test_what_a_registry_does_not_have(tmp_path: Path, registry: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The errors name registry and reference."""
    monkeypatch.setattr("coppice.images.registry._BACKOFF_S", 0.01)
    with pytest.raises(NotFound, match=f"the registry {registry} has no image team/none:1"):
        await pull(tmp_path, f"{registry}/team/none:1")
    with pytest.raises(HostCannot, match=r"no trusted TLS connection .*--no-tls-verify"):
        await pull(tmp_path, f"{registry}/team/none:1", access=Access(tls_verify=True))
    with pytest.raises(HostCannot, match=r"cannot pull 127\.0\.0\.1:1/a:1 from 127\.0\.0\.1:1"):
        await pull(tmp_path, "127.0.0.1:1/a:1")
    for wrong in ("", "UPPER/case", "a b", "-x", "a@sha256:12", "a//b", "http://a.b/c", "a" * 300):
        with pytest.raises(UsageError):
            await pull(tmp_path, wrong)
