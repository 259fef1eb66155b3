"""The tokenizer that a GGUF file holds, rebuilt from its metadata alone.

    tokenizer.ggml.model     "gpt2": merges of byte sequences inside the pieces of a text
                             "llama": merges by the tokens' scores, as SentencePiece does them
    tokenizer.ggml.pre       how "gpt2" splits a text into pieces (SPLITS)
    tokenizer.ggml.token_type    which tokens are found in a text before it is split

A file whose tokens would be other ones than llama.cpp's is refused by the name of its key.
Sources: llama.cpp's src/llama-vocab.cpp; the expressions are those of the models' own tokenizers.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from edge_runtime.errors import EdgeError, InputError
from edge_runtime.models.families import STRIPPED, STRIPPED_EXCEPT
from edge_runtime.models.gguf_header import Contents

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5
SPACE = "\u2581"  # stands for a space in SentencePiece's tokens
BY_SCORES = "llama"
MODELS = ("gpt2", BY_SCORES)
# numbers of special tokens that a file with scores may leave out
USUAL = {"bos": 1, "eos": 2, "unknown": 0}

# parts of the expressions that split a text
ENGLISH = r"'s|'t|'re|'ve|'m|'ll|'d"
ENDINGS = rf"(?i:{ENGLISH})"
WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
LOWER = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
UPPER = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
SIGNS_AND_SLASHES = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
FIRST = rf"{ENGLISH}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?!\S)|\s+"
THREE_DIGITS = "|".join((ENDINGS, WORD, r"\p{N}{1,3}", SIGNS, SPACES))
ONE_DIGIT = "|".join((ENDINGS, WORD, r"\p{N}", SIGNS, SPACES))
CASED = "|".join((LOWER, UPPER, r"\p{N}", SIGNS_AND_SLASHES, SPACES))
CASED_ENDINGS = "|".join(
    (f"{LOWER}{ENDINGS}?", f"{UPPER}{ENDINGS}?", r"\p{N}{1,3}", SIGNS_AND_SLASHES, SPACES)
)


class Split(NamedTuple):
    """How a text is split into pieces, and what else llama.cpp ties to the name of a split."""

    patterns: tuple[str, ...]  # each splits what the one before left
    whole: bool = False  # a piece that is a token is not merged from its bytes
    begins: bool = False  # a text begins with the token for that, unless the file says otherwise


SPLITS = {
    name: split
    for names, split in (
        (("default",), Split((r"[\p{P}\$\+<=>\^~\|]+", FIRST, r"\p{N}+", "[0-9][0-9][0-9]"))),
        (
            ("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "exaone4", "gigachat", "mellum"),
            Split((FIRST,)),
        ),
        (
            ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
            Split((r"\p{N}", FIRST)),
        ),
        (("llama-bpe", "llama3", "llama-v3"), Split((THREE_DIGITS,), True, True)),
        (("falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"), Split((THREE_DIGITS,), True, True)),
        (("dbrx", "smaug-bpe"), Split((THREE_DIGITS,))),
        (("qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "stablelm2"), Split((ONE_DIGIT,))),
        (("hunyuan", "solar-open", "grok-2"), Split((ONE_DIGIT,))),
        (("tekken",), Split((CASED,), True, True)),
        (
            ("deepseek-coder",),
            Split(
                ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+", r"\p{N}")
            ),
        ),
        (("seed-coder",), Split(("|".join((ENDINGS, WORD, r"\p{N}", r" ?[^\s\p{L}\p{N}\r\n]+", SPACES)),))),
        (("gpt-4o", "llama4", "kanana2"), Split((CASED_ENDINGS,))),
    )
    for name in names
}


class _Fields(NamedTuple):
    """The metadata of one file's tokenizer."""

    contents: Contents

    def get(self, key: str, missing: Any = None) -> Any:
        return self.contents.metadata.get(f"tokenizer.ggml.{key}", missing)

    def need(self, key: str) -> Any:
        if (value := self.get(key)) is None:
            raise InputError(
                f"{self.contents.files[0]} lacks the key tokenizer.ggml.{key}, which its tokenizer needs"
            )
        return value

    def refuse(self, key: str, value: Any, known: str) -> InputError:
        return InputError(f"{self.contents.files[0]} has tokenizer.ggml.{key} = {value}, but {known}")


def tokenizer(contents: Contents, rows: int) -> Any:
    """The tokenizer of a GGUF file, as transformers has it.

    Args:
        contents: of the file.
        rows: of the model's embedding; there may be fewer tokens, but not more.

    Raises:
        InputError: a key is missing, or the tokenizer cannot be rebuilt exactly.
    """
    from transformers import PreTrainedTokenizerFast

    fields = _Fields(contents)
    tokens, kinds = fields.need("tokens"), fields.need("token_type")
    if len(set(tokens)) != len(tokens) or len(tokens) > rows or len(kinds) != len(tokens):
        raise InputError(
            f"{contents.files[0]} has {len(tokens)} tokens, {len(set(tokens))} of them different, {len(kinds)} types of "
            f"tokens and {rows} rows of the embedding: there has to be one type and one row for each token"
        )
    split = _split(fields)
    built = _built(fields, tokens, kinds, split)
    ids = _special(fields, {} if split else USUAL, len(tokens))
    # an ordinary token that also pads, or stands for what is unknown, is found in texts as such
    ordinary = [name for name in ("padding", "unknown") if name in ids and kinds[ids[name]] == NORMAL]
    ids = {name: number for name, number in ids.items() if name not in ordinary}
    for token in _added(contents, tokens, kinds, set(ids.values())):
        built.add_special_tokens([token]) if token.special else built.add_tokens([token])
    _add_ends(fields, built, {name: (tokens[number], number) for name, number in ids.items()}, split)
    names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    return PreTrainedTokenizerFast(
        tokenizer_object=built,
        chat_template=contents.metadata.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        **{names[name]: tokens[number] for name, number in ids.items() if name in names},
    )


def _split(fields: _Fields) -> Split | None:
    """How texts are split before byte sequences are merged; None: merges are by scores."""
    if (model := fields.need("model")) not in MODELS:
        raise fields.refuse("model", model, f"known are {', '.join(MODELS)}")
    if model == BY_SCORES:
        return None
    name = fields.get("pre", "default")
    if name not in SPLITS:
        known = f"its way to split a text is not known here; known: {', '.join(SPLITS)}"
        raise fields.refuse("pre", name, known)
    return SPLITS[name]


def _built(fields: _Fields, tokens: list[str], kinds: list[int], split: Split | None) -> Tokenizer:
    try:
        return _of_merges(fields, tokens, split) if split else _of_scores(fields, tokens, kinds)
    except EdgeError:
        raise
    except Exception as error:  # the library has no kinds of its own
        raise InputError(f"{fields.contents.files[0]}: its tokenizer cannot be built: {error}") from error


def _add_ends(
    fields: _Fields, built: Tokenizer, ids: dict[str, tuple[str, int]], split: Split | None
) -> None:
    """Have texts begin and end with tokens, as the file says or llama.cpp does without a word of it."""
    usual = {"bos": split is None or split.begins, "eos": False}
    adds = [name for name, each in usual.items() if fields.get(f"add_{name}_token", each)]
    for name in adds:
        if name not in ids:
            raise fields.refuse(f"add_{name}_token", True, f"there is no {name}_token_id")
    if adds:
        pattern = [ids[name][0] if name in adds else None for name in usual]
        built.post_processor = processors.TemplateProcessing(
            single=[part for part in (pattern[0], "$A", pattern[1]) if part],
            special_tokens=[ids[name] for name in adds],
        )


def _of_merges(fields: _Fields, tokens: list[str], split: Split) -> Tokenizer:
    """Merges of bytes, each written as a character, in the order in which the file lists them."""
    # a token may begin with a space, so the space between two of them is a later one
    merges = [
        (merge[:at], merge[at + 1 :]) for merge in fields.need("merges") for at in (merge.find(" ", 1),)
    ]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    built = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=split.whole))
    pieces = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in split.patterns]
    built.pre_tokenizer = pre_tokenizers.Sequence(
        [*pieces, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    built.decoder = decoders.ByteLevel()
    return built


def _of_scores(fields: _Fields, tokens: list[str], kinds: list[int]) -> Tokenizer:
    """Two neighbours are merged where that gives a token, the token of the best score first."""
    scores, vocabulary = fields.need("scores"), {token: number for number, token in enumerate(tokens)}
    # others are found in a text before it is merged
    mergeable = [number for number, kind in enumerate(kinds) if kind in (NORMAL, UNUSED)]
    mergeable.sort(key=lambda number: -scores[number])
    merges: list[tuple[str, str]] = []
    last = None
    for number in mergeable:
        halves = [pair for pair in _halves(tokens[number]) if vocabulary.keys() >= set(pair)]
        if halves and scores[number] == last:
            raise fields.refuse(
                "scores", f"{last} for two tokens", f"then {tokens[number]!r} is merged in no order"
            )
        # not the halves themselves: two strings for each merge are much memory
        merges += ((tokens[vocabulary[left]], tokens[vocabulary[right]]) for left, right in halves)
        last = scores[number] if halves else last
    unknown = tokens[fields.get("unknown_token_id", USUAL["unknown"])]
    built = Tokenizer(models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    escaped, prefix = normalizers.Replace(" ", SPACE), fields.get("add_space_prefix", True)
    built.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), escaped]) if prefix else escaped
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    built.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return built


def _halves(token: str) -> Iterator[tuple[str, str]]:
    return ((token[:at], token[at:]) for at in range(1, len(token)))


def _special(fields: _Fields, usual: dict[str, int], count: int) -> dict[str, int]:
    """Numbers of special tokens by name; a model without an end of text cannot be trained here."""
    names = ("bos", "eos", "eot", "eom", "unknown", "padding")
    stated = {name: fields.get(f"{name}_token_id", usual.get(name)) for name in names}
    if stated["eos"] is None:
        fields.need("eos_token_id")
    for name, number in stated.items():
        if number is not None and not 0 <= number < count:
            raise fields.refuse(f"{name}_token_id", number, f"there are {count} tokens")
    return {name: number for name, number in stated.items() if number is not None}


def _added(contents: Contents, tokens: list[str], kinds: list[int], named: set[int]) -> Iterator[AddedToken]:
    """Tokens that are found in a text before it is split."""
    name = str(contents.metadata.get("general.name", "")).lower()
    strips = any(part in name for part in STRIPPED)
    for number, (token, kind) in enumerate(zip(tokens, kinds, strict=True)):
        special = kind in (CONTROL, UNKNOWN) or number in named
        if special or kind == USER_DEFINED:
            swallows = strips and token not in STRIPPED_EXCEPT
            yield AddedToken(token, special=special, normalized=False, rstrip=swallows)
