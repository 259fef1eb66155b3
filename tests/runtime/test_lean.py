"""What a trainer process imports, and that nothing is missing from torch afterwards."""

import json
import subprocess
import sys

IMPORT = "from transformers import LlamaForCausalLM"
LEFT_OUT = ["torch._dynamo.eval_frame", "torch.distributed.tensor", "sympy"]
LEAN = f"from edge_runtime.training.lean import lean_imports\nwith lean_imports():\n    {IMPORT}"


def after(code, asked):
    program = f"{code}\nimport json, sys, torch\nprint(json.dumps({asked}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_compiler_and_distributed_tensors_are_left_out():
    loaded = f"[name for name in {LEFT_OUT} if name in sys.modules]"
    assert after(LEAN, loaded) == []
    assert after(IMPORT, loaded) == LEFT_OUT


def test_afterwards_both_are_there_for_who_needs_them():
    asked = "[torch.distributed.is_available(), torch.compile(lambda x: x + 1, backend='eager')(torch.ones(1)).item()]"
    assert after(LEAN, asked) == [True, 2.0]
