"""Evaluate expressions in a guest's process that is slow to start, but already runs in every fork.

It uses two named pipes instead of a socket, so that a shell can ask, and the measured time does not
include the start of a client.
"""

import os
import sys

import numpy

os.mkfifo("/run/ask")
os.mkfifo("/run/answer")
sys.stdout.write("numpy is loaded\n")
sys.stdout.flush()
while True:
    with open("/run/ask") as ask:
        expression = ask.readline()
    # The expression comes from the host, which controls this guest anyway.
    result = eval(expression, {"numpy": numpy})  # noqa: S307
    with open("/run/answer", "w") as answer:
        answer.write(f"{result}\n")
