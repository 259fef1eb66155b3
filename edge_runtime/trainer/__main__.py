"""The trainer process: does one job, writes its result, and ends, so that all its memory returns to the device.

python -m edge_runtime.trainer FOLDER       runs FOLDER/job.json, progress as JSON lines on stdout
python -m edge_runtime.trainer --baseline   prints the runtime baseline: the peak of training a model of almost nothing
"""

import sys

from edge_runtime.trainer.lean import lean_imports

with lean_imports():
    from edge_runtime.trainer.run import main

if __name__ == "__main__":
    sys.exit(main())
