"""Rounds with real training on a tiny model: what is merged, stays private, and is counted."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from fleet import Fleet
from records import job, master, reports, sent, version, version_0
from safetensors.numpy import load_file

from edge_runtime.aggregator.publish import LONGEST_CHAIN


def budget_for_depth(fleet: Fleet, model: Path, depth: int) -> str:
    """A budget that this depth fits and the next larger one of the catalog does not."""
    from edge_runtime import settings
    from edge_runtime.planning import processes
    from edge_runtime.planning.candidates import candidates

    fleet_settings = settings.load(fleet.folder / "fleet.toml")
    facts = {str(model): processes.prepared(str(model), model)}
    measured = processes.runtime_bytes(), processes.rates("cpu", 1)
    peaks = {
        plans[0].depth: plans[-1].predicted_peak_bytes
        for plans in candidates(fleet_settings, facts, *measured)
    }
    return str(peaks[depth])


def test_each_tensor_becomes_the_mean_over_the_devices_that_hold_it(
    fleet: Fleet, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGE_RUNTIME_CACHE", str(fleet.cache))
    fleet.write((str(tiny_model), 4), (str(tiny_model), 2), quorum=2, rounds=1)
    node = fleet.node("--until-finished")
    small = budget_for_depth(fleet, tiny_model, 2)
    deep, shallow = (
        fleet.agent("deep", "--until-finished"),
        fleet.agent("shallow", "--until-finished", "--budget", small),
    )
    assert (node.end(), deep.end(), shallow.end()) == (0, 0, 0)
    merged, a, b = master(fleet, 1), sent(fleet, "deep", 1), sent(fleet, "shallow", 1)
    assert {key.split(".")[1] for key in a} == set("0123") and {key.split(".")[1] for key in b} == set("03")
    assert merged.keys() == a.keys()
    for key, value in merged.items():
        step = (a[key] + b[key]) / 2 if key in b else a[key]
        np.testing.assert_allclose(value, version_0(key, step.shape) + step, atol=1e-6, err_msg=key)
    assert any(np.abs(a[key] - b[key]).max() > 1e-4 for key in b), (
        "the devices sent the same, so the mean proves nothing"
    )


def test_the_next_round_starts_from_the_published_version_and_carries_what_rounding_lost(
    fleet: Fleet, tiny_model: Path
) -> None:
    fleet.write((str(tiny_model), 4), rounds=2)
    node, agent = fleet.node("--until-finished"), fleet.agent("a", "--until-finished")
    assert (node.end(), agent.end()) == (0, 0)
    work = fleet.folder / "a" / "work" / "round-2"
    job = json.loads((work / "job.json").read_text())
    (artifact,) = (fleet.folder / "node" / "versions").glob("00001-*.edc")
    assert [Path(path).name for path in job["start"]] == [hashlib.sha256(artifact.read_bytes()).hexdigest()]
    start = version(artifact)
    for key, value in master(fleet, 1).items():
        moved = value - version_0(key, value.shape)
        assert np.linalg.norm(start[key] - value) < 0.6 * np.linalg.norm(moved)
    carried = job["carried"]
    assert carried["residual"].endswith("round-1/residual.bin") and carried["unsent"] is None
    first, last = reports(fleet, "trained")[("a", 1)], reports(fleet, "finished")[("a", 2)]
    assert first.result is not None and last.result is not None
    assert last.result.evaluation["held_out_1"].loss < first.result.evaluation["held_out_1"].loss


def test_local_sends_nothing_and_goes_on_from_its_own_state(fleet: Fleet, tiny_model: Path) -> None:
    fleet.write((str(tiny_model), 4), rounds=2, method="local")
    node, agent = fleet.node("--until-finished"), fleet.agent("a", "--until-finished")
    assert (node.end(), agent.end()) == (0, 0)
    trained = reports(fleet, "trained")
    assert not list((fleet.folder / "a" / "work").glob("*/payload.bin"))
    assert all(report.bytes_up < 8192 for report in trained.values())  # reports alone
    before, after = (trained[("a", round_)].result for round_ in (1, 2))
    assert before is not None and after is not None
    assert after.evaluation["held_out_1"].loss < before.evaluation["held_out_1"].loss


def test_a_device_trains_and_exports_the_rank_and_length_of_its_plan(
    fleet: Fleet, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGE_RUNTIME_CACHE", str(fleet.cache))
    fleet.write((str(tiny_model), 4), method="local")
    path = fleet.folder / "fleet.toml"
    text = path.read_text().replace("rank = 2", "rank = 8\nlower = [3]")
    path.write_text(text.replace("max_tokens = 32", "max_tokens = 32\nshorter = [16]"))
    smallest = budget_for_depth(fleet, tiny_model, 4)
    node, agent = (fleet.node("--until-finished"), fleet.agent("a", "--until-finished", "--budget", smallest))
    assert (node.end(), agent.end()) == (0, 0)
    job = json.loads((fleet.folder / "a" / "work" / "finished" / "job.json").read_text())
    assert (job["plan"]["rank"], job["plan"]["tokens"]) == (3, 16)
    exported = json.loads((fleet.folder / "a" / "adapter" / "adapter_config.json").read_text())
    assert exported["r"] == 3


def test_a_late_joiner_takes_part_from_the_global_version(fleet: Fleet, tiny_model: Path) -> None:
    fleet.write((str(tiny_model), 4), rounds=2)
    node = fleet.node("--until-finished")
    early = fleet.agent("early", "--until-finished")
    node.until(lambda event: event["phase"] == "collecting" and event["round"] == 2)
    late = fleet.agent("late", "--until-finished")
    assert (node.end(), early.end(), late.end()) == (0, 0, 0)
    assert ("late", 1) not in reports(fleet, "trained")
    assert reports(fleet, "finished").keys() == {("early", 2), ("late", 2)}
    jobs = [fleet.folder / device / "work" / "finished" / "job.json" for device in ("early", "late")]
    chains = [[Path(path).name for path in json.loads(job.read_text())["start"]] for job in jobs]
    versions = (fleet.folder / "node" / "versions").glob("*.edc")
    assert chains == 2 * [[hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(versions)]]
    # whether it came to the second version by the first or at once, a device has the same numbers
    early_adapter, late_adapter = (
        load_file(fleet.folder / device / "adapter" / "adapter_model.safetensors")
        for device in ("early", "late")
    )
    assert early_adapter.keys() == late_adapter.keys()
    for name, tensor in early_adapter.items():
        np.testing.assert_array_equal(tensor, late_adapter[name], err_msg=name)


def test_a_device_fetches_what_it_lacks_of_a_chain_whoever_is_killed(fleet: Fleet) -> None:
    fleet.write(rounds=LONGEST_CHAIN + 2, quorum=1)
    node, early = fleet.noise_node(), fleet.noise("early", "100kB")
    node.until(lambda event: event["phase"] == "collecting" and event["round"] == 4)
    early.kill()
    node.kill()
    early, late = (fleet.noise(device, "100kB", "--until-finished") for device in ("early", "late"))
    for device in (early, late):
        device.phase("connected")
    node = fleet.noise_node("--until-finished")
    assert (node.end(), early.end(), late.end()) == (0, 0, 0)
    trained = reports(fleet, "trained")
    # the round in which the two were killed may have fetched a file again
    for round_ in range(6, LONGEST_CHAIN + 3):
        assert 100_000 < trained["early", round_].bytes_down < 115_000, round_
    for device in ("early", "late"):
        start = json.loads((fleet.folder / device / "work" / "finished" / "job.json").read_text())["start"]
        assert len(start) == 2  # of the chain that began after LONGEST_CHAIN versions
        kept = {path.name for path in (fleet.folder / device / "versions").iterdir()}
        assert kept == {Path(path).name for path in start}


def test_bytes_are_those_that_went_through_the_session(fleet: Fleet) -> None:
    fleet.write(rounds=2)
    node, agent = (
        fleet.noise_node("--until-finished"),
        fleet.noise("a", "300kB", "--until-finished"),
    )
    assert (node.end(), agent.end()) == (0, 0)
    trained = reports(fleet, "trained")
    assert 300_000 < trained[("a", 1)].bytes_up < 310_000
    assert trained[("a", 1)].bytes_down < 5_000  # nothing to fetch yet
    assert 300_000 < trained[("a", 2)].bytes_down < 310_000


@pytest.mark.parametrize(
    ("method", "factor", "private"),
    [
        ("ffa", "B", ""),
        ("fedsa", "A", "B"),
        ("fedsb", "C", ""),
    ],
)
def test_what_a_method_shares_travels_and_what_it_keeps_goes_on_from_round_to_round(
    fleet: Fleet, tiny_model: Path, method: str, factor: str, private: str
) -> None:
    fleet.write((str(tiny_model), 4), method=method, rounds=2, quorum=2)
    node = fleet.node("--until-finished")
    agents = [fleet.agent(name, "--until-finished") for name in ("a", "b")]
    assert (node.end(), *(agent.end() for agent in agents)) == (0, 0, 0)
    deltas = [sent(fleet, name, 2) for name in ("a", "b")]
    assert {key[-1] for state in (master(fleet, 1), master(fleet, 2), *deltas) for key in state} == set(
        factor
    )
    job = json.loads((fleet.folder / "a" / "work" / "round-2" / "job.json").read_text())
    assert job["start"]
    assert (job["carried"]["private"] is not None) is bool(private)
    before, after = (
        reports(fleet, state)["a", round_] for state, round_ in (("trained", 1), ("finished", 2))
    )
    assert before.result is not None and after.result is not None
    assert after.result.evaluation["held_out_1"].loss < before.result.evaluation["held_out_1"].loss


def test_a_device_that_prunes_goes_on_in_fewer_ranks(fleet: Fleet, tiny_model: Path) -> None:
    fleet.write((str(tiny_model), 4), method="hetlora", rounds=2)
    file = fleet.folder / "fleet.toml"
    pruning = 'name = "hetlora"\npenalty = 1000.0\nkeep = 0.5'
    text = file.read_text().replace("rank = 2", "rank = 8").replace('name = "hetlora"', pruning)
    # in few steps, the tail of a coarsely rounded start grows
    file.write_text(text + "\n[codec]\nstep = 0.02\n")
    node, agent = fleet.node("--until-finished"), fleet.agent("a", "--until-finished")
    assert (node.end(), agent.end()) == (0, 0)
    assert job(fleet, "a", 2)["plan"]["rank"] == 8  # before the first round there was nothing beyond
    assert len(sent(fleet, "a", 2)["layers.0.q.A"]) == 4
    assert (
        json.loads((fleet.folder / "a" / "work" / "finished" / "job.json").read_text())["plan"]["rank"] == 4
    )
    assert len(master(fleet, 2)["layers.0.q.A"]) == 8


@pytest.mark.parametrize("method", ["hetlora", "flexlora", "flora"])
def test_devices_of_unequal_ranks_learn_together(
    fleet: Fleet, tiny_model: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGE_RUNTIME_CACHE", str(fleet.cache))
    fleet.write((str(tiny_model), 4), method=method, rounds=2, quorum=2)
    file = fleet.folder / "fleet.toml"
    file.write_text(file.read_text().replace("rank = 2", "rank = 8\nlower = [2]"))
    node = fleet.node("--until-finished")
    small = budget_for_depth(fleet, tiny_model, 4)  # the last plan's, of the lowest rank
    agents = [
        fleet.agent("high", "--until-finished"),
        fleet.agent("low", "--until-finished", "--budget", small),
    ]
    assert (node.end(), *(agent.end() for agent in agents)) == (0, 0, 0)
    first, high, low, merged = (
        master(fleet, 1),
        sent(fleet, "high", 2),
        sent(fleet, "low", 2),
        master(fleet, 2),
    )
    key, name = "layers.0.q", "kept" if method == "flora" else ""
    assert [len(state[f"{key}.A"]) for state in (high, low)] == [8, 2]
    assert [len(state[f"{key}.{name}A"]) for state in (first, merged)] == ([64, 64] if name else [8, 8])
    if method == "hetlora":
        return
    old = {factor: first.get(f"{key}.{factor}", 0) for factor in "AB"}
    if method == "flora":  # every round begins with version 0
        assert {factor.rpartition(".")[2] for factor in merged} == {"keptA", "keptB"}
        old = {factor: version_0(f"{key}.{factor}", high[f"{key}.{factor}"].shape) for factor in "AB"}
    products = []
    for delta in (high, low):
        rank = len(delta[f"{key}.A"])
        products.append((old["B"][:, :rank] + delta[f"{key}.B"]) @ (old["A"][:rank] + delta[f"{key}.A"]))
    learned = merged[f"{key}.{name}B"] @ merged[f"{key}.{name}A"]
    if method == "flora":
        learned -= first[f"{key}.keptB"] @ first[f"{key}.keptA"]
    close = 1e-5 if method == "flora" else 1e-3  # flora has room for all of it, and a round alone is little
    np.testing.assert_allclose(learned, sum(products) / 2, atol=close)
    assert np.abs(sum(products)).max() > 10 * close
