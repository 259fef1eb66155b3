"""Packed and streamed weights compute nearly what dense ones do."""

import shutil
import weakref
from importlib import import_module

import msgspec
import pytest
import torch
from edge_kernels import expand
from family_cases import CASES

from edge_runtime import settings
from edge_runtime.adapters import attach
from edge_runtime.errors import InputError
from edge_runtime.methods import fedit
from edge_runtime.models import structure, weights
from edge_runtime.models.packed import PackedLinear
from edge_runtime.trainer.step import recomputed_blocks

FEDIT = fedit.METHOD
IDS = torch.arange(3, 43).reshape(2, 20)


@torch.no_grad()
def logits_of(facts, depth, format):
    ids = torch.arange(100, 132)[None]
    return weights.load(facts, depth, format)(ids, use_cache=False).logits.float()


def test_a_gguf_files_own_blocks_give_the_logits_of_the_expanded_ones(demo_facts):
    packed = logits_of(demo_facts, 3, "q4_1")
    assert torch.allclose(packed, logits_of(demo_facts, 3, "bfloat16"), rtol=0.02, atol=0.05)
    assert not torch.allclose(packed, logits_of(demo_facts, 2, "bfloat16"), rtol=0.02, atol=0.05)


@pytest.mark.parametrize("format", ["q8_0", "q4_1", "q4_0", "nf4"])
def test_a_folders_matrices_are_packed_while_loading(tiny_facts, format):
    model = weights.load(tiny_facts, 2, format)
    layer = structure.blocks(model)[0].mlp.up_proj
    assert isinstance(layer, PackedLinear) and layer.weight.format == format
    assert model.get_input_embeddings().weight.format == model.get_output_embeddings().weight.format == "q8_0"
    assert not any(parameter.is_meta for parameter in model.parameters())
    seen, truth = logits_of(tiny_facts, 2, format), logits_of(tiny_facts, 2, "float32")
    assert float((seen - truth).norm() / truth.norm()) < (0.05 if format == "q8_0" else 0.4)


def test_an_embedding_expands_only_the_rows_it_is_asked_for(tiny_facts, monkeypatch):
    embedding = weights.load(tiny_facts, 2, "q4_0").get_input_embeddings()
    expanded = []
    subject = import_module("edge_runtime.models.packed")
    monkeypatch.setattr(
        subject, "expand", lambda packed, dtype: expanded.append(packed.shape) or expand(packed, dtype)
    )
    ids = torch.tensor([[5, 7, 5]])
    rows = embedding(ids)
    assert expanded == [(3, rows.shape[-1])]
    assert torch.equal(rows[0], expand(embedding.weight)[ids[0]].bfloat16())


@pytest.mark.parametrize("family", [name for name, case in CASES.items() if case.packable])
def test_every_other_family_computes_nearly_the_same_packed(tiny, facts_of, family, tmp_path):
    model = tiny(family)
    model.save_pretrained(tmp_path)
    facts = facts_of(model, folder=str(tmp_path), weights=str(tmp_path))
    ids = IDS % 90
    with torch.no_grad():
        truth = model(ids, use_cache=False).logits
        seen = weights.load(facts, 4, "q8_0")(ids, use_cache=False).logits.float()
    assert float((seen - truth).norm() / truth.norm()) < 0.1


def test_streamed_blocks_compute_the_same_from_files_of_the_checkpoints_layers(tiny_facts, tmp_path):
    facts = msgspec.structs.replace(
        tiny_facts, folder=str(shutil.copytree(tiny_facts.folder, tmp_path / "facts"))
    )
    ids = torch.arange(5, 37)[None] % 90
    held = weights.load(facts, 2, "q4_1")
    for _ in range(2):  # the second time the files are there
        streamed = weights.load(facts, 2, "q4_1", streamed=True)
        with torch.no_grad():
            assert torch.equal(streamed(ids, use_cache=False).logits, held(ids, use_cache=False).logits)
    files = sorted(file.name for file in (tmp_path / "facts" / "streamed-q4_1").glob("*.safetensors"))
    assert files == ["0.safetensors", f"{facts.layers - 1}.safetensors"]
    (tmp_path / "facts" / "streamed-q4_1" / files[0]).write_bytes(b"")
    with (
        pytest.raises(InputError, match=r"0.safetensors, made of the model's weights, cannot be read"),
        torch.no_grad(),
    ):
        streamed(ids, use_cache=False)


def test_a_streamed_block_lets_go_of_its_matrices_until_it_runs_again(tiny_facts, tmp_path):
    facts = msgspec.structs.replace(
        tiny_facts, folder=str(shutil.copytree(tiny_facts.folder, tmp_path / "facts"))
    )
    seen = {}
    for streamed in (False, True):
        model = weights.load(facts, 2, "q8_0", streamed=streamed)
        adapter = attach.attach(model, (0, facts.layers - 1), settings.Adapter(rank=2), FEDIT, seed=0)
        with torch.no_grad():
            adapter.factors["layers.0.q.B"].fill_(0.01)
        read = []
        for block in structure.blocks(model):
            block.mlp.register_forward_pre_hook(
                lambda mlp, _, read=read: read.append(weakref.ref(mlp.up_proj.base.weight.quants))
            )
        with recomputed_blocks(model):
            hidden = model.base_model(input_ids=torch.arange(5, 21)[None], use_cache=False).last_hidden_state
            loss = hidden.float().square().mean()
            alive = [tensor() is not None for tensor in read]
            loss.backward()
        seen[streamed] = {key: factor.grad.clone() for key, factor in adapter.factors.items()}
        assert alive == [not streamed] * 2
        assert len(read) == 4  # each block again in backward
    assert all(torch.equal(seen[True][key], seen[False][key]) for key in seen[True])
    assert seen[True]["layers.0.q.A"].any()
