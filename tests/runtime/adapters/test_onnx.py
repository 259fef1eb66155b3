"""A model's graph in ONNX Runtime computes what the model computes in torch, with an adapter and without."""

import numpy as np
import onnxruntime
import pytest
import torch

from benchmarks.model_cases import CASES, build
from edge_runtime.adapters.export import forms, onnx, onnx_adapter, onnx_model
from edge_runtime.adapters.export.onnx_session import DATA, MODEL, session
from edge_runtime.errors import EdgeError, InputError
from edge_runtime.planning import graphs
from edge_runtime.state import once

IDS = np.random.default_rng(3).integers(3, 96, 21)


def torch_logits(model, ids=IDS):
    return model(torch.from_numpy(ids)[None]).logits[0].detach().numpy()


@pytest.mark.parametrize(
    ("family", "variant"), [(family, name) for family in CASES for name in CASES[family].variants]
)
def test_a_graph_computes_what_its_model_does(tmp_path, family, variant):
    model = build(family, variant)
    if variant == "key norms":
        with pytest.raises(
            InputError, match="the phi model has LayerNorms of query and key, which the graph"
        ):
            onnx_model.check(model)
        return
    onnx.write_base(model, "tiny", (0, 1), tmp_path)
    ids = IDS[: onnx_model.positions(model.config)]
    seen, needed = onnx.onnx_logits(session(tmp_path, 1), ids, None), torch_logits(model, ids)
    assert np.abs(seen - needed).max() < 1e-4 * np.abs(needed).max()
    # the twin: the same tokens in another order
    assert np.abs(seen - torch_logits(model, ids[::-1].copy())).max() > 1e-2 * np.abs(needed).max()


@pytest.mark.parametrize("family", ["phi3", "gemma3_text"])
def test_a_graph_ends_where_angles_would_change(family):
    """Longrope turns all tokens by other angles once a sequence is longer than the model's first training."""
    assert onnx_model.positions(build(family, "rope longrope").config) == 16
    assert onnx_model.positions(build(family, "tied").config) == 64


@pytest.mark.parametrize("rows", [1, 3])
def test_rows_of_unequal_length_go_together(tiny, tmp_path, rows):
    """Prompts are padded on the right; each row's next token goes to its place."""
    model = tiny("gpt2" if rows == 1 else "llama")
    onnx.write_base(model, "tiny", (0, 1, 2, 3), tmp_path)
    runtime, lengths = session(tmp_path, 1), [9, 4, 7][:rows]
    ids = np.stack([np.roll(IDS[:9], row) for row in range(rows)])
    mask = (np.arange(9) < np.array(lengths)[:, None]).astype(np.int64)
    cache = {
        entry.name: np.zeros((rows, entry.shape[1], 0, entry.shape[3]), np.float32)
        for entry in runtime.get_inputs()
        if entry.name.startswith("past")
    }
    (logits,) = runtime.run(["logits"], {"input_ids": ids, "attention_mask": mask, **cache})
    for row, length in enumerate(lengths):
        needed = torch_logits(model, ids[row, :length])
        assert np.abs(logits[row, :length] - needed).max() < 1e-4 * np.abs(needed).max()


@pytest.mark.parametrize("format", ["float32", "bfloat16", "q8_0", "q4_0", "q4_1"])
def test_an_export_is_exact_on_the_weights_that_were_trained_on(checkpoint, learn, tmp_path, format):
    """`to_onnx` compares with torch; here ONNX Runtime's own way to an adapter is taken as well."""
    facts = checkpoint("llama", intermediate_size=80)  # no whole blocks of 32
    learned = learn(facts, 3, version=7, scale=0.1)
    onnx.to_onnx(learned, format, tmp_path / "out")
    about = session(tmp_path / "out", 1).get_modelmeta().custom_metadata_map
    assert (about["model_class"], about["layers"]) == (facts.model_class, "0 1 3")
    held = onnxruntime.AdapterFormat.read_adapter(str(tmp_path / "out" / "adapter.onnx_adapter"))
    assert held.get_adapter_version() == 7
    options, adapter = onnxruntime.RunOptions(), onnxruntime.LoraAdapter()
    adapter.Load(str(tmp_path / "out" / "adapter.onnx_adapter"))
    options.add_active_adapter(adapter)
    runtime = onnxruntime.InferenceSession(tmp_path / "out" / MODEL, providers=["CPUExecutionProvider"])
    feeds = {"input_ids": IDS[None], "attention_mask": np.ones((1, len(IDS)), np.int64)}
    feeds |= {
        f"past_key_values.{n}.{part}": np.zeros((1, 2, 0, 16), np.float32)
        for n in range(3)
        for part in ("key", "value")
    }
    adapted, base = (runtime.run(["logits"], feeds, how)[0] for how in (options, None))
    assert np.abs(adapted - base).max() > 0.1 * base.std()


def test_export_writes_the_folder_with_its_label_head(checkpoint, learn, tmp_path):
    """And no lock of a graph that a server has in the cache."""
    facts = checkpoint("llama")
    once(graphs.folder(facts, 4, "q8_0"), lambda fresh: fresh.mkdir())
    head = np.ones((2, facts.hidden), np.float32)
    learned = learn(facts, scale=0.1)._replace(labels=("a", "b"), head=head)
    forms.export("onnx", learned, tmp_path / "out", "q8_0")
    files = {file.name for file in (tmp_path / "out").iterdir()}
    assert files >= {MODEL, DATA, "adapter.onnx_adapter", "genai_config.json", "label_head.safetensors"}
    assert not any(name.endswith((".lock", ".part")) for name in files)


def test_an_adapter_may_have_some_roles_alone(checkpoint, learn, tmp_path):
    facts = checkpoint("qwen2")
    learned = learn(facts)
    kept = {place: factors for place, factors in learned.factors.items() if place[1] in ("q", "v", "down")}
    onnx.to_onnx(learned._replace(factors=kept), "float32", tmp_path / "out")


@pytest.mark.parametrize(
    "fault",
    [
        "the adapter is not applied",
        "another scale",
        "another layer",
        "q and k change places",
        "a weight is another",
    ],
)
def test_a_difference_is_an_error_with_figures_and_the_files_are_removed(
    checkpoint, learn, tmp_path, monkeypatch, fault
):
    facts = checkpoint("llama", num_key_value_heads=4)
    learned, write = learn(facts), onnx_adapter.write

    def altered(learned, file):
        factors = dict(learned.factors)
        if fault == "the adapter is not applied":
            factors = {place: (A, 0 * B) for place, (A, B) in factors.items()}
        elif fault == "another scale":
            factors = {place: (A, 1.01 * B) for place, (A, B) in factors.items()}
        elif fault == "another layer":
            factors |= {(0, "o"): factors[1, "o"], (1, "o"): factors[0, "o"]}
        elif fault == "q and k change places":
            factors |= {(0, "q"): factors[0, "k"], (0, "k"): factors[0, "q"]}
        else:
            data = bytearray((file.parent / DATA).read_bytes())
            data[2] ^= 1  # of the first token's embedding
            (file.parent / DATA).write_bytes(data[:4096] + bytes(4096) + data[8192:])
        write(learned._replace(factors=factors), file)

    monkeypatch.setattr(onnx_adapter, "write", altered)
    with pytest.raises(
        EdgeError, match=r"ONNX Runtime computes something else .*: [\d.]+% of what .* removed"
    ):
        forms.export("onnx", learned, tmp_path / "out", "float32")
    assert not any(tmp_path.glob("out*"))


def test_positions_that_are_another_are_seen(tiny, tmp_path):
    """The twin of the graph's positions: a cache that begins a token later."""
    model = tiny("llama")
    onnx.write_base(model, "tiny", (0, 1, 2, 3), tmp_path)
    runtime, needed = session(tmp_path, 1), torch_logits(model)
    cache = {
        entry.name: np.zeros((1, 2, 1, 16), np.float32)
        for entry in runtime.get_inputs()
        if entry.name.startswith("past")
    }
    feeds = {"input_ids": IDS[None], "attention_mask": np.ones((1, len(IDS) + 1), np.int64), **cache}
    (seen,) = runtime.run(["logits"], feeds)
    assert np.abs(seen[0] - needed).max() > 1e-2 * np.abs(needed).max()


def test_a_label_head_gives_its_logits(checkpoint, learn, tmp_path):
    facts = checkpoint("llama")
    H = np.random.default_rng(0).normal(size=(3, facts.hidden)).astype(np.float32)
    learned = learn(facts)._replace(labels=("a", "b", "c"), head=H)
    onnx.to_onnx(learned, "float32", tmp_path / "out")
    assert onnx_adapter.inputs(learned)[onnx_adapter.HEAD].shape() == [3, facts.hidden]
    options, adapter = onnxruntime.RunOptions(), onnxruntime.LoraAdapter()
    adapter.Load(str(tmp_path / "out" / "adapter.onnx_adapter"))
    options.add_active_adapter(adapter)
    feeds = {"input_ids": IDS[None], "attention_mask": np.ones((1, len(IDS)), np.int64)}
    feeds |= {
        f"past_key_values.{n}.{part}": np.zeros((1, 2, 0, 16), np.float32)
        for n in range(4)
        for part in ("key", "value")
    }
    runtime = session(tmp_path / "out", 1)
    (scores,) = runtime.run(["label_logits"], feeds, options)
    assert scores.shape == (1, len(IDS), 3)
    (none,) = runtime.run(["label_logits"], feeds)
    assert none.shape == (1, len(IDS), 0)


@pytest.mark.parametrize(
    ("family", "changes", "problem"),
    [
        ("llama", {"hidden_act": "tanh"}, "the activation tanh"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "attention to later tokens"),
        ("phi", {}, "heads of 8 values"),
        ("phi", {"num_attention_heads": 2, "num_key_value_heads": 2}, "rotary embeddings of 8 values"),
    ],
)
def test_what_the_graph_cannot_compute_is_refused_by_name(tiny, family, changes, problem):
    with pytest.raises(InputError, match=f"the {family} model has {problem}"):
        onnx_model.check(tiny(family, **changes))


def test_a_format_without_an_operator_is_refused(checkpoint, learn, tmp_path):
    with pytest.raises(
        InputError, match=r"is in nf4, which .* export from float32, bfloat16 or q8_0, q4_0, q4_1"
    ):
        onnx.to_onnx(learn(checkpoint("llama")), "nf4", tmp_path / "out")
