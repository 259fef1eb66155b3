"""The result of a run of the demo, read from its node's store."""

from pathlib import Path

import msgspec

from edge_runtime.aggregator.store import NodeStore
from edge_runtime.errors import EdgeError
from edge_runtime.protocol.report import Report

MIB = 1 << 20
# Reports number the held-out files in the order in which --eval named them to the agent.
OWN_ROWS, OTHERS_ROWS = "held_out_1", "held_out_2"


class DeviceOutcome(msgspec.Struct):
    """One device on held-out rows: before is version 0, after the last round's version."""

    id: str
    budget_bytes: int
    model: str  # model class
    depth: int  # layers of its slice
    weights: str  # format of the frozen weights
    predicted_peak_bytes: int
    measured_peak_bytes: int  # of all its trainer processes
    bytes_up: int
    bytes_down: int
    loss_before: float | None  # rows of the device's own domain; None: not finite
    loss_after: float | None
    accuracy_before: float  # share of exact matches
    accuracy_after: float
    others_loss_before: float | None  # rows of the other devices' domains
    others_loss_after: float | None
    others_accuracy_before: float
    others_accuracy_after: float
    seconds: dict[str, float]  # by phase, over all rounds


class DemoOutcome(msgspec.Struct):
    """The demo's result."""

    method: str
    rounds: int
    rounds_closed: int
    seconds: float
    devices: list[DeviceOutcome]
    faults: list[str]  # sentences that say why the run is not good; empty for a good one


def read(method: str, rounds: int, budgets: dict[str, int], folder: Path, seconds: float) -> DemoOutcome:
    """Read the outcome from `folder`, the demo's.

    Raises:
        EdgeError: a device has sent too few reports.
    """
    store = NodeStore(folder / "node" / "node.db")
    rows = store.connection.execute("SELECT body FROM reports ORDER BY device, round, state DESC")
    reports = [msgspec.json.decode(body, type=Report) for (body,) in rows]
    closed = store.open_round() - 1
    store.connection.close()
    devices = []
    faults = [f"{closed} of {rounds} rounds closed"] if closed != rounds else []
    for name, budget_bytes in budgets.items():
        device = _device(name, budget_bytes, [report for report in reports if report.device == name])
        devices.append(device)
        if device.measured_peak_bytes > budget_bytes:
            faults.append(
                f"{name} went {(device.measured_peak_bytes - budget_bytes) / MIB:.0f} MiB over its budget"
            )
        before, after = device.loss_before, device.loss_after
        if before is None or after is None or not after < before:
            faults.append(f"the held-out loss of {name} did not fall")
    return DemoOutcome(method, rounds, closed, seconds, devices, faults)


def _device(name: str, budget_bytes: int, reports: list[Report]) -> DeviceOutcome:
    results = [report.result for report in reports if report.result is not None]
    plans = [report.plan for report in reports if report.plan is not None]
    if len(results) < 2 or not plans:
        raise EdgeError(
            f"{name} sent {len(results)} reports with results; at least the first round's and the last are needed"
        )
    plan, before, after = plans[-1], results[0].evaluation, results[-1].evaluation
    # "joined" repeats a later report's bytes
    exchanged = [report for report in reports if report.state != "joined"]
    return DeviceOutcome(
        id=name,
        budget_bytes=budget_bytes,
        model=plan.model_class,
        depth=plan.depth,
        weights=plan.weights,
        predicted_peak_bytes=plan.predicted_peak_bytes,
        measured_peak_bytes=max(result.measured_peak_bytes for result in results),
        bytes_up=sum(report.bytes_up for report in exchanged),
        bytes_down=sum(report.bytes_down for report in exchanged),
        loss_before=before[OWN_ROWS].loss,
        loss_after=after[OWN_ROWS].loss,
        accuracy_before=before[OWN_ROWS].accuracy,
        accuracy_after=after[OWN_ROWS].accuracy,
        others_loss_before=before[OTHERS_ROWS].loss,
        others_loss_after=after[OTHERS_ROWS].loss,
        others_accuracy_before=before[OTHERS_ROWS].accuracy,
        others_accuracy_after=after[OTHERS_ROWS].accuracy,
        seconds={
            phase: round(sum(result.seconds.get(phase, 0.0) for result in results), 1)
            for phase in sorted({phase for result in results for phase in result.seconds})
        },
    )
