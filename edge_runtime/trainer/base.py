"""Stage "load base": the frozen base model of a job, with its adapter and the kernels' operators."""

import gc
from pathlib import Path
from typing import Any

import torch
from edge_kernels import apply
from torch import nn
from transformers import PreTrainedModel

from edge_runtime.adapters import attach
from edge_runtime.compat.fast_tokenizer import load as load_tokenizer
from edge_runtime.compat.lean_imports import lean_imports
from edge_runtime.methods.frames import MAP, WIDTH
from edge_runtime.methods.interface import Method
from edge_runtime.models import structure, weights
from edge_runtime.models.facts import Facts
from edge_runtime.models.slices import kept_layers
from edge_runtime.protocol.plan import Plan
from edge_runtime.trainer.heap import release
from edge_runtime.trainer.job import Job


class Bases:
    """Gives a job its tokenizer and base model; a simulation keeps them from job to job."""

    def tokenizer(self, facts: Facts) -> Any:
        """The tokenizer of a checkpoint."""
        return load_tokenizer(Path(facts.folder))

    def model(self, facts: Facts, plan: Plan, device: str) -> PreTrainedModel:
        """The checkpoint's slice, in the plan's format."""
        return weights.load(facts, plan.depth, plan.weights, device, streamed=plan.streamed)


class Base:
    """A base model that carries an adapter and runs on our operators, as a plan has it."""

    def __init__(self, model: PreTrainedModel, adapter: attach.Attached, plan: Plan) -> None:
        self.model, self.adapter, self.plan = model, adapter, plan
        self._undo = apply(model, structure.modules(model), plan.mlp_tokens)

    def follow(self, plan: Plan) -> None:
        """Go on with a plan of other micro-batches, or of other tiles of the MLPs."""
        self._undo()
        self.plan, self._undo = plan, apply(self.model, structure.modules(self.model), plan.mlp_tokens)

    def drop(self) -> None:
        """Take the adapter off, and free the model."""
        attach.detach(self.model)
        del self.model, self._undo
        # modules and their functions refer to each other, so counting references frees nothing
        gc.collect()
        release()


def load_base(job: Job, method: Method, bases: Bases, labels: list[str], heard: frozenset[str]) -> Base:
    """The base model with the adapter attached, at version 0.

    Args:
        labels: of the head.
        heard: of these, the labels whose row is K.
    """
    plan, fleet = job.plan, job.fleet
    with lean_imports():  # loading imports the code of the model's family
        model = bases.model(job.facts, plan, job.machine.device)
    adapter = attach.attach(
        model,
        kept_layers(plan.depth, job.facts.layers),
        fleet.adapter.at(plan.rank),
        method,
        fleet.seed,
        job.facts.layers,
        fleet.adapter.rank,
    )
    if labels:
        embedding = model.get_input_embeddings().weight
        width = embedding.shape[1]
        if "M" in method.factors:
            zeros = torch.zeros(WIDTH, width, device=embedding.device)
            adapter.factors[MAP] = nn.Parameter(zeros, requires_grad=False)
            width = WIDTH
        zeros = torch.zeros(len(labels), width, device=embedding.device)
        adapter = adapter._replace(labels=tuple(labels), heard=heard, head=nn.Parameter(zeros))
    return Base(model, adapter, plan)
