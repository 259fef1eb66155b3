"""Why a connection ended, or did not come about, in a sentence.

MQTT 5 has a code for that in CONNACK (section 3.2.2.2) and in DISCONNECT (3.14.2.1), TLS an alert,
the system an error. Many brokers close the connection without any of them: Mosquitto 2.0.11 and
rumqttd even when another client takes over the client id. Each reason is logged the first time that
a connection ends for it, the tenth, the hundredth and so on.
"""

import collections
import errno
import logging
import ssl

from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.reasoncodes import ReasonCode

from edge_broker.address import Address
from edge_broker.errors import BrokerError, BrokerUnreachable, ConnectionClosed, Refused

PACKET_TOO_LARGE = 0x95
# codes of CONNACK: unavailable, busy, quota exceeded, rate exceeded
_PERHAPS_LATER = (0x88, 0x89, 0x97, 0x9F)
# codes of DISCONNECT that a packet of ours may have caused: unspecified, malformed, protocol, implementation
_PERHAPS_A_PACKET = (0x80, 0x81, 0x82, 0x83, PACKET_TOO_LARGE)
# Mosquitto 2.0 answers a PUBLISH over its message_size_limit with a code that MQTT 5 does not have for
# PUBACK, on which paho would close the connection. (paho 2.1 cannot be taught, and does close it.)
ReasonCode.names = {
    **getattr(ReasonCode, "names", {}),
    PACKET_TOO_LARGE: {"Packet too large": [PacketTypes.CONNACK, PacketTypes.PUBACK, PacketTypes.DISCONNECT]},
}
_ADVICE = {
    0x84: "it does not speak MQTT 5",
    0x85: "it does not accept this client id",
    0x86: "check the user name and password",
    0x87: "check the certificate or user name, and the access rules",
    0x8D: "it heard nothing from here for too long; the line or this machine was too slow",
    0x8E: "another client has connected as {client}; give each one a name of its own",
    PACKET_TOO_LARGE: "raise the broker's limit",
    0x97: "raise the broker's limit for this client",
}
_CLOSED = (errno.ECONNRESET, errno.EPIPE)  # a close while there was more to read or to write
_KEEP_ALIVE_TIMEOUT, _PROTOCOL_ERROR = 0x8D, 0x82

log = logging.getLogger(__name__)


class Errors(logging.Handler):
    """The last error that paho met on a socket; paho tells it to its logger alone."""

    def __init__(self) -> None:
        super().__init__()
        self.last: object = None  # an exception, or a text

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the exception of an error, or its text."""
        self.last = record.args[0] if isinstance(record.args, tuple) and record.args else record.getMessage()


class Endings:
    """The endings of one client's connections."""

    def __init__(self, address: Address, client: str) -> None:
        """client: whom the address knows us as, in words."""
        self._address, self._client = address, client
        self._counts: collections.Counter[str] = collections.Counter()
        self._end_logged = False  # and not yet that the connection is back

    def unreachable(self, why: str) -> BrokerUnreachable:
        """There is no connection."""
        hint = "start one with `edge-runtime broker` or check the address"
        return BrokerUnreachable(f"no MQTT broker answered at {self._address}: {why}; {hint}")

    def tls(self, error: ssl.SSLError) -> Refused:
        """TLS failed, here or, by the broker's alert, there."""
        missing = (error.reason or "").endswith("CERTIFICATE_REQUIRED")
        advice = "add cert= and key= to the address" if missing else "check ca, cert, key and the host name"
        return Refused(f"TLS with {self._address} failed: {error}; {advice}")

    def refused(self, code: ReasonCode) -> BrokerError:
        """The broker answered CONNECT with this code."""
        if code.value in _PERHAPS_LATER:
            return self.unreachable(f"it said {code}")
        return Refused(f"{self._address} refused the connection: {self._in_words(code)}")

    def ended(self, code: ReasonCode, by_broker: bool, error: object, stood: bool) -> BrokerError:
        """A connection has ended.

        Args:
            code: the broker's, or paho's word for what paho found.
            by_broker: the broker sent the code.
            error: of the socket, if there was one.
            stood: the broker had accepted the connection.
        """
        kind = BrokerUnreachable
        if isinstance(error, ssl.SSLError):
            return self.tls(error)
        if by_broker:
            why = self._in_words(code)
            kind = ConnectionClosed if code.value in _PERHAPS_A_PACKET else kind
        elif code.value == _KEEP_ALIVE_TIMEOUT:
            why = "the broker has not answered for too long"
        elif code.value == _PROTOCOL_ERROR:
            kind, why = ConnectionClosed, "the broker sent a packet that MQTT 5 does not have"
        elif error is not None and getattr(error, "errno", None) not in _CLOSED:
            why = str(error)
        else:
            kind, why = ConnectionClosed, "the broker closed it without a reason; its log may say why"
        if not stood:
            return self.unreachable(why)
        return kind(f"the connection to {self._address} ended: {why}")

    def tell(self, error: BrokerError) -> None:
        """Log an ending, unless the same was logged and few have followed."""
        self._counts[str(error)] += 1
        count = self._counts[str(error)]
        if count == 10 ** (len(str(count)) - 1):
            self._end_logged = True
            times = f" ({count} times until now)" if count > 1 else ""
            log.warning("%s%s; connecting again", error, times)

    def tell_back(self) -> None:
        """Log that the connection is back, if its end was logged."""
        if self._end_logged:
            self._end_logged = False
            log.warning("connected to %s again", self._address)

    def _in_words(self, code: ReasonCode) -> str:
        advice = _ADVICE.get(code.value, "its log may say why").format(client=self._client)
        return f"{code}; {advice}"
