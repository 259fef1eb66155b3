"""An architecture's keys in a GGUF file's metadata: each is read once, and what is left is accounted for."""

from typing import Any, NamedTuple, NoReturn

from edge_runtime.errors import InputError
from edge_runtime.models import sizes
from edge_runtime.models.gguf_header import Contents

# keys that change nothing where they have this value; None: whatever they have. Of the latter,
# pooling is of text embeddings, the embedding's own rows say more than vocab_size, and the layout is
# that of the file which was converted.
NEUTRAL = {
    "vocab_size": None,
    "tensor_data_layout": None,
    "pooling_type": None,
    "rope.scaling.finetuned": None,
    "attention.causal": True,
    "expert_count": 0,
    "expert_used_count": 0,
    "nextn_predict_layers": 0,
    "attn_logit_softcapping": 0.0,
    "final_logit_softcapping": 0.0,
}


class Unread(NamedTuple):
    """The keys that nobody has read yet, without the architecture's prefix."""

    contents: Contents
    prefix: str
    left: dict[str, Any]

    @classmethod
    def of(cls, contents: Contents) -> "Unread":
        """All keys of the file's architecture."""
        prefix = f"{contents.metadata['general.architecture']}."
        pairs = contents.metadata.items()
        return cls(contents, prefix, {k.removeprefix(prefix): v for k, v in pairs if k.startswith(prefix)})

    def take(self, key: str, missing: Any) -> Any:
        """The value of a key; a value for each layer has to be the same in all."""
        value = self.left.pop(key, missing)
        if not isinstance(value, tuple):
            return value
        if len(set(value)) != 1:
            self.refuse(key, value, "all layers have to be equal")
        return value[0]

    def need(self, key: str) -> Any:
        """The value of a key that the file must have."""
        if key not in self.left:
            raise InputError(f"{self.contents.files[0]} lacks the key {self.prefix}{key}")
        return self.take(key, None)

    def count(self, key: str, missing: int | None = None) -> int:
        """The value of a key that counts something: 1 or more, and no more than the tensors allow.

        missing: the value where a file lacks the key; None: the file must have it.
        """
        value = self.need(key) if missing is None else self.take(key, missing)
        if type(value) is not int or value < 1:
            self.refuse(key, repr(value), sizes.NEEDED)
        tensors = self.contents.tensors.values()
        if key == "block_count" and value > len(tensors):
            self.refuse(key, value, f"the file has {len(tensors)} tensors")
        if key != "context_length" and value > (longest := sizes.longest(tensors)):
            self.refuse(key, value, f"the longest side of the file's tensors is {longest}")
        return value

    def refuse(self, key: str, value: Any, reason: str) -> NoReturn:
        """Raise InputError with the key, its value and the reason."""
        raise InputError(f"{self.contents.files[0]} has {self.prefix}{key} = {value}, but {reason}")

    def refuse_left(self) -> None:
        """Refuse a key that nobody has read, unless it is known to change nothing."""
        for key, value in self.left.items():
            if key not in NEUTRAL:
                self.refuse(key, value, "what this key changes in such a model is not known here")
            if NEUTRAL[key] not in (None, value):
                self.refuse(key, value, f"only {NEUTRAL[key]} is supported")
