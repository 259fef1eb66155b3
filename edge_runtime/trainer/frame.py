"""The common frame on a device: its features of the public texts, and its maps into the frame.

    no frame.Z in the version    the device's class is new: it sends its features and trains nothing
    frame.Z in the version       maps are made of the base model's activations, and kept in frame.bin

Equations: methods/frames.py. Activations are those of the last token of each text, before the
adapter has changed the model. Those of a few blocks are in memory at once, so that the texts go
through the model several times.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from edge_kernels import Packed, expand
from msgspec.structs import replace
from numpy.typing import NDArray

from edge_runtime.adapters import attach
from edge_runtime.adapters.attach import AdapterLinear
from edge_runtime.methods import frames
from edge_runtime.models import structure
from edge_runtime.planning.stages import FRAME_BYTES
from edge_runtime.trainer import disk
from edge_runtime.trainer.base import Base
from edge_runtime.trainer.examples import Example, batches
from edge_runtime.trainer.job import Job
from edge_runtime.trainer.meter import Meter
from edge_runtime.trainer.objectives import hidden_states
from edge_runtime.trainer.public import DeviceAnswers
from edge_runtime.trainer.states import last_states


class Frame:
    """The frame of one job's fleet, as far as this device's class has one."""

    def __init__(self, job: Job, texts: list[Example], Z: Any) -> None:
        """Z: the version's frame.Z, (texts, frames.WIDTH) in NumPy; None: it has none."""
        self._job, self._texts = job, texts
        self._Z = Z
        self.new = Z is None  # the device's class is not in the frame

    def enter(self, base: Base, meter: Meter) -> attach.State:
        """Put the maps on the adapter, which is at version 0; returns the tensors of frame.bin."""
        if self.new:
            return {}
        tensors = self._earlier(base) or self._maps(base, meter)
        with torch.no_grad():
            for key, value in tensors.items():
                if key != frames.MADE:
                    base.adapter.factors[key].copy_(torch.from_numpy(value))
        return tensors

    def features(self, base: Base, meter: Meter) -> DeviceAnswers:
        """What a new class sends."""
        meter.tell("features")
        with meter.phase("features"):
            states = last_states(base, self._texts).cpu().numpy()
            return DeviceAnswers({frames.SENT: frames.features(states)})

    def _earlier(self, base: Base) -> "attach.State | None":
        """The tensors of an earlier round's frame.bin, if they are of this frame and this adapter."""
        if self._job.carried.frame is None:
            return None
        tensors = disk.load(self._job.carried.frame)
        fits = tensors[frames.MADE].shape == self._Z.shape and (tensors[frames.MADE] == self._Z).all()
        needed = {key for key in base.adapter.factors if key == frames.MAP or key.endswith((".F", ".G"))}
        return tensors if fits and tensors.keys() == needed | {frames.MADE} else None

    def _maps(self, base: Base, meter: Meter) -> attach.State:
        meter.tell("frame")
        maps, plan = {frames.MADE: self._Z}, base.plan
        # layers of an MLP in tiles see no rows, and so no row's last token
        base.follow(replace(plan, mlp_tokens=None))
        with meter.phase("frame"):
            if frames.MAP in base.adapter.factors:
                Z = self._turned(frames.WIDTH, "rotated")
                maps[frames.MAP], _ = frames.into(last_states(base, self._texts).cpu().numpy(), Z)
            for linears in _groups(_aligned(base), len(self._texts)):
                maps |= self._of_linears(base, linears)
        base.follow(plan)
        return maps

    def _of_linears(self, base: Base, linears: dict[str, AdapterLinear]) -> attach.State:
        """F and G of adapted linear layers, by canonical key; linears: by their F's key."""
        maps = {}
        for key, activations in _activations(base, self._texts, linears).items():
            linear = linears[key]
            Z = self._turned(len(linear.factors["F"]), "rotated", "rotated branches")
            F, moments = frames.into(activations, Z)
            weight = structure.matrix(linear.base)
            W = expand(weight, torch.float32) if isinstance(weight, Packed) else weight.float()
            maps[key] = F
            maps[key[:-1] + "G"] = (W @ torch.from_numpy(moments).to(W.device)).cpu().numpy()
        return maps

    def _turned(self, width: int, *controls: str) -> NDArray[Any]:
        """The frame's leading coordinates, turned at random in these controls."""
        Z, public = self._Z[:, :width], self._job.fleet.public
        if public is None or public.frame not in controls:
            return Z
        return Z @ frames.rotation(self._job.facts.model_class, width)


def _aligned(base: Base) -> dict[str, AdapterLinear]:
    """The adapted linear layers that read the frame, by the key of their F; in the model's order."""
    keys = {id(factor): key for key, factor in base.adapter.factors.items()}
    linears = (module for module in base.model.modules() if isinstance(module, AdapterLinear))
    return {keys[id(linear.factors["F"])]: linear for linear in linears if "F" in linear.factors}


def _groups(linears: dict[str, AdapterLinear], texts: int) -> Iterator[dict[str, AdapterLinear]]:
    """The layers in groups whose activations take FRAME_BYTES at most, or a single layer."""
    group: dict[str, AdapterLinear] = {}
    taken = 0
    for key, linear in linears.items():
        size = 4 * texts * linear.factors["F"].shape[1]
        if group and taken + size > FRAME_BYTES:
            yield group
            group, taken = {}, 0
        group[key], taken = linear, taken + size
    if group:
        yield group


@torch.no_grad()
def _activations(
    base: Base, texts: list[Example], linears: dict[str, AdapterLinear]
) -> dict[str, NDArray[np.float32]]:
    """The input (texts, in) of each layer, at each text's last token."""
    found = {
        key: np.empty((len(texts), linear.factors["F"].shape[1]), np.float32)
        for key, linear in linears.items()
    }
    numbers: list[int] = []  # of the batch's texts
    ends: list[int] = []  # their last tokens

    def store(key: str, x: torch.Tensor) -> None:
        found[key][numbers] = x[range(len(ends)), ends].float().cpu().numpy()

    hooks = [
        linear.register_forward_pre_hook(lambda _, inputs, key=key: store(key, inputs[0]))
        for key, linear in linears.items()
    ]
    try:
        for batch in batches(
            [text._replace(answer=number) for number, text in enumerate(texts)], base.plan.rows
        ):
            numbers[:] = [text.answer or 0 for text in batch]
            ends[:] = [len(text.ids) - 1 for text in batch]
            hidden_states(base.model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return found
