"""Frames of an adapter from the frozen layer's own leading singular vectors.

    W ≈ Σ_i σ_i u_i v_iᵀ        row i of A: v_i / √3      column i of B: u_i / √3

The factor 1 / √3 makes them as long as drawn ones. Each v_i points where its largest value is
positive. A device of the same model finds the same frames, so they never travel. Vectors of nearly
equal σ may differ between machines, and all vectors differ between weight formats. Every attach
decomposes each matrix: 0.1 s for one of 576 x 1,536, minutes for the largest.
Source: the idea is that of Bałazy et al. 2024, arXiv 2405.17604 (LoRA-XS), who scale one frame by σ.
"""

import math

import torch
from edge_kernels import Packed, expand


@torch.no_grad()
def frames(weight: torch.Tensor | Packed, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A (rank, in) and B (out, rank) of a weight (out, in), in float32.

    Where the layer is narrower than the rank, the rows and columns beyond are zero.
    """
    W = expand(weight, torch.float32) if isinstance(weight, Packed) else weight.float()
    # the smaller of W Wᵀ and Wᵀ W gives one side, and W the other
    wide = W.shape[0] <= W.shape[1]
    side = W if wide else W.T
    _, vectors = torch.linalg.eigh(side @ side.T)  # of the shorter side, σ rising
    near = vectors.flip(1)[:, :rank].T
    far = torch.nn.functional.normalize(near @ side, dim=1)
    u, v = (near, far) if wide else (far, near)
    # a singular vector has no sign of its own; all machines have to choose the same
    signs = v.gather(1, v.abs().argmax(1, keepdim=True)).sign()
    A, B = (torch.zeros(rank, W.shape[1], device=W.device), torch.zeros(W.shape[0], rank, device=W.device))
    A[: len(v)], B[:, : len(u)] = signs * v / math.sqrt(3), (signs * u).T / math.sqrt(3)
    return A, B
