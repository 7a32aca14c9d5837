"""`python -m coppice`: the same as `coppice`."""

from __future__ import annotations

from coppice.cli import entry

if __name__ == "__main__":
    entry()
