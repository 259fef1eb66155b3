"""The resident agent imports this package and probes: it must stay small and pull in nothing heavy."""

import json
import subprocess
import sys

SCRIPT = """
import json, sys
{before}
import ctypes, msgspec, psutil, subprocess
resident = lambda: psutil.Process().memory_info().rss
start = resident()
import edge_profiles
edge_profiles.probe()
edge_profiles.boards()
sys.stdout.write(json.dumps([resident() - start, sorted(sys.modules)]))
"""


def measure(before=""):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(before=before)], capture_output=True, check=True
    )
    grown_bytes, modules = json.loads(done.stdout)
    return grown_bytes, {name.partition(".")[0] for name in modules}


def test_importing_probing_and_reading_every_board_adds_at_most_4_mib():
    grown_bytes, _ = measure()
    assert 0 < grown_bytes <= 4 * 2**20, f"{grown_bytes / 2**20:.1f} MiB"


def test_neither_torch_nor_numpy_nor_the_product_is_imported():
    heavy = {"torch", "numpy", "transformers", "edge_runtime", "edge_kernels", "edge_broker"}
    _, modules = measure()
    assert not modules & heavy
    assert "edge_profiles" in modules
    _, modules = measure(before="import numpy")  # so the check does see what is there
    assert modules & heavy == {"numpy"}
