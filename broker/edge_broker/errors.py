"""Errors of the link: one root, and a subclass only where a caller treats a case differently."""


class BrokerError(Exception):
    """Root of all errors that this package raises on purpose."""


class BrokerUnreachable(BrokerError):
    """No broker answered at the address; trying again later may work."""


class ConnectionClosed(BrokerUnreachable):
    """The broker ended a connection that stood, and one of our packets may be the cause."""


class Refused(BrokerError):
    """The broker refused (credentials, rights, limits); the same try will be refused again."""


class BadFile(BrokerError):
    """A file of this machine, such as a key, cannot be used."""


class BadMessage(BrokerError):
    """A received message is malformed, unsigned, or signed by the wrong key."""


class WrongKey(BadMessage):
    """A message is signed, but by another key than expected."""
