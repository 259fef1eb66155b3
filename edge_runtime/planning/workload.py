"""The part of a prediction's input that all plans of a model share."""

import math
from dataclasses import dataclass, field

from edge_runtime import methods
from edge_runtime.adapters.shapes import adapter_shapes
from edge_runtime.methods.interface import Method
from edge_runtime.models.facts import Facts
from edge_runtime.models.slices import kept_layers
from edge_runtime.protocol.keys import parse
from edge_runtime.protocol.plan import Plan
from edge_runtime.settings import Fleet, Role


@dataclass(frozen=True)
class Workload:
    """A model, and how a fleet trains it on this device."""

    facts: Facts
    method: Method
    roles: tuple[Role, ...]  # linear layers that have an adapter
    rows_a_step: int  # public texts included
    max_tokens: int  # longest length that the fleet asks for
    headed: bool  # a head over labels learns the rows, in place of the vocabulary's
    runtime_bytes: int  # measured baseline of the device
    _values: dict[tuple[int, int], dict[str, int]] = field(default_factory=dict, compare=False)

    @classmethod
    def of(cls, fleet: Fleet, facts: Facts, runtime_bytes: int) -> "Workload":
        """The workload of a model in a fleet."""
        return cls(
            facts=facts,
            method=methods.build(fleet.method, fleet.head, fleet.codistill),
            roles=fleet.adapter.roles,
            rows_a_step=fleet.training.rows_a_step + (fleet.codistill.rows if fleet.codistill else 0),
            max_tokens=fleet.training.max_tokens,
            headed=fleet.head is not None,
            runtime_bytes=runtime_bytes,
        )

    def factor_values(self, plan: Plan) -> dict[str, int]:
        """Numbers in each of the adapter's factors, over all layers."""
        cached = self._values.get((plan.depth, plan.rank))  # many plans share both
        if cached is not None:
            return cached
        values = dict.fromkeys(self.method.factors, 0)
        layers = kept_layers(plan.depth, self.facts.layers)
        shapes = adapter_shapes(self.facts, layers, self.roles, plan.rank, self.method)
        for key, shape in shapes.items():
            values[parse(key).factor] += math.prod(shape)
        self._values[plan.depth, plan.rank] = values
        return values
