"""Checks of what confines VMMs: control groups, Landlock, and users of their own."""

from __future__ import annotations

import os

from coppice.errors import HostCannot
from coppice.linux import cgroup_tree
from coppice.model import Check
from coppice.vmm import confinement, starting

_CONTROLLERS = ("memory", "cpu", "pids", "io")


def control_groups() -> Check:
    """Check which limits of instances this host can enforce."""
    able, refused = [], None
    for controller in _CONTROLLERS:
        try:
            cgroup_tree.delegated({controller}, enable=False)
            able.append(controller)
        except HostCannot as error:
            refused = error
    return judge_control_groups(able, refused)


def judge_control_groups(able: list[str], refused: HostCannot | None) -> Check:
    """Judge the controllers that this user can limit VMMs by.

    :param refused: why it cannot by the last of the others
    """
    if refused is None:
        return Check(name="control groups", status="ok", detail=f"limits of {', '.join(able)} can be enforced")
    some = f"limits of {', '.join(able)} only" if able else "no limits"
    return Check(
        name="control groups", status="warn", detail=f"{some}: {refused.message}", cure=refused.hint or "run as root"
    )


def landlock() -> Check:
    """Check whether files of others can be closed to VMMs."""
    return judge_landlock(starting.landlock_version(), root=os.geteuid() == 0)


def judge_landlock(version: int, *, root: bool) -> Check:
    """Judge the version of Landlock; 0 is none."""
    if version:
        return Check(name="Landlock", status="ok", detail=f"version {version}: a VMM can open its own files alone")
    whose = "only their own users keep VMMs from other files" if root else "a VMM can open all files of this user"
    return Check(
        name="Landlock",
        status="warn",
        detail=f"this kernel has none, or it is off: {whose}",
        cure="use Linux 5.13 or newer, and add landlock to the lsm= list of its command line",
    )


def vmm_users() -> Check:
    """Check whether each VMM can open its devices as a user of its own."""
    groups = confinement.groups_for("/bin/sh", (confinement.KVM,))
    return judge_vmm_users(root=os.geteuid() == 0, exists=os.path.exists(confinement.KVM), groups=groups)  # noqa: PTH110


def judge_vmm_users(*, root: bool, exists: bool, groups: tuple[int, ...] | None) -> Check:
    """Judge the mode of /dev/kvm, which Firecracker opens as its own user."""
    name = "VMM users"
    if not root:
        return Check(name=name, status="ok", detail="VMMs run as this user; root would give each a user of its own")
    if exists and groups is None:
        return Check(
            name=name,
            status="warn",
            detail="/dev/kvm is open to root alone: Firecracker stays root, without capabilities",
            cure="groupadd -f kvm && chgrp kvm /dev/kvm && chmod 660 /dev/kvm",
        )
    return Check(name=name, status="ok", detail="each VMM has a user id of its own")
