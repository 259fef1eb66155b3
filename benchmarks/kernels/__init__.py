"""Every operator beside its rivals on this machine: `python -m benchmarks.kernels`."""
