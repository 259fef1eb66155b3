"""What rows teach and how they are scored: one objective for each kind of row.

    Text      cross-entropy of the labelled tokens
    Labels    cross-entropy of a head over labels, with a row's label or the fleet's probabilities

Each reads the model's last hidden states (rows, tokens, hidden) of a micro-batch.
"""

import math
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from edge_kernels import LanguageHead, linear_cross_entropy
from torch.nn.functional import cross_entropy, kl_div, rms_norm
from transformers import PreTrainedModel

from edge_runtime.adapters.attach import Attached, tell_prompts
from edge_runtime.planning.predict import LENGTH_STEP, LOSS_CHUNK_BYTES
from edge_runtime.protocol.report import Score
from edge_runtime.trainer.examples import IGNORED, Example, Indexed, groups
from edge_runtime.trainer.heap import release
from edge_runtime.trainer.vocabulary import Divergence, language_head, sweep

# A micro-batch's part of a score: the loss summed over what counts, the labelled tokens or rows of a
# known label that count, and which rows (rows,) are answered exactly.
Tally: TypeAlias = tuple[float, int, torch.Tensor]


class Output(NamedTuple):
    """A micro-batch's loss, and the values it was computed from."""

    loss: torch.Tensor  # mean over what counts
    values: torch.Tensor  # hidden states (rows, tokens, hidden), or logits (rows, labels)
    counted: torch.Tensor  # mask over the tokens or rows that count


class Text(NamedTuple):
    """Labelled tokens, each predicted from the tokens before it."""

    head: LanguageHead
    chunk_bytes: int = LOSS_CHUNK_BYTES  # float32 logits that exist at once

    def output(self, rows: list[Example], hidden: torch.Tensor, labels: torch.Tensor) -> Output:
        """The loss over labels (rows, tokens)."""
        hidden, labels = hidden[:, :-1], labels[:, 1:]
        loss = linear_cross_entropy(hidden, self.head, labels, self.chunk_bytes)
        return Output(loss, hidden, labels != IGNORED)

    def divergence(self, before: torch.Tensor, output: Output) -> torch.Tensor:
        """The mean KL of the output from the counted values before (tokens, hidden)."""
        now = output.values[output.counted]
        mean: torch.Tensor = Divergence.apply(before, now, self.head, self.chunk_bytes)
        return mean

    def tally(self, rows: list[Example], hidden: torch.Tensor, labels: torch.Tensor) -> Tally:
        """A row is exact if each labelled token is the likeliest after the true tokens before it.

        Greedy decoding would write the same completion then, so one forward pass replaces it.
        """
        hidden, labels = hidden[:, :-1], labels[:, 1:]
        counted = labels != IGNORED
        scores = sweep(hidden[counted], self.head, labels[counted])
        hits = torch.ones_like(counted)
        hits[counted] = scores.likely == labels[counted]
        loss = float((scores.log_sum - scores.target).sum())
        return loss, int(counted.sum()), hits.all(1)


class Labels(NamedTuple):
    """Rows whose label a linear head predicts."""

    adapter: Attached
    targets: torch.Tensor | None = None  # (texts, labels), the fleet's; None: the rows' own labels

    def output(self, rows: list[Example], hidden: torch.Tensor, _: torch.Tensor) -> Output:
        """The loss over the rows whose label the head has, or against the fleet's probabilities."""
        logits, answers = self._logits(rows, hidden)
        truth = answers if self.targets is None else self.targets[answers]
        return Output(cross_entropy(logits, truth, ignore_index=IGNORED), logits, answers != IGNORED)

    def divergence(self, before: torch.Tensor, output: Output) -> torch.Tensor:
        """The mean KL of the output from the counted logits before (rows, labels)."""
        logs = output.values[output.counted].log_softmax(-1), before.log_softmax(-1)
        return kl_div(*logs, log_target=True, reduction="batchmean")

    def tally(self, rows: list[Example], hidden: torch.Tensor, _: torch.Tensor) -> Tally:
        """A row is exact if its label is the likeliest; a label that the head lacks has no loss."""
        logits, answers = self._logits(rows, hidden)
        known = answers != IGNORED
        loss = float(cross_entropy(logits[known], answers[known], reduction="sum"))
        return loss, int(known.sum()), logits.argmax(-1) == answers

    def _logits(self, rows: list[Example], hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(rows, labels), and the rows' answers (rows,)."""
        logits = self.adapter.logits(label_states(rows, hidden))
        return logits, torch.tensor([row.answer for row in rows], device=logits.device)


@torch.no_grad()
def evaluate(model: PreTrainedModel, adapter: Attached, examples: Indexed, micro_rows: int) -> Score:
    """Score the rows, micro_rows at a time; the model is in evaluation mode.

    The loss is the mean over labelled tokens and over rows of a head whose label it has.
    """
    text, labels = Text(language_head(model)), Labels(adapter)
    loss, counted, hits = 0.0, 0, np.zeros(len(examples), bool)
    for numbers in groups(examples, micro_rows):
        rows = [examples[number] for number in numbers]
        objective = labels if rows[0].headed else text
        tally = objective.tally(rows, *hidden_states(model, rows))
        loss, counted, hits[numbers] = loss + tally[0], counted + tally[1], tally[2].cpu()
        release()
    mean = loss / max(counted, 1)
    return Score(
        loss=mean if math.isfinite(mean) else None,
        accuracy=float(hits.mean()),
        rows=len(examples),
        hits=np.packbits(hits).tobytes(),
    )


def label_states(rows: list[Example], hidden: torch.Tensor) -> torch.Tensor:
    """The input of a head over labels: each row's last token, (rows, hidden) in float32.

    It is scaled to a root mean square of 1: models differ in that by a factor of five, and they
    share a learning rate.
    """
    last = torch.tensor([len(row.ids) - 1 for row in rows], device=hidden.device)
    state = hidden[torch.arange(len(rows), device=hidden.device), last].float()
    return rms_norm(state, (state.shape[-1],))


def hidden_states(model: PreTrainedModel, rows: list[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    """The last hidden states (rows, tokens, hidden), before the head, and labels (rows, tokens)."""
    ids, labels = pad(rows, language_head(model).weight.device)
    tell_prompts(model, [row.prompt for row in rows], ids.shape[1])
    return model.base_model(input_ids=ids, use_cache=False).last_hidden_state, labels


def pad(rows: list[Example], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and labels (rows, tokens), padded on the right, where causal attention never looks."""
    longest = padded_length(max(len(row.ids) for row in rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    labels = torch.full((len(rows), longest), IGNORED)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)] = torch.tensor(row.ids)
        labels[i, : len(row.labels)] = torch.tensor(row.labels)
    return ids.to(device), labels.to(device)


def padded_length(tokens: int) -> int:
    """The next multiple of LENGTH_STEP: a CPU's matrix library builds and keeps kernels for each shape."""
    return -(-tokens // LENGTH_STEP) * LENGTH_STEP
