"""Writes train.jsonl and test.jsonl: spoken commands, labelled by what they ask for."""

import json
import sys
from itertools import product
from pathlib import Path

THINGS = ("oven", "kettle", "lamp", "radio", "fan", "heater", "pump", "gate")
COMMANDS = {
    "on": ("turn on the {}", "start the {}", "switch the {} on", "power up the {}"),
    "off": ("turn off the {}", "stop the {}", "switch the {} off", "shut down the {}"),
    "louder": ("make the {} louder", "turn up the {}", "raise the {}", "more of the {}"),
    "quieter": ("make the {} quieter", "turn down the {}", "lower the {}", "less of the {}"),
    "state": ("is the {} running", "how is the {}", "check the {}", "what does the {} do now"),
    "delay": ("start the {} later", "wait with the {}", "hold the {} for a while", "delay the {}"),
}

folder = Path(sys.argv[1])
folder.mkdir(parents=True, exist_ok=True)
for name, things in (("train", THINGS[:6]), ("test", THINGS[6:])):
    rows = [
        {"text": pattern.format(thing), "label": label}
        for label, patterns in COMMANDS.items()
        for pattern, thing in product(patterns, things)
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
