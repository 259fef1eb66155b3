"""Labels of texts by the head that a fleet has learned, with torch."""

from edge_runtime.adapters.learned import Learned
from edge_runtime.errors import InputError
from edge_runtime.models.facts import Facts
from edge_runtime.serving.text import Language
from edge_runtime.serving.torch_engine import TorchEngine
from edge_runtime.settings import Weights


class Classifier:
    """A base model with an adapter and its head."""

    def __init__(self, facts: Facts, learned: Learned, weights: Weights, device: str) -> None:
        """Load them; arguments and errors as TorchEngine has them. The adapter has a head."""
        self._engine = TorchEngine(facts, learned, weights, device)
        self._language = Language(facts)

    def labels(self, text: str) -> dict[str, float]:
        """The probability of each label, the likeliest first; a long text is cut at the model's positions.

        Raises:
            InputError: the text is empty.
        """
        ids = self._language.labelled(text)
        if not ids:
            raise InputError("the text is empty, so it has no label")
        labels = self._engine.classify(ids)
        return dict(sorted(labels.items(), key=lambda item: -item[1]))
