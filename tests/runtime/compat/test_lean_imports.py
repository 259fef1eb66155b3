"""What a trainer process imports, and that nothing is missing from torch afterwards."""

import json
import subprocess
import sys

import msgspec

IMPORT = "from transformers import LlamaForCausalLM"
LEFT_OUT = ["torch._dynamo.eval_frame", "torch.distributed.tensor", "sympy", "accelerate", "PIL"]
LEAN = f"from edge_runtime.compat.lean_imports import lean_imports\nwith lean_imports():\n    {IMPORT}"


def after(code, asked):
    program = f"{code}\nimport json, sys, torch\nprint(json.dumps({asked}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=1000)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


LOADED = f"[name for name in {LEFT_OUT} if name in sys.modules]"


def test_what_no_trainer_uses_is_left_out_and_there_afterwards_for_who_needs_it():
    compiled = "torch.compile(lambda x: x + 1, backend='eager')(torch.ones(1)).item()"
    modules = "__import__('accelerate').__name__, __import__('PIL').__name__"
    asked = f"[{LOADED}, torch.distributed.is_available(), {modules}, {compiled}]"
    assert after(LEAN, asked) == [[], True, "accelerate", "PIL", 2.0]
    assert after(IMPORT, LOADED) == LEFT_OUT


def test_loading_a_model_brings_none_of_it(tiny_facts, tmp_path):
    (tmp_path / "facts.json").write_bytes(msgspec.json.encode(tiny_facts))
    loaded = f"""
import msgspec
from edge_runtime.compat.lean_imports import lean_imports
with lean_imports():
    from edge_runtime.models import weights
    from edge_runtime.models.facts import Facts
    facts = msgspec.json.decode(open({str(tmp_path / "facts.json")!r}).read(), type=Facts)
    for form in ("float32", "q8_0"):
        weights.load(facts, facts.layers, form)
"""
    assert after(loaded, LOADED) == []
