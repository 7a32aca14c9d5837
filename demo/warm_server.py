"""Runs in the guest: a process that is slow to start, and that every fork finds started. It evaluates what it is sent.

Two named pipes and no socket: then a shell can ask, and the time that is measured is not that of a client's start.
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
    # It comes from the host, who owns this guest.
    result = eval(expression, {"numpy": numpy})  # noqa: S307
    with open("/run/answer", "w") as answer:
        answer.write(f"{result}\n")
