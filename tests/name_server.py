"""A name server for the tests."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator

import dns.message
import dns.rcode
import dns.rdatatype
import dns.rrset

from worlds import WORLD4, WORLD6, Namespace

NAMES = {
    ("in.example.", "A"): WORLD4,
    ("in.example.", "AAAA"): WORLD6,
    ("deep.in.example.", "A"): WORLD4,
    ("out.example.", "A"): WORLD4,
    ("metadata.in.example.", "A"): "169.254.169.254",
}


@contextlib.contextmanager
def answering(namespace: Namespace, address: str) -> Iterator[None]:
    """Answer questions about NAMES at an address of a namespace, for the length of a block."""
    server = namespace.run(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    server.bind((address, 53))
    server.settimeout(0.05)
    over = threading.Event()

    def serve() -> None:
        while not over.is_set():
            try:
                data, peer = server.recvfrom(4096)
            except TimeoutError:
                continue
            server.sendto(_answer(dns.message.from_wire(data)).to_wire(), peer)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        server.close()


def _answer(query: dns.message.Message) -> dns.message.Message:
    answer = dns.message.make_response(query)
    name, kind = query.question[0].name.to_text().lower(), dns.rdatatype.to_text(query.question[0].rdtype)
    if (name, kind) in NAMES:
        answer.answer = [dns.rrset.from_text(name, 300, "IN", kind, NAMES[name, kind])]
    elif name not in {known for known, _ in NAMES}:
        answer.set_rcode(dns.rcode.NXDOMAIN)
    return answer
