"""The version's step from the mean delta: the server step, and momentum over rounds and restarts."""

import types

import msgspec
import numpy as np
import pytest
from safetensors.numpy import load_file

from edge_runtime import methods, settings
from edge_runtime.aggregator import merge
from edge_runtime.errors import InputError
from edge_runtime.protocol import codec

SHAPES = {"layers.0.q.B": (6, 2), "layers.1.q.B": (6, 2), "stages.0.q.V": (2, 2), "labels.red.H": (1, 5)}
CORE = settings.MethodChoice("fedadapter", {"width": 2, "branches": 1, "stages": 1})
TABLES = {
    "head": settings.Head(),
    "public": settings.Public("a", texts=3),
    "codistill": settings.Codistill(),
}


def fleet(choice, **tables):
    return settings.Fleet(
        "f", (settings.Model("m"),), method=choice, adapter=settings.Adapter(rank=2), **tables
    )


def stepping(server_step=1.0, momentum=0.0, of=CORE):
    choice = msgspec.structs.replace(of, server_step=server_step, momentum=momentum)
    return fleet(choice, **TABLES)


def delta(seed, keys=tuple(SHAPES)):
    """What a device sends, as the node decodes it."""
    draw = np.random.default_rng(seed)
    state = {key: draw.normal(0, 1, SHAPES[key]).astype(np.float32) for key in keys}
    return codec.decode(codec.encode({**state, "anchors.red.P": np.full((1, 3), 0.5, np.float32)}))


def merged(spec, deltas, folder, round_=1, versions=None):
    """The versions after a round, by class."""
    folder.mkdir(exist_ok=True)
    updates = []
    for number, sent in enumerate(deltas):
        path = folder / f"{round_}-{number}.update"
        path.write_bytes(codec.encode(sent))
        manifest = types.SimpleNamespace(model_class="m@1", samples=10)
        updates.append(types.SimpleNamespace(manifest=manifest, payload=path))
    after = merge.merge(updates, versions or {}, spec, methods.of(spec), round_, folder)
    return {version.model_class: version for version in after}


def state(versions):
    return {key: value for version in versions.values() for key, value in load_file(version.master).items()}


def test_every_kind_of_tensor_moves_by_the_server_step_but_predictions(tmp_path):
    first, deltas = merged(stepping(), [delta(2)], tmp_path), [delta(0), delta(1)]
    plain, far = (
        state(merged(stepping(server_step), deltas, tmp_path / str(server_step), 2, first))
        for server_step in (1.0, 1.5)
    )
    for key in SHAPES:
        start = state(first)[key]
        mean = (deltas[0][key].astype(np.float64) + deltas[1][key]) / 2
        np.testing.assert_allclose(plain[key], start + mean, atol=1e-5)
        np.testing.assert_allclose(far[key], start + 1.5 * mean, atol=1e-5)
        assert np.abs(far[key] - plain[key]).max() > 0.1
    assert np.array_equal(far["anchors.red.T"], plain["anchors.red.T"])


def test_a_label_s_first_row_is_taken_as_it_is_and_what_is_no_label_s_steps(tmp_path):
    plain, far = (
        state(merged(stepping(server_step), [delta(0)], tmp_path / str(server_step)))
        for server_step in (1.0, 1.5)
    )
    np.testing.assert_allclose(far["labels.red.H"], delta(0)["labels.red.H"], atol=1e-5)
    assert all(np.array_equal(far[key], plain[key]) is key.startswith("labels") for key in SHAPES)


def test_a_row_that_devices_make_anew_takes_no_server_step(tmp_path):
    spec = stepping(1.5, momentum=0.5)
    versions = {}
    for round_ in (1, 2, 3):
        before = state(versions)
        rows = {key: np.full((1, 5), 0.5, np.float32) for key in ("labels.red.H", "labels.blue.K")}
        versions = merged(spec, [rows], tmp_path, round_, versions)
    steps = {key: state(versions)[key] - before[key] for key in rows}
    np.testing.assert_allclose(steps["labels.blue.K"], 0.5, atol=0.01)
    np.testing.assert_allclose(steps["labels.red.H"], 1.5 * 0.75, atol=0.02)  # steps from round 2 on


def test_momentum_is_its_recursion_and_waits_where_nobody_holds_a_tensor(tmp_path):
    spec, versions = stepping(0.5, 0.8), {}
    truth = {key: merge.version_0(key, shape, spec, methods.of(spec)) for key, shape in SHAPES.items()}
    v = dict.fromkeys(SHAPES, 0.0)
    for round_, keys in enumerate((tuple(SHAPES), ("layers.0.q.B", "labels.red.H"), tuple(SHAPES)), 1):
        deltas = [delta(10 * round_ + number, keys) for number in range(2)]
        versions |= merged(spec, deltas, tmp_path, round_, versions)
        for key in keys:
            mean = (deltas[0][key].astype(np.float64) + deltas[1][key]) / 2
            first_row = round_ == 1 and key.startswith("labels")
            v[key] = 0.0 if first_row else 0.8 * v[key] + mean
            truth[key] = truth[key] + (mean if first_row else 0.5 * v[key])
        after = state(versions)
        for key, value in truth.items():
            np.testing.assert_allclose(after[key], value, atol=1e-4)


def test_a_merge_that_was_interrupted_takes_momentum_once_and_one_without_its_file_is_seen(tmp_path):
    spec = stepping(1.0, 0.9)
    first = merged(spec, [delta(0)], tmp_path)
    second = state(merged(spec, [delta(1)], tmp_path, 2, first))
    repeated = state(merged(spec, [delta(1)], tmp_path, 2, first))  # from the journal, after a kill
    assert second.keys() == repeated.keys()
    assert all(np.array_equal(second[key], repeated[key]) for key in second)
    for version in first.values():
        version.momenta.unlink()
    forgotten = state(merged(spec, [delta(1)], tmp_path, 2, first))
    moving = [key for key in SHAPES if not key.startswith("labels")]  # a first row has no momentum
    assert all(np.abs(second[key] - forgotten[key]).max() > 0.1 for key in moving)


def test_without_momentum_nothing_is_kept_for_it(tmp_path):
    assert not any(
        version.momenta.exists() for version in merged(stepping(1.5), [delta(0)], tmp_path).values()
    )


@pytest.mark.parametrize(
    ("name", "lower", "reason"),
    [
        (
            "flexlora",
            (),
            r"server_step is 1.5 and momentum 0, but have to be left out with flexlora, where a round",
        ),
        ("flora", (), "with flora, where"),
        ("local", (), "with local, where"),
        ("hetlora", (1,), "with hetlora and devices of unequal ranks, where"),
        ("hetlora", (), None),
        ("h2tune", (1,), None),
        ("fedsb", (), None),
    ],
)
def test_methods_whose_rounds_add_no_mean_refuse_it(name, lower, reason):
    adapter = settings.Adapter(rank=2, lower=lower)
    public = TABLES["public"] if methods.METHODS[name].aligned else None
    for choice in (settings.MethodChoice(name, server_step=1.5), settings.MethodChoice(name, momentum=0.5)):
        spec = msgspec.structs.replace(fleet(choice), adapter=adapter, public=public)
        if reason is None:
            assert methods.of(spec).step == "mean"
        elif choice.momentum:
            with pytest.raises(InputError):
                methods.of(spec)
        else:
            with pytest.raises(InputError, match=reason):
                methods.of(spec)


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"server_step": 0}, r"\[method\] server_step is 0.0, but has to be a number above 0"),
        ({"server_step": 11}, r"server_step is 11.0, but has to be a number above 0, and 10 at most"),
        ({"momentum": 1}, r"\[method\] momentum is 1.0, but has to be 0 or more, and below 1"),
        ({"momentun": 0.5}, r"has no key `momentun`; did you mean `momentum`"),
        ({"server_step": 1.5, "momentum": 0.9}, None),
    ],
)
def test_the_keys_stand_beside_every_methods_own(keys, reason):
    tables = {"fleet": {"name": "f"}, "catalog": [{"source": "m"}]}

    def read():
        spec = settings.parse({**tables, "method": {"name": "fedadapter", "width": 4, **keys}})
        methods.of(spec)
        return spec.method

    if reason is None:
        assert read() == settings.MethodChoice("fedadapter", {"width": 4}, **keys)
    else:
        with pytest.raises(InputError, match=reason):
            read()
