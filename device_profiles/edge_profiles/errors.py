"""The exceptions of edge_profiles: one root, and one for sizes that also is a ValueError."""


class ProfileError(Exception):
    """Root of what this package raises: an unknown board, a board file that is not as it should be, a bad size."""


class SizeError(ProfileError, ValueError):
    """A text is not a size in bytes."""
