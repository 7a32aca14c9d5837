"""Random numbers of warm processes: eight forks of one machine in which Node.js, Python and nginx
have already drawn random numbers.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest

from coppice.client import AsyncHost
from coppice.model import MIB, ForkReport, Instance
from coppice.requests import (
    ExecRequest,
    ForkRequest,
    PromoteRequest,
    RmRequest,
    RunRequest,
    StandbyRequest,
    WriteFileRequest,
)
from documentation import blocks

FORKS = 8
PAGE = "docs/fork-correctness.md"
pytestmark = pytest.mark.timeout(600)  # the first of these tests builds an image

# After the recipe of the documentation, which has `crypto`.
NODE = """
const draw = () => ({
  'node randomBytes': crypto.randomBytes(16).toString('hex'),
  'node randomUUID': crypto.randomUUID(),
  'node webcrypto.randomUUID': crypto.webcrypto.randomUUID(),
  'node getRandomValues': Buffer.from(crypto.webcrypto.getRandomValues(new Uint8Array(16))).toString('hex'),
  'node randomInt': crypto.randomInt(2 ** 47),
  'node private key': crypto.generateKeyPairSync('ec', {namedCurve: 'P-256'}).privateKey.export({format: 'jwk'}).d,
  'reseeded Math.random': String(Math.random()),
});
draw();
require('readline').createInterface({input: process.stdin}).on('line', () => {
  for (const [name, value] of Object.entries(draw())) console.log(name + '=' + value);
  console.log('.');
});
console.log('.');
"""
# Also the client of nginx: it records the server's random bytes and key share, in TLS 1.3.
PYTHON = """
import http.client, random, socket, ssl, sys
name, port = sys.argv[1:]
context = ssl.create_default_context()
context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
def hello():
    received, sent = ssl.MemoryBIO(), ssl.MemoryBIO()
    session = context.wrap_bio(received, sent)
    try: session.do_handshake()
    except ssl.SSLWantReadError: pass
    first = sent.read()
    with socket.create_connection(("127.0.0.1", int(port))) as server:
        server.sendall(first)
        answer = server.recv(4096)
    return first[11:43], answer[11:43], answer[95:127]
def draw():
    client, server, share = hello()
    yield "python RAND_bytes", ssl.RAND_bytes(16).hex()
    yield "python ClientHello", client.hex()
    yield "nginx ServerHello", server.hex()
    yield "nginx key share", share.hex()
    connection = http.client.HTTPSConnection("127.0.0.1", int(port), context=context)
    connection.request("GET", "/")
    yield "nginx request_id", connection.getresponse().read().decode()
    yield "python random", str(random.random())
    if "numpy" in sys.modules:
        yield "reseeded random", str(random.random())
        yield "reseeded numpy.random", str(numpy.random.rand())
list(draw())
while True:
    print(".", flush=True)
    if not sys.stdin.readline(): break
    for what, value in draw(): print(f"{what} of {name}={value}")
"""
NGINX = """
pid /run/nginx-PORT.pid; error_log /run/nginx-PORT.log; worker_processes 1;
events {}
http {
    access_log off;
    server {
        listen 127.0.0.1:PORT ssl; ssl_protocols TLSv1.3;
        ssl_certificate /srv/certificate; ssl_certificate_key /srv/key;
        return 200 $request_id;
    }
}
"""
# The environment of the first nginx is cleared, as service scripts do. The processes called `plain`
# have the distribution's own configuration of OpenSSL: they show that this test sees what is shared.
START = """
set -e
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj /CN=guest \\
    -keyout /srv/key -out /srv/certificate 2>/dev/null
for port in 8443 8444; do sed "s/PORT/$port/" /srv/nginx >/srv/nginx-$port; done
env -i /usr/sbin/nginx -c /srv/nginx-8443
OPENSSL_CONF=/etc/ssl/openssl.cnf nginx -c /srv/nginx-8444
warm() {
    name=$1; shift
    mkfifo /run/$name.in /run/$name.out
    setsid "$@" <>/run/$name.in 1<>/run/$name.out 2>/run/$name.err &
}
warm node node /srv/node.js
warm python python3 /srv/reseeding.py usual 8443
OPENSSL_CONF=/etc/ssl/openssl.cnf warm plain python3 /srv/python.py plain 8444
for name in node python plain; do read dot </run/$name.out; done
"""
ASK = """
for name in node python plain; do echo >/run/$name.in; done
for name in node python plain; do
    exec 5</run/$name.out
    while IFS= read -r line <&5 && [ "$line" != . ]; do printf '%s\\n' "$line"; done
done
printf 'generation=%s\\n' $(od -An -tu4 -N4 /dev/sysgenid)
"""


async def shell(host: AsyncHost, vm: Instance, script: str) -> str:
    result = await host.call(ExecRequest(instance=vm.id, argv=["sh", "-c", script], timeout_s=400))
    assert result.exit_code == 0, result.stderr
    return result.stdout.decode()


@pytest.fixture(scope="module")
async def grown(host: AsyncHost, runtimes: str) -> AsyncIterator[tuple[ForkReport, list[dict[str, str]]]]:
    """Eight forks of a template with warm processes, and what each process of each fork draws."""
    source = await host.call(
        RunRequest(image=runtimes, name="warm", command=["sleep", "infinity"], memory_bytes=512 * MIB)
    )
    async with AsyncExitStack() as stack:
        stack.push_async_callback(host.call, RmRequest(instance=source.id))
        files = {
            "/srv/node.js": blocks(PAGE, "js")[0] + NODE,
            "/srv/python.py": PYTHON,
            "/srv/reseeding.py": blocks(PAGE, "python")[0] + PYTHON,
            "/srv/nginx": NGINX,
            "/etc/coppice/on-fork": blocks(PAGE, "sh")[0],
        }
        for path, text in files.items():
            await host.call(WriteFileRequest(instance=source.id, path=path, data=text.encode(), mode=0o755))
        await shell(host, source, START)
        await host.call(StandbyRequest(instance=source.id))
        await host.call(PromoteRequest(instance=source.id))
        report = await host.call(ForkRequest(instance=source.id, count=FORKS, atomic=True))
        for fork in report.instances:
            stack.push_async_callback(host.call, RmRequest(instance=fork.id))
        answers = await asyncio.gather(*(shell(host, fork, ASK) for fork in report.instances))
        yield report, [dict(line.split("=", 1) for line in answer.splitlines()) for answer in answers]


async def test_keys_and_ids_of_warm_processes_differ(grown: tuple[ForkReport, list[dict[str, str]]]) -> None:
    """No fork draws a number that another one draws: keys, UUIDs, TLS randoms, request ids."""
    _, drawn = grown
    for what in drawn[0]:
        values = {fork[what] for fork in drawn}
        if "plain" not in what and not what.startswith(("reseeded", "python random", "generation")):
            assert len(values) == FORKS, (what, values)
            assert min(map(len, values)) > 8


async def test_what_the_default_cannot_help_is_shared(grown: tuple[ForkReport, list[dict[str, str]]]) -> None:
    """The test above could fail: without Coppice's configuration OpenSSL repeats itself, and so does
    the generator of `random`. If this fails, the documentation must change.
    """
    _, drawn = grown
    for what in ("python RAND_bytes", "nginx ServerHello", "nginx request_id", "python random"):
        assert len({fork[f"{what} of plain"] for fork in drawn}) == 1, what


async def test_the_recipe_reseeds(grown: tuple[ForkReport, list[dict[str, str]]]) -> None:
    """The hook and the handlers of the documentation make the other generators differ, too."""
    _, drawn = grown
    for what in ("reseeded Math.random", "reseeded random of usual", "reseeded numpy.random of usual"):
        assert len({fork[what] for fork in drawn}) == FORKS, what


async def test_the_report_names_the_processes(grown: tuple[ForkReport, list[dict[str, str]]]) -> None:
    """Each process with a generator that the forks share is named, with the generator."""
    report, _ = grown
    found = sorted(re.sub(r"pid \d+", "pid N", line) for line in report.shared_random)
    assert found == [
        "nginx (2 processes, pid N ...): openssl",  # the plain one: its master and its worker
        "node (pid N): Math.random",
        "python3.11 (pid N): numpy.random, random of Python",
        "python3.11 (pid N): openssl, random of Python",
    ]


async def test_the_generation_changes(grown: tuple[ForkReport, list[dict[str, str]]], host: AsyncHost) -> None:
    """Libraries that watch /dev/sysgenid see another number in each fork than in the source."""
    _, drawn = grown
    assert {fork["generation"] for fork in drawn} == {"3"}  # 1 at boot, 2 after its identity
