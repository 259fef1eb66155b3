"""The parts of a loaded model that its family's row names: blocks, linear layers, classes."""

from typing import Any

from edge_kernels import Modules
from torch import nn
from transformers.pytorch_utils import Conv1D

from edge_runtime.errors import InputError
from edge_runtime.models.families import Family, family_of
from edge_runtime.settings import Role


def family(model: nn.Module) -> Family:
    """The family of a transformers model; raises InputError where the table has no row for it."""
    return family_of(model.config.get_text_config().model_type)


def blocks(model: nn.Module) -> nn.ModuleList:
    """The decoder blocks of a transformers model: the first list as long as its layer count.

    Raises:
        InputError: the family is not known, or the model has no such list.
    """
    name, layers = family(model).types[0], model.config.get_text_config().num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == layers:
            return module
    raise InputError(f"the {name} model has no list of {layers} blocks")


def path(model: nn.Module, part: nn.Module) -> str:
    """The path of a part of the model."""
    return next(name for name, module in model.named_modules() if module is part)


def linears(block: nn.Module, row: Family) -> dict[Role, nn.Module]:
    """The linear layers of a decoder block by role; raises InputError where one is not there."""
    try:
        return {role: block.get_submodule(path) for role, path in row.linears.items()}
    except AttributeError as error:
        kind = type(block).__name__
        raise InputError(f"the installed transformers has another {kind} than is known: {error}") from error


def matrix(linear: nn.Module) -> Any:
    """The weight of a linear layer as (out, in), a tensor or Packed."""
    # Conv1D stores (in, out)
    return linear.weight.T if isinstance(linear, Conv1D) else linear.weight


def widths(block: nn.Module, row: Family) -> dict[Role, tuple[int, int]]:
    """(out, in) of each linear layer of a decoder block, by role."""
    return {role: tuple(matrix(linear).shape) for role, linear in linears(block, row).items()}


def modules(model: nn.Module) -> Modules:
    """The names of the model's norms and MLPs, as `edge_kernels.apply` takes them."""
    row = family(model)
    return Modules(f"{row.classes}RMSNorm", row.norm_offset, f"{row.classes}MLP", row.mlp)
