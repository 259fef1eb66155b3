"""The engine in ONNX Runtime: one session, whose adapter is an input that each sequence has of its own.

The graph of a base is written once, by another process, and stays in the cache (planning/graphs.py).
The session maps the graph's weights, so torch's model is not in this process. A sequence's keys and
values lie in one memory that the session reads and writes in place. That memory doubles as the
sequence grows.
"""

from collections.abc import Mapping
from collections.abc import Sequence as Ids
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from onnxruntime import OrtValue

from edge_runtime.adapters.export import onnx_adapter
from edge_runtime.adapters.export.onnx_session import session
from edge_runtime.adapters.learned import Learned
from edge_runtime.errors import InputError
from edge_runtime.models.facts import Facts
from edge_runtime.planning.graphs import graph
from edge_runtime.planning.serving import PIECE
from edge_runtime.serving.engine import depth_of, require_depth
from edge_runtime.settings import Weights

LAST = np.array([-1], np.int64)


class AdapterInputs(NamedTuple):
    """An adapter, as inputs of the graph."""

    version: int
    inputs: Mapping[str, OrtValue]


BASE = AdapterInputs(0, {})  # rank 0 everywhere


class OnnxSequence:
    """Tokens with their keys and values; see serving/engine.py."""

    def __init__(self, engine: "OnnxEngine", adapter: AdapterInputs) -> None:
        self.version = adapter.version
        self._engine, self._adapter, self._length, self._room = engine, adapter, 0, 0
        self._values = {name: np.empty((1, heads, 0, size), np.float32) for name, heads, size in engine.cache}
        self._binding = engine.session.io_binding()
        self._binding.bind_output("logits")
        self._binding.bind_ortvalue_input("logits_from", OrtValue.ortvalue_from_numpy(LAST))
        for name, value in adapter.inputs.items():
            self._binding.bind_ortvalue_input(name, value)

    def feed(self, ids: Ids[int]) -> NDArray[np.float32]:
        """Append tokens; the logits (vocabulary,) that follow.

        Raises:
            InputError: the sequence would be longer than the model's positions.
        """
        total = self._length + len(ids)
        if total > self._engine.positions:
            raise InputError(
                f"the sequence has {total} tokens, but the model's graph has {self._engine.positions} positions: "
                "give a shorter prompt, or ask for fewer tokens"
            )
        if total > self._room:
            self._grow(min(max(2 * self._room, total, PIECE), self._engine.positions))
        # names: the binding has the arrays' memory, and does not keep them alive
        tokens, mask = np.array([ids], np.int64), np.ones((1, total), np.int64)
        self._binding.bind_cpu_input("input_ids", tokens)
        self._binding.bind_cpu_input("attention_mask", mask)
        self._engine.session.run_with_iobinding(self._binding)
        self._length = total
        logits: NDArray[np.float32] = self._binding.get_outputs()[0].numpy()[0, -1]
        return logits.copy()  # the next run writes to the same memory

    def _grow(self, room: int) -> None:
        """Move keys and values to memory for more tokens."""
        for name, old in self._values.items():
            new = np.empty((*old.shape[:2], room, old.shape[3]), np.float32)
            new[:, :, : self._length] = old[:, :, : self._length]
            self._values[name], value = new, OrtValue.ortvalue_from_numpy(new)
            self._binding.bind_ortvalue_input(name, value)
            self._binding.bind_ortvalue_output(name.replace("past_key_values", "present"), value)
        self._room = room


class OnnxEngine:
    """A base model in ONNX Runtime; see serving/engine.py."""

    def __init__(self, facts: Facts, learned: Learned | None, format: Weights, threads: int = 0) -> None:
        """Load the slice that the adapter was learned on, after its graph was written where it is missing.

        Args:
            facts: of the checkpoint.
            learned: the first adapter; None: the whole checkpoint without one.
            format: of the frozen weights.
            threads: 0 for ONNX Runtime's choice.

        Raises:
            InputError: the adapter does not fit the checkpoint, or the model cannot be written as a graph.
        """
        self._facts, self._depth = facts, depth_of(facts, learned)
        self.session = session(graph(facts, self._depth, format), threads)
        self.positions = int(self.session.get_modelmeta().custom_metadata_map["positions"])
        self.cache = [  # name, heads and their size
            (entry.name, entry.shape[1], entry.shape[3])
            for entry in self.session.get_inputs()
            if entry.name.startswith("past")
        ]
        self._newest = BASE
        if learned is not None:
            self.swap(learned)

    @property
    def version(self) -> int:
        """Of the adapter that a new sequence takes; 0: the base alone."""
        return self._newest.version

    def begin(self) -> OnnxSequence:
        """A sequence without tokens, on the newest adapter."""
        return OnnxSequence(self, self._newest)

    def swap(self, learned: Learned) -> None:
        """Give new sequences another adapter; raises InputError where it does not fit this base."""
        require_depth(self._facts, learned, self._depth)
        self._newest = AdapterInputs(learned.version, onnx_adapter.inputs(learned))
