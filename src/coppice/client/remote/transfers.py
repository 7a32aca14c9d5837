"""Copies and archives between files of this machine and a server, through streams of the server."""

from __future__ import annotations

import contextlib

from coppice.agent.copy import copy_in, copy_out
from coppice.archive.files import content_of, save
from coppice.client.backend import Backend
from coppice.model import Instance, ProgressSink
from coppice.requests import (
    CpInRequest,
    CpOutRequest,
    ExportRequest,
    ImportTemplateRequest,
    OpenCopyRequest,
    OpenExportRequest,
    OpenImportRequest,
)


async def copy(server: Backend, request: CpInRequest | CpOutRequest, progress: ProgressSink) -> int:
    """Copy as an embedded host does, through a session that the server holds."""
    async with server.stream(OpenCopyRequest(instance=request.instance)) as session:
        if isinstance(request, CpInRequest):
            unpacked = await copy_in(
                session, request.host_path, request.guest_path, keep_owners=request.keep_owners, progress=progress
            )
            return unpacked.content_bytes
        return await copy_out(
            session,
            request.guest_path,
            request.host_path,
            outside_links=request.outside_links,
            progress=progress,
        )


async def export(server: Backend, request: ExportRequest, progress: ProgressSink) -> int:
    """Write an instance of the server to a file of this machine."""
    async with server.stream(OpenExportRequest(instance=request.instance, bare=request.bare)) as exported:
        return await save(exported, request.path, progress)


async def import_template(server: Backend, request: ImportTemplateRequest, progress: ProgressSink) -> Instance:
    """Import a file of this machine into the server."""
    async with (
        server.stream(OpenImportRequest(name=request.name)) as session,
        contextlib.aclosing(content_of(request.path, progress)) as content,
    ):
        return await session.receive(content)
