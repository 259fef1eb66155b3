"""Operators of low-memory fine-tuning.

An operator is a file or a folder; norms.py has two. The files state what is kept for backward.
"""

from edge_kernels.adamw8bit import AdamW8bit
from edge_kernels.adapter_linear import adapter_linear
from edge_kernels.apply import Modules, apply
from edge_kernels.attention import attention
from edge_kernels.checkpoint_block import Kept, checkpoint_block
from edge_kernels.gated_activation import gated_activation
from edge_kernels.in_tiles import in_tiles
from edge_kernels.linear_cross_entropy import LanguageHead, linear_cross_entropy
from edge_kernels.norms import layer_norm, rms_norm
from edge_kernels.packed_linear import packed_linear
from edge_kernels.quant import Packed, expand, expanded_rows, pack
from edge_kernels.rotary import rotary

__all__ = [
    "AdamW8bit",
    "Kept",
    "LanguageHead",
    "Modules",
    "Packed",
    "adapter_linear",
    "apply",
    "attention",
    "checkpoint_block",
    "expand",
    "expanded_rows",
    "gated_activation",
    "in_tiles",
    "layer_norm",
    "linear_cross_entropy",
    "pack",
    "packed_linear",
    "rms_norm",
    "rotary",
]
