"""Stage "load base": the frozen base model of a job, with the kernels' operators in place."""

import gc
from pathlib import Path
from typing import Any

from edge_kernels import apply
from transformers import PreTrainedModel

from edge_runtime.adapters import attach
from edge_runtime.compat.fast_tokenizer import load as load_tokenizer
from edge_runtime.compat.lean_imports import lean_imports
from edge_runtime.methods.interface import Method
from edge_runtime.models import structure, weights
from edge_runtime.models.facts import Facts
from edge_runtime.models.slices import kept_layers
from edge_runtime.protocol.plan import Plan
from edge_runtime.trainer.job import Job
from edge_runtime.trainer.meter import release


class Bases:
    """Gives a job its tokenizer and base model; a simulation keeps them from job to job."""

    def tokenizer(self, facts: Facts) -> Any:
        """The tokenizer of a checkpoint."""
        return load_tokenizer(Path(facts.folder))

    def model(self, facts: Facts, plan: Plan, device: str) -> PreTrainedModel:
        """The checkpoint's slice, in the plan's format."""
        return weights.load(facts, plan.depth, plan.weights, device, streamed=plan.streamed)


class Base:
    """A base model that carries an adapter and runs on our operators."""

    def __init__(self, model: PreTrainedModel, mlp_tokens: int | None) -> None:
        """mlp_tokens: tokens that go through an MLP at once; None: all."""
        self.model = model
        self._undo = apply(model, structure.modules(model), mlp_tokens)

    def retile(self, mlp_tokens: int | None) -> None:
        """Change the number of tokens that go through an MLP at once."""
        self._undo()
        self._undo = apply(self.model, structure.modules(self.model), mlp_tokens)

    def drop(self) -> None:
        """Take the adapter off, and free the model."""
        attach.detach(self.model)
        del self.model, self._undo
        # modules and their functions refer to each other, so counting references frees nothing
        gc.collect()
        release()


def load_base(job: Job, method: Method, bases: Bases, labels: list[str]) -> tuple[Base, attach.Attached]:
    """The base model with the adapter attached, at version 0."""
    plan, fleet = job.plan, job.fleet
    with lean_imports():  # loading imports the code of the model's family
        model = bases.model(job.facts, plan, job.machine.device)
    adapter = attach.attach(
        model,
        kept_layers(plan.depth, job.facts.layers),
        fleet.adapter.at(plan.rank),
        method,
        fleet.seed,
        attach.Extent(job.facts.layers, fleet.adapter.rank),
    )
    if labels:
        adapter = attach.with_head(adapter, model, tuple(labels))
    return Base(model, plan.mlp_tokens), adapter
