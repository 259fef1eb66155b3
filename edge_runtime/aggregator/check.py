"""Checks of a device's update: manifest, keys, shapes, ranks, sizes, values and answers.

Merging trusts every update that passes. The manifest is checked before any byte is taken; keys and
shapes are read from the payload's header and checked before any value is decompressed.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from edge_broker.messages import Manifest

from edge_runtime.errors import InputError
from edge_runtime.methods import frames
from edge_runtime.methods.interface import WIDTHS, Method
from edge_runtime.protocol import codec
from edge_runtime.protocol.keys import label_of, parse
from edge_runtime.protocol.round import CODEC, FLEET
from edge_runtime.settings import Fleet

WIDEST = 1 << 20  # rows or columns of a factor
LARGEST_ADAPTER = 1 << 28  # values
MOST_LABELS = 1 << 14
ROUNDING = 1e-5  # of a sum of probabilities in float32
LARGEST_NORM = 1e4  # of one factor's delta; trained factors reach a few units

Shapes = Mapping[str, tuple[int, ...]]


def refusal(manifest: Manifest, fleet: Fleet, round_: int) -> str | None:
    """The reason to refuse an update before any of its bytes; None: the update is welcome.

    Args:
        round_: the open round; one past the fleet's rounds: the fleet is finished.
    """
    if round_ > fleet.rounds:
        return f"the fleet has finished its {fleet.rounds} rounds"
    if manifest.model_class in ("", FLEET):
        return f"`{manifest.model_class}` is no model class"
    if manifest.round != round_:
        return f"round {manifest.round} is closed; round {round_} is open"
    if manifest.codec != CODEC:
        return (
            f"the codec {manifest.codec!r} is not known; needed: {CODEC}; give node and devices the same version of Edge "
            "Runtime"
        )
    rows = fleet.training.steps * fleet.training.rows_a_step
    if not 1 <= manifest.samples <= rows:
        return (
            f"the manifest has {manifest.samples} samples, which weigh its mean, but a round has 1 to {rows}"
        )
    return None


def check(payload: bytes, expected: Shapes, fleet: Fleet, method: Method) -> codec.Tensors:
    """Decode a device's delta.

    Args:
        expected: keys and shapes that devices of the model class have sent before.

    Raises:
        InputError: a key, shape, value or answer does not fit the fleet's adapter. The message
            names the key.
    """
    shapes = codec.shapes(payload)
    if not shapes and fleet.codistill is None:  # with codistill a device may have nothing to say
        raise InputError("the delta holds no factor")
    for key in shapes:
        if not _exchanged(key, fleet, method):
            raise InputError(f"the delta holds {key[:80]!r}, which this fleet's adapter does not exchange")
    _check_shapes(shapes, expected, fleet, method)
    parted = fleet.adapter.lower if any(factor.chosen for factor in method.factors.values()) else ()
    if (rank := codec.rank(payload)) not in (0, *parted):
        raise InputError(
            f"the delta is of a device of rank {rank} that trained a part, but the ranks that do are {parted}"
        )
    delta = codec.decode(payload)
    _check_predictions(delta)
    answers = codec.answers(payload)
    if method.answers is not None:
        method.answers.check(answers)
    elif answers:
        raise InputError("the delta holds completions, which this fleet does not exchange")
    _check_features(delta, answers, expected, method)
    for key, value in delta.items():
        if parse(key).kind == "frame":
            continue
        norm = float(np.linalg.norm(value))
        if norm > LARGEST_NORM:
            raise InputError(
                f"{key} changed by a norm of {norm:.3g}, more than {LARGEST_NORM:g}: the training diverged"
            )
    return delta


def _exchanged(text: str, fleet: Fleet, method: Method) -> bool:
    """Whether devices of this fleet send a tensor of this key."""
    try:
        key = parse(text)
    except InputError:
        return False
    factor = method.factors.get(key.factor)
    if factor is None or not factor.exchanged or factor.of != key.kind:
        return False
    if key.kind in ("stages", "peers") and int(key.owner) >= method.stages:
        return False
    return not key.role or key.role in fleet.adapter.roles


def _check_shapes(shapes: Shapes, expected: Shapes, fleet: Fleet, method: Method) -> None:
    """Refuse shapes that do not fit the first update of the class; the node holds no model."""
    known_rows, rows = (
        [shape for key, shape in group.items() if parse(key).kind == "labels"] for group in (expected, shapes)
    )
    labels = {label_of(key) for key in (*expected, *shapes) if parse(key).kind in ("labels", "anchors")}
    if len(labels) > MOST_LABELS:
        raise InputError(f"the delta makes {len(labels)} labels, but a head has at most {MOST_LABELS}")
    rows_of = Counter(label_of(key) for key in shapes if parse(key).kind == "labels")
    if twice := [label for label, count in rows_of.items() if count > 1]:
        raise InputError(
            f"the delta has the rows H and K of the label {twice[0]}, but one device has one of the two"
        )
    # the first label's row decides how wide every label's row is
    row = next(iter(known_rows + rows), None)
    for key, shape in shapes.items():
        known = expected.get(key, row if parse(key).kind == "labels" else None)
        _check_shape(key, shape, known, fleet, method)
    ranks = {
        size
        for key, shape in shapes.items()
        for axis, size in zip(method.factor(key).axes, shape, strict=True)
        if axis == "rank"
    }
    if len(ranks) > 1:
        raise InputError(f"the delta has factors of ranks {sorted(ranks)}, but one device has one")
    # a merge pads every factor to the fleet's rank
    highest = max(fleet.adapter.rank, method.kept)
    padding = -(-highest // min(ranks, default=highest))
    if padding * sum(map(math.prod, shapes.values())) > LARGEST_ADAPTER:
        raise InputError(f"the delta has more than {LARGEST_ADAPTER} values")


def _check_shape(
    key: str, shape: tuple[int, ...], known: tuple[int, ...] | None, fleet: Fleet, method: Method
) -> None:
    """Refuse a factor's shape that does not fit the fleet's ranks or the layer.

    Args:
        known: a shape that fits the layer, of any rank; None: no device has sent one.
    """
    factor, highest = method.factor(key), fleet.adapter.rank
    ranks: Sequence[int] = (highest, *fleet.adapter.lower)
    words = " or ".join(map(str, ranks))
    if method.next_rank is not None:
        ranks, words = range(1, highest + 1), f"{highest} or lower"
    sizes = dict(zip(factor.axes, shape, strict=False))
    widths = dict(zip(factor.axes, known or shape, strict=False))
    rank = sizes.get("rank", highest)
    needed = {**widths, **method.sizes(rank), "one": 1, "rank": rank}
    fits = len(shape) == len(factor.axes) and rank in ranks and shape == factor.shape(needed)
    if not fits or any(not 1 <= size <= WIDEST for size in shape):
        parts = [f"of rank {words}" if "rank" in factor.axes else "as the fleet has it"]
        parts += [f"for a layer {widths[axis]} wide" for axis in WIDTHS if axis in widths and known]
        raise InputError(f"{key} is {shape} in the delta, but has to be {', '.join(parts)}")


def _check_features(delta: codec.Tensors, answers: bytes, expected: Shapes, method: Method) -> None:
    """Refuse features that are not white, or not alone; and all else until a class has sent features."""
    if not method.framed:
        return
    features = delta.get(frames.SENT)
    if features is None:
        if frames.SENT not in expected:
            raise InputError(
                f"the delta lacks {frames.SENT}, which no device of its model class has sent yet"
            )
        return
    if len(delta) > 1 or answers:
        raise InputError(
            f"the delta holds {frames.SENT} beside other tensors or answers, but has to hold it alone"
        )
    if fault := frames.fault(features):
        raise InputError(f"the features {frames.SENT} {fault}: they are of no model")


def _check_predictions(delta: codec.Tensors) -> None:
    """Refuse probabilities below 0, or whose sum over a text's labels exceeds 1."""
    total, most = np.zeros(1, np.float32), 1.0 + ROUNDING
    for key, value in delta.items():
        if parse(key).kind != "anchors":
            continue
        total = total + value
        most += codec.FIXED_STEPS["anchors"] / 2  # each label may have been rounded up
        if float(value.min()) < 0 or float(total.max()) > most:
            raise InputError(
                f"{key} is no probabilities: they have to be 0 or more, and to add up to 1 at most"
            )
