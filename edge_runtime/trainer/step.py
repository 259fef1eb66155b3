"""The optimiser steps of a round.

Memory is saved in four places. Only the inputs of blocks are kept; a block runs again in backward.
Head and loss run in chunks over the labelled tokens alone. A factor steps as soon as backward has
its gradient, so that no gradient outlives its layer. Rows go through the model in micro-batches.

Steps may take turns between depth slices, so that one adapter fits them all (models/slices.py), and
between leading ranks (methods/prelort.py).
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import chain, islice
from typing import NamedTuple

import torch
from edge_kernels import AdamW8bit, Kept, checkpoint_block
from transformers import PreTrainedModel

from edge_runtime.adapters.attach import AdapterLinear, Attached
from edge_runtime.errors import TrainerError
from edge_runtime.methods.interface import Pass
from edge_runtime.models.structure import blocks
from edge_runtime.planning.predict import LOSS_CHUNK_BYTES
from edge_runtime.settings import Boundaries, Training
from edge_runtime.trainer.examples import Example, Indexed, batches, epochs, order_of
from edge_runtime.trainer.heap import release
from edge_runtime.trainer.lesson import Distillation, drawn
from edge_runtime.trainer.objectives import Labels, Output, Text, hidden_states
from edge_runtime.trainer.vocabulary import language_head

SKIPPED_IN_A_ROW = 5  # steps without a finite loss, before the round is given up


class RoundSettings(NamedTuple):
    """How the steps of one round are made."""

    training: Training
    slices: Sequence[tuple[int, ...]]  # blocks of each depth slice; steps take the slices in turn
    # Leading ranks of the adapter; steps take them in turn, after a turn of the slices. None: all.
    ranks: Sequence[int | None] = (None,)
    round: int = 1  # counted from 1; with rounds it places the round on the learning-rate schedule
    rounds: int = 1
    seed: int = 0  # of the order of the rows
    passes: Sequence[Pass] = (Pass(),)  # of each step, one after another over the same rows
    loss_chunk_bytes: int = LOSS_CHUNK_BYTES  # float32 logits that exist at once


class MicroBatch(NamedTuple):
    """Rows of one kind that go through the model at once."""

    rows: list[Example]
    share: float  # of its mean loss in the step's loss
    public: bool  # public texts that the fleet answered, instead of the device's own rows


class Learner:
    """A model whose adapter trains for one round, a step a call."""

    def __init__(
        self,
        model: PreTrainedModel,
        adapter: Attached,
        examples: Indexed,
        settings: RoundSettings,
        distillation: Distillation | None = None,
    ) -> None:
        """distillation: public texts that join each step's rows."""
        training, order = settings.training, order_of(settings.seed, settings.round)
        self._model, self._adapter, self._settings = model, adapter, settings
        self._rows = epochs(examples, order)
        self._texts, self._text_count, self._text_weight = drawn(distillation, f"{order}/anchors")
        self._optimiser = AdamW8bit(
            adapter.trained(), weight_decay=training.weight_decay, clip_norm=training.clip_norm
        )
        self._text = Text(language_head(model), settings.loss_chunk_bytes)
        self._labels = Labels(adapter)
        self._distilled = Labels(adapter, None if distillation is None else distillation.targets)
        self._linears = [
            [module for module in block.modules() if isinstance(module, AdapterLinear)]
            for block in blocks(model)
        ]
        penalised = any(pass_.penalty is not None for pass_ in settings.passes)
        # as the round begins
        cores = ([linear.product()[1] for linear in linears] for linears in self._linears if penalised)
        self._cores = [[None if core is None else core.detach() for core in block] for block in cores]
        self.losses: list[float] = []

    def step(self, micro_rows: int, boundaries: Boundaries = "input", kept_blocks: int = 0) -> float:
        """Train the adapter, in place, on the next rows.

        Args:
            micro_rows: rows that go through the model at once.
            boundaries: how each block's input is kept for backward.
            kept_blocks: last blocks that keep their activations instead of running again.

        Returns:
            The loss on the device's own rows in the first pass, without penalties; nan if a loss
            was not finite, and the step was skipped.

        Raises:
            TrainerError: the loss was not finite several times in a row.
        """
        settings, training, number = self._settings, self._settings.training, len(self.losses)
        self._optimiser.lr = learning_rate(training, number, settings.round, settings.rounds)
        rows, texts = islice(self._rows, training.rows_a_step), islice(self._texts, self._text_count)
        micro_batches = cut(list(rows), list(texts), self._text_weight, micro_rows)
        chosen = settings.slices[number % len(settings.slices)]
        rank = settings.ranks[number // len(settings.slices) % len(settings.ranks)]
        recomputed = recomputed_blocks(self._model, boundaries, kept_blocks)
        with only_blocks(self._model, chosen), self._leading(rank), recomputed:
            self.losses.append(self._passes(micro_batches, chosen))
        last_losses = self.losses[-SKIPPED_IN_A_ROW:]
        if len(last_losses) == SKIPPED_IN_A_ROW and all(map(math.isnan, last_losses)):
            raise TrainerError(
                f"the loss was not finite {SKIPPED_IN_A_ROW} times in a row, up to step {len(self.losses)} of "
                f"round {settings.round}; lower the learning rate, or look for broken weights"
            )
        return self.losses[-1]

    @contextmanager
    def _leading(self, rank: int | None) -> Iterator[None]:
        """Inside, the adapter has its leading ranks alone."""
        linears = list(chain.from_iterable(self._linears))
        for linear in linears:
            linear.leading = rank
        try:
            yield
        finally:
            for linear in linears:
                linear.leading = None

    def close(self) -> None:
        """Take the optimiser off the adapter, so that its state is freed."""
        self._optimiser.close()

    def _passes(self, micro_batches: list[MicroBatch], chosen: tuple[int, ...]) -> float:
        """Make one optimiser step a pass through the chosen blocks; returns what `step` does."""
        passes = self._settings.passes
        total = own_loss = 0.0
        references: list[torch.Tensor] = []  # counted values of the first pass, by micro-batch
        for turn, pass_ in enumerate(passes):
            with self._adapter.without(pass_.frozen):
                if not self.losses:
                    # the round's first step: clipping needs the norm of a gradient
                    with self._optimiser.measuring():
                        self._output(micro_batches[0]).loss.backward()
                for number, micro_batch in enumerate(micro_batches):
                    last = number == len(micro_batches) - 1
                    output = self._output(micro_batch)
                    loss = output.loss * micro_batch.share
                    if turn == 0:
                        own_loss += 0.0 if micro_batch.public else loss.item()
                        if any(pass_.apart for pass_ in passes):
                            references.append(output.values.detach()[output.counted])
                    elif pass_.apart and not micro_batch.public:
                        drift = self._objective(micro_batch).divergence(references[number], output)
                        loss = loss + micro_batch.share * pass_.apart * drift
                    if last and pass_.penalty is not None:
                        # one at a time, as a product may be a copy of its factors
                        products = (linear.product() for block in chosen for linear in self._linears[block])
                        cores = [core for block in chosen for core in self._cores[block]]
                        loss = loss + pass_.penalty(products, cores)
                    # the hidden states are not needed in backward, where memory peaks
                    del output
                    total += loss.item()
                    if not math.isfinite(total):
                        self._optimiser.forget()
                        return math.nan
                    with nullcontext() if last else self._optimiser.accumulating():
                        loss.backward()
            self._optimiser.step()
        return own_loss

    def _objective(self, micro_batch: MicroBatch) -> Text | Labels:
        # a completion by the fleet is text like any other
        if not micro_batch.rows[0].headed:
            return self._text
        return self._distilled if micro_batch.public else self._labels

    def _output(self, micro_batch: MicroBatch) -> Output:
        hidden, labels = hidden_states(self._model, micro_batch.rows)
        # the peak comes next, and its blocks do not fit the holes that the forward pass left
        release()
        return self._objective(micro_batch).output(micro_batch.rows, hidden, labels)


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
    for batch in batches(rows, micro_rows):
        alike = [row for row in rows if row.headed is batch[0].headed]
        total = sum(row.counted for row in alike)
        portion = len(alike) / len(rows)
        share = portion * sum(row.counted for row in batch) / max(total, 1)
        micro_batches.append(MicroBatch(batch, share, False))
    for batch in batches(texts, micro_rows):
        micro_batches.append(MicroBatch(batch, weight * len(batch) / len(texts), True))
    return micro_batches


def learning_rate(training: Training, step: int, round_: int, rounds: int) -> float:
    """A cosine over all rounds to a tenth; each round warms up, as its optimiser starts anew."""
    progress = ((round_ - 1) * training.steps + step) / (rounds * training.steps)
    warm_up = min(1.0, (step + 1) / max(training.warmup_steps, 1))
    return training.learning_rate * warm_up * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


@contextmanager
def only_blocks(model: PreTrainedModel, chosen: tuple[int, ...]) -> Iterator[None]:
    """Inside, the model consists of the chosen blocks alone."""
    layers, config = blocks(model), model.config.get_text_config()
    every, types = list(layers), getattr(config, "layer_types", None)

    def put(numbers: Sequence[int]) -> None:
        del layers[:]
        layers.extend(every[number] for number in numbers)
        config.num_hidden_layers = len(numbers)
        if types:
            config.layer_types = [types[number] for number in numbers]

    put(chosen)
    try:
        yield
    finally:
        put(range(len(every)))


@contextmanager
def recomputed_blocks(
    model: PreTrainedModel, boundaries: Boundaries = "input", kept_blocks: int = 0
) -> Iterator[None]:
    """Inside, blocks keep only their input and run again in backward; dropout is in training mode.

    Args:
        boundaries: how a block's input is kept.
        kept_blocks: last blocks that keep their activations and do not run again.
    """
    model.train()
    every = list(blocks(model))
    recomputed = every[: max(len(every) - kept_blocks, 0)]
    before = [vars(block).get("forward") for block in recomputed]
    storage = Kept(len(recomputed))
    for block in recomputed:
        block.forward = partial(checkpoint_block, block.forward, keep=boundaries, storage=storage)
    try:
        yield
    finally:
        for block, forward in zip(recomputed, before, strict=True):
            del block.forward
            if forward is not None:
                block.forward = forward
        model.eval()
