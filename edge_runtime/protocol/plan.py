"""A plan: which model a device trains, in which format, and the peak memory that is predicted for it."""

from pathlib import Path

import msgspec

from edge_runtime.settings import Boundaries, Weights


class Plan(msgspec.Struct, frozen=True):
    """depth: layers kept. rows: micro-batch. tokens: longest sequence. boundaries: how each block's input is kept for
    backward. mlp_tokens: that go through an MLP at once, None: all. streamed: the blocks' packed matrices stay in files.
    kept_blocks: how many, the last ones, keep all that backward needs instead of their input, and do not run again.
    terms: predicted bytes, by what takes them. step_seconds: predicted, of an optimiser step on this device."""

    source: str
    model_class: str
    depth: int
    layers: int
    weights: Weights
    rank: int
    rows: int
    tokens: int
    terms: dict[str, int]
    step_seconds: float
    boundaries: Boundaries = "input"
    mlp_tokens: int | None = None
    streamed: bool = False
    kept_blocks: int = 0

    @property
    def predicted_peak_bytes(self) -> int:
        """The sum of the terms."""
        return sum(self.terms.values())

    @property
    def tiled(self) -> bool:
        """Whether an MLP takes a micro-batch in more than one piece."""
        return self.mlp_tokens is not None and self.mlp_tokens < self.rows * self.tokens

    @property
    def summary(self) -> str:
        """The model, its format and how it is trained, for people."""
        return f"{Path(self.source).name}, {self.depth} of {self.layers} layers, {self.weights}, {self.how}"

    @property
    def how(self) -> str:
        """How the model is trained, for people."""
        kept = ", boundaries in 8 bits" if self.boundaries == "int8" else ""
        tiled = f", MLPs in tiles of {self.mlp_tokens}" if self.tiled else ""
        streamed = ", weights streamed" if self.streamed else ""
        once = f", {self.kept_blocks} blocks run once" if self.kept_blocks else ""
        return f"rank {self.rank}, micro-batches of {self.rows} x {self.tokens} tokens{kept}{tiled}{streamed}{once}"
