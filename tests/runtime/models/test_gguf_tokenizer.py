"""The tokenizer of a GGUF file is the file's own, or the file is refused. test_llama_cpp.py: its tokens are llama.cpp's."""

import shutil

import pytest
import vocabularies

from benchmarks import gguf_models, model_cases
from edge_runtime.compat import fast_tokenizer
from edge_runtime.demo import model as demo
from edge_runtime.errors import InputError
from edge_runtime.models import gguf_header, gguf_tokenizer
from edge_runtime.models.prepare import prepare

TEMPLATE = "{% for m in messages %}{{ '<|user|>' + m.content + '<|end|>' }}{% endfor %}"


@pytest.fixture
def contents_of(tmp_path):
    """contents_of(vocabulary, **changes): what the headers of a file with these keys say; None: missing."""

    def read(vocabulary, **changes):
        vocabulary = {**vocabulary, **{f"ggml.{key}": value for key, value in changes.items()}}
        vocabulary = {key: value for key, value in vocabulary.items() if value is not None}
        path = gguf_models.write(
            model_cases.build("llama", "tied"), tmp_path / "t.gguf", vocabulary=vocabulary
        )
        return gguf_header.read(path)

    return read


MERGES = vocabularies.of_merges("smollm", gguf_tokenizer.SPLITS["smollm"].patterns)
SCORES = vocabularies.of_scores()


def pieces(tokenizer, text):
    return [tokenizer.decode([number]) for number in tokenizer(text, add_special_tokens=False).input_ids]


def test_a_real_files_text_is_split_as_its_pre_tokenizer_says():
    contents = gguf_header.read(demo.path())
    ours = gguf_tokenizer.tokenizer(contents, 49152)
    text = "In 2024, I'm\n\n  here"
    truth = ["In", " ", "2", "0", "2", "4", ",", " I", "'m", "\n\n ", " here"]
    assert pieces(ours, text) == truth
    for pre in ("default", "qwen2"):  # one splits contractions, the other spaces after an end of line
        contents.metadata["tokenizer.ggml.pre"] = pre
        assert pieces(gguf_tokenizer.tokenizer(contents, 49152), text) != truth
    assert ours.eos_token == "<|im_end|>" and ours.bos_token == "<|im_start|>"
    chat = ours.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    assert chat.endswith("<|im_start|>user\nhello<|im_end|>\n")


@pytest.mark.parametrize("beside", ["nothing", "the model's", "another's"])
def test_a_tokenizer_beside_the_file_is_passed_over(beside, demo_facts, tmp_path):
    vocabulary = {**SCORES, "chat_template": TEMPLATE, "ggml.eos_token_id": 4}
    rows = len(vocabulary["ggml.tokens"])
    model = model_cases.build("llama", "tied")
    model.resize_token_embeddings(rows)
    path = gguf_models.write(model, tmp_path / "model.gguf", vocabulary=vocabulary)
    alone = gguf_tokenizer.tokenizer(gguf_header.read(path), rows)
    if beside == "the model's":
        alone.save_pretrained(tmp_path)
    if beside == "another's":
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(f"{demo_facts.folder}/{file}", tmp_path)
    facts = prepare(str(path), tmp_path, tmp_path / "cache")
    ours = fast_tokenizer.load(tmp_path / "cache" / facts.folder)
    for text in vocabularies.TEXTS:
        assert ours(text).input_ids == alone(text).input_ids
        assert ours.decode(ours(text).input_ids, skip_special_tokens=True) != "" or not text.strip()
    assert (ours.eos_token, ours.chat_template) == ("<|end|>", TEMPLATE)


def test_begin_and_end_are_added_as_the_file_says(contents_of):
    def ends(vocabulary, **changes):
        contents = contents_of(vocabulary, **changes)
        numbers = gguf_tokenizer.tokenizer(contents, 2000)("light").input_ids
        return numbers[0] == 1, numbers[-1] == 2

    assert ends(SCORES) == (True, False)
    assert ends(SCORES, add_bos_token=False, add_eos_token=True) == (False, True)
    assert ends(MERGES) == (False, False)
    assert ends(MERGES, pre="llama-bpe") == (True, False)
    assert ends(MERGES, pre="llama-bpe", add_bos_token=False) == (False, False)


@pytest.mark.parametrize("name", ["padding", "unknown"])
def test_an_ordinary_token_that_pads_or_stands_for_the_unknown_stays_text(contents_of, name):
    number = MERGES["ggml.tokens"].index("!")
    plain, named = (
        gguf_tokenizer.tokenizer(contents_of(MERGES, **changes), 2000)
        for changes in ({}, {f"{name}_token_id": number})
    )
    text = "light!! on!"
    assert named(text).input_ids == plain(text).input_ids
    assert named.decode(named(text).input_ids, skip_special_tokens=True) == text
    assert number not in named.all_special_ids
    end = gguf_tokenizer.tokenizer(contents_of(MERGES, eos_token_id=number), 2000)  # but an end is special
    assert number in end.all_special_ids


def test_special_tokens_of_some_models_swallow_the_spaces_after_them(contents_of):
    contents = contents_of(SCORES)
    text = "<|user|>\n hello"
    plain = gguf_tokenizer.tokenizer(contents, 2000)(text).input_ids
    contents.metadata["general.name"] = "Phi-3 Mini"
    swallowed = gguf_tokenizer.tokenizer(contents, 2000)(text).input_ids
    assert swallowed == gguf_tokenizer.tokenizer(contents, 2000)("<|user|>hello").input_ids != plain


@pytest.mark.parametrize(
    ("vocabulary", "changes", "reason"),
    [
        (
            MERGES,
            {"pre": "viking"},
            r"tokenizer\.ggml\.pre = viking, but its way to split a text is not known",
        ),
        (MERGES, {"model": "t5"}, r"tokenizer\.ggml\.model = t5, but known are gpt2, llama"),
        (MERGES, {"merges": None}, r"lacks the key tokenizer\.ggml\.merges"),
        (MERGES, {"token_type": None}, r"lacks the key tokenizer\.ggml\.token_type"),
        (MERGES, {"eos_token_id": None}, r"lacks the key tokenizer\.ggml\.eos_token_id"),
        (MERGES, {"eos_token_id": 5000}, r"eos_token_id = 5000, but there are \d+ tokens"),
        (MERGES, {"bos_token_id": None, "add_bos_token": True}, "there is no bos_token_id"),
        (MERGES, {"tokens": [*MERGES["ggml.tokens"][:-1], "a"]}, "one type and one row for each token"),
        (MERGES, {"merges": ["ab"]}, "its tokenizer cannot be built"),
        (SCORES, {"scores": [-1000.0] * len(SCORES["ggml.tokens"])}, r"scores = -1000\.0 for two tokens"),
        (SCORES, {"scores": None}, r"lacks the key tokenizer\.ggml\.scores"),
    ],
)
def test_a_tokenizer_that_cannot_be_rebuilt_is_refused_by_name(contents_of, vocabulary, changes, reason):
    contents = contents_of(vocabulary, **changes)
    with pytest.raises(InputError, match=reason):
        gguf_tokenizer.tokenizer(contents, 2000)


def test_more_tokens_than_rows_are_refused(contents_of):
    contents = contents_of(MERGES)
    with pytest.raises(InputError, match="one type and one row for each token"):
        gguf_tokenizer.tokenizer(contents, len(MERGES["ggml.tokens"]) - 1)
