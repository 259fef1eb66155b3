"""The codec: what a round trip loses, what error feedback gives back, and payloads that were made to harm."""

import subprocess
import sys

import msgspec
import numpy as np
import pytest
import zstandard

from edge_runtime.errors import InputError
from edge_runtime.protocol.codec import BLOCK, MAGIC, Header, decode, encode, shapes


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(0, 0.01, shape).astype(np.float32)


def assert_within_half_a_step(tensor, decoded):
    """In every block, no value is off by more than half of max|v| / 127, but for float32's own rounding."""
    flat, seen = tensor.ravel(), decoded.ravel()
    for first in range(0, flat.size, BLOCK):
        block = flat[first : first + BLOCK].astype(np.float64)
        error = np.abs(seen[first : first + BLOCK] - block).max()
        assert error <= np.abs(block).max() / 127 / 2 * (1 + 1e-4), f"block at {first} is off by {error:.2e}"


@pytest.mark.parametrize("shape", [(1,), (63,), (64,), (65,), (3, 43), (16, 64), (2, 3, 5), ()])
def test_each_block_is_within_half_a_step(shape):
    tensors = {"layers.0.q.A": draw(*shape), "layers.0.q.B": draw(7, 9, seed=1)}
    decoded = decode(encode(tensors))
    assert list(decoded) == list(tensors)
    for key, tensor in tensors.items():
        assert (decoded[key].shape, decoded[key].dtype) == (tensor.shape, np.float32)
        assert_within_half_a_step(tensor, decoded[key])


def test_the_bound_sees_one_value_that_is_off_by_a_step():
    tensor = draw(16, 64)
    decoded = decode(encode({"A": tensor}))["A"].copy()
    decoded[7, 9] += np.abs(tensor[7]).max() / 127
    with pytest.raises(AssertionError, match=f"block at {7 * 64}"):
        assert_within_half_a_step(tensor, decoded)


def test_blocks_of_very_different_size_do_not_disturb_each_other():
    tensor = draw(4, 64) * np.array([[1e-12], [1.0], [1e9], [1e-3]], np.float32)
    assert_within_half_a_step(tensor, decode(encode({"A": tensor}))["A"])


def test_zeros_stay_zeros():
    tensor = draw(4, 64)
    tensor[1], tensor[2, 5] = 0, 0
    decoded = decode(encode({"A": tensor, "B": np.zeros((8, 8), np.float32)}))
    assert not decoded["A"][1].any()
    assert decoded["A"][2, 5] == 0
    assert not decoded["B"].any()


@pytest.mark.parametrize("size", [1e-37, 1e-41, 2.5e-43, 1e-45])
def test_values_too_small_for_a_scale_become_zero_and_never_turn_their_sign(size):
    tensor = np.full((1, 64), size, np.float32)
    assert not decode(encode({"A": tensor}))["A"].any()


def test_what_was_decoded_once_is_encoded_without_loss():
    first = decode(encode({"A": draw(20, 33)}))
    second = decode(encode(first))
    np.testing.assert_allclose(second["A"], first["A"], rtol=1e-6)


def test_it_is_a_quarter_of_float32_or_less():
    tensor = draw(64, 576)
    assert len(encode({"A": tensor})) < tensor.nbytes / 3.6
    assert len(encode({"A": np.zeros_like(tensor)})) < 200


def sent_over_rounds(deltas, feedback):
    """The sum of what the node decoded."""
    total, residual = np.zeros_like(deltas[0]), np.zeros_like(deltas[0])
    for delta in deltas:
        owed = delta + residual
        decoded = decode(encode({"A": owed}))["A"]
        residual = owed - decoded if feedback else residual
        total += decoded
    return total


def test_error_feedback_sums_to_the_truth_over_rounds():
    """Without it, values below half a step of their block would never arrive."""
    delta = draw(4, 64) * 1e-3
    delta[:, 0] = 1.0
    rounds = 200
    truth = delta.astype(np.float64) * rounds
    step = 1 / 127
    with_it = np.abs(sent_over_rounds([delta] * rounds, feedback=True) - truth)
    without = np.abs(sent_over_rounds([delta] * rounds, feedback=False) - truth)
    assert with_it.max() < step
    assert without[:, 1:].max() > 0.9 * np.abs(truth[:, 1:]).max()


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf, 3.4e38])
def test_a_value_that_is_not_finite_is_not_sent(wrong):
    tensor = draw(4, 64)
    tensor[2, 3] = wrong
    with pytest.raises(InputError, match=r"layers.0.q.A holds a value that is not finite"):
        encode({"layers.0.q.A": tensor})


# --- payloads from a sender that is broken or hostile


def payload(declared, body, level=3):
    header = msgspec.json.encode(Header(declared))
    return (
        MAGIC + len(header).to_bytes(4, "big") + header + zstandard.ZstdCompressor(level=level).compress(body)
    )


def body(values=64, scales=(0.5,)):
    return bytes(values) + np.array(scales, "<f4").tobytes()


def test_shapes_are_declared_before_anything_is_expanded():
    made = encode({"layers.0.q.A": draw(3, 5), "layers.0.q.B": draw(4, 3)})
    assert shapes(made) == {"layers.0.q.A": (3, 5), "layers.0.q.B": (4, 3)}


def test_a_payload_cut_anywhere_is_refused():
    whole = encode({"A": draw(5, 40), "B": draw(7)})
    decode(whole)
    for length in range(len(whole)):
        with pytest.raises(InputError):
            decode(whole[:length])


def test_a_good_payload_made_by_hand_is_decoded():
    """The refusals below are of what was changed in it."""
    assert decode(payload({"A": (64,)}, body()))["A"].shape == (64,)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (b"", "no encoded adapter state"),
        (b"GGUF" + bytes(60), "no encoded adapter state"),
        (MAGIC + b"\xff\xff\xff\xff" + b"{}", "header cannot be read"),
        (MAGIC + (7).to_bytes(4, "big") + b"\xff\xfe\xfd}}}}", "header cannot be read"),
        (MAGIC + (4).to_bytes(4, "big") + b"null", "header cannot be read"),
        (MAGIC + (13).to_bytes(4, "big") + b'{"shapes": 3}', "header cannot be read"),
        (payload({"A": ("six",)}, body()), "header cannot be read"),
        (
            MAGIC + (200_013).to_bytes(4, "big") + b'{"unknown": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
            "cannot be read",
        ),
        (
            MAGIC + (1 << 25).to_bytes(4, "big") + b"{}".ljust(1 << 25),
            "header cannot be read: it claims 33554432",
        ),
        (payload({"A": (64, 0)}, b""), "declares an empty tensor"),
        (payload({"A": (-8, -8)}, body()), "declares an empty tensor"),
        (payload({"A": (65,)}, body()), "holds 68 bytes of values, its header needs 73"),
        (payload({"A": (63,)}, body()), "holds 68 bytes of values, its header needs 67"),
        (payload({"A": (64,), "B": (64,)}, body()), "holds 68 bytes of values, its header needs 136"),
        (payload({}, body()), "holds 1 bytes of values, its header needs 0"),
        (payload({"A": (64,)}, body(scales=(np.nan,))), "a scale that is negative or not finite"),
        (payload({"A": (64,)}, body(scales=(np.inf,))), "a scale that is negative or not finite"),
        (payload({"A": (64,)}, body(scales=(-0.5,))), "a scale that is negative or not finite"),
        (payload({"A": (1,) * 100_000}, body()), "more than 8 axes$"),
        (payload({"A": (2**62, 2**62)}, body()), "declares"),
        (payload({"A": (2**62,)}, body()), "declares"),
        (payload({"A": (2**31, 2**33)}, body()), "declares"),
    ],
)
def test_a_malformed_payload_is_refused(made, message):
    with pytest.raises(InputError, match=message):
        decode(made)


def test_a_finite_scale_that_would_make_infinite_values_is_refused():
    values = np.full(64, -128, np.int8).tobytes()
    with pytest.raises(InputError, match="not finite"):
        decode(payload({"A": (64,)}, values + np.array([3e36], "<f4").tobytes()))
    largest = decode(payload({"A": (64,)}, values + np.array([2.6e36], "<f4").tobytes()))
    assert np.isfinite(largest["A"]).all()


def test_a_body_that_expands_to_gigabytes_is_refused_without_expanding_it():
    """In a process of its own, so that its peak is that of this payload alone."""
    code = """
import resource, sys
import msgspec, zstandard
from edge_runtime.protocol import codec
from edge_runtime.errors import InputError

compressor = zstandard.ZstdCompressor(level=1).compressobj()
bomb = b"".join([compressor.compress(bytes(1 << 20)) for _ in range(4096)] + [compressor.flush()])
header = msgspec.json.encode(codec.Header({"A": (1000,)}))
payload = codec.MAGIC + len(header).to_bytes(4, "big") + header + bomb
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    codec.decode(payload)
except InputError as error:
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(len(payload) < 1 << 20, grown < 32 << 10, error)
"""
    said = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert said == "True True the payload holds 1065 bytes of values, its header needs 1064\n"
