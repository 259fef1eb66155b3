"""What "right" means for an operator: as near to float64 truth as torch's own operations in the same dtype."""

import torch

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"


def relative_error(seen: torch.Tensor, truth: torch.Tensor) -> float:
    """Norm of the difference over the norm of the truth."""
    return float((seen.double() - truth).norm() / truth.norm().clamp_min(1e-300))


def assert_as_good_as(
    ours: list[torch.Tensor], torchs: list[torch.Tensor], truth: list[torch.Tensor]
) -> None:
    """Each error against float64 truth is at most twice what torch's own ops make in the same dtype, plus one rounding."""
    for one, two, true in zip(ours, torchs, truth, strict=True):
        assert (one.shape, one.dtype) == (two.shape, two.dtype)
        limit = 2 * relative_error(two, true) + torch.finfo(one.dtype).eps
        error = relative_error(one, true)
        assert error <= limit, f"relative error {error:.2e} over {limit:.2e}"
