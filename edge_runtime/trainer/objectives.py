"""What a micro-batch learns and how it is scored: one objective for each kind of row.

    Text      cross-entropy of the labelled tokens
    Labels    cross-entropy of a head over labels, with a row's label or the fleet's probabilities

Each reads the model's last hidden states (rows, tokens, hidden).
"""

from typing import NamedTuple

import torch
from edge_kernels import linear_cross_entropy
from torch.nn.functional import cross_entropy, kl_div, rms_norm
from transformers import PreTrainedModel

from edge_runtime.adapters.attach import Attached
from edge_runtime.planning.predict import LOSS_CHUNK_BYTES
from edge_runtime.trainer.data import IGNORED, Example
from edge_runtime.trainer.divergence import divergence
from edge_runtime.trainer.vocabulary import LanguageHead, language_head, sweep


class Output(NamedTuple):
    """A micro-batch's loss, and the values it was computed from."""

    loss: torch.Tensor  # mean over what counts
    values: torch.Tensor  # hidden states (rows, tokens, hidden), or logits (rows, labels)
    counted: torch.Tensor  # mask over the tokens or rows that count


class Tally(NamedTuple):
    """A micro-batch's part of a score."""

    loss: float  # sum over what counts
    counted: int  # labelled tokens, or rows with a known label
    exact: int  # rows answered exactly


class Text(NamedTuple):
    """Labelled tokens, each predicted from the tokens before it."""

    head: LanguageHead
    chunk_bytes: int  # float32 logits that exist at once

    def output(self, rows: list[Example], hidden: torch.Tensor, labels: torch.Tensor) -> Output:
        """The loss over labels (rows, tokens)."""
        hidden, labels = hidden[:, :-1], labels[:, 1:]
        loss = linear_cross_entropy(hidden, self.head.weight, labels, self.head.softcap, self.chunk_bytes)
        return Output(loss, hidden, labels != IGNORED)

    def divergence(self, before: torch.Tensor, output: Output) -> torch.Tensor:
        """The mean KL of the output from the counted values before (tokens, hidden)."""
        return divergence(before, output.values[output.counted], self.head, self.chunk_bytes)

    def tally(self, rows: list[Example], hidden: torch.Tensor, labels: torch.Tensor) -> Tally:
        """A row is exact if each labelled token is the likeliest after the true tokens before it."""
        hidden, labels = hidden[:, :-1], labels[:, 1:]
        counted = labels != IGNORED
        scores = sweep(hidden[counted], self.head, labels[counted])
        hits = torch.ones_like(counted)
        hits[counted] = scores.likely == labels[counted]
        loss = float((scores.log_sum - scores.target).sum())
        return Tally(loss, int(counted.sum()), int(hits.all(1).sum()))


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
        return Tally(loss, int(known.sum()), int((logits.argmax(-1) == answers).sum()))

    def _logits(self, rows: list[Example], hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(rows, labels), and the rows' answers (rows,)."""
        logits = self.adapter.logits(label_states(rows, hidden))
        return logits, torch.tensor([row.answer for row in rows], device=logits.device)


class Objectives(NamedTuple):
    """The objectives of one model with its adapter."""

    text: Text
    labels: Labels
    distilled: Labels

    def of(self, rows: list[Example], public: bool = False) -> Text | Labels:
        """The objective of rows of one kind; public: of public texts, which the fleet answered."""
        if not rows[0].headed:
            return self.text  # a completion by the fleet is text like any other
        return self.distilled if public else self.labels


def objectives(
    model: PreTrainedModel,
    adapter: Attached,
    chunk_bytes: int = LOSS_CHUNK_BYTES,
    targets: torch.Tensor | None = None,
) -> Objectives:
    """The objectives of a model.

    Args:
        chunk_bytes: float32 logits that exist at once.
        targets: (texts, labels), the fleet's probabilities, if it has any.
    """
    text = Text(language_head(model), chunk_bytes)
    return Objectives(text, Labels(adapter), Labels(adapter, targets))


def label_states(rows: list[Example], hidden: torch.Tensor) -> torch.Tensor:
    """The input of a head over labels: each row's last token, (rows, hidden) in float32.

    It is scaled to a root mean square of 1: models differ in that by a factor of five, and they
    share a learning rate.
    """
    last = torch.tensor([len(row.ids) - 1 for row in rows], device=hidden.device)
    state = hidden[torch.arange(len(rows), device=hidden.device), last].float()
    return rms_norm(state, (state.shape[-1],))


def hidden_states(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """(rows, tokens) to the last hidden states (rows, tokens, hidden), before the head."""
    hidden: torch.Tensor = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    return hidden
