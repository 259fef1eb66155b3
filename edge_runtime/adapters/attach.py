"""Puts an adapter on the linear layers of a loaded model, and carries its state in and out by canonical keys.

Keys have the layer numbers of the whole checkpoint, so slices of one checkpoint agree (methods/interface.py).
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from edge_kernels import adapter_linear
from numpy.typing import NDArray
from torch import nn
from transformers.pytorch_utils import Conv1D

from edge_runtime import settings
from edge_runtime.adapters.initial import initial
from edge_runtime.adapters.singular import frames
from edge_runtime.errors import InputError
from edge_runtime.methods.interface import Factor, Method, Product, relative_depth
from edge_runtime.models import families as roles
from edge_runtime.protocol.keys import label_key, leading, name_of

State = dict[str, NDArray[np.float32]]


class Head(NamedTuple):
    """A linear head over labels. weight: (labels, hidden)."""

    labels: tuple[str, ...]
    weight: nn.Parameter


class Adapter(NamedTuple):
    """The factors attached to a model; those that train require a gradient. paths: the module each (layer, role) stands for."""

    factors: dict[str, nn.Parameter]
    paths: dict[tuple[int, str], str]
    rank: int
    alpha: float
    head: Head | None = None

    def trained(self) -> list[nn.Parameter]:
        """Every parameter that wants a gradient."""
        every = [*self.factors.values(), *([self.head.weight] if self.head else [])]
        return [parameter for parameter in every if parameter.requires_grad]

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """What the head makes of (rows, hidden): (rows, labels)."""
        assert self.head is not None
        return states @ self.head.weight.T

    @contextmanager
    def without(self, names: Collection[str]) -> Iterator[None]:
        """While inside, factors of these names, H for the head's rows, do not train."""
        still = [one for key, one in self.factors.items() if name_of(key) in names and one.requires_grad]
        still += [self.head.weight] if self.head and "H" in names else []
        for factor in still:
            factor.requires_grad_(False)
        try:
            yield
        finally:
            for factor in still:
                factor.requires_grad_(True)

    def rows(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Each tensor of the state by its canonical key; a label's row of the head as (1, hidden)."""
        yield from self.factors.items()
        if self.head is not None:
            for number, label in enumerate(self.head.labels):
                yield label_key("labels", label, "H"), self.head.weight[number : number + 1]


class AdapterLinear(nn.Module):
    """One frozen linear layer with its factors in float32; product: makes A, C and B of them, C None for the identity."""

    def __init__(
        self,
        base: nn.Module,
        scale: float,
        factors: Mapping[str, nn.Parameter],
        product: Callable[[Mapping[str, Any]], tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]],
    ) -> None:
        super().__init__()
        self.base, self.scale, self.factors, self._product = (base, scale, nn.ParameterDict(factors), product)

    def product(self) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """A, C and B; C is None where it is the identity."""
        return self._product(self.factors)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) to (..., out)."""
        weight = self.base.weight.T if isinstance(self.base, Conv1D) else self.base.weight
        return adapter_linear(x, weight, *self.product(), self.scale, self.base.bias)


def attach(
    model: nn.Module,
    layers: tuple[int, ...],
    spec: settings.Adapter,
    method: Method,
    seed: int,
    *,
    whole: int | None = None,
    fleet_rank: int | None = None,
    labels: tuple[str, ...] = (),
) -> Adapter:
    """Replace the model's linear layers of the wanted roles by adapted ones, in place.

    Args:
        model: a loaded transformers model of len(layers) blocks.
        layers: the blocks' numbers in the whole checkpoint.
        spec: rank, alpha and roles.
        method: what it says of each factor.
        seed: what those that are drawn start from.
        whole: layers of the checkpoint; None: these are all.
        fleet_rank: of which a lower one has the leading part, in what is drawn too; None: spec's.
        labels: that a head tells apart; none: no head.

    Raises:
        InputError: the model's form is not known, or it has none of the roles.
    """
    attached: dict[str, nn.Parameter] = {}
    paths: dict[tuple[int, str], str] = {}
    places = {module: name for name, module in model.named_modules()}
    for layer, block in zip(layers, roles.blocks(model), strict=True):
        for role, path in roles.linears(block).items():
            if role not in spec.roles:
                continue
            base = block.get_submodule(path)
            out, into = roles.widths(base)
            ranks = spec.rank, fleet_rank or spec.rank
            own_sizes, full = (method.lengths(rank, into, out) for rank in ranks)
            own_frames = _frames(base, spec.rank, method)
            keys = method.keys(layer, whole or len(layers), role)
            for name, key in keys.items():
                if name in own_frames:
                    attached[key] = nn.Parameter(own_frames[name], requires_grad=False)
                elif key not in attached:  # one of a stage is there already
                    attached[key] = _parameter(
                        key, method.factors[name], own_sizes, full, seed, base.weight.device
                    )
            paths[layer, role] = places[base]
            own = {name: attached[key] for name, key in keys.items()}
            depth = relative_depth(layer, whole or len(layers))
            product = partial(_product, method, depth)
            block.set_submodule(path, AdapterLinear(base, spec.alpha / spec.rank, own, product))
    if not attached:
        raise InputError(f"the model has no linear layer of the roles {', '.join(spec.roles)}")
    head = None
    if labels:
        weight = model.get_input_embeddings().weight
        zeros = torch.zeros(len(labels), weight.shape[1], device=weight.device)
        head = Head(labels, nn.Parameter(zeros))
    return Adapter(attached, paths, spec.rank, spec.alpha, head)


def _product(method: Method, depth: float, factors: Mapping[str, Any]) -> Product:
    return method.product(factors, depth)


def detach(model: nn.Module) -> None:
    """Put the model's own linear layers back."""
    for block in roles.blocks(model):
        adapted = {
            path: module for path, module in block.named_modules() if isinstance(module, AdapterLinear)
        }
        for path, module in adapted.items():
            block.set_submodule(path, module.base)


def _frames(base: nn.Module, rank: int, method: Method) -> dict[str, torch.Tensor]:
    """The factors that a method takes from the layer's own weights, by name."""
    if not method.reads_weights:
        return {}
    A, B = frames(base.weight, rank, transposed=isinstance(base, Conv1D))
    return {name: frame for name, frame in (("A", A), ("B", B)) if method.factors[name].start == "singular"}


def _parameter(
    key: str,
    factor: Factor,
    sizes: Mapping[str, int],
    full: Mapping[str, int],
    seed: int,
    device: torch.device,
) -> nn.Parameter:
    value = initial(key, factor.shape(full), seed, factor)[leading(factor.shape(sizes))]
    return nn.Parameter(
        torch.from_numpy(np.ascontiguousarray(value)).to(device), requires_grad=factor.trained
    )


def state(adapter: Adapter) -> State:
    """A float32 copy of every factor."""
    return {key: factor.detach().float().cpu().numpy().copy() for key, factor in adapter.rows()}


def load_state(adapter: Adapter, values: Mapping[str, NDArray[np.float32]]) -> None:
    """Set every factor; raises InputError naming a key that is missing, unexpected or of another shape."""
    check_keys(values, {key: tuple(factor.shape) for key, factor in adapter.rows()})
    with torch.no_grad():
        for key, factor in adapter.rows():
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
