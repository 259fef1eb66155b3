"""The runtime baseline: memory of a trainer process whose model is negligible."""

import torch
from edge_kernels import apply
from transformers import LlamaConfig, LlamaForCausalLM

from edge_runtime.adapters import attach
from edge_runtime.methods import fedit
from edge_runtime.models import structure
from edge_runtime.settings import Adapter, Training
from edge_runtime.trainer import step
from edge_runtime.trainer.data import Example
from edge_runtime.trainer.evaluate import evaluate
from edge_runtime.trainer.meter import Meter


def baseline_bytes() -> int:
    """Peak resident bytes: the libraries, and the code pages that only a training step loads."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    settings = step.RoundSettings(Training(steps=1, rows_a_step=1), slices=[(0,)], micro_rows=1)
    examples = [Example([1] * 16, [1] * 16)]
    meter = Meter("cpu")
    with meter.phase("train"):
        for dtype in (torch.float32, torch.bfloat16):
            model = LlamaForCausalLM(config).to(dtype).eval().requires_grad_(False)
            adapter = attach.attach(model, (0,), Adapter(), fedit.METHOD, seed=0)
            apply(model, structure.modules(model))
            step.train(model, adapter, examples, settings)
            evaluate(model, adapter, examples, 1)
    return meter.peak_bytes
