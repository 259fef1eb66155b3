"""h2tune: a private A and B on each device, and beside them a core from tensors that all models share.

    y = W x + scale · (B A x + G T F x)        T_l = Σ_m P_l[m] S_m
    F, G    into the common frame and out of it (frames.py), of the device's own layer; frozen
    S       (depths x r x r) for each role: increments shared by the whole fleet; 0 at the start
    P_l     of layer l at relative depth d: linear interpolation between the `depths` points, plus a
            private D_l less its mean, so that P_l adds up to 1; trained
    A, B    private

The node averages each entry of S over the devices that trained the entry, whichever model they have.

A device of a lower rank than the fleet's trains k² entries of each r x r matrix of S, with k = r ·
rank / the fleet's rank. The others are as the version has them.

    select = "leading"    those of the first k rows and columns
    select = "top"        those of the largest |S|; equal ones from the leading rows and columns on,
                          so that the leading k train while S is 0
    select = "all"        every entry, at any rank: the control

A 0 in a delta may be a trained entry that was rounded. So a payload has the device's rank, and the
node selects as the device did, by the version that the device started from. No index travels, and
a selection depends on version and rank alone. What a device owes of an entry waits until the entry
is selected. `top` prefers entries that have been trained: where all devices have lower ranks, the
entries beyond the leading ones stay 0.

From the third round on each step has two passes, which separate the shared part from the task's
own:

    1  A, B and a head frozen:  CE + norm · N + keep · mean over layers of
                                ‖T_l - T_l as the round started‖² / ‖T_l as the round started‖²
    2  S, P frozen:  CE + apart · KL(output of pass 1 ‖ output)

N is the mean norm of T_l; KL of outputs is the mean over labelled tokens or rows. In round 2, the
first in which a class trains, one pass trains everything with CE + norm · N. `preset =
"as-released"` sets the weight of the norm as in the released code, 1 instead of 1e-3. The released
code keeps T by a KL between softmaxes of its entries, whose gradient is about the difference over
r²: next to nothing.

The released code, as we read it, exchanges nothing that was learned: the merged S is loaded under a
key that does not match, and the uploaded S is taken before training. Here S is trained through P by
autograd, and its increments travel. Controls, with the same two passes: `[public] frame = "rotated"`
lets S cross without a common meaning; `across = false` shares S inside the class alone; `core =
"private"` leaves S on each device.
Source: arXiv 2507.22633 names the parts and the three losses, and its code trains the k² entries of
the highest score; the frame, the relation's start, the centred D, |S| as the score, the entry-wise
mean and the coefficients are ours.
"""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, Literal

from edge_runtime.methods.fedit import holders_mean
from edge_runtime.methods.frames import F, G
from edge_runtime.methods.interface import (
    A,
    Array,
    AtLeastOne,
    B,
    Entries,
    Factor,
    Method,
    MethodSettings,
    NotNegative,
    Pass,
    Product,
    Scope,
)
from edge_runtime.methods.lazy import np, torch

TINY = 1e-12


class H2Tune(MethodSettings, frozen=True):
    """Settings of h2tune."""

    rank: AtLeastOne = 16  # coordinates of the common frame that the core reads and writes, r
    depths: AtLeastOne = 4  # points of relative depth that have a shared S
    norm: NotNegative = 1e-3  # weight of N in the loss
    keep: NotNegative = 1.0  # weight of the cores' change
    apart: NotNegative = 1.0  # weight of the KL between outputs
    preset: Literal["ours", "as-released"] = "ours"
    across: bool = True  # S is shared between models
    core: Literal["shared", "private"] = "shared"
    select: Literal["all", "leading", "top"] = "all"  # entries of S for lower ranks

    def method(self) -> Method:
        """The method with these settings."""
        scope: Scope = "private" if self.core == "private" else "fleet" if self.across else "class"
        select = None if self.select == "all" else partial(chosen, by_size=self.select == "top")
        axes = ("depths", "branch", "branch")
        factors = {
            "A": A._replace(shared="private"),
            "B": B._replace(shared="private"),
            "F": F,
            "G": G,
            "S": Factor(axes, trained=True, shared=scope, start="zero", of="stages", chosen=select),
            "D": Factor(("depths",), trained=True, shared="private", start="zero"),
        }
        first = (Pass(penalty=self._norms),)
        later = (
            Pass(frozen=frozenset("ABH"), penalty=self._shared),  # H: a head's rows
            Pass(frozen=frozenset("SD"), apart=self.apart),
        )
        sizes = {"branch": self.rank, "depths": self.depths}
        return Method(
            "h2tune",
            factors,
            {} if scope == "private" else {"stages": holders_mean},
            inner=inner,
            sizes=lambda rank: sizes,
            unequal="mean",
            passes=lambda round_: later if round_ > 2 else first,
            settings=self,
        )

    def _norms(self, products: Iterable[Product], _: list[Any]) -> Any:
        return self._norm([C for _, C, _ in products])

    def _norm(self, cores: list[Any]) -> Any:
        weight = 1.0 if self.preset == "as-released" else self.norm
        return weight * sum(self._increment(C).norm() for C in cores) / len(cores)

    def _shared(self, products: Iterable[Product], cores: list[Any]) -> Any:
        moved, now = 0.0, [C for _, C, _ in products]
        for before, after in zip(cores, now, strict=True):
            start = self._increment(before)
            size = start.square().sum()
            # a core that starts from 0 has nothing to keep
            moved += (self._increment(after) - start).square().sum() / size.clamp_min(TINY) * (size > TINY)
        return self._norm(now) + self.keep * moved / len(now)

    def _increment(self, C: Any) -> Any:
        """T of a layer's whole core, in which T follows the identity between A and B."""
        return C[-self.rank :, -self.rank :]


def relation(D: Any, depth: float) -> Any:
    """P of a layer (depths,) from its D (depths,) and relative depth, 0 to 1; adds up to 1."""
    points = torch.arange(len(D), device=D.device)
    interpolated = (1 - (points - depth * (len(D) - 1)).abs()).clamp_min(0)
    return interpolated + D - D.mean()


def chosen(S: Array, share: float, *, by_size: bool) -> Entries:
    """The entries of S (depths, r, r) that a device trains whose rank is this share of the fleet's.

    by_size: those of the largest |S|; else the leading ones.
    """
    depths, r, _ = S.shape
    edge = np.maximum(*np.indices((r, r))).ravel()  # 0 for the first entry, 1 for those next to it, ...
    sizes = np.abs(S).reshape(depths, -1) * np.float32(by_size)
    order = np.lexsort((np.broadcast_to(edge, sizes.shape), -sizes))  # stable
    entries = np.zeros(sizes.shape, bool)
    np.put_along_axis(entries, order[:, : max(1, round(share * r)) ** 2], values=True, axis=1)
    return entries.reshape(S.shape)


def inner(factors: Mapping[str, Any], depth: float) -> Any:
    """T (r, r) of a layer's D (depths,) and its role's S (depths, r, r), as torch tensors."""
    return torch.tensordot(relation(factors["D"], depth), factors["S"], 1)


METHOD = H2Tune().method()
