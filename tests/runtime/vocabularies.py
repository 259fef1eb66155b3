"""Small vocabularies for GGUF files, trained on the repository's own text, with the keys that state them."""

import functools
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

SPECIAL = {"<unk>": 2, "<s>": 3, "</s>": 3, "<|user|>": 3, "<|end|>": 3}  # by token_type
# what a pre-tokenizer may treat in more than one way
TEXTS = (
    "In 2024 I'll pay 1,000,000 or 3.14159; DON'T you'RE they've it's 'quoted'",
    "Ärger im Bücherregal, naïve café; Élan ÉTÉ. Привет МИР! 日本語、漢字 한국어 नमस्ते x² ½ ٣٤٥",
    "  def f(x):\n\n\n\treturn {a: [1, 2]}  # spaces   \r\n\u00a0nbsp \u3000wide e\u0301 👩‍👩‍👧 <tag> a/b//c --- !!! €100",
    "<|user|>\n hello<|end|>\n<s> camelCase HTMLParser</s>  two",
    "",
    " ",
    "\n",
)


def corpus() -> list[str]:
    root = Path(__file__).parents[2]
    return [*((root / name).read_text(encoding="utf-8") for name in ("README.md", "docs/methods.md")), *TEXTS]


@functools.cache
def of_merges(pre: str, patterns: tuple[str, ...], **more: object) -> dict[str, object]:
    """Byte-level merges, learned on pieces that these patterns make."""
    built = Tokenizer(models.BPE())
    pieces = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    built.pre_tokenizer = pre_tokenizers.Sequence(
        [*pieces, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokens, merges = _trained(built, corpus(), pre_tokenizers.ByteLevel.alphabet())
    return {
        "ggml.model": "gpt2",
        "ggml.pre": pre,
        "ggml.tokens": [*SPECIAL, "  ", *tokens],
        "ggml.token_type": [*SPECIAL.values(), 4, *[1] * len(tokens)],
        "ggml.merges": [" ".join(merge) for merge in merges],
        "ggml.bos_token_id": 1,
        "ggml.eos_token_id": 2,
        **more,
    }


@functools.cache
def of_scores(**more: object) -> dict[str, object]:
    """SentencePiece's way: merges of characters by score, and bytes for what is no token."""
    built = Tokenizer(models.BPE())
    built.pre_tokenizer = pre_tokenizers.Split(Regex("\u2581"), "merged_with_next")
    tokens, merges = _trained(built, [text.replace(" ", "\u2581") for text in corpus()], [])
    ranks = {"".join(merge): -float(rank) for rank, merge in reversed([*enumerate(merges)])}
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    return {
        "ggml.model": "llama",
        "ggml.tokens": [*SPECIAL, *pieces, *tokens],
        "ggml.scores": [0.0] * (len(SPECIAL) + 256) + [ranks.get(token, -1e4) for token in tokens],
        "ggml.token_type": [*SPECIAL.values(), *[6] * 256, *[1] * len(tokens)],
        **more,
    }


def _trained(
    built: Tokenizer, texts: list[str], alphabet: list[str]
) -> tuple[list[str], list[tuple[str, str]]]:
    """Tokens by number, and merges in order."""
    import json

    trainer = trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False)
    built.train_from_iterator(texts, trainer)
    model = json.loads(built.to_str())["model"]
    merges = [
        tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in model["merges"]
    ]
    return sorted(model["vocab"], key=model["vocab"].get), merges
