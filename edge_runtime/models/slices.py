"""Depth slices: which layers of a checkpoint a smaller model keeps.

Kept are the first ceil(depth / 2) and the last floor(depth / 2) layers, so the ones dropped lie together in the middle:
"symmetric dropping" of Sajjad et al. 2023 (arXiv 2004.03844). Slices of one checkpoint are nested, and every slice keeps
the layers next to the embedding and next to the head, so each tensor of a slice is also held by every larger slice.

An adapter trained in a deep slice does not fit the same layers in a shallow one, where others lie between them. A device
that holds a deep slice can train the shallow ones inside it as well, a step each in turn; what it sends is then right for
both. The idea is that of networks trained at several sizes (Yu & Huang 2019, arXiv 1903.05134; Fan et al. 2019, arXiv
1909.11556); the turns are ours. The README has the figures with and without.
"""

from collections.abc import Iterable


def kept_layers(depth: int, layers: int) -> tuple[int, ...]:
    """The original numbers of the layers that a slice keeps.

    Args:
        depth: layers to keep.
        layers: layers of the whole checkpoint.

    Raises:
        ValueError: depth is not between 1 and layers.
    """
    if not 1 <= depth <= layers:
        raise ValueError(
            f"a slice of {depth} layers cannot be cut from a model of {layers}: choose 1 to {layers}"
        )
    return (*range((depth + 1) // 2), *range(layers - depth // 2, layers))


def nested_blocks(depths: Iterable[int], depth: int, layers: int) -> list[tuple[int, ...]]:
    """For each of the depths, which blocks of a slice of `depth` layers make the slice of that many.

    Args:
        depths: each at most depth.
        depth: layers of the slice at hand.
        layers: layers of the whole checkpoint.

    Raises:
        ValueError: a depth is larger than the slice at hand.
    """
    held = kept_layers(depth, layers)
    return [tuple(held.index(layer) for layer in kept_layers(smaller, layers)) for smaller in depths]
