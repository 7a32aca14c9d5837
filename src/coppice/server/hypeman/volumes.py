"""`/volumes` of the hypeman API."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Any, Final

from litestar import Request as HttpRequest
from litestar import delete, get, post
from litestar.params import FromPath, JSONBody, QueryParameter

from coppice.completion import in_thread
from coppice.errors import UsageError
from coppice.host import LocalBackend
from coppice.model import GIB
from coppice.requests import VolumeCreateRequest, VolumeInspectRequest, VolumeLsRequest, VolumeRmRequest
from coppice.server.auth import Caller
from coppice.server.context import TheCaller, TheServer
from coppice.server.copies import CHECK_EVERY, require_space
from coppice.server.hypeman.instances import refuse
from coppice.server.hypeman.paths import tags_in
from coppice.server.hypeman.wire import Volume, VolumeCreate, volume_of
from coppice.server.uploads import PREFIX

_READ: Final = {"scope": "volume:read"}
_WRITE: Final = {"scope": "volume:write"}
_TAGS: Final = ["volumes"]
_MOST_GB: Final = 1 << 14


@get("/volumes", summary="List volumes.", tags=_TAGS, opt=_READ)
async def volumes_list(request: HttpRequest[Caller, Any, Any], server: TheServer, caller: TheCaller) -> list[Volume]:
    """List the caller's volumes, filtered by `tags[k]=v`."""
    host = await server.host(caller)
    tags = tags_in(list(request.query_params.multi_items()))
    return [volume_of(each) for each in await host.call(VolumeLsRequest(tags=tags))]


@post("/volumes", summary="Make a volume.", tags=_TAGS, opt=_WRITE)
async def volume_create(data: JSONBody[VolumeCreate], server: TheServer, caller: TheCaller) -> Volume:
    """Make an empty volume. Ids are always generated."""
    refuse({"id": data.id})
    request = VolumeCreateRequest(name=data.name, size_bytes=_bytes(data.size_gb), tags=data.tags)
    return volume_of(await server.carry_out(caller, request))


@post(
    "/volumes/from-archive",
    summary="Make a volume from a tar archive.",
    tags=_TAGS,
    opt=_WRITE,
    request_max_body_size=None,
)
async def volume_from_archive(
    request: HttpRequest[Caller, Any, Any],
    server: TheServer,
    caller: TheCaller,
    name: Annotated[str, QueryParameter(description="Name of the volume.")],
    size_gb: Annotated[int, QueryParameter(description="Size of the volume in GiB.")],
    wanted: Annotated[str | None, QueryParameter(name="id", description="Not supported: ids are generated.")] = None,
) -> Volume:
    """Make a volume whose first content is the body, a tar archive that may be compressed."""
    refuse({"id": wanted})
    size = _bytes(size_gb)
    tags = tags_in(list(request.query_params.multi_items()))
    async with server.uploads.make(caller.owner, "archive") as upload:
        digest = await _spool(request, await server.host(caller), upload.path, limit=size)
        upload.by_content, upload.complete = f"{PREFIX}{digest}", True
        made = VolumeCreateRequest(name=name, size_bytes=size, archive=upload.by_content, tags=tags)
        return volume_of(await server.carry_out(caller, made))


async def _spool(request: HttpRequest[Caller, Any, Any], host: LocalBackend, file: Path, *, limit: int) -> str:
    """Write the body of a request to a file. Return its SHA-256.

    :raises UsageError: the body is larger than `limit`
    :raises NoSpace: it would take the free space that the budgets reserve
    """
    written, unchecked, digest = 0, CHECK_EVERY, hashlib.sha256()

    def take(chunk: bytes) -> None:
        digest.update(chunk)
        output.write(chunk)

    with file.open("xb") as output:
        async for chunk in request.stream():
            written += len(chunk)
            if written > limit:
                raise UsageError("the archive is larger than the volume", hint="make a larger volume")
            unchecked += len(chunk)
            if unchecked >= CHECK_EVERY:
                require_space(host, file.parent)
                unchecked = 0
            await in_thread(take, chunk)
    return digest.hexdigest()


def _bytes(size_gb: int) -> int:
    if not 1 <= size_gb <= _MOST_GB:
        raise UsageError(f"a volume cannot have {size_gb} GiB", hint=f"ask for 1 to {_MOST_GB}")
    return size_gb * GIB


@get("/volumes/{key:str}", summary="Get a volume.", tags=_TAGS, opt=_READ)
async def volume_get(key: FromPath[str], server: TheServer, caller: TheCaller) -> Volume:
    """Return a volume by id or name."""
    host = await server.host(caller)
    return volume_of((await host.call(VolumeInspectRequest(volume=key))).volume)


@delete("/volumes/{key:str}", summary="Remove a volume.", tags=_TAGS, opt={"scope": "volume:delete"})
async def volume_delete(key: FromPath[str], server: TheServer, caller: TheCaller) -> None:
    """Remove a volume. Refused while an instance or a snapshot holds it."""
    await server.carry_out(caller, VolumeRmRequest(volume=key))


@post(
    "/instances/{key:str}/volumes/{volume:str}",
    summary="Not supported: attach a volume to an existing instance.",
    tags=_TAGS,
    opt={"scope": "instance:write"},
)
async def volume_attach(key: FromPath[str], volume: FromPath[str]) -> None:  # noqa: ARG001 - of the path
    """Volumes are attached when an instance is created."""
    refuse({"attaching a volume to an existing instance": True})


@delete(
    "/instances/{key:str}/volumes/{volume:str}",
    summary="Not supported: detach a volume.",
    tags=_TAGS,
    opt={"scope": "instance:write"},
)
async def volume_detach(key: FromPath[str], volume: FromPath[str]) -> None:  # noqa: ARG001 - of the path
    """Volumes are detached when an instance is removed."""
    refuse({"detaching a volume": True})


ROUTES: Final = [
    volumes_list,
    volume_create,
    volume_from_archive,
    volume_get,
    volume_delete,
    volume_attach,
    volume_detach,
]
