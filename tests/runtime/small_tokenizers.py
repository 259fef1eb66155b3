"""Tokenizers of a few hundred tokens, of the classes that checkpoints come with."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

TEXTS = ("the light is on", "turn off the light please", "the garden door is open: yes", "2 + 2 = 4")


def byte_level(template=None, eos="<eos>", special=(), add_prefix_space=False, trim_offsets=False):
    """As GPT-2's, SmolLM2's or Qwen's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    names = [name for name in (eos, *special) if name]
    train = trainers.BpeTrainer(
        vocab_size=330, special_tokens=names, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(TEXTS, train)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **({"eos_token": eos} if eos else {}))
    fast.chat_template = template
    return fast


def sentencepiece(template=None, **how):
    """As Llama 2's, TinyLlama's or Mistral's: a space before each text, and bytes for rare characters."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for character in "▁abcdefghijklmnopqrstuvwxyz.=+:0123456789":
        vocabulary[character] = len(vocabulary)
    merges = [
        ("t", "h"),
        ("th", "e"),
        ("▁", "the"),
        ("o", "n"),
        ("▁", "on"),
        ("▁", "a"),
        ("y", "e"),
        ("ye", "s"),
    ]
    for left, right in merges:
        vocabulary.setdefault(left + right, len(vocabulary))
    tokenizer = LlamaTokenizer(vocab=vocabulary, merges=merges, add_bos_token=True, **how)
    tokenizer.chat_template = template
    return tokenizer


def unigram():
    """As T5's or XLM's: the likeliest pieces rather than merges."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    train = trainers.UnigramTrainer(
        vocab_size=80,
        special_tokens=["<unk>", "</s>"],
        unk_token="<unk>",
        initial_alphabet=[*"\n\t0123456789+=.:é😀"],
    )
    tokenizer.train_from_iterator(TEXTS, train)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


ALL = {
    "byte level": byte_level,
    "byte level, a space before": lambda: byte_level(add_prefix_space=True, trim_offsets=True),
    "SentencePiece": sentencepiece,
    "SentencePiece, legacy": lambda: sentencepiece(legacy=True),
    "SentencePiece, with ends": lambda: sentencepiece(add_eos_token=True),
    "unigram": unigram,
}
