"""Put xterm.js into the web page: `python tools/vendor_xterm.py`, with npm installed.

`src/coppice/server/web/vendor/xterm/packages.json` names the packages with versions, digests and
the files that the page needs. To update, change a version there and set its integrity to what
`npm view PACKAGE@VERSION dist.integrity` prints. `--check` only compares the files with the packages.
"""

from __future__ import annotations

import base64
import hashlib
import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

TARGET = Path(__file__).resolve().parent.parent / "src/coppice/server/web/vendor/xterm"
LIST = TARGET / "packages.json"
DEADLINE_S = 120


def packed(name: str, version: str, into: Path) -> Path:
    """Download one package from npm."""
    done = subprocess.run(
        ["npm", "pack", "--json", f"{name}@{version}"],
        cwd=into,
        check=True,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    (found,) = json.loads(done.stdout)
    return into / Path(found["filename"]).name.lstrip("@").replace("/", "-")


def integrity_of(archive: Path) -> str:
    """Return the digest of an archive as npm writes it."""
    return "sha512-" + base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()


def main(*options: str) -> None:
    """Write the files, or compare them."""
    for package in json.loads(LIST.read_text()):
        with tempfile.TemporaryDirectory() as directory:
            archive = packed(package["name"], package["version"], Path(directory))
            found = integrity_of(archive)
            if found != package["integrity"]:
                sys.exit(f"{package['name']}: the digest is {found}, not {package['integrity']}")
            with tarfile.open(archive) as tar:
                for target, source in package["files"].items():
                    member = tar.extractfile(f"package/{source}")
                    if member is None:
                        sys.exit(f"{package['name']}: {source} is not a file")
                    content = member.read()
                    if "--check" not in options:
                        (TARGET / target).write_bytes(content)
                    elif (TARGET / target).read_bytes() != content:
                        sys.exit(f"{target} differs from {package['name']}@{package['version']}")


if __name__ == "__main__":
    main(*sys.argv[1:])
