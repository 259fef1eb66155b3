"""Sizes in bytes as people write and read them.

    900MiB = 900 · 2**20      900MB = 900 · 10**6      800000000 = bytes

Source of the binary prefixes: IEC 80000-13.
"""

import re

from edge_profiles.errors import ProfileError

KIB, MIB, GIB, TIB = 2**10, 2**20, 2**30, 2**40

_UNITS = {"": 1, "b": 1, "kib": KIB, "mib": MIB, "gib": GIB, "tib": TIB}
_UNITS |= {"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_SIZE = re.compile(r"\s*([0-9]{1,18})(?:\.([0-9]{1,18}))?\s*([A-Za-z]*)\s*", re.ASCII)


def parse_size(text: str) -> int:
    """Read a size such as "900MiB", "1.5 GiB", "900MB" or "800000000" (bytes); the case of the unit is free.

    Returns:
        Whole bytes, rounded down.

    Raises:
        ProfileError: any other text. "1G" and "900M" are refused, because they mean 10**9 to some and 2**30 to others.
    """
    match = _SIZE.fullmatch(text)
    if match:
        integer, fraction, unit = match[1], match[2] or "", match[3].lower()
        # a fraction of a byte is a forgotten unit
        if unit in _UNITS and not (fraction and _UNITS[unit] == 1):
            return int(integer + fraction) * _UNITS[unit] // 10 ** len(fraction)
    raise ProfileError(
        f"size {text!r} is not understood: write a number and a unit, such as '900MiB', '1.5GiB' or '900MB', "
        "or whole bytes, such as '800000000'"
    )


def format_size(size_bytes: int) -> str:
    """Write bytes with the largest binary unit that keeps the number at 1 or more: "900 MiB", "1.46 GiB", "-2 KiB".

    At most two decimals, so the text is for people; programs should read the bytes.
    """
    sign, magnitude = ("-" if size_bytes < 0 else ""), abs(size_bytes)
    if magnitude < KIB:
        return f"{sign}{magnitude} B"
    units = ((TIB, "TiB"), (GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB"))
    unit, name = next(pair for pair in units if round(magnitude / pair[0], 2) >= 1)
    return f"{sign}{magnitude / unit:.2f}".rstrip("0").rstrip(".") + f" {name}"
