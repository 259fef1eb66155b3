"""Loads a tokenizer from the file of the `tokenizers` library, which transformers saved.

Libraries   transformers >= 5; tried with 5.23
Reason      AutoTokenizer builds tables to convert other formats into this one: for 262,144
            tokens it takes 4.4 s and 460 MiB in place of 1.5 s and 355 MiB
Change      none; PreTrainedTokenizerFast is built from the files that `save_pretrained` writes
Breaks      when transformers writes a setting of the tokenizer under a name not in SETTINGS
Test        tests/runtime/compat/test_fast_tokenizer.py: ids, special tokens and chat template are
            AutoTokenizer's
"""

import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

FILE = "tokenizer.json"
SETTINGS = (*PreTrainedTokenizerFast.SPECIAL_TOKENS_ATTRIBUTES, "clean_up_tokenization_spaces")


def load(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a prepared model's folder."""
    if not (folder / FILE).exists():  # a tokenizer that the library has no format for
        loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        return loaded
    written: dict[str, Any] = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    # a token with matching rules is written as a dict; FILE has the rules
    tokens = {
        name: value["content"] if isinstance(value, dict) else value
        for name, value in written.items()
        if name in SETTINGS
    }
    template = folder / "chat_template.jinja"
    chat = template.read_text(encoding="utf-8-sig") if template.exists() else None
    return PreTrainedTokenizerFast(tokenizer_file=str(folder / FILE), chat_template=chat, **tokens)
