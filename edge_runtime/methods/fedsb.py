"""fedsb: A and B are frozen; only the core C between them is trained, and its mean taken inside a class.

    y = W x + scale · B C A x,   C <- C + Σ_k p_k dC_k,   p_k = n_k / Σ n over the devices k that hold the tensor

C has r² values whatever the layer's size, and with one A and B for all the merge is exact. The paper takes A and B from the
singular vectors of the first full gradient, which a device that holds packed weights never has. Here they are drawn from the
fleet's seed, or `frames = "singular"` takes the layer's own leading singular vectors (adapters/singular.py), one A and B for
all devices that hold the model in one weight format; nothing but C ever travels. The choice is ours.

As C has one shape in all models, it can cross them: `stages` gives all layers at about the same relative depth one core, and
`across` shares it. What it says is which of a layer's directions go where: whether these are the same in another model is
the question.
Source: Singhal et al. 2025, arXiv 2502.15436 (Fed-SB).
"""

from typing import Annotated, Literal

import msgspec

from edge_runtime.methods.fedit import holders_mean
from edge_runtime.methods.interface import A, B, C, Kind, Method, Scope


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """frames: A and B. stages: bins of relative depth whose layers share a core; 0: each has its own. across: between models."""

    frames: Literal["drawn", "singular"] = "drawn"
    stages: Annotated[int, msgspec.Meta(ge=0, le=256)] = 0
    across: bool = False


def method(settings: Settings) -> Method:
    """The method with these settings; raises ValidationError where layers would be one across models by their numbers."""
    if settings.across and not settings.stages:
        raise msgspec.ValidationError("`across` needs `stages`, as models have other layers")
    of: Kind = "stages" if settings.stages else "layers"
    scope: Scope = "fleet" if settings.across else "class"
    return Method(
        "fedsb",
        {
            "A": A._replace(trained=False, start=settings.frames),
            "C": C._replace(of=of, shared=scope),
            "B": B._replace(trained=False, start=settings.frames),
        },
        {of: holders_mean},
        sizes=lambda rank: {"stages": settings.stages} if settings.stages else {},
    )


METHOD = method(Settings())
