"""Puts the operators into a loaded Hugging Face model, module by module, and takes them out again.

    norms        rms_norm, layer_norm
    MLP          gated_activation, where the activation has a gate; in tiles of tokens
    attention    rotary, where there are rotary positions; attention, on a CPU where nothing but later keys is masked

Each module gets a `forward` of its own that hides its class's; no weight moves and no class or library is changed. The
operators treat weights as frozen, so a module whose own weight wants a gradient is refused, and so is a kind of norm or MLP
that is not known by name here.
"""

import inspect
import types
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from edge_kernels.attention import attention
from edge_kernels.gated_activation import Kind, gated_activation
from edge_kernels.in_tiles import in_tiles
from edge_kernels.layer_norm import layer_norm
from edge_kernels.rms_norm import rms_norm
from edge_kernels.rotary import rotary

OFFSETS = {  # of the weight in each RMS norm
    **dict.fromkeys(("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm", "Phi3RMSNorm"), 0.0),
    **dict.fromkeys(("GemmaRMSNorm", "Gemma2RMSNorm", "Gemma3RMSNorm"), 1.0),
}
GATED = ("LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP", "GemmaMLP", "Gemma2MLP", "Gemma3MLP")
FUSED = ("Phi3MLP",)
UNGATED = ("PhiMLP", "GPT2MLP")  # left as they are
KINDS: dict[str, Kind] = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
ROTARY, INTERFACES = (
    "apply_rotary_pos_emb",
    "ALL_ATTENTION_FUNCTIONS",
)  # transformers' names, in an attention's file

Forward = Callable[..., Any]


def apply(model: nn.Module, mlp_tokens: int | None = None) -> Callable[[], None]:
    """Swap the operators into a transformers model of the Llama, Mistral, Qwen, Gemma, Phi and GPT-2 families.

    Args:
        model: loaded and frozen (adapters may train).
        mlp_tokens: that go through an MLP with a gate at once; None: all. In tiles, its weights have to stay where they are
            from forward to backward.

    Returns:
        A function that takes them out again.

    Raises:
        ValueError: a module is of a kind that is not known, or its own weight wants a gradient. Nothing was swapped then.
    """
    found = {name: _forward(name, module, mlp_tokens) for name, module in model.named_modules()}
    swapped = [(model.get_submodule(name), forward) for name, forward in found.items() if forward is not None]
    for module, forward in swapped:
        module.forward = forward

    def undo() -> None:
        for module, _ in swapped:
            del module.forward

    return undo


def _forward(name: str, module: nn.Module, mlp_tokens: int | None) -> Forward | None:
    """What stands for the module's own forward; None where that stays."""
    kind = type(module).__name__
    if kind in OFFSETS:
        _check_frozen(name, module)
        eps = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
        return lambda x: rms_norm(x, module.weight, eps, OFFSETS[kind])
    if isinstance(module, nn.LayerNorm):
        _check_frozen(name, module)
        return lambda x: layer_norm(x, module.weight, module.bias, module.eps)
    if kind in GATED:
        return _tiled(module, partial(_gated, module, _activation(name, module)), mlp_tokens)
    if kind in FUSED:
        return _tiled(module, partial(_fused, module, _activation(name, module)), mlp_tokens)
    if kind.endswith("Attention"):
        return _attention(module)
    if kind.endswith(("Norm", "MLP")) and kind not in UNGATED:
        known = ", ".join((*OFFSETS, "LayerNorm", *GATED, *FUSED, *UNGATED))
        raise ValueError(f"{name} is a {kind}, which is not known; known: {known}")
    return None


def _tiled(module: nn.Module, forward: Forward, tokens: int | None) -> Forward:
    if tokens is None:
        return forward
    return lambda x: in_tiles(forward, x, tokens, [p for p in module.parameters() if p.requires_grad])


def _gated(module: Any, kind: Kind, x: torch.Tensor) -> torch.Tensor:
    down: torch.Tensor = module.down_proj(gated_activation(module.gate_proj(x), module.up_proj(x), kind))
    return down


def _fused(module: Any, kind: Kind, x: torch.Tensor) -> torch.Tensor:
    gate, up = module.gate_up_proj(x).chunk(2, -1)
    down: torch.Tensor = module.down_proj(gated_activation(gate, up, kind))
    return down


def _attention(module: nn.Module) -> Forward | None:
    """The attention's own code, in which the names of the rotary function and of torch's attention mean ours."""
    code = inspect.unwrap(type(module).forward)
    if not {ROTARY, INTERFACES} & code.__globals__.keys():
        return None
    names = {**code.__globals__, ROTARY: lambda q, k, cos, sin, unsqueeze_dim=1: rotary(q, k, cos, sin)}
    if INTERFACES in names:
        names[INTERFACES] = _Interfaces(names[INTERFACES])
    ours = types.FunctionType(code.__code__, names, code.__name__, code.__defaults__, code.__closure__)
    ours.__kwdefaults__ = code.__kwdefaults__
    return types.MethodType(ours, module)


class _Interfaces:
    """Attention functions by name: torch's on a CPU gives way to ours where it can."""

    def __init__(self, theirs: Any) -> None:
        self._theirs = theirs

    def get_interface(self, name: str, default: Forward) -> Forward:
        found: Forward = self._theirs.get_interface(name, default)
        return partial(_attend, found) if name == "sdpa" else found


def _attend(theirs, module, q, k, v, mask, dropout=0.0, scaling=None, **rest):  # type: ignore[no-untyped-def]
    causal = module.is_causal if rest.get("is_causal") is None else rest["is_causal"]
    if (
        q.is_cuda
        or mask is not None
        or dropout
        or not causal
        or q.shape[2] != k.shape[2]
        or rest.get("softcap")
    ):
        return theirs(module, q, k, v, mask, dropout=dropout, scaling=scaling, **rest)
    return attention(q, k, v, scaling or q.shape[-1] ** -0.5).transpose(1, 2).contiguous(), None


def _activation(name: str, module: Any) -> Kind:
    seen = getattr(module.config, "hidden_activation", None) or module.config.hidden_act
    if seen not in KINDS:
        raise ValueError(f"{name} has the activation {seen}, which is not known; known: {', '.join(KINDS)}")
    return KINDS[seen]


def _check_frozen(name: str, module: nn.Module) -> None:
    if any(parameter.requires_grad for parameter in module.parameters()):
        raise ValueError(
            f"{name} wants a gradient, but the operators train adapters alone: freeze the model first"
        )
