"""Live progress of the demo: a table on a terminal, elsewhere one line for each change of phase."""

import msgspec
from rich.console import Console
from rich.live import Live as RichLive
from rich.table import Table
from rich.text import Text

from edge_runtime.agent.options import DeviceEvent
from edge_runtime.aggregator.node import NodeEvent

# Phases of the node that stay above the table.
LASTING = ("merged", "extended", "failed", "refused")


class Live:
    """Shows events as they come, while its `display` is entered."""

    def __init__(self, budgets: dict[str, int], rounds: int) -> None:
        self._console = Console()
        self._rounds = rounds
        self._round = "starting"
        self._devices = {
            name: DeviceEvent(name, 0, "starting", budget_bytes=size) for name, size in budgets.items()
        }
        # shows nothing where there is no terminal
        self.display = RichLive(
            get_renderable=self._table, console=self._console, auto_refresh=False, transient=True
        )

    def show(self, event: DeviceEvent | NodeEvent) -> None:
        """Show one event of a device or of the node."""
        line = ""
        if isinstance(event, DeviceEvent):
            before = self._devices[event.device]
            # Most phases report neither memory nor loss: the last values stay on display.
            latest = msgspec.structs.replace(
                event,
                memory_bytes=event.memory_bytes or before.memory_bytes,
                loss=before.loss if event.loss is None else event.loss,
            )
            self._devices[event.device] = latest
            if not self._console.is_interactive and (
                event.phase != before.phase or event.step == event.steps
            ):
                device, round_, phase, step, loss, memory = _cells(latest)
                words = (step, f"loss {loss}" if loss else "", memory, event.text)
                line = "  ".join([f"{device:8} round {round_}: {phase}", *filter(None, words)])
        elif event.phase != "presence":
            self._round = f"round {event.round} of {self._rounds}: {event.phase} {event.text}".rstrip()
            if event.phase in LASTING or not self._console.is_interactive:
                line = f"node     {self._round}"
        if line:
            self._console.print(line, highlight=False, markup=False)
        self.display.refresh()

    def _table(self) -> Table:
        columns = ("device", "round", "phase", "step", "loss", "memory / budget")
        table = Table(*columns, title=Text(self._round), title_justify="left", box=None, padding=(0, 2, 0, 0))
        for event in self._devices.values():
            table.add_row(*map(Text, _cells(event)))
        return table


def _cells(event: DeviceEvent) -> tuple[str, ...]:
    step = f"{event.step}/{event.steps}" if event.steps else ""
    loss = f"{event.loss:.3f}" if event.loss is not None else ""
    memory = f"{event.memory_bytes >> 20} / {event.budget_bytes >> 20} MiB"
    return (event.device, str(event.round), event.phase, step, loss, memory)
