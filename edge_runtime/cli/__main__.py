"""`python -m edge_runtime.cli`: the command `edge-runtime`."""

from edge_runtime.cli import main

main()
