"""Tokens that end an answer: all that a model's files name, and no other special token."""

import json
import shutil
from pathlib import Path

import msgspec

from edge_runtime.compat.fast_tokenizer import load
from edge_runtime.trainer.ends import answer_ends


def test_every_token_that_is_named_as_an_end_ends_an_answer(demo_facts, demo_tokenizer, tmp_path):
    weights = tmp_path / "weights"
    weights.mkdir()
    folder = Path(shutil.copytree(demo_facts.folder, tmp_path / "folder"))
    facts = msgspec.structs.replace(demo_facts, folder=str(folder), weights=str(weights))
    (turn_end,) = answer_ends(demo_facts, demo_tokenizer)
    (weights / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": 9}))
    assert answer_ends(facts, demo_tokenizer) == {turn_end, 7, 8, 9}
    # a template may end a turn with a token that nothing else names
    other = load(folder)
    other.chat_template = '{% for turn in messages %}{{ turn["content"] }}<|endoftext|>{% endfor %}'
    assert answer_ends(facts, other) - {turn_end, 7, 8, 9} == {0}


def test_another_special_token_ends_nothing(demo_facts, demo_tokenizer):
    ends = answer_ends(demo_facts, demo_tokenizer)
    assert {demo_tokenizer.bos_token_id, demo_tokenizer.convert_tokens_to_ids("<|endoftext|>")}.isdisjoint(
        ends
    )
