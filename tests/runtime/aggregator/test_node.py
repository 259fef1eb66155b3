"""What a node that starts again makes of what it finds."""

import pytest
from edge_broker import address, messages

from edge_runtime import settings
from edge_runtime.aggregator.check import refusal
from edge_runtime.aggregator.node import Node, NodeOptions
from edge_runtime.aggregator.opening import KEPT_ROUNDS, check_broker, end_earlier_rounds
from edge_runtime.aggregator.store import NodeStore, Version
from edge_runtime.errors import InputError
from edge_runtime.protocol.round import CODEC

FLEET = {
    "fleet": {"name": "f", "open": True, "rounds": 3},
    "catalog": [{"source": "m"}],
    "method": {"name": "fedit"},
    "adapter": {"rank": 4},
    "head": {},
}


@pytest.fixture
def node(tmp_path):
    started = []

    def start(**tables):
        fleet = settings.parse({**FLEET, **tables})
        started.append(
            Node(
                fleet,
                NodeOptions(address.parse("mqtt://127.0.0.1:1"), tmp_path, "node", True),
                lambda _: None,
            )
        )
        return started[-1]

    yield start
    for one in started:
        one._store.connection.close()


def described(origin, folder):
    (folder / "delta").write_bytes(b"delta")
    return messages.describe(folder / "delta", origin, 8)


def update(node, device, round_=1, commit=True):
    origin = messages.Origin(fleet="f", device=device, round=round_, model_class="m", codec="c", samples=1)
    manifest = described(origin, node.options.state)
    node._journal.open(manifest)
    node._journal.write(manifest, 0, b"delta")
    if commit:
        node._journal.commit(manifest.transfer)
    return manifest.transfer


@pytest.mark.parametrize(
    ("tables", "named"),
    [
        ({"method": {"name": "fedadapter"}}, "[method]"),
        ({"adapter": {"rank": 8}}, "[adapter]"),
        ({"head": {"shared": "private"}}, "[head]"),
        ({"fleet": {"name": "f", "open": True, "seed": 1}}, "[fleet] seed"),
    ],
)
def test_a_fleet_file_that_no_longer_fits_what_is_there_is_refused(node, tables, named):
    node()
    first = node(**tables)  # nothing has come yet
    update(first, "a")
    node(**tables)
    node(**{**tables, "training": {"steps": 7}})
    method = {**FLEET["method"], **tables.get("method", {}), "server_step": 0.5, "momentum": 0.5}
    head = {**FLEET["head"], **tables.get("head", {}), "start": "zero"}
    node(**{**tables, "method": method, "head": head})
    with pytest.raises(InputError) as error:
        node()
    assert f"was made with another {named}:" in str(error.value)


def test_public_texts_that_are_others_than_those_that_were_asked_are_refused(node, tmp_path):
    file = tmp_path / "public.jsonl"
    tables = {"public": {"file": str(file), "texts": 2}, "codistill": {"tokens": 2}}
    file.write_text('{"text": "a"}\n{"text": "b"}\n')
    update(node(**tables), "a")
    node(**tables)
    file.write_text('{"text": "b"}\n{"text": "a"}\n')
    with pytest.raises(InputError, match=r"was made with another \[public\] texts"):
        node(**tables)
    assert (tmp_path / "texts.jsonl").read_text().startswith('{"text": "a"}')


@pytest.mark.parametrize(
    ("open_", "broker", "served"),
    [
        (True, "mqtt://127.0.0.1:1", True),
        (False, "mqtt://127.0.0.1:1", False),
        (False, "mqtts://broker:1", False),
        (False, "mqtts://broker:1?ca=ca.crt&cert=node.crt&key=node.key", True),
    ],
)
def test_a_closed_fleet_is_served_only_where_devices_show_certificates(open_, broker, served):
    fleet = settings.parse({**FLEET, "fleet": {"name": "f", "open": open_}})
    if served:
        check_broker(fleet, address.parse(broker))
        return
    with pytest.raises(InputError, match=r"set up TLS as broker/README.md says, or .*`open = true`"):
        check_broker(fleet, address.parse(broker))


def test_a_frame_that_devices_have_maps_into_does_not_turn(node, tmp_path):
    file = tmp_path / "public.jsonl"
    file.write_text('{"text": "a"}\n{"text": "b"}\n')
    tables = {"public": {"file": str(file)}, "head": {"shared": "fleet"}}
    update(node(**tables), "a")
    node(**tables)
    with pytest.raises(InputError, match=r"was made with another \[public\] frame: `\"common\"`"):
        node(**{**tables, "public": {"file": str(file), "frame": "rotated"}})


@pytest.mark.parametrize(
    ("samples", "taken"), [(0, False), (1, True), (6, True), (7, False), (1 << 53, False)]
)
def test_an_update_weighs_no_more_than_the_rows_of_a_round(samples, taken, tmp_path):
    fleet = settings.parse({**FLEET, "training": {"steps": 3, "rows_a_step": 2}})
    origin = messages.Origin(fleet="f", device="a", round=1, model_class="m", codec=CODEC, samples=samples)
    reason = refusal(described(origin, tmp_path), fleet, 1)
    assert (reason is None) is taken
    if not taken:
        assert reason == f"the manifest has {samples} samples, which weigh its mean, but a round has 1 to 6"


def test_what_a_kill_left_of_a_merged_round_is_refused_and_deleted(node):
    first = node()
    merged, late = update(first, "a"), update(first, "b", commit=False)
    first._store.merged(1, [])  # and was killed
    again = node()
    end_earlier_rounds(2, again._store, again._journal, again._receiver)
    entry = again._journal.find(late)
    assert (entry.state, entry.code) == ("rejected", "late")
    assert not again._journal.payload(merged).exists() and not again._journal.payload(late).exists()
    assert again._journal.find(merged).state == "committed"


def test_versions_are_found_where_the_state_has_moved_to(tmp_path):
    before, after = tmp_path / "before", tmp_path / "after"
    NodeStore(before / "node.db").merged(
        1, [Version("m", before / "versions" / "master", (before / "versions" / "sent",))]
    )
    before.rename(after)
    found = NodeStore(after / "node.db").versions()["m"]
    assert (found.master, found.artifact) == (after / "versions" / "master", after / "versions" / "sent")


def test_of_older_rounds_only_a_class_s_latest_version_stays(node, tmp_path):
    one, folder = node(), tmp_path / "versions"
    folder.mkdir()
    for round_ in range(1, KEPT_ROUNDS + 3):
        classes = ["rests", "m"] if round_ < 3 else ["m"]
        versions = [
            Version(of, folder / f"{round_}-{of}", (folder / f"{round_}-{of}.edc",)) for of in classes
        ]
        for version in versions:
            version.master.touch()
            version.artifact.touch()
            version.momenta.touch()
        one._store.merged(round_, versions)
        end_earlier_rounds(round_ + 1, one._store, one._journal, one._receiver)
    kept = {f"{round_}-m" for round_ in range(3, KEPT_ROUNDS + 3)} | {"2-rests"}
    assert {path.name for path in folder.iterdir()} == kept | {
        f"{name}.{suffix}" for name in kept for suffix in ("edc", "momenta")
    }
    assert {of: version.master.name for of, version in one._store.versions().items()} == {
        "rests": "2-rests",
        "m": f"{KEPT_ROUNDS + 2}-m",
    }
