"""Errors of the link: one root, and a subclass only where a caller treats a case differently."""

import ssl


class BrokerError(Exception):
    """Root of all errors that this package raises on purpose."""


class BrokerUnreachable(BrokerError):
    """No broker answered at the address; trying again later may work."""


class Refused(BrokerError):
    """The broker refused (credentials, rights, limits); the same try will be refused again."""


class BadMessage(BrokerError):
    """A received message is malformed, unsigned, or signed by the wrong key."""


class WrongKey(BadMessage):
    """A message is signed, but by another key than expected."""


_PERHAPS_LATER = {0x88, 0x89, 0x97, 0x9F}  # unavailable, busy, quota exceeded, rate exceeded
_HINTS = {
    0x84: "it does not speak MQTT 5",
    0x85: "it does not accept this client id",
    0x86: "check the user name and password",
    0x87: "check the certificate or user name, and the access rules",
}


def unreachable(where: object, why: str) -> BrokerUnreachable:
    """The sentence for a broker that did not answer."""
    hint = "start one with `edge-runtime broker` or check the address"
    return BrokerUnreachable(f"no MQTT broker answered at {where}: {why}; {hint}")


def refused_connection(where: object, code: int, reason: str) -> BrokerError:
    """The sentence for a failing CONNACK (MQTT 5, section 3.2.2.2)."""
    if code in _PERHAPS_LATER:
        return unreachable(where, f"it said {reason}")
    return Refused(f"{where} refused the connection: {reason}; {_HINTS.get(code, 'its log may say why')}")


def failed_connection(where: object, error: Exception) -> BrokerError:
    """The sentence for a connection that could not be opened, or broke."""
    if isinstance(error, ssl.SSLError):
        return Refused(f"TLS with {where} failed: {error}; check ca, cert, key and the host name")
    return unreachable(where, str(error))
