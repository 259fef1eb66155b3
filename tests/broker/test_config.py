"""The configuration and the access rules that the folder ships, on a real Mosquitto with real certificates."""

import datetime
import ipaddress
import re
import signal
import subprocess
import time
from pathlib import Path

import edge_broker
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from edge_broker import topics
from edge_broker.errors import BrokerUnreachable, Refused
from edge_broker.local import find_mosquitto, free_port
from edge_broker.session import PresenceSpec, Session

FOLDER = Path(edge_broker.__file__).parents[1]
DEBIAN = Path("/etc/mosquitto/mosquitto.conf")
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


def shipped(folder: Path, port: int) -> str:
    """The shipped configuration, with only the paths and the port changed."""
    config = (FOLDER / "mosquitto.conf").read_text().replace("/etc/mosquitto/edge", str(folder))
    return config.replace("listener 8883", f"listener {port} 127.0.0.1") + "user root\n"


def write_alone(folder: Path, config: str) -> Path:
    """The shipped configuration is the broker's only one."""
    file = folder / "edge.conf"
    file.write_text(config.replace("log_dest syslog", "log_dest stderr"))
    return file


def write_included(folder: Path, config: str) -> Path:
    """The shipped configuration lies in conf.d of Debian's main configuration, whose paths alone are changed."""
    if not DEBIAN.exists() or "include_dir /etc/mosquitto/conf.d" not in DEBIAN.read_text():
        pytest.skip(f"{DEBIAN} is not Debian's")
    (folder / "conf.d").mkdir()
    (folder / "conf.d" / "edge.conf").write_text(config)
    file = folder / "mosquitto.conf"
    file.write_text(re.sub(r"/(etc|run|var/lib|var/log)/mosquitto", str(folder), DEBIAN.read_text()))
    return file


@pytest.fixture(scope="module", params=[write_alone, write_included])
def fleet_broker(request, tmp_path_factory):
    """A broker with the shipped files; returns the folder, the address and the process."""
    if not find_mosquitto():
        pytest.skip("Mosquitto is not installed")
    folder = tmp_path_factory.mktemp("fleet")
    authority = certify(folder, "ca")
    for name in ("broker", "node-1", "device-1", "device-2"):
        certify(folder, name, authority)
    port = free_port()
    (folder / "mosquitto.acl").write_text((FOLDER / "mosquitto.acl").read_text())
    file = request.param(folder, shipped(folder, port))
    with (folder / "output").open("wb") as output:
        process = subprocess.Popen([find_mosquitto(), "-c", file], stderr=output, cwd=folder)
    yield folder, f"mqtts://127.0.0.1:{port}", process
    process.kill()
    process.wait()


def session_of(fleet_broker, name: str, **options) -> Session:
    folder, url, process = fleet_broker
    session = Session(
        f"{url}?ca={folder}/ca.crt&cert={folder}/{name}.crt&key={folder}/{name}.key", name, **options
    )
    while True:
        try:
            session.connect(60)
            return session
        except BrokerUnreachable:  # until it listens
            assert process.poll() is None, (folder / "output").read_text()


def test_a_setting_that_the_main_configuration_has_too_stops_the_broker(
    tmp_path,
):  # the twin of write_included
    if not find_mosquitto():
        pytest.skip("Mosquitto is not installed")
    file = write_included(tmp_path, shipped(tmp_path, 8883) + "persistence_location /var/lib/mosquitto/\n")
    finished = subprocess.run([find_mosquitto(), "-c", file], capture_output=True, text=True)
    assert finished.returncode != 0 and "Duplicate persistence_location" in finished.stdout + finished.stderr


def test_what_is_retained_is_saved_beside_the_main_configuration_s_state(fleet_broker):
    folder, _, process = fleet_broker
    with session_of(fleet_broker, "node-1") as node:
        node.publish(topics.round("saved"), b"x", retain=True)
    process.send_signal(signal.SIGUSR1)  # save now instead of within a minute
    while not (folder / "mosquitto.db").exists():
        assert process.poll() is None, (folder / "output").read_text()
        time.sleep(0.01)


def test_a_device_and_a_node_can_do_their_part(fleet_broker, await_message):
    with (
        session_of(fleet_broker, "device-1", presence=PresenceSpec("f", "device-1")) as device,
        session_of(
            fleet_broker, "node-1", session_expiry_s=0, presence=PresenceSpec("f", "", at_once=False)
        ) as node,
    ):
        node.subscribe(topics.node("f"))
        node.show_online()
        assert b"online" in await_message(node, "/node").payload
        node.subscribe(
            topics.all_offers("f"),
            topics.up("f", "node-1", topics.ANY, topics.ANY),
            topics.want("f", topics.ANY),
            topics.presence("f", topics.ANY),
        )
        assert b"online" in await_message(node, "/presence").payload
        device.subscribe(
            topics.inbox("f", "device-1", topics.ANY),
            topics.artifact("f", "0" * 64, topics.ANY),
            topics.round("f"),
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
            topics.node("f"),
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
        Session(f"{fleet_broker[1]}?ca={tmp_path}/other.crt", "d").connect(60)


def test_without_a_certificate_nobody_gets_in(fleet_broker):
    alert = r"(?s)TLS with mqtts://127\.0\.0\.1:\d+ failed: .*certificate required.*add cert= and key="
    with pytest.raises(Refused, match=alert):
        Session(f"{fleet_broker[1]}?ca={fleet_broker[0]}/ca.crt", "d").connect(60)
