"""What a machine offers a trainer, and the boards this project knows; imports no torch."""

from edge_profiles.budget import default_budget_bytes, gpu_cap_bytes
from edge_profiles.errors import ProfileError
from edge_profiles.known import Board, board, boards, profile_of
from edge_profiles.machine import probe
from edge_profiles.profile import Gpu, Profile
from edge_profiles.sizes import format_size, parse_size

__all__ = [
    "Board",
    "Gpu",
    "Profile",
    "ProfileError",
    "board",
    "boards",
    "default_budget_bytes",
    "format_size",
    "gpu_cap_bytes",
    "parse_size",
    "probe",
    "profile_of",
]
