"""`/images` of the hypeman API. The name of an image is one encoded segment of the path."""

from __future__ import annotations

import asyncio
from typing import Any, Final

from litestar import Request as HttpRequest
from litestar import delete, get, post
from litestar.params import FromPath, JSONBody

from coppice.errors import NotFound
from coppice.requests import ImageInspectRequest, ImageLsRequest, ImagePullRequest, ImageRmRequest, ImageTagRequest
from coppice.server.auth import Caller
from coppice.server.context import Server, TheCaller, TheServer
from coppice.server.hypeman.instances import refuse
from coppice.server.hypeman.paths import name_in_path, tags_in
from coppice.server.hypeman.wire import Image, ImageCreate, ImageTag, image_of, image_under_way
from coppice.server.pulls import Pull

_READ: Final = {"scope": "image:read"}
_WRITE: Final = {"scope": "image:write"}
_TAGS: Final = ["images"]


@get("/images", summary="List images.", tags=_TAGS, opt=_READ)
async def images_list(request: HttpRequest[Caller, Any, Any], server: TheServer, caller: TheCaller) -> list[Image]:
    """List the images that the caller may run, and those that are being pulled, filtered by `tags[k]=v`."""
    host = await server.host(caller)
    tags = tags_in(list(request.query_params.multi_items()))
    found = [image_of(each) for each in await host.call(ImageLsRequest())]
    ready = {each.name for each in found}
    pulls = server.pulls.all(caller.owner)
    found += [_under_way(server, name, pull) for name, pull in pulls.items() if name not in ready]
    return [each for each in found if tags.items() <= each.tags.items()]


def _under_way(server: Server, name: str, pull: Pull) -> Image:
    position = server.pulls.position(pull)
    return image_under_way(name, pull.operation.view(), position, pull.request.tags)


@post("/images", summary="Get an image ready.", tags=_TAGS, status_code=202, opt=_WRITE)
async def image_create(data: JSONBody[ImageCreate], server: TheServer, caller: TheCaller) -> Image:
    """Return an image of the data directory, or begin to pull it. `GET /images/{name}` shows when
    it is ready.
    """
    host = await server.host(caller)
    try:
        return image_of(await host.call(ImageInspectRequest(image=data.name)), data.name)
    except NotFound:
        pass
    pull = server.pulls.get(caller.owner, data.name)
    if pull is None or pull.operation.ended:
        login = data.credentials
        refuse({"registry_token": login and login.registry_token})
        pull = Pull(
            ImagePullRequest(
                reference=data.name,
                platform=data.platform,
                credentials=f"{login.username}:{login.password}" if login else None,
                tags=data.tags,
            )
        )
        pull.operation = await server.begin(caller, pull.request, server.pulls.turn(pull))
        server.pulls.add(caller.owner, data.name, pull)
        await asyncio.sleep(0)  # if nobody waits, its turn is now
    return _under_way(server, data.name, pull)


@get("/images/{name:str}", summary="Get an image.", tags=_TAGS, opt=_READ)
async def image_get(name: FromPath[str], server: TheServer, caller: TheCaller) -> Image:
    """Return an image by name or digest, also one that is being pulled."""
    wanted = name_in_path(name)
    try:
        return image_of(await (await server.host(caller)).call(ImageInspectRequest(image=wanted)), wanted)
    except NotFound:
        pull = server.pulls.all(caller.owner).get(wanted)
        if pull is None:
            raise
        return _under_way(server, wanted, pull)


@delete("/images/{name:str}", summary="Remove an image.", tags=_TAGS, opt={"scope": "image:delete"})
async def image_delete(name: FromPath[str], server: TheServer, caller: TheCaller) -> None:
    """Remove a name of an image, and with its last name the image."""
    await server.carry_out(caller, ImageRmRequest(image=name_in_path(name)))


@post("/images/{name:str}/tag", summary="Give an image another name.", tags=_TAGS, opt=_WRITE)
async def image_tag(name: FromPath[str], data: JSONBody[ImageTag], server: TheServer, caller: TheCaller) -> Image:
    """Add a name. Both names stay."""
    request = ImageTagRequest(image=name_in_path(name), name=data.target)
    return image_of(await server.carry_out(caller, request), data.target)


ROUTES: Final = [images_list, image_create, image_get, image_delete, image_tag]
