"""Spoken home commands and the JSON action each stands for: the demo's private data, one domain a device.

    prompt      Command: could you start the water boiler\\nAction:
    completion  {"kettle": "on"}

A command names a thing by one of its everyday words; the action names it by its first one, so the words of a domain must
be learned from that domain's rows. Wording, polite openings, verbs and the JSON form are the same everywhere, and some
things (lights, heating, music) are at home in every domain: this is what devices have in common.
"""

import hashlib
import json
import random
from typing import NamedTuple

DOMAINS: dict[str, dict[str, tuple[str, ...]]] = {
    "kitchen": {
        "oven": ("oven", "baking oven"),
        "hob": ("hob", "cooktop", "stove"),
        "kettle": ("kettle", "water boiler"),
        "fridge": ("fridge", "refrigerator"),
        "dishwasher": ("dishwasher", "dish washer"),
        "coffee": ("coffee machine", "espresso maker"),
        "hood": ("extractor hood", "cooker fan"),
        "toaster": ("toaster", "toast maker"),
    },
    "garage": {
        "door": ("garage door", "roller door"),
        "charger": ("car charger", "wall box"),
        "compressor": ("air compressor", "tyre pump"),
        "bench": ("work bench", "saw table"),
        "freezer": ("chest freezer", "deep freezer"),
        "vacuum": ("shop vacuum", "dust collector"),
        "lift": ("car lift", "hoist"),
        "dryer": ("tumble dryer", "clothes dryer"),
    },
    "garden": {
        "sprinkler": ("sprinkler", "lawn sprinkler"),
        "mower": ("mower", "robot mower"),
        "pond": ("pond pump", "fountain"),
        "gate": ("garden gate", "side gate"),
        "greenhouse": ("greenhouse vent", "glass house"),
        "pool": ("pool heater", "swimming pool"),
        "grill": ("grill", "barbecue"),
        "drip": ("drip line", "flower bed hose"),
    },
}
COMMON: dict[str, tuple[str, ...]] = {
    "light": ("light", "lamp"),
    "heating": ("heating", "radiator"),
    "music": ("music", "speaker"),
    "camera": ("camera", "security camera"),
}
OPENINGS = ("", "please ", "could you ", "hey, ", "would you ", "I want you to ", "can you ", "now ")
PATTERNS: dict[str, tuple[str, ...]] = {  # by the action they mean
    "on": ("turn on the {thing}", "switch the {thing} on", "start the {thing}", "power up the {thing}"),
    "off": ("turn off the {thing}", "switch the {thing} off", "stop the {thing}", "shut down the {thing}"),
    "set {value}": (
        "set the {thing} to {value}",
        "put the {thing} at {value}",
        "change the {thing} to {value}",
    ),
    "on in {value}": ("start the {thing} in {value} minutes", "turn on the {thing} after {value} minutes"),
    "status": ("is the {thing} on", "check the {thing}", "how is the {thing} doing"),
}
COMMON_SHARE = 0.2  # of a device's rows
DRAWS_IN_VAIN = 2000  # without a new command among them, the generator has no more


class Rows(NamedTuple):
    """One device's data."""

    train: list[dict[str, str]]
    held_out: list[dict[str, str]]
    others_held_out: list[dict[str, str]]


def rows(domain: str, train: int, held_out: int, seed: int) -> Rows:
    """Draw one device's rows.

    Args:
        domain: one of DOMAINS; the others_held_out rows are drawn from the remaining ones, in equal parts.
        train: rows to train on, of the device's own domain and the common things.
        held_out: rows in each of the two held-out lists, all distinct.
        seed: equal seeds give equal rows on every machine.

    Returns:
        Rows whose lists share no prompt; a held-out command is in no device's train rows.

    Raises:
        KeyError: the domain is not one of DOMAINS.
        ValueError: the generator does not know that many distinct commands.
    """
    own = DOMAINS[domain]
    others = [things for name, things in DOMAINS.items() if name != domain]
    draw = random.Random(f"{seed}/{domain}")
    shares = [held_out // len(others) + (i < held_out % len(others)) for i in range(len(others))]
    return Rows(
        _draw(draw, own, COMMON_SHARE, train, held=False),
        _draw(draw, own, COMMON_SHARE, held_out, held=True),
        [
            row
            for things, n in zip(others, shares, strict=True)
            for row in _draw(draw, things, 0.0, n, held=True)
        ],
    )


def _draw(
    draw: random.Random, things: dict[str, tuple[str, ...]], common: float, n: int, *, held: bool
) -> list[dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    in_vain = 0
    while len(found) < n and in_vain < DRAWS_IN_VAIN:
        row = _row(draw, COMMON if draw.random() < common else things)
        in_vain += 1
        if _is_held_out(row["prompt"]) == held and row["prompt"] not in found:
            found[row["prompt"]] = row
            in_vain = 0
    if len(found) == n:
        return list(found.values())
    raise ValueError(
        f"asked for {n} distinct commands, the generator ran out at {len(found)}: ask for fewer rows"
    )


def _is_held_out(prompt: str) -> bool:
    """One command in five, by the command itself: no device of the fleet ever trains on a row that another is tested on."""
    return hashlib.sha256(prompt.encode()).digest()[0] % 5 == 0


def _row(draw: random.Random, things: dict[str, tuple[str, ...]]) -> dict[str, str]:
    name = draw.choice(sorted(things))
    action = draw.choice(sorted(PATTERNS))
    value = draw.randrange(5, 100, 5)
    spoken = draw.choice(OPENINGS) + draw.choice(PATTERNS[action]).format(
        thing=draw.choice(things[name]), value=value
    )
    completion = json.dumps({name: action.format(value=value)})
    return {"prompt": f"Command: {spoken}\nAction:", "completion": f" {completion}"}
