"""User and password for a broker, from a file or the environment; other users see arguments.

    user = "device-7"
    password = "..."

The file is TOML with these two keys. Where files have modes, only the owner may have access to it.
"""

import os
from collections.abc import Mapping
from pathlib import Path

import msgspec

from edge_broker import files
from edge_broker.address import Address
from edge_broker.errors import BrokerError

# environment variables
USER, PASSWORD = "EDGE_RUNTIME_BROKER_USER", "EDGE_RUNTIME_BROKER_PASSWORD"


class Credentials(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The user and the password that a broker asks for."""

    user: str
    password: str

    def __repr__(self) -> str:
        return f"Credentials({self.user!r}, '***')"


def complete(address: Address, file: Path | None, environment: Mapping[str, str]) -> Address:
    """The address with its user and password.

    The file comes first, then the URL, then the environment. A URL may name a user whose password
    is in the environment.

    Args:
        address: the broker's address as its URL has it.
        file: a credentials file, or None.
        environment: such as os.environ; USER and PASSWORD are read.

    Raises:
        BrokerError: the file cannot be used, a user is given twice, or a password has no user.
    """
    if file is not None:
        if address.user is not None or address.password is not None:
            raise BrokerError(
                f"{address} has a user already, and {file} names one too: take it out of the address"
            )
        credentials = read(file)
        return msgspec.structs.replace(address, user=credentials.user, password=credentials.password)
    if address.password is not None:
        return address
    user = address.user or environment.get(USER) or None
    password = environment.get(PASSWORD) or None
    if password and user is None:
        raise BrokerError(f"{PASSWORD} is set, but not {USER}: set the user too, or unset the password")
    return msgspec.structs.replace(address, user=user, password=password)


def hand_over(address: Address, environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of a child process that connects with the address's user and password."""
    pairs = ((USER, address.user), (PASSWORD, address.password))
    return withhold(environment) | {name: value for name, value in pairs if value is not None}


def withhold(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of a child process that does not connect to the broker."""
    return {name: value for name, value in environment.items() if name not in (USER, PASSWORD)}


def read(path: Path) -> Credentials:
    """Read a credentials file.

    Raises:
        BrokerError: the file cannot be read, is open to other users, or has another form. The
            message quotes nothing of the file.
    """
    try:
        with path.open("rb") as file:
            # of the opened file: a path could lead to another file by now
            mode = os.fstat(file.fileno()).st_mode
            content = file.read()
    except OSError as error:
        raise BrokerError(
            f"cannot read the credentials file {path}: {error.strerror}; give the path of a file of this user, or "
            f"set {USER} and {PASSWORD} instead"
        ) from None
    if os.name == "posix" and mode & 0o077:
        raise BrokerError(
            f"the credentials file {path} is open to other users (mode {mode & 0o777:03o}): run `chmod 600 {path}`"
        )
    try:
        return msgspec.toml.decode(files.utf_8(content), type=Credentials)
    except files.NotUtf8 as error:
        raise BrokerError(f"the credentials file {path} {error}") from None
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise BrokerError(
            f"the credentials file {path} needs two lines and no more: "
            'user = "NAME" and password = "PASSWORD" (a TOML file)'
        ) from None
