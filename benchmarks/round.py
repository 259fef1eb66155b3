"""Time of a round without training: what the link, the journal and the node cost.

    make bench-round ARGS="--size 1MB --devices 2 --rounds 10"

Real processes over a real broker on loopback: an aggregator and agents that send noise instead of a
    delta. A round is
everything from one merge to the next: announcement, download of the global version by every device,
upload, commits, merge. Printed are the median, the 20th and the 80th percentile over the rounds
after the first.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

from edge_broker.local import find_mosquitto, start_broker

FLEET = """
[fleet]
name = "bench"
open = true
rounds = {rounds}
quorum = {devices}
deadline_s = 60
extensions = 0

[[catalog]]
source = "none"
"""


def measure(kind: str, size: str, devices: int, rounds: int) -> list[float]:
    """Seconds of each round after the first, on a broker of this kind."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "fleet.toml").write_text(FLEET.format(rounds=rounds, devices=devices))
        with start_broker(port=0, state_dir=folder / "broker", kind=kind) as broker:
            node = _start(
                "benchmarks.noise_node",
                *("--fleet", str(folder / "fleet.toml"), "--state", str(folder / "node")),
                *("--broker", broker.url, "--until-finished"),
            )
            agents = [
                _start(
                    "benchmarks.noise",
                    *("--broker", broker.url, "--fleet", "bench", "--id", f"device-{number}"),
                    *("--state", str(folder / f"device-{number}"), "--size", size, "--until-finished"),
                )
                for number in range(devices)
            ]
            try:
                return _intervals(node)
            finally:
                for process in (node, *agents):
                    process.kill()
                    process.wait(10)


def _start(module: str, *arguments: str) -> "subprocess.Popen[bytes]":
    return subprocess.Popen([sys.executable, "-m", module, *arguments], stdout=subprocess.PIPE)


def _intervals(node: "subprocess.Popen[bytes]") -> list[float]:
    merged = []
    assert node.stdout is not None
    for line in node.stdout:
        if json.loads(line)["phase"] == "merged":
            merged.append(time.monotonic())
    return [after - before for before, after in pairwise(merged)]


def main() -> None:
    """Print a line for each broker found."""
    parser = argparse.ArgumentParser(prog="make bench-round")
    parser.add_argument("--size", default="1MB", help="payload of each device and round")
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=11)
    options = parser.parse_args()
    kinds = (["mosquitto"] if find_mosquitto() else []) + ["embedded"]
    write = sys.stdout.write
    write(f"{options.devices} devices, {options.size} each way a device and round, {platform.platform()}\n")
    for kind in kinds:
        seconds = measure(kind, options.size, options.devices, options.rounds)
        low, *_, high = statistics.quantiles(seconds, n=5)
        write(
            f"{kind:10} median {statistics.median(seconds):.3f} s  (p20 {low:.3f}, p80 {high:.3f}, n {len(seconds)})\n"
        )


if __name__ == "__main__":
    main()
