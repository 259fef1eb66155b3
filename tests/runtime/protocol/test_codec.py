"""The codec: what a round trip loses, what error feedback gives back, and payloads that were made to harm."""

import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
import zstandard
from safetensors.numpy import load_file

from edge_runtime.errors import InputError
from edge_runtime.protocol.codec import FIXED_STEPS, answers, decode, encode, shapes
from edge_runtime.protocol.digits import BASES, Digits, pack, unpack
from edge_runtime.protocol.payload import MAGIC, Header
from edge_runtime.settings import FINE_STEP

GOLDEN = Path(__file__).parent / "golden"
A, B = "layers.0.q.A", "layers.0.q.B"


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(0, 0.01, shape).astype(np.float32)


def assert_within_half_a_step(tensor, decoded, step=FINE_STEP):
    """No value is off by more than half a step, but for what the nearest step differs from the asked."""
    size = step * np.sqrt(np.square(tensor, dtype=np.float64).mean())
    error = np.abs(decoded.astype(np.float64) - tensor)
    off = np.flatnonzero(error > size / 2 + 4e-3 * np.abs(tensor))
    assert not off.size, f"{off[0]} is off by {error.ravel()[off[0]] / size:.2f} steps"


@pytest.mark.parametrize("shape", [(1,), (63,), (64,), (65,), (3, 43), (16, 64), (2, 3, 5), ()])
def test_each_value_is_within_half_a_step(shape):
    tensors = {A: draw(*shape), B: draw(7, 9, seed=1)}
    decoded = decode(encode(tensors))
    assert list(decoded) == list(tensors)
    for key, tensor in tensors.items():
        assert (decoded[key].shape, decoded[key].dtype) == (tensor.shape, np.float32)
        assert_within_half_a_step(tensor, decoded[key])


def test_the_bound_sees_one_value_that_is_off_by_a_step():
    tensor = draw(16, 64)
    decoded = decode(encode({A: tensor}))[A].copy()
    decoded[7, 9] += FINE_STEP * tensor.std()
    with pytest.raises(AssertionError, match=f"{7 * 64 + 9} is off by"):
        assert_within_half_a_step(tensor, decoded)


@pytest.mark.parametrize("step", [4.0, 2.5, 1.5, 1.0, 0.5, 0.1, FINE_STEP])
def test_less_is_left_over_than_with_the_step_of_rounding(step):
    for tensor in (draw(64, 48), draw(3), np.float32([[1, 0, 0, 0]]), draw(64, 48) ** 3):
        size = step * np.sqrt(np.square(tensor).mean())
        rounded = size * np.rint(tensor / size)
        left, more = (
            np.linalg.norm(tensor - seen) for seen in (decode(encode({A: tensor}, step=step))[A], rounded)
        )
        assert left <= more * (1 + 1e-4)
    if step == 1.5:
        normal = draw(64, 480)
        left = normal - decode(encode({A: normal}, step=step))[A]
        assert np.square(left).sum() / np.square(normal).sum() == pytest.approx(
            0.155, abs=0.01
        )  # rounded: 0.19


def test_tensors_of_very_different_size_do_not_disturb_each_other():
    tensors = {f"layers.{n}.q.A": draw(4, 64) * np.float32(size) for n, size in enumerate((1e-12, 1, 1e9))}
    for key, decoded in decode(encode(tensors)).items():
        assert_within_half_a_step(tensors[key], decoded)


def test_values_far_beyond_the_others_arrive():
    tensor = draw(16, 640)
    tensor[3, 7], tensor[9, 600], tensor[15, 639] = 3.0, -70.0, 0.5
    for step in (FINE_STEP, 1.0):
        assert_within_half_a_step(tensor, decode(encode({A: tensor, B: draw(4, 4)}, step=step))[A], step)


def test_probabilities_have_a_step_of_their_own_whatever_the_others_have():
    p = np.random.default_rng(0).dirichlet(np.full(150, 0.05), 40).T.astype(np.float32)
    sent = {f"anchors.{n}.P": row[None] for n, row in enumerate(p)}
    coarse = decode(encode({**sent, A: draw(8, 8)}, step=2.5))
    for key, row in sent.items():
        assert np.abs(coarse[key] - row).max() <= FIXED_STEPS["anchors"] / 2
    # what lies on the steps arrives as it is: a version that many rounds have added to stays exact
    again = decode(encode({key: coarse[key] for key in sent}, step=1.0))
    assert all(np.array_equal(again[key], coarse[key]) for key in sent)


def test_zeros_stay_zeros():
    tensor = draw(4, 64)
    tensor[1], tensor[2, 5] = 0, 0
    decoded = decode(encode({A: tensor, B: np.zeros((8, 8), np.float32)}))
    assert not decoded[A][1].any()
    assert decoded[A][2, 5] == 0
    assert not decoded[B].any()


@pytest.mark.parametrize("size", [1e-38, 1e-41, 2.5e-43, 1e-45])
def test_values_too_small_for_a_step_become_zero_and_never_turn_their_sign(size):
    tensor = np.full((1, 64), size, np.float32)
    assert not decode(encode({A: tensor}))[A].any()


@pytest.mark.parametrize(("step", "most"), [(FINE_STEP, 7.2), (1.0, 2.2), (1.5, 1.65), (2.5, 1.05)])
def test_it_takes_the_entropy_of_the_numbers(step, most):
    """Of normal values; 2.5 % above the entropy."""
    tensors = {f"layers.{n}.q.A": draw(16, 4096, seed=n) for n in range(4)}
    assert 8 * len(encode(tensors, step=step)) / (4 * 16 * 4096) < most
    assert len(encode({A: np.zeros((64, 576), np.float32)})) < 300


def test_a_head_of_many_small_rows_takes_no_table_for_each():
    rows = {f"labels.intent_{n}.H": draw(1, 576, seed=n) for n in range(150)}
    assert 8 * len(encode(rows, step=1.5)) / (150 * 576) < 1.8


def sent_over_rounds(deltas, feedback, step=FINE_STEP):
    """The sum of what the node decoded."""
    total, residual = np.zeros_like(deltas[0]), np.zeros_like(deltas[0])
    for delta in deltas:
        owed = delta + residual
        decoded = decode(encode({A: owed}, step=step))[A]
        residual = owed - decoded if feedback else residual
        total += decoded
    return total


@pytest.mark.parametrize("step", [FINE_STEP, 1.5])
def test_error_feedback_sums_to_the_truth_over_rounds(step):
    """Without it, values below half a step would never arrive."""
    delta = draw(4, 64) * 1e-3
    delta[:, 0] = 1.0
    rounds = 200
    truth = delta.astype(np.float64) * rounds
    with_it = np.abs(sent_over_rounds([delta] * rounds, True, step) - truth)
    without = np.abs(sent_over_rounds([delta] * rounds, False, step) - truth)
    assert with_it.max() < 2 * step
    assert without[:, 1:].max() > 0.9 * np.abs(truth[:, 1:]).max()


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf, 3.4e38])
@pytest.mark.parametrize("key", [A, "anchors.x.P"])
def test_a_value_that_is_not_finite_is_not_sent(wrong, key):
    tensor = draw(4, 64)
    tensor[2, 3] = wrong
    with pytest.raises(InputError, match=f"{key} holds a value that is not finite"):
        encode({key: tensor})


# --- digits


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("size", [1, 2, 5, 6, 1000])
def test_digits_hold_every_number_of_their_base(base, size):
    numbers = np.random.default_rng(size).integers(-(base // 2), base // 2 + 1, size).astype(np.float32)
    numbers[0] = base // 2  # so that no smaller base does
    packed = pack(numbers)
    assert (packed.base, packed.strays.size, packed.content.size) == (base, 0, -(-size // BASES[base]))
    np.testing.assert_array_equal(unpack(packed.content, base, np.float32(1), size), numbers)


def test_few_strays_do_not_make_all_bytes_longer():
    numbers = np.zeros(10_000, np.float32)
    numbers[[5, 77, 9_999]] = 3, -40_000, 2
    packed = pack(numbers)
    assert (packed.base, packed.places.tolist(), packed.strays.tolist()) == (
        3,
        [5, 77, 9_999],
        [3, -40_000, 2],
    )
    numbers[:20] = 9
    assert pack(numbers).base == 255


# --- payloads that an earlier version has written


def test_a_payload_in_the_tree_is_decoded_to_the_same_values():
    """Written by `encode` when the format was made; what it says must never change."""
    payload, values = (GOLDEN / "edc2.bin").read_bytes(), load_file(GOLDEN / "edc2.safetensors")
    decoded = decode(payload)
    assert sorted(decoded) == sorted(values)
    for key, value in values.items():
        np.testing.assert_array_equal(decoded[key], value, strict=True)
    assert answers(payload) == b'[[0, "red", 0.5]]'


@pytest.mark.parametrize("magic", [b"EDC1", b"EDC3"])
def test_a_payload_of_another_version_is_refused_by_name(magic):
    for read in (decode, shapes, answers):
        with pytest.raises(
            InputError, match=f"in format b'{magic.decode()}' of another version.* same version"
        ):
            read(magic + encode({A: draw(3, 4)})[4:])


# --- payloads from a sender that is broken or hostile

PACKED = pack(np.float32([1, -1, 0, 0, 1]))


def side(steps=(0.5,), bases=(0,), gaps=(), strays=()):
    parts = ((steps, "<f4"), (bases, "<u1"), (gaps, "<u4"), (strays, "<i4"))
    return b"".join(np.array(values, kind).tobytes() for values, kind in parts)


def payload(declared, content, packed: Digits = PACKED, strays=0, answers=0, sections=None):
    """A payload by hand: its side information, and digits of the smallest base."""
    parts = [zstandard.compress(content), b"", zstandard.compress(packed.content.tobytes()), b"", b"", b""]
    return assembled(Header(declared, sections or tuple(map(len, parts)), strays, answers), b"".join(parts))


def assembled(header, content):
    encoded = zstandard.compress(msgspec.json.encode(header) if isinstance(header, Header) else header)
    return MAGIC + len(encoded).to_bytes(4, "big") + encoded + content


def test_shapes_are_declared_before_anything_is_expanded():
    made = encode({A: draw(3, 5), B: draw(4, 3)})
    assert shapes(made) == {A: (3, 5), B: (4, 3)}


def test_a_payload_cut_anywhere_is_refused():
    whole = encode({A: draw(5, 40), B: draw(7)}, b"answers")
    decode(whole)
    for length in range(len(whole)):
        for read in (decode, answers):
            with pytest.raises(InputError):
                read(whole[:length])
    with pytest.raises(InputError):
        decode(whole + b"\0")


def test_a_payload_with_any_byte_changed_is_refused_or_of_the_declared_shapes():
    tensors = {A: draw(5, 40), B: draw(7)}
    tensors[A][3, 3] = 9
    whole = encode(tensors, b"answers", step=1.0)
    for place in range(len(whole)):
        for bit in (1, 128):
            changed = bytearray(whole)
            changed[place] ^= bit
            try:
                decoded = decode(bytes(changed))
            except InputError:
                continue
            assert [value.shape for value in decoded.values()] == [*shapes(bytes(changed)).values()]
            assert all(np.isfinite(value).all() for value in decoded.values())


def test_a_good_payload_made_by_hand_is_decoded():
    """The refusals below are of what was changed in it."""
    np.testing.assert_array_equal(decode(payload({A: (5,)}, side()))[A], [0.5, -0.5, 0, 0, 0.5])
    stray = payload({A: (5,)}, side(gaps=(3,), strays=(700,)), strays=1)
    np.testing.assert_array_equal(decode(stray)[A], [0.5, -0.5, 350, 0, 0.5])


FIVE = {A: (5,)}


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (b"", "no encoded adapter state"),
        (b"GGUF" + bytes(60), "no encoded adapter state"),
        (MAGIC + b"\xff\xff\xff\xff" + b"{}", "header cannot be read: it claims 4294967295 bytes"),
        (MAGIC + (7).to_bytes(4, "big") + b"\xff\xfe\xfd}}}}", "header cannot be read"),
        (assembled(b"null", b""), "header cannot be read"),
        (assembled(b'{"shapes": 3}', b""), "header cannot be read"),
        (payload({A: ("six",)}, side()), "header cannot be read"),
        (assembled(b'{"unknown": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", b""), "cannot be read"),
        (assembled(b"{}".ljust(1 << 25), b""), "header cannot be read: it claims to be 33554432 bytes"),
        (payload({A: (5, 0)}, b""), "declares an empty tensor"),
        (payload({A: (-8, -8)}, side()), "declares an empty tensor"),
        (payload({A: (6,)}, side()), "holds 1 bytes of values, its header needs 2"),
        (payload({A: (5,), B: (5,)}, side((1, 1), (0, 0))), "holds 1 bytes of values, its header needs 2"),
        (payload({A: (5,), B: (5,)}, side()), "holds 5 bytes of values, its header needs 10"),
        (payload({}, side()), "holds 5 bytes of values, its header needs 0"),
        (payload(FIVE, side(bases=(1,))), "holds 1 bytes of values, its header needs 0"),
        (payload(FIVE, side(bases=(4,))), "digits of another base than 3, 5, 15, 255"),
        (payload(FIVE, side((np.nan,))), "a step that is negative or not finite"),
        (payload(FIVE, side((np.inf,))), "a step that is negative or not finite"),
        (payload(FIVE, side((-0.5,))), "a step that is negative or not finite"),
        (payload(FIVE, side((3e31,))), "a step that is negative or not finite"),
        (payload(FIVE, side(gaps=(6,), strays=(2,)), strays=1), "a stray outside its tensors"),
        (payload(FIVE, side(gaps=(2, 0), strays=(2, 2)), strays=2), "or two in one place"),
        (payload(FIVE, side(gaps=(2**32 - 1,) * 2, strays=(2, 2)), strays=2), "a stray outside"),
        (payload(FIVE, side(gaps=(1,), strays=(-(2**31),)), strays=1), "a number beyond 16777216"),
        (payload(FIVE, side(), strays=6), "declares 6 strays in 5 values"),
        (payload(FIVE, side(), strays=-1), r"header cannot be read: Expected `int` >= 0 - at `\$.strays`"),
        (payload({A: (1 << 25,)}, side(), strays=1 << 25), "declares 33554432 strays"),
        (payload(FIVE, side(), strays=1), "holds 5 bytes of values, its header needs 13"),
        (payload(FIVE, side(), sections=(1, 2)), "declares 2 sections, not 6"),
        (payload(FIVE, side(), sections=(-1, 1, 0, 0, 0, 0)), r">= 0 - at `\$.sections"),
        *(
            # six numbers of 4,300 digits, which Python reads but whose sum it does not print
            (assembled(b'{"shapes": {"A": [5]}, "%s": %s}' % (name, value), b""), "header cannot be read: ")
            for name, value in (
                (b"sections", b"[%s]" % b",".join([b"9" * 4300] * 6)),
                (b"strays", b"9" * 4300),
                (b"completions_bytes", b"9" * 4300),
                (b"rank", b"9" * 4300),
                (b"completions_bytes", b"-1"),
                (b"rank", b"-1"),
                (b"rank", b"2.5"),
            )
        ),
        (payload(FIVE, side(), sections=(1 << 60, 1, 0, 0, 0, 0)), "its header needs 1152921504606846977"),
        (payload({A: (1,) * 100_000}, side()), "more than 8 axes$"),
        (payload({A: (2**62, 2**62)}, side()), "declares"),
        (payload({A: (2**62,)}, side()), "declares"),
        (payload({A: (2**31, 2**33)}, side()), "declares"),
    ],
)
def test_a_malformed_payload_is_refused(made, message):
    with pytest.raises(InputError, match=message):
        decode(made)


def test_the_largest_step_and_number_make_no_infinite_value():
    largest = side((2e31,), gaps=(1,), strays=(1 << 24,))
    assert np.isfinite(decode(payload(FIVE, largest, strays=1))[A]).all()


def test_a_body_that_expands_to_gigabytes_is_refused_without_expanding_it():
    """In a process of its own, so that its peak is that of this payload alone.

    The body says nothing of its length, or says that it is as long as it is, or as long as it
    should be.
    """
    code = """
import resource, sys
import msgspec, zstandard
from edge_runtime.protocol import codec, payload
from edge_runtime.errors import InputError

def bomb(size):
    compressor = zstandard.ZstdCompressor(level=1).compressobj(size=size)
    pieces = [compressor.compress(bytes(1 << 20)) for _ in range(256)]
    return b"".join([*pieces, compressor.flush()])

unknown, told = bomb(-1), bomb(1 << 28)
lying = told.replace((1 << 28).to_bytes(4, "little"), (200).to_bytes(4, "little"))
side = zstandard.compress(bytes(5))
payloads = []
for body in (unknown, told, lying):
    sections = (len(side), 0, len(body), 0, 0, 0)
    header = zstandard.compress(msgspec.json.encode(payload.Header({"A": (1000,)}, sections)))
    payloads.append(payload.MAGIC + len(header).to_bytes(4, "big") + header + side + body)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for each in payloads:
    try:
        codec.decode(each)
    except InputError as error:
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        print(len(each) < 1 << 20, grown < 32 << 10, str(error)[:40])
"""
    said = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert said.splitlines() == [
        "True True the payload holds -1 bytes of values, it",
        "True True the payload holds 268435456 bytes of val",
        "True True the payload cannot be decompressed: deco",
    ]
