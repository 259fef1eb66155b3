"""Devices of two models over rounds of colora: trainer, rounds on a device and merge as they run."""

import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from edge_runtime import methods, settings
from edge_runtime.adapters.attach import AdapterLinear
from edge_runtime.agent.local_round import DeviceRows, LocalRounds, Start, payload_of, read_result, write_job
from edge_runtime.agent.store import DeviceStore
from edge_runtime.models.prepare import prepare
from edge_runtime.protocol.plan import Plan
from edge_runtime.simulation.run import CachedBases
from edge_runtime.simulation.versions import Versions
from edge_runtime.trainer import data
from edge_runtime.trainer.job import Machine
from edge_runtime.trainer.run import run

LABELS = {"a": ("red", "green"), "b": ("red", "blue"), "c": ("green", "blue")}
TEXTS = [{"text": f"{label} {n}"} for n in range(20, 32) for label in ("red", "green", "blue")]
KEY = "peers.0.q."
TABLES = {
    "fleet": {"name": "f", "rounds": 4},
    "catalog": [{"source": "m"}],
    "method": {"name": "colora", "rank": 3, "stages": 2},
    "adapter": {"rank": 2, "roles": ["q", "down"]},
    "training": {"steps": 3, "rows_a_step": 8, "learning_rate": 1e-2, "max_tokens": 16},
    "public": {"file": "public.jsonl", "texts": len(TEXTS)},
    "head": {},
}


class SeenBases(CachedBases):
    """Base models of all jobs, the last of which can be looked at."""

    def model(self, facts, plan, device):
        self.last = super().model(facts, plan, device)
        return self.last


class Device:
    """A device with rows of its labels."""

    def __init__(self, name, facts, folder):
        rows = [{"text": f"{label} {n}", "label": label} for n in range(4) for label in LABELS[name]]
        folder.mkdir()
        files = DeviceRows(data.write_rows(folder / "rows.jsonl", rows), {})
        self.rounds = LocalRounds(folder, DeviceStore(Path(":memory:")), files, Machine(threads=1))
        self.name, self.facts, self.heard = name, facts, None  # heard: O of its first layer as it trained

    def work(self, bases, number, versions, texts, verdict):
        """Train a round, whose update the node takes or refuses."""
        latest = versions.latest(self.facts.model_class)
        names = ("m", self.facts.model_class, 4, 4, "float32")
        plan = Plan(*names, rank=2, rows=8, tokens=16, terms={}, step_seconds=0.0)
        start = Start(latest.chain if latest else (), texts)
        job = self.rounds.job(number, versions.fleet, self.facts, plan, start)
        folder = self.rounds.folder(job)
        write_job(folder, job)

        def look(progress):
            if progress.phase == "train" and progress.step == 1:
                linear = next(module for module in bases.last.modules() if isinstance(module, AdapterLinear))
                self.heard = linear.factors["O"].detach().numpy().copy()

        run(folder, bases, look)
        result = read_result(folder)
        self.rounds.keep(job, result)
        self.rounds.settle(number, verdict)
        if verdict == "taken":
            versions.take(payload_of(folder, result), self.name, job, result.samples)
        state = folder / "state.bin"
        return load_file(state)[KEY + "R"] if state.exists() else None


def test_each_device_hears_the_others_of_the_last_round_and_never_itself(
    tiny, tiny_folder, tiny_facts, cache, tmp_path
):
    wide = tmp_path / "wide"
    shutil.copytree(tiny_folder, wide)
    tiny("llama", vocab_size=tiny_facts.vocabulary, hidden_size=48).save_pretrained(wide)
    wider = prepare(str(wide), tmp_path, cache / "models")
    assert wider.model_class != tiny_facts.model_class
    fleet = settings.parse(TABLES)
    versions = Versions(fleet, methods.of(fleet), tmp_path / "versions")
    texts, bases = data.write_rows(tmp_path / "texts.jsonl", TEXTS), SeenBases()
    devices = [
        Device(name, facts, tmp_path / name)
        for name, facts in (("a", tiny_facts), ("b", tiny_facts), ("c", wider))
    ]
    learned = {}
    # in round 2 the update of b is refused, so that the version after it has a and c alone
    for number in range(1, 4):
        for device in devices:
            verdict = "refused" if (number, device.name) == (2, "b") else "taken"
            learned[number, device.name] = device.work(bases, number, versions, texts, verdict)
        versions.merge(number)
        if number == 1:  # the classes join
            assert all(R is None for R in learned.values())
        if number == 2:  # nobody has said anything yet
            assert all(not device.heard.any() for device in devices)
    heard = {"a": learned[2, "c"], "b": (learned[2, "a"] + learned[2, "c"]) / 2, "c": learned[2, "a"]}
    for device in devices:
        truth = heard[device.name]
        np.testing.assert_allclose(device.heard, truth, atol=0.05 * np.abs(truth).max())
        # each goes on with its own, which is another's nowhere
        before, after = learned[2, device.name], learned[3, device.name]
        assert 0 < np.abs(after - before).max() < 2 * np.abs(before).max()
    assert (
        np.abs(heard["a"] - heard["c"]).max() > 0.2 * np.abs(heard["a"]).max()
    )  # the bound can tell them apart
