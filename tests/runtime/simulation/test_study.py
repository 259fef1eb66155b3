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
from click.testing import CliRunner
from filelock import FileLock

from edge_runtime import cli, methods, settings
from edge_runtime.errors import EdgeError, InputError
from edge_runtime.planning import processes
from edge_runtime.protocol import codec
from edge_runtime.simulation import cut, draw, grid, report, results, spec, versions
from edge_runtime.simulation.results import Answers, Member, Outcome, accuracy

STUDY = """
[study]
about = "a test"
seeds = [0, 1]
weights = "float32"

[data.colours]
train = "train.jsonl"
test = "test.jsonl"
per_label = 4

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


def test_held_out_rows_are_drawn_evenly_over_labels_where_that_is_asked_for(files):
    rows = [{"text": f"{n}", "label": "no" if n % 3 else "yes"} for n in range(30)]
    (files / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = spec.Data("train.jsonl", "test.jsonl", test_per_label=7)
    drawn = draw.test_rows(task, files)
    assert sorted(row["label"] for row in drawn) == ["no"] * 7 + ["yes"] * 7
    assert len({row["text"] for row in drawn}) == 14 and drawn == draw.test_rows(task, files)
    with pytest.raises(InputError, match=r"test_per_label is 11, but test\.jsonl has 10 rows of `yes`"):
        draw.test_rows(msgspec.structs.replace(task, test_per_label=11), files)
    (files / "study.toml").write_text(STUDY.replace("per_label = 4", "test_rows = 5\ntest_per_label = 3"))
    with pytest.raises(InputError, match=r"\[data.colours\] has test_rows and test_per_label; leave one"):
        spec.load(files / "study.toml")


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
    assert study.digest(arm, 0) == same.digest(msgspec.structs.replace(arm, control="all in one"), 0)
    fleet = msgspec.structs.replace(study, fleet={"rounds": 3})
    others = msgspec.structs.replace(study, public=spec.Public("public.jsonl", 5))
    digests = [study.digest(arm, 0), study.digest(arm, 1), fleet.digest(arm, 0), others.digest(arm, 0)]
    assert len(set(digests)) == 4
    assert b"test_per_label" not in msgspec.json.encode(study)  # runs from before there was the key stand
    assert study.digest(study.arm[0], 0) == others.digest(study.arm[0], 0)  # it has no public texts


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
    outcomes = grid.finished(study, study.study.seeds, out)
    assert outcomes.keys() == {("local", 0), ("all in one", 0), ("fedit + codistill", 0)}
    assert not any((out / "work").iterdir())
    members = {one.id: one for one in outcomes["fedit + codistill", 0].members}
    assert [len(member.answers) for member in members.values()] == [3, 3, 3, 3]
    assert (
        members["a"].answers[1:] == members["d"].answers[1:]
    )  # they hold the same version when a round begins
    alone = {one.id: one for one in outcomes["local", 0].members}
    assert alone["a"].answers[1]["seen"].loss != alone["d"].answers[1]["seen"].loss
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
        outcomes["all in one", 0],
        digest=study.digest(study.arm[1], 0).replace(f"{spec.COMPUTATION}-", "0-", 1),
    )
    results.add(out, older)
    again = CliRunner().invoke(
        cli.app, [*command, "--seeds", "0,7", "--arms", "local,all in one", "--workers", "1"]
    )
    assert again.exit_code == 0, again.output
    runs = grid.finished(study, (0, 7), out)  # 7 is not one of the file's seeds
    made = {key for key, outcome in runs.items() if outcome != outcomes.get(key)}
    assert made == {("all in one", 0), ("local", 7), ("all in one", 7)}  # what was done stays done
    assert runs["all in one", 0].digest == outcomes["all in one", 0].digest != older.digest
    assert "| 0, 7 |" in (out / "README.md").read_text()
    nowhere = [
        *command[:4],
        "--models",
        str(files / "nowhere"),
        *command[6:],
        "--seeds",
        "0,2",
        "--arms",
        "local",
    ]
    failed = CliRunner().invoke(cli.app, [*nowhere, "--workers", "1"])
    assert isinstance(failed.exception, EdgeError) and "some runs failed" in str(failed.exception)
    assert (
        "local, seed 2: " in str(failed.exception) and "written: " in failed.output
    )  # the table of those that are done


def test_a_run_of_code_that_computes_otherwise_is_not_paired_and_not_tabled(study, tmp_path, monkeypatch):
    arm = study.arm[2]
    for number, run, seed in ((3, arm, 0), (2, study.arm[0], 0), (3, study.arm[0], 1)):
        monkeypatch.setattr(spec, "COMPUTATION", number)
        digest = study.digest(run, seed)
        results.add(tmp_path, msgspec.structs.replace(outcome(run.name, seed, 5), digest=digest))
    monkeypatch.setattr(spec, "COMPUTATION", 3)
    runs = grid.finished(study, study.study.seeds, tmp_path)
    assert runs.keys() == {(arm.name, 0), ("local", 1)}
    assert report.difference(arm, runs) is None
    table = [(line["arm"], line["difference"], line["seeds"]) for line in report.table(study, runs)]
    assert table == [("local", "", "1"), (arm.name, "", "0")]


def test_results_come_back_from_their_file_as_they_were_a_line_a_run(tmp_path):
    assert results.read(tmp_path) == {}
    whole = msgspec.structs.replace(
        outcome("fedit", 1, 3),
        digest="1-abc",
        machine="EPYC",
        code="Python 3",
        moved=[0.25, 1e-7],
        cosines=[(-0.5, 0.75)],
    )
    text = msgspec.structs.replace(
        whole,
        arm="as text",
        members=[msgspec.structs.replace(whole.members[0], answers=[{"unseen": Answers(2, 9, None)}])],
    )
    for run in (whole, text, outcome("fedit", 0, 4), outcome("fedit", 1, 0), whole):
        results.add(tmp_path, run)
    assert results.read(tmp_path) == {
        ("as text", 1): text,
        ("fedit", 0): outcome("fedit", 0, 4),
        ("fedit", 1): whole,  # the last of its arm and seed
    }
    lines = (tmp_path / results.NAME).read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == [
        f'{{"arm":"{arm}"' for arm in ("as text", "fedit", "fedit")
    ]


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


def outcome(name, seed, right):
    """Of ten rows with seen labels `right` are right, and of thirty others half the share."""
    answers = {"seen": Answers(right, 10, 0.0), "unseen": Answers(right * 3 // 2, 30, 0.0)}
    member = Member("a", "m@1", 2, "colours", 5, 3, 1000, [answers], [1000], [500])
    return Outcome(name, seed, "", 1.0, "", "", [], [], [member])


def test_a_difference_is_paired_by_seed_and_has_students_interval(study):
    treated, control = {0: 8, 1: 6, 2: 10}, {0: 6, 1: 6, 2: 6}
    arm = study.arm[2]
    runs = {(arm.name, seed): outcome(arm.name, seed, right) for seed, right in treated.items()}
    runs |= {("local", seed): outcome("local", seed, right) for seed, right in control.items()}
    gain = report.difference(arm, runs)
    per_row = (1 + 3 / 2) / 40  # of all rows
    assert gain.mean == pytest.approx(2 * per_row)
    assert gain.half == pytest.approx(4.302653 * 2 * per_row / 3**0.5, rel=1e-5)
    assert report.difference(arm, {key: run for key, run in runs.items() if key[0] == arm.name}) is None
    assert report.difference(study.arm[0], runs) is None
    assert accuracy(runs["local", 0].members[0], -1, "unseen") == pytest.approx(0.3)


def test_the_slope_is_that_of_the_power_of_the_rounds():
    assert report.slope([3 * round_**-0.5 for round_ in range(1, 7)]) == pytest.approx(-0.5)
    assert report.slope([2.0, 2.0, 2.0]) == pytest.approx(0)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("seeds = [0, 1]", "seeds = 3"), "Expected `array`, got `int`"),
        (('control = "local"', 'control = "nobody"'), "has the control `nobody`, which is not there"),
        (('control = "local"', 'control = "Local"'), "has the control `Local`, which is not there"),
        (('[public]\nfile = "public.jsonl"\ntexts = 6', ""), "distils, which needs \\[public\\]"),
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
