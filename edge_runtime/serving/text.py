"""Between text and tokens: prompts, chats, and an answer's text as its tokens come."""

from collections.abc import Sequence as Ids
from pathlib import Path
from typing import Any

from edge_runtime.compat.fast_tokenizer import load
from edge_runtime.errors import InputError
from edge_runtime.models.facts import Facts
from edge_runtime.trainer.ends import answer_ends
from edge_runtime.trainer.tokens import Asked, Tokenization

HALF = "\ufffd"  # stands for bytes that are no whole character yet
LEAD = 8  # tokens before the answer that decide how its first token is written
LONGEST = 4  # bytes of a character, and so tokens that may wait for its end


class Language:
    """A model's tokenizer and chat template, and the tokens that end an answer."""

    def __init__(self, facts: Facts) -> None:
        self.tokenizer: Any = load(Path(facts.folder))
        self._how = Tokenization(self.tokenizer, facts.vocabulary, facts.positions, labels={})
        self.ends = answer_ends(facts, self.tokenizer)

    def prompt(self, text: str) -> Asked:
        """A text to go on with, as training has it before a completion."""
        return self._how.asked({"prompt": text})

    def chat(self, messages: list[dict[str, str]]) -> Asked:
        """A chat up to the assistant's answer, as training has it.

        Raises:
            InputError: the model has no chat template, or its template refuses the messages.
        """
        if not self.tokenizer.chat_template:
            raise InputError(
                "the model has no chat template, so it cannot answer a chat: give it a text to go on with"
            )
        return self._how.asked({"messages": messages})

    def labelled(self, text: str) -> list[int]:
        """Token ids of a text that a head labels, as training has them, cut at the model's positions."""
        return self._how.example({"text": text, "label": ""}).ids


class TextStream:
    """The text of an answer, piece by piece, up to the first of some stop strings."""

    def __init__(self, language: Language, prompt: Ids[int], stop: tuple[str, ...], spaces: str = "") -> None:
        """prompt: the token ids before the answer. spaces: that the answer begins with, and are left out."""
        self._spaces = spaces
        self._tokenizer, self._stop = language.tokenizer, stop
        self._ids = list(prompt[-LEAD:])
        self._first, self._whole = 0, len(self._ids)  # tokens that decide spaces, and tokens that are written
        self._held = ""  # text that may be the beginning of a stop string
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that a further token makes certain, without half a character."""
        self._ids.append(token)
        before = self._decode(self._ids[self._first : self._whole])
        text = self._decode(self._ids[self._first :])
        if text.endswith(HALF) and len(self._ids) - self._whole < LONGEST:
            return ""
        self._first, self._whole = self._whole, len(self._ids)
        return self._release(self._without_spaces(text[len(before) :]))

    def rest(self) -> str:
        """What was held back for a stop string that did not come."""
        held, self._held = self._held, ""
        return held

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def _without_spaces(self, text: str) -> str:
        while self._spaces and text:
            if text[0] != self._spaces[0]:
                self._spaces = ""
            else:
                text, self._spaces = text[1:], self._spaces[1:]
        return text

    def _release(self, text: str) -> str:
        text = self._held + text
        places = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        if places:
            self.stopped, self._held = True, ""
            return text[: min(places)]
        held = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """Characters at the text's end that begin a stop string."""
    return next(
        (size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0
    )
