"""Scores a model on held-out rows: loss over completion tokens or a head's labels, and exact match.

A row is exact when every completion token is the most likely one given the true tokens before it. Greedy decoding writes
the same completion exactly then, so one forward pass replaces generation. Of a head's rows those are exact whose label is the
most likely one; a label that the head lacks counts as missed, and has no loss.
"""

import math
from typing import NamedTuple

import torch
from edge_kernels import Packed, expand
from edge_kernels.quant import GROUP
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from edge_runtime.adapters.attach import Adapter
from edge_runtime.protocol.report import Score
from edge_runtime.trainer.data import IGNORED, Example, batches
from edge_runtime.trainer.meter import release
from edge_runtime.trainer.step import head, hidden_states, label_states, pad

CHUNK_BYTES = 16 << 20  # of float32 logits, or of the expanded head where that is more


@torch.no_grad()
def evaluate(model: PreTrainedModel, adapter: Adapter, examples: list[Example], micro_rows: int) -> Score:
    """Score the rows, micro_rows at a time; the model is in evaluation mode."""
    weight, softcap = head(model)
    loss, counted, exact = 0.0, 0, 0
    for batch in batches(examples, micro_rows):
        ids, labels = pad(batch, weight.device)
        hidden = hidden_states(model, ids)
        if batch[0].answer is not None:
            logits = adapter.logits(label_states(batch, hidden))
            answers = torch.tensor([row.answer for row in batch], device=logits.device)
            known = answers != IGNORED
            loss += float(cross_entropy(logits[known], answers[known], reduction="sum"))
            counted += int(known.sum())
            exact += int((logits.argmax(-1) == answers).sum())
        else:
            hidden, labels = hidden[:, :-1], labels[:, 1:]
            kept = labels != IGNORED
            hits = torch.ones_like(kept)
            batch_loss, hits[kept] = _score(hidden[kept], weight, labels[kept], softcap)
            loss += batch_loss
            counted += int(kept.sum())
            exact += int(hits.all(1).sum())
        release()
    mean = loss / max(counted, 1)
    return Score(mean if math.isfinite(mean) else None, exact / max(len(examples), 1), len(examples))


@torch.no_grad()
def states(model: PreTrainedModel, examples: list[Example], micro_rows: int) -> torch.Tensor:
    """What a head reads of each text: (texts, hidden) in float32."""
    weight, _ = head(model)
    found = torch.empty(len(examples), model.config.get_text_config().hidden_size, device=weight.device)
    numbered = [example._replace(answer=number) for number, example in enumerate(examples)]
    for batch in batches(numbered, micro_rows):
        ids, _ = pad(batch, weight.device)
        found[[row.answer or 0 for row in batch]] = label_states(batch, hidden_states(model, ids))
        release()
    return found


def likeness(own: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
    """How much texts are like a device's own rows (texts,), at most 1: the root of the share of own rows whose nearest other one
    is no nearer than the text's nearest, by cosine.

    Args:
        own, texts: (rows, hidden) and (texts, hidden), of equal length each.

    Source: Vovk et al. 2005, Algorithmic Learning in a Random World (conformal p-values), with the nearest neighbour's distance.
    """
    among = (own @ own.T).fill_diagonal_(-torch.inf).amax(1)
    nearest = (texts @ own.T).amax(1)
    return (((among[None] <= nearest[:, None]).sum(1) + 1) / (len(own) + 1)).sqrt()


class Swept(NamedTuple):
    """Of the logits that each hidden state has over the vocabulary, (tokens,) each: the logarithm of the sum of their
    exponentials, the highest, whose it is, and that of a wanted token."""

    log_sum: torch.Tensor
    best: torch.Tensor
    likely: torch.Tensor
    wanted: torch.Tensor


def _score(
    hidden: torch.Tensor, weight: torch.Tensor | Packed, targets: torch.Tensor, softcap: float | None
) -> tuple[float, torch.Tensor]:
    """Summed loss, and whether the most likely token is the target, for each of (tokens, hidden)."""
    swept = sweep(hidden, weight, softcap, targets)
    return float((swept.log_sum - swept.wanted).sum()), swept.likely == targets


@torch.no_grad()
def sweep(
    hidden: torch.Tensor,
    weight: torch.Tensor | Packed,
    softcap: float | None,
    targets: torch.Tensor | None = None,
) -> Swept:
    """Go once through the vocabulary, of whose logits a chunk exists at a time.

    Args:
        hidden: (tokens, hidden). weight: of the head, (vocabulary, hidden). softcap: the bound of its logits, if it has one.
        targets: the wanted tokens (tokens,); None: the first of the vocabulary.
    """
    vocabulary = weight.shape[0]
    step = max(CHUNK_BYTES // (4 * max(hidden.shape)) // GROUP, 1) * GROUP
    log_sum, wanted, best = (torch.full((len(hidden),), -torch.inf, device=hidden.device) for _ in range(3))
    likely = torch.zeros(len(hidden), dtype=torch.long, device=hidden.device)
    targets = likely if targets is None else targets
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
    return Swept(log_sum, best, likely, wanted)
