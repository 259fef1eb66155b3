"""A device that sends noise instead of a delta: the real agent over the real link, with neither planner nor trainer.

    python -m benchmarks.noise --broker URL --fleet NAME --id ID --state DIR --size 1MB [--wait 120] [--until-finished]

For the node of benchmarks.noise_node, which takes any payload. Events are lines of JSON, as those of `edge-runtime agent --json`.
"""

import argparse
import hashlib
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
from edge_broker import address
from edge_profiles import parse_size

from benchmarks.noise_node import NOISE, tell
from edge_runtime.agent import agent
from edge_runtime.agent.local_round import write_job
from edge_runtime.agent.options import DeviceOptions
from edge_runtime.agent.planner import Planned, Request
from edge_runtime.agent.rounds import Workers
from edge_runtime.agent.trainer import Ended
from edge_runtime.errors import EdgeError
from edge_runtime.models.facts import Facts
from edge_runtime.protocol.plan import Plan
from edge_runtime.protocol.report import Result
from edge_runtime.trainer.job import Job, Progress

FACTS = Facts(
    model_class=NOISE,
    folder="",
    weights="",
    family="",
    layers=1,
    hidden=1,
    heads=1,
    kv_heads=1,
    head_dim=1,
    intermediate=1,
    vocabulary=1,
    positions=1,
    tied_head=True,
    linears={},
    blocks="",
)
PLAN = Plan(NOISE, NOISE, 1, 1, "float32", rank=1, rows=1, tokens=1, terms={}, step_seconds=0.0)


class Written:
    """A trainer that has ended before it was asked to."""

    pid = 0

    def stop(self) -> None:
        """Nothing runs."""


def workers(id: str, size: int) -> Workers:
    """A plan at once, and an update of so many bytes, other ones for each device and round."""

    def find_plan(request: Request) -> Planned:
        return Planned(request, PLAN, FACTS)

    def train(job: Job, folder: Path, post: Callable[[Progress | Ended], None]) -> Written:
        write_job(folder, job)
        if job.train:
            seed = hashlib.sha256(f"{id}/{job.round}".encode()).digest()
            (folder / "payload.bin").write_bytes(hashlib.shake_256(seed).digest(size))
        result = Result(
            samples=1,
            evaluation={},
            losses=[],
            step_seconds=[],
            phases={},
            seconds={},
            measured_peak_bytes=0,
            payload_bytes=size if job.train else 0,
        )
        (folder / "result.json").write_bytes(msgspec.json.encode(result))
        post(Ended(Written.pid, 0, ""))
        return Written()

    return Workers(find_plan, train)


def main() -> int:
    """Take part until the fleet has finished, or for ever; the exit codes are those of `edge-runtime agent`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.noise")
    for name in ("broker", "fleet", "id", "state", "size"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--wait", type=float, default=120.0)
    parser.add_argument("--until-finished", action="store_true")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    state = Path(arguments.state).resolve()
    state.mkdir(parents=True, exist_ok=True)
    rows = state / "rows.jsonl"
    rows.write_text('{"text": "noise"}\n')
    options = DeviceOptions(
        broker=address.parse(arguments.broker),
        fleet=arguments.fleet,
        id=arguments.id,
        data=rows,
        state=state,
        budget_bytes=0,
        evaluation={},
        models=state,
        threads=1,
        device="cpu",
        gpu_cap_bytes=None,
        wait_s=arguments.wait,
        until_finished=arguments.until_finished,
    )
    try:
        agent.run(options, tell, workers(arguments.id, parse_size(arguments.size)))
    except EdgeError as error:
        sys.stderr.write(f"edge-runtime: {error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
