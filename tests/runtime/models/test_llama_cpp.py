"""What llama.cpp itself makes of a GGUF file: logits and tokens are those of the model that is trained."""

import json
import urllib.request

import gguf
import pytest
import torch
import vocabularies

from benchmarks import gguf_models, model_cases
from edge_runtime.models import gguf_header, gguf_tokenizer, weights
from edge_runtime.models.prepare import prepare

xllamacpp = pytest.importorskip("xllamacpp", reason="llama.cpp is not installed")
# llama.cpp takes some activations (GELU) from a table of half precision
LARGEST = {"llama": 1e-3, "qwen2": 1e-3, "qwen3": 1e-3, "phi3": 1e-3}
ROUGH = 1e-2
QUANTISED = 0.8  # beside quantised matrices it rounds activations to 8 bits


def server(path):
    """llama.cpp with a file, all of it in float32."""
    options = xllamacpp.CommonParams()
    options.model.path, options.n_ctx, options.n_parallel = str(path), 64, 1
    options.warmup = options.fit_params = False
    options.cpuparams.n_threads = options.cpuparams_batch.n_threads = 1
    options.cache_type_k = options.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    options.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    started = xllamacpp.Server(options)
    # its end waits for its loop, for ever where the loop has not begun
    started.handle_completions({"prompt": [0], "n_predict": 1})
    return started


def log_probabilities(path, ids, vocabulary):
    """Of the token after these."""
    request = {"prompt": ids, "max_tokens": 1, "logprobs": vocabulary, "n_probs": vocabulary}
    request |= {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    answer = server(path).handle_completions(request)
    seen = torch.full((vocabulary,), torch.nan)
    for token in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
        seen[token["id"]] = token["logprob"]
    return seen


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "variant", "kind"),
    [
        ("llama", "biases", "F32"),
        ("llama", "rope linear", "F32"),
        ("llama", "rope llama3", "F32"),
        ("llama", "rope longrope", "F32"),
        ("qwen2", "rope yarn", "F32"),
        ("llama", "tied", "Q4_K"),
        ("llama", "tied", "Q6_K"),
        ("qwen3", "untied", "F32"),
        ("gemma", "tied", "F32"),
        ("gemma2", "softcaps", "F32"),
        ("gemma2", "window", "F32"),
        ("gemma3_text", "window", "F32"),
        ("gemma3_text", "rope linear", "F32"),
        ("phi", "rope linear", "F32"),
        ("phi3", "partial rotary", "F32"),
        ("phi3", "rope longrope", "F32"),
        ("gpt2", "tied", "F32"),
    ],
)
def test_logits_are_llama_cpps(family, variant, kind, tmp_path):
    model = model_cases.build(family, variant)
    path = gguf_models.write(model, tmp_path / "model.gguf", gguf.GGMLQuantizationType[kind])
    facts = prepare(str(path), tmp_path, tmp_path / "cache")
    tokens = model_cases.ids()[:1]
    ours = weights.load(facts, facts.layers, "float32")(tokens).logits[0, -1].log_softmax(-1)
    theirs = log_probabilities(path, tokens[0].tolist(), facts.vocabulary)
    largest = LARGEST.get(family, ROUGH) if kind == "F32" else QUANTISED
    assert (ours - theirs).abs().max() < largest
    other = model_cases.build(family, "untied" if variant == "tied" else "tied")
    assert (other(tokens).logits[0, -1].log_softmax(-1) - theirs).abs().max() > max(0.1, 4 * largest)


NAMES = {split: name for name, split in gguf_tokenizer.SPLITS.items()}  # one of each way to split
VOCABULARIES = {
    **{name: vocabularies.of_merges(name, split.patterns) for split, name in NAMES.items()},
    "scores": vocabularies.of_scores(),
    "scores without a space": vocabularies.of_scores(**{"ggml.add_space_prefix": False}),
    "with an end": vocabularies.of_scores(**{"ggml.add_bos_token": False, "ggml.add_eos_token": True}),
}


@pytest.mark.parametrize("name", VOCABULARIES)
def test_tokens_are_llama_cpps(name, tiny, tmp_path):
    vocabulary = VOCABULARIES[name]
    rows = len(vocabulary["ggml.tokens"])
    model = tiny("llama", vocab_size=rows, num_hidden_layers=1)
    path = gguf_models.write(model, tmp_path / "model.gguf", vocabulary=vocabulary)
    ours, theirs = gguf_tokenizer.tokenizer(gguf_header.read(path), rows), server(path)
    for text in vocabularies.TEXTS:
        content = json.dumps({"content": text, "add_special": True, "parse_special": True}).encode()
        request = urllib.request.Request(
            f"{theirs.listening_address}/tokenize", content, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert ours(text).input_ids == json.load(answer)["tokens"], text
