"""How a public prompt goes on, as text: models of any two tokenizers can read it."""

import msgspec


class Completion(msgspec.Struct, frozen=True, array_like=True):
    """How a public prompt, told by its number, goes on, and how much that is to be believed, 0 to 1."""

    prompt: int
    text: str
    confidence: float
