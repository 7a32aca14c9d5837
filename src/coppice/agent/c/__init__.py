"""The guest agent: C sources, and the static binary that the package build compiles from them."""

from __future__ import annotations

from pathlib import Path

from coppice.errors import HostCannot


def agent_binary() -> Path:
    """Return the path of the compiled agent.

    :raises HostCannot: the package was not built
    """
    binary = Path(__file__).with_name("coppice-agent")
    if not binary.is_file():
        raise HostCannot("the guest agent is not compiled", hint="install the package with pip, which compiles it")
    return binary
