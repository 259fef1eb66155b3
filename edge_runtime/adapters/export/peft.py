"""Writes an adapter as the LoRA folder that PEFT reads.

    adapter_config.json          rank, alpha, modules
    adapter_model.safetensors    base_model.model.MODULE.lora_A.weight = A, .lora_B.weight = B C
    label_head.safetensors       of a label head: weight (labels, hidden); metadata: their names as JSON

PEFT computes y = W x + (lora_alpha / r) B A x. A core C joins B, so nothing is lost. A fused layer
(qkv, gate_up) has one A and one B in both forms. The folder fits the model that the adapter was
trained on: the module paths of a depth slice number the slice's own layers.
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
from edge_runtime.models.families import family_of
from edge_runtime.protocol.keys import label_of, parse
from edge_runtime.settings import Adapter

HEAD = "label_head.safetensors"


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
        state: every factor of the adapted layers and of a label head, by canonical key.
        facts: of the checkpoint.
        spec: rank, alpha and roles.
        method: makes A, C and B of a layer's factors.
        paths: the module of each layer and role, as in `Attached.paths`.
        folder: created where it is missing.

    Raises:
        InputError: a factor is missing, unexpected or of another shape; it is named.
    """
    layers = sorted({layer for layer, _ in paths})
    labels = {key: (1, facts.hidden) for key in state if parse(key).kind == "labels"}
    check_keys(state, adapter_shapes(facts, tuple(layers), spec.roles, spec.rank, method) | labels)
    tensors, rank = {}, spec.rank
    for (layer, role), path in paths.items():
        keys = method.keys(layer, facts.layers, role)
        factors = {name: torch.from_numpy(state[key]) for name, key in keys.items()}
        A, core, B = method.product(factors, relative_depth(layer, facts.layers))
        B = B if core is None else B @ core
        tensors[f"base_model.model.{path}.lora_A.weight"] = A.contiguous()
        tensors[f"base_model.model.{path}.lora_B.weight"] = B.contiguous()
        # a method may stack factors of earlier rounds on its own, so that the rank grows
        rank = len(A)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": facts.weights,
        "r": rank,
        "lora_alpha": spec.alpha * rank / spec.rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": family_of(facts.family).transposed,
        "target_modules": sorted(paths.values()),
        "inference_mode": True,
    }
    # the configuration comes last, so that a folder with one is complete
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    if labels:
        rows = {label_of(key): torch.from_numpy(state[key]) for key in sorted(labels)}
        weight = torch.cat(list(rows.values()))
        save_file({"weight": weight}, folder / HEAD, {"labels": json.dumps(list(rows))})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
