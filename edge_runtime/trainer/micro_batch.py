"""Micro-batches: the rows of a step, cut up, weighted, and padded to tensors."""

from typing import NamedTuple

import torch

from edge_runtime.planning.predict import LENGTH_STEP
from edge_runtime.trainer.data import IGNORED, Example, batches


class MicroBatch(NamedTuple):
    """Rows of one kind that go through the model at once."""

    rows: list[Example]
    share: float  # of its mean loss in the step's loss
    public: bool  # public texts that the fleet answered, instead of the device's own rows


def cut(rows: list[Example], texts: list[Example], weight: float, micro_rows: int) -> list[MicroBatch]:
    """The micro-batches of a step.

    A kind of row, text or labels, counts by its share of the rows. Within a kind, text counts by
    labelled tokens and labels by rows, so that the loss does not depend on how the step is cut.

    Args:
        rows: the device's own.
        texts: public texts beside them.
        weight: of the texts' mean loss beside the rows' mean loss of 1.
        micro_rows: rows of a micro-batch at most.
    """
    micro_batches = []
    own_batches = list(batches(rows, micro_rows))
    for headed in (False, True):
        alike = [batch for batch in own_batches if batch[0].headed is headed]
        total = sum(map(_counted, alike))
        portion = sum(map(len, alike)) / len(rows)
        micro_batches += [
            MicroBatch(batch, portion * _counted(batch) / max(total, 1), False) for batch in alike
        ]
    for batch in batches(texts, micro_rows):
        micro_batches.append(MicroBatch(batch, weight * len(batch) / len(texts), True))
    return micro_batches


def _counted(batch: list[Example]) -> int:
    """Tokens or rows over which the micro-batch's loss is a mean."""
    return sum(row.counted for row in batch)


def pad(rows: list[Example], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and labels (rows, tokens), padded on the right, where causal attention never looks.

    The length is a multiple of LENGTH_STEP: on a CPU the matrix library builds and keeps kernels
    for each new shape.
    """
    longest = padded_length(max(len(row.ids) for row in rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    labels = torch.full((len(rows), longest), IGNORED)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)] = torch.tensor(row.ids)
        labels[i, : len(row.labels)] = torch.tensor(row.labels)
    return ids.to(device), labels.to(device)


def padded_length(tokens: int) -> int:
    """The next multiple of LENGTH_STEP."""
    return -(-tokens // LENGTH_STEP) * LENGTH_STEP
