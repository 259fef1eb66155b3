"""Depth slices: which layers of a checkpoint a smaller model keeps.

A slice keeps the first ceil(depth / 2) and the last floor(depth / 2) layers; the dropped layers lie
together in the middle ("symmetric dropping", Sajjad et al. 2023, arXiv 2004.03844). Slices of one
checkpoint are nested, so every larger slice also holds each tensor of a smaller one.

An adapter trained in a deep slice does not fit the same layers in a shallow slice, where they have
other neighbours. A device can therefore train the smaller slices inside its own, a step each in
turn. The idea is that of networks trained at several sizes (Yu & Huang 2019, arXiv 1903.05134; Fan
et al. 2019, arXiv 1909.11556); taking turns is ours.
"""

from collections.abc import Iterable


def kept_layers(depth: int, layers: int) -> tuple[int, ...]:
    """The layers that a slice of this depth keeps of a checkpoint of `layers` layers, from 0.

    Raises:
        ValueError: depth is not between 1 and layers.
    """
    if not 1 <= depth <= layers:
        raise ValueError(
            f"a slice of {depth} layers cannot be cut from a model of {layers}: choose 1 to {layers}"
        )
    return (*range((depth + 1) // 2), *range(layers - depth // 2, layers))


def nested_blocks(depths: Iterable[int], depth: int, layers: int) -> list[tuple[int, ...]]:
    """For each of the depths, the blocks of a slice of `depth` layers that make a smaller slice.

    Blocks are numbered from 0 in the deeper slice. layers: of the checkpoint.

    Raises:
        ValueError: one of the depths is larger than depth.
    """
    deep = kept_layers(depth, layers)
    return [tuple(deep.index(layer) for layer in kept_layers(shallow, layers)) for shallow in depths]
