"""Writes an adapter as the LoRA folder that PEFT reads.

    adapter_config.json          rank, alpha, modules
    adapter_model.safetensors    base_model.model.<module>.lora_A.weight = A, base_model.model.<module>.lora_B.weight = B
    label_head.safetensors       where labels have a head: weight (labels, hidden), their names in the metadata as JSON

PEFT computes y = W x + (lora_alpha / r) B A x, which is the form of this project but for the core C that some methods have
between B and A: B C takes B's place. Nothing is lost. A fused layer (qkv, gate_up) has one A and one B there as here. The
folder fits the model the adapter was trained on; where that is a depth slice, its module paths number the slice's own layers.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from edge_runtime.adapters.attach import check_keys
from edge_runtime.adapters.shapes import adapter_shapes
from edge_runtime.methods.interface import Method, relative_depth
from edge_runtime.models.facts import Facts
from edge_runtime.protocol.keys import kind_of, label_of
from edge_runtime.settings import Adapter

HEAD = "label_head.safetensors"
CONV1D_FAMILIES = (
    "gpt2",
)  # they store W as (in, out), so PEFT has to turn B A round where it merges it into W


def to_peft(
    state: Mapping[str, NDArray[np.float32]],
    facts: Facts,
    spec: Adapter,
    method: Method,
    paths: Mapping[tuple[int, str], str],
    folder: Path,
) -> None:
    """Write the folder, or replace the adapter in it.

    Args:
        state: every factor of the adapted layers and of a head over labels, by canonical key.
        facts: of the checkpoint.
        spec: rank, alpha and roles.
        method: what a layer's core is made of.
        paths: the module each (layer, role) stands for, as `attach` returns them.
        folder: made where it is not there.

    Raises:
        InputError: a factor is missing, unexpected or of another shape; it is named.
    """
    layers = sorted({layer for layer, _ in paths})
    labels = {key: (1, facts.hidden) for key in state if kind_of(key) == "labels"}
    check_keys(state, adapter_shapes(facts, tuple(layers), spec.roles, spec.rank, method) | labels)
    tensors, rank = {}, spec.rank
    for (layer, role), path in paths.items():
        keys = method.keys(layer, facts.layers, role)
        factors = {name: torch.from_numpy(state[of]) for name, of in keys.items()}
        A, core, B = method.product(factors, relative_depth(layer, facts.layers))
        tensors[f"base_model.model.{path}.lora_A.weight"] = A.contiguous()
        tensors[f"base_model.model.{path}.lora_B.weight"] = (B @ core if core is not None else B).contiguous()
        rank = len(A)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": facts.weights,
        "r": rank,
        "lora_alpha": spec.alpha * rank / spec.rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": facts.family in CONV1D_FAMILIES,
        "target_modules": sorted(paths.values()),
        "inference_mode": True,
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    if labels:
        rows = {label_of(key): torch.from_numpy(state[key]) for key in sorted(labels)}
        save_file(
            {"weight": torch.cat(list(rows.values()))}, folder / HEAD, {"labels": json.dumps(list(rows))}
        )
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
