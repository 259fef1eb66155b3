"""How the demo starts its processes."""

from pathlib import Path

from edge_broker import address

from edge_runtime.demo import run
from edge_runtime.demo.budgets import DEVICES
from edge_runtime.demo.commands import DOMAINS


def test_no_process_of_the_demo_has_the_brokers_password_among_its_arguments(tmp_path: Path) -> None:
    broker = address.parse("mqtts://me:hunter2@h:1?ca=/x.pem")
    by_name = run.arguments(tmp_path, broker, dict.fromkeys(DEVICES, 1 << 30))
    assert by_name.keys() == {"node", *DEVICES}
    for arguments in by_name.values():
        assert "mqtts://h:1?ca=%2Fx.pem" in arguments
        assert not any("hunter2" in argument or "me:" in argument for argument in arguments)


def test_every_device_of_the_demo_has_a_domain() -> None:
    assert set(DEVICES) == set(DOMAINS)
