"""Rows as tokens, with the tokens that are learned. Everything that is learned or asked comes through here.

    {"prompt", "completion"}    the completion and the end-of-text token are learned
    {"messages": [...]}         the assistant's turns are learned, in the model's chat template
    {"text"}                    every token is learned
    {"text", "label"}           the label, written after the text, is learned; or a head learns it

A row is tokenized as a whole, so a label is always the token at its place. A token that joins the
prompt's end and the completion's beginning is learned: it holds the completion's first characters.
The spaces at a prompt's end are learned too, because tokenizers join a space to the word after it.
A model is asked with the prompt up to those spaces (`asked`). So what it has to write is what rows
have taught, whichever character a completion begins with. Only a completion that goes on in the
middle of the prompt's last word can begin inside a token that is asked.

This file imports no torch.
"""

from bisect import bisect_left
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from edge_runtime.errors import InputError
from edge_runtime.trainer import chat
from edge_runtime.trainer.chat import Span
from edge_runtime.trainer.data import Row
from edge_runtime.trainer.examples import IGNORED, Example

SPACES = " \t"  # that a tokenizer may join to the word after them
CHARACTERS = 64  # a token, on average, has fewer; a longer text is cut before it is tokenized
# Stands for a completion's first word where a prompt ends with a line break, which some tokenizers
# split otherwise at a text's end. No tokenizer joins this letter to what stands before it.
LETTER = "\u2c25"


class Asked(NamedTuple):
    """A prompt, as a model is asked to go on from it."""

    ids: list[int]
    spaces: str  # at the prompt's end, which the answer begins with


class TeachesNothing(InputError):
    """None of a row's tokens is learned."""


class Tokenization(NamedTuple):
    """How rows become tokens."""

    tokenizer: Any  # transformers'
    vocabulary: int  # rows of the model's embedding
    max_tokens: int  # longer examples are cut
    labels: Mapping[str, int] | None = None  # the numbers of a head's labels; None: labels are text

    def examples(self, rows: Iterable[Row]) -> list[Example]:
        """The rows as tokens; raises as `example` does."""
        return [self.example(row) for row in rows]

    def example(self, row: Row) -> Example:
        """A row as at most max_tokens tokens: a prompt is cut at its beginning, a text at its end.

        Raises:
            TeachesNothing: none of the tokens is learned.
            InputError: the tokenizer or its chat template cannot give the row's tokens and labels.
        """
        if self.labels is not None and "label" in row:
            ids, _ = self._tokens(row["text"][: CHARACTERS * self.max_tokens])
            return Example(ids[: self.max_tokens], [], self.labels.get(row["label"], IGNORED))
        if "messages" in row:
            text, spans = chat.turns(row["messages"], self.tokenizer)
            ids, labels = self._labelled(text, spans, special=False)
        elif "text" in row and "label" not in row:
            ids, _ = self._tokens(row["text"][: CHARACTERS * self.max_tokens])
            ids = labels = self._ended(ids)[: self.max_tokens]  # a text that is cut does not end there
        else:
            ids, labels = self._completed(*_pair(row))
        example = Example(ids[-self.max_tokens :], labels[-self.max_tokens :])
        if not example.counted:
            raise TeachesNothing(
                f"a row of {' and '.join(sorted(row))} has no token to learn among its last {len(example.ids)}, but "
                "needs one or more: remove rows without an answer, or raise the most tokens of a row"
            )
        return example

    def asked(self, row: Row) -> Asked:
        """A row's messages, prompt or text, as a model that learned such rows is asked to answer it.

        The tokens are those that examples have before their first label. They are not cut.

        Raises:
            InputError: the tokenizer or its chat template cannot give the tokens.
        """
        is_chat = "messages" in row
        text = (
            chat.asked(row["messages"], self.tokenizer)
            if is_chat
            else row["prompt" if "prompt" in row else "text"]
        )
        length = len(text.rstrip(SPACES))
        ids, offsets = self._tokens(text + LETTER * text[-1:].isspace(), special=not is_chat)
        before = [token for token, (_, end) in zip(ids, offsets, strict=True) if end <= length]
        return Asked(before, text[length:])

    def _completed(self, prompt: str, completion: str) -> tuple[list[int], list[int]]:
        """Ids and labels of a prompt and its completion."""
        text = prompt + completion
        ids, labels = self._labelled(text, [Span(len(prompt), len(text), len(text))], special=True)
        ids = self._ended(ids)
        return ids, [*labels[: len(ids) - 1], ids[-1]]

    def _labelled(self, text: str, spans: list[Span], *, special: bool) -> tuple[list[int], list[int]]:
        """Ids and labels of a text of which the spans are learned; a long text is cut at its beginning."""
        surplus = max(len(text) - CHARACTERS * self.max_tokens, 0)
        text, spans = text[surplus:], [Span(*(max(place - surplus, 0) for place in span)) for span in spans]
        ids, offsets = self._tokens(text, special=special)
        begins = [len(text[: span.begin].rstrip(SPACES)) for span in spans]
        labels, before = [], 0
        for token, (start, end) in zip(ids, offsets, strict=True):
            # some tokenizers leave white space out of a token's place
            start, before = min(start, before), end
            place = bisect_left(begins, end) - 1
            learned = place >= 0 and _within(start, end, spans[place])
            labels.append(token if learned else IGNORED)
        return ids, labels

    def _tokens(self, text: str, *, special: bool = True) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of a text, without an end that the tokenizer adds, and the characters each stands for.

        special: add what the tokenizer puts before a text.
        """
        if not self.tokenizer.is_fast:
            raise InputError(
                f"the model's tokenizer ({type(self.tokenizer).__name__}) does not tell which characters a token "
                "stands for, so what is learned cannot be told apart: use a model with a tokenizer.json"
            )
        encoded = self.tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
        ids, offsets = encoded.input_ids, encoded.offset_mapping
        if special and len(ids) > 1 and ids[-1] == self.tokenizer.eos_token_id and offsets[-1] == (0, 0):
            ids, offsets = ids[:-1], offsets[:-1]
        return self._checked(ids), offsets

    def _checked(self, ids: list[int]) -> list[int]:
        """The ids, if the model has them all."""
        if max(ids, default=0) >= self.vocabulary:
            raise InputError(
                f"the model's tokenizer makes token {max(ids)} of a row, but its embedding has {self.vocabulary} "
                "rows: use the tokenizer that the checkpoint was trained with, or a checkpoint that was resized for it"
            )
        return ids

    def _ended(self, ids: list[int]) -> list[int]:
        """The ids with one end-of-text token."""
        end = self.tokenizer.eos_token_id
        if end is None:
            raise InputError(
                "the model's tokenizer has no end-of-text token (eos_token), so it cannot learn where a text ends: "
                "name the token in tokenizer_config.json, or use rows of messages"
            )
        while ids and ids[-1] == end:
            ids = ids[:-1]
        return self._checked([*ids, end])


def _pair(row: Row) -> tuple[str, str]:
    """Prompt and completion of a row; a label is written after its text."""
    return (row["prompt"], row["completion"]) if "prompt" in row else (row["text"], f" {row['label']}")


def _within(start: int, end: int, span: Span) -> bool:
    """Whether a token has characters of the span's content, or none but of what closes the span."""
    return start < span.content_end or (start < span.end and end <= span.end)
