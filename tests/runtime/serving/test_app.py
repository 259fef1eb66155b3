"""The HTTP interface itself, without a process: by which names it may be addressed."""

import asyncio
import types

import pytest

from edge_runtime.serving.app import LOOPBACK, Service, app


def status(service, host):
    """The status of the interface's answer to a client that names it so."""
    sent = []

    async def send(message):
        sent.append(message)

    async def ask():
        scope = {"type": "http", "method": "GET", "path": "/health", "query_string": b"", "headers": []}
        scope["headers"].append((b"host", host.encode()))
        await app(service, LOOPBACK)(scope, None, send)

    asyncio.run(ask())
    return sent[0]["status"]


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "[::1]"])
def test_a_loopback_address_is_answered_and_another_name_is_not(host):
    service = Service("tiny", types.SimpleNamespace(version=1), None, None, 64, 96)
    assert status(service, f"{host}:8080") == status(service, host) == 200
    assert status(service, f"evil.{host}") == 400
