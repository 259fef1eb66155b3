"""A broker's address: read from a URL, and printed without its password, however malformed the URL is."""

import pytest
from edge_broker import address
from edge_broker.errors import BrokerError
from rich.pretty import pretty_repr

SECRET = "hunter2"
MALFORMED = [  # each with the password where a typing error puts it
    "mqtt://user:{}@host:notaport",
    "mqtt://user:{}@host:99999",
    "mqtt://user:{}@host:0",
    "mqtt://user:{}@",
    "http://user:{}@host",
    "user:{}@host:1883",
    "user:a://{}@host",
    "mqtt://user:{}",
    "mqtt://user:{}/x@host:1883",
    "mqtt://user:x/{}@host:1883",
    "mqtt://user:x?{}@host:1883",
    "mqtt://user:1?{}=x@host:1883",
    "mqtt://user:1#{}@host:1883",
    "mqtt://user:x@{}@host:port",
    "mqtt://user:[{}@host",
    "mqtt://user:\u2100{}@host",  # which urlsplit quotes in its error
    "mqtt://user:{}@host:1883?password={}",
    "mqtt://user:{}@host?ca=x",
    "mqtt://user:{}%zz@host/path",
]


@pytest.mark.parametrize("form", MALFORMED)
def test_no_error_of_a_malformed_url_holds_the_password(form: str) -> None:
    url = form.replace("{}", SECRET)
    with pytest.raises(BrokerError) as error:
        address.parse(url)
    assert SECRET not in str(error.value)
    assert error.value.__cause__ is None and SECRET not in repr(error.value)
    assert SECRET not in address.redacted(url)


def test_the_password_is_decoded_for_the_broker_and_hidden_from_people() -> None:
    broker = address.parse("mqtts://a%40b:p%2F%23s%3A@h:1?ca=/x.pem")
    assert (broker.user, broker.password) == ("a@b", "p/#s:")
    assert str(broker) == "mqtts://a%40b:***@h:1"
    for shown in (repr(broker), f"{broker}", pretty_repr(broker), str([broker])):
        assert "p/#s:" not in shown and "p%2F" not in shown


def test_a_url_without_credentials_keeps_all_else() -> None:
    url = "mqtts://u:p@[::1]:1?ca=%2Fa+b.pem&cert=c&key=k"
    broker = address.parse(url)
    assert broker.without_credentials() == "mqtts://[::1]:1?ca=%2Fa+b.pem&cert=c&key=k"
    assert address.parse(broker.without_credentials()) == address.parse(url.replace("u:p@", ""))


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("mqtt://user:secret@host:notaport", "mqtt://user:***@host:***"),
        ("mqtt://host:1883/x", "mqtt://host:1883"),
        ("localhost:1883", "localhost:1883"),
        ("mqtt://[::1]:1883?x=y", "mqtt://[::1]:1883"),
        ("", ""),
    ],
)
def test_what_is_left_of_a_url_says_where_it_leads(url: str, shown: str) -> None:
    assert address.redacted(url) == shown
