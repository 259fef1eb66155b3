"""fedsb: A and B are frozen; the core C between them is trained, and averaged in its class.

    y = W x + scale · B C A x,   C <- C + Σ_k p_k dC_k
    p_k = n_k / Σ n over the devices k that hold the tensor

C has rank² values whatever the layer's size. All devices have the same A and B, so the merge is
exact.

The paper takes A and B from the singular vectors of the first full gradient, which a device that
holds packed weights never has. Here they are drawn from the fleet's seed; or `frames = "singular"`
takes the layer's own leading singular vectors (adapters/singular.py). The choice is ours.

C has the same shape in all models, so it can cross them: `stages` gives all layers at about the
same relative depth one core, and `across` shares that core between models.
Source: Singhal et al. 2025, arXiv 2502.15436 (Fed-SB).
"""

from typing import Annotated, Literal

import msgspec

from edge_runtime.methods.fedit import holders_mean
from edge_runtime.methods.interface import A, B, C, Method, MethodSettings, Scope
from edge_runtime.protocol.keys import Kind


class FedSB(MethodSettings, frozen=True):
    """Settings of fedsb."""

    frames: Literal["drawn", "singular"] = "drawn"  # where A and B come from
    # bins of relative depth; 0: a core for each layer
    stages: Annotated[int, msgspec.Meta(ge=0, le=256)] = 0
    across: bool = False  # cores are shared between models

    def method(self) -> Method:
        """The method; raises ValidationError where models would share cores by layer numbers."""
        if self.across and not self.stages:
            raise msgspec.ValidationError("`across` needs `stages`, as models differ in their layers")
        of: Kind = "stages" if self.stages else "layers"
        scope: Scope = "fleet" if self.across else "class"
        factors = {
            "A": A._replace(trained=False, start=self.frames),
            "C": C._replace(of=of, shared=scope),
            "B": B._replace(trained=False, start=self.frames),
        }
        return Method("fedsb", factors, {of: holders_mean}, stages=max(self.stages, 1), settings=self)


METHOD = FedSB().method()
