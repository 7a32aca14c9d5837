"""The suites of real machines, on Firecracker: the same tests, with this folder's fixtures.

The other tests need what these microVMs lack: a NIC, a way to power off, or a first boot with the
default kernel.
"""

from __future__ import annotations

import pytest

from coppice.client import AsyncHost
from coppice.errors import CoppiceError
from coppice.model import Instance, State
from vm.test_capture_memory import (  # noqa: F401 - pytest collects what a module has
    test_a_changed_source_leaves_its_forks_alone,
    test_disk_and_memory_are_of_one_instant,
    test_pages_of_a_fork_survive_its_capture,
)
from vm.test_ended_machines import (  # noqa: F401
    test_a_guest_that_panics_is_seen_by_any_process,
    test_after_a_reboot_of_the_host,
)
from vm.test_exec_and_files import (  # noqa: F401
    test_a_session_of_the_source_does_not_reach_into_the_fork,
    test_a_sparse_file_stays_sparse_when_copied,
    test_copy_both_ways,
    test_environment_user_and_directory,
    test_exit_codes_and_streams,
    test_sessions_at_once,
    test_stdin_is_binary_safe,
)
from vm.test_fork_identity import (  # noqa: F401
    test_a_fork_of_a_read_only_root_with_a_seed_says_what_to_do,
    test_a_restored_machine_keeps_its_ids,
    test_a_restored_machine_keeps_what_its_owner_changed,
    test_keys_and_seeds_on_the_disk_are_not_inherited,
    test_names_and_ids_differ,
    test_random_numbers_differ,
    test_the_clock_is_stepped,
    test_the_clocks_of_many_forks_at_once_are_right,
)
from vm.test_fork_running import (  # noqa: F401
    test_a_fork_is_forked_with_its_dirty_pages,
    test_the_disk_of_a_fork_is_clean,
)
from vm.test_fork_sharing import (  # noqa: F401
    test_a_fork_costs_little,
    test_a_template_is_fork_only,
    test_each_fork_is_a_link_to_the_templates_memory,
    test_fork_to_standby_and_stopped,
    test_the_template_never_changes,
    test_warm_state_is_inherited_and_answers_differ,
)
from vm.test_machine_lifecycle import (  # noqa: F401
    test_a_damaged_capture_is_refused,
    test_a_vmm_killed_from_outside_is_seen,
)
from vm.test_memory_layers import (  # noqa: F401
    test_a_running_machine_on_layers_is_forked,
    test_each_level_of_a_tree_has_all_that_was_written_above_it,
)
from vm.test_snapshots import test_a_snapshot_of_a_running_machine_is_forked_and_restored  # noqa: F401

# The system call works in each kernel; /proc/sysrq-trigger needs CONFIG_MAGIC_SYSRQ.
RESET = "import ctypes, time; ctypes.CDLL(None).reboot(0x01234567); time.sleep(60)"


async def test_a_guest_that_resets_is_seen(host: AsyncHost, vm: Instance) -> None:
    """A reset ends Firecracker with status 0, and the machine is Stopped."""
    machine = await host.get(vm.id)
    with pytest.raises(CoppiceError):
        await machine.exec(["python3", "-c", RESET], timeout_s=30)
    assert (await machine.wait(deadline_s=20)).state is State.STOPPED
