"""fedadapter: branches between A and B, as many as a device's tier has room for, each averaged over the devices that hold it.

    y = W x + scale · B C A x        C = I + Σ_{j <= tier} V_j U_j
    A, B     as in fedit: their mean inside a model class
    U, V     of branch j, one pair for all layers at about the same relative depth, across the fleet: the mean over holders

What heterotune became: the same form without gates, and the plain mean instead of an alignment of conflicts. A device's tier
is what its rank has room for. Known of it (HeteroTune's first version, arXiv 2411.16796v1) is that it is a multi-branch
aggregator across models; the equations are ours.
"""

from collections.abc import Mapping
from typing import Any

import msgspec

from edge_runtime.methods import heterotune
from edge_runtime.methods.fedit import holders_mean
from edge_runtime.methods.interface import AtLeastOne, Merge, Method


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """branches: at most, of width rows each. stages: bins of relative depth that share branches. across: between models."""

    branches: AtLeastOne = 2
    width: AtLeastOne = 8
    stages: AtLeastOne = 4
    across: bool = True


def core(factors: Mapping[str, Any], _: float) -> Any:
    """C (r, r) of U (tier · width, r) and V (r, tier · width), which are torch's."""
    import torch

    U, V = factors["U"], factors["V"]
    return torch.eye(len(V), device=U.device) + V @ U


def method(settings: Settings) -> Method:
    """The method with these settings."""
    shared = heterotune.Settings(settings.branches, settings.width, settings.stages, "off", settings.across)
    mixture = heterotune.method(shared)
    factors = {name: factor for name, factor in mixture.factors.items() if name != "g"}
    merges: dict[str, Merge] = {"layers": holders_mean, "stages": holders_mean}
    return mixture._replace(name="fedadapter", factors=factors, merges=merges, core=core)


METHOD = method(Settings())
