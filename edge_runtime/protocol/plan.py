"""A plan: the model that a device trains, its format, and the predicted peak memory."""

from pathlib import Path

import msgspec

from edge_runtime.settings import Backend, Boundaries, Weights

SERVERS: dict[Backend, str] = {"torch": "torch", "onnx": "ONNX Runtime"}


class Plan(msgspec.Struct, frozen=True):
    """A model, how a device trains it, and what is predicted for it."""

    source: str  # as the catalog names it
    model_class: str
    depth: int  # layers that are kept
    layers: int  # of the whole model
    weights: Weights
    rank: int
    rows: int  # of a micro-batch
    tokens: int  # of the longest sequence
    terms: dict[str, int]  # predicted bytes by term (planning/predict.py); their sum is the peak
    step_seconds: float  # predicted, of an optimiser step on this device
    boundaries: Boundaries = "input"
    mlp_tokens: int | None = None  # tokens that go through an MLP at once; None: all
    streamed: bool = False  # packed matrices of the blocks stay in files
    serving_bytes: int = 0  # predicted, of a server beside the trainer
    server: Backend | None = None  # what that server computes with; None: there is none
    kept_blocks: int = 0  # last blocks that keep their activations: backward does not run them again

    @property
    def predicted_peak_bytes(self) -> int:
        """Of the trainer: the sum of the terms."""
        return sum(self.terms.values())

    @property
    def needed_bytes(self) -> int:
        """What has to fit the budget: the trainer's peak and the server's."""
        return self.predicted_peak_bytes + self.serving_bytes

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
        boundaries = ", boundaries in 8 bits" if self.boundaries == "int8" else ""
        tiled = f", MLPs in tiles of {self.mlp_tokens}" if self.tiled else ""
        streamed = ", weights streamed" if self.streamed else ""
        blocks = "block runs" if self.kept_blocks == 1 else "blocks run"
        once = f", {self.kept_blocks} {blocks} once" if self.kept_blocks else ""
        served = f", served by {SERVERS[self.server]}" if self.server else ""
        batches = f"rank {self.rank}, micro-batches of {self.rows} x {self.tokens} tokens"
        return f"{batches}{boundaries}{tiled}{streamed}{once}{served}"
