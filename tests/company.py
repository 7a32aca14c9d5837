"""A company's network on this host: a certificate authority of its own, a mirror that only this
authority vouches for, and a proxy that is the only way to the mirror.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import http.server
import ssl
import subprocess
import threading
import zipfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

MIRROR = "mirror.test"  # no name server knows it: the proxy alone does
_AUTHORITY = "-subj /CN=company -keyout ca.key -out ca.pem"
_SERVER = (
    f"-subj /CN={MIRROR} -addext subjectAltName=DNS:{MIRROR} -CA ca.pem -CAkey ca.key -keyout key.pem -out cert.pem"
)


def make_authority(directory: Path) -> Path:
    """Make an authority and the mirror's certificate; return the authority's, as PEM."""
    for options in (_AUTHORITY, _SERVER):
        key = "-x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2"
        subprocess.run(
            ["openssl", "req", *key.split(), *options.split()],
            cwd=directory,
            check=True,
            capture_output=True,
            timeout=60,
        )
    return directory / "ca.pem"


def make_mirror(root: Path) -> None:
    """Fill the mirror's directory: an index of pip with one package, and one of apt."""
    simple = root / "simple/grove"
    simple.mkdir(parents=True)
    wheel = "grove-1.0-py3-none-any.whl"
    with zipfile.ZipFile(simple / wheel, "w") as archive:
        archive.writestr("grove.py", "TREES = 3\n")
        about = "grove-1.0.dist-info"
        archive.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: grove\nVersion: 1.0\n")
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{about}/RECORD", "")
    (simple / "index.html").write_text(f'<a href="{wheel}">{wheel}</a>')
    package = root / "package"
    (package / "DEBIAN").mkdir(parents=True)
    control = "Package: grove\nVersion: 1.0\nArchitecture: all\nMaintainer: a <a@example.org>\nDescription: trees\n"
    (package / "DEBIAN/control").write_text(control)
    (package / "usr/share/grove").mkdir(parents=True)
    (package / "usr/share/grove/trees").write_text("3\n")
    (root / "apt").mkdir()
    archive_path = root / "apt/grove.deb"
    subprocess.run(
        ["dpkg-deb", "--build", str(package), str(archive_path)], check=True, capture_output=True, timeout=60
    )
    data = archive_path.read_bytes()
    index = f"{control}Filename: ./grove.deb\nSize: {len(data)}\nSHA256: {hashlib.sha256(data).hexdigest()}\n"
    (root / "apt/Packages").write_text(index)


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Print nothing."""


@contextlib.contextmanager
def mirror(directory: Path) -> Iterator[int]:
    """Serve `directory/www` over TLS on this host's loopback; return the port."""
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(_Quiet, directory=str(directory / "www"))
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(directory / "cert.pem", directory / "key.pem")
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # a client that does not trust us hangs up
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield int(server.server_address[1])
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextlib.asynccontextmanager
async def proxy(mirror_port: int) -> AsyncIterator[tuple[int, list[str]]]:
    """Serve a proxy on this host's loopback; return its port, and the list of destinations that
    were asked for.
    """
    asked: list[str] = []

    async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(65536):
                sink.write(data)
                await sink.drain()
        sink.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        method, destination, _ = head.split(b"\r\n", 1)[0].decode().split()
        asked.append(f"{method} {destination}")
        if (method, destination) != ("CONNECT", f"{MIRROR}:443"):
            writer.write(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")
            writer.close()
            return
        inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", mirror_port)
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        await asyncio.gather(pump(reader, inner_writer), pump(inner_reader, writer))

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1], asked
