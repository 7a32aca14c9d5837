"""A script as a user of the blocking API would write it. It is never run: mypy --strict and pyright
must accept it.
"""

from __future__ import annotations

import socket
from pathlib import Path
from typing import assert_type

import coppice


def main() -> None:
    """Use every kind of method."""
    with coppice.Host() as host:
        vm = host.run("debian", name="warm", tags={"role": "stump"})
        assert_type(vm, coppice.Machine)
        vm.exec(["sh", "-c", "echo expensive > /run/state"])
        template = vm.freeze()
        assert_type(template, coppice.Machine)
        with template.fork(4, names=["fork"], payloads=[b"a", b"b", b"c", b"d"]) as forks:
            assert_type(forks, coppice.Forks)
            assert_type([f.read_text("/run/state") for f in forks], list[str])
            assert_type(forks[0], coppice.Machine)
            assert_type(forks.report.results[0].stages, dict[str, float])
            assert_type(forks.failures, tuple[coppice.ForkResult, ...])
        with template.fork_one(name="one", payload=b"{}") as one, one.open_exec(["cat"], tty=True) as session:
            session.send_stdin(b"hello\n")
            for stream, data in session:
                assert_type(data, bytes)
                assert stream
            assert_type(session.wait(), coppice.Exit)
        with vm.connect(9222) as sock:
            assert_type(sock, socket.socket)
        assert_type(vm.exec(["true"], timeout_s=5.0).exit_code, int)
        assert_type(vm.state, coppice.State)
        assert_type(vm.record.mem_file, coppice.MemFile | None)
        assert_type(vm.standby(), coppice.CaptureReport)
        assert_type(vm.stop(grace_s=1).start().restore(), coppice.Machine)
        vm.cp_in(Path("here"), "/srv")
        vm.cp_out("/srv/here", "there")
        for line in vm.logs(follow=True, source="vmm"):
            assert_type(line, bytes)
        kept = vm.snapshot(name="before", kind=coppice.SnapshotKind.STANDBY)
        assert_type(kept, coppice.Snapshot)
        assert_type(host.snapshots.fork(kept, 2), coppice.Forks)
        assert_type(host.snapshots.restore("before", start=True), coppice.Machine)
        assert_type(host.ls(state=coppice.State.RUNNING), list[coppice.Machine])
        assert_type(host.get("warm"), coppice.Machine)
        image = host.images.import_("mine", Path("image.tar"))
        with host.run(image.name, ["sleep", "60"], publish=[coppice.Publish(host_port=0, guest_port=80)]) as other:
            assert_type(other.health(), coppice.Health)
        volume = host.volumes.create("data", size_bytes=1 << 30)
        host.volumes.rm(volume)
        host.kernels.add("bzImage", Path("/lib/modules/6.1"))
        assert_type(host.gc(dry_run=True), coppice.GcReport)


if __name__ == "__main__":
    main()
