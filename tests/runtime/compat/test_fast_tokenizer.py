"""A prepared tokenizer gives what transformers' own loading of it gives."""

import json
import shutil
from pathlib import Path

import transformers

from edge_runtime.compat import fast_tokenizer


def test_the_tokenizer_that_trains_is_the_one_that_transformers_has(demo_facts, demo_tokenizer):
    found = fast_tokenizer.load(Path(demo_facts.folder))
    texts = ["", "  a  b\n\tc ", "Größe 漢字 😀", "<|im_start|>user\nhi<|im_end|>", "0123 don't"]
    for text in texts:
        ids = demo_tokenizer(text).input_ids
        assert found(text).input_ids == ids and found.decode(ids) == demo_tokenizer.decode(ids)
        assert (
            found(text, add_special_tokens=False).input_ids
            == demo_tokenizer(text, add_special_tokens=False).input_ids
        )
    assert found.eos_token_id == demo_tokenizer.eos_token_id is not None
    assert found.added_tokens_decoder == demo_tokenizer.added_tokens_decoder
    assert sorted(found.all_special_ids) == sorted(demo_tokenizer.all_special_ids)
    said = [{"role": "user", "content": "hi"}]
    assert found.apply_chat_template(said, tokenize=False) == demo_tokenizer.apply_chat_template(
        said, tokenize=False
    )


def test_special_tokens_that_are_written_with_how_they_match_are_known(demo_facts, tmp_path):
    folder = Path(shutil.copytree(demo_facts.folder, tmp_path / "copied"))
    file = folder / "tokenizer_config.json"
    written = json.loads(file.read_text())
    token = {"__type": "AddedToken", "content": written["eos_token"], "special": True}
    file.write_text(json.dumps({**written, "eos_token": token}))
    assert fast_tokenizer.load(folder).eos_token == written["eos_token"]


def test_a_chat_template_that_windows_has_marked_as_utf_8_begins_with_its_text(demo_facts, tmp_path):
    folder = Path(shutil.copytree(demo_facts.folder, tmp_path / "copied"))
    (folder / "chat_template.jinja").write_bytes("{{ messages }}".encode("utf-8-sig"))
    assert fast_tokenizer.load(folder).chat_template == "{{ messages }}"


def test_a_tokenizer_without_the_librarys_form_is_read_as_transformers_does(tmp_path):
    transformers.ByT5Tokenizer().save_pretrained(tmp_path)
    assert not (tmp_path / "tokenizer.json").exists()
    assert fast_tokenizer.load(tmp_path)("a").input_ids == transformers.ByT5Tokenizer()("a").input_ids
