"""A study on virtual devices: who holds what, runs that go on where they were, and what the table says."""

import json
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import msgspec
import numpy as np
import psutil
import pytest
import results as reported
from click.testing import CliRunner
from filelock import FileLock

from edge_runtime import cli, methods, settings
from edge_runtime.errors import EdgeError, InputError
from edge_runtime.planning import processes
from edge_runtime.protocol import codec
from edge_runtime.protocol.report import Score
from edge_runtime.simulation import cut, draw, grid, results, spec, versions
from edge_runtime.simulation import run as simulated
from edge_runtime.trainer import data
from edge_runtime.trainer.job import Job

STUDY = """
[study]
about = "a test"
seeds = [0, 1]
weights = "float32"

[data.colours]
train = "train.jsonl"
test = "test.jsonl"
per_label = 4
test_rows = 9

[public]
file = "public.jsonl"
texts = 6

[[device]]
id = "a"
source = "tiny"
data = "colours"
domains = ["warm"]

[[device]]
id = "b"
source = "tiny"
depth = 3
data = "colours"

[[device]]
id = "c"
source = "tiny"
first = 2
data = "colours"
domains = ["cold"]

[[device]]
id = "d"
source = "tiny"
data = "colours"
domains = ["warm"]

[fleet]
rounds = 2

[adapter]
rank = 2

[training]
steps = 3
rows_a_step = 4
learning_rate = 1e-2
max_tokens = 16

[head]

[[arm]]
name = "local"
method = {name = "local"}

[[arm]]
name = "all in one"
pooled = true
method = {name = "local"}

[[arm]]
name = "fedit + codistill"
method = {name = "fedit"}
codistill = {rows = 2}
control = "local"
"""
STUDIES = Path(__file__).parents[3] / "studies"
DOMAINS = {"red": "warm", "orange": "warm", "blue": "cold", "green": "cold"}


@pytest.fixture
def files(tmp_path):
    for name, count in (("train", 12), ("test", 3), ("public", 4)):
        rows = [
            {"text": f"{label} {n} {name}", "label": label, "domain": of}
            for n in range(count)
            for label, of in DOMAINS.items()
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "study.toml").write_text(STUDY)
    return tmp_path


@pytest.fixture
def study(files):
    return spec.load(files / "study.toml")


def test_no_row_is_on_two_devices_and_domains_confine_them(study, files):
    held = draw.shares(study, files, 0)
    texts = {device: {row["text"] for row in rows} for device, rows in held.items()}
    assert not texts["a"] & texts["b"] and not texts["b"] & texts["c"]
    counts = {
        device: {label: sum(row["label"] == label for row in rows) for label in DOMAINS}
        for device, rows in held.items()
    }
    assert counts["a"] == {"red": 4, "orange": 4, "blue": 0, "green": 0}
    assert counts["b"] == dict.fromkeys(DOMAINS, 4)
    assert counts["c"] == {"red": 0, "orange": 0, "blue": 4, "green": 4}
    assert draw.shares(study, files, 0) == held != draw.shares(study, files, 1)


def test_held_out_rows_are_those_that_somebody_can_learn_and_a_sample_of_them_is_asked_in_the_rounds(
    study, files
):
    rows = draw.test_rows(study, "colours", files)
    assert rows == data.read_rows(
        files / "test.jsonl"
    )  # in the file's order, as one device holds all domains
    warm = msgspec.structs.replace(study, device=(study.device[0],))
    assert {row["label"] for row in draw.test_rows(warm, "colours", files)} == {"red", "orange"}
    with pytest.raises(InputError, match=r"\[public\] texts is 9, but public\.jsonl gives 8 rows"):
        draw.public_texts(msgspec.structs.replace(warm, public=spec.PublicTexts("public.jsonl", 9)), files)
    task = msgspec.structs.replace(study.data["colours"], test_rows=5)
    numbers = draw.sample(task, len(rows))
    assert len(numbers) == 5 and numbers == sorted(set(numbers)) and numbers == draw.sample(task, len(rows))
    assert draw.sample(task, 3) == [0, 1, 2]


def test_another_field_may_be_the_label_and_tasks_of_one_file_share_no_row(study, files):
    whole = study.data["colours"]
    tasks = {"colours": whole, "heat": msgspec.structs.replace(whole, label="domain", per_label=8)}
    devices = (study.device[1], spec.Device("e", "tiny", "heat"))
    both = msgspec.structs.replace(study, data=tasks, device=devices)
    held = draw.shares(both, files, 0)
    assert {row["label"] for row in held["e"]} == {"warm", "cold"} and len(held["e"]) == 16
    texts = [{row["text"] for row in rows} for rows in held.values()]
    assert not texts[0] & texts[1]
    alone = draw.shares(
        msgspec.structs.replace(both, data={"heat": tasks["heat"]}, device=devices[1:]), files, 0
    )
    assert texts[0] & {row["text"] for row in alone["e"]}  # they would share rows by chance
    assert {row["label"] for row in draw.test_rows(both, "heat", files)} == {"warm", "cold"}
    sounds = msgspec.structs.replace(
        both, data=tasks | {"heat": msgspec.structs.replace(whole, label="sound")}
    )
    with pytest.raises(InputError, match=r"row 1 of .*test\.jsonl has no text under `sound`"):
        draw.test_rows(sounds, "heat", files)


def test_public_texts_have_no_labels_and_are_the_same_for_every_arm(study, files):
    found = draw.public_texts(study, files)
    assert len(found) == 6 and all(row.keys() == {"text"} for row in found)
    assert found == draw.public_texts(study, files)
    labelled = draw.public_texts(study, files, labelled=True)  # of the oracle
    assert [row["text"] for row in labelled] == [row["text"] for row in found]
    assert all(row["text"].startswith(row["label"]) for row in labelled)


def test_a_run_is_done_again_when_what_it_depends_on_has_changed(study):
    arm = study.arm[2]
    same = msgspec.structs.replace(
        study, study=msgspec.structs.replace(study.study, about="other", seeds=(0, 5))
    )
    contents = dict.fromkeys({*study.files, *study.sources}, "1")
    judged = msgspec.structs.replace(arm, control="all in one", chosen_on=0)
    assert study.digest(arm, 0, contents) == same.digest(judged, 0, contents)
    fleet = msgspec.structs.replace(study, fleet={"rounds": 3})
    others = msgspec.structs.replace(study, public=spec.PublicTexts("public.jsonl", 5))
    digests = [study.digest(arm, 0, contents), study.digest(arm, 1, contents)]
    digests += [fleet.digest(arm, 0, contents), others.digest(arm, 0, contents)]
    assert contents.keys() == {"train.jsonl", "test.jsonl", "public.jsonl", "tiny"}
    digests += [study.digest(arm, 0, contents | {name: "2"}) for name in contents]
    assert len(set(digests)) == 8
    # a key that is not set is in no digest, so that runs from before there was the key stand
    for table in (study, study.study, study.data["colours"], study.device[0], study.public, arm):
        default = {
            field.name
            for field in msgspec.structs.fields(table)
            if field.default == getattr(table, field.name)
        }
        assert not default & msgspec.to_builtins(table).keys()
    local = study.arm[0]  # it has no public texts
    assert study.digest(local, 0, contents) == others.digest(local, 0, contents)
    assert study.digest(local, 0, contents) == study.digest(local, 0, contents | {"public.jsonl": "2"})


def test_other_predictions_of_a_head_are_another_computation_of_the_arms_that_have_them(study, monkeypatch):
    contents = dict.fromkeys({*study.files, *study.sources}, "1")
    before = [study.digest(arm, 0, contents) for arm in study.arm]
    monkeypatch.setattr(spec, "OF_PREDICTIONS", spec.OF_PREDICTIONS + 1)
    changed = [
        digest != study.digest(arm, 0, contents) for arm, digest in zip(study.arm, before, strict=True)
    ]
    assert changed == [arm.codistill is not None for arm in study.arm]
    assert any(changed) and not all(changed)


def test_a_study_runs_goes_on_and_writes_what_it_found(files, tiny_folder):
    models, out = tiny_folder.parent, files / "out"
    command = [
        "study",
        str(files / "study.toml"),
        "--data",
        str(files),
        "--models",
        str(models),
        "--out",
        str(out),
    ]
    first = CliRunner().invoke(cli.app, [*command, "--seeds", "0", "--workers", "1"])
    assert first.exit_code == 0, first.output
    assert [line.split(",")[0] for line in first.output.splitlines()[:3]] == [
        "local",
        "all in one",
        "fedit + codistill",
    ]
    study = spec.load(files / "study.toml")
    folders = grid.Folders(files, models, out)
    outcomes = grid.finished(study, study.study.seeds, folders)
    assert outcomes.keys() == {("local", 0), ("all in one", 0), ("fedit + codistill", 0)}
    assert not any((out / "work").iterdir())
    members = {one.id: one for one in outcomes["fedit + codistill", 0].members}
    assert [len(member.answers) for member in members.values()] == [2, 2, 2, 2]
    assert [results.unpacked(member.hits, member.held_out).size for member in members.values()] == [12] * 4
    assert sum(answer.rows for answer in members["a"].answers[0].values()) == 9  # of 12, in the rounds
    # they hold the same version when a round begins
    assert (members["a"].answers[1], members["a"].hits) == (members["d"].answers[1], members["d"].hits)
    assert results.unpacked(members["a"].seen, 12).tolist() == [True, True, False, False] * 3
    assert members["b"].answers[0].keys() == {"seen"}
    assert members["a"].answers[0].keys() == {
        "seen",
        "unseen",
    }  # what b holds, of the same model, is not its own
    assert members["c"].answers[0].keys() == {"seen", "unseen"}
    assert all(size > 0 for member in members.values() for size in member.bytes_up)
    assert all(member.bytes_down[0] == 0 < member.bytes_down[1] for member in members.values())
    assert outcomes["local", 0].members[0].bytes_up == [0, 0]
    pooled = {one.id: one for one in outcomes["all in one", 0].members}
    assert {(one.rows, one.steps) for one in pooled.values()} == {
        (40, 12)
    }  # all rows and steps of four devices
    table = (out / "README.md").read_text()
    assert "| fedit + codistill |" in table and f"3 by {outcomes['local', 0].code}" in table
    for picture in ("rounds", "bytes", "convergence"):
        assert "<svg" in (out / f"{picture}.svg").read_text()
    assert outcomes["fedit + codistill", 0].cosines == []  # no trained tensor crosses the classes
    assert outcomes["local", 0].moved == [] and len(outcomes["fedit + codistill", 0].moved) == 2
    assert all(norm > 0 for norm in outcomes["fedit + codistill", 0].moved)
    older = msgspec.structs.replace(
        outcomes["all in one", 0], digest=outcomes["all in one", 0].digest.replace("-", "-0", 1)
    )
    results.add(out, older)
    again = CliRunner().invoke(
        cli.app, [*command, "--seeds", "0,7", "--arms", "local,all in one", "--workers", "1"]
    )
    assert again.exit_code == 0, again.output
    runs = grid.finished(study, (0, 7), folders)  # 7 is not one of the file's seeds
    made = {key for key, outcome in runs.items() if outcome != outcomes.get(key)}
    assert made == {("all in one", 0), ("local", 7), ("all in one", 7)}  # what was done stays done
    assert runs["all in one", 0].digest == outcomes["all in one", 0].digest != older.digest
    assert "| 0, 7 |" in (out / "README.md").read_text()
    planned = CliRunner().invoke(cli.app, [*command, "--plan", "1"])
    assert planned.exit_code == 0 and "runs fit" in planned.output
    assert grid.finished(study, (0, 1, 7), folders).keys() == runs.keys()
    with (files / "public.jsonl").open("a") as public:
        public.write('{"text": "red 9 public", "label": "red", "domain": "warm"}\n')
    runs = grid.finished(study, (0, 7), folders)
    assert {name for name, _ in runs} == {"local", "all in one"}  # those that the public texts had no part in
    missing = CliRunner().invoke(cli.app, [*command[:2], "--data", str(files / "nowhere"), *command[4:]])
    assert "cannot read the data file" in str(missing.exception)
    (files / "study.toml").write_text(STUDY.replace("first = 2", "first = 9"))
    failed = CliRunner().invoke(cli.app, [*command, "--seeds", "0", "--arms", "local", "--workers", "1"])
    assert isinstance(failed.exception, EdgeError) and "some runs failed" in str(failed.exception)
    # the table of those that are done
    assert "local, seed 0: " in str(failed.exception) and "written: " in failed.output


def test_devices_that_exchange_nothing_are_asked_each(study, files, tiny_folder, monkeypatch):
    """With a trainer that learns nothing, and is right on a device's first rows, more for each device."""
    asked = []

    def trainer(folder, bases, say):
        job = msgspec.json.decode((folder / "job.json").read_bytes(), type=Job)
        scores = {}
        for name, path in job.evaluation.items():
            rows = data.count_rows(Path(path))
            asked.append((folder.parent.name, rows))
            bits = np.packbits(np.arange(rows) < ord(folder.parent.name) - ord("a"))
            scores[name] = Score(None, 0.0, rows, bits.tobytes())
        (folder / "result.json").write_bytes(msgspec.json.encode(reported.result(scores)))

    monkeypatch.setattr(simulated, "run", trainer)
    places = {"files": files, "models": tiny_folder.parent, "folder": files / "work"}
    found = simulated.run_arm(study, study.arm[0], 0, "2-abc", **places)
    assert asked == [(device, rows) for rows in (9, 9, 12) for device in "abcd"]
    right = {member.id: int(results.unpacked(member.hits, 12).sum()) for member in found.members}
    assert right == {"a": 0, "b": 1, "c": 2, "d": 3} and found.digest == "2-abc"


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_study_that_is_stopped_takes_its_runs_with_it(files, tiny_folder, tmp_path, how):
    path = files / "study.toml"
    path.write_text(STUDY.replace("steps = 3", "steps = 1000000"))
    command = [
        sys.executable,
        "-m",
        "edge_runtime.cli",
        "study",
        str(path),
        "--data",
        str(files),
        "--arms",
        "local",
    ]
    command += [
        "--seeds",
        "0",
        "--models",
        str(tiny_folder.parent),
        "--out",
        str(tmp_path / "out"),
        "--workers",
        "1",
    ]
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 1000
    while not list(tmp_path.glob("out/work/*/a/round-1")):
        assert running.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    workers = psutil.Process(running.pid).children(recursive=True)
    running.send_signal(how)
    running.wait(timeout=1000)
    assert workers and not psutil.wait_procs(workers, timeout=1000)[1]


def test_a_killed_worker_is_told_in_a_sentence(files, tiny_folder, tmp_path):
    path = files / "study.toml"
    path.write_text(STUDY.replace("steps = 3", "steps = 1000000"))
    command = [
        sys.executable,
        "-m",
        "edge_runtime.cli",
        "study",
        str(path),
        "--data",
        str(files),
        "--arms",
        "local",
    ]
    command += [
        "--seeds",
        "0,1",
        "--models",
        str(tiny_folder.parent),
        "--out",
        str(tmp_path / "out"),
        "--workers",
        "1",
    ]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 1000
    while not list(tmp_path.glob("out/work/*/a/round-1")):
        assert running.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    (worker,) = [
        one for one in psutil.Process(running.pid).children() if "spawn_main" in " ".join(one.cmdline())
    ]
    worker.kill()
    said = running.communicate(timeout=1000)[0]
    assert running.returncode == 1
    assert (
        said.count("2 of 2 runs: a worker process was killed, most likely for want of memory") == 2
    )  # at once, at the end


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("seeds = [0, 1]", "seeds = 3"), "Expected `array`, got `int`"),
        (('control = "local"', 'control = "nobody"'), "has the control `nobody`, which is not there"),
        (('control = "local"', 'control = "Local"'), "has the control `Local`, which is not there"),
        (('[public]\nfile = "public.jsonl"\ntexts = 6', ""), "uses public texts, which needs \\[public\\]"),
        (('data = "colours"\ndomains = ["cold"]', 'data = "sounds"'), "there is no \\[data.sounds\\]"),
        (('method = {name = "fedit"}', 'method = {name = "fedit", branches = 2}'), "no key `branches`"),
        (("rounds = 2", "rounds = 2\nseed = 7"), "seed is each run's own"),
        (('id = "b"', 'id = "a"'), "two arms or two devices are called `a`"),
        (('name = "all in one"', 'name = "Local"'), "two arms or two devices are called `local`"),
        (("rounds = 2", "round = 2"), "no key `round`; did you mean `rounds`"),
    ],
)
def test_what_does_not_fit_is_named_before_anything_runs(files, change, reason):
    path = files / "study.toml"
    path.write_text(STUDY.replace(*change))
    with pytest.raises(InputError, match=reason):
        spec.load(path)


def test_a_study_that_is_not_text_is_refused(files):
    path = files / "study.toml"
    path.write_bytes(STUDY.encode("utf-16"))
    with pytest.raises(InputError, match=r"study\.toml is UTF-16 text .*save it as UTF-8"):
        spec.load(path)


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.toml")), ids=lambda path: path.stem)
def test_the_studies_of_the_project_are_read(path):
    assert spec.load(path).arm


def test_a_rank_that_no_device_has_is_refused(files):
    path = files / "study.toml"
    path.write_text(STUDY.replace('data = "colours"\n', 'data = "colours"\nrank = 1\n'))
    with pytest.raises(
        InputError, match=r"\[adapter\] rank is 2, but every device has another one of its own"
    ):
        spec.load(path)


def test_an_arm_may_have_a_head_of_its_own(files):
    path = files / "study.toml"
    path.write_text(STUDY + 'head = {shared = "private"}\n')
    study = spec.load(path)
    assert [study.fleet_of(arm, 0).head.shared for arm in study.arm] == ["class", "class", "private"]
    path.write_text(path.read_text().replace("[head]\n", ""))
    with pytest.raises(InputError, match=r"`fedit \+ codistill` has a head, but the file has no \[head\]"):
        spec.load(path)


def test_a_model_that_another_process_never_stops_cutting_is_named(tiny_folder, tiny_facts, monkeypatch):
    monkeypatch.setattr(cut, "TIMEOUT_S", 0.01)
    folder = processes.cache_folder() / "cut" / Path(tiny_facts.folder).name
    folder.mkdir(parents=True, exist_ok=True)
    lock = folder / f"{tiny_facts.model_class.replace('@', '-')}-first-3.lock"
    with (
        FileLock(lock),
        pytest.raises(InputError, match=r"^tiny cannot be cut: .* has held .*-first-3\.lock"),
    ):
        cut.cut("tiny", 3, tiny_folder.parent)


def test_arms_and_seeds_are_chosen_by_name(study):
    for arms in ("local, all in one", "all-in-one,local"):
        some = spec.chosen(study, "4", arms)
        assert (some.study.seeds, [arm.name for arm in some.arm]) == ((4,), ["local", "all in one"])
    with pytest.raises(InputError, match="no arm `fedprox`; it has local"):
        spec.chosen(study, None, "fedprox")
    with pytest.raises(InputError, match="has to be numbers such as 0,1,2"):
        spec.chosen(study, "one", None)


def test_classes_agree_by_the_cosine_of_their_mean_steps_of_what_crosses_them(tmp_path):
    draw = np.random.default_rng(0)
    first, second, third = (draw.normal(0, 1, (4, 4)).astype(np.float32) for _ in range(3))
    key, own = "stages.0.q.C", "layers.0.q.A"
    sent = [
        ("m", 10, {key: first, own: first}),
        ("m", 30, {key: second, own: first}),
        ("n", 5, {key: third[:2, :2], own: -first}),  # of a lower rank
    ]
    updates = []
    for number, (of, samples, tensors) in enumerate(sent):
        (tmp_path / f"{number}").write_bytes(codec.encode(tensors))
        manifest = types.SimpleNamespace(model_class=of, samples=samples)
        updates.append(types.SimpleNamespace(manifest=manifest, payload=tmp_path / f"{number}"))
    crossing = methods.build(settings.MethodChoice("fedsb", {"stages": 1, "across": True}), None, None)
    mean, low = (10 * first + 30 * second) / 40, np.zeros((4, 4))
    low[:2, :2] = third[:2, :2]
    expected = (mean * low).sum() / np.linalg.norm(mean) / np.linalg.norm(low)
    assert versions.cosines(updates, crossing) == pytest.approx([expected], abs=0.01)
    assert versions.cosines(updates[::-1], crossing) == pytest.approx([expected], abs=0.01)
    inside = methods.build(settings.MethodChoice("fedsb", {"stages": 1}), None, None)
    assert versions.cosines(updates, inside) == versions.cosines(updates[:2], crossing) == []
