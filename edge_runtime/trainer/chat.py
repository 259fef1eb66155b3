"""Conversations in a model's chat template, and where the assistant's turns lie in them.

A conversation is rendered once, as a whole, up to the assistant's last turn. Where the template
marks the turns with {% generation %}, those are the turns, and the prompt to write the last one has
to be what stands before it, white space aside. Otherwise a turn is found in two steps:

    beginning   the rendering of the messages before it, with the prompt to answer them. The whole
                rendering has to begin with that: an answer is learned where it will be asked for.
    end         a mark after the turn's content shows where the content ends. Apart from the marks,
                the marked rendering has to be the whole rendering. What closes the last turn also
                closes each other turn that it follows.

So templates that write earlier turns differently from the last are read right, such as Qwen3's with
its empty reasoning, and those that leave reasoning out. A template that breaks either condition for
a conversation is refused.
"""

import re
from itertools import accumulate, takewhile
from typing import Any, NamedTuple

from transformers.utils.chat_template_utils import render_jinja_template

from edge_runtime.errors import InputError
from edge_runtime.trainer.data import words

GENERATION = re.compile(r"{%-?\s*generation\s*-?%}")
MARK = "\ufdd0"  # Unicode reserves this code point for use inside programs, so no text has it
INSTEAD = (
    "use prompt and completion rows, or mark the assistant's turns in the template with {% generation %}"
)

Messages = list[dict[str, str]]


class Span(NamedTuple):
    """A part of a text that is learned, such as an assistant's turn, in characters.

        <user>Are you there?</s><assistant>yes</s><user>...
                                           ^  ^   ^
                                      begin   content_end, end

    A token with any character of the content is learned, also where it goes on behind the content.
    Of what closes the turn a token is learned only if it ends with the turn: one that holds the
    beginning of the next turn is not the assistant's. Where nothing closes a part, such as a
    completion, both ends are equal.
    """

    begin: int
    content_end: int
    end: int


def turns(messages: Messages, tokenizer: Any) -> tuple[str, list[Span]]:
    """The rendering up to the assistant's last turn, and the assistant's turns in it.

    Raises:
        InputError: the model has no chat template, the template refuses the messages, or where
            their turns lie cannot be shown.
    """
    answers = [number for number, turn in enumerate(messages) if turn["role"] == "assistant"]
    messages = messages[: answers[-1] + 1]
    text, spans = _rendered(messages, tokenizer)
    if spans is not None:
        if not spans:
            raise InputError(
                "the model's chat template marks no assistant's turn in a conversation that has some"
            )
        _begin(text, messages[:-1], tokenizer, spans[-1][0])
        return text, [Span(begin, end, end) for begin, end in spans]
    begins = [_begin(text, messages[:number], tokenizer) for number in answers]
    ends = _content_ends(text, messages, answers, tokenizer)
    # a content ends behind the beginning of its turn and before the next turn
    places = [place for pair in zip(begins, ends, strict=True) for place in pair]
    if places != sorted(places):
        raise InputError(f"the model's chat template does not write messages in their order: {INSTEAD}")
    special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    found = []
    for number, begin, end in zip(answers, begins, ends, strict=True):
        closing = _closing(text[ends[-1] :], text[end:], special)
        if closing == 0 < len(text) - ends[-1] and messages[number].keys() - {"role", "content"}:
            raise InputError(
                "the model's chat template writes more of an assistant's message than its content, and where "
                f"that ends is not known: {INSTEAD}"
            )
        found.append(Span(begin, end, end + closing))
    return text, found


def asked(messages: Messages, tokenizer: Any) -> str:
    """The rendering of messages with the prompt to answer them; raises as `turns` does."""
    return _rendered(messages, tokenizer, add_generation_prompt=True)[0]


def _rendered(
    messages: Messages, tokenizer: Any, *, add_generation_prompt: bool = False
) -> tuple[str, list[tuple[int, int]] | None]:
    """The rendering, and the spans that the template marks; None: it marks none."""
    if not tokenizer.chat_template:
        raise InputError(
            "the model has no chat template, so it cannot learn from messages: use prompt and completion rows"
        )
    template = tokenizer.get_chat_template()
    marks = bool(GENERATION.search(template))
    try:
        texts, spans = render_jinja_template(
            [messages],
            chat_template=template,
            return_assistant_tokens_mask=marks,
            add_generation_prompt=add_generation_prompt,
            **tokenizer.special_tokens_map,
        )
    # a template may refuse roles or their order, with an error of its own
    except Exception as error:
        seen = ", ".join(words(turn["role"] for turn in messages))
        verbatim = str(error) in template  # else the sentence may quote a row
        reason = str(error) if verbatim else type(error).__name__
        raise InputError(
            f"the model's chat template refuses messages of the roles {seen}: {reason}"
        ) from error
    return texts[0], spans[0] if marks else None


def _begin(text: str, before: Messages, tokenizer: Any, marked: int = 0) -> int:
    """Where the answer to the messages before it begins; only white space may lie before its mark."""
    prompt = asked(before, tokenizer)
    if not text.startswith(prompt) or text[len(prompt) : marked].strip():
        raise InputError(
            "the model's chat template asks for an answer with another text than it writes before that answer in a "
            "conversation, so what is learned would not be what is asked: use prompt and completion rows, or a "
            "template that asks with all that it writes before an answer"
        )
    return len(prompt)


def _content_ends(text: str, messages: Messages, answers: list[int], tokenizer: Any) -> list[int]:
    """Where the contents of these messages end in the rendering."""
    marked, bare = list(messages), list(messages)
    for number in answers:
        content = messages[number]["content"]
        # the mark stands before white space at the end, which a template may strip
        text_end = len(content.rstrip())
        marked[number] = {**messages[number], "content": content[:text_end] + MARK + content[text_end:]}
        bare[number] = {**messages[number], "content": content[:text_end]}
    pieces = _rendered(marked, tokenizer)[0].split(MARK)
    if "".join(pieces) != text or len(pieces) != len(answers) + 1:
        raise InputError(
            f"the model's chat template changes the assistant's messages, so where they end is not known: {INSTEAD}"
        )
    ends = list(accumulate(len(piece) for piece in pieces[:-1]))
    if bare == messages or _rendered(bare, tokenizer)[0] == text:
        return ends
    spaces = (len(messages[number]["content"]) - len(bare[number]["content"]) for number in answers)
    return [end + space for end, space in zip(ends, spaces, strict=True)]


def _closing(tail: str, following: str, special: list[str]) -> int:
    """Characters of the text after a turn's content that close the turn.

    That is all that closes the last turn; or, where more closes the last turn, what both begin with
    up to a special token, and the white space after it.
    """
    if following.startswith(tail):
        return len(tail)
    pairs = zip(tail, following, strict=False)
    shared = "".join(left for left, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    length = max((shared.rfind(token) + len(token) for token in special if token in shared), default=0)
    return len(shared) - len(shared[length:].lstrip()) if length else 0
