"""Topic filters of a session: sent at QoS 1, remembered, sent again where the broker lost them.

SUBSCRIBE and SUBACK are paired by paho's packet number. The callback runs on the connection's thread,
the rest on any.
"""

import logging
import threading
from collections.abc import Iterable
from typing import Any

from paho.mqtt import client as paho
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from edge_broker.address import Address
from edge_broker.errors import Refused

log = logging.getLogger(__name__)


class Subscriptions:
    """The filters and the broker's answers; changed guards the answers and is notified of each."""

    def __init__(self, client: paho.Client, address: Address, changed: threading.Condition) -> None:
        self._client, self._address, self._changed = client, address, changed
        self._remembered: dict[str, None] = {}  # in the order of subscribing
        # by packet number: answers that `remember` has not taken, and filters that `restore` sent
        self._answers: dict[int, list[ReasonCode]] = {}
        self._restoring: dict[int, tuple[str, ...]] = {}
        client.on_subscribe = self._on_subscribe

    def send(self, filters: Iterable[str]) -> int | None:
        """Send a SUBSCRIBE and return its packet number, or None without a connection."""
        _, number = self._client.subscribe([(pattern, SubscribeOptions(qos=1)) for pattern in filters])
        return number

    def answered(self, number: int) -> bool:
        """Whether the broker's answer to this SUBSCRIBE is here."""
        return number in self._answers

    def remember(self, filters: tuple[str, ...], number: int) -> bool:
        """Take the broker's answer and keep the filters; False without an answer.

        Raises:
            Refused: the broker refused a filter; then none of them is kept.
        """
        codes = self._answers.pop(number, None)
        if codes is None:
            return False
        self._check(filters, codes)
        self._remembered.update(dict.fromkeys(filters))
        return True

    def forget(self, filters: tuple[str, ...]) -> None:
        """Unsubscribe, without waiting for the broker."""
        for pattern in filters:
            self._remembered.pop(pattern, None)
        self._client.unsubscribe(list(filters))

    def connected(self) -> None:
        """Drop answers of the last connection: their packet numbers mean nothing on a new one."""
        self._answers.clear()

    def restore(self) -> None:
        """Send all filters again to a broker that lost the session."""
        filters = tuple(self._remembered)
        if filters and (number := self.send(filters)):
            self._restoring[number] = filters

    def _check(self, filters: tuple[str, ...], codes: list[ReasonCode]) -> None:
        pairs = zip(filters, codes, strict=False)
        if refused := [f"{pattern} ({code})" for pattern, code in pairs if code.is_failure]:
            raise Refused(
                f"{self._address} refused to subscribe us to {', '.join(refused)}; check its access rules"
            )

    def _on_subscribe(
        self, _client: Any, _userdata: Any, number: int, codes: list[ReasonCode], _: Any
    ) -> None:
        if filters := self._restoring.pop(number, None):
            try:
                self._check(filters, codes)
            except Refused as error:
                log.error("after a reconnect: %s", error)
            return
        with self._changed:
            self._answers[number] = codes
            self._changed.notify_all()
