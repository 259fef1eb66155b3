"""Writes an adapter as llama.cpp reads it: a GGUF file that is applied to the GGUF file of the base.

    general.type = adapter    general.architecture: that of the base
    adapter.type = lora       adapter.lora.alpha = rank, so that llama.cpp's scale alpha / rank is 1
    NAME.lora_a (rank, in), NAME.lora_b (out, rank) in float32    NAME: of the base's tensor

Rows of B lie as the rows of the base's tensor: in files of some families the two halves of each
query and key head alternate.
Source: llama.cpp's src/llama-adapter.cpp and convert_lora_to_gguf.py.
"""

from pathlib import Path

import gguf
import numpy as np
import torch

from edge_runtime.adapters.learned import Array, Learned, module
from edge_runtime.errors import EdgeError, InputError
from edge_runtime.models import gguf_header
from edge_runtime.models.facts import Facts
from edge_runtime.models.families import FAMILIES, family_of
from edge_runtime.models.gguf_file import GGUFTensors, Tensor
from edge_runtime.settings import Role


def write(learned: Learned, path: Path) -> None:
    """Write the file; layers are numbered as in the slice. Raises as `architecture` does."""
    facts = learned.facts
    (A, _), *_ = learned.factors.values()
    writer = gguf.GGUFWriter(path, architecture(facts))
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(len(A)))
    writer.add_name(
        f"{facts.model_class.partition('@')[0]}, {len(learned.layers)} layers, version {learned.version}"
    )
    names = tensor_names(learned)
    for (layer, role), (A, B) in learned.factors.items():
        name = names[layer, role]
        writer.add_tensor(f"{name}.lora_a", np.ascontiguousarray(A))
        writer.add_tensor(f"{name}.lora_b", interleaved(B, heads(learned, role)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def require(learned: Learned, path: Path) -> None:
    """Read the file as the base's tensors are read, and compare; raises EdgeError for a difference.

    llama.cpp's logits alone would not show it: beside a quantised base, rows in a wrong order
    change them little more than its rounding does.
    """
    contents, rank = gguf_header.read(path), {len(A) for A, _ in learned.factors.values()}
    equal = {contents.metadata[gguf.Keys.Adapter.LORA_ALPHA]} == rank
    names = tensor_names(learned)
    for (layer, role), pair in learned.factors.items():
        name = names[layer, role]
        for suffix, factor, alternating in (
            ("lora_a", pair[0], 0),
            ("lora_b", pair[1], heads(learned, role)),
        ):
            place = contents.tensors[f"{name}.{suffix}"]
            read = GGUFTensors([path], {name: Tensor(place.first, place.kind, place.shape, alternating)})
            equal &= np.array_equal(read.dense(name, torch.float32).numpy(), factor)
    if not equal or len(contents.tensors) != 2 * len(names):
        raise EdgeError(f"{path.name} does not hold what was learned; the files are removed")


def architecture(facts: Facts) -> str:
    """What GGUF files call the family; raises InputError where they are not read here."""
    family = family_of(facts.family)
    if family.gguf is None:
        known = ", ".join(row.types[0] for row in FAMILIES if row.gguf)
        raise InputError(
            f"a {facts.family} model cannot be exported for llama.cpp, whose files are known here of {known} alone: "
            "export with --to peft or --to merged"
        )
    return family.gguf


def tensor_names(learned: Learned) -> dict[tuple[int, Role], str]:
    """The base's tensors in a GGUF file of the slice, by layer of the checkpoint and role."""
    number = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[architecture(learned.facts)]
    table = gguf.get_tensor_name_map(number, len(learned.layers))
    return {
        (layer, role): f"{table.get_name(module(learned.facts, learned.layers.index(layer), role))}.weight"
        for layer, role in learned.factors
    }


def heads(learned: Learned, role: Role) -> int:
    """The heads whose rows alternate in a GGUF file of the base; 0: none do."""
    if not family_of(learned.facts.family).gguf_interleaved:
        return 0
    return {"q": learned.facts.heads, "k": learned.facts.kv_heads}.get(role, 0)


def interleaved(rows: Array, heads: int) -> Array:
    """Rows (out, ...) in the order of a GGUF file."""
    if not heads:
        return np.ascontiguousarray(rows)
    halves = rows.reshape(heads, 2, -1, *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)
