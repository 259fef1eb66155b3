"""The errors of this package and their exit codes, which docs/exit-codes.md lists."""


class EdgeError(Exception):
    """Root of all errors of this package; its message is meant for the user as it stands."""

    exit_code = 1


class InputError(EdgeError):
    """A file, a setting or an argument cannot be used."""

    exit_code = 2


class UnreachableError(EdgeError):
    """The broker or the fleet's node cannot be reached."""

    exit_code = 3


class BudgetError(EdgeError):
    """No plan fits the memory budget, or is fast enough for the deadline of a step."""

    exit_code = 4


class TrainerError(EdgeError):
    """The trainer process ended without a result."""

    exit_code = 5


class MemoryShortError(TrainerError):
    """The trainer needs more memory than its budget; a smaller plan may fit."""

    exit_code = 6


class DiskError(TrainerError):
    """The disk stayed full while the trainer had a result to write."""

    exit_code = 7
