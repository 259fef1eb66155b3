"""A device and the common frame, in real trainer processes: it joins, and then learns a head that all models share."""

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from edge_runtime import settings
from edge_runtime.adapters import learned
from edge_runtime.methods import frames
from edge_runtime.protocol import codec
from edge_runtime.protocol.plan import Plan
from edge_runtime.trainer import data

ROWS = [{"text": f"{word} {n}", "label": word} for n in range(6) for word in ("red", "green")]
HELD_OUT = [{"text": f"{word} {n}", "label": word} for n in range(6, 9) for word in ("red", "green")]
PUBLIC = [{"text": f"{word} {n}"} for n in range(10, 30) for word in ("red", "green", "blue")]


@pytest.fixture
def fleet(tmp_path):
    """A fleet of one head, and the path of its public texts."""
    texts = str(data.write_rows(tmp_path / "texts.jsonl", PUBLIC))
    return {
        "head": settings.Head("fleet"),
        "public": settings.Public("", len(PUBLIC)),
        "texts": texts,
        "training": settings.Training(steps=20, rows_a_step=8, learning_rate=2e-2, max_tokens=32),
    }


def sent_by(folder):
    return codec.decode((folder / "payload.bin").read_bytes())


def test_a_new_class_sends_features_and_trains_once_it_has_a_frame(trained, fleet, tmp_path):
    folder, joined = trained("joins", ROWS, HELD_OUT, **fleet)
    sent = sent_by(folder)
    assert sent.keys() == {frames.SENT} and sent[frames.SENT].shape == (len(PUBLIC), frames.FEATURES)
    assert joined.losses == [] and joined.samples > 0
    Z = frames.common([sent[frames.SENT]], None)
    (tmp_path / "start").write_bytes(codec.encode({frames.MADE: Z}))
    fleet |= {"start": (str(tmp_path / "start"),), "round": 2, "rounds": 2}
    folder, first = trained("trains", ROWS, HELD_OUT, **fleet)
    assert first.losses[-1] < 0.7 * first.losses[0]
    heads = {key: value for key, value in sent_by(folder).items() if key.startswith("labels")}
    assert {key: value.shape for key, value in heads.items()} == {
        f"labels.{label}.H": (1, frames.WIDTH) for label in ("red", "green")
    }
    maps = load_file(folder / "frame.bin")
    assert maps.keys() == {frames.MADE, frames.MAP}
    assert not any(key.startswith("frame") for key in sent_by(folder))


def test_maps_of_an_earlier_round_are_used_until_the_frame_is_made_again(trained, fleet, tmp_path):
    folder, _ = trained("joins", ROWS, HELD_OUT, **fleet)
    Z = frames.common([sent_by(folder)[frames.SENT]], None)
    start, carried = tmp_path / "start", tmp_path / "frame.bin"
    start.write_bytes(codec.encode({frames.MADE: Z}))
    fleet |= {"start": (str(start),), "round": 2, "rounds": 2, "frame": str(carried)}
    published = codec.decode(start.read_bytes())[frames.MADE]
    found = {}
    for name, made in (("same", published), ("another", published + 1)):
        marked = np.zeros((frames.WIDTH, 32), np.float32)
        save_file({frames.MADE: made, frames.MAP: marked}, carried)
        folder, _ = trained(name, ROWS, HELD_OUT, **fleet)
        found[name] = load_file(folder / "frame.bin")[frames.MAP]
    assert not found["same"].any() and found["another"].any()


def test_maps_are_the_same_where_mlps_run_in_tiles(trained, fleet, tiny_facts, tmp_path):
    folder, _ = trained("joins", ROWS, HELD_OUT, **fleet)
    start = tmp_path / "start"
    start.write_bytes(codec.encode({frames.MADE: frames.common([sent_by(folder)[frames.SENT]], None)}))
    fleet |= {"start": (str(start),), "round": 2, "rounds": 2}
    fleet |= {"method": settings.MethodChoice("heterotune", {"rank": 4})}
    known = ("m", tiny_facts.model_class, 4, tiny_facts.layers, "float32", 2, 8, 32)
    maps = {}
    for tile in (None, 16):  # of the 64 tokens or more that go through the model at once
        plan = Plan(*known, terms={}, step_seconds=0.0, mlp_tokens=tile)
        folder, _ = trained(f"tiles-of-{tile}", ROWS, HELD_OUT, plan=plan, **fleet)
        maps[tile] = load_file(folder / "frame.bin")
    assert {"layers.3.down.F", "layers.3.up.G"} <= maps[16].keys() == maps[None].keys()
    for key, value in maps[16].items():
        np.testing.assert_allclose(value, maps[None][key], atol=1e-4)


def test_an_export_of_a_device_has_its_branch_as_ranks_and_its_head_as_the_model_reads_it(
    trained, fleet, tmp_path
):
    folder, _ = trained("joins", ROWS, HELD_OUT, **fleet)
    draw, start, out = np.random.default_rng(0), tmp_path / "start", tmp_path / "adapter"
    keys = {
        "stages.0.q.C": (4, 4),
        **{f"labels.{label}.H": (1, frames.WIDTH) for label in ("green", "red")},
    }
    version = {key: draw.normal(size=shape).astype(np.float32) for key, shape in keys.items()}
    Z = frames.common([sent_by(folder)[frames.SENT]], None)
    start.write_bytes(codec.encode({frames.MADE: Z, **version}))
    version = codec.decode(start.read_bytes())
    fleet |= {"start": (str(start),), "round": 2, "rounds": 2, "export": str(out)}
    choice = {"rank": 4, "stages": 1}
    folder, _ = trained("trains", ROWS, HELD_OUT, method=settings.MethodChoice("heterotune", choice), **fleet)
    exported, maps = learned.read(out), load_file(folder / "frame.bin")
    A, B = exported.factors[0, "q"]
    assert (len(A), B.shape[1], exported.labels) == (2 + 4, 2 + 4, ("green", "red"))
    F, G = maps["layers.0.q.F"], maps["layers.0.q.G"]
    assert F.any() and G.any()
    scale = settings.Adapter().alpha / 2  # B is 0 as the round starts
    np.testing.assert_allclose(B @ A, scale * G @ version["stages.0.q.C"] @ F, atol=1e-4)
    head = np.concatenate([version["labels.green.H"], version["labels.red.H"]])
    np.testing.assert_allclose(exported.head, head @ maps[frames.MAP], atol=1e-4)

    mixture = settings.MethodChoice("heterotune", {**choice, "form": "mixture"})
    start.write_bytes(codec.encode({frames.MADE: Z}))
    _, result = trained("mixes", ROWS, HELD_OUT, method=mixture, **fleet | {"export": str(tmp_path / "none")})
    assert result.losses[-1] < result.losses[0] and not (tmp_path / "none").exists()
    assert {"frame", "train"} <= result.phases.keys()
