"""Public texts of a fleet without a head: a device completes each text.

The method is methods/completions.py. Completions travel as text: devices have different tokenizers.
"""

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from edge_runtime.adapters.attach import Attached
from edge_runtime.errors import InputError
from edge_runtime.protocol import codec, completion
from edge_runtime.protocol.completion import Completion
from edge_runtime.settings import Codistill
from edge_runtime.trainer import data, greedy, public
from edge_runtime.trainer.data import IGNORED, Example
from edge_runtime.trainer.job import Job
from edge_runtime.trainer.meter import Reporter


class Completions:
    """The texts of one job that this model can be asked, and its completions of them."""

    def __init__(
        self, job: Job, spec: Codistill, texts: list[data.Row], tokenizer: Any, read: public.Read
    ) -> None:
        self._most_tokens, self._ends = spec.tokens, ends(tokenizer)
        self._prompts = prompts(texts, tokenizer, job.plan.tokens - spec.tokens)
        # tokenized here, as the tokenizer is gone when the global version is loaded
        self._lesson = agreed(job, texts, set(self._prompts), read) if self._prompts else None
        self._written: list[greedy.Written] = []

    def lesson(self, shared: public.Shared) -> public.Distillation | None:
        """The completions that the fleet agreed on; None if there are none yet."""
        return self._lesson

    def answer(
        self,
        model: PreTrainedModel,
        adapter: Attached,
        examples: list[Example],
        micro_rows: int,
        reporter: Reporter,
    ) -> None:
        """Complete the texts; a text unlike the device's own examples has less confidence."""
        if not self._prompts or not self._ends:
            return
        numbers, texts = list(self._prompts), list(self._prompts.values())
        with reporter.meter.phase("complete"):
            text_states = public.states(model, [Example(ids, [], 0) for ids in texts], micro_rows)
            own_states = public.states(model, [prompt_of(row) for row in public.sample(examples)], micro_rows)
            alike = public.likeness(own_states, text_states).tolist()
            progress = partial(reporter.tell, "complete prompts", of=len(numbers))
            written = greedy.write(model, texts, self._ends, self._most_tokens, micro_rows, progress)
        self._written = [
            greedy.Written(numbers[prompt], ids, alike[prompt] * confidence)
            for prompt, ids, confidence in written
        ]

    def answers(self, tokenizer: Callable[[], Any]) -> public.DeviceAnswers:
        """The completions as text; tokenizer loads the model's."""
        written = self._written
        texts = as_text(written, self._prompts, tokenizer()) if written else []
        return public.DeviceAnswers(completions=completion.encode(texts))


def prompts(texts: list[data.Row], tokenizer: Any, room: int) -> dict[int, list[int]]:
    """Token ids of the texts by number, cut at their beginning to `room` tokens.

    Texts are left out if the model has no chat template for them, or its template refuses them.
    """
    token_ids = {}
    for number, row in enumerate(texts):
        with suppress(InputError):
            token_ids[number] = data.prompt_ids(row, tokenizer)[-room:]
    return {number: ids for number, ids in token_ids.items() if ids}


def agreed(
    job: Job, texts: list[data.Row], numbers: set[int], read: public.Read
) -> public.Distillation | None:
    """The global version's completions of the texts with these numbers; None if there are none."""
    if job.start is None:
        return None
    every = completion.decode(codec.answers(Path(job.start).read_bytes()))
    known = [answer for answer in every if answer.prompt in numbers]
    rows = [data.completed(texts[answer.prompt], answer.text) for answer in known]
    pairs = zip([last_turn(example) for example in read(rows)], known, strict=True)
    # tokens differ between devices: where a completion is too long here, the cut removed its prompt
    fitting = [(example, answer) for example, answer in pairs if example.labels[0] == IGNORED]
    evidence = np.array([answer.confidence for _, answer in fitting])
    covered = len(fitting) / max(len(texts), 1)
    return public.weighed(job, [example for example, _ in fitting], evidence, covered=covered)


def as_text(written: list[greedy.Written], prompts: dict[int, list[int]], tokenizer: Any) -> list[Completion]:
    """Decode completions; empty ones are left out."""
    completions = []
    for prompt, ids, confidence in written:
        # decoded behind the prompt's last token, as some tokenizers drop a text's leading space
        last = prompts[prompt][-1:]
        lead, joined = tokenizer.decode(last), tokenizer.decode([*last, *ids])
        text = joined.removeprefix(lead) if joined.startswith(lead) else tokenizer.decode(ids)
        if text.strip():
            completions.append(Completion(prompt, text, confidence))
    return completions


def ends(tokenizer: Any) -> list[int]:
    """The tokens that end a text, or a turn in the model's chat template."""
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return sorted(special | {number for number in tokenizer.all_special_ids if number is not None})


def prompt_of(example: Example) -> Example:
    """The tokens before the first learned one; all but the last token if everything is learned."""
    first = next(number for number, label in enumerate(example.labels) if label != IGNORED)
    return Example(example.ids[: first or -1] or example.ids, [], 0)


def last_turn(example: Example) -> Example:
    """The example with its last completion learned alone: earlier turns belong to the prompt."""
    before = max((number for number, label in enumerate(example.labels) if label == IGNORED), default=-1)
    return example._replace(labels=[IGNORED] * (before + 1) + example.labels[before + 1 :])
