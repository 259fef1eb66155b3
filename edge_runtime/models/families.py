"""Finds the linear layers of a decoder block and the role each plays, by its place in the block and not by its name.

A decoder model keeps its blocks in one ModuleList as long as the configuration's layer count. In a block the first child
that holds linear layers is the attention, the second the MLP; inside them the order of definition gives the role:

    attention   4 layers: q k v o      2 layers: qkv o
    MLP         3 layers: gate up down     2 layers: gate_up down, or fc1 fc2

Of two layers of an attention, qkv is the one that makes more than the other reads (Phi-3 defines it after o). Two layers
of an MLP are gate_up and down when the first is twice as wide as what the second reads.

This holds for the Llama, Mistral, Qwen2, Qwen3, Gemma, Phi and GPT-2 families. Anything else is refused by name.
"""

from torch import nn
from transformers.pytorch_utils import Conv1D

from edge_runtime.errors import InputError
from edge_runtime.models.packed import PackedLinear
from edge_runtime.settings import Role

LINEAR = (nn.Linear, Conv1D, PackedLinear)
FAMILIES = (
    *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "gemma3_text"),
    *("phi", "phi3", "gpt2"),
)


def blocks(model: nn.Module) -> nn.ModuleList:
    """The decoder blocks of a transformers model; raises InputError for a family that is not in FAMILIES."""
    config = model.config.get_text_config()
    if config.model_type not in FAMILIES:
        raise InputError(
            f"models of type {config.model_type} are not supported; known: {', '.join(FAMILIES)}"
        )
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == config.num_hidden_layers:
            return module
    raise InputError(f"the {config.model_type} model has no list of {config.num_hidden_layers} blocks")


def linears(block: nn.Module) -> dict[Role, str]:
    """The path inside the block of each linear layer, by role."""
    groups = [(name, _linear_paths(child)) for name, child in block.named_children()]
    groups = [(name, paths) for name, paths in groups if paths]
    if len(groups) != 2:
        raise InputError(
            f"a {type(block).__name__} has {len(groups)} parts with linear layers; attention and MLP were expected"
        )
    found: dict[Role, str] = {}
    for roles_of, (name, paths) in zip((_attention_roles, _mlp_roles), groups, strict=True):
        shapes = [widths(block.get_submodule(f"{name}.{path}")) for path in paths]
        for role, path in zip(roles_of(shapes, type(block).__name__), paths, strict=True):
            found[role] = f"{name}.{path}"
    return found


def widths(linear: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear layer; GPT-2's Conv1D stores its weight the other way round."""
    rows, columns = linear.weight.shape
    return (columns, rows) if isinstance(linear, Conv1D) else (rows, columns)


def _linear_paths(module: nn.Module) -> list[str]:
    return [name for name, child in module.named_modules() if isinstance(child, LINEAR)]


def _attention_roles(shapes: list[tuple[int, int]], block: str) -> tuple[Role, ...]:
    if len(shapes) == 4 and shapes[1] == shapes[2]:
        return ("q", "k", "v", "o")
    if len(shapes) == 2:
        return ("qkv", "o") if shapes[0][0] > shapes[1][1] else ("o", "qkv")
    raise InputError(
        f"the attention of a {block} has linear layers of (out, in) {shapes}, which fit no known form"
    )


def _mlp_roles(shapes: list[tuple[int, int]], block: str) -> tuple[Role, ...]:
    if len(shapes) == 3 and shapes[0] == shapes[1] == shapes[2][::-1]:
        return ("gate", "up", "down")
    if len(shapes) == 2:
        return ("gate_up", "down") if shapes[0][0] == 2 * shapes[1][1] else ("fc1", "fc2")
    raise InputError(f"the MLP of a {block} has linear layers of (out, in) {shapes}, which fit no known form")
