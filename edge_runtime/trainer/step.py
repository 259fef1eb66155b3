"""One forward pass, and the optimiser steps of a round.

Only the boundaries of the blocks are kept; a block runs again in backward. The head and the loss run in chunks over the
labelled tokens alone. A factor steps as soon as backward has its gradient, so that no gradient outlives its layer. A step's
rows go through in micro-batches whose losses are weighted by their tokens. Steps may take turns between slices of the
model, so that one adapter fits them all (models/slices.py).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import islice
from typing import NamedTuple

import torch
from edge_kernels import AdamW8bit, Kept, Packed, checkpoint_block, linear_cross_entropy
from torch.nn.functional import cross_entropy, kl_div, rms_norm
from transformers import PreTrainedModel

from edge_runtime.adapters.attach import Adapter, AdapterLinear
from edge_runtime.errors import TrainerError
from edge_runtime.methods.interface import Pass
from edge_runtime.models.families import blocks
from edge_runtime.planning.predict import LENGTH_STEP, LOSS_CHUNK_BYTES
from edge_runtime.protocol.plan import Plan
from edge_runtime.settings import Boundaries, Training
from edge_runtime.trainer.data import IGNORED, Example, batches, epochs, in_shares
from edge_runtime.trainer.divergence import divergence
from edge_runtime.trainer.meter import release

SKIPPED_IN_A_ROW = 5  # steps without a finite loss, before the round is given up


def pad(rows: list[Example], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and labels (rows, tokens), padded on the right; causal attention never looks there, so no mask is needed.

    The length is a multiple of LENGTH_STEP: on a CPU the matrix library builds and keeps kernels for each new shape.
    """
    longest = -(-max(len(row.ids) for row in rows) // LENGTH_STEP) * LENGTH_STEP
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    labels = torch.full((len(rows), longest), IGNORED)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)] = torch.tensor(row.ids)
        labels[i, : len(row.labels)] = torch.tensor(row.labels)
    return ids.to(device), labels.to(device)


def hidden_states(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """(rows, tokens) to the last hidden states (rows, tokens, hidden), before the head."""
    hidden: torch.Tensor = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    return hidden


def head(model: PreTrainedModel) -> tuple[torch.Tensor | Packed, float | None]:
    """The head's weight (vocabulary, hidden) and the bound of its logits, if it has one."""
    config = model.config.get_text_config()
    return model.get_output_embeddings().weight, getattr(config, "final_logit_softcapping", None)


def label_states(batch: list[Example], hidden: torch.Tensor) -> torch.Tensor:
    """(rows, tokens, hidden) to what a head over labels reads: each row's last token (rows, hidden), in float32.

    It is brought to a root mean square of 1: models differ in it by a factor of five, and one learning rate is for all.
    """
    last = torch.tensor([len(row.ids) - 1 for row in batch], device=hidden.device)
    state = hidden[torch.arange(len(batch), device=hidden.device), last].float()
    return rms_norm(state, (state.shape[-1],))


class Distillation(NamedTuple):
    """Public texts on which the model learns what the fleet says of them.

    texts: with the fleet's completions; or, where a head learns, whose answer is their row in targets (texts, labels) of
    probabilities. shares: how much each counts, 0 to 1. weight: of their mean loss beside the mean loss of a step's own rows.
    rows: of them in a step.
    """

    texts: list[Example]
    shares: list[float]
    targets: torch.Tensor | None
    weight: float
    rows: int


def _taught(spec: Distillation | None, seed: str) -> tuple[Iterator[Example], int, float]:
    """Public texts without end, how many of them a step takes, and the weight of their mean loss.

    A text comes as often as it counts, and then counts in full: a step spends nothing on what is worth little.
    """
    if spec is None:
        return iter(()), 0, 0.0
    return (
        in_shares(spec.texts, spec.shares, seed),
        spec.rows,
        spec.weight * sum(spec.shares) / len(spec.shares),
    )


class Part(NamedTuple):
    """A micro-batch, and the share of its mean loss in the step's. soft: whether it learns from Distillation's targets."""

    batch: list[Example]
    share: float
    soft: bool


def parts(rows: list[Example], texts: list[Example], weight: float, micro_rows: int) -> list[Part]:
    """The micro-batches of a step: text counts by labelled tokens, a head's rows by rows, each kind by its rows in the step."""
    found = []
    own = list(batches(rows, micro_rows))
    for headed in (False, True):
        same = [batch for batch in own if (batch[0].answer is not None) is headed]
        total = sum(map(_counted, same))
        portion = sum(map(len, same)) / len(rows)
        found += [Part(batch, portion * _counted(batch) / max(total, 1), False) for batch in same]
    for batch in batches(texts, micro_rows):
        found.append(Part(batch, weight * len(batch) / len(texts), True))
    return found


def _counted(batch: list[Example]) -> int:
    """What a micro-batch's loss is the mean of: a head's rows, or labelled tokens, of which the first has none before it."""
    return sum(
        row.answer != IGNORED if row.answer is not None else sum(label != IGNORED for label in row.labels[1:])
        for row in batch
    )


def train(
    model: PreTrainedModel,
    adapter: Adapter,
    examples: list[Example],
    training: Training,
    *,
    slices: Sequence[tuple[int, ...]],
    micro_rows: int,
    round_: int,
    rounds: int,
    seed: int,
    progress: Callable[[int, float | None], None],
    ease: Callable[[], Plan | None] = lambda: None,
    keep: Boundaries = "input",
    kept_blocks: int = 0,
    loss_chunk_bytes: int = LOSS_CHUNK_BYTES,
    distillation: Distillation | None = None,
    passes: Sequence[Pass] = (Pass(),),
) -> list[float]:
    """Train the adapter for one round, in place.

    Args:
        slices: the blocks that a step goes through, one slice a step in turn.
        micro_rows: rows that go through the model at once.
        round_: counted from 1; with rounds it places this round on the learning rate's schedule.
        progress: told the step, counted from 1, and its loss; None where the step was skipped.
        ease: asked after each step how to go on in less memory; None: as before.
        keep: how each block's input is kept for backward.
        kept_blocks: of a step's last blocks, that keep all that backward needs instead, and do not run again.
        loss_chunk_bytes: of logits that exist at once.
        distillation: public texts beside each step's rows.
        passes: of each step, one after another over the same rows.

    Returns:
        The loss of each step on its own rows in its first pass, without what else joins it; nan where it was not finite and the
        step was skipped.

    Raises:
        TrainerError: the loss was not finite several times in a row, or what ease raises.
    """
    optimiser = AdamW8bit(adapter.trained(), weight_decay=training.weight_decay, clip_norm=training.clip_norm)
    rows = epochs(examples, f"{seed}/{round_}")
    texts, taught, weight_taught = _taught(distillation, f"{seed}/{round_}/anchors")
    weight, softcap = head(model)
    losses: list[float] = []

    def outputs(part: Part) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The part's mean loss; and what it came from, a head's logits or the hidden states (rows, tokens, hidden), with which
        of these rows and tokens it counts."""
        ids, labels = pad(part.batch, weight.device)
        hidden = hidden_states(model, ids)
        release()  # what the forward pass freed fits little of what comes now, and here is the peak
        if part.batch[0].answer is None:
            hidden, labels = hidden[:, :-1], labels[:, 1:]
            loss = linear_cross_entropy(hidden, weight, labels, softcap, loss_chunk_bytes)
            return loss, hidden, labels != IGNORED
        logits = adapter.logits(label_states(part.batch, hidden))
        answers = torch.tensor([row.answer for row in part.batch], device=logits.device)
        if part.soft:
            assert distillation is not None and distillation.targets is not None
            return cross_entropy(logits, distillation.targets[answers]), logits, answers != IGNORED
        return cross_entropy(logits, answers, ignore_index=IGNORED), logits, answers != IGNORED

    def apart(part: Part, before: torch.Tensor, output: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """How far what the part makes has moved from what it made in the first pass."""
        if part.batch[0].answer is None:
            return divergence(before, output[counts], weight, softcap, loss_chunk_bytes)
        logs = output[counts].log_softmax(-1), before.log_softmax(-1)
        return kl_div(*logs, log_target=True, reduction="batchmean")

    linears = [
        [part for part in block.modules() if isinstance(part, AdapterLinear)] for block in blocks(model)
    ]
    penalised = any(one.penalty is not None for one in passes)
    found = [[_core(linear) for linear in own] for own in linears] if penalised else []  # as the round begins
    keeps = any(one.apart for one in passes)
    for step in range(training.steps):
        optimiser.lr = learning_rate(training, step, round_, rounds)
        own = list(islice(rows, training.rows_a_step))
        micro = parts(own, list(islice(texts, taught)), weight_taught, micro_rows)
        total = seen = 0.0
        first: list[torch.Tensor] = []
        with only_blocks(model, slices[step % len(slices)]), recomputed_blocks(model, keep, kept_blocks):
            for turn, one in enumerate(passes):
                with adapter.without(one.frozen):
                    if step == 0:
                        with optimiser.measuring():
                            outputs(micro[0])[0].backward()
                    for number, part in enumerate(micro):
                        mean, output, counts = outputs(part)
                        loss = mean * part.share
                        if turn == 0:
                            seen += 0.0 if part.soft else loss.item()
                            first += [output.detach()[counts]] if keeps else []
                        if one.apart and turn and not part.soft:
                            loss = loss + part.share * one.apart * apart(part, first[number], output, counts)
                        last = number == len(micro) - 1
                        if one.penalty is not None and last:
                            chosen = slices[step % len(slices)]
                            now = [linear.product() for block in chosen for linear in linears[block]]
                            loss = loss + one.penalty(
                                now, [core for block in chosen for core in found[block]]
                            )
                        del output
                        total += loss.item()
                        if not math.isfinite(total):
                            break
                        with nullcontext() if last else optimiser.accumulating():
                            loss.backward()
                if not math.isfinite(total):
                    optimiser.forget()
                    break
                optimiser.step()
        losses.append(seen if math.isfinite(total) else math.nan)
        if len(losses) >= SKIPPED_IN_A_ROW and all(map(math.isnan, losses[-SKIPPED_IN_A_ROW:])):
            raise TrainerError(
                f"the loss was not finite {SKIPPED_IN_A_ROW} times in a row, up to step {step + 1} of round {round_}; lower the "
                "learning rate, or look for broken weights"
            )
        progress(step + 1, seen if math.isfinite(total) else None)
        eased = ease()
        if eased is not None:
            micro_rows, keep, kept_blocks = eased.rows, eased.boundaries, eased.kept_blocks
    optimiser.close()
    return losses


def _core(linear: AdapterLinear) -> torch.Tensor | None:
    core = linear.product()[1]
    return core if core is None else core.detach()


@contextmanager
def only_blocks(model: PreTrainedModel, chosen: tuple[int, ...]) -> Iterator[None]:
    """While inside, the model consists of the chosen ones of its blocks."""
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
    model: PreTrainedModel, keep: Boundaries = "input", kept_blocks: int = 0
) -> Iterator[None]:
    """While inside, each block but the last kept_blocks keeps only its input and runs again in backward; dropout is in training
    mode."""
    model.train()
    every = list(blocks(model))
    again = every[: max(len(every) - kept_blocks, 0)]
    before = [vars(block).get("forward") for block in again]
    storage = Kept(len(again))
    for block in again:
        block.forward = partial(checkpoint_block, block.forward, keep=keep, storage=storage)
    try:
        yield
    finally:
        for block, own in zip(again, before, strict=True):
            del block.forward
            if own is not None:
                block.forward = own
        model.eval()


def learning_rate(training: Training, step: int, round_: int, rounds: int) -> float:
    """Warm-up at the start of each round, since the optimiser starts anew, under a cosine over all rounds to a tenth."""
    done = ((round_ - 1) * training.steps + step) / (rounds * training.steps)
    warm = min(1.0, (step + 1) / max(training.warmup_steps, 1))
    return training.learning_rate * warm * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))
