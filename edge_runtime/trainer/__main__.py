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

    from edge_runtime.errors import EdgeError, InputError, MemoryShortError
    from edge_runtime.trainer.base import Bases
    from edge_runtime.trainer.baseline import baseline_bytes
    from edge_runtime.trainer.job import Progress
    from edge_runtime.trainer.run import run


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


if __name__ == "__main__":
    sys.exit(main())
