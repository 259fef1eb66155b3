"""fedadapter: branches between A and B, by a device's rank, each averaged over its holders.

    y = W x + scale · B C A x        C = I + Σ_{j <= tier} V_j U_j
    A, B     their mean inside a model class, as in fedit; of unequal ranks as in unequal.py
    U, V     of branch j, one pair for all layers at about the same relative depth: the mean over
             the branch's holders in the whole fleet

The form of heterotune without gates, and the plain mean instead of an alignment of conflicts.
Source: HeteroTune's first version, arXiv 2411.16796v1, describes a multi-branch aggregator across
models; the equations are ours.
"""

from edge_runtime.methods.fedit import holders_mean
from edge_runtime.methods.heterotune import HeteroTune
from edge_runtime.methods.interface import AtLeastOne, Method, MethodSettings


class FedAdapter(MethodSettings, frozen=True):
    """Settings of fedadapter."""

    branches: AtLeastOne = 2  # at most
    width: AtLeastOne = 8  # rows of a branch
    stages: AtLeastOne = 4  # bins of relative depth that share branches
    across: bool = True  # U and V are shared between models

    def method(self) -> Method:
        """The method with these settings."""
        gated = HeteroTune(self.branches, self.width, self.stages, across=self.across).method()
        return gated._replace(
            name="fedadapter",
            factors={name: factor for name, factor in gated.factors.items() if name != "g"},
            merges={**gated.merges, "stages": holders_mean},
            settings=self,
        )


METHOD = FedAdapter().method()
