"""A server's imports without torch: tokenizer and chat template work, and torch can be imported afterwards."""

import json
import subprocess
import sys

from edge_runtime.compat.without_torch import without_torch

PROGRAM = """
import json, sys
from pathlib import Path
from edge_runtime.compat.without_torch import without_torch
with without_torch():
    from edge_runtime.serving import onnx_engine, process
    from edge_runtime.compat.fast_tokenizer import load
from edge_runtime.trainer.chat import render_jinja_template
tokenizer = load(Path(sys.argv[1]))
text = render_jinja_template([[{"role": "user", "content": "hi"}]], chat_template=sys.argv[2])[0][0]
print(json.dumps([tokenizer("hi").input_ids, text, sorted({"torch", "PIL"} & {*sys.modules})]))
"""
TEMPLATE = "{% for turn in messages %}{{ turn['content'] }}!{% endfor %}"


def test_a_tokenizer_and_a_template_work_without_torch(tiny_facts):
    command = [sys.executable, "-c", PROGRAM, tiny_facts.folder, TEMPLATE]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    ids, text, present = json.loads(process.stdout)
    assert ids and (text, present, process.stderr) == ("hi!", [], "")


def test_nothing_changes_where_transformers_is_imported():
    import torch
    import transformers

    with without_torch():
        assert sys.modules["torch"] is torch and sys.modules["transformers"] is transformers
