"""A model without memory: its matrices take none, and its rotary frequencies are right."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from edge_runtime.compat.empty_model import empty_model
from edge_runtime.models.families import FAMILIES


def test_no_matrix_of_any_family_takes_memory_and_buffers_are_as_usual(tiny):
    for row in FAMILIES:
        usual = tiny(row.types[0])
        model = empty_model(usual.config)
        # norms are made by torch.ones and stay: a thousandth of the weights
        matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
        assert matrices and all(matrix.is_meta for matrix in matrices), row.types
        assert model.state_dict().keys() == usual.state_dict().keys()
        buffers = dict(usual.named_buffers())
        for name, buffer in model.named_buffers():
            assert torch.equal(buffer, buffers[name]), name


def test_the_check_sees_a_weight_that_takes_memory():
    config = AutoConfig.for_model(
        "llama", hidden_size=32, num_hidden_layers=1, vocab_size=8, intermediate_size=8
    )
    model = AutoModelForCausalLM.from_config(config)
    assert not any(parameter.is_meta for parameter in model.parameters())
