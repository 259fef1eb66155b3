"""Benchmarks as commands: `make bench-round`, `make bench-peak`."""
