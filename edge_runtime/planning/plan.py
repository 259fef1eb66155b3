"""A plan: which model a device trains, in which format, and the peak memory that is predicted for it."""

import msgspec

from edge_runtime.settings import Weights


class Plan(msgspec.Struct, frozen=True):
    """depth: layers kept. rows: micro-batch. tokens: longest sequence. terms: predicted bytes, by what takes them."""

    source: str
    model_class: str
    depth: int
    layers: int
    weights: Weights
    rank: int
    rows: int
    tokens: int
    terms: dict[str, int]

    @property
    def predicted_peak_bytes(self) -> int:
        """The sum of the terms."""
        return sum(self.terms.values())
