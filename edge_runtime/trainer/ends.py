"""Which tokens end an answer, whether a device completes a public text or serves.

Those that the tokenizer, config.json or generation_config.json names as an end of text, and the one
with which the model's chat template ends an assistant's turn. Other special tokens end nothing:
some stand inside answers.
"""

import json
from pathlib import Path
from typing import Any

from edge_runtime.models.facts import Facts

CONTENT = "content"  # of the turn whose end is looked for


def answer_ends(facts: Facts, tokenizer: Any) -> frozenset[int]:
    """Token ids. facts: of the model whose tokenizer this is, transformers'."""
    configurations = [Path(facts.folder) / "config.json", Path(facts.weights) / "generation_config.json"]
    named = {tokenizer.eos_token_id, _turn_end(tokenizer)}
    every = named.union(*map(_named, configurations))
    return frozenset(token for token in every if token is not None)


def _named(path: Path) -> set[int | None]:
    """The ends of text that a configuration names; none where there is no such file."""
    if not path.is_file():
        return set()
    written: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    named = (part.get("eos_token_id") for part in (written, written.get("text_config") or {}))
    return {token for tokens in named for token in (tokens if isinstance(tokens, list) else [tokens])}


def _turn_end(tokenizer: Any) -> int | None:
    """The special token with which the chat template ends an assistant's turn, if there is one."""
    turns = [{"role": "user", "content": CONTENT}, {"role": "assistant", "content": CONTENT}]
    if not tokenizer.chat_template:
        return None
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    # a template may refuse a conversation that is none of its users'
    except Exception:
        return None
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    after = tokenizer(text.rpartition(CONTENT)[2], add_special_tokens=False).input_ids
    return next((token for token in after if token in special), None)
