"""Puts an adapter on the linear layers of a loaded model, and carries its state in and out by key.

Keys have the layer numbers of the whole checkpoint, so slices of one checkpoint agree
(protocol/keys.py).
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from edge_kernels import adapter_linear
from numpy.typing import NDArray
from torch import nn

from edge_runtime import settings
from edge_runtime.adapters.initial import initial
from edge_runtime.adapters.learned import Learned
from edge_runtime.adapters.singular import frames
from edge_runtime.errors import InputError
from edge_runtime.methods import fedit
from edge_runtime.methods.frames import MAP
from edge_runtime.methods.interface import Method, Product, relative_depth
from edge_runtime.models import structure
from edge_runtime.protocol.keys import join, leading, parse

State: TypeAlias = "dict[str, NDArray[np.float32]]"


class Attached(NamedTuple):
    """An adapter on a model; the factors that train require a gradient."""

    factors: dict[str, nn.Parameter]  # by canonical key
    paths: dict[tuple[int, str], str]  # path of the adapted module in the model, by layer and role
    parts: dict[str, NDArray[np.bool_]]  # entries that train, of factors that train in part
    # of a linear head over labels, beside the model's head over its vocabulary
    labels: tuple[str, ...] = ()
    heard: frozenset[str] = frozenset()  # labels whose row is K (methods/label_head.py)
    head: nn.Parameter | None = None  # (labels, hidden), or (labels, frame) where it has a frame

    def trained(self) -> list[nn.Parameter]:
        """Every parameter that requires a gradient."""
        parameters = [*self.factors.values(), *([] if self.head is None else [self.head])]
        return [parameter for parameter in parameters if parameter.requires_grad]

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """The label head's logits, (rows, hidden) to (rows, labels)."""
        assert self.head is not None
        return self.inputs(states) @ self.head.T

    def inputs(self, states: torch.Tensor) -> torch.Tensor:
        """The label head's inputs, (rows, hidden) to (rows, hidden), or (rows, frame) where it has a frame."""
        into = self.factors.get(MAP)
        return states if into is None else states @ into.T

    @contextmanager
    def without(self, names: Collection[str]) -> Iterator[None]:
        """While inside, the factors of these names do not train; H names the label head."""
        frozen = [factor for key, factor in self.factors.items() if parse(key).factor in names]
        frozen += [self.head] if self.head is not None and "H" in names else []
        frozen = [factor for factor in frozen if factor.requires_grad]
        for factor in frozen:
            factor.requires_grad_(False)
        try:
            yield
        finally:
            for factor in frozen:
                factor.requires_grad_(True)

    def train_part(self, key: str, entries: NDArray[np.bool_]) -> None:
        """Give a gradient to these entries of a factor alone; weight decay still moves all."""
        self.parts[key] = entries
        mask = torch.from_numpy(entries).to(self.factors[key].device)
        self.factors[key].register_hook(lambda gradient: gradient * mask)

    def rows(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Each tensor of the state by its key; a label's row of the head is (1, hidden)."""
        yield from self.factors.items()
        if self.head is not None:
            for number, label in enumerate(self.labels):
                factor = "K" if label in self.heard else "H"
                yield join("labels", label, factor), self.head[number : number + 1]


class AdapterLinear(nn.Module):
    """One frozen linear layer with the factors of its adapter, in float32."""

    def __init__(
        self,
        base: nn.Module,
        scale: float,
        factors: Mapping[str, nn.Parameter],
        method: Method,
        depth: float,
    ) -> None:
        """depth: where the layer lies in the checkpoint, 0 to 1; the method's product may depend on it."""
        super().__init__()
        self.base, self.scale, self.factors = base, scale, nn.ParameterDict(factors)
        self._method, self._depth = method, depth
        self.leading: int | None = None  # ranks in use; None: all
        # Each token's share of its row's prompt (rows, tokens); None: no prompts were told.
        self.prompts: torch.Tensor | None = None

    def product(self) -> Product:
        """A, C and B; C is None where it is the identity."""
        A, C, B = self._method.product(self.factors, self._depth)
        if self.leading is None:
            return A, C, B
        ranks = slice(self.leading)
        return A[ranks], None if C is None else C[ranks, ranks], B[:, ranks]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) to (..., out)."""
        y = adapter_linear(x, structure.matrix(self.base), *self.product(), self.scale, self.base.bias)
        method, factors = self._method, self.factors
        if method.branch is None:
            return y
        gate = () if method.gate is None else (method.gate(factors, self._prompt_mean(x)),)
        v = method.branch(factors, x.float() @ factors["F"].T, *gate)
        return y + (self.scale * v @ factors["G"].T).to(y.dtype)

    @property
    def gated(self) -> bool:
        """Whether the layer reads whole rows."""
        return self._method.gate is not None

    def _prompt_mean(self, x: torch.Tensor) -> torch.Tensor:
        """The mean (rows, 1, in) of the inputs over each row's prompt."""
        if self.prompts is None or x.shape[:-1] != self.prompts.shape:
            told = "none" if self.prompts is None else tuple(self.prompts.shape)
            raise InputError(
                f"a layer of {self._method.name} has inputs of {tuple(x.shape[:-1])} tokens, but prompts of {told} were "
                "told: its gate reads whole rows, so text cannot be written token by token, nor MLPs run in tiles"
            )
        return self.prompts[:, None] @ x.float()


def attach(
    model: nn.Module,
    layers: tuple[int, ...],
    spec: settings.Adapter,
    method: Method,
    seed: int,
    checkpoint_layers: int | None = None,
    fleet_rank: int | None = None,
) -> Attached:
    """Replace the model's linear layers of the adapter's roles by adapted ones, in place.

    Args:
        model: a loaded transformers model of len(layers) blocks.
        layers: the blocks' numbers in the checkpoint.
        spec: rank on this device, alpha and roles.
        method: what it says of each factor.
        seed: the fleet's, from which factors are drawn.
        checkpoint_layers: that the checkpoint has; None: these are all.
        fleet_rank: of the fleet's adapter, of which a device of lower rank holds the leading part;
            None: the device's.

    Raises:
        InputError: the model's family is not known, or it has none of the roles.
    """
    total, fleet_rank = checkpoint_layers or len(layers), fleet_rank or spec.rank
    attached = Attached({}, {}, {})
    names = {module: name for name, module in model.named_modules()}
    row = structure.family(model)
    for layer, block in zip(layers, structure.blocks(model), strict=True):
        depth = relative_depth(layer, total)
        for role, base in structure.linears(block, row).items():
            if role not in spec.roles:
                continue
            # layers of one stage share factors, which the first layer made
            keys = method.keys(layer, total, role)
            missing = {name: key for name, key in keys.items() if key not in attached.factors}
            attached.factors.update(_version_0(base, missing, spec.rank, method, seed, fleet_rank))
            attached.paths[layer, role] = names[base]
            factors = {name: attached.factors[key] for name, key in keys.items()}
            adapted = AdapterLinear(base, spec.alpha / spec.rank, factors, method, depth)
            block.set_submodule(row.linears[role], adapted)
    if not attached.factors:
        raise InputError(f"the model has no linear layer of the roles {', '.join(spec.roles)}")
    return attached


def tell_prompts(model: nn.Module, lengths: Sequence[int], tokens: int) -> None:
    """Tell layers with a gate how many leading tokens of each row are its prompt.

    Holds until the next call, so that a block that runs again in backward has the same gate.

    Args:
        lengths: by row, at least 1.
        tokens: of each row, with padding.
    """
    gated = [module for module in model.modules() if isinstance(module, AdapterLinear) and module.gated]
    if gated:
        ends = torch.tensor(lengths, device=gated[0].factors["F"].device)[:, None]
        shares = (torch.arange(tokens, device=ends.device) < ends) / ends
        for linear in gated:
            linear.prompts = shares


def put_on(model: nn.Module, learned: Learned) -> None:
    """Attach what was learned to the slice that it was learned on, in place; raises as `attach` does."""
    (A, _), *_ = learned.factors.values()
    roles = tuple(dict.fromkeys(role for _, role in learned.factors))
    spec = settings.Adapter(rank=len(A), alpha=len(A), roles=roles)
    adapter = attach(model, learned.layers, spec, fedit.METHOD, 0, learned.facts.layers)
    factors = learned.factors.items()
    load_state(
        adapter,
        {
            join("layers", *place, name): value
            for place, pair in factors
            for name, value in zip("AB", pair, strict=True)
        },
    )


def detach(model: nn.Module) -> None:
    """Put the model's own linear layers back."""
    # a list, because the loop replaces modules of the tree that it walks
    for name, module in list(model.named_modules()):
        if isinstance(module, AdapterLinear):
            model.set_submodule(name, module.base)


def _version_0(
    base: nn.Module, keys: Mapping[str, str], rank: int, method: Method, seed: int, fleet_rank: int
) -> dict[str, nn.Parameter]:
    """The factors of a layer before any training, by canonical key. keys: by the factor's name."""
    matrix = structure.matrix(base)
    out, into = matrix.shape
    sizes, fleet_sizes = (method.lengths(any_rank, into, out) for any_rank in (rank, fleet_rank))
    singular = dict(zip("AB", frames(matrix, rank), strict=True)) if method.reads_weights else {}
    factors = {}
    for name, key in keys.items():
        factor = method.factors[name]
        if factor.start == "singular":
            value = singular[name]
        else:
            # a lower rank draws the fleet's factor too and keeps its leading part
            full = initial(key, factor.shape(fleet_sizes), seed, factor)
            part = np.ascontiguousarray(full[leading(factor.shape(sizes))])
            value = torch.from_numpy(part).to(matrix.device)
        factors[key] = nn.Parameter(value, requires_grad=factor.trained)
    return factors


def state(attached: Attached) -> State:
    """A float32 copy of every factor."""
    return {key: factor.detach().float().cpu().numpy().copy() for key, factor in attached.rows()}


@torch.no_grad()
def load_state(attached: Attached, values: Mapping[str, NDArray[np.float32]]) -> None:
    """Set every factor.

    Raises:
        InputError: a key is missing, unexpected or of another shape; it is named.
    """
    factors = dict(attached.rows())
    for key in factors.keys() - values.keys():
        raise InputError(f"the adapter state lacks {key}")
    for key, value in values.items():
        if key not in factors:
            raise InputError(f"the adapter state has {key}, which this adapter has not")
        if value.shape != factors[key].shape:
            raise InputError(
                f"{key} is {value.shape} in the adapter state, but has to be {tuple(factors[key].shape)}"
            )
    # in place, because modules and optimiser hold the same parameters
    for key, factor in factors.items():
        factor.copy_(torch.from_numpy(values[key]))
