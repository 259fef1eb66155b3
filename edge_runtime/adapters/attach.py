"""Puts an adapter on the linear layers of a loaded model, and carries its state in and out by canonical keys.

Keys are layers.<i>.<role>.<factor> with the layer numbers of the whole checkpoint, so slices of one checkpoint agree.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from edge_kernels import adapter_linear
from numpy.typing import NDArray
from torch import nn
from transformers.pytorch_utils import Conv1D

from edge_runtime import settings
from edge_runtime.adapters import roles
from edge_runtime.adapters.initial import initial
from edge_runtime.errors import InputError
from edge_runtime.methods.interface import Factor, factor_shape

State = dict[str, NDArray[np.float32]]


class Adapter(NamedTuple):
    """The factors attached to a model; those that train require a gradient. paths: the module each (layer, role) stands for,
    by canonical key without factor."""

    factors: dict[str, nn.Parameter]
    paths: dict[str, str]
    rank: int
    alpha: float


class AdapterLinear(nn.Module):
    """One frozen linear layer with its factors A, B and perhaps C in float32."""

    def __init__(
        self, base: nn.Module, scale: float, A: nn.Parameter, B: nn.Parameter, C: nn.Parameter | None = None
    ) -> None:
        super().__init__()
        self.base, self.scale, self.A, self.B, self.C = base, scale, A, B, C

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) to (..., out)."""
        weight = self.base.weight.T if isinstance(self.base, Conv1D) else self.base.weight
        return adapter_linear(x, weight, self.A, self.C, self.B, self.scale, self.base.bias)


def attach(
    model: nn.Module, layers: tuple[int, ...], spec: settings.Adapter, factors: Mapping[str, Factor], seed: int
) -> Adapter:
    """Replace the model's linear layers of the wanted roles by adapted ones, in place.

    Args:
        model: a loaded transformers model of len(layers) blocks.
        layers: the blocks' numbers in the whole checkpoint.
        spec: rank, alpha and roles.
        factors: what the method says of each.
        seed: what those that are drawn start from.

    Raises:
        InputError: the model's form is not known, or it has none of the roles.
    """
    attached: dict[str, nn.Parameter] = {}
    paths: dict[str, str] = {}
    places = {module: name for name, module in model.named_modules()}
    for layer, block in zip(layers, roles.blocks(model), strict=True):
        for role, path in roles.linears(block).items():
            if role not in spec.roles:
                continue
            base = block.get_submodule(path)
            out, into = roles.widths(base)
            key = f"layers.{layer}.{role}"
            own = {}
            for name, factor in factors.items():
                shape = factor_shape(name, spec.rank, into, out)
                value = torch.from_numpy(initial(f"{key}.{name}", shape, seed, factor.start))
                own[name] = nn.Parameter(value.to(base.weight.device), requires_grad=factor.trained)
                attached[f"{key}.{name}"] = own[name]
            paths[key] = places[base]
            block.set_submodule(path, AdapterLinear(base, spec.alpha / spec.rank, **own))
    if not attached:
        raise InputError(f"the model has no linear layer of the roles {', '.join(spec.roles)}")
    return Adapter(attached, paths, spec.rank, spec.alpha)


def state(adapter: Adapter) -> State:
    """A float32 copy of every factor."""
    return {key: factor.detach().float().cpu().numpy().copy() for key, factor in adapter.factors.items()}


def load_state(adapter: Adapter, values: Mapping[str, NDArray[np.float32]]) -> None:
    """Set every factor; raises InputError naming a key that is missing, unexpected or of another shape."""
    check_keys(values, {key: tuple(factor.shape) for key, factor in adapter.factors.items()})
    with torch.no_grad():
        for key, factor in adapter.factors.items():
            factor.copy_(torch.from_numpy(values[key]))


def check_keys(values: Mapping[str, NDArray[np.float32]], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise InputError unless the values have exactly these keys and shapes."""
    for key in shapes.keys() - values.keys():
        raise InputError(f"the adapter state lacks {key}")
    for key, value in values.items():
        if key not in shapes:
            raise InputError(f"the adapter state has {key}, which this adapter has not")
        if value.shape != shapes[key]:
            raise InputError(f"{key} is {value.shape} in the adapter state, but has to be {shapes[key]}")
