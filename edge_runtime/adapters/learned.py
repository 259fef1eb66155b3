"""What a device or a node has learned, free of method and fleet: a LoRA for each linear layer, and a label head.

    y = W x + B A x                     A: (rank, in)   B: (out, rank), core and scale included
    logit of a label = h / rms(h) · H   H: (labels, hidden), h: the last token's last hidden state

A folder holds it in PEFT's form, with a file of ours beside PEFT's:

    adapter_config.json          rank, modules, and where the base is: a hub id or a path
    adapter_model.safetensors    base_model.model.MODULE.lora_A.weight = A, .lora_B.weight = B
    label_head.safetensors       of a label head: weight = H; metadata: labels, as JSON
    edge_runtime.json            facts of the checkpoint, layers, version

PEFT computes y = W x + (lora_alpha / r) B A x, here with lora_alpha = r. A fused layer (qkv,
gate_up) has one A and one B in both forms. A depth slice numbers its layers from 0, as the model
that trained it does. On the whole checkpoint these numbers are other layers, so the folder of a
slice holds one empty factor of the first layer that the slice has not: PEFT refuses to load it
where there is such a layer, and passes over it where there is none.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, TypeAlias

import msgspec
import numpy as np
from edge_broker import files
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from edge_runtime.errors import InputError
from edge_runtime.methods.frames import MAP
from edge_runtime.methods.interface import Method, relative_depth
from edge_runtime.methods.lazy import torch
from edge_runtime.models.facts import Facts
from edge_runtime.models.families import family_of
from edge_runtime.protocol.keys import label_of, parse
from edge_runtime.settings import Adapter, Role
from edge_runtime.state import ABOUT

Array: TypeAlias = NDArray[np.float32]
CONFIG, ADAPTER = "adapter_config.json", "adapter_model.safetensors"
HEAD = "label_head.safetensors"


class Learned(NamedTuple):
    """An adapter that is free of its method; all arrays are float32."""

    # Of the checkpoint. After `read`, folder and weights are empty, and `on` puts them in.
    facts: Facts
    layers: tuple[int, ...]  # that the trained model keeps, by the checkpoint's numbers
    factors: dict[tuple[int, Role], tuple[Array, Array]]  # A and B, by the checkpoint's layer and role
    version: int  # rounds that the fleet had merged
    source: str  # of the base, as `prepare` takes it: a hub id, or an absolute path
    labels: tuple[str, ...] = ()
    head: Array | None = None

    @property
    def sliced(self) -> bool:
        """Whether the trained model lacks layers of the checkpoint."""
        return len(self.layers) < self.facts.layers


class _Description(msgspec.Struct, frozen=True):
    """What edge_runtime.json says."""

    facts: Facts
    layers: tuple[int, ...]
    version: int
    source: str


class _Config(msgspec.Struct, frozen=True):
    """What adapter_config.json says of the scale."""

    r: int
    lora_alpha: float
    use_rslora: bool = False
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}


def fold(
    state: Mapping[str, Array],
    facts: Facts,
    layers: tuple[int, ...],
    spec: Adapter,
    method: Method,
    version: int,
) -> Learned:
    """Make each layer's A and B of a method's factors.

    Args:
        state: every factor by canonical key, frozen ones too, as `attach.state` returns them.
        layers: that the model keeps.
        spec: the adapter at the device's rank.
    """
    if method.branch is not None:
        raise InputError(f"the branches of {method.name} depend on the token, so its adapter is no LoRA")
    factors = {}
    for layer in layers:
        for role in facts.linears:
            if role in spec.roles:
                keys = method.keys(layer, facts.layers, role)
                tensors = {name: torch.from_numpy(state[key]) for name, key in keys.items()}
                A, core, B = method.product(tensors, relative_depth(layer, facts.layers))
                B = (B if core is None else B @ core) * (spec.alpha / spec.rank)
                factors[layer, role] = (A.contiguous().numpy(), B.contiguous().numpy())
    found = [key for key in state if parse(key).kind == "labels"]
    found.sort(key=lambda key: parse(key).factor, reverse=True)  # of a label with rows K and H, H counts
    rows = dict(sorted({label_of(key): state[key] for key in found}.items()))
    head = np.concatenate(list(rows.values())) if rows else None
    if head is not None and MAP in state:  # of a head in the common frame
        head = head @ state[MAP]
    return Learned(facts, layers, factors, version, facts.source, tuple(rows), head)


def on(learned: Learned, facts: Facts) -> Learned:
    """The adapter with its base at hand; raises as `require_weights` does."""
    trained = learned.facts.model_class
    require_weights(trained, facts)
    # the name before the digest depends on where the weights lie
    return learned._replace(facts=msgspec.structs.replace(facts, model_class=trained))


def require_weights(model_class: str, facts: Facts) -> None:
    """Raise InputError where these are the facts of other weights than the class's."""
    needed, seen = (name.rpartition("@")[2] for name in (model_class, facts.model_class))
    if needed != seen:
        raise InputError(
            f"the adapter was trained on {model_class}, but the model at {facts.weights} has the digest {seen}: give "
            "the model that it was trained on"
        )


def module(facts: Facts, number: int, role: Role) -> str:
    """The path of a linear layer in the model. number: of the block in the model."""
    return f"{facts.blocks}.{number}.{family_of(facts.family).linears[role]}"


def write(learned: Learned, folder: Path, base: str | None = None) -> None:
    """Write the folder whole, in place of an earlier adapter's.

    base: where PEFT finds the base; None: the source.
    """
    fresh, earlier = folder.with_name(f"{folder.name}.part"), folder.with_name(f"{folder.name}.old")
    if earlier.exists() and not folder.exists():  # a process was killed between the two renames
        earlier.rename(folder)
    for remains in (fresh, earlier):  # of a process that was killed
        shutil.rmtree(remains, ignore_errors=True)
    fresh.mkdir(parents=True)
    _write_files(learned, fresh, base or learned.source)
    # a full disk is told here, while the earlier adapter is in its place
    files.settle(fresh)
    if folder.exists():
        folder.rename(earlier)
    fresh.rename(folder)
    files.sync(folder.parent)
    shutil.rmtree(earlier, ignore_errors=True)


def _write_files(learned: Learned, folder: Path, base: str) -> None:
    tensors, modules = {}, []
    for (layer, role), (A, B) in learned.factors.items():
        modules.append(module(learned.facts, learned.layers.index(layer), role))
        tensors[_peft_key(modules[-1], "A")], tensors[_peft_key(modules[-1], "B")] = A, B
    if learned.sliced:
        (_, role) = next(iter(learned.factors))
        modules.append(module(learned.facts, len(learned.layers), role))
        tensors[_peft_key(modules[-1], "A")] = np.zeros((0, 0), np.float32)
    hub_id, _, revision = base.partition("@")
    on_hub = not Path(base).is_absolute()
    rank = len(next(iter(learned.factors.values()))[0])
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": hub_id if on_hub else base,
        "revision": (revision or None) if on_hub else None,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": family_of(learned.facts.family).transposed,
        "target_modules": sorted(modules),
        "inference_mode": True,
    }
    # who reads while another version takes the folder's place sees two versions
    save_file(tensors, folder / ADAPTER, {"format": "pt", "version": str(learned.version)})
    write_head(learned, folder)
    # paths of this device are nobody else's
    facts = msgspec.structs.replace(learned.facts, folder="", weights="")
    about = msgspec.json.encode(_Description(facts, learned.layers, learned.version, learned.source))
    (folder / ABOUT).write_bytes(msgspec.json.format(about) + b"\n")
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def write_head(learned: Learned, folder: Path) -> None:
    """Write the label head and its labels, if there are any."""
    if learned.head is not None:
        metadata = {"labels": json.dumps(learned.labels), "version": str(learned.version)}
        save_file({"weight": learned.head}, folder / HEAD, metadata)


def read(folder: Path) -> Learned:
    """Read a folder that `write` wrote.

    Raises:
        InputError: a file is missing or damaged, or does not fit the others.
    """
    try:
        about = msgspec.json.decode((folder / ABOUT).read_bytes(), type=_Description)
        _require_scale(msgspec.json.decode((folder / CONFIG).read_bytes(), type=_Config))
        factors = _factors(_read(folder / ADAPTER, about.version)[0], about)
        labels, head = _head(folder / HEAD, about) if (folder / HEAD).exists() else ((), None)
    except (OSError, ValueError, LookupError, SafetensorError) as error:
        raise InputError(
            f"{folder} cannot be read as an adapter of Edge Runtime, a folder with {ABOUT}, {CONFIG} and {ADAPTER}: "
            f"{error}"
        ) from error
    return Learned(about.facts, about.layers, factors, about.version, about.source, labels, head)


def _read(path: Path, version: int) -> tuple[dict[str, Array], dict[str, str]]:
    with safe_open(path, framework="np") as stream:
        metadata = stream.metadata() or {}
        if metadata.get("version") != str(version):
            raise ValueError(f"{path.name} is of another version than {ABOUT}; read again")
        return {name: stream.get_tensor(name) for name in stream.keys()}, metadata  # noqa: SIM118


def _require_scale(config: _Config) -> None:
    """Raise ValueError where PEFT would multiply B A by another number than 1."""
    if config.r != config.lora_alpha or config.use_rslora or config.rank_pattern or config.alpha_pattern:
        raise ValueError(
            f"{CONFIG} has r = {config.r}, lora_alpha = {config.lora_alpha:g} and use_rslora = {config.use_rslora}, but "
            "the scale is in B, so r and lora_alpha have to be equal, without a pattern and without use_rslora"
        )


def _factors(tensors: dict[str, Array], about: _Description) -> dict[tuple[int, Role], tuple[Array, Array]]:
    """A and B of each layer and role; takes them out of the tensors.

    Raises:
        ValueError: a shape is not the model's, a layer lacks a role that others have, or a tensor is left.
    """
    factors = {}
    for number, layer in enumerate(about.layers):
        for role, (out, into) in about.facts.linears.items():
            name = module(about.facts, number, role)
            if (A := tensors.pop(_peft_key(name, "A"), None)) is not None:
                B = tensors.pop(_peft_key(name, "B"))
                if (A.shape[1:], B.shape) != ((into,), (out, len(A))):
                    raise ValueError(
                        f"A and B of {name} are {A.shape} and {B.shape}, but the layer is {(out, into)}"
                    )
                factors[layer, role] = (A, B)
    roles = {role for _, role in factors}
    missing = [(layer, role) for layer in about.layers for role in roles if (layer, role) not in factors]
    if missing or not factors:
        raise ValueError(f"{ADAPTER} has no factors of {missing[0] if missing else 'any layer'}")
    # the empty factor of a slice
    guards = {_peft_key(module(about.facts, len(about.layers), role), "A") for role in roles}
    for name, tensor in tensors.items():
        if tensor.size > 0 or name not in guards:
            raise ValueError(f"{ADAPTER} has {name}, which belongs to none of the layers {about.layers}")
    return factors


def _head(path: Path, about: _Description) -> tuple[tuple[str, ...], Array]:
    """Labels and H; raises ValueError where they do not fit the model or each other."""
    tensors, metadata = _read(path, about.version)
    labels, head = msgspec.json.decode(metadata["labels"], type=tuple[str, ...]), tensors["weight"]
    if head.shape != (len(labels), about.facts.hidden):
        raise ValueError(
            f"the weight in {HEAD} is {head.shape}, but has to be {(len(labels), about.facts.hidden)}, labels by the "
            "model's width"
        )
    return labels, head


def _peft_key(path: str, factor: str) -> str:
    return f"base_model.model.{path}.lora_{factor}.weight"
