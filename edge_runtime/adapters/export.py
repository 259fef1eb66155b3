"""Writes an adapter as the LoRA folder that PEFT reads.

    adapter_config.json          rank, alpha, modules
    adapter_model.safetensors    base_model.model.<module>.lora_A.weight = A, base_model.model.<module>.lora_B.weight = B

PEFT computes y = W x + (lora_alpha / r) B A x, which is the form of this project but for the core C that some methods have
between B and A: B C takes B's place. Nothing is lost. A fused layer (qkv, gate_up) has one A and one B there as here. The
folder fits the model the adapter was trained on; where that is a depth slice, its module paths number the slice's own layers.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from edge_runtime.adapters.attach import check_keys
from edge_runtime.methods.interface import factor_shape
from edge_runtime.models.facts import Facts
from edge_runtime.settings import Adapter

CONV1D_FAMILIES = ("gpt2",)  # they store W as (in, out), so PEFT has to turn B A round where it merges it into W


def to_peft(
    state: Mapping[str, NDArray[np.float32]], facts: Facts, spec: Adapter, paths: Mapping[str, str], folder: Path
) -> None:
    """Write the folder, or replace the adapter in it.

    Args:
        state: A (rank, in), B (out, rank) and perhaps C (rank, rank) of every adapted layer, by canonical key.
        facts: of the checkpoint.
        spec: rank and alpha.
        paths: the module each layers.<i>.<role> stands for, as `attach` returns them.
        folder: made where it is not there.

    Raises:
        InputError: a factor is missing, unexpected or of another shape; it is named.
    """
    core = any(key.endswith(".C") for key in state)
    check_keys(state, _shapes(facts, spec.rank, paths, core))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": facts.weights,
        "r": spec.rank,
        "lora_alpha": spec.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": facts.family in CONV1D_FAMILIES,
        "target_modules": sorted(paths.values()),
        "inference_mode": True,
    }
    tensors = {
        f"base_model.model.{path}.lora_{name}.weight": np.ascontiguousarray(factor, np.float32)
        for key, path in paths.items()
        for name, factor in (
            ("A", state[f"{key}.A"]),
            ("B", state[f"{key}.B"] @ state[f"{key}.C"] if core else state[f"{key}.B"]),
        )
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _shapes(facts: Facts, rank: int, paths: Mapping[str, str], core: bool) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    widths = {str(role): width for role, width in facts.linears.items()}
    for key in paths:
        out, into = widths[key.rsplit(".", 1)[1]]
        shapes |= {f"{key}.{name}": factor_shape(name, rank, into, out) for name in ("ABC" if core else "AB")}
    return shapes
