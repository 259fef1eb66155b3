"""Options of the commands that answer with a model: which base, which adapter, how it is held."""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

import click
import edge_profiles

from edge_runtime.cli import options
from edge_runtime.errors import InputError
from edge_runtime.settings import Backend, Weights
from edge_runtime.state import NEWEST

if TYPE_CHECKING:
    from edge_runtime.adapters.learned import Learned
    from edge_runtime.models.facts import Facts
    from edge_runtime.trainer.job import Machine

Command = Callable[..., Any]


def typed(read: Callable[[], str]) -> str:
    """A text that somebody gave; raises InputError where its bytes are not UTF-8."""
    try:
        text = read()
        text.encode()  # a byte of another encoding may be in the text as half of a character
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        raise InputError(f"the text is not UTF-8: {error.reason}; give it as UTF-8") from error
    return text


class ServedBase(NamedTuple):
    """The values of the options below."""

    model: str | None
    adapter: Path | None
    state: Path | None
    models: Path
    weights: Weights
    device: str
    threads: int
    backend: Backend = "torch"  # of commands without the option

    def read(self) -> "Learned | None":
        """What was learned, of which the base is still to be found (`on_base`); None: the base alone.

        Raises:
            InputError: there is no model and no adapter, the adapter cannot be read, or the backend is
                not installed.
        """
        from edge_runtime.adapters import learned
        from edge_runtime.planning.processes import NOT_SERVING, installed

        folder = self.folder()
        if self.backend == "onnx" and not installed("onnx", "onnxruntime"):
            raise InputError(NOT_SERVING)
        if folder is None and self.model is None:
            raise InputError(
                "there is nothing to answer with: give --model, or an adapter with --adapter or --state"
            )
        return learned.read(folder) if folder is not None else None

    def on_base(self, read: "Learned | None", *, quiet: bool = False) -> tuple["Facts", "Learned | None"]:
        """The facts of the base, and what was learned on it.

        This takes seconds, and minutes for a new base. Standard error says so, unless quiet.

        Raises:
            InputError: the base cannot be read, or the adapter was learned on another.
        """
        from edge_runtime.adapters import learned
        from edge_runtime.planning import processes

        source = self.model or (read.source if read is not None else "")
        facts = (processes.prepared if quiet else options.facts_of)(source, self.models)
        return facts, learned.on(read, facts) if read is not None else None

    def folder(self) -> Path | None:
        """Of what was learned; None: the base alone. Raises InputError where it is not there."""
        if self.adapter is not None and self.state is not None:
            raise InputError("--adapter and --state both name an adapter: give one of them")
        if self.state is None:
            return self.adapter
        folder = self.state / NEWEST
        if not self.state.is_dir():
            raise InputError(f"there is no folder {self.state}; give the --state of an agent")
        if not folder.exists():
            raise InputError(
                f"{self.state} has no adapter yet: its agent keeps one from the first version on, but none with branches that "
                "depend on the token, which are no LoRA"
            )
        return folder

    def tell_loading(self, facts: "Facts") -> None:
        """Say on standard error that the model is loaded now, which may take minutes."""
        options.tell(f"loading {facts.model_class} in {self.weights} with {self.backend}")

    def imports(self) -> AbstractContextManager[None]:
        """While inside, the backend's packages are imported, and no more than are of use."""
        from edge_runtime.compat.lean_imports import lean_imports
        from edge_runtime.compat.without_torch import without_torch

        return lean_imports() if self.backend == "torch" else without_torch()

    def machine(self) -> "Machine":
        """What the process may use of this machine."""
        from edge_runtime.trainer.job import Machine

        device = "cpu" if (self.backend, self.device) == ("onnx", "auto") else self.device
        return Machine(self.threads, options.trainer_device(device, edge_profiles.probe()))


_OPTIONS = (
    click.option(
        "--model",
        metavar="SRC",
        help="A folder in Hugging Face's layout, a GGUF file or a hub id; default: the one that the adapter was "
        "learned on.",
    ),
    click.option(
        "--adapter",
        type=options.PATH,
        help="A folder that `edge-runtime export --to peft` wrote.",
    ),
    click.option("--state", type=options.PATH, help="An agent's --state, for the newest version in it."),
    options.models,
    click.option(
        "--weights",
        type=click.Choice(get_args(Weights)),
        default="bfloat16",
        show_default=True,
        help="Format of the base model's weights.",
    ),
    options.device,
    click.option(
        "--threads", type=click.IntRange(0), default=0, help="CPU threads; default: 0, which is all cores."
    ),
)

backend = click.option(
    "--backend",
    type=click.Choice(get_args(Backend)),
    default="torch",
    show_default=True,
    help="What computes; onnx, on the CPU, writes the model as a graph the first time.",
)


def base(command: Command) -> Command:
    """Add the options; the command gets `base`, their values."""

    @functools.wraps(command)
    def gathered(**values: Any) -> Any:
        given = {name: values.pop(name) for name in ServedBase._fields if name in values}
        return command(base=ServedBase(**given), **values)

    return functools.reduce(lambda inner, option: option(inner), reversed(_OPTIONS), gathered)
