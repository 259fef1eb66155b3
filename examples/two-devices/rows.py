"""Writes the rows of two devices: a kitchen and a workshop, each with things of its own."""

import json
import sys
from pathlib import Path

THINGS = {
    "kitchen": ("oven", "kettle", "fridge", "toaster", "hob", "dishwasher"),
    "workshop": ("drill", "lathe", "compressor", "bench saw", "charger", "sander"),
}
COMMANDS = {
    "turn on the {}": "on",
    "switch the {} on": "on",
    "turn off the {}": "off",
    "switch the {} off": "off",
}

folder = Path(sys.argv[1])
folder.mkdir(parents=True, exist_ok=True)
for device, things in THINGS.items():
    rows = [
        {"prompt": f"Command: {command.format(thing)}\nAction:", "completion": f" {thing} {action}"}
        for thing in things
        for command, action in COMMANDS.items()
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / f"{device}.jsonl").write_text(lines, encoding="utf-8")
