"""Another file of the base model, such as a quantised one: whether it is the model that was trained on.

    ‖V - W‖ <= limit · ‖W‖      V: the file's values, W: those that were trained on, as float32

over the first rows of each tensor (Tensors.rounding has the limits). Two models differ by √2. Norms
and biases are in floats in every GGUF file, which also shows a model that was trained further, where
its matrices differ from the base's by less than rounding.
"""

from typing import NamedTuple

import msgspec
import torch

from edge_runtime.adapters.learned import Learned
from edge_runtime.compat.empty_model import empty_model
from edge_runtime.errors import InputError
from edge_runtime.models import structure, weights
from edge_runtime.models.facts import Facts
from edge_runtime.models.families import family_of
from edge_runtime.models.readers import Tensors

HEAD = "lm_head.weight"
LIMIT = 0.9  # in formats of 2 bits; of two models that have nothing in common √2 is expected


def on_other_file(learned: Learned, facts: Facts) -> Learned:
    """The adapter on another file of its base.

    Args:
        learned: with the base at hand that was trained on.
        facts: of the other file.

    Raises:
        InputError: the file holds another model. The message names what differs.
    """

    def form(facts: Facts) -> tuple[object, ...]:
        return family_of(facts.family).gguf, facts.layers, facts.hidden, facts.vocabulary, facts.linears

    trained = learned.facts
    if form(trained) != form(facts):
        raise InputError(
            f"the model in {facts.weights} is of {facts.layers} layers of {facts.hidden} values and {facts.vocabulary} "
            f"tokens ({facts.family}), but the adapter's is of {trained.layers} of {trained.hidden} and "
            f"{trained.vocabulary} ({trained.family}): give a GGUF file of the model that was trained on"
        )
    _require_equal(learned, facts)
    # the class is named by the weights that were trained on
    return learned._replace(facts=msgspec.structs.replace(facts, model_class=trained.model_class))


def _require_equal(learned: Learned, facts: Facts) -> None:
    """Compare the first rows of each tensor of the layers that were trained."""
    trained, other = (_opened(each, learned.layers) for each in (learned.facts, facts))
    for name in {**trained.sources, **other.sources}:
        W, V = trained.first(name), other.first(name)
        values = min(len(W), len(V))
        difference = float((V[:values] - W[:values]).norm() / W[:values].norm().clamp(min=1e-30))
        limit = min(trained.rounding(name) + other.rounding(name), LIMIT)
        if not difference <= limit:
            raise InputError(
                f"{name} in {facts.weights} is not that of {learned.facts.model_class}, which the adapter was trained "
                f"on: they differ by {difference:.1%}, and rounding explains at most {limit:.1%}; give a GGUF file of "
                "the model that was trained on"
            )


class _Opened(NamedTuple):
    """The tensors of a model's file."""

    tensors: Tensors
    sources: dict[str, str]  # by the model's names; of a tied head: the embedding
    transposed: tuple[str, ...]  # how the names of matrices end that files have in either order

    def first(self, name: str) -> torch.Tensor:
        """The first values of a tensor, or all where files have them in either order; (values,)."""
        name = self.sources[name]
        if name.endswith(self.transposed):
            return self.tensors.dense(name, torch.float32).view(-1)
        return next(iter(self.tensors.read(name)[1])).float().reshape(-1)

    def rounding(self, name: str) -> float:
        return self.tensors.rounding(self.sources[name])


def _opened(facts: Facts, layers: tuple[int, ...]) -> _Opened:
    model = empty_model(weights.configuration(facts, layers))
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    sources = {name: name for name in shapes}
    if facts.tied_head:
        sources[HEAD] = f"{structure.path(model, model.get_input_embeddings())}.weight"
    row = family_of(facts.family)
    transposed = tuple(f".{path}.weight" for path in row.linears.values()) if row.transposed else ()
    return _Opened(weights.open_tensors(facts, layers, shapes), sources, transposed)
