"""The configuration and the access rules that the folder ships, on a real Mosquitto with real certificates."""

import datetime
import ipaddress
import subprocess
import time
from pathlib import Path

import edge_broker
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from edge_broker import topics
from edge_broker.errors import BrokerUnreachable, LinkError, Refused
from edge_broker.local import _free_port, find_mosquitto
from edge_broker.session import PresenceSpec, Session

FOLDER = Path(edge_broker.__file__).parents[1]
NOW = datetime.datetime.now(datetime.timezone.utc)


def certify(folder: Path, name: str, authority: tuple | None = None) -> tuple:
    """Write name.crt and name.key, signed by the authority or, without one, as an authority."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    issuer, issuer_key = authority or (subject, key)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW - datetime.timedelta(days=1))
        .not_valid_after(NOW + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=authority is None, path_length=None), critical=True)
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False
        )
        .sign(issuer_key, hashes.SHA256())
    )
    (folder / f"{name}.crt").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (folder / f"{name}.key").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    return subject, key


@pytest.fixture(scope="module")
def fleet_broker(tmp_path_factory):
    """The shipped files with only the paths, the port and the log changed; returns the folder and the address."""
    if not find_mosquitto():
        pytest.skip("Mosquitto is not installed")
    folder = tmp_path_factory.mktemp("fleet")
    authority = certify(folder, "ca")
    for name in ("broker", "node-1", "device-1", "device-2"):
        certify(folder, name, authority)
    port = _free_port("127.0.0.1", 0)
    config = (FOLDER / "mosquitto.conf").read_text()
    config = config.replace("/etc/mosquitto/edge", str(folder)).replace("/var/lib/mosquitto", str(folder))
    config = config.replace("listener 8883", f"listener {port} 127.0.0.1").replace(
        "log_dest syslog", "log_dest stderr"
    )
    (folder / "conf").write_text(config + "user root\n")
    (folder / "mosquitto.acl").write_text((FOLDER / "mosquitto.acl").read_text())
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([find_mosquitto(), "-c", folder / "conf"], stderr=log)
    yield folder, f"mqtts://127.0.0.1:{port}"
    process.kill()
    process.wait(5)


def session_of(fleet_broker, name: str, **options) -> Session:
    folder, url = fleet_broker
    session = Session(
        f"{url}?ca={folder}/ca.crt&cert={folder}/{name}.crt&key={folder}/{name}.key", name, **options
    )
    deadline = time.monotonic() + 5
    while True:
        try:
            session.connect(5)
            return session
        except BrokerUnreachable:
            assert time.monotonic() < deadline, (folder / "log").read_text()


def test_a_device_and_a_node_can_do_their_part(fleet_broker, await_message):
    with (
        session_of(fleet_broker, "device-1", presence=PresenceSpec("f", "device-1")) as device,
        session_of(fleet_broker, "node-1", clean_start=True, session_expiry_s=0) as node,
    ):
        node.subscribe(
            topics.all_offers("f"),
            topics.all_up("f", "node-1"),
            topics.all_wants("f"),
            topics.all_presence("f"),
        )
        assert b"online" in await_message(node, "/presence").payload
        device.subscribe(
            topics.all_inbox("f", "device-1"), topics.all_chunks("f", "0" * 64), topics.round("f")
        )
        for topic in (
            topics.offer("f", "device-1"),
            topics.up("f", "node-1", "device-1", "t"),
            topics.want("f", "device-1"),
        ):
            device.publish(topic, b"x")
            assert await_message(node).topic == topic
        for topic in (
            topics.round("f"),
            topics.inbox("f", "device-1", "t"),
            topics.artifact("f", "0" * 64, 0),
        ):
            node.publish(topic, b"x")
            assert await_message(device).topic == topic
        assert device.chunk_bytes == 65536


def test_a_device_cannot_speak_or_listen_for_another(fleet_broker):
    with session_of(fleet_broker, "device-2") as device:
        for topic in (
            topics.offer("f", "device-1"),
            topics.up("f", "node-1", "device-1", "t"),
            topics.inbox("f", "device-2", "t"),
            topics.round("f"),
            topics.presence("f", "device-1"),
        ):
            with pytest.raises(Refused, match="Not authorized"):
                device.publish(topic, b"x")
        device.publish(topics.offer("f", "device-2"), b"x")  # the twin: for itself it can


def test_a_broker_of_another_authority_is_not_trusted(fleet_broker, tmp_path):
    certify(tmp_path, "other")
    with pytest.raises(
        Refused, match=r"TLS with mqtts://127\.0\.0\.1:\d+ failed: .*certificate verify failed"
    ):
        Session(fleet_broker[1], "d", ca=tmp_path / "other.crt").connect(5)


def test_without_a_certificate_nobody_gets_in(fleet_broker):
    with pytest.raises(LinkError, match=r"127\.0\.0\.1"):
        Session(fleet_broker[1], "d", ca=fleet_broker[0] / "ca.crt").connect(5)
