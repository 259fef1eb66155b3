"""h2tune: a private A and B on each device, and between them a core from shared tensors.

    y = W x + scale · B C A x        C_l = I + T_l,  T_l = Σ_m P_l[m] S_m
    S    (depths x r x r) for each role: increments shared by the whole fleet; 0 at the start
    P_l  of layer l at relative depth d: linear interpolation between the `depths` points, plus a
         private D_l less its mean, so that P_l adds up to 1; trained
    A, B private

A device of lower rank holds the leading r x r of each S_m. The node averages each entry of S over
the devices that trained the entry, whichever model they have.

From the second round on each step has two passes, which separate the shared part from the task's
own:

    1  A, B and a head frozen:  CE + norm · N + keep · mean over layers of
                                KL(softmax T_l as the round started ‖ softmax T_l)
    2  S, P frozen:  CE + apart · KL(output of pass 1 ‖ output)

N is the mean norm of T_l; KL of outputs is the mean over labelled tokens or rows. In round 1 one
pass trains everything with CE + norm · N. `preset = "as-released"` sets the weight of the norm as
in the released code, 1 instead of 1e-3.

The released code, as we read it, exchanges nothing that was learned: the merged S is loaded under a
key that does not match, and the uploaded S is taken before training. Here S is trained through P by
autograd, and its increments travel. Two controls: `across = false` shares S inside the class only;
`core = "frozen"` draws S and does not train it.
Source: arXiv 2507.22633 names the parts and the three losses; the relation's start, the centred D,
the entry-wise mean and the coefficients are ours.
"""

from collections.abc import Mapping
from typing import Any, Literal

from edge_runtime.methods.fedit import holders_mean
from edge_runtime.methods.interface import (
    A,
    AtLeastOne,
    B,
    Factor,
    Method,
    MethodSettings,
    NotNegative,
    Pass,
    Product,
    Scope,
    Start,
)
from edge_runtime.methods.lazy import torch


class H2Tune(MethodSettings, frozen=True):
    """Settings of h2tune."""

    depths: AtLeastOne = 4  # points of relative depth that have a shared S
    norm: NotNegative = 1e-3  # weight of N in the loss
    keep: NotNegative = 1.0  # weight of the KL between cores
    apart: NotNegative = 1.0  # weight of the KL between outputs
    preset: Literal["ours", "as-released"] = "ours"
    across: bool = True  # S is shared between models
    core: Literal["trained", "frozen"] = "trained"

    def method(self) -> Method:
        """The method with these settings."""
        trained = self.core == "trained"
        scope: Scope = "fleet" if self.across else "class"
        start: Start = "zero" if trained else "drawn"
        factors = {
            "A": A._replace(shared="private"),
            "B": B._replace(shared="private"),
            "S": Factor(("depths", "rank", "rank"), trained, scope, start, of="stages"),
            "D": Factor(("depths",), trained=True, shared="private", start="zero"),
        }
        first = (Pass(penalty=self._norms),)
        later = (
            Pass(frozen=frozenset("ABH"), penalty=self._shared),  # H: a head's rows
            Pass(frozen=frozenset("SD"), apart=self.apart),
        )
        return Method(
            "h2tune",
            factors,
            {"stages": holders_mean} if trained else {},
            core=core,
            sizes=lambda rank: {"depths": self.depths},
            unequal="mean",
            passes=lambda round_: later if trained and round_ > 1 else first,
            settings=self,
        )

    def _norms(self, products: list[Product], _: list[Any]) -> Any:
        weight = 1.0 if self.preset == "as-released" else self.norm
        return weight * sum(_increment(C).norm() for _, C, _ in products) / len(products)

    def _shared(self, products: list[Product], cores: list[Any]) -> Any:
        moved = 0.0
        for core_before, (_, C, _) in zip(cores, products, strict=True):
            # KL between the softmax of all entries
            before, after = (_increment(each).flatten().log_softmax(0) for each in (core_before, C))
            moved += (before.exp() * (before - after)).sum()
        return self._norms(products, cores) + self.keep * moved / len(products)


def relation(D: Any, depth: float) -> Any:
    """P of a layer (depths,) from its D (depths,) and relative depth, 0 to 1; adds up to 1."""
    points = torch.arange(len(D), device=D.device)
    interpolated = (1 - (points - depth * (len(D) - 1)).abs()).clamp_min(0)
    return interpolated + D - D.mean()


def core(factors: Mapping[str, Any], depth: float) -> Any:
    """C (r, r) of a layer's D (depths,) and its role's S (depths, r, r), as torch tensors."""
    S = factors["S"]
    return torch.eye(S.shape[1], device=S.device) + torch.tensordot(relation(factors["D"], depth), S, 1)


def _increment(C: Any) -> Any:
    """T = C - I."""
    return C - torch.eye(len(C), device=C.device)


METHOD = H2Tune().method()
