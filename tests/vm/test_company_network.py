"""A guest behind a company's proxy, whose certificates only the company's authority vouches for."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import NamedTuple

import pytest

import company
from coppice.client import AsyncHost
from coppice.model import Instance
from coppice.requests import ExecRequest, RmRequest, RunRequest, StartRequest, StopRequest

pytestmark = pytest.mark.timeout(600)  # the first test that uses the image builds it

INDEX = f"https://{company.MIRROR}/simple"
PIP = f"pip install --disable-pip-version-check --root-user-action ignore --no-cache-dir --target /srv/packages --index-url {INDEX}/ grove"
APT = f"""
rm -f /etc/apt/sources.list /etc/apt/sources.list.d/*
echo 'deb [trusted=yes] https://{company.MIRROR}/apt ./' >/etc/apt/sources.list
apt-get update && apt-get install -y grove && cat /usr/share/grove/trees
"""
FETCH = f"python3 -c \"import urllib.request; print(urllib.request.urlopen('{INDEX}/grove/').status)\""


class Company(NamedTuple):
    """The authority, and the proxy as a guest names it."""

    authority: str
    proxy: str
    asked: list[str]


@pytest.fixture(scope="module")
async def network(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Company]:
    """A mirror and a proxy on this host's loopback, which guests reach as 10.0.2.2."""
    directory: Path = tmp_path_factory.mktemp("company")
    authority = company.make_authority(directory).read_text()
    company.make_mirror(directory / "www")
    with company.mirror(directory) as port:
        async with company.proxy(port) as (proxy_port, asked):
            yield Company(authority, f"http://10.0.2.2:{proxy_port}", asked)


async def shell(host: AsyncHost, vm: Instance, script: str) -> tuple[int, str]:
    result = await host.call(ExecRequest(instance=vm.id, argv=["sh", "-c", script], timeout_s=250))
    return result.exit_code, (result.stderr + result.stdout).decode()


async def test_pip_and_apt_work_behind_a_company_proxy(host: AsyncHost, runtimes: str, network: Company) -> None:
    """Both trust the company's authority and use its proxy, also after the machine was booted
    again, which adds no certificate twice.
    """
    vm = await host.call(
        RunRequest(image=runtimes, command=["sleep", "infinity"], certificates=[network.authority], proxy=network.proxy)
    )
    try:
        status, said = await shell(host, vm, f"{PIP} 2>&1 && cat /srv/packages/grove.py")
        assert (status, said.splitlines()[-1]) == (0, "TREES = 3"), said
        status, said = await shell(host, vm, APT)
        assert (status, said.splitlines()[-1]) == (0, "3"), said
        assert set(network.asked) == {f"CONNECT {company.MIRROR}:443"}
        count = "grep -c BEGIN /etc/ssl/certs/ca-certificates.crt"
        before = await shell(host, vm, count)
        await host.call(StopRequest(instance=vm.id))
        await host.call(StartRequest(instance=vm.id))
        assert await shell(host, vm, count) == before
        status, said = await shell(host, vm, FETCH)
        assert (status, said.strip()) == (0, "200"), said
    finally:
        await host.call(RmRequest(instance=vm.id))


async def test_without_the_authority_nothing_is_trusted(host: AsyncHost, runtimes: str, network: Company) -> None:
    """The test above could fail: the mirror is not trusted by default."""
    vm = await host.call(RunRequest(image=runtimes, command=["sleep", "infinity"], proxy=network.proxy))
    try:
        status, said = await shell(host, vm, FETCH)
        assert status == 1
        assert "CERTIFICATE_VERIFY_FAILED" in said
    finally:
        await host.call(RmRequest(instance=vm.id))
