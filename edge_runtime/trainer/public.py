"""The fleet's public texts in a job: what the fleet says of them, which the device learns, and what the device says.

With a head over labels that is a distribution for each text (methods/codistill.py); without one, how each text goes on
(methods/completions.py).
"""

from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from edge_runtime.adapters import attach
from edge_runtime.errors import InputError
from edge_runtime.methods import codistill
from edge_runtime.protocol import codec, completion
from edge_runtime.protocol.completion import Completion
from edge_runtime.protocol.keys import label_key
from edge_runtime.settings import Codistill
from edge_runtime.trainer import data, greedy
from edge_runtime.trainer.evaluate import likeness, states
from edge_runtime.trainer.job import Job
from edge_runtime.trainer.step import Distillation

MOST_ROWS = 512  # of its own that a device compares public texts with

Read = Callable[[list[data.Row]], list[data.Example]]


def texts(job: Job) -> list[data.Row]:
    """The fleet's; raises InputError where they are not as many as it says."""
    if job.anchors is None:
        return []
    assert job.fleet.codistill is not None
    rows = data.read_asked(Path(job.anchors))
    if len(rows) < job.fleet.codistill.texts:
        raise InputError(
            f"the fleet has {job.fleet.codistill.texts} public texts, but its file has {len(rows)} rows"
        )
    return rows[: job.fleet.codistill.texts]


# --- labels


def numbered(public: list[data.Row], read: Read) -> list[data.Example]:
    """A head's rows; the answer of each is its number."""
    examples = read([{"text": row["text"], "label": ""} for row in public])
    return [text._replace(answer=number) for number, text in enumerate(examples)]


def predicted(
    job: Job,
    anchors: list[data.Example],
    labels: list[str],
    own: set[str],
    shared: Mapping[str, NDArray[np.float32]],
) -> Distillation | None:
    """What the fleet predicts of the anchors; None where it has not predicted yet. own: labels that this device has rows of."""
    found = {label: shared.get(label_key("anchors", label, "T")) for label in labels}
    # of as many texts as there are now: the fleet may have had others
    columns = {label: T[0] for label, T in found.items() if T is not None and T.shape[1] == len(anchors)}
    if job.fleet.codistill is None or not columns:
        return None
    told = np.stack([columns.get(label, np.zeros(len(anchors), np.float32)) for label in labels], 1)
    evidence, targets = codistill.learned(told, job.fleet.codistill.temperature)
    news = codistill.news(told, np.array([label not in own for label in labels]))
    return _lesson(
        job, job.fleet.codistill, anchors, evidence, news, torch.from_numpy(targets).to(job.machine.device)
    )


@torch.no_grad()
def predict(
    model: PreTrainedModel,
    adapter: attach.Adapter,
    labels: list[str],
    examples: list[data.Example],
    anchors: list[data.Example],
    micro_rows: int,
) -> attach.State:
    """What the head says of the anchors, less where they are unlike this device's rows."""
    read = states(model, anchors, micro_rows)
    own = states(model, _some(examples), micro_rows)
    said = adapter.logits(read).softmax(-1) * likeness(own, read)[:, None]
    rows = said.T.cpu().numpy()
    return {label_key("anchors", label, "P"): row[None] for label, row in zip(labels, rows, strict=True)}


# --- completions


def prompts(job: Job, public: list[data.Row], tokenizer: Any) -> dict[int, list[int]]:
    """Token ids of the texts, by their numbers; their beginning is lost where the completion would not fit behind them. Without
    those that this model cannot be asked, as it has no chat template or an own one that refuses them."""
    if job.fleet.codistill is None:
        return {}
    room, found = job.plan.tokens - job.fleet.codistill.tokens, {}
    for number, row in enumerate(public):
        with suppress(InputError):
            found[number] = data.asked(row, tokenizer)[-room:]
    return {number: ids for number, ids in found.items() if ids}


def completed(job: Job, public: list[data.Row], asked: Collection[int], read: Read) -> Distillation | None:
    """How the fleet completes the texts that this model can be asked; None where it has completed none yet."""
    if job.fleet.codistill is None or job.start is None:
        return None
    agreed = [
        one for one in completion.decode(codec.answers(Path(job.start).read_bytes())) if one.prompt in asked
    ]
    examples = [
        _last_turn(row) for row in read([data.answered(public[one.prompt], one.text) for one in agreed])
    ]
    # of a completion that is longer here than where it was written, the prompt may be cut off
    fit = [number for number, row in enumerate(examples) if row.labels[0] == data.IGNORED]
    evidence = np.array([agreed[number].confidence for number in fit])
    spoken = len(fit) / max(len(public), 1)
    return _lesson(
        job,
        job.fleet.codistill,
        [examples[number] for number in fit],
        evidence,
        np.zeros(len(fit)),
        None,
        spoken,
    )


def complete(
    model: PreTrainedModel,
    job: Job,
    examples: list[data.Example],
    asked: dict[int, list[int]],
    ends: list[int],
    micro_rows: int,
    progress: Callable[[int], None],
) -> list[greedy.Written]:
    """How the model itself completes the prompts, with less confidence where they are unlike this device's rows."""
    assert job.fleet.codistill is not None
    numbers, before = list(asked), list(asked.values())
    read = states(model, [data.Example(ids, [], 0) for ids in before], micro_rows)
    own = states(model, [_prompt(row) for row in _some(examples)], micro_rows)
    alike = likeness(own, read).tolist()
    found = greedy.write(model, before, ends, job.fleet.codistill.tokens, micro_rows, progress)
    return [
        one._replace(prompt=numbers[one.prompt], confidence=alike[one.prompt] * one.confidence)
        for one in found
    ]


def as_text(written: list[greedy.Written], asked: dict[int, list[int]], tokenizer: Any) -> list[Completion]:
    """The completions as other tokenizers can read them."""
    found = []
    for one in written:
        last = asked[one.prompt][-1:]  # some tokenizers begin a text without its leading space
        lead, whole = tokenizer.decode(last), tokenizer.decode([*last, *one.ids])
        text = whole.removeprefix(lead) if whole.startswith(lead) else tokenizer.decode(one.ids)
        if text.strip():
            found.append(Completion(one.prompt, text, one.confidence))
    return found


def ends(tokenizer: Any) -> list[int]:
    """The tokens that end a completion: of the text, or of a turn in the model's chat template."""
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return sorted(special | {number for number in tokenizer.all_special_ids if number is not None})


# --- both


def _lesson(
    job: Job,
    spec: Codistill,
    examples: list[data.Example],
    evidence: NDArray[Any],
    news: NDArray[Any],
    targets: torch.Tensor | None,
    spoken: float = 1.0,
) -> Distillation | None:
    """spoken: the share of the public texts that the examples are; the weight is of the mean over all."""
    if not evidence.any():
        return None
    ramp = codistill.ramp(job.round, job.fleet.rounds)
    shares = evidence * (news + (1 - news) * ramp)
    rows = max(round(spec.rows * spoken * float(shares.sum() / evidence.sum())), 1)
    return Distillation(examples, shares.tolist(), targets, spec.weight * spoken, rows)


def _some(examples: list[data.Example]) -> list[data.Example]:
    return examples[:: -(-len(examples) // MOST_ROWS)]


def _prompt(example: data.Example) -> data.Example:
    """What comes before the first learned token; of a row in which everything is learned, all but its end."""
    learned = next(number for number, label in enumerate(example.labels) if label != data.IGNORED)
    return data.Example(example.ids[: learned or -1] or example.ids, [], 0)


def _last_turn(example: data.Example) -> data.Example:
    """With what comes before the completion learned no more, as the turns of an assistant that others wrote."""
    before = max((number for number, label in enumerate(example.labels) if label == data.IGNORED), default=-1)
    return example._replace(labels=[data.IGNORED] * (before + 1) + example.labels[before + 1 :])
