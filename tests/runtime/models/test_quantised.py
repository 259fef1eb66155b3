"""Quantised folders are dequantised as their methods do, or refused by the method's name."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from benchmarks.models import save_folder
from edge_runtime.errors import InputError
from edge_runtime.models import readers, structure, weights
from edge_runtime.models.prepare import prepare

FP8 = {"quant_method": "fp8", "weight_block_size": [16, 16]}
INT8 = {"quant_method": "bitsandbytes", "load_in_8bit": True}


def blocks(held, rows, columns):
    """FP8 codes, and a scale for each block of this size; the last blocks may be smaller."""
    grid = [[block.abs().max() / 448 for block in row.split(columns, 1)] for row in held.split(rows)]
    scales = torch.tensor(grid)
    return (held / spread(scales, held, rows, columns)).to(torch.float8_e4m3fn), scales


def spread(scales, held, rows, columns):
    return scales.repeat_interleave(rows, 0).repeat_interleave(columns, 1)[: held.shape[0], : held.shape[1]]


def by_blocks(rows, columns):
    def pack(stem, held):
        codes, scales = blocks(held, rows, columns)
        truth = codes.float() * spread(scales, held, rows, columns)
        return {f"{stem}.weight": codes, f"{stem}.weight_scale_inv": scales}, truth

    return pack


def by_powers_of_two(stem, held):
    tensors, _ = by_blocks(16, 16)(stem, held)
    scales = tensors[f"{stem}.weight_scale_inv"].log2().ceil().exp2()
    codes = (held / spread(scales, held, 16, 16)).to(torch.float8_e4m3fn)
    tensors = {f"{stem}.weight": codes, f"{stem}.weight_scale_inv": scales.to(torch.float8_e8m0fnu)}
    return tensors, codes.float() * spread(scales, held, 16, 16)


def by_matrix(stem, held):
    codes, scale = blocks(held, 1000, 1000)
    tensors = {
        f"{stem}.weight": codes,
        f"{stem}.weight_scale": scale[0, 0].clone(),
        f"{stem}.input_scale": scale[0],
    }
    return tensors, codes.float() * scale


def by_row(stem, held):
    codes, scales = blocks(held, 1, 1000)
    return {f"{stem}.weight": codes, f"{stem}.weight_scale": scales}, codes.float() * scales


def int8(stem, held):
    scales = held.abs().amax(1)
    codes = (held / scales[:, None] * 127).round().to(torch.int8)
    tensors = {
        f"{stem}.weight": codes,
        f"{stem}.SCB": scales,
        f"{stem}.weight_format": torch.tensor(0).byte(),
    }
    return tensors, codes.float() * scales[:, None] / 127


CASES = {
    "blocks": (FP8, by_blocks(16, 16)),
    "blocks that do not divide": ({**FP8, "weight_block_size": [24, 20]}, by_blocks(24, 20)),
    "blocks by default": ({"quant_method": "fp8"}, by_blocks(128, 128)),
    "powers of two": ({**FP8, "scale_fmt": "ue8m0"}, by_powers_of_two),
    "a scale a matrix": ({"quant_method": "fp8", "weight_block_size": None}, by_matrix),
    "a scale a row": ({"quant_method": "fbgemm_fp8"}, by_row),
    "int8": (INT8, int8),
}


@pytest.fixture
def quantised(tiny, tmp_path):
    """quantised(settings, pack): a folder whose blocks' matrices are packed, and the true matrices by key."""

    def write(settings, pack):
        folder = save_folder(tiny("llama"), tmp_path / "model")
        tensors, truth = {}, {}
        for name, held in load_file(folder / "model.safetensors").items():
            if "proj" in name:
                packed, truth[name] = pack(name.removesuffix(".weight"), held)
                tensors |= packed
            else:
                tensors[name] = held
        save_file(tensors, folder / "model.safetensors")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
        return folder, truth

    return write


def prepared(folder):
    return prepare(str(folder), folder, folder.parent / "cache")


@pytest.mark.parametrize("case", CASES)
def test_a_quantised_folder_is_dequantised(quantised, case, monkeypatch):
    folder, truth = quantised(*CASES[case])
    facts = prepared(folder)
    monkeypatch.setattr(readers, "PIECE_VALUES", 100)  # a matrix comes in several pieces
    held = weights.load(facts, facts.layers, "float32").state_dict()
    for name, matrix in truth.items():
        assert torch.allclose(held[name], matrix, rtol=1e-6, atol=0), name
    assert "quantization_config" not in (folder.parent / facts.folder / "config.json").read_text()


def test_blocks_are_read_as_transformers_reads_them(quantised):
    folder, _ = quantised(*CASES["blocks"])
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    facts = prepared(folder)
    ours = weights.load(facts, facts.layers, "float32").state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_quantised_matrix_can_be_packed_again(quantised):
    from edge_kernels import expand

    folder, truth = quantised(*CASES["blocks"])
    model = weights.load(prepared(folder), 4, "q8_0")
    seen = expand(structure.blocks(model)[3].mlp.up_proj.weight).float()
    matrix = truth["model.layers.3.mlp.up_proj.weight"]
    assert (seen - matrix).norm() / matrix.norm() < 0.01


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq"}, "awq"),
        ({"quant_method": "compressed-tensors", "format": "float-quantized"}, "compressed-tensors"),
        ({"quant_method": "mxfp4"}, "mxfp4"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes in 4 bits"),
        ({"group_size": 64, "bits": 4}, "without a quant_method"),
    ],
)
def test_other_methods_are_refused_by_their_names_before_a_weight_is_read(quantised, settings, name):
    folder, _ = quantised(settings, int8)
    (folder / "model.safetensors").write_bytes(b"cut short")
    with pytest.raises(
        InputError, match=rf"are quantised with {name} \(quantization_config in config\.json\)"
    ):
        prepared(folder)


@pytest.mark.parametrize("settings", ["fp8", [1]])
def test_settings_that_are_no_object_are_refused(quantised, settings):
    folder, _ = quantised(settings, by_blocks(16, 16))
    with pytest.raises(
        InputError, match=r"quantization_config in its config\.json is no object with a quant_method"
    ):
        prepared(folder)


@pytest.mark.parametrize("block", [[128], [0, 0], [16.5, 16], 16])
def test_blocks_without_a_size_are_refused(quantised, block):
    folder, _ = quantised({**FP8, "weight_block_size": block}, by_blocks(16, 16))
    with pytest.raises(
        InputError, match=rf"weight_block_size to {re.escape(str(block))}, but needs rows and columns"
    ):
        prepared(folder)


def no_scales(pack, lost):
    def packed(stem, held):
        tensors, truth = pack(stem, held)
        return {name: tensor for name, tensor in tensors.items() if not name.endswith(lost)}, truth

    return packed


def other_scales(stem, held):
    tensors, truth = by_blocks(16, 16)(stem, held)
    return {**tensors, f"{stem}.weight_scale_inv": torch.ones(3, 5)}, truth


@pytest.mark.parametrize(
    ("settings", "pack", "message"),
    [
        (
            INT8,
            no_scales(int8, "SCB"),
            r"up_proj.weight is held in I8 without scales|q_proj.weight is held in I8",
        ),
        (FP8, no_scales(by_blocks(16, 16), "_inv"), r"proj.weight is held in F8_E4M3 without scales"),
        (None, int8, r"proj.weight is held in I8 without scales"),
        (
            None,
            by_blocks(16, 16),
            r"have no place in the model of its config.json, such as \S+weight_scale_inv",
        ),
        (
            FP8,
            other_scales,
            r"weight_scale_inv is \(3, 5\), but \S+ of \(\d+, \d+\) needs one scale, one a row",
        ),
    ],
)
def test_codes_whose_scales_are_not_known_are_refused_by_name(quantised, settings, pack, message):
    folder, _ = quantised(settings, pack)
    with pytest.raises(InputError, match=message):
        prepared(folder)


def test_another_order_of_int8_codes_is_refused(quantised):
    def turned(stem, held):
        tensors, truth = int8(stem, held)
        return {**tensors, f"{stem}.weight_format": torch.tensor(2).byte()}, truth

    folder, _ = quantised(INT8, turned)
    with pytest.raises(InputError, match="weight_format"):
        prepared(folder)
