"""Scores a model on held-out rows: loss over completion tokens, and exact match.

A row is exact when every completion token is the most likely one given the true tokens before it. Greedy decoding writes
the same completion exactly then, so one forward pass replaces generation.
"""

import torch
from transformers import PreTrainedModel

from edge_runtime.training.data import IGNORED, Example, batches
from edge_runtime.training.job import Score
from edge_runtime.training.meter import release
from edge_runtime.training.step import head, hidden_states, pad

CHUNK_BYTES = 32 << 20  # of float32 logits


@torch.no_grad()
def evaluate(model: PreTrainedModel, examples: list[Example], micro_rows: int) -> Score:
    """Score the rows, micro_rows at a time; the model is in evaluation mode."""
    weight, softcap = head(model)
    loss, tokens, exact = 0.0, 0, 0
    for batch in batches(examples, micro_rows):
        ids, labels = pad(batch, weight.device)
        hidden, labels = hidden_states(model, ids)[:, :-1], labels[:, 1:]
        kept = labels != IGNORED
        hits = torch.ones_like(kept)
        batch_loss, hits[kept] = _score(hidden[kept], weight, labels[kept], softcap)
        loss += batch_loss
        tokens += int(kept.sum())
        exact += int(hits.all(1).sum())
        release()
    return Score(loss / max(tokens, 1), exact / max(len(examples), 1), len(examples))


def _score(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, softcap: float | None
) -> tuple[float, torch.Tensor]:
    """Summed loss, and whether the most likely token is the target, for each of (tokens, hidden)."""
    step = max(CHUNK_BYTES // (4 * weight.shape[0]), 1)
    loss, hits = 0.0, []
    for first in range(0, len(targets), step):
        logits = (hidden[first : first + step] @ weight.T).float()
        if softcap is not None:
            logits.div_(softcap).tanh_().mul_(softcap)
        wanted = targets[first : first + step]
        loss += float(torch.nn.functional.cross_entropy(logits, wanted, reduction="sum"))
        hits.append(logits.argmax(-1) == wanted)
    return loss, torch.cat(hits) if hits else torch.ones(0, dtype=torch.bool)
