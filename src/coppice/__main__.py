"""`python -m coppice` is `coppice`."""

from __future__ import annotations

import sys

from coppice.cli import main

if __name__ == "__main__":
    sys.exit(main())
