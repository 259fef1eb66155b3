"""Asks llama.cpp for the log probability of every token after each of a few prompts.

    python -m edge_runtime.adapters.export.llama_cpp '[MODEL, ADAPTER or null, VOCABULARY, PROMPTS, OUTPUT]'

OUTPUT is an array (1 or 2, prompts, vocabulary) in NumPy's format: without the adapter, and with it.
"""

import json
import os
import sys
from typing import Any

import numpy as np
import xllamacpp


def main() -> None:
    """Do the work of the command line."""
    model, adapter, vocabulary, prompts, output = json.loads(sys.argv[1])
    server = xllamacpp.Server(_options(model, adapter))
    scales = [0.0, 1.0] if adapter else [0.0]
    logs = np.full((len(scales), len(prompts), vocabulary), np.nan, np.float32)
    for scores, scale in zip(logs, scales, strict=True):
        for row, prompt in zip(scores, prompts, strict=True):
            request = {"prompt": prompt, "n_predict": 1, "n_probs": vocabulary, "cache_prompt": False}
            request |= {"lora": [{"id": 0, "scale": scale}]} if adapter else {}
            answer = server.handle_completions(request)
            if "choices" not in answer:
                sys.exit(str(answer))
            for token in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
                row[token["id"]] = token["logprob"]
    np.save(output, logs)
    # without the server's own end, which waits for its threads
    os._exit(0)


def _options(model: str, adapter: str | None) -> Any:
    """One sequence at a time; keys and values in float32, on the CPU, without a word."""
    options = xllamacpp.CommonParams()
    options.model.path, options.n_ctx, options.n_parallel = model, 256, 1
    if adapter:
        lora = xllamacpp.CommonAdapterLoraInfo()
        lora.path, lora.scale = adapter, 1.0
        options.lora_adapters = [lora]
    options.n_gpu_layers = options.verbosity = 0
    # few tokens: threads would wait for each other longer than they work
    options.cpuparams.n_threads = options.cpuparams_batch.n_threads = 1
    options.warmup = options.fit_params = False
    options.cache_type_k = options.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    options.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return options


if __name__ == "__main__":
    main()
