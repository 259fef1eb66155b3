"""Every operator and a decoder layer beside their rivals, in one run on this machine: `python -m benchmarks.kernels`."""
