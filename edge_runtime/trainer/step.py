"""The optimiser steps of a round.

Memory is saved in four places. Only the inputs of blocks are kept; a block runs again in backward.
Head and loss run in chunks over the labelled tokens alone. A factor steps as soon as backward has
its gradient, so that no gradient outlives its layer. Rows go through the model in micro-batches.

Steps may take turns between depth slices, so that one adapter fits them all (models/slices.py).
"""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import islice
from typing import NamedTuple

import torch
from edge_kernels import AdamW8bit
from transformers import PreTrainedModel

from edge_runtime.adapters.attach import AdapterLinear, Attached
from edge_runtime.errors import TrainerError
from edge_runtime.methods.interface import Pass
from edge_runtime.models.structure import blocks
from edge_runtime.planning.predict import LOSS_CHUNK_BYTES
from edge_runtime.protocol.plan import Plan
from edge_runtime.settings import Boundaries, Training
from edge_runtime.trainer.data import Example, epochs
from edge_runtime.trainer.meter import release
from edge_runtime.trainer.micro_batch import MicroBatch, cut, pad
from edge_runtime.trainer.objectives import Output, hidden_states, objectives
from edge_runtime.trainer.public import Distillation, drawn
from edge_runtime.trainer.recompute import only_blocks, recomputed_blocks

SKIPPED_IN_A_ROW = 5  # steps without a finite loss, before the round is given up


class RoundSettings(NamedTuple):
    """How the steps of one round are made."""

    training: Training
    slices: Sequence[tuple[int, ...]]  # blocks of each depth slice; steps take the slices in turn
    micro_rows: int  # rows that go through the model at once
    round: int = 1  # counted from 1; with rounds it places the round on the learning-rate schedule
    rounds: int = 1
    seed: int = 0  # of the order of the rows
    passes: Sequence[Pass] = (Pass(),)  # of each step, one after another over the same rows
    boundaries: Boundaries = "input"  # how each block's input is kept for backward
    kept_blocks: int = 0  # last blocks that keep their activations instead of running again
    loss_chunk_bytes: int = LOSS_CHUNK_BYTES  # float32 logits that exist at once


def train(
    model: PreTrainedModel,
    adapter: Attached,
    examples: list[Example],
    settings: RoundSettings,
    *,
    distillation: Distillation | None = None,
    progress: Callable[[int, float | None], None] = lambda step, loss: None,
    ease: Callable[[], Plan | None] = lambda: None,
) -> list[float]:
    """Train the adapter for one round, in place.

    Args:
        distillation: public texts that join each step's rows.
        progress: called after every step with its number, counted from 1, and its loss; None if
            the step was skipped.
        ease: called after every step. Returns a cheaper plan when memory is short, or None to
            continue unchanged.

    Returns:
        The loss of each step on the device's own rows in the first pass, without penalties; nan if
        it was not finite and the step was skipped.

    Raises:
        TrainerError: the loss was not finite several times in a row. What ease raises passes through.
    """
    training, order = settings.training, f"{settings.seed}/{settings.round}"
    rows = epochs(examples, order)
    texts, count, weight = drawn(distillation, f"{order}/anchors")
    learner = _Learner(model, adapter, settings, distillation)
    losses: list[float] = []
    for step in range(training.steps):
        learner.optimiser.lr = learning_rate(training, step, settings.round, settings.rounds)
        step_rows, step_texts = list(islice(rows, training.rows_a_step)), list(islice(texts, count))
        micro_batches = cut(step_rows, step_texts, weight, settings.micro_rows)
        chosen = settings.slices[step % len(settings.slices)]
        kept = settings.boundaries, settings.kept_blocks
        with only_blocks(model, chosen), recomputed_blocks(model, *kept):
            losses.append(learner.step(micro_batches, settings.passes, chosen, first=step == 0))
        _refuse_divergence(losses, settings.round)
        progress(step + 1, losses[-1] if math.isfinite(losses[-1]) else None)
        plan = ease()
        if plan is not None:
            settings = settings._replace(
                micro_rows=plan.rows, boundaries=plan.boundaries, kept_blocks=plan.kept_blocks
            )
    learner.optimiser.close()
    return losses


class _Learner:
    """A model in training: its objectives, its optimiser, and its cores as the round began."""

    def __init__(
        self,
        model: PreTrainedModel,
        adapter: Attached,
        settings: RoundSettings,
        distillation: Distillation | None,
    ) -> None:
        training = settings.training
        self._model, self._adapter = model, adapter
        self.optimiser = AdamW8bit(
            adapter.trained(), weight_decay=training.weight_decay, clip_norm=training.clip_norm
        )
        targets = None if distillation is None else distillation.targets
        self._objectives = objectives(model, adapter, settings.loss_chunk_bytes, targets)
        self._linears = [
            [module for module in block.modules() if isinstance(module, AdapterLinear)]
            for block in blocks(model)
        ]
        penalised = any(pass_.penalty is not None for pass_ in settings.passes)
        self._cores = [[_core(linear) for linear in linears] for linears in self._linears if penalised]

    def step(
        self,
        micro_batches: list[MicroBatch],
        passes: Sequence[Pass],
        chosen: tuple[int, ...],
        *,
        first: bool,
    ) -> float:
        """Make one optimiser step a pass.

        Args:
            chosen: blocks that the step runs through.
            first: whether this is the round's first step, where the optimiser measures gradients.

        Returns:
            The loss on own rows in the first pass; nan if any loss was not finite.
        """
        total = own_loss = 0.0
        references: list[torch.Tensor] = []  # counted values of the first pass, by micro-batch
        for turn, pass_ in enumerate(passes):
            with self._adapter.without(pass_.frozen):
                if first:
                    with self.optimiser.measuring():
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
                        objective = self._objectives.of(micro_batch.rows)
                        drift = objective.divergence(references[number], output)
                        loss = loss + micro_batch.share * pass_.apart * drift
                    if last and pass_.penalty is not None:
                        loss = loss + self._penalty(pass_, chosen)
                    # the hidden states are not needed in backward, where memory peaks
                    del output
                    total += loss.item()
                    if not math.isfinite(total):
                        self.optimiser.forget()
                        return math.nan
                    with nullcontext() if last else self.optimiser.accumulating():
                        loss.backward()
            self.optimiser.step()
        return own_loss

    def _output(self, micro_batch: MicroBatch) -> Output:
        rows = micro_batch.rows
        ids, labels = pad(rows, self._objectives.text.head.weight.device)
        hidden = hidden_states(self._model, ids)
        # the peak comes next, and its blocks do not fit the holes that the forward pass left
        release()
        return self._objectives.of(rows, micro_batch.public).output(rows, hidden, labels)

    def _penalty(self, pass_: Pass, chosen: tuple[int, ...]) -> torch.Tensor:
        assert pass_.penalty is not None
        products = [linear.product() for block in chosen for linear in self._linears[block]]
        penalty: torch.Tensor = pass_.penalty(
            products, [core for block in chosen for core in self._cores[block]]
        )
        return penalty


def _core(linear: AdapterLinear) -> torch.Tensor | None:
    core = linear.product()[1]
    return core if core is None else core.detach()


def _refuse_divergence(losses: list[float], round_: int) -> None:
    if len(losses) >= SKIPPED_IN_A_ROW and all(map(math.isnan, losses[-SKIPPED_IN_A_ROW:])):
        raise TrainerError(
            f"the loss was not finite {SKIPPED_IN_A_ROW} times in a row, up to step {len(losses)} of "
            f"round {round_}; lower the learning rate, or look for broken weights"
        )


def learning_rate(training: Training, step: int, round_: int, rounds: int) -> float:
    """A cosine over all rounds to a tenth; each round warms up, as its optimiser starts anew."""
    progress = ((round_ - 1) * training.steps + step) / (rounds * training.steps)
    warm_up = min(1.0, (step + 1) / max(training.warmup_steps, 1))
    return training.learning_rate * warm_up * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))
