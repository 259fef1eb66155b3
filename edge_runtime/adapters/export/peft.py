"""Writes an adapter as the LoRA folder that PEFT reads.

    adapter_config.json          rank, alpha, modules
    adapter_model.safetensors    base_model.model.MODULE.lora_A.weight = A, .lora_B.weight = B C
    label_head.safetensors       of a label head: weight (labels, hidden); metadata: their names as JSON

PEFT computes y = W x + (lora_alpha / r) B A x. A core C joins B, so nothing is lost. A fused layer
(qkv, gate_up) has one A and one B in both forms. The folder fits the model that the adapter was
trained on: the module paths of a depth slice number the slice's own layers.
"""

import json
from pathlib import Path

from safetensors.torch import save_file

from edge_runtime.adapters.attach import Attached
from edge_runtime.methods.interface import Method, relative_depth
from edge_runtime.models.facts import Facts
from edge_runtime.models.families import family_of
from edge_runtime.settings import Adapter

HEAD = "label_head.safetensors"


def to_peft(adapter: Attached, facts: Facts, spec: Adapter, method: Method, folder: Path) -> None:
    """Write the folder, or replace the adapter in it.

    Args:
        adapter: which need not be on its model any more.
        facts: of the checkpoint.
        spec: the adapter's rank and alpha.
        method: makes A, C and B of a layer's factors.
        folder: created where it is missing.
    """
    tensors, rank = {}, spec.rank
    for (layer, role), path in adapter.paths.items():
        keys = method.keys(layer, facts.layers, role)
        factors = {name: adapter.factors[key].detach().cpu() for name, key in keys.items()}
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
        "target_modules": sorted(adapter.paths.values()),
        "inference_mode": True,
    }
    # the configuration comes last, so that a folder with one is complete
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    if adapter.head is not None:
        labels = json.dumps(list(adapter.labels))
        save_file({"weight": adapter.head.detach().cpu()}, folder / HEAD, {"labels": labels})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
