"""Public texts of a fleet without a head: a device completes each text, greedily and in batches.

The method is methods/completions.py. Completions travel as text: devices have different tokenizers.
"""

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel

from edge_runtime.adapters.attach import State
from edge_runtime.errors import InputError
from edge_runtime.protocol import codec, completion
from edge_runtime.protocol.completion import Completion
from edge_runtime.settings import Codistill
from edge_runtime.trainer.base import Base
from edge_runtime.trainer.data import Row
from edge_runtime.trainer.ends import answer_ends
from edge_runtime.trainer.examples import IGNORED, Example, Examples
from edge_runtime.trainer.heap import release
from edge_runtime.trainer.job import Job
from edge_runtime.trainer.lesson import Distillation, weighed
from edge_runtime.trainer.meter import Meter
from edge_runtime.trainer.objectives import padded_length
from edge_runtime.trainer.public import DeviceAnswers
from edge_runtime.trainer.states import last_states, likeness, sample
from edge_runtime.trainer.tokens import Asked, Tokenization
from edge_runtime.trainer.vocabulary import language_head, sweep


class Written(NamedTuple):
    """A completion that the model ended by itself."""

    prompt: int  # its number
    ids: list[int]  # token ids, without the end
    confidence: float  # geometric mean of the probabilities of the tokens and the end


class Completions:
    """The texts of one job that this model can be asked, and its completions of them."""

    def __init__(self, job: Job, spec: Codistill, texts: list[Row], how: Tokenization) -> None:
        self._most_tokens, self._ends = spec.tokens, sorted(answer_ends(job.facts, how.tokenizer))
        self._prompts: dict[int, Asked] = {}  # by the text's number
        for number, row in enumerate(texts):
            # a model without a chat template, or whose template refuses the text, is not asked
            with suppress(InputError):
                ids, spaces = how.asked(row)
                if ids := ids[-(job.plan.tokens - spec.tokens) :]:
                    self._prompts[number] = Asked(ids, spaces)
        # tokenized here, as the tokenizer is gone when the global version is loaded
        self._lesson = agreed(job, texts, set(self._prompts), how) if self._prompts else None
        self._written: list[Written] = []

    def lesson(self, shared: State) -> Distillation | None:
        """The completions that the fleet agreed on; None if there are none yet."""
        return self._lesson

    def answer(self, base: Base, examples: Examples, meter: Meter) -> None:
        """Complete the texts; a text unlike the device's own examples has less confidence."""
        if not self._prompts or not self._ends:
            return
        with meter.phase("complete"):
            prompts = {number: asked.ids for number, asked in self._prompts.items()}
            asked = [Example(ids, [], 0) for ids in prompts.values()]
            rows = list(map(prompt_of, sample(examples)))
            share = likeness(last_states(base, rows), last_states(base, asked))
            alike = dict(zip(self._prompts, share.tolist(), strict=True))
            progress = partial(meter.tell, "complete prompts", of=len(alike))
            written = write(base.model, prompts, self._ends, self._most_tokens, base.plan.rows, progress)
        self._written = [
            Written(prompt, ids, alike[prompt] * confidence) for prompt, ids, confidence in written
        ]

    def answers(self, tokenizer: Callable[[], Any]) -> DeviceAnswers:
        """The completions as text; tokenizer loads the model's."""
        texts = as_text(self._written, self._prompts, tokenizer()) if self._written else []
        return DeviceAnswers(completions=completion.encode(texts))


def agreed(job: Job, texts: list[Row], numbers: set[int], how: Tokenization) -> Distillation | None:
    """The global version's completions of the texts with these numbers; None if there are none."""
    if not job.start:
        return None
    every = completion.decode(codec.answers(Path(job.start[-1]).read_bytes()))
    known = [answer for answer in every if answer.prompt in numbers]
    examples, confidences = [], []
    for answer in known:
        # a chat template may refuse the conversation that the completion ends
        with suppress(InputError):
            example = last_turn(how.example(completed(texts[answer.prompt], answer.text)))
            # tokens differ between devices: where a completion is too long here, the cut removed its prompt
            if example.labels[0] == IGNORED:
                examples.append(example)
                confidences.append(answer.confidence)
    covered = len(examples) / max(len(texts), 1)
    return weighed(job, examples, np.array(confidences), covered=covered)


# --- rows and their prompts


def completed(row: Row, answer: str) -> Row:
    """A public row with its completion, as a row to learn."""
    if "messages" in row:
        return {"messages": [*row["messages"], {"role": "assistant", "content": answer}]}
    return {"prompt": row["text"], "completion": answer}


def prompt_of(example: Example) -> Example:
    """The tokens before the first learned one; all but the last token if everything is learned."""
    first = next(number for number, label in enumerate(example.labels) if label != IGNORED)
    return Example(example.ids[: first or -1] or example.ids, [], 0)


def last_turn(example: Example) -> Example:
    """The example with its last completion learned alone: earlier turns belong to the prompt."""
    learned = [label != IGNORED for label in example.labels]
    # a chat template may write more after the turn
    last = max((number for number, learns in enumerate(learned) if learns), default=-1)
    before = max((number for number in range(last) if not learned[number]), default=-1)
    return example._replace(labels=[IGNORED] * (before + 1) + example.labels[before + 1 :])


def as_text(written: list[Written], prompts: dict[int, Asked], tokenizer: Any) -> list[Completion]:
    """Decode completions; empty ones are left out."""
    completions = []
    decode = partial(tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    for prompt, ids, confidence in written:
        # decoded behind the prompt's last token, as some tokenizers drop a text's leading space
        last, spaces = prompts[prompt].ids[-1:], prompts[prompt].spaces
        lead, joined = decode(last), decode([*last, *ids])
        text = joined.removeprefix(lead) if joined.startswith(lead) else decode(ids)
        if text.strip():
            completions.append(Completion(prompt, text.removeprefix(spaces), confidence))
    return completions


# --- greedy decoding


@torch.no_grad()
def write(
    model: PreTrainedModel,
    prompts: dict[int, list[int]],
    ends: list[int],
    most_tokens: int,
    micro_rows: int,
    progress: Callable[[int], None],
) -> list[Written]:
    """Complete prompts greedily; returns the completions in the order of their prompts' numbers.

    Args:
        prompts: token ids by the prompt's number, at least one id each.
        ends: tokens that end a completion.
        most_tokens: longest completion with its end; a longer one is left out.
        micro_rows: prompts at once.
        progress: called after each batch with the prompts completed so far.
    """
    order = sorted(prompts, key=lambda number: len(prompts[number]))
    completions = []
    for first in range(0, len(order), micro_rows):
        numbers = order[first : first + micro_rows]
        tokens, log_p = _batch(model, [prompts[number] for number in numbers], ends, most_tokens)
        for number, ids, logs in zip(numbers, tokens.tolist(), log_p, strict=True):
            length = next((at for at, token in enumerate(ids) if token in ends), 0)
            if length:
                completions.append(Written(number, ids[:length], float(logs[: length + 1].mean().exp())))
        progress(first + len(numbers))
    return sorted(completions)


def _batch(
    model: PreTrainedModel, prompts: list[list[int]], ends: list[int], most_tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens after each prompt and their log-probabilities (rows, tokens), until all have ended."""
    head = language_head(model)
    device = head.weight.device
    longest = padded_length(max(map(len, prompts)))
    # padded on the left, so that the next token follows every prompt at one position
    ids = torch.tensor([[ends[0]] * (longest - len(prompt)) + prompt for prompt in prompts], device=device)
    mask = torch.tensor(
        [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device
    )
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    # the keys and values of earlier tokens
    cache = DynamicCache(config=model.config)
    tokens: list[torch.Tensor] = []
    log_p: list[torch.Tensor] = []
    end_tokens = torch.tensor(ends, device=device)
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    while len(tokens) < most_tokens and not ended.all():
        hidden = model.base_model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        ).last_hidden_state[:, -1]
        scores = sweep(hidden, head)
        tokens.append(scores.likely)
        log_p.append(scores.best - scores.log_sum)
        ended |= torch.isin(scores.likely, end_tokens)
        ids, positions = scores.likely[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, torch.ones_like(ids)], 1)
    release()
    return torch.stack(tokens, 1), torch.stack(log_p, 1)
