"""Makes a transformers model whose matrices take no memory.

Libraries   torch >= 2.8, transformers >= 5; tried with torch 2.13 and transformers 5.23
Reason      torch's own way, `with torch.device("meta")`, imports its compiler, 80 MiB
Change      torch.empty, with which modules make their matrices, makes them on the meta device
Breaks      when transformers or torch.nn makes matrices by another function: they take memory
Test        tests/runtime/compat/test_empty_model.py
"""

from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel
from transformers.initialization import no_init_weights


def empty_model(config: Any) -> PreTrainedModel:
    """The causal language model of a configuration, its matrices on the meta device."""
    with _EmptyOnMeta(), no_init_weights():
        return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)


class _EmptyOnMeta(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return func(*args, **((kwargs or {}) | ({"device": "meta"} if func is torch.empty else {})))
