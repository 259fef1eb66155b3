"""Puts the operators into a loaded Hugging Face model, module by module, and takes them out again.

    norms        rms_norm, layer_norm
    MLP          gated_activation, where the MLP has a gate; in tiles of tokens
    attention    rotary, where there are rotary positions; attention, on a CPU where only later keys
                 are masked

Each module gets an attribute `forward` that hides its class's method. No weight moves, and no class
and no library is changed. The operators treat weights as frozen, so a norm whose own weight requires
a gradient is refused. A norm or MLP whose class the caller did not name is refused, too.
"""

import inspect
import types
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from edge_kernels.attention import attention
from edge_kernels.gated_activation import Kind, gated_activation
from edge_kernels.in_tiles import in_tiles
from edge_kernels.norms import layer_norm, rms_norm
from edge_kernels.rotary import rotary

KINDS: dict[str, Kind] = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
# transformers' names in the file of an attention
ROTARY, INTERFACES = "apply_rotary_pos_emb", "ALL_ATTENTION_FUNCTIONS"

Forward = Callable[..., Any]


class Modules(NamedTuple):
    """The norms and MLPs of a model family, by the names of their classes in transformers."""

    rms_norm: str  # a family without this class has torch's layer norms
    offset: float  # rms_norm's offset
    mlp: str
    # gate and up projection apart, fused in one layer, or no gate: such an MLP stays as it is
    form: Literal["gated", "fused", "plain"]


def apply(model: nn.Module, modules: Modules, mlp_tokens: int | None = None) -> Callable[[], None]:
    """Swap the operators into a transformers model.

    Args:
        model: loaded and frozen (adapters may train).
        modules: the norms and MLPs of its family.
        mlp_tokens: tokens that go through a gated MLP at a time; None: all. In tiles, the weights
            must stay in place from forward to backward.

    Returns:
        A function that takes the operators out again.

    Raises:
        ValueError: the class of a module is unknown, or a norm's own weight requires a gradient.
            The model is unchanged then.
    """
    forwards = {name: _forward(name, module, modules, mlp_tokens) for name, module in model.named_modules()}
    swapped = [(model.get_submodule(name), forward) for name, forward in forwards.items() if forward]
    for module, forward in swapped:
        module.forward = forward

    def undo() -> None:
        for module, _ in swapped:
            del module.forward

    return undo


def _forward(name: str, module: nn.Module, modules: Modules, mlp_tokens: int | None) -> Forward | None:
    """The module's new forward; None where the module stays as it is."""
    kind = type(module).__name__
    if kind == modules.rms_norm:
        _check_frozen(name, module)
        eps = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
        return lambda x: rms_norm(x, module.weight, eps, modules.offset)
    if isinstance(module, nn.LayerNorm):
        _check_frozen(name, module)
        return lambda x: layer_norm(x, module.weight, module.bias, module.eps)
    if kind == modules.mlp:
        return None if modules.form == "plain" else _mlp(name, module, modules.form, mlp_tokens)
    if kind.endswith("Attention"):
        return _attention(module)
    if kind.endswith(("Norm", "MLP")):
        classes = ", ".join((modules.rms_norm, "LayerNorm", modules.mlp))
        raise ValueError(f"{name} is a {kind}, which is not known; known: {classes}")
    return None


def _mlp(name: str, module: Any, form: str, tokens: int | None) -> Forward:
    activation = getattr(module.config, "hidden_activation", None) or module.config.hidden_act
    if activation not in KINDS:
        raise ValueError(
            f"{name} has the activation {activation}, which is not known; known: {', '.join(KINDS)}"
        )

    def gate_and_up(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if form == "gated":
            return module.gate_proj(x), module.up_proj(x)
        gate, up = module.gate_up_proj(x).chunk(2, -1)
        return gate, up

    def forward(x: torch.Tensor) -> torch.Tensor:
        down: torch.Tensor = module.down_proj(gated_activation(*gate_and_up(x), KINDS[activation]))
        return down

    if tokens is None:
        return forward
    return lambda x: in_tiles(forward, x, tokens, [p for p in module.parameters() if p.requires_grad])


def _attention(module: nn.Module) -> Forward | None:
    """The attention's own code with our rotary function and table of attentions as its globals."""
    code = inspect.unwrap(type(module).forward)
    if not {ROTARY, INTERFACES} & code.__globals__.keys():
        return None
    names = {**code.__globals__, ROTARY: lambda q, k, cos, sin, unsqueeze_dim=1: rotary(q, k, cos, sin)}
    table: Any = names.get(INTERFACES)

    def get_interface(name: str, default: Forward) -> Forward:
        function: Forward = table.get_interface(name, default)
        return partial(_attend, function) if name == "sdpa" else function

    names[INTERFACES] = types.SimpleNamespace(get_interface=get_interface)
    forward = types.FunctionType(code.__code__, names, code.__name__, code.__defaults__, code.__closure__)
    forward.__kwdefaults__ = code.__kwdefaults__
    return types.MethodType(forward, module)


def _attend(theirs, module, q, k, v, mask, **options):  # type: ignore[no-untyped-def]
    """Our attention on a CPU where only later keys are masked, else theirs."""
    causal = module.is_causal if options.get("is_causal") is None else options["is_causal"]
    altered = options.get("dropout") or options.get("softcap") or q.shape[2] != k.shape[2]
    if q.is_cuda or mask is not None or not causal or altered:
        return theirs(module, q, k, v, mask, **options)
    scale = options.get("scaling") or q.shape[-1] ** -0.5
    return attention(q, k, v, scale).transpose(1, 2).contiguous(), None


def _check_frozen(name: str, module: nn.Module) -> None:
    if any(parameter.requires_grad for parameter in module.parameters()):
        raise ValueError(
            f"{name} wants a gradient, but the operators train adapters alone: freeze the model first"
        )
