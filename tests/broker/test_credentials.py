"""User and password from a file or from the environment."""

import os
from pathlib import Path

import pytest
from edge_broker import address, credentials
from edge_broker.errors import BrokerError

SECRET = "hunter2"
CONTENT = f'user = "me"\npassword = "{SECRET}"\n'
PLAIN = address.parse("mqtt://h")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "credentials.toml"
    path.touch(mode=0o600)
    path.write_text(CONTENT)
    return path


def pair(broker: address.Address) -> tuple[str | None, str | None]:
    return broker.user, broker.password


def test_a_file_wins_over_the_environment(file: Path) -> None:
    environment = {credentials.USER: "you", credentials.PASSWORD: "x"}
    assert pair(credentials.complete(PLAIN, file, environment)) == ("me", SECRET)
    assert pair(credentials.complete(PLAIN, None, environment)) == ("you", "x")
    assert pair(credentials.complete(PLAIN, None, {})) == (None, None)


def test_a_file_that_windows_has_marked_as_utf_8_is_read_and_utf_16_is_refused_by_its_name(
    file: Path,
) -> None:
    file.write_bytes(CONTENT.replace("\n", "\r\n").encode("utf-8-sig"))
    assert pair(credentials.complete(PLAIN, file, {})) == ("me", SECRET)
    file.write_bytes(CONTENT.encode("utf-16"))
    with pytest.raises(BrokerError, match=r"is UTF-16 text .*save it as UTF-8") as error:
        credentials.complete(PLAIN, file, {})
    assert SECRET not in str(error.value)


def test_a_url_wins_over_the_environment_and_may_leave_the_password_to_it() -> None:
    environment = {credentials.USER: "you", credentials.PASSWORD: "x"}
    assert pair(credentials.complete(address.parse("mqtt://a:b@h"), None, environment)) == ("a", "b")
    assert pair(credentials.complete(address.parse("mqtt://a@h"), None, environment)) == ("a", "x")


def test_two_users_and_a_password_of_nobody_are_refused(file: Path) -> None:
    with pytest.raises(BrokerError, match="has a user already"):
        credentials.complete(address.parse("mqtt://a@h"), file, {})
    with pytest.raises(BrokerError, match="EDGE_RUNTIME_BROKER_USER") as error:
        credentials.complete(PLAIN, None, {credentials.PASSWORD: SECRET})
    assert SECRET not in str(error.value)


@pytest.mark.skipif(os.name != "posix", reason="files have no modes here")
@pytest.mark.parametrize("mode", [0o644, 0o640, 0o602, 0o610])
def test_a_file_that_others_can_open_is_refused_with_the_command_that_helps(file: Path, mode: int) -> None:
    file.chmod(mode)
    with pytest.raises(BrokerError, match=f"mode {mode:o}.*chmod 600 {file}"):
        credentials.read(file)
    file.chmod(0o400)  # the twin: read-only for its owner
    assert credentials.read(file).user == "me"


@pytest.mark.parametrize(
    "content",
    [
        f"{SECRET}\n{SECRET}\n",
        f'user = "me"\npassword = {SECRET}\n',
        f'user = "me"\npassword = ["{SECRET}"]\n',
        f'user = "me"\n{SECRET} = "x"\n',
        f'user = "me"\npassword = "{SECRET}"\n{SECRET} = 1\n',
        f'user = "me"\npassword = "{SECRET}\\xff"\n',
    ],
)
def test_a_file_of_another_form_is_refused_and_not_quoted(file: Path, content: str) -> None:
    file.write_bytes(content.encode("latin-1").replace(b"\\xff", b"\xff"))
    with pytest.raises(BrokerError, match="two lines") as error:
        credentials.read(file)
    assert SECRET not in str(error.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(BrokerError, match=r"nowhere: No such file.* or set EDGE_RUNTIME_BROKER_USER"):
        credentials.read(tmp_path / "nowhere")


def test_child_processes_get_the_credentials_only_if_they_connect() -> None:
    environment = {"PATH": "p", credentials.USER: "old", credentials.PASSWORD: SECRET}
    assert credentials.withhold(environment) == {"PATH": "p"}
    assert credentials.hand_over(PLAIN, environment) == {"PATH": "p"}
    passed_on = credentials.hand_over(address.parse("mqtt://a:b@h"), environment)
    assert passed_on == {"PATH": "p", credentials.USER: "a", credentials.PASSWORD: "b"}
    assert SECRET not in repr(credentials.Credentials("a", SECRET))
