"""The engine in ONNX Runtime writes what torch's engine writes, and takes adapters while sequences run."""

import threading
from pathlib import Path

import msgspec
import numpy as np
import pytest

from edge_runtime.adapters.export import onnx_base, onnx_form
from edge_runtime.errors import InputError
from edge_runtime.planning import graphs, processes
from edge_runtime.serving.onnx_engine import OnnxEngine
from edge_runtime.serving.torch_engine import TorchEngine


@pytest.fixture
def served(monkeypatch):
    """served(facts, learned, format): an engine; the graph is written here, without a process of its own."""

    def write(module, *_):
        request = msgspec.json.decode(module[1], type=onnx_form.GraphRequest)
        onnx_base.write(request)
        return b""

    monkeypatch.setattr(processes, "output", write)
    return lambda facts, learned=None, format="float32": OnnxEngine(facts, learned, format, 1)


PROMPT = [1, 17, 60, 4, 33, 8, 71]


def logits(engine, prompt=PROMPT, after=(5, 9)):
    """After a prompt, and after each of the tokens that follow."""
    sequence = engine.begin()
    return np.stack([sequence.feed(prompt), *(sequence.feed([token]) for token in after)])


@pytest.mark.parametrize("format", ["float32", "q4_1"])
def test_it_computes_what_torch_does(checkpoint, learn, served, format):
    facts = checkpoint("llama", max_position_embeddings=2048)
    learned = learn(facts, 3, scale=0.1)
    engine, truth = served(facts, learned, format), TorchEngine(facts, learned, format)
    needed = logits(truth)
    most = 1e-4 if format == "float32" else 0.2  # torch's activations are bfloat16, ONNX Runtime's int8
    assert np.abs(logits(engine) - needed).max() < most * needed.std()
    # the twin: another adapter
    engine.swap(learn(facts, 3, version=2))
    assert np.abs(logits(engine) - needed).max() > 0.5 * needed.std()


def test_a_cache_grows_without_a_trace(checkpoint, served):
    """700 tokens need three memories; one of 16 tokens would have none of the first piece."""
    engine = served(checkpoint("llama", max_position_embeddings=2048))
    ids = np.random.default_rng(0).integers(3, 96, 700).tolist()
    pieces = engine.begin()
    for first in range(0, 700, 250):
        grown = pieces.feed(ids[first : first + 250])
    whole = engine.begin().feed(ids)
    assert np.abs(grown - whole).max() < 1e-4 * whole.std()
    assert np.abs(engine.begin().feed(ids[-200:]) - whole).max() > 1e-2 * whole.std()


def test_running_sequences_keep_their_adapter_while_a_hundred_versions_come(checkpoint, learn, served):
    """One thread feeds, another swaps; every sequence has the logits of the version it began with."""
    facts = checkpoint("llama")
    versions = {version: learn(facts, version=version, scale=0.1) for version in (1, 2, 3)}
    engine = served(facts, versions[1])
    needed = {}
    for version, learned in versions.items():
        engine.swap(learned)
        needed[version] = logits(engine)
    ended = threading.Event()

    def swap():
        for number in range(100):
            engine.swap(versions[1 + number % 3])
        ended.set()

    thread, seen = threading.Thread(target=swap), set()
    thread.start()
    while not ended.is_set() or len(seen) < 2:
        sequence = engine.begin()
        rows = [sequence.feed(PROMPT), sequence.feed([5]), sequence.feed([9])]
        assert np.array_equal(np.stack(rows), needed[sequence.version])
        seen.add(sequence.version)
        if ended.is_set() and len(seen) < 2:
            engine.swap(versions[1 + sequence.version % 3])
    thread.join()


def test_what_does_not_fit_is_refused(checkpoint, learn, served):
    facts = checkpoint("llama", max_position_embeddings=64)
    engine = served(facts, learn(facts, 3))
    with pytest.raises(InputError, match="learned on 2 layers, but the base that is loaded has 3"):
        engine.swap(learn(facts, 2, version=2))
    sequence = engine.begin()
    sequence.feed([5] * 64)
    with pytest.raises(InputError, match="65 tokens, but the model's graph has 64 positions"):
        sequence.feed([5])


def test_an_engine_has_the_positions_of_its_graph(checkpoint, served):
    """Longrope turns all tokens by other angles in a sequence beyond the first training's, which a graph does not."""
    factors = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "original_max_position_embeddings": 16}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, **factors}
    facts = checkpoint("llama", max_position_embeddings=64, rope_parameters=rope)
    assert (served(facts).positions, TorchEngine(facts, None, "float32").positions) == (16, 64)


def test_a_half_written_graph_is_written_anew(checkpoint, served):
    """A process that is killed while it writes leaves its files beside the graph's place."""
    facts = checkpoint("llama")
    place = graphs.folder(facts, 4, "float32")
    half = Path(f"{place}.part") / place.name
    half.mkdir(parents=True)
    (half / "model.onnx").write_bytes(b"half")
    assert np.isfinite(logits(served(facts))).all()
    assert {file.name for file in place.parent.iterdir()} == {place.name, f"{place.name}.lock"}


def test_a_model_that_cannot_be_written_says_why(checkpoint):
    with pytest.raises(
        InputError, match="has heads of 8 values, which the graph for ONNX Runtime cannot compute"
    ):
        OnnxEngine(checkpoint("phi"), None, "float32", 1)
