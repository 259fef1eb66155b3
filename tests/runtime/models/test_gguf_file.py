"""The demo's GGUF file, against what gguf and transformers read from it."""

from pathlib import Path

import gguf
import msgspec
import numpy as np
import pytest
import torch
from edge_kernels import expand

from edge_runtime.demo import model as demo
from edge_runtime.errors import InputError
from edge_runtime.models import gguf_file, gguf_header, weights
from edge_runtime.models.slices import kept_layers

IDS = torch.arange(3, 43).reshape(2, 20)


@pytest.fixture(scope="module")
def reader():
    """The demo's file as the gguf package reads it, which takes seconds."""
    return gguf.GGUFReader(demo.path())


@pytest.fixture(scope="module")
def tensors_of_the_file(reader):
    """name -> float32 values, as the gguf package reads them."""
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    return lambda name: torch.from_numpy(
        gguf.quants.dequantize(tensors[name].data, tensors[name].tensor_type).astype(np.float32)
    )


def interleaved(rows, heads):
    """What llama.cpp's converter does to the query and key rows of a Llama."""
    return rows.reshape(heads, 2, len(rows) // heads // 2, -1).transpose(1, 2).reshape(rows.shape)


def test_a_slice_of_a_gguf_file_holds_exactly_its_layers(demo_facts, tensors_of_the_file):
    state = weights.load(demo_facts, 3, "float32").state_dict()
    assert {name.split(".")[2] for name in state if ".layers." in name} == {"0", "1", "2"}
    names = {
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for ours, theirs in enumerate((0, 1, 29)):
        for name, inner in names.items():
            seen = state[f"model.layers.{ours}.{name}.weight"]
            assert torch.equal(seen, tensors_of_the_file(f"blk.{theirs}.{inner}.weight")), name
        for name, inner, heads in (("q", "attn_q", 9), ("k", "attn_k", 3)):
            seen, held = (
                state[f"model.layers.{ours}.self_attn.{name}_proj.weight"],
                f"blk.{theirs}.{inner}.weight",
            )
            assert torch.equal(interleaved(seen, heads), tensors_of_the_file(held)), name
            assert not torch.equal(seen, tensors_of_the_file(held))
    assert torch.equal(state["model.embed_tokens.weight"], tensors_of_the_file("token_embd.weight"))
    assert torch.equal(state["model.norm.weight"], tensors_of_the_file("output_norm.weight"))
    assert state["lm_head.weight"].data_ptr() == state["model.embed_tokens.weight"].data_ptr()
    assert not torch.equal(
        state["model.layers.2.mlp.up_proj.weight"], tensors_of_the_file("blk.2.ffn_up.weight")
    )  # the check sees a layer that should have been dropped


@pytest.mark.parametrize("shape", [(8,), (8, 3)])
def test_interleaved_rows_are_put_back_in_a_bias_as_in_a_weight(tmp_path, shape):
    truth = torch.arange(8 * shape[-1] if len(shape) > 1 else 8, dtype=torch.float32).view(shape)
    path = tmp_path / "rows"
    path.write_bytes(interleaved(truth.view(8, -1), 2).numpy().tobytes())
    kind = gguf.GGMLQuantizationType.F32
    tensors = {str(heads): gguf_file.Tensor(0, kind, shape, interleaved_heads=heads) for heads in (0, 2)}
    read = gguf_file.GGUFTensors([path], tensors)
    assert torch.equal(read.dense("2", torch.float32), truth)
    assert not torch.equal(read.dense("0", torch.float32), truth)


def with_layers(reader, layers, path):
    """Write these layers of a file, and no tokenizer: its lists take transformers most of the time."""
    writer = gguf.GGUFWriter(path, "llama")
    for field in reader.fields.values():
        group, _, name = field.name.partition(".")
        if group == "llama" and name not in ("block_count", "vocab_size"):
            writer.add_key_value(field.name, field.contents(), field.types[0])
    writer.add_block_count(len(layers))
    writer.add_vocab_size(next(len(one.data) for one in reader.tensors if one.name == "token_embd.weight"))
    numbers = {str(layer): str(number) for number, layer in enumerate(layers)}
    for tensor in reader.tensors:
        parts = tensor.name.split(".")
        if parts[0] == "blk":
            parts[1] = numbers.get(parts[1], "")
        if parts[1]:
            writer.add_tensor(".".join(parts), tensor.data, raw_dtype=tensor.tensor_type)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()


def test_transformers_reads_the_same_model_from_the_gguf_file(demo_facts, reader, tmp_path):
    from transformers import AutoModelForCausalLM

    with_layers(reader, kept_layers(6, 30), tmp_path / "slice.gguf")
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="slice.gguf", dtype=torch.float32
    ).eval()
    ours = weights.load(demo_facts, 6, "float32")
    with torch.no_grad():
        truth, seen = theirs(IDS).logits, ours(IDS).logits
        assert (seen - truth).abs().max() < 1e-4 * truth.abs().max()
        ours.model.layers[3].self_attn.q_proj.weight.copy_(
            interleaved(ours.model.layers[3].self_attn.q_proj.weight.clone(), 9)
        )
        assert (ours(IDS).logits - truth).abs().max() > 1e-2 * truth.abs().max()


def test_a_gguf_matrix_keeps_its_bytes_and_another_format_is_near(demo_facts):
    index = msgspec.json.decode(
        (Path(demo_facts.folder) / "tensors.json").read_bytes(), type=dict[str, gguf_file.Tensor]
    )
    name, read = (
        "model.layers.0.self_attn.q_proj.weight",
        gguf_file.GGUFTensors([Path(demo_facts.weights)], index),
    )
    dense = read.dense(name, torch.float32)
    assert index[name].interleaved_heads
    assert torch.equal(expand(read.packed(name, "q4_1")), dense)
    for format, error in (("q8_0", 0.01), ("q4_0", 0.12), ("nf4", 0.12)):
        found = expand(read.packed(name, format))
        assert float((found - dense).norm() / dense.norm()) < error


def test_a_gguf_tensor_in_a_format_that_cannot_be_expanded_is_refused(demo_facts, monkeypatch):
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(demo_facts.folder)
    contents = gguf_header.read(demo.path())
    norm = {"output_norm.weight": contents.tensors["output_norm.weight"]}
    where = (contents._replace(tensors=norm), {"model.norm.weight": (demo_facts.hidden,)}, config)
    assert gguf_file.index(*where)["model.norm.weight"].shape == (demo_facts.hidden,)
    monkeypatch.setattr(gguf_file, "_expandable", lambda kind: kind.name != "F32")
    with pytest.raises(InputError, match=r"output_norm\.weight is held in F32, which cannot be expanded"):
        gguf_file.index(*where)


@pytest.mark.parametrize(
    ("kind", "can"), [("F32", True), ("Q4_K", True), ("IQ2_XXS", True), ("I32", False), ("Q8_K", False)]
)
def test_what_the_gguf_package_expands(kind, can):
    assert gguf_file._expandable(gguf.GGMLQuantizationType[kind]) is can
