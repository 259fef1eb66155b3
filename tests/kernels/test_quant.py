"""Block formats: GGUF's own values and bytes, nf4's tables, what is padded and what is refused."""

import gguf
import numpy as np
import pytest
import torch
from edge_kernels import quant
from edge_kernels.checkpoint_block import expand_rows, quantise_rows
from numerics import relative_error

from edge_runtime.demo import model as demo

GGUF = {
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
    "q4_0": gguf.GGMLQuantizationType.Q4_0,
    "q4_1": gguf.GGMLQuantizationType.Q4_1,
}
ERRORS = {"q8_0": 0.008, "q4_0": 0.12, "q4_1": 0.1, "nf4": 0.1}  # of a normal matrix, relative


def draw(out=40, into=96, seed=0):
    weight = torch.randn(out, into, generator=torch.Generator().manual_seed(seed))
    weight[3:4] = 0  # blocks whose scale is zero
    weight[4:5, ::2] = 0.25
    return weight


def to_gguf(packed):
    """The bytes that a GGUF file has for a matrix of whole blocks; the inverse of from_gguf."""
    parts = [packed.scales] if packed.mins is None else [packed.scales, packed.mins]
    headers = [part.contiguous().view(torch.uint8).view(*part.shape, 2) for part in parts]
    quants = packed.quants.view(torch.uint8).view(*packed.scales.shape, -1)
    return torch.cat([*headers, quants], -1).flatten()


# --- against ggml


@pytest.mark.parametrize("format", GGUF)
def test_packing_gives_ggmls_bytes_and_values(format):
    weight = draw()
    theirs = gguf.quants.quantize(weight.numpy(), GGUF[format])
    packed = quant.pack(weight, format)
    assert np.array_equal(to_gguf(packed).numpy(), theirs.ravel())
    assert np.array_equal(quant.expand(packed).numpy(), gguf.quants.dequantize(theirs, GGUF[format]))


def real_tensors():
    """A few tensors of the demo's model, as they lie in its file."""
    wanted = {"blk.0.attn_k.weight", "blk.0.ffn_down.weight", "blk.29.attn_q.weight", "token_embd.weight"}
    return [tensor for tensor in gguf.GGUFReader(demo.path()).tensors if tensor.name in wanted]


def test_a_real_files_tensors_expand_to_what_the_gguf_package_reads():
    seen = set()
    for tensor in real_tensors():
        format = tensor.tensor_type.name.lower()
        if format not in GGUF:
            continue
        seen.add(format)
        into, out = (int(size) for size in tensor.shape)
        rows = min(out, 512)  # the embedding is long
        data = np.array(tensor.data).reshape(out, -1)[:rows]
        packed = quant.from_gguf(torch.from_numpy(data), format, (rows, into))
        assert np.array_equal(quant.expand(packed).numpy(), gguf.quants.dequantize(data, tensor.tensor_type))
        assert np.array_equal(to_gguf(packed).numpy(), data.ravel())
        broken = data.copy()
        broken[0, 5] ^= 0x11  # one byte of quants
        assert not torch.equal(
            quant.expand(quant.from_gguf(torch.from_numpy(broken), format, (rows, into))),
            quant.expand(packed),
        )
    assert "q4_1" in seen


# --- nf4


def test_nf4_rounds_to_the_nearest_of_its_sixteen_values():
    """The levels of a normal distribution with equal mass between them, 0 and ±1 among them; steps as the paper prints."""
    table = torch.tensor(quant.NF4)
    assert (
        len(table) == 16 and table[0] == -1 and table[7] == 0 and table[15] == 1 and (table.diff() > 0).all()
    )
    weight = draw(8, 64)
    packed = quant.pack(weight, "nf4")
    scales = quant._scales(packed, slice(None))
    scaled = weight / torch.where(scales == 0, 1, scales)
    nearest = (scaled[..., None] - table).abs().argmin(-1)
    low, high = packed.quants & 15, packed.quants >> 4
    assert torch.equal(torch.cat([low, high], 1)[scales[:, 0] > 0].long(), nearest[scales[:, 0] > 0])


def test_the_dynamic_map_is_bitsandbytes():
    """256 values from -0.993 to 1: the largest step is 1/128 · 0.9, the smallest value 0.55e-6."""
    levels = quant.dynamic_map()
    assert len(levels) == 256 and (levels.diff() > 0).all()
    assert levels[-1] == 1 and levels[0] == pytest.approx(-(1 - 0.9 / 128), abs=1e-6)
    assert levels[levels > 0][0] == pytest.approx(0.55e-6)
    assert levels[levels > 0][-2] == pytest.approx(1 - 0.9 / 128, abs=1e-6)


def test_nf4_takes_four_and_an_eighth_bits_a_value():
    packed = quant.pack(draw(512, 2048), "nf4")
    size = sum(part.nbytes for part in packed.parts if part is not None)
    assert size / (512 * 2048) == pytest.approx(0.516, abs=0.001)


# --- any format


@pytest.mark.parametrize("format", quant.BLOCK)
@pytest.mark.parametrize("shape", [(1, 1), (3, 33), (5, 64), (40, 97)])
def test_odd_widths_are_padded_and_come_back_in_their_own_shape(format, shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    packed = quant.pack(weight, format)
    expanded = quant.expand(packed)
    assert expanded.shape == weight.shape
    assert (
        packed.quants.shape[1] * (1 if format == "q8_0" else 2)
        == packed.scales.shape[1] * quant.BLOCK[format]
    )
    assert (expanded - weight).abs().max() <= weight.abs().max() / 7


@pytest.mark.parametrize("format", quant.BLOCK)
def test_the_error_is_that_of_its_bits(format):
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(2))
    expanded = quant.expand(quant.pack(weight, format))
    assert relative_error(expanded, weight.double()) < ERRORS[format]
    assert (
        relative_error(expanded * 1.2, weight.double()) > ERRORS[format]
    )  # a lost part of the scale would be seen


@pytest.mark.parametrize("format", quant.BLOCK)
def test_expanding_rounds_once_and_piece_by_piece(format, monkeypatch):
    packed = quant.pack(draw(), format)
    whole = quant.expand(packed)
    monkeypatch.setattr(quant, "PIECE_VALUES", 96 * 7)
    buffer = torch.full((40, 96), torch.nan, dtype=torch.bfloat16)
    assert quant.expand(packed, out=buffer) is buffer
    assert torch.equal(buffer, whole.bfloat16())


@pytest.mark.parametrize("format", quant.BLOCK)
def test_a_matrix_that_is_no_slice_of_memory_packs_alike(format):
    weight = draw(96, 40).T
    assert torch.equal(
        quant.expand(quant.pack(weight, format)), quant.expand(quant.pack(weight.contiguous(), format))
    )


def test_rows_of_activations_keep_127_steps_each():
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(3)).bfloat16()
    x[0, 0] = 0
    quants, scale = quantise_rows(x)
    assert (quants.dtype, quants.shape, scale.shape) == (torch.int8, x.shape, (2, 5, 1))
    back = expand_rows(quants, scale, torch.float32)
    assert ((back - x.float()).abs() <= 0.5001 * scale).all()
    assert (quants.abs().amax(-1)[1] == 127).all() and not quants[0, 0].any()


# --- what is refused


@pytest.mark.parametrize("format", quant.BLOCK)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(format, bad):
    weight = draw()
    weight[2, 7] = bad
    with pytest.raises(ValueError, match="weight holds a value that is not finite"):
        quant.pack(weight, format)


@pytest.mark.parametrize("format", GGUF)
def test_values_beyond_float16_scales_are_refused(format):
    with pytest.raises(ValueError, match=r"weight has values up to 1e\+10, too large for a float16 scale"):
        quant.pack(torch.full((1, 32), 1e10) * torch.linspace(-1, 1, 32), format)


def test_shapes_and_formats_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"weight is \(3,\), but has to be a matrix"):
        quant.pack(torch.ones(3), "q8_0")
    with pytest.raises(ValueError, match="format is 'q5_0', but has to be one of q8_0, q4_0, q4_1, nf4"):
        quant.pack(draw(), "q5_0")
    with pytest.raises(ValueError, match="data has 35 bytes, but 1 rows of 32 values in q8_0 have to be 34"):
        quant.from_gguf(torch.zeros(35, dtype=torch.uint8), "q8_0", (1, 32))


def test_a_gguf_block_whose_scale_is_not_finite_is_refused():
    data = to_gguf(quant.pack(draw(1, 32), "q4_0"))
    data[:2] = torch.tensor([torch.inf]).half().view(torch.uint8)
    with pytest.raises(ValueError, match="scale is not finite"):
        quant.from_gguf(data, "q4_0", (1, 32))
