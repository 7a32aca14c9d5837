"""Registries for the tests: Debian's docker-registry on loopback, a proxy that counts and breaks
its answers, and a registry whose answers are given by hand.
"""

from __future__ import annotations

import contextlib
import http.client
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

LOGIN = "open:sesame"
_HTPASSWD = "open:$2b$05$fK0GHeaROrL/Un3waczV8u/pj/GF/eaDYnZ61yizFF/oZrYAmpWiS\n"
_START_S = 20.0
_CHUNK = 64 << 10
_PROGRAM = '#include <stdio.h>\n#include <unistd.h>\nint main(int n, char **v) { if (n > 1) pause(); puts("from the registry"); }\n'


class Answer(NamedTuple):
    """What a registry answers to one path."""

    body: bytes
    media_type: str = "application/octet-stream"
    status: int = 200


class Front:
    """An HTTP server before a registry. It counts answers, and can cut or hold them."""

    def __init__(self, upstream: str | None) -> None:
        self.upstream = upstream
        self.answers: dict[str, Answer] = {}
        self.complete: Counter[str] = Counter()  # complete blobs, by digest
        self.begun: Counter[str] = Counter()
        self.asked: list[str] = []
        self.cuts = 0  # so many of the next large blobs are cut in their middle
        self.cut_over = 1 << 20
        self.before: Callable[[str], None] = lambda _: None
        self.most_at_once = 0
        self._at_once = 0
        self._lock = threading.Lock()
        front = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                front.serve(self)

            do_HEAD = do_GET  # noqa: N815 - http.server's name

            def log_message(self, *_: object) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.address = f"127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def serve(self, handler: BaseHTTPRequestHandler) -> None:
        """Answer one request."""
        path = handler.path
        blob = path.rpartition("/blobs/")[2] if "/blobs/" in path else ""
        with self._lock:
            self.asked.append(path)
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            self.before(path)
            status, headers, body = self._fetch(handler)
            cut = False
            if blob and handler.command == "GET":
                with self._lock:
                    self.begun[blob] += 1
                    cut = self.cuts > 0 and len(body) > self.cut_over
                    self.cuts -= cut
            handler.send_response(status)
            for name, value in headers:
                handler.send_header(name, value)
            handler.end_headers()
            if handler.command == "GET":
                with contextlib.suppress(ConnectionError):
                    handler.wfile.write(body[: len(body) // 2] if cut else body)
                    handler.wfile.flush()
            handler.close_connection = cut
            if blob and not cut and status == 200 and handler.command == "GET":
                with self._lock:
                    self.complete[blob] += 1
        finally:
            with self._lock:
                self._at_once -= 1

    def _fetch(self, handler: BaseHTTPRequestHandler) -> tuple[int, list[tuple[str, str]], bytes]:
        if self.upstream is None:
            if handler.path == "/v2/":
                return 200, [("Content-Length", "2")], b"{}"
            answer = self.answers.get(handler.path, Answer(b'{"errors":[{"code":"MANIFEST_UNKNOWN"}]}', status=404))
            headers = [("Content-Length", str(len(answer.body))), ("Content-Type", answer.media_type)]
            return answer.status, headers, answer.body
        connection = http.client.HTTPConnection(self.upstream, timeout=_START_S)
        try:
            named = {name: handler.headers.get_all(name) or () for name in ("Accept", "Authorization")}
            sent = {name: ", ".join(values) for name, values in named.items() if values}
            connection.request(handler.command, handler.path, headers=sent)
            response = connection.getresponse()
            skipped = ("connection", "transfer-encoding")
            headers = [(name, value) for name, value in response.getheaders() if name.lower() not in skipped]
            return response.status, headers, response.read()
        finally:
            connection.close()


@contextlib.contextmanager
def front(upstream: str | None = None) -> Iterator[Front]:
    """Run a server before a registry (None: before nothing; its answers are given by hand)."""
    server = Front(upstream)
    try:
        yield server
    finally:
        server.close()


@contextlib.contextmanager
def docker_registry(directory: Path, *, login: bool = False) -> Iterator[str]:
    """Run Debian's docker-registry; yield its address. With `login` it wants LOGIN."""
    directory.mkdir()
    auth = ""
    if login:
        (directory / "htpasswd").write_text(_HTPASSWD)
        auth = f"auth:\n  htpasswd:\n    realm: test\n    path: {directory}/htpasswd\n"
    config = directory / "config.yml"
    storage = f"version: 0.1\nstorage:\n  filesystem:\n    rootdirectory: {directory}/data\n"
    config.write_text(f"{storage}{auth}http:\n  addr: 127.0.0.1:0\n  secret: test\n")
    log = directory / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(["docker-registry", "serve", str(config)], stdout=output, stderr=output)
    try:
        yield _address(process, log)
    finally:
        process.terminate()
        process.wait(_START_S)


def _address(process: subprocess.Popen[bytes], log: Path) -> str:
    """Return the address in the registry's log, `listening on 127.0.0.1:PORT`."""
    end = time.monotonic() + _START_S
    while time.monotonic() < end and process.poll() is None:
        for word in log.read_text().replace('"', " ").split():
            if word.startswith("127.0.0.1:") and not word.endswith(":0"):
                return word
        time.sleep(0.02)
    raise AssertionError(f"the registry did not start: {log.read_text()}")


def push(layout: Path, target: str, *, all_platforms: bool = False, login: str | None = None) -> None:
    """Copy an OCI layout to a registry with skopeo."""
    options = [*(["--all"] if all_platforms else []), *([f"--dest-creds={login}"] if login else [])]
    subprocess.run(
        ["skopeo", "copy", "-q", "--dest-tls-verify=false", *options, f"oci:{layout}", f"docker://{target}"],
        check=True,
        capture_output=True,
        timeout=60,
    )


def make_program(path: Path) -> None:
    """Compile a program for images: it prints a line, or waits if it has an argument."""
    subprocess.run(["gcc", "-static", "-o", path, "-xc", "-"], input=_PROGRAM, text=True, check=True, timeout=60)
