"""Depth slices: which layers of a checkpoint a smaller model keeps.

Kept are the first ceil(depth / 2) and the last floor(depth / 2) layers, so the ones dropped lie together in the middle:
"symmetric dropping" of Sajjad et al. 2023 (arXiv 2004.03844). Slices of one checkpoint are nested, and every slice keeps
the layers next to the embedding and next to the head, so each tensor of a slice is also held by every larger slice.
"""


def kept_layers(depth: int, layers: int) -> tuple[int, ...]:
    """The original numbers of the layers that a slice keeps.

    Args:
        depth: layers to keep.
        layers: layers of the whole checkpoint.

    Raises:
        ValueError: depth is not between 1 and layers.
    """
    if not 1 <= depth <= layers:
        raise ValueError(f"a slice of {depth} layers cannot be cut from a model of {layers}: choose 1 to {layers}")
    return (*range((depth + 1) // 2), *range(layers - depth // 2, layers))
