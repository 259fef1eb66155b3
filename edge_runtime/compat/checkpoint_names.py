"""The names that transformers gives the tensors of a checkpoint.

Libraries   transformers >= 5; tried with 5.23
Reason      published checkpoints lack the prefix of the head's model, have the names of older
            versions, or hold a wrapper's names; transformers has a table of them for its loader
Change      none; the loader's function for names is called, which is not documented
Breaks      when transformers moves the function: the import then fails with an ImportError
Test        tests/runtime/models/test_safetensors_index.py: models without their head, a wrapper
"""

import re
from collections.abc import Iterable

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

# what transformers passes over beside a model's own list, and the constant of old masks
WITHOUT_EFFECT = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$", r"attn\.masked_bias$")


def model_names(model: PreTrainedModel, names: Iterable[str]) -> dict[str, str]:
    """The state_dict's key for each of a checkpoint's names; an unknown name stays as it is."""
    table = [entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightRenaming)]
    needed, prefix = model.state_dict(), model.base_model_prefix
    renamed = {}
    for name in names:
        renamed[name], _ = rename_source_key(name, table, [], prefix, needed)
        if renamed[name] not in needed and name in needed:
            renamed[name], _ = rename_source_key(name, [], [], prefix, needed)
    return renamed


def without_effect(model: PreTrainedModel, name: str) -> bool:
    """Whether the model computes without the tensor of this name, such as a mask."""
    patterns = {*WITHOUT_EFFECT, *(model._keys_to_ignore_on_load_unexpected or ())}
    return any(re.search(pattern, name) for pattern in patterns)
