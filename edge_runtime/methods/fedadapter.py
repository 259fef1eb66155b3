"""fedadapter: branches between A and B, by a device's rank, each averaged over its holders.

    y = W x + scale · B C A x        C = I + Σ_{j <= tier} V_j U_j
    A, B     their mean inside a model class, as in fedit; of unequal ranks as in unequal.py
    U, V     (m x r), (r x m) of branch j, one pair for all layers at about the same relative depth:
             the mean over the branch's holders in the whole fleet

All branches run. A device holds the first branches, as many as its rank has room for. U is drawn
and V starts at 0, so that C starts as the identity.
Source: HeteroTune's first version, arXiv 2411.16796v1, describes a multi-branch aggregator across
models; the equations are ours.
"""

from collections.abc import Mapping
from typing import Any

from edge_runtime.methods import unequal
from edge_runtime.methods.fedit import holders_mean
from edge_runtime.methods.interface import A, AtLeastOne, B, Factor, Method, MethodSettings, Scope
from edge_runtime.methods.lazy import torch


class FedAdapter(MethodSettings, frozen=True):
    """Settings of fedadapter."""

    branches: AtLeastOne = 2  # at most
    width: AtLeastOne = 8  # rows of a branch
    stages: AtLeastOne = 4  # bins of relative depth that share branches
    across: bool = True  # U and V are shared between models

    def method(self) -> Method:
        """The method with these settings."""
        scope: Scope = "fleet" if self.across else "class"
        U = Factor(("widths", "rank"), trained=True, shared=scope, start="drawn", of="stages")
        V = U._replace(axes=("rank", "widths"), start="zero")
        return Method(
            "fedadapter",
            {"A": A, "B": B, "U": U, "V": V},
            {"layers": unequal.mean, "stages": holders_mean},
            core=core,
            stages=self.stages,
            sizes=lambda rank: {"widths": max(1, min(self.branches, rank // self.width)) * self.width},
            unequal="refactored",
            settings=self,
        )


def core(factors: Mapping[str, Any], _: float) -> Any:
    """C (r, r) of U (branches · width, r) and V (r, branches · width)."""
    U, V = factors["U"], factors["V"]
    return torch.eye(len(V), device=U.device) + V @ U


METHOD = FedAdapter().method()
