"""Scores a model on held-out rows: mean loss, and the share of rows answered exactly.

A row of text is exact if every completion token is the likeliest given the true tokens before it.
Greedy decoding would write the same completion then, so one forward pass replaces generation.
"""

import math

import torch
from transformers import PreTrainedModel

from edge_runtime.adapters.attach import Attached
from edge_runtime.protocol.report import Score
from edge_runtime.trainer.data import Example, batches
from edge_runtime.trainer.meter import release
from edge_runtime.trainer.micro_batch import pad
from edge_runtime.trainer.objectives import hidden_states, objectives


@torch.no_grad()
def evaluate(model: PreTrainedModel, adapter: Attached, examples: list[Example], micro_rows: int) -> Score:
    """Score the rows, micro_rows at a time; the model is in evaluation mode.

    The loss is the mean over labelled tokens and over rows of a head whose label it has.
    """
    learned = objectives(model, adapter)
    device = learned.text.head.weight.device
    loss, counted, exact = 0.0, 0, 0
    for rows in batches(examples, micro_rows):
        ids, labels = pad(rows, device)
        tally = learned.of(rows).tally(rows, hidden_states(model, ids), labels)
        loss, counted, exact = loss + tally.loss, counted + tally.counted, exact + tally.exact
        release()
    mean = loss / max(counted, 1)
    return Score(mean if math.isfinite(mean) else None, exact / max(len(examples), 1), len(examples))
