"""Where a server listens: what is no port of this machine is refused before anything else is done."""

import socket

import pytest

from edge_runtime.errors import InputError
from edge_runtime.serving.endpoint import Endpoint, bound, on_loopback


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_port_that_is_taken_is_told(host):
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        taken = socket.create_server((host, 0), family=family)
    except OSError:
        pytest.skip("this machine has no IPv6")
    with taken:
        where = Endpoint(host, taken.getsockname()[1])
        with pytest.raises(InputError) as refused:
            bound(where)
    assert str(refused.value).startswith(
        f"cannot listen at {where}: [Errno 98] Address already in use; choose"
    )
    with bound(where) as listener:  # it was the port, and nothing else
        assert listener.getsockname()[:2] == (host, where.port)


@pytest.mark.parametrize("host", ["..", "a" * 64 + ".example"])
def test_a_name_that_is_none_is_told(host):
    with pytest.raises(InputError, match=f"cannot listen at {host}:0: .*another address"):
        bound(Endpoint(host, 0))


@pytest.mark.parametrize(
    ("text", "endpoint"),
    [
        ("8080", "127.0.0.1:8080"),
        ("127.0.0.1:8080", "127.0.0.1:8080"),
        ("localhost:8080", "localhost:8080"),
        ("[::1]:8080", "[::1]:8080"),
    ],
)
def test_a_port_of_the_loopback_is_read(text, endpoint):
    assert str(on_loopback(text)) == endpoint


@pytest.mark.parametrize(
    "text",
    ["", "0", "65536", "-1", "8080x", "9" * 5000, "0.0.0.0:80", "[::]:80", "::1:80", "box:80", "[::1]"],
)
def test_what_is_no_port_of_the_loopback_is_refused(text):
    with pytest.raises(InputError, match="is no port of the loopback, such as 8080 or"):
        on_loopback(text)
