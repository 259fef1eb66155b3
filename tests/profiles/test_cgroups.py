"""Memory and CPU limits, from small trees laid out as the kernel lays them out."""

import pytest
from edge_profiles import cgroups

GIB = 2**30
TOTAL, AVAILABLE = 16 * GIB, 12 * GIB


def write(root, files):
    for name, text in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


def v2(root, **changes):
    files = {
        "proc/self/cgroup": "0::/system.slice/edge.service\n",
        "sys/fs/cgroup/system.slice/edge.service/memory.max": f"{4 * GIB}\n",
        "sys/fs/cgroup/system.slice/edge.service/memory.current": f"{3 * GIB}\n",
        "sys/fs/cgroup/system.slice/edge.service/memory.stat": f"anon 5\ninactive_file {GIB}\nactive_file 7\n",
        "sys/fs/cgroup/system.slice/memory.max": "max\n",
        "sys/fs/cgroup/system.slice/edge.service/cpu.max": "150000 100000\n",
    }
    return write(root, files | changes)


def v1(root, path="/docker/abc", folder="docker/abc"):
    memory = f"sys/fs/cgroup/memory/{folder}".rstrip("/")
    return write(
        root,
        {
            "proc/self/cgroup": f"5:memory:{path}\n3:cpu,cpuacct:{path}\n1:name=systemd:{path}\n",
            f"{memory}/memory.limit_in_bytes": f"{2 * GIB}\n",
            f"{memory}/memory.usage_in_bytes": f"{GIB}\n",
            f"{memory}/memory.stat": f"inactive_file 1\ntotal_inactive_file {GIB // 2}\n",
            f"sys/fs/cgroup/cpu,cpuacct/{folder}/cpu.cfs_quota_us": "300000\n",
            f"sys/fs/cgroup/cpu,cpuacct/{folder}/cpu.cfs_period_us": "100000\n",
        },
    )


def test_v2_limits_total_and_available_and_page_cache_is_not_used_memory(tmp_path):
    assert cgroups.limit_memory(TOTAL, AVAILABLE, v2(tmp_path)) == (4 * GIB, 2 * GIB)


def test_v2_without_a_limit_leaves_the_machine_as_it_is(tmp_path):
    root = v2(tmp_path, **{"sys/fs/cgroup/system.slice/edge.service/memory.max": "max\n"})
    assert cgroups.limit_memory(TOTAL, AVAILABLE, root) == (TOTAL, AVAILABLE)


def test_v2_a_parents_lower_limit_binds(tmp_path):
    parent = "sys/fs/cgroup/system.slice"
    root = v2(
        tmp_path, **{f"{parent}/memory.max": f"{3 * GIB}", f"{parent}/memory.current": f"{5 * GIB // 2}"}
    )
    assert cgroups.limit_memory(TOTAL, AVAILABLE, root) == (3 * GIB, GIB // 2)


OWN = "sys/fs/cgroup/system.slice/edge.service"


@pytest.mark.parametrize(("most", "high"), [("max", 2 * GIB), (4 * GIB, 2 * GIB), (2 * GIB, 4 * GIB)])
def test_v2_the_lower_of_memory_max_and_memory_high_counts(tmp_path, most, high):
    root = v2(tmp_path, **{f"{OWN}/memory.max": f"{most}\n", f"{OWN}/memory.high": f"{high}\n"})
    (root / OWN / "memory.current").write_text(f"{GIB}\n")
    (root / OWN / "memory.stat").write_text("inactive_file 0\n")
    assert cgroups.limit_memory(TOTAL, AVAILABLE, root) == (2 * GIB, GIB)


def test_v2_a_parents_memory_high_binds_and_max_is_no_limit(tmp_path):
    root = v2(
        tmp_path, **{f"{OWN}/memory.high": "max\n", "sys/fs/cgroup/system.slice/memory.high": f"{GIB}\n"}
    )
    assert cgroups.limit_memory(TOTAL, AVAILABLE, root) == (GIB, GIB)


def test_v2_swap_counts_for_nothing(tmp_path):
    root = v2(tmp_path, **{f"{OWN}/memory.swap.max": "0\n", f"{OWN}/memory.swap.high": "0\n"})
    assert cgroups.limit_memory(TOTAL, AVAILABLE, root) == (4 * GIB, 2 * GIB)


def test_a_limit_above_the_machine_changes_nothing(tmp_path):
    root = v2(tmp_path, **{"sys/fs/cgroup/system.slice/edge.service/memory.max": str(64 * GIB)})
    assert cgroups.limit_memory(TOTAL, AVAILABLE, root) == (TOTAL, AVAILABLE)


def test_a_limit_that_is_already_passed_leaves_nothing_rather_than_less(tmp_path):
    root = v2(tmp_path, **{"sys/fs/cgroup/system.slice/edge.service/memory.current": str(9 * GIB)})
    assert cgroups.limit_memory(TOTAL, AVAILABLE, root) == (4 * GIB, 0)


def test_v1_limits_total_and_available(tmp_path):
    assert cgroups.limit_memory(TOTAL, AVAILABLE, v1(tmp_path)) == (2 * GIB, 3 * GIB // 2)


def test_v1_in_a_container_that_sees_only_its_own_mount(tmp_path):
    assert cgroups.limit_memory(TOTAL, AVAILABLE, v1(tmp_path, folder="")) == (2 * GIB, 3 * GIB // 2)


def test_v1_writes_no_limit_as_a_huge_number(tmp_path):
    root = v1(tmp_path)
    (root / "sys/fs/cgroup/memory/docker/abc/memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert cgroups.limit_memory(TOTAL, AVAILABLE, root) == (TOTAL, AVAILABLE)


@pytest.mark.parametrize("text", ["", "nonsense\n", "0::/../../elsewhere\n", "::::\n"])
def test_a_cgroup_file_of_another_kind_limits_nothing(tmp_path, text):
    root = write(
        tmp_path, {"proc/self/cgroup": text, "sys/elsewhere/memory.max": "1", "sys/fs/cgroup/tasks": ""}
    )
    assert cgroups.limit_memory(TOTAL, AVAILABLE, root) == (TOTAL, AVAILABLE)
    assert cgroups.limit_cores(8, root) == 8


def test_a_machine_without_cgroups_or_their_files_is_not_limited(tmp_path):
    for files in ({}, {"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/cgroup.procs": "1\n"}):
        write(tmp_path, files)
        assert cgroups.limit_memory(TOTAL, AVAILABLE, tmp_path) == (TOTAL, AVAILABLE)
        assert cgroups.limit_cores(8, tmp_path) == 8


def test_the_cpu_quota_counts_and_is_rounded_up(tmp_path):
    assert cgroups.limit_cores(8, v2(tmp_path / "v2")) == 2
    assert cgroups.limit_cores(8, v1(tmp_path / "v1")) == 3
    assert cgroups.limit_cores(1, v1(tmp_path / "v1")) == 1


@pytest.mark.parametrize("quota", ["max 100000", "5000 100000", "", "junk"])
def test_a_quota_never_leaves_less_than_one_core_and_max_is_none(tmp_path, quota):
    root = v2(tmp_path, **{"sys/fs/cgroup/system.slice/edge.service/cpu.max": quota})
    assert cgroups.limit_cores(8, root) == (1 if quota.startswith("5000") else 8)


def test_the_peak_is_the_nearest_cgroups(tmp_path):
    root = v2(tmp_path, **{"sys/fs/cgroup/system.slice/memory.peak": f"{3 * GIB}\n"})
    assert cgroups.peak_memory(root) == 3 * GIB  # where its own folder has none
    (root / "sys/fs/cgroup/system.slice/edge.service/memory.peak").write_text(f"{2 * GIB}\n")
    assert cgroups.peak_memory(root) == 2 * GIB
    old = v1(tmp_path / "v1")
    assert cgroups.peak_memory(old) is cgroups.peak_memory(tmp_path / "none") is None
    (old / "sys/fs/cgroup/memory/docker/abc/memory.max_usage_in_bytes").write_text(f"{GIB}\n")
    assert cgroups.peak_memory(old) == GIB
