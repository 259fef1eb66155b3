"""The common frame on a device: its features of the public texts, and its maps into the frame.

    no frame.Z in the version    the device's class is new: it sends its features and trains nothing
    frame.Z in the version       maps are made of the base model's activations, and kept in frame.bin

Equations: methods/frames.py. Activations are those of the last token of each text, before the
adapter has changed the model.
"""

from typing import Any

import torch

from edge_runtime.adapters import attach
from edge_runtime.methods import frames
from edge_runtime.trainer import disk
from edge_runtime.trainer.base import Base
from edge_runtime.trainer.examples import Example
from edge_runtime.trainer.job import Job
from edge_runtime.trainer.meter import Meter
from edge_runtime.trainer.public import DeviceAnswers, last_states


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
        tensors = self._earlier() or self._maps(base, meter)
        with torch.no_grad():
            for key, value in tensors.items():
                if key in base.adapter.factors:
                    base.adapter.factors[key].copy_(torch.from_numpy(value))
        return tensors

    def features(self, base: Base, meter: Meter) -> DeviceAnswers:
        """What a new class sends."""
        meter.tell("features")
        with meter.phase("features"):
            states = last_states(base, self._texts).cpu().numpy()
            return DeviceAnswers({frames.SENT: frames.features(states)})

    def _earlier(self) -> "attach.State | None":
        """The tensors of an earlier round's frame.bin, if they are of this frame."""
        if self._job.carried.frame is None:
            return None
        tensors = disk.load(self._job.carried.frame)
        fits = tensors[frames.MADE].shape == self._Z.shape and (tensors[frames.MADE] == self._Z).all()
        return tensors if fits else None

    def _maps(self, base: Base, meter: Meter) -> attach.State:
        meter.tell("frame")
        with meter.phase("frame"):
            Z, public = self._Z, self._job.fleet.public
            if public is not None and public.frame == "rotated":
                Z = Z @ frames.rotation(self._job.facts.model_class)
            F, _ = frames.into(last_states(base, self._texts).cpu().numpy(), Z, frames.WIDTH)
            return {frames.MADE: self._Z, frames.MAP: F}
