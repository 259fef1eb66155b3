"""Frames of an adapter from the frozen layer's own leading singular vectors: W ≈ Σ_i σ_i u_i v_iᵀ, A's rows v_i / √3, B's columns
u_i / √3, as long as drawn ones are.

They are what a device of the same model finds too, so they never travel; each v_i points where its largest value is positive.
Vectors of nearly equal σ may differ between machines, and all do between weight formats. The whole decomposition is made of
each matrix whenever an adapter is attached: 0.1 s for one of 576 x 1,536, but minutes for the largest there are.
Source: the idea is that of Bałazy et al. 2024, arXiv 2405.17604 (LoRA-XS), who scale one of the frames by σ.
"""

import math

import torch
from edge_kernels import Packed, expand


@torch.no_grad()
def frames(
    weight: torch.Tensor | Packed, rank: int, *, transposed: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """A (rank, in) and B (out, rank) in float32; where the layer is narrower than that, zero beyond.

    Args:
        weight: (out, in). transposed: it is (in, out) instead.
    """
    W = expand(weight, torch.float32) if isinstance(weight, Packed) else weight.float()
    W = W.T if transposed else W
    wide = W.shape[0] <= W.shape[1]
    side = W if wide else W.T
    _, vectors = torch.linalg.eigh(side @ side.T)  # in rising order, of the shorter side
    first = vectors.flip(1)[:, :rank].T
    second = torch.nn.functional.normalize(first @ side, dim=1)
    u, v = (first, second) if wide else (second, first)
    signs = v.gather(1, v.abs().argmax(1, keepdim=True)).sign()
    A, B = (torch.zeros(rank, W.shape[1], device=W.device), torch.zeros(W.shape[0], rank, device=W.device))
    A[: len(v)], B[:, : len(u)] = signs * v / math.sqrt(3), (signs * u).T / math.sqrt(3)
    return A, B
