"""Live progress of the demo: a table on a terminal, elsewhere one line for each change of phase."""

import msgspec
from rich.console import Console
from rich.live import Live as RichLive
from rich.table import Table
from rich.text import Text

from edge_runtime.agent.options import DeviceEvent
from edge_runtime.aggregator import node

# Phases of the node that stay above the table.
LASTING = ("merged", "extended", "failed", "refused")


class Live:
    """Shows events as they come; a context manager."""

    def __init__(self, budgets: dict[str, int], rounds: int) -> None:
        self._console = Console()
        self._rounds = rounds
        self._round = "starting"
        self._devices = {
            name: DeviceEvent(name, 0, "starting", budget_bytes=size) for name, size in budgets.items()
        }
        self._live = RichLive(self._table(), console=self._console, auto_refresh=False, transient=True)

    def __enter__(self) -> "Live":
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._live.stop()

    def show(self, event: DeviceEvent | node.NodeEvent) -> None:
        """Show one event of a device or of the node."""
        if isinstance(event, node.NodeEvent):
            self._show_node(event)
        else:
            self._show_device(event)
        if self._console.is_terminal:
            self._live.update(self._table(), refresh=True)

    def _show_node(self, event: node.NodeEvent) -> None:
        if event.phase == "presence":
            return
        self._round = f"round {event.round} of {self._rounds}: {event.phase} {event.text}".rstrip()
        if event.phase in LASTING or not self._console.is_terminal:
            self._console.print(f"node     {self._round}", highlight=False, markup=False)

    def _show_device(self, event: DeviceEvent) -> None:
        before = self._devices[event.device]
        # Most phases report neither memory nor loss: the last values stay on display.
        latest = msgspec.structs.replace(
            event,
            memory_bytes=event.memory_bytes or before.memory_bytes,
            loss=before.loss if event.loss is None else event.loss,
        )
        self._devices[event.device] = latest
        if not self._console.is_terminal and (event.phase != before.phase or event.step == event.steps):
            self._console.print(_line(latest), highlight=False, markup=False)

    def _table(self) -> Table:
        table = Table(title=Text(self._round), title_justify="left", box=None, padding=(0, 2, 0, 0))
        for column in ("device", "round", "phase", "step", "loss", "memory / budget"):
            table.add_column(column)
        for event in self._devices.values():
            table.add_row(*map(Text, _cells(event)))
        return table


def _cells(event: DeviceEvent) -> tuple[str, ...]:
    step = f"{event.step}/{event.steps}" if event.steps else ""
    loss = f"{event.loss:.3f}" if event.loss is not None else ""
    memory = f"{event.memory_bytes >> 20} / {event.budget_bytes >> 20} MiB"
    return (event.device, str(event.round), event.phase, step, loss, memory)


def _line(event: DeviceEvent) -> str:
    device, round_, phase, step, loss, memory = _cells(event)
    words = [f"{device:8} round {round_}: {phase}", step, f"loss {loss}" if loss else "", memory, event.text]
    return "  ".join(word for word in words if word)
