"""The engine in torch: the base model in the format that it was trained in, packed or not.

Linear layers with an adapter compute y = W x + B A x, with the A and B of the sequence that is fed.
An adapter is small, so each version stays in memory for as long as a sequence uses it.
"""

from collections.abc import Sequence as Ids

import numpy as np
import torch
from edge_kernels import adapter_linear, apply
from numpy.typing import NDArray
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from edge_runtime.adapters.learned import Learned
from edge_runtime.compat.lean_imports import lean_imports
from edge_runtime.models import structure, weights
from edge_runtime.models.facts import Facts
from edge_runtime.models.slices import kept_layers
from edge_runtime.serving.engine import depth_of, require_depth
from edge_runtime.settings import Role, Weights
from edge_runtime.trainer.examples import Example
from edge_runtime.trainer.objectives import hidden_states, label_states

Place = tuple[int, Role]  # a linear layer, by its number in the checkpoint and its role


class TorchAdapter:
    """One version's factors, on the model's device and in its dtype."""

    def __init__(self, learned: Learned, like: torch.Tensor) -> None:
        self.version, self.labels, self.head = learned.version, learned.labels, learned.head
        self.factors: dict[Place, tuple[torch.Tensor, torch.Tensor]] = {
            place: (torch.from_numpy(A).to(like), torch.from_numpy(B).to(like))
            for place, (A, B) in learned.factors.items()
        }


class ServedLinear(nn.Module):
    """A frozen linear layer that reads its factors from the sequence that is fed."""

    def __init__(self, base: nn.Module, place: Place, engine: "TorchEngine") -> None:
        super().__init__()
        self.base, self._place = base, place
        # in a list: a module would register the engine's model as a part of itself
        self._engine = [engine]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) to (..., out)."""
        adapter = self._engine[0].fed
        factors = adapter.factors.get(self._place) if adapter is not None else None
        if factors is None:
            y: torch.Tensor = self.base(x)
            return y
        A, B = factors
        return adapter_linear(x, structure.matrix(self.base), A, None, B, 1.0, self.base.bias)


class TorchSequence:
    """Tokens with their keys and values; see serving/engine.py."""

    def __init__(self, engine: "TorchEngine", adapter: TorchAdapter | None) -> None:
        self.version = adapter.version if adapter is not None else 0
        self._engine, self._adapter = engine, adapter
        self._cache = DynamicCache(config=engine.model.config)

    def feed(self, ids: Ids[int]) -> NDArray[np.float32]:
        """Append tokens; the logits (vocabulary,) that follow."""
        return self._engine.logits(ids, self._cache, self._adapter)


class TorchEngine:
    """A base model of torch; see serving/engine.py."""

    def __init__(
        self, facts: Facts, learned: Learned | None, format: Weights = "bfloat16", device: str = "cpu"
    ) -> None:
        """Load the slice that the adapter was learned on.

        Args:
            facts: of the checkpoint.
            learned: the first adapter; None: the whole checkpoint without one.
            format: of the frozen weights.
            device: "cpu" or "cuda".

        Raises:
            InputError: the adapter does not fit the checkpoint, or as `weights.load` does.
        """
        self._facts, self._depth, self._device = facts, depth_of(facts, learned), device
        self.positions = facts.positions
        with lean_imports():  # loading imports the code of the model's family
            self.model: PreTrainedModel = weights.load(facts, self._depth, format, device)
        row = structure.family(self.model)
        layers = kept_layers(self._depth, facts.layers)
        for layer, block in zip(layers, structure.blocks(self.model), strict=True):
            for role, base in structure.linears(block, row).items():
                block.set_submodule(row.linears[role], ServedLinear(base, (layer, role), self))
        apply(self.model, structure.modules(self.model))
        # a norm has the dtype of the activations, whatever the matrices are packed in
        self._like = next(self.model.parameters())
        self.fed: TorchAdapter | None = None  # of the sequence that goes through the model now
        self._newest: TorchAdapter | None = None
        if learned is not None:
            self.swap(learned)

    @property
    def version(self) -> int:
        """Of the adapter that a new sequence takes; 0: the base alone."""
        return self._newest.version if self._newest is not None else 0

    def begin(self) -> TorchSequence:
        """A sequence without tokens, on the newest adapter."""
        return TorchSequence(self, self._newest)

    def swap(self, learned: Learned) -> None:
        """Give new sequences another adapter; raises InputError where it does not fit this base."""
        require_depth(self._facts, learned, self._depth)
        self._newest = TorchAdapter(learned, self._like)

    @torch.no_grad()
    def logits(self, ids: Ids[int], cache: DynamicCache, adapter: TorchAdapter | None) -> NDArray[np.float32]:
        """The logits (vocabulary,) after these tokens, whose keys and values the cache takes in."""
        self.fed = adapter
        inputs = torch.tensor([list(ids)], device=self._device)
        output = self.model(input_ids=inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
        last: NDArray[np.float32] = output.logits[0, -1].float().cpu().numpy()
        return last

    @torch.no_grad()
    def classify(self, ids: Ids[int]) -> dict[str, float]:
        """The probability of each label for a text's tokens, by the newest adapter's head.

        The adapter has a head.
        """
        self.fed = adapter = self._newest
        assert adapter is not None and adapter.head is not None
        text = [Example(list(ids), [])]
        states = label_states(text, hidden_states(self.model, text)[0])
        logits = torch.from_numpy(adapter.head) @ states[0].cpu()
        return dict(zip(adapter.labels, logits.softmax(0).tolist(), strict=True))
