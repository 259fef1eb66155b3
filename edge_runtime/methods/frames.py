"""A common frame: coordinates in which all models see the same public texts alike.

    X_c    features of the texts by a model of class c: the leading left singular vectors of the centred
           head inputs, times the root of the texts; (texts, FEATURES)
    Z      the leading left singular vectors of [X_1 ... X_C], times the root of the texts; (texts, WIDTH)
    F_c    the map from activations of class c into the frame: F_c x is about the Z of a text

X_c travels once a class, from each device that takes part as the class joins, of which the node
takes the most central. The node makes Z, and each device maps its own activations to Z by ridge
regression (trainer/frame.py). Without such a frame a tensor that two models share is worthless: their
factors start from independent draws, and a rotation of one of them changes nothing but the shared
tensor's coordinates (docs/study).

When a class joins, Z is made again and turned to lie as close as possible to the Z before, so that
what the fleet has learned in the frame keeps its meaning.

`[public] frame = "rotated"` is the control: each class turns its Z by a rotation drawn from the
class's name, so that the same values cross without a common meaning. "rotated branches" leaves the
head in the common frame.
Source: generalised canonical correlation, MAXVAR (Kettenring 1971); the RV coefficient is that of
Escoufier 1973; that features relative to common anchors make models comparable is Moschella et al.
2023, arXiv 2209.15430.
"""

from collections.abc import Iterable
from itertools import combinations, islice

from edge_runtime.methods.head_start import ALIKE
from edge_runtime.methods.interface import Array, Contributions, Factor, Method, Tensors, stream
from edge_runtime.methods.lazy import np

FEATURES = 256  # of a text, that a device sends
WIDTH = 256  # coordinates of the frame
ROUNDED = 0.1  # entries of XᵀX / texts may differ by this from the identity's, as X was rounded
COMPARED = 8  # devices of a new class whose features are compared
SHRINK = 0.1  # ridge of a map into the frame, as a share of the activations' mean variance
X = Factor(("texts", "features"), trained=True, shared="class", start="zero", of="frame")
Z = Factor(("texts", "frame"), trained=False, shared="class", start="zero", of="frame")
M = Factor(("frame", "in"), trained=False, shared="private", start="aligned", of="frame")
# maps of a layer into the frame's leading coordinates, and out of it
F = Factor(("branch", "in"), trained=False, shared="private", start="aligned")
G = Factor(("out", "branch"), trained=False, shared="private", start="aligned")

SENT, MADE, MAP = "frame.X", "frame.Z", "frame.M"


def added(method: Method, texts: int) -> Method:
    """The method with the frame that its aligned factors need."""
    return method._replace(
        factors={**method.factors, "X": X, "Z": Z},
        merges={**method.merges, "frame": central},
        sizes=lambda rank: {**method.sizes(rank), "texts": texts, "features": FEATURES, "frame": WIDTH},
    )


def features(states: "Array") -> "Array":
    """X (texts, FEATURES) of a model's head inputs (texts, hidden); columns beyond the rank are 0."""
    centred = states - states.mean(0)
    centred -= centred.mean(0)  # what rounding left over of a large mean
    u, s, _ = np.linalg.svd(centred, full_matrices=False)
    count = min(FEATURES, int((s > 1e-5 * s[0]).sum()))
    columns = np.zeros((len(states), FEATURES), np.float32)
    columns[:, :count] = np.sqrt(len(states)) * u[:, :count]
    return columns


def fault(features: "Array") -> str | None:
    """Why a device's features (texts, FEATURES) are none; None: they are centred and white."""
    used = features[:, features.any(0)]
    if not used.size:
        return "are all 0"
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows is not white
        gram = used.T @ used / len(used)
        off = max(np.abs(gram - np.eye(len(gram), dtype=np.float32)).max(), np.abs(used.mean(0)).max())
    return None if off <= ROUNDED else f"are off white by {off:.2g}, more than {ROUNDED}"


def central(contributions: Contributions) -> Tensors:
    """The features of the device that sees the texts most as the others of its class do.

    Likeness is ‖X_aᵀ X_b‖² / (‖X_aᵀ X_a‖ ‖X_bᵀ X_b‖), the RV coefficient, which does not depend on a
    device's coordinates. So a device that sends noise is passed over where its class has two others.
    The first COMPARED devices are in memory.
    """
    sent = [contribution.delta[SENT] for contribution in islice(contributions(), COMPARED)]
    if not sent:
        return {}
    sizes = [float(np.linalg.norm(X.T @ X)) for X in sent]
    alike = np.zeros(len(sent))
    for first, other in combinations(range(len(sent)), 2):
        likeness = float(np.square(sent[first].T @ sent[other]).sum()) / (sizes[first] * sizes[other])
        alike[[first, other]] += likeness
    return {SENT: sent[int(alike.argmax())]}


def common(classes: "Iterable[Array]", before: "Array | None") -> "Array":
    """Z (texts, WIDTH) of each class's X; before: the Z that it is turned to, if there is one."""
    joined = np.concatenate([*classes], 1)
    # of [X_1 ...]: eigenvectors of its Gram matrix, whose size is WIDTH times the classes
    values, vectors = np.linalg.eigh((joined.T @ joined).astype(np.float64))
    leading = vectors[:, ::-1][:, :WIDTH] / np.sqrt(np.maximum(values[::-1][:WIDTH], 1e-9 * values[-1]))
    Z = np.sqrt(len(joined)) * (joined @ leading.astype(np.float32))
    if before is not None:
        u, _, vt = np.linalg.svd(Z.T @ before)
        Z = Z @ (u @ vt).astype(np.float32)
    return Z.astype(np.float32)


def rotation(name: str, width: int) -> "Array":
    """The rotation (width, width) of a class in the control."""
    return np.linalg.qr(stream(name).standard_normal((width, width)))[0].astype(np.float32)


def into(activations: "Array", Z: "Array") -> "tuple[Array, Array]":
    """The map F (width, in) of activations (texts, in) into a frame (texts, width), and their moments (in, width).

    F = Zᵀ X (XᵀX + λ I)⁻¹ on centred X, without its part along the mean activation, which is the
    largest and the same for all texts. Moments are XᵀZ / texts, by which a frozen layer's weight W
    gives the map out of the frame, W · moments. Both are 0 where only rounding tells texts apart.
    """
    mean = activations.mean(0)
    centred = activations - mean
    moments = centred.T @ Z / len(Z)
    covariance = centred.T @ centred / len(Z)
    if np.trace(covariance) <= ALIKE * (mean @ mean):  # the first layer's, where all texts end in one token
        return np.zeros((Z.shape[1], len(mean)), np.float32), np.zeros_like(moments)
    covariance[np.diag_indices_from(covariance)] += SHRINK * np.trace(covariance) / len(covariance)
    F = np.linalg.solve(covariance, moments).T
    direction = mean / max(float(np.linalg.norm(mean)), 1e-12)
    F -= np.outer(F @ direction, direction)
    return F.astype(np.float32), moments.astype(np.float32)
