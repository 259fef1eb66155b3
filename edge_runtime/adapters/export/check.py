"""Compares what a tool computes of an export with the trainer's own forward.

    difference = ‖d_tool - d‖ / ‖d‖      d = logits with the adapter - logits without, of the trainer

Logits are those after each of a few prompts, less their mean, as a tool may give them as log
probabilities. The difference is 0 for an exact export, and about 1 where the adapter is lost or
another adapter is in its place.
"""

from typing import Any, NamedTuple

import edge_profiles
import numpy as np
import torch

from edge_runtime.adapters.attach import put_on
from edge_runtime.adapters.learned import Array, Learned
from edge_runtime.errors import EdgeError, InputError
from edge_runtime.models import weights
from edge_runtime.models.facts import Facts

Prompts = list[list[int]]  # tokens
PROMPTS, TOKENS = 3, 12
EXACT = 1e-3  # the difference where both compute in float32 on equal weights
ROUNDED = 0.05  # where the weights are rounded to bfloat16; 0.012 was seen
ROUGH = 0.3  # where activations are rounded to 8 bits too; 0.14 was seen, 0.96 for a lost adapter
# Smallest ‖d‖ that counts, as a share of the logits' norm: below, rounding alone makes the difference.
SMALLEST = 1e-3


class Outputs(NamedTuple):
    """Logits (prompts, vocabulary) of a model without and with an adapter."""

    plain: Array
    adapted: Array


def prompts(vocabulary: int) -> Prompts:
    """A few prompts of tokens from the whole vocabulary, equal in every run."""
    draw = np.random.default_rng(0)
    return [draw.integers(vocabulary, size=TOKENS).tolist() for _ in range(PROMPTS)]


@torch.no_grad()
def logits(model: Any, prompts: Prompts) -> Array:
    """What a transformers model gives after each prompt, (prompts, vocabulary)."""
    output = model(input_ids=torch.tensor(prompts), use_cache=False)
    last: Array = output.logits[:, -1].float().numpy()
    return last


def require_memory(facts: Facts, layers: int) -> None:
    """Refuse an export for which this machine has too little memory.

    Args:
        layers: that are in memory at once, in float32.

    Raises:
        InputError: with the bytes that are needed and that are free.
    """
    needed = 4 * (facts.head_parameters + layers * facts.block_parameters)
    free = edge_profiles.probe().ram_available_bytes
    if needed > free:
        raise InputError(
            f"an export is opened again and compared with the trainer's own forward, for which embedding, head and "
            f"{layers} layers of {facts.model_class} need {edge_profiles.format_size(needed)} in float32, but "
            f"{edge_profiles.format_size(free)} are free: copy the adapter's folder to a larger machine and export there "
            "with --adapter"
        )


def loaded(facts: Facts, depth: int) -> Any:
    """A base model in float32, as the trainer loads it, of which one block at a time is in memory.

    Raises as `weights.load` does.
    """
    return weights.load(facts, depth, "float32", streamed=True)


def trainer(learned: Learned, prompts: Prompts) -> Outputs:
    """The trainer's own forward; learned has the base at hand. Raises as `loaded` does."""
    model = loaded(learned.facts, len(learned.layers))
    plain = logits(model, prompts)
    put_on(model, learned)
    return Outputs(plain, logits(model, prompts))


def difference(outputs: Outputs, truth: Outputs) -> float:
    """The equation above."""
    d_tool, d = _change(outputs), _change(truth)
    return float(np.linalg.norm(d_tool - d) / max(np.linalg.norm(d), _least(truth)))


def require(outputs: Outputs, truth: Outputs, bound: float, tool: str) -> None:
    """Bound the difference, by `bound` or by twice what the tool's rounding does to the base.

    Twice, because d_tool is a difference of two outputs, and rounding is in both. Where rounding does
    more than the adapter, a lost adapter is within that bound. So half of the adapter's change has
    to be in the tool's too.

    Raises:
        EdgeError: the difference is larger, the change is not there, or a value is missing.
    """
    norm, d_tool, d = np.linalg.norm, _change(outputs), _change(truth)
    base, changed = norm(_centred(outputs.plain - truth.plain)), norm(d)
    share, allowed = difference(outputs, truth), min(max(bound, 2 * base / max(changed, 1e-30)), 1.0)
    is_there = (d_tool * d).sum() >= 0.5 * (d * d).sum() or changed < _least(truth)
    if not (base <= bound * norm(_centred(truth.plain)) and share <= allowed and is_there):
        raise EdgeError(
            f"{tool} computes something else with the export than the trainer: {share:.1%} of what the adapter changes "
            f"in the logits differ, and at most {allowed:.1%} may; the files are removed"
        )


def require_near(outputs: Array, truth: Array, bound: float, tool: str) -> None:
    """Raise EdgeError where logits are further apart than this share of their norm."""
    share = np.linalg.norm(_centred(outputs - truth)) / np.linalg.norm(_centred(truth))
    if not share <= bound:
        raise EdgeError(
            f"{tool} computes something else with the export than the trainer: its logits differ by {share:.1%}, and at "
            f"most by {bound:.1%} they may; the files are removed"
        )


def _change(outputs: Outputs) -> Array:
    return _centred(outputs.adapted - outputs.plain)


def _least(truth: Outputs) -> float:
    """The smallest norm of a change that counts."""
    return float(SMALLEST * np.linalg.norm(_centred(truth.plain)))


def _centred(logits: Array) -> Array:
    centred: Array = logits - logits.mean(-1, keepdims=True)
    return centred
