"""The demo's private data: spoken home commands and the JSON action of each, one domain a device.

    prompt      Command: could you start the water boiler\\nAction:
    completion  {"kettle": "on"}

A command names a thing by any of its everyday words, and the action names the thing by its key in
DOMAINS. So the words of a domain must be learned from that domain's rows. Devices have in common:
wording, polite openings, verbs, the JSON form, and the things in COMMON (lights, music, ...).
"""

import hashlib
import json
import random
from pathlib import Path
from typing import NamedTuple

from edge_runtime.settings import read_toml

Words = dict[str, list[str]]

_VOCABULARY = read_toml(Path(__file__).with_name("commands.toml"), "the demo's vocabulary")
DOMAINS: dict[str, Words] = _VOCABULARY["domains"]  # of the device with the largest budget first
COMMON: Words = _VOCABULARY["common"]
PATTERNS: Words = _VOCABULARY["patterns"]  # spoken forms by action
OPENINGS = ("", "please ", "could you ", "hey, ", "would you ", "I want you to ", "can you ", "now ")
COMMON_SHARE = 0.2  # of a device's rows
DRAWS_IN_VAIN = 2000  # draws without a new command after which the generator counts as exhausted


class DomainRows(NamedTuple):
    """One device's data; the three lists share no prompt."""

    train: list[dict[str, str]]
    held_out: list[dict[str, str]]  # of the device's own domain
    others_held_out: list[dict[str, str]]  # of the other domains


def rows(domain: str, train: int, held_out: int, seed: int) -> DomainRows:
    """Draw one device's rows. No device's train rows hold a command that is held out from any.

    Args:
        domain: one of DOMAINS.
        train: rows to train on, of the domain's things and the common ones.
        held_out: distinct rows in each held-out list; the other domains have equal shares.
        seed: equal seeds give equal rows on every machine.

    Raises:
        KeyError: the domain is not one of DOMAINS.
        ValueError: the generator does not know that many distinct commands.
    """
    draw = random.Random(f"{seed}/{domain}")
    train_rows = _draw(draw, DOMAINS[domain], COMMON_SHARE, train, held_out=False)
    held_out_rows = _draw(draw, DOMAINS[domain], COMMON_SHARE, held_out, held_out=True)
    others = [words for name, words in DOMAINS.items() if name != domain]
    others_rows = []
    for number, words in enumerate(others):
        share = held_out // len(others) + (number < held_out % len(others))
        others_rows += _draw(draw, words, 0.0, share, held_out=True)
    return DomainRows(train_rows, held_out_rows, others_rows)


def _draw(
    draw: random.Random, vocabulary: Words, common: float, n: int, *, held_out: bool
) -> list[dict[str, str]]:
    drawn: dict[str, dict[str, str]] = {}  # by prompt
    in_vain = 0
    while len(drawn) < n and in_vain < DRAWS_IN_VAIN:
        row = _row(draw, COMMON if draw.random() < common else vocabulary)
        prompt = row["prompt"]
        in_vain += 1
        # one command in five is held out, by its digest, so that all devices agree on which
        if (hashlib.sha256(prompt.encode()).digest()[0] % 5 == 0) == held_out and prompt not in drawn:
            drawn[prompt] = row
            in_vain = 0
    if len(drawn) == n:
        return list(drawn.values())
    raise ValueError(
        f"asked for {n} distinct commands, the generator ran out at {len(drawn)}: ask for fewer rows"
    )


def _row(draw: random.Random, vocabulary: Words) -> dict[str, str]:
    name = draw.choice(sorted(vocabulary))
    action = draw.choice(sorted(PATTERNS))
    value = draw.randrange(5, 100, 5)
    spoken = draw.choice(OPENINGS) + draw.choice(PATTERNS[action]).format(
        thing=draw.choice(vocabulary[name]), value=value
    )
    completion = json.dumps({name: action.format(value=value)})
    return {"prompt": f"Command: {spoken}\nAction:", "completion": f" {completion}"}
