"""The resident agent holds this package: it must stay small and pull in nothing heavy."""

import json

MEASURE = """
import json, sys
import edge_broker.transfer, edge_broker.session, edge_broker.presence, edge_broker.signing, edge_broker.local
rss_kib = int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1])
print(json.dumps({"rss_mib": rss_kib / 1024, "heavy": sorted({"torch", "numpy", "edge_runtime"} & set(sys.modules))}))
"""


HEAVY = """
import sys, types
sys.modules["numpy"] = types.ModuleType("numpy")
ballast = bytearray(b"x") * 30_000_000
"""


def measured(child, extra=""):
    return json.loads(child(extra + MEASURE).stdout.readline())


def test_importing_it_is_light(child):
    found = measured(child)
    assert found["heavy"] == []
    assert found["rss_mib"] < 36, found


def test_the_measurement_sees_more(child):
    found = measured(child, HEAVY)
    assert found["heavy"] == ["numpy"] and found["rss_mib"] > 36
