"""Memory and time that reading takes, with few and with many rows: in a trainer, and in an agent.

    make bench-rows

A trainer makes two steps with SmolLM2-135M in bfloat16, and the peak and the seconds of its load
phase are printed. An agent's check of its rows runs in a process of its own, which keeps a tenth of
the rows apart as the agent does.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.memory import MIB, SMOLLM2
from edge_runtime.agent.measure import Trial, planned, train
from edge_runtime.planning import processes
from edge_runtime.trainer import data

WORDS = ("the", "light", "garden", "door", "is", "on", "off", "please", "open", "turn", "kitchen", "lamp")
CHECK = """
import json, sys, time
from pathlib import Path
import edge_runtime.agent.agent
from edge_runtime.agent.local_round import DeviceRows
rows, began = DeviceRows(Path(sys.argv[1]), {}), time.process_time()
rows.check()
seconds = time.process_time() - began
rows.with_held_out(Path(sys.argv[2]))
(peak,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
print(json.dumps([int(peak.split()[1]) / 1024, seconds]))
"""


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rows")
    parser.add_argument("--rows", type=int, nargs="+", default=[200, 200_000])
    counts = parser.parse_args().rows
    facts = processes.prepared(str(SMOLLM2), Path.cwd())
    fleet, plan = planned(facts, facts.layers, Trial("bfloat16", 16, 4, 64, steps=2))
    table = Table("rows", "bytes", "trainer's load phase", "agent's peak", "rows checked a second")
    for count in counts:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            result = train(facts, fleet, plan, drawn(count), [], folder)
            path = folder / "train.jsonl"
            command = [sys.executable, "-c", CHECK, str(path), str(folder / "work")]
            agent_mib, seconds = json.loads(
                subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
            )
            load = f"{result.phases['load'].peak_bytes / MIB:.0f} MiB, {result.seconds['load']:.1f} s"
            size = f"{path.stat().st_size:,}"
            table.add_row(f"{count:,}", size, load, f"{agent_mib:.1f} MiB", f"{count / seconds:,.0f}")
    Console(width=100).print(table)


def drawn(count: int) -> list[data.Row]:
    """Rows of 25 words."""
    draw = random.Random(0)
    return [
        {
            "prompt": f"{' '.join(draw.choices(WORDS, k=12))} {number}",
            "completion": " " + " ".join(draw.choices(WORDS, k=12)),
        }
        for number in range(count)
    ]


if __name__ == "__main__":
    main()
