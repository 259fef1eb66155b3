"""The loss over a head."""

from functools import partial

import torch
from edge_kernels.linear_cross_entropy import LanguageHead, linear_cross_entropy
from edge_kernels.quant import Packed
from torch.nn.functional import cross_entropy, linear

from benchmarks.kernels.cases.case import OURS, SIZE, Counted, Shape, Variants
from benchmarks.kernels.cases.linear import expansion
from benchmarks.kernels.cases.variants import (
    compiled,
    draw_leaf,
    draw_weight,
    forward_backward,
    liger_functions,
    weight_bytes,
)


def linear_cross_entropy_case(shape: Shape, tokens: int, kind: str) -> Counted:
    vocabulary, width = shape.vocabulary, shape.hidden

    def prepare(device: torch.device) -> Variants:
        hidden, head = draw_leaf(device, tokens, width), draw_weight(vocabulary, width, kind, device)
        labels = torch.randint(0, vocabulary, (tokens,), device=device)
        variant = partial(forward_backward, leaves=[hidden], grads=[None], held=[head])
        read = expansion(head) if isinstance(head, Packed) else lambda: head

        def plain(hidden: torch.Tensor) -> torch.Tensor:
            return cross_entropy(linear(hidden, read()), labels)

        def upcast(hidden: torch.Tensor) -> torch.Tensor:
            return cross_entropy(linear(hidden, read()).float(), labels)

        base = "torch" if kind == "dense" else "expand, kept"
        variants = {
            OURS: variant(lambda hidden: linear_cross_entropy(hidden, LanguageHead(head), labels)),
            base: variant(plain),
            f"{base}, float32 logits": variant(upcast),  # as transformers has it
        }
        variants |= compiled(device, variant, upcast, base)
        if (liger := liger_functions(device)) is not None:
            variants["Liger"] = variant(
                lambda hidden: liger.liger_fused_linear_cross_entropy(hidden, read(), labels)
            )
        return variants

    moved = weight_bytes(vocabulary, width, kind) + 2 * SIZE * tokens * width + 8 * tokens  # h, dh, labels
    return moved, 4 * tokens * vocabulary * width, prepare
