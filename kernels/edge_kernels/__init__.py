"""Operators of low-memory fine-tuning: one file an operator, one autograd Function that states what it keeps."""

from edge_kernels.adapter_linear import adapter_linear
from edge_kernels.linear_cross_entropy import linear_cross_entropy

__all__ = ["adapter_linear", "linear_cross_entropy"]
