"""The tables of fleet.toml, each a struct; the package's docstring lists them."""

from typing import Annotated, Any, Literal, get_args

import msgspec

from edge_runtime.settings.bounds import SECONDS, Bound, Count, Factor, PathText, Positive

Role = Literal["q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down", "fc1", "fc2"]
Weights = Literal["float32", "bfloat16", "q8_0", "q4_1", "q4_0", "nf4"]
Boundaries = Literal["input", "int8"]  # form in which each block's input is kept for backward
Backend = Literal["torch", "onnx"]  # what a server computes with
MOST_TOKENS = 1 << 16  # of all completions together: as JSON they are smaller than a payload may be
FINE_STEP = 2**-5  # as [codec] step; seven bits a value, for what no remainder follows
PACKED = ("q8_0", "q4_1", "q4_0", "nf4")  # block formats of edge_kernels.quant


class Model(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An entry of the catalog."""

    # A folder, a GGUF file or a hub id; relative paths start from the device's models folder.
    source: PathText
    # Layers to keep; None: all.
    depth: Annotated[int | None, Bound(lambda depth: depth >= 1, "1 or more layers")] = None
    # Formats that a device may hold the frozen base in, most precise first.
    weights: Annotated[tuple[Weights, ...], Bound(len, "at least one format")] = ("float32", "bfloat16")


class MethodChoice(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A federated method."""

    name: str = "fedit"  # as in edge_runtime.methods
    settings: dict[str, Any] = {}  # the table's other keys, which the method's file describes
    # The version moves so many times the mean delta (aggregator/server_step.py); a longer step ends in infinity.
    server_step: Annotated[float, Bound(lambda step: 0 < step <= 10, "a number above 0, and 10 at most")] = (
        1.0
    )
    # The share of its last step that a version takes again.
    momentum: Annotated[float, Bound(lambda share: 0 <= share < 1, "0 or more, and below 1")] = 0.0


class Head(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A linear head over the labels; without it, rows of text and label are learned as text."""

    # who shares each label's row; the whole fleet does in the models' common frame (methods/frames.py)
    shared: Literal["fleet", "class", "private"] = "class"
    # rows that begin in closed form (trainer/head.py); None: all of a fleet's head, else unseen labels'
    start: Literal["unseen", "all", "zero"] | None = None


class Public(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Public texts, by which devices of different models come to understand each other."""

    file: PathText  # on the node, a .jsonl file (aggregator/opening.py)
    # in use: the file's first; 0: all that it has
    texts: Annotated[int, Bound(lambda texts: 0 <= texts <= 1 << 20, f"0 to {1 << 20}")] = 0
    # of the models' activations; rotated: at random, for comparison, with or without that of the head
    frame: Literal["common", "rotated", "rotated branches"] = "common"


class Codistill(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Devices of all models learn from each other's predictions on the public texts.

    With a [head] a prediction is a label, without it a completion. rows and weight are those of the
    last round; they grow up to it, but for labels that a device has no rows of
    (methods/codistill.py).
    """

    rows: Positive = 16  # public texts in a step, beside the device's rows
    weight: Factor = 2.0  # of the public texts' mean loss, beside the mean loss of the device's rows
    # of label targets; below 1 they are surer
    temperature: Annotated[float, Bound(lambda value: 0.05 <= value <= 20, "0.05 to 20")] = 0.5
    tokens: int = 32  # of a completion with its end; longer completions do not count
    across: bool = True  # between models; false: among devices of one model, for comparison
    # of label predictions; "mean" is FedMD's, "oracle" the texts' true labels: controls of studies
    votes: Literal["weighted", "mean", "oracle"] = "weighted"


class Codec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How coarsely values are rounded; the sender adds the remainder to what it sends next."""

    # of a tensor's root mean square; None: the number of rounds decides (Method.codec_step)
    step: Annotated[float | None, Bound(lambda step: 0.01 <= step <= 4, "0.01 to 4")] = None


class Adapter(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The adapter on each linear layer of the roles: y = W x + (alpha / rank) B C A x."""

    rank: Annotated[int, Bound(lambda rank: 1 <= rank <= 256, "1 to 256")] = 16
    # Falling ranks for devices that `rank` does not fit; only for methods that merge unequal ranks
    # or exchange nothing.
    lower: tuple[int, ...] = ()
    alpha: Factor = 32.0
    roles: Annotated[tuple[Role, ...], Bound(len, "at least one role")] = get_args(Role)

    def at(self, rank: int) -> "Adapter":
        """The adapter at another rank; alpha / rank stays the fleet's."""
        return msgspec.structs.replace(self, rank=rank, alpha=self.alpha * rank / self.rank)


class Training(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A round of local training."""

    steps: Positive = 20  # optimiser steps a round
    rows_a_step: Positive = 16  # rows whose gradients make a step
    # The peak; it falls along a cosine to a tenth over all rounds.
    learning_rate: Annotated[float, Bound(lambda rate: 0 < rate < 1, "between 0 and 1")] = 1e-3
    warmup_steps: Count = 4  # steps in which the learning rate rises to the peak
    weight_decay: Annotated[float, Bound(lambda decay: 0 <= decay < 1, "0 or more, and below 1")] = 0.0
    clip_norm: Factor = 1.0
    max_tokens: Annotated[int, Bound(lambda value: value >= 8, "8 or more")] = 512  # longer rows are cut
    shorter: tuple[int, ...] = ()  # falling lengths for devices that max_tokens does not fit
    # Slices whose loss a step takes: the device's alone, or in turn also each smaller slice that
    # the catalog has of the checkpoint, so that the delta fits smaller devices too
    # (models/slices.py).
    slices: Literal["own", "nested"] = "nested"
    timeout_s: Annotated[float, SECONDS] = 3600.0
    # Predicted seconds that a step may take; None: no limit.
    step_deadline_s: Annotated[float | None, SECONDS] = None
