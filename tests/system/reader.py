"""Reads a page as a newcomer does: writes its files, types its commands in order, compares what they print.

A page is a list of steps. CONTRIBUTING.md tells authors how a page says what a step is.
"""

import os
import queue
import re
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from fleet import Patience

FENCE = re.compile(r' *```(?P<language>\w*)(?: title="(?P<title>[^"]+)")?')
COMMENT = re.compile(r" *<!-- (?P<word>[a-z ]+)(?:: (?P<value>.+))? -->")
COMMANDS, OUTPUT = "sh", "text"
EXCERPTS = {"toml", "json", "python", "mermaid"}  # to look at only
MARKS = {"keeps running", "not run", "long form"}  # say something of the block below
ACTS = {"on", "stop"}  # stand for themselves
TIMEOUT_S = 60.0  # without a word; as many again for as long as processes work, see Patience

# Boxes and bars of tables, and figures that differ from run to run: sizes, seconds, shares, decimals.
DRAWING = re.compile(r"[\u2500-\u259f]")
NUMBER = r"(?<![\w.])-?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?"
FIGURES = (
    (re.compile(rf"{NUMBER}(?:(?: /| of) {NUMBER})*\s?(?:[KMG]i)?B\b"), "SIZE"),
    (re.compile(rf"{NUMBER}(?= (?:s|bytes)\b)|{NUMBER}(?=\s?%)"), "N"),
    (re.compile(r"(?<![\w.])-?\d+\.\d+(?![\w.])"), "N"),
)


class PageError(AssertionError):
    """A page says something that is not so, or says it in a form that nobody can check."""


@dataclass(frozen=True)
class Step:
    """What a reader does next.

    kind: file, run, start, stop, on; or of a block that is left out: `not run`, `long form`.
    """

    kind: str
    page: str
    line: int
    text: str = ""  # commands, or a file's content
    name: str = ""  # of a file, a terminal or a machine; the reason of a block that is not run
    shown: str | None = None  # what the page shows below the commands

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"


def steps(page: Path) -> list[Step]:
    """The steps of a page; raises PageError where a block cannot be told to be one thing or another."""
    found: list[Step] = []
    mark: Step | None = None  # a comment that waits for its block
    previous = None  # the language of the last block, while only words stand between
    for line, words, block in _parts(page):
        here = Step("", _name(page), line)
        if block is None:
            comment = COMMENT.fullmatch(words)
            kind, name = (comment["word"], comment["value"] or "") if comment else ("", "")
            _require(
                kind in MARKS | ACTS and mark is None, here, f"nobody knows what to do with {words.strip()}"
            )
            _require(bool(name) == (kind != "long form"), here, f"`{kind}` lacks its word after a colon")
            if kind in ACTS:
                found.append(replace(here, kind=kind, name=name))
                previous = None
            else:
                mark = replace(here, kind=kind, name=name)
            continue
        fence = FENCE.fullmatch(words)
        _require(
            fence is not None and fence["language"] != "", here, "a block says its language, as in ```sh"
        )
        assert fence is not None
        language, title = fence["language"], fence["title"]
        if language == OUTPUT and not title:
            _require(
                previous == COMMANDS and mark is None, here, "output stands below the commands that print it"
            )
            found[-1] = replace(found[-1], shown=block)
        elif language == COMMANDS or title:
            kind, name = ("file", title) if title else ("run", "")
            if mark:
                kind, name = (mark.kind, mark.name) if mark.kind != "keeps running" else ("start", mark.name)
            found.append(replace(here, kind=kind, name=name, text=block))
        else:
            _require(language in EXCERPTS, here, f"nobody knows what to do with a block of {language}")
            _require(mark is None, here, "only commands and files have a mark")
        mark, previous = None, language
    _require(mark is None, replace(mark or Step("", _name(page), 0)), "a mark without a block")
    return found


def _name(page: Path) -> str:
    return f"{page.parent.name}/{page.name}"


def _parts(page: Path) -> Iterator[tuple[int, str, str | None]]:
    """(line, comment, None) for each comment, (line, fence, content) for each block."""
    lines = page.read_text(encoding="utf-8").splitlines()
    number = 0
    while number < len(lines):
        first, line = number + 1, lines[number]
        if line.lstrip().startswith("```"):
            indent = len(line) - len(line.lstrip())
            end = next((n for n in range(first, len(lines)) if lines[n].strip() == "```"), None)
            _require(end is not None, Step("", _name(page), first), "a block without an end")
            assert end is not None
            yield first, line, "".join(text[indent:] + "\n" for text in lines[first:end])
            number = end
        elif line.lstrip().startswith("<!--"):
            yield first, line, None
        else:
            is_code = line.startswith("    ") and number > 0 and not lines[number - 1].strip()
            _require(
                not is_code, Step("", _name(page), first), "an indented block: write it between ``` lines"
            )
        number += 1


def _require(holds: bool, step: Step, reason: str) -> None:
    __tracebackhide__ = True  # pytest shows the page's line, not this file's
    if not holds:
        raise PageError(f"{step.where}: {reason}")


def agrees(shown: str, printed: str, *, whole: bool = True) -> bool:
    """Whether output has the words that a page shows: `...` is anything, a figure is any figure.

    whole: to its end; else only what has been printed so far is looked at.
    """
    pattern = r"\s*.*?\s*".join(re.escape(_shape(piece)) for piece in shown.split("..."))
    match = re.fullmatch if whole else re.match
    return match(pattern, _shape(printed), re.DOTALL) is not None


def _shape(text: str) -> str:
    text = DRAWING.sub(" ", text)
    for figure, word in FIGURES:
        text = figure.sub(word, text)
    return " ".join(text.split())


class Terminal:
    """A block of commands as a process; its lines are read as they come."""

    def __init__(self, commands: str, folder: Path, environment: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            ["bash", "-euo", "pipefail", "-c", commands],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # so that a signal reaches all that it has started
        )
        self.printed = ""
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def until(self, holds: Callable[[str], bool]) -> bool:
        """Read until it holds of what is printed; False: the output ended, or the time is over, before."""
        patience = Patience(TIMEOUT_S)
        while not holds(self.printed):
            try:
                line = self._lines.get(timeout=patience.left_s())
            except queue.Empty:
                if patience.left_s():
                    continue
                return False
            if line is None:
                self._lines.put(None)  # for whoever reads next
                return False
            self.printed += line
            patience = Patience(TIMEOUT_S)
        return True

    def end(self) -> int:
        """Read to the end; the exit code, that of a kill where the end does not come."""
        self.until(lambda _: False)
        with suppress(subprocess.TimeoutExpired):
            return self.process.wait(10)
        self.kill()
        return self.process.wait(10)

    def interrupt(self) -> int:
        """Ctrl-C; the exit code."""
        os.killpg(self.process.pid, signal.SIGINT)
        return self.end()

    def kill(self) -> None:
        """End whatever still runs of it."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)


class Reader:
    """Somebody who goes through pages one after another; close ends all that was started.

    Args:
        machine: makes the folder in which a machine's commands are typed.
        differences: what is other here than with a reader: pattern and replacement.
        long: whether also to type the blocks of the long form.
    """

    def __init__(
        self,
        machine: Callable[[str], Path],
        environment: dict[str, str],
        differences: dict[str, str],
        *,
        long: bool = False,
    ) -> None:
        self._machine, self._environment, self._long = machine, environment, long
        self._differences = differences
        self._machines: dict[str, Path] = {}
        self._open: dict[str, Terminal] = {}
        self._blocks: list[Terminal] = []
        self.said: dict[str, int] = {}  # exit codes of the terminals that were interrupted

    def read(self, page: Path) -> None:
        """Do what the page says; raises PageError with the page's line where it is not so."""
        __tracebackhide__ = True
        names = ["here"]
        for step in steps(page):
            if step.kind == "on":
                names = ["node", "device"] if step.name == "both" else [step.name]
                continue
            if step.kind == "not run" or (step.kind == "long form" and not self._long):
                continue
            for name in names:
                if name not in self._machines:
                    self._machines[name] = self._machine(name)
                self._do(step, self._machines[name])

    def _do(self, step: Step, folder: Path) -> None:
        __tracebackhide__ = True
        text, name = self._here(step.text), self._here(step.name)
        shown = None if step.shown is None else self._here(step.shown)
        if step.kind == "file":
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        elif step.kind == "stop":
            _require(name in self._open, step, f"no terminal {name} is open")
            self.said[name] = self._open.pop(name).interrupt()
        elif step.kind == "start":
            _require(name not in self._open, step, f"the terminal {name} is in use")
            _require(shown is not None, step, "a command that keeps running shows what to wait for")
            assert shown is not None
            self._open[name] = terminal = Terminal(text, folder, self._environment)
            seen = terminal.until(lambda printed: agrees(shown, printed, whole=False))
            _require(seen, step, _difference(text, shown, terminal.printed))
        else:
            self._blocks.append(block := Terminal(text, folder, self._environment))
            code = block.end()
            _require(code == 0, step, f"exit code {code}\n{_difference(text, shown, block.printed)}")
            correct = shown is None or agrees(shown, block.printed)
            _require(correct, step, _difference(text, shown, block.printed))

    def _here(self, text: str) -> str:
        for pattern, replacement in self._differences.items():
            text = re.sub(pattern, replacement, text)
        return text

    def close(self) -> None:
        """Ctrl-C in every open terminal, the last one first; then end whatever is left."""
        try:
            for name in list(self._open)[::-1]:
                self.said[name] = self._open.pop(name).interrupt()
        finally:
            for terminal in [*self._open.values(), *self._blocks]:
                terminal.kill()


def _difference(commands: str, shown: str | None, printed: str) -> str:
    told = "" if shown is None else f"\nthe page shows:\n{shown}"
    return f"{commands}{told}\nit printed:\n{printed}"
