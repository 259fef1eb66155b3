"""h2tune: each device keeps A and B; between them lies what all models share, reached through a relation of layers.

    y = W x + scale · B C A x        C_l = I + T_l,  T_l = Σ_m P_l[m] S_m
    S    (depths x r x r) for each role: increments that the whole fleet shares; 0 at the start, the identity carries it
    P_l  of layer l at relative depth d: linear interpolation between the `depths` points, plus a private D_l less its mean, so
         that it adds up to 1; learned
    A, B private

A device of lower rank holds the leading r x r of each S_m: the sparsity that its budget asks for. The node takes the mean of
each entry over the devices that trained it, whichever model they have.

From the second round on each step has two passes, to tell what is shared from what is the task's own:

    1  A, B and a head frozen:  CE + norm · N + keep · mean over layers of KL(softmax T_l as the round found it ‖ softmax T_l)
    2  S, P frozen:  CE + apart · KL(output of pass 1 ‖ output)

N is the mean norm of T_l; KL of outputs is the mean over labelled tokens or rows. In round 1 one pass trains all with
CE + norm · N. `preset = "as-released"` takes the released code's weight for the norm, 1, which is 1e-3 else.

What the released code exchanges is nothing that was learned, as read: the merged S is loaded under a key that does not match,
and the uploaded one is taken before training. Here S itself is trained through P inside autograd and its increments travel;
`across = false` keeps them in the class and `core = "frozen"` draws S and trains no more of it: the controls.
Known of the paper (arXiv 2507.22633) are the parts and the three losses; the relation's start, the centred D, the entry-wise
mean and the coefficients are ours.
"""

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from edge_runtime.methods.fedit import holders_mean
from edge_runtime.methods.interface import A, AtLeastOne, B, Factor, Method, NotNegative, Pass


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """depths: points of relative depth at which there is a shared S. norm, keep, apart: weights of the losses beside CE."""

    depths: AtLeastOne = 4
    norm: NotNegative = 1e-3
    keep: NotNegative = 1.0
    apart: NotNegative = 1.0
    preset: Literal["ours", "as-released"] = "ours"
    across: bool = True
    core: Literal["trained", "frozen"] = "trained"


def relation(D: Any, depth: float) -> Any:
    """P of a layer (depths,) from its D (depths,) and relative depth, 0 to 1; it adds up to 1."""
    import torch

    points = torch.arange(len(D), device=D.device)
    interpolated = (1 - (points - depth * (len(D) - 1)).abs()).clamp_min(0)
    return interpolated + D - D.mean()


def core(factors: Mapping[str, Any], depth: float) -> Any:
    """C (r, r) of a layer's D (depths,) and its role's S (depths, r, r), which are torch's."""
    import torch

    S = factors["S"]
    return torch.eye(S.shape[1], device=S.device) + torch.tensordot(relation(factors["D"], depth), S, 1)


def method(settings: Settings) -> Method:
    """The method with these settings."""
    trained = settings.core == "trained"
    weight = 1.0 if settings.preset == "as-released" else settings.norm
    S = Factor(
        ("depths", "rank", "rank"),
        trained=trained,
        shared="fleet" if settings.across else "class",
        start="zero" if trained else "drawn",
        of="stages",
    )
    factors = {
        "A": A._replace(shared="private"),
        "B": B._replace(shared="private"),
        "S": S,
        "D": Factor(("depths",), trained=True, shared="private", start="zero"),
    }

    def norms(now: list[tuple[Any, Any, Any]], _: list[Any]) -> Any:
        return weight * sum(_increment(C).norm() for _, C, _ in now) / len(now)

    def shared(now: list[tuple[Any, Any, Any]], before: list[Any]) -> Any:
        moved = sum(
            _divergence(_increment(old), _increment(new))
            for old, (_, new, _) in zip(before, now, strict=True)
        )
        return norms(now, before) + settings.keep * moved / len(now)

    def passes(round_: int) -> tuple[Pass, ...]:
        if round_ == 1 or not trained:
            return (Pass(penalty=norms),)
        return (
            Pass(frozen=frozenset("ABH"), penalty=shared),
            Pass(frozen=frozenset("SD"), apart=settings.apart),
        )

    return Method(
        "h2tune",
        factors,
        {"stages": holders_mean} if trained else {},
        core=core,
        sizes=lambda rank: {"depths": settings.depths},
        unequal=True,
        passes=passes,
    )


def _increment(C: Any) -> Any:
    """T = C - I."""
    import torch

    return C - torch.eye(len(C), device=C.device)


def _divergence(before: Any, now: Any) -> Any:
    """KL(softmax of all entries before ‖ the same now)."""
    before, now = before.flatten().log_softmax(0), now.flatten().log_softmax(0)
    return (before.exp() * (before - now)).sum()


METHOD = method(Settings())
