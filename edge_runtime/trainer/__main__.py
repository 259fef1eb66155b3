"""The trainer process: does one job, writes its result, and ends, so that its memory returns.

python -m edge_runtime.trainer FOLDER              runs FOLDER/job.json; JSON lines on stdout
python -m edge_runtime.trainer FOLDER --attended   the same, and ends when standard input is closed
python -m edge_runtime.trainer --baseline          prints the runtime baseline in bytes
"""

import os
import sys
import threading
from pathlib import Path

from edge_runtime.compat.lean_imports import lean_imports

with lean_imports():
    import msgspec
    import torch
    from edge_kernels import apply
    from transformers import LlamaConfig, LlamaForCausalLM

    from edge_runtime.adapters import attach
    from edge_runtime.errors import EdgeError, InputError, MemoryShortError
    from edge_runtime.methods import fedit
    from edge_runtime.models import structure
    from edge_runtime.settings import Adapter, Training
    from edge_runtime.trainer.base import Bases
    from edge_runtime.trainer.examples import Example
    from edge_runtime.trainer.job import Progress
    from edge_runtime.trainer.meter import Meter
    from edge_runtime.trainer.objectives import evaluate
    from edge_runtime.trainer.run import run
    from edge_runtime.trainer.step import Learner, RoundSettings


def main() -> int:
    """Run the command; where it fails, one sentence on stderr and an exit code."""
    if sys.argv[1:] == ["--baseline"]:
        sys.stdout.write(f"{baseline_bytes()}\n")
        return 0
    if "--attended" in sys.argv[2:]:
        threading.Thread(target=_end_with_stdin, daemon=True).start()
    try:
        run(Path(sys.argv[1]), Bases(), _say)
    except EdgeError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    except (torch.OutOfMemoryError, MemoryError) as error:
        sys.stderr.write(f"{MemoryShortError(f'out of memory: {str(error).partition(chr(10))[0]}')}\n")
        return MemoryShortError.exit_code
    except OSError as error:
        sys.stderr.write(f"{InputError(f'cannot read or write what the round needs: {error}')}\n")
        return InputError.exit_code
    return 0


def _say(progress: Progress) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(progress) + b"\n")
    sys.stdout.buffer.flush()


def _end_with_stdin() -> None:
    """End this process when the agent, which holds the other end of the pipe, has ended."""
    # unbuffered: a lock of sys.stdin held here would block a normal exit
    os.read(0, 1)
    os._exit(1)


def baseline_bytes() -> int:
    """Peak resident bytes of a trainer whose model is negligible.

    That is the libraries, and the code pages that only a training step loads.
    """
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    settings = RoundSettings(Training(steps=1, rows_a_step=1), slices=[(0,)])
    examples = [Example([1] * 16, [1] * 16)]
    meter = Meter("cpu")
    with meter.phase("train"):
        for dtype in (torch.float32, torch.bfloat16):
            model = LlamaForCausalLM(config).to(dtype).eval().requires_grad_(False)
            adapter = attach.attach(model, (0,), Adapter(), fedit.METHOD, seed=0)
            apply(model, structure.modules(model))
            Learner(model, adapter, examples, settings).step(1)
            evaluate(model, adapter, examples, 1)
    return meter.peak_bytes


if __name__ == "__main__":
    sys.exit(main())
