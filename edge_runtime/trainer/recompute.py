"""Which blocks of a model a training step runs through, and which of them run again in backward."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from edge_kernels import Kept, checkpoint_block
from transformers import PreTrainedModel

from edge_runtime.models.structure import blocks
from edge_runtime.settings import Boundaries


@contextmanager
def only_blocks(model: PreTrainedModel, chosen: tuple[int, ...]) -> Iterator[None]:
    """Inside, the model consists of the chosen blocks alone."""
    layers, config = blocks(model), model.config.get_text_config()
    every, types = list(layers), getattr(config, "layer_types", None)

    def put(numbers: Sequence[int]) -> None:
        del layers[:]
        layers.extend(every[number] for number in numbers)
        config.num_hidden_layers = len(numbers)
        if types:
            config.layer_types = [types[number] for number in numbers]

    put(chosen)
    try:
        yield
    finally:
        put(range(len(every)))


@contextmanager
def recomputed_blocks(
    model: PreTrainedModel, boundaries: Boundaries = "input", kept_blocks: int = 0
) -> Iterator[None]:
    """Inside, blocks keep only their input and run again in backward; dropout is in training mode.

    Args:
        boundaries: how a block's input is kept.
        kept_blocks: last blocks that keep their activations and do not run again.
    """
    model.train()
    every = list(blocks(model))
    recomputed = every[: max(len(every) - kept_blocks, 0)]
    before = [vars(block).get("forward") for block in recomputed]
    storage = Kept(len(recomputed))
    for block in recomputed:
        block.forward = partial(checkpoint_block, block.forward, keep=boundaries, storage=storage)
    try:
        yield
    finally:
        for block, forward in zip(recomputed, before, strict=True):
            del block.forward
            if forward is not None:
                block.forward = forward
        model.eval()
