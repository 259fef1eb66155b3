"""The exception of edge_profiles."""


class ProfileError(ValueError):
    """An unknown board, a board file that is not as it should be, or a text that is not a size in bytes."""
