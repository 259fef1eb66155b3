"""Pages for users: every command runs as it stands there, in the pages' order, and prints what the page shows."""

import getpass
import os
import re
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from edge_broker.local import find_mosquitto, free_port
from reader import PageError, Reader, agrees, steps

from edge_runtime.demo import model

ROOT = Path(__file__).parents[2]
WAY = tuple(  # a newcomer's way, one page after another, with what earlier pages have left
    ROOT / name
    for name in (
        "README.md",
        "docs/install.md",
        "docs/first-fleet.md",
        "docs/use.md",
        "docs/fleet.md",
        "docs/operate.md",
        "docs/serve.md",
        "docs/exit-codes.md",
        "docs/methods.md",
    )
)
OTHERS = tuple(  # pages that stand alone
    page
    for page in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/**/*.md")])
    if page not in WAY and page.name != "CHANGELOG.md"
)
NOT_RUN = {  # why a block is left out, and how many such blocks there are at most
    "downloads": 6,  # packages or a repository: gigabytes
    "needs root": 3,  # changes the system
    "needs a GPU": 1,
    "needs a file of yours": 1,  # which stands for yours
    "runs this test": 1,  # make test
}
DIFFERENCES = {  # what is other here than with a reader: on a page | here; names in {} are of this test
    # The node, the device and the broker are one machine.
    r"scp NODE:edge-runtime/": "cp ../node/",
    r"(NODE|localhost):1883": "127.0.0.1:{port}",
    # Another server may have the port.
    r"\b8080\b": "{http}",
    # The broker is this user's, with its files in the machine's folder.
    r"listener 1883": "listener {port}\nuser {user}",
    r"(?m)^sudo (?=mosquitto_passwd|chown|systemctl restart)": "",
    r"/etc/mosquitto/": "mosquitto/",
    r"mosquitto_passwd -c (\S+) edge +#.*": r"mosquitto_passwd -c -b \1 edge 'THE PASSWORD'",
    r"chown mosquitto ": "chown {user} ",
    r"systemctl restart mosquitto": "{broker} > broker.log 2>&1 &\nuntil (> /dev/tcp/127.0.0.1/{port}) 2> /dev/null; do :; done",
    # What a page puts into /tmp goes into the test's folder.
    r"/tmp/": "{folder}/",
    # No hub: the same model lies beside the commands, as the file that the demo brings.
    r"\bSmolLM2-135M-Instruct(?=[,\s\"])": "SmolLM2-135M-Instruct.gguf",
}
QUICK = {  # and in the short form: a step where the pages' fleet makes ten
    r"steps = 10": "steps = 1",
    r"train 1/10": "train 1/1",
}
EMBEDDED = {  # where Mosquitto is not installed
    r"(?m)^sudo mosquitto_passwd -c (\S+) edge .*": r"touch \1",
}
MOSQUITTO = "mosquitto -c mosquitto/conf.d/edge.conf"
NO_MOSQUITTO = "edge-runtime broker --kind embedded --port {port}"
FORMS = ("short", "long")  # the long one has the blocks marked so, and as many steps as the pages say


def clone(folder: Path) -> Path:
    """What pages take to be in a clone after `make setup`: the Makefile, the examples, .venv, and the model."""
    folder.mkdir()
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "examples", folder / "examples")
    (folder / ".venv").mkdir()
    (folder / ".venv" / "bin").symlink_to(Path(sys.executable).parent)
    for done in (".ready", ".checks", ".study"):  # make has nothing to install
        (folder / ".venv" / done).touch()
    (folder / "mosquitto" / "conf.d").mkdir(parents=True)  # as Debian's package brings it
    (folder / "HuggingFaceTB").mkdir()
    (folder / "HuggingFaceTB" / "SmolLM2-135M-Instruct.gguf").symlink_to(model.path())
    return folder


@pytest.fixture
def environment(cache: Path) -> dict[str, str]:
    """A wide terminal with the environment active, one core, and a cache of its own."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"], "/usr/sbin"])
    return {
        **os.environ,
        "PATH": path,
        "EDGE_RUNTIME_CACHE": str(cache),
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "200",
    }


def differences(form: str, folder: Path) -> dict[str, str]:
    """The tables above as they are for one test."""
    table = DIFFERENCES if find_mosquitto() else EMBEDDED | DIFFERENCES
    table |= QUICK if form == "short" else {}
    fields = {"port": free_port(), "http": free_port(), "user": getpass.getuser(), "folder": folder}
    fields["broker"] = MOSQUITTO if find_mosquitto() else NO_MOSQUITTO.format(**fields)
    return {
        pattern: re.sub(r"\{(\w+)\}", lambda field: str(fields[field[1]]), here)
        for pattern, here in table.items()
    }


@pytest.fixture
def reader(request: pytest.FixtureRequest, environment: dict[str, str], tmp_path: Path) -> Iterator[Reader]:
    """A newcomer with a clone on each machine."""
    form = request.param
    newcomer = Reader(
        lambda name: clone(tmp_path / name), environment, differences(form, tmp_path), long=form == "long"
    )
    yield newcomer
    newcomer.close()


@pytest.mark.parametrize("reader", FORMS, indirect=True)
def test_a_newcomer_gets_through_the_pages(reader: Reader) -> None:
    for page in WAY:
        reader.read(page)
    reader.close()
    assert reader.said == {"node": 130, "device": 130}  # as the page of exit codes has it for Ctrl-C


def forms(page: Path) -> set[str]:
    """In which forms a page has something to run."""
    return {
        "long" if step.kind == "long form" else "short"
        for step in steps(page)
        if step.kind in ("run", "start", "long form")
    }


@pytest.mark.parametrize(
    ("reader", "page"),
    [
        pytest.param(form, page, id=f"{form}-{page.relative_to(ROOT)}")
        for page in OTHERS
        for form in FORMS
        if form in forms(page)
    ],
    indirect=["reader"],
)
def test_a_page_runs_alone(reader: Reader, page: Path) -> None:
    reader.read(page)


def left_out(pages: tuple[Path, ...]) -> Counter[str]:
    """How many blocks are not run, by the reason that their page gives."""
    return Counter(step.name for page in pages for step in steps(page) if step.kind == "not run")


def test_what_is_not_run_has_a_reason_and_stays_little() -> None:
    assert left_out(WAY + OTHERS) == NOT_RUN


def test_every_difference_between_reader_and_test_is_one() -> None:
    pages = "".join(page.read_text(encoding="utf-8") for page in WAY + OTHERS)
    for pattern in DIFFERENCES | QUICK | EMBEDDED:
        assert re.search(pattern, pages), pattern


def test_an_output_agrees_in_its_words_and_not_in_its_figures() -> None:
    shown = "│ peak │ 498 / 600 MiB │ 12 s │ (50%) │ 0.254 │ ███ │\nround 2 of 3\n"
    assert agrees(shown, "│ peak  │ 1.2 / 6 GiB │ 9.81 s │ (7%) │ 1.5 │ █ │\nround 2 of 3\n")
    for word, other in (
        ("peak", "size"),
        ("12 s", "12"),
        ("2 of 3", "3 of 3"),
        ("(50%)", "(many)"),
        ("3\n", "3\nmore\n"),
    ):
        assert not agrees(shown, shown.replace(word, other)), word
    assert agrees("round 1 ... closed", "round 1 is merged and closed") and not agrees("a ...", "b a c")
    assert agrees("edge-runtime 0.1.0", "edge-runtime 0.1.0") and not agrees(
        "edge-runtime 0.1.0", "edge-runtime 0.2.0"
    )


WRONG = {  # a page, and what is said about it: the twin of the tests above
    "```sh\nls nowhere\n```\n": "page.md:1: exit code 2",
    "```sh\nfalse | true\n```\n": "page.md:1: exit code 1",
    "```sh\necho unset $THING\n```\n": "page.md:1: exit code 1",
    "\n```sh\necho 3 rounds\n```\n\nprints\n\n```text\n2 rounds\n```\n": "page.md:2: echo 3 rounds\n\nthe page shows:\n2 rounds",
    "<!-- keeps running: node -->\n```sh\necho begin\n```\n```text\nround 1\n```\n": "page.md:2: echo begin\n\nthe page shows:",
    "<!-- keeps running: node -->\n```sh\ntrue\n```\n": "page.md:2: a command that keeps running shows what to wait for",
    "<!-- stop: node -->\n": "page.md:1: no terminal node is open",
    "<!-- not run -->\n```sh\nmake study\n```\n": "page.md:1: `not run` lacks its word after a colon",
    "<!-- skipped: hours -->\n```sh\nmake study\n```\n": "page.md:1: nobody knows what to do with <!-- skipped: hours -->",
    "<!-- not run: hours -->\n\nNothing.\n": "page.md:1: a mark without a block",
    "Run\n\n    make study\n": "page.md:3: an indented block",
    "```\nmake study\n```\n": "page.md:1: a block says its language",
    "```bash\nmake study\n```\n": "page.md:1: nobody knows what to do with a block of bash",
    "```sh\nmake study\n": "page.md:1: a block without an end",
    "```text\nround 1\n```\n": "page.md:1: output stands below the commands that print it",
}


@pytest.mark.parametrize(("text", "reason"), WRONG.items(), ids=[reason[:60] for reason in WRONG.values()])
def test_a_page_that_is_wrong_is_noticed(text: str, reason: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(text, encoding="utf-8")
    newcomer = Reader(lambda _: tmp_path, dict(os.environ), {})
    with pytest.raises(PageError) as raised:
        newcomer.read(page)
    newcomer.close()
    assert str(raised.value).startswith(f"{tmp_path.name}/{reason}")


def test_one_more_block_that_is_not_run_is_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    for reason in ("needs root", "it is late"):
        page.write_text(f"<!-- not run: {reason} -->\n```sh\ntrue\n```\n", encoding="utf-8")
        assert left_out((*WAY, *OTHERS, page)) != NOT_RUN


def test_a_page_that_is_right_runs(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        """<!-- on: node -->
```toml title="fleet.toml"
rounds = 3
```

<!-- keeps running: node -->
```sh
tail -f fleet.toml
```

```text
rounds = 3
```

```sh
cat ./fleet.toml
pwd
```

```text
rounds = 3
.../node
```

<!-- stop: node -->
<!-- long form -->
```sh
false
```
""",
        encoding="utf-8",
    )

    def machine(name: str) -> Path:
        (tmp_path / name).mkdir()
        return tmp_path / name

    newcomer = Reader(machine, dict(os.environ), {})
    newcomer.read(page)
    assert newcomer.said == {"node": -signal.SIGINT}
    patient = Reader(lambda name: tmp_path / name, dict(os.environ), {}, long=True)
    with pytest.raises(PageError, match=r"page\.md:27: exit code 1"):
        patient.read(page)
    patient.close()
