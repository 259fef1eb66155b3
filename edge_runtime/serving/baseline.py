"""Prints the bytes of a server in ONNX Runtime that has no model.

python -m edge_runtime.serving.baseline
"""

import sys

import psutil

from edge_runtime.compat.without_torch import without_torch

with without_torch():
    from edge_runtime.serving import onnx_engine, process  # noqa: F401

if __name__ == "__main__":
    sys.stdout.write(f"{psutil.Process().memory_info().rss}\n")
