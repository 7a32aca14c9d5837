"""Images of registries, fetched by skopeo: manifests, and layers into a cache.

skopeo speaks the registry's protocol: tokens, credentials, mirrors, TLS. This module decides what
it fetches. It reads the manifest first, checks it against the limits, and then fetches exactly that
manifest, by digest. A complete layer goes into the cache at once, so neither a second attempt nor
a second pull fetches it again.

Credentials are never arguments of a program, nor on disk: skopeo reads them from a file in memory.
"""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import IO

import msgspec

from coppice import stopping
from coppice.errors import CoppiceError, DigestMismatch, HostCannot, ImageError, NoSpace, NotFound, Refused, UsageError
from coppice.images.blobs import Descriptor, Verifier, blob_name
from coppice.images.oci import (
    INDEX_TYPES,
    MAX_INDEX_DEPTH,
    Index,
    Manifest,
    check_layers,
    decode_index,
    decode_manifest,
    host_architecture,
)
from coppice.images.reference import Reference
from coppice.images.workspace import Limits, Workspace
from coppice.linux.tool import NotFinished, Ran, run_tool
from coppice.model import MIB, Record

CREDENTIALS_VARIABLE = "COPPICE_REGISTRY_CREDS"
_log = logging.getLogger(__name__)
_POLICIES = (Path("/etc/containers/policy.json"), Path("~/.config/containers/policy.json"))
_FIRST_CONTACT, _ATTEMPTS = 2, 5
_BACKOFF_S = 0.5
_MANIFEST_S, _DOWNLOAD_S, _STALL_S = 60.0, 4 * 3600.0, 60.0
_LEAST_FILE_LIMIT = 64 * MIB  # skopeo also writes a small database of its own

# What skopeo and registries say; any other failure is tried again.
_UNKNOWN = re.compile(r"manifest unknown|name unknown|repository .*not found|404 \(?Not Found|StatusCode: 404", re.I)
_DENIED = re.compile(r"unauthorized|authentication required|denied|invalid username/password|StatusCode: 40[13]", re.I)
_TLS = re.compile(r"server gave HTTP response to HTTPS client|x509: |certificate", re.I)
_CORRUPT = re.compile(
    r"did not match|size mismatch|does not match|exceeded maximum allowed size|SIGXFSZ|file too large", re.I
)
_FULL = re.compile(r"no space left on device|disk quota exceeded", re.I)
_POLICY = re.compile(r"rejected by policy|Source image rejected|signature", re.I)


class _Kind(msgspec.Struct, rename="camel"):
    """The fields that tell an index, a manifest and a manifest of docker's first version apart."""

    schema_version: int = 0
    media_type: str = ""
    manifests: list[msgspec.Raw] | None = None


# Made at import, in one thread: two threads that first decode a type at once can crash msgspec.
_KIND = msgspec.json.Decoder(_Kind)


class Access(Record, frozen=True, kw_only=True):
    """How a registry is reached, and which platform's image is wanted."""

    platform: str | None = None  # OS/ARCHITECTURE[/VARIANT]; default: this machine's
    credentials: str | None = None  # USER:PASSWORD
    saved_logins: bool = False  # without credentials, use those that `docker login` or `skopeo login` saved
    tls_verify: bool | None = None  # default: unless the registry is on a loopback address

    def check(self) -> None:
        """Raise UsageError for malformed credentials, or a platform that no guest here can run."""
        if self.credentials is not None and (":" not in self.credentials or self.credentials.startswith(":")):
            raise UsageError("the credentials have no user and password", hint="write USER:PASSWORD")
        wanted = (self.platform or f"linux/{host_architecture()}").split("/")
        if len(wanted) not in (2, 3) or not all(wanted):
            raise UsageError(f"{self.platform!r} is not a platform", hint="write OS/ARCHITECTURE, as in linux/amd64")
        if wanted[:2] != ["linux", host_architecture()]:
            raise UsageError(
                f"a guest of this machine cannot run images for {self.platform}",
                hint=f"omit --platform, or choose a variant of linux/{host_architecture()}",
            )

    @property
    def variant(self) -> str | None:
        """The requested variant of the architecture."""
        parts = (self.platform or "").split("/")
        return parts[2] if len(parts) == 3 else None


@dataclass(frozen=True, slots=True)
class Resolved:
    """The manifest that a reference selects for this machine."""

    digest: str
    manifest: Manifest

    @property
    def blobs(self) -> list[Descriptor]:
        """The config and all layers, each once."""
        return list({each.digest: each for each in (self.manifest.config, *self.manifest.layers)}.values())


def resolve(wanted: Reference, access: Access, workspace: Workspace) -> Resolved:
    """Read the manifest that a reference selects, and check it. Blocks.

    :raises NotFound: the registry has no such image, or none for this platform
    :raises Refused: the registry wants other credentials
    :raises HostCannot: the registry cannot be reached
    :raises ImageError: the manifest is no image's, or exceeds a limit
    """
    reference = wanted
    for _ in range(MAX_INDEX_DEPTH + 1):
        raw = _manifest(reference, access, workspace)
        digest = f"sha256:{sha256(raw).hexdigest()}"
        if reference.digest not in (None, digest):
            raise DigestMismatch(
                f"the registry {wanted.registry} sent {digest} as the manifest {reference}",
                hint="try again; if it persists, do not trust this registry",
            )
        try:
            kind = _KIND.decode(raw)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise ImageError(f"the manifest of {wanted} is invalid: {error}", hint="check the reference") from error
        if kind.manifests is None and kind.media_type not in INDEX_TYPES:
            if kind.schema_version != 2:
                raise ImageError(
                    f"the manifest of {wanted} has schema version {kind.schema_version}, not 2",
                    hint="push the image again with a current program",
                )
            manifest = decode_manifest(raw)
            check_layers(manifest, workspace.limits)
            for descriptor in (manifest.config, *manifest.layers):
                blob_name(descriptor)  # refuses a malformed digest or size
            return Resolved(digest, manifest)
        chosen = _choose(decode_index(raw), wanted, access.variant)
        reference = reference._replace(digest=chosen.digest)
    raise ImageError(f"the index of {wanted} nests other indexes too deeply", hint="do not trust this image")


def _choose(index: Index, wanted: Reference, variant: str | None) -> Descriptor:
    """Return the manifest for this machine. Without a requested variant the most general one."""
    known = [each for each in index.manifests if each.platform is not None]
    fitting = [
        each
        for each in known
        if each.platform is not None
        and (each.platform.os, each.platform.architecture) == ("linux", host_architecture())
        and variant in (None, each.platform.variant)
    ]
    if not fitting:
        listed = sorted(
            {f"{p.os}/{p.architecture}{'/' * bool(p.variant)}{p.variant}" for e in known if (p := e.platform)}
        )
        asked = f"linux/{host_architecture()}{f'/{variant}' if variant else ''}"
        raise NotFound(f"{wanted} has no image for {asked}", hint=f"it has: {', '.join(listed)[:500] or 'none'}")
    return min(fitting, key=lambda each: each.platform.variant if each.platform else "")


def download(wanted: Reference, resolved: Resolved, access: Access, blobs: Path, workspace: Workspace) -> None:
    """Fetch the missing blobs of a manifest into `blobs`, a directory of the same file system.

    Blocks. Raises what `resolve` raises, and NoSpace.
    """
    _remove_damaged(resolved, blobs)
    exact = wanted._replace(digest=resolved.digest)
    files = {blobs.parent / blob_name(each): each.size for each in resolved.blobs}
    total = sum(files.values())
    limit = max(_LEAST_FILE_LIMIT, *files.values())
    layout = workspace.path / "layout"
    changed = [0, time.monotonic()]

    def complete() -> int:
        return sum(size for path, size in files.items() if path.exists())

    def tick() -> None:
        done = min(total, complete() + _partial(layout))
        if done != changed[0]:
            changed[:] = done, time.monotonic()
            workspace.report("download", done, total)
        elif time.monotonic() > changed[1] + _STALL_S:
            raise NotFinished(f"nothing arrived for {_STALL_S:g} s", hint="try again")

    def attempt(flags: list[str], environment: dict[str, str]) -> Ran:
        changed[1] = time.monotonic()
        return run_tool(
            "skopeo",
            *(*_policy(), "--tmpdir", str(workspace.path), "copy"),
            *(f"--src-{flag}" for flag in flags),
            *("--dest-oci-accept-uncompressed-layers", "--dest-shared-blob-dir", str(blobs)),
            *(f"docker://{exact}", "oci:layout:image"),
            environment=environment,
            deadline_s=_DOWNLOAD_S,
            cure=_CURE,
            launcher=("prlimit", f"--fsize={limit}", "--"),
            cwd=workspace.path,
            tick=tick,
        )

    _until_done(wanted, access, attempt, workspace, attempts=_ATTEMPTS, complete=complete)
    if missing := [path.name for path in files if not path.exists()]:
        raise ImageError(
            f"the registry {wanted.registry} does not have all layers of {wanted}: {missing[0]} is missing",
            hint="push the image again, with all of its layers",
        )
    workspace.report("download", total, total)


def _remove_damaged(resolved: Resolved, blobs: Path) -> None:
    """Remove cached blobs that do not match their digest, as after a power cut."""
    for each in resolved.blobs:
        path = blobs.parent / blob_name(each)
        if path.exists():
            verifier = Verifier(each.digest, each.size)
            try:
                with path.open("rb") as file:
                    verifier.update_from(file)
                verifier.finish()
            except DigestMismatch:
                path.unlink()


def _partial(layout: Path) -> int:
    """Return the size of the layers that are being downloaded."""
    size = 0
    with contextlib.suppress(FileNotFoundError):
        for entry in os.scandir(layout):
            with contextlib.suppress(FileNotFoundError):  # complete: it has its final name
                size += entry.stat().st_size
    return size


_CURE = "run `apt-get install skopeo`, or import an archive instead: `coppice image import`"


def _manifest(reference: Reference, access: Access, workspace: Workspace) -> bytes:
    output = workspace.new_file()

    def attempt(flags: list[str], environment: dict[str, str]) -> Ran:
        output.seek(0)
        output.truncate()
        return run_tool(
            "skopeo",
            *("--tmpdir", str(workspace.path), "inspect", "--raw"),
            *(f"--{flag}" for flag in flags),
            f"docker://{reference}",
            environment=environment,
            deadline_s=_MANIFEST_S,
            cure=_CURE,
            cwd=workspace.path,
            output=output,
        )

    workspace.report("manifest", 0, unit="items")
    _until_done(reference, access, attempt, workspace, attempts=_FIRST_CONTACT)
    return _whole(output, workspace.limits, reference)


def _whole(file: IO[bytes], limits: Limits, reference: Reference) -> bytes:
    file.seek(0)
    data = file.read(limits.max_document_bytes + 1)
    if len(data) > limits.max_document_bytes:
        raise _oversized(reference, limits)
    return data


def _oversized(reference: Reference, limits: Limits) -> ImageError:
    return ImageError(
        f"the manifest of {reference} is larger than {limits.max_document_bytes} bytes",
        hint="do not trust this registry",
    )


def _policy() -> tuple[str, ...]:
    """Return the option to run without a signature policy, if this machine has none."""
    return () if any(path.expanduser().exists() for path in _POLICIES) else ("--insecure-policy",)


def _until_done(
    reference: Reference,
    access: Access,
    attempt: Callable[[list[str], dict[str, str]], Ran],
    workspace: Workspace,
    *,
    attempts: int,
    complete: Callable[[], int] = lambda: 0,
) -> None:
    """Run skopeo until it succeeds. After `attempts` failures without a new layer between them,
    raise HostCannot.
    """
    environment = {key: value for key, value in os.environ.items() if key != CREDENTIALS_VARIABLE}
    environment |= {"LC_ALL": "C.UTF-8", "TMPDIR": str(workspace.path)}
    failures = 0
    with _logins(reference, access) as flags:
        if access.tls_verify is False or (access.tls_verify is None and reference.is_loopback):
            flags.append("tls-verify=false")
        while True:
            before = complete()
            try:
                ran = attempt(flags, environment)
                if ran.status == 0:
                    return
                said = _said(ran)
                _raise_final(said, reference, workspace.limits)
            except NotFinished as error:
                said = error.message
            failures = 1 if complete() > before else failures + 1
            if failures >= attempts:
                raise HostCannot(
                    f"cannot pull {reference} from {reference.registry}: {said}",
                    hint="check the network and the name of the registry, then try again: complete layers are kept",
                )
            _log.info("pull of %s failed, trying again: %s", reference, said)
            stopping.pause(_BACKOFF_S * 2 ** (failures - 1) * random.uniform(0.75, 1.25))  # noqa: S311 - not a secret


@contextlib.contextmanager
def _logins(reference: Reference, access: Access) -> Iterator[list[str]]:
    """Yield the options that select the credentials, without the prefix of the command."""
    if access.credentials is None:
        directory = os.environ.get("DOCKER_CONFIG")
        if not access.saved_logins:
            yield ["no-creds"]
        elif directory and "REGISTRY_AUTH_FILE" not in os.environ and (Path(directory) / "config.json").is_file():
            yield [f"authfile={directory}/config.json"]
        else:
            yield []  # skopeo finds its own, and docker's ~/.docker/config.json
        return
    login = {"auth": base64.b64encode(access.credentials.encode()).decode()}
    descriptor = os.memfd_create("coppice-registry-login", os.MFD_CLOEXEC)
    try:
        with os.fdopen(os.dup(descriptor), "wb") as file:
            file.write(json.dumps({"auths": {reference.registry: login}}).encode())
        yield [f"authfile=/proc/{os.getpid()}/fd/{descriptor}"]
    finally:
        os.close(descriptor)


_MESSAGE = re.compile(r'level=(?:fatal|error) msg="((?:[^"\\]|\\.)*)"')


def _said(ran: Ran) -> str:
    """Return skopeo's error message, on one line."""
    found = [match[1] for line in ran.lines if (match := _MESSAGE.search(line))]
    text = found[-1].replace('\\"', '"').replace("\\n", " ") if found else ran.failure()
    return re.sub(r"^(Error parsing image name \"[^\"]*\"|initializing source [^ ]*): ", "", text)[:500]


def _raise_final(said: str, reference: Reference, limits: Limits) -> None:
    """Raise the error for a failure that another attempt would repeat."""
    registry = reference.registry
    failure: CoppiceError | None = None
    if _FULL.search(said):
        failure = NoSpace(f"the disk became full while {reference} was pulled", hint="free disk space")
    elif "exceeded maximum allowed size" in said:
        failure = _oversized(reference, limits)
    elif _CORRUPT.search(said):
        failure = DigestMismatch(
            f"the registry {registry} sent other content than the manifest of {reference} lists: {said}",
            hint="try again; if it persists, do not trust this registry",
        )
    elif _UNKNOWN.search(said):
        failure = NotFound(
            f"the registry {registry} has no image {reference.repository}{reference.version}",
            hint="check the name and the tag; some registries also say this of images that need a login",
        )
    elif _TLS.search(said):
        failure = HostCannot(
            f"cannot pull {reference}: no trusted TLS connection to the registry {registry}: {said}",
            hint=f"install its certificate in /etc/containers/certs.d/{registry}, or give --no-tls-verify",
        )
    elif _POLICY.search(said):
        failure = Refused(f"this host's policy refuses {reference}: {said}", hint="see /etc/containers/policy.json")
    elif _DENIED.search(said):
        failure = Refused(
            f"the registry {registry} refuses {reference.repository}{reference.version}: {said}",
            hint=f"log in with `skopeo login {registry}`, or give --creds-file FILE with USER:PASSWORD; "
            "check the name too: some registries say this of unknown images",
        )
    if failure is not None:
        raise failure
