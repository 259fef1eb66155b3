"""A plan: which model a device trains, in which format, and the peak memory that is predicted for it."""

import msgspec

from edge_runtime.settings import Boundaries, Weights


class Plan(msgspec.Struct, frozen=True):
    """depth: layers kept. rows: micro-batch. tokens: longest sequence. boundaries: how each block's input is kept for
    backward. streamed: the blocks' packed matrices stay in files. terms: predicted bytes, by what takes them."""

    source: str
    model_class: str
    depth: int
    layers: int
    weights: Weights
    rank: int
    rows: int
    tokens: int
    terms: dict[str, int]
    boundaries: Boundaries = "input"
    streamed: bool = False

    @property
    def predicted_peak_bytes(self) -> int:
        """The sum of the terms."""
        return sum(self.terms.values())
