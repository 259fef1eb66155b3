"""Trainer processes for tests: each is forked from one that has imported everything, which takes three seconds.

What a job writes, prints and ends with is that of `python -m edge_runtime.trainer FOLDER`. Its memory is not:
tests of memory start that command.
"""

import gc
import os
import subprocess
import sys
import traceback
from pathlib import Path

from edge_runtime.planning import processes


class Template:
    """A process that waits for folders of jobs and forks a trainer for each."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=processes.environment(),
            text=True,
        )

    def run(self, folder: Path) -> subprocess.CompletedProcess[bytes]:
        """Do the folder's job.json in a process of its own, as `python -m edge_runtime.trainer FOLDER` does."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{folder}\n")
        self._process.stdin.flush()
        code = int(self._process.stdout.readline())
        output = [(folder / name).read_bytes() for name in ("stdout", "stderr")]
        return subprocess.CompletedProcess(["edge_runtime.trainer", str(folder)], code, *output)

    def close(self) -> None:
        """End the process; it has no job then."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(1000)


def main() -> None:
    """Fork a trainer for each line of standard input, a folder; print its exit code."""
    from edge_runtime.trainer import __main__ as trainer

    gc.freeze()  # a trainer that collects its garbage would look at, and so copy, all that was imported
    for line in sys.stdin:
        folder = Path(line.rstrip("\n"))
        child = os.fork()
        if not child:
            for number, name in ((1, "stdout"), (2, "stderr")):
                os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            sys.argv = ["edge_runtime.trainer", str(folder)]
            code = 1
            try:
                code = trainer.main()
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
