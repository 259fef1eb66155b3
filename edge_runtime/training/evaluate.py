"""Scores a model on held-out rows: loss over completion tokens, and exact match.

A row is exact when every completion token is the most likely one given the true tokens before it. Greedy decoding writes
the same completion exactly then, so one forward pass replaces generation.
"""

import torch
from edge_kernels import Packed, expand
from edge_kernels.quant import GROUP
from transformers import PreTrainedModel

from edge_runtime.training.data import IGNORED, Example, batches
from edge_runtime.training.job import Score
from edge_runtime.training.meter import release
from edge_runtime.training.step import head, hidden_states, pad

CHUNK_BYTES = 16 << 20  # of float32 logits, or of the expanded head where that is more


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
    hidden: torch.Tensor, weight: torch.Tensor | Packed, targets: torch.Tensor, softcap: float | None
) -> tuple[float, torch.Tensor]:
    """Summed loss, and whether the most likely token is the target, for each of (tokens, hidden)."""
    vocabulary = weight.shape[0]
    step = max(CHUNK_BYTES // (4 * max(hidden.shape)) // GROUP, 1) * GROUP
    log_sum, wanted, best = (torch.full((len(hidden),), -torch.inf, device=hidden.device) for _ in range(3))
    likely = torch.zeros_like(targets)
    for first in range(0, vocabulary, step):
        rows = slice(first, min(first + step, vocabulary))
        matrix = expand(weight.rows(rows), hidden.dtype) if isinstance(weight, Packed) else weight[rows]
        logits = (hidden @ matrix.T).float()
        if softcap is not None:
            logits.div_(softcap).tanh_().mul_(softcap)
        torch.logaddexp(log_sum, logits.logsumexp(-1), out=log_sum)
        highest, place = logits.max(-1)
        likely = torch.where(highest > best, place + first, likely)
        best = torch.maximum(best, highest)
        here = (targets >= rows.start) & (targets < rows.stop)
        at = (targets - first).clamp(0, logits.shape[1] - 1)[:, None]
        wanted = torch.where(here, logits.gather(1, at)[:, 0], wanted)
    return float((log_sum - wanted).sum()), likely == targets
