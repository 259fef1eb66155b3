"""`edge-runtime generate`: text from a model with what was learned."""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from edge_runtime.cli import options, served
from edge_runtime.errors import InputError

if TYPE_CHECKING:
    from edge_runtime.serving.answer import Piece
    from edge_runtime.trainer.tokens import Asked


@click.command("generate")
@served.base
@served.backend
@options.context
@click.option(
    "--prompt", metavar="TEXT", help="Text to go on with; default: standard input, if it is no terminal."
)
@click.option("--chat", is_flag=True, help="Talk in the model's chat template, a line a turn, until Ctrl-D.")
@click.option("--max-tokens", type=click.IntRange(1), default=256, show_default=True, help="Of an answer.")
@click.option(
    "--temperature",
    type=click.FloatRange(0, 2),
    default=0.0,
    show_default=True,
    help="0 takes the likeliest token each time; larger values vary more.",
)
@click.option(
    "--top-p",
    type=click.FloatRange(0, 1, min_open=True),
    default=1.0,
    show_default=True,
    help="Draw from the likeliest tokens, which together have this probability.",
)
@click.option("--seed", type=click.IntRange(0), help="Makes a temperature above 0 repeatable.")
def command(
    base: served.ServedBase, context: int, prompt: str | None, chat: bool, max_tokens: int, **values: Any
) -> None:
    """Write text with a model and what was learned on it.

    Goes on with a prompt, or answers in a chat.
    """
    if prompt is None and not chat:
        if sys.stdin.isatty():
            raise InputError(
                "there is nothing to go on with: give --prompt, --chat, or a text on standard input"
            )
        prompt = served.typed(sys.stdin.read).removesuffix("\n")
    elif prompt is not None:
        prompt = served.typed(partial(str, prompt))
    read, machine = base.read(), base.machine()
    facts, learned = base.on_base(read)
    room = _room(min(context, facts.positions), max_tokens)
    base.tell_loading(facts)
    with base.imports():
        from edge_runtime.serving.answer import Question, answer
        from edge_runtime.serving.backends import load
        from edge_runtime.serving.text import Language
        from edge_runtime.trainer.tokens import CHARACTERS

    if len(prompt or "") > CHARACTERS * room:  # its tokens would take much memory
        raise InputError(
            f"the prompt has {len(prompt or '')} characters, which cannot fit the {room} tokens that the context leaves for "
            "it: shorten the prompt"
        )
    engine = load(base.backend, facts, learned, base.weights, machine)
    language = Language(facts)
    room = _room(min(context, engine.positions), max_tokens)

    def write(asked: "Asked") -> Iterator["Piece"]:
        ids, spaces = asked
        if not 1 <= len(ids) <= room:
            raise InputError(
                f"the prompt has {len(ids)} tokens, but has to be 1 to {room}, the context without the {max_tokens} "
                "tokens of the answer: change --max-tokens or --context"
            )
        return answer(engine, language, Question(ids, max_tokens, spaces=spaces, **values))

    if chat:
        _chat(lambda messages: write(language.chat(messages)), prompt)
    else:
        _show(write(language.prompt(prompt or "")))


def _room(context: int, max_tokens: int) -> int:
    """Tokens of a prompt at most; raises InputError where an answer leaves none."""
    if context <= max_tokens:
        raise InputError(
            f"an answer of {max_tokens} tokens leaves no room for a prompt in a context of {context}: lower "
            "--max-tokens"
        )
    return context - max_tokens


def _chat(write: Callable[[list[dict[str, str]]], Iterator["Piece"]], prompt: str | None) -> None:
    """A turn a line, until the input ends. prompt: the first turn, in place of a line."""
    messages: list[dict[str, str]] = []
    while True:
        if prompt is None:
            click.echo("> " * sys.stdin.isatty(), nl=False)
            prompt = served.typed(sys.stdin.readline)
            if not prompt:
                return
        if prompt.strip():
            messages.append({"role": "user", "content": prompt.strip()})
            messages.append({"role": "assistant", "content": _show(write(messages))})
        prompt = None


def _show(pieces: Iterator["Piece"]) -> str:
    """Print an answer as it comes; returns its text."""
    text = ""
    for piece in pieces:
        click.echo(piece.text, nl=False)
        text += piece.text
    click.echo()
    return text
