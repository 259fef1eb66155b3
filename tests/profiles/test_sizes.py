"""Sizes are read exactly, written for people, and refused when they could mean two things."""

import pytest
from edge_profiles import ProfileError, format_size, parse_size


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("900MiB", 900 * 2**20),
        ("1.5GiB", 3 * 2**29),
        ("900MB", 900_000_000),
        ("1.5GB", 1_500_000_000),
        ("800000000", 800_000_000),
        ("  7 gib ", 7 * 2**30),
        ("0", 0),
        ("64B", 64),
        ("0.1KiB", 102),
        ("2TiB", 2**41),
        ("123456789012345678", 123_456_789_012_345_678),  # more digits than a float holds
    ],
)
def test_a_size_is_read_exactly(text, size_bytes):
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize(
    "text", ["", "MiB", "900M", "1G", "-1MiB", "1,5GiB", "1.5", "1.5B", "1e9", "nan", "٣MiB", "9" * 5000]
)
def test_another_text_is_refused_with_the_forms_that_are_read(text):
    with pytest.raises(ValueError, match="900MiB") as caught:
        parse_size(text)
    assert isinstance(caught.value, ProfileError)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (900 * 2**20, "900 MiB"),
        (3 * 2**29, "1.5 GiB"),
        (1_000_000_000, "953.67 MiB"),
        (2**30 - 1, "1 GiB"),  # never "1024 MiB"
        (-2048, "-2 KiB"),
        (5 * 2**42, "20 TiB"),
    ],
)
def test_a_size_is_written_with_the_largest_fitting_unit(size_bytes, text):
    assert format_size(size_bytes) == text


@pytest.mark.parametrize("size_bytes", [1, 45 * 2**20, 7_654_321_000, 2**37 + 12345])
def test_what_is_written_reads_back_within_its_two_decimals(size_bytes):
    assert parse_size(format_size(size_bytes)) == pytest.approx(size_bytes, rel=0.005)
