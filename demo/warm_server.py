"""Runs in the guest: a process with a slow start, which every fork finds started. It evaluates what it is sent."""

import socketserver
import sys

import numpy


class Handler(socketserver.StreamRequestHandler):
    """One expression per connection, one line back."""

    def handle(self) -> None:
        """Evaluate the line. It comes from the host, who owns this guest."""
        answer = eval(self.rfile.readline(), {"numpy": numpy})  # noqa: S307 - evaluating is what it is for
        self.wfile.write(f"{answer}\n".encode())


server = socketserver.UnixStreamServer("/run/warm.sock", Handler)
sys.stdout.write("numpy is loaded\n")
sys.stdout.flush()
server.serve_forever()
