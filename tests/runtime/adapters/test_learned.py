"""What was learned, free of its method: folded, written and read again, and refused where it does not belong."""

import copy
import errno
import json
import os

import msgspec
import numpy as np
import peft
import pytest
import torch
from family_cases import CASES
from safetensors.numpy import load_file, save_file

from edge_runtime import methods, settings
from edge_runtime.adapters import attach, learned
from edge_runtime.errors import InputError
from edge_runtime.models.slices import kept_layers
from edge_runtime.state import ABOUT

IDS = torch.arange(24).reshape(2, 12) % 96
SPEC = settings.Adapter(rank=3, alpha=11.0)  # a scale that is no power of two


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def difference(one, two):
    """The largest difference of two outputs, relative to the largest value."""
    return float((one - two).abs().max() / two.abs().max())


def trained(model, facts, name, layers=(0, 1, 2, 3), head=None, spec=SPEC):
    """The model with random factors of a method, and what was learned."""
    ours = copy.deepcopy(model)
    method = methods.build(settings.MethodChoice(name), head, None)
    adapter = attach.attach(ours, layers, spec, method, 0, facts.layers)
    draw = np.random.default_rng(0)
    state = {
        key: draw.normal(0, 0.1, value.shape).astype(np.float32)
        for key, value in attach.state(adapter).items()
    }
    attach.load_state(adapter, state)
    if head is not None:
        state |= {
            f"labels.{label}.H": draw.normal(size=(1, facts.hidden)).astype(np.float32) for label in "ab"
        }
    return ours, learned.fold(state, facts, layers, spec, method, 3)


LORAS = [name for name, method in methods.METHODS.items() if method.branch is None]


@pytest.mark.filterwarnings("error:.*(fan_in_fan_out|adapter keys)")
@pytest.mark.parametrize(
    ("family", "name"),
    [
        *((family, "fedit") for family in CASES),
        *((family, name) for family in ("llama", "gpt2") for name in LORAS if name != "fedit"),
    ],
)
def test_peft_computes_what_the_trainer_computes(tiny, facts_of, family, name, tmp_path):
    model = tiny(family)
    plain = logits(model)
    ours, adapter = trained(model, facts_of(model), name)
    learned.write(adapter, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(model, tmp_path / "adapter")
    assert difference(logits(theirs), logits(ours)) < 1e-5
    assert difference(logits(ours), plain) > 1e-2


@pytest.mark.filterwarnings("error:.*(fan_in_fan_out|adapter keys)")
@pytest.mark.parametrize(
    ("family", "roles"),
    [("llama", ("q",)), ("llama", ("v", "down")), ("phi3", ("gate_up",)), ("gpt2", ("fc2", "qkv"))],
)
def test_any_roles_can_be_written(tiny, facts_of, family, roles, tmp_path):
    model = tiny(family)
    ours, adapter = trained(model, facts_of(model), "fedit", spec=settings.Adapter(5, alpha=7.5, roles=roles))
    learned.write(adapter, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(model, tmp_path / "adapter")
    assert difference(logits(theirs), logits(ours)) < 1e-5


def test_of_a_label_with_two_rows_that_of_examples_counts(tiny, facts_of):
    facts, rows = facts_of(tiny("llama")), np.eye(4, tiny("llama").config.hidden_size, dtype=np.float32)
    method = methods.build(settings.MethodChoice("fedit"), settings.Head(), None)
    adapter = attach.attach(tiny("llama"), (0, 1, 2, 3), SPEC, method, 0, facts.layers)
    keys = ("labels.both.H", "labels.both.K", "labels.a.K", "labels.z.H")
    state = attach.state(adapter) | {key: row[None] for key, row in zip(keys, rows, strict=True)}
    found = learned.fold(state, facts, (0, 1, 2, 3), SPEC, method, 1)
    assert found.labels == ("a", "both", "z") and np.array_equal(found.head, rows[[2, 0, 3]])


HUB = "/home/somebody/.cache/huggingface/hub/models--owner--a--name/snapshots/0123abc"


@pytest.mark.parametrize(("weights", "source"), [(HUB, "owner/a--name@0123abc"), ("/models/a", "/models/a")])
def test_what_is_written_is_read_again_and_names_its_base(tiny, facts_of, weights, source, tmp_path):
    facts = msgspec.structs.replace(facts_of(tiny("llama")), folder="/home/somebody/cache", weights=weights)
    _, adapter = trained(tiny("llama"), facts, "fedit", head=settings.Head())
    learned.write(adapter, tmp_path / "adapter")
    again = learned.read(tmp_path / "adapter")
    assert (again.layers, again.version, again.source) == ((0, 1, 2, 3), 3, source)
    assert again.labels == ("a", "b") and np.array_equal(again.head, adapter.head)
    assert again.factors.keys() == adapter.factors.keys()
    for key, (A, B) in adapter.factors.items():
        assert np.array_equal(again.factors[key][0], A) and np.array_equal(again.factors[key][1], B)
    assert learned.on(again, facts).facts == facts
    config = peft.PeftConfig.from_pretrained(tmp_path / "adapter")
    assert "@".join(filter(None, (config.base_model_name_or_path, config.revision))) == source
    assert not [path for path in (tmp_path / "adapter").iterdir() if b"somebody" in path.read_bytes()]


def test_a_version_takes_the_place_of_the_one_before(tiny, facts_of, tmp_path):
    _, adapter = trained(tiny("llama"), facts_of(tiny("llama")), "fedit", head=settings.Head())
    learned.write(adapter, tmp_path / "adapter")
    learned.write(adapter._replace(version=4, head=None, labels=()), tmp_path / "adapter")
    again = learned.read(tmp_path / "adapter")
    assert (again.version, again.head, [*tmp_path.iterdir()]) == (4, None, [tmp_path / "adapter"])
    learned.write(adapter, tmp_path / "other")
    (tmp_path / "other" / ABOUT).rename(tmp_path / "adapter" / ABOUT)
    with pytest.raises(InputError, match=r"is of another version than edge_runtime.json; read again"):
        learned.read(tmp_path / "adapter")


def test_a_full_disk_and_a_killed_process_leave_the_version_before(tiny, facts_of, tmp_path, monkeypatch):
    _, adapter = trained(tiny("llama"), facts_of(tiny("llama")), "fedit")
    folder, versions = tmp_path / "adapter", []
    learned.write(adapter, folder)

    def full(_):
        versions.append(learned.read(folder).version)
        raise OSError(errno.ENOSPC, "no space left")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        for _ in "12":
            with pytest.raises(OSError, match="no space left"):
                learned.write(adapter._replace(version=4), folder)
        folder.rename(tmp_path / "adapter.old")  # as a process leaves it that is killed between the renames
        with pytest.raises(OSError, match="no space left"):
            learned.write(adapter._replace(version=4), folder)
    assert versions == [3, 3, 3] and learned.read(folder).version == 3
    learned.write(adapter._replace(version=4), folder)
    assert learned.read(folder).version == 4 and [*tmp_path.iterdir()] == [folder]


@pytest.mark.filterwarnings("error:.*adapter keys")
def test_the_adapter_of_a_slice_is_refused_by_the_whole_model(tiny, facts_of, tmp_path):
    whole, model = tiny("llama"), tiny("llama", num_hidden_layers=3)
    ours, adapter = trained(model, facts_of(whole), "fedit", kept_layers(3, 4))
    learned.write(adapter, tmp_path / "adapter")
    assert learned.read(tmp_path / "adapter").factors.keys() == adapter.factors.keys()
    with pytest.raises(RuntimeError, match=r"size mismatch for .*layers.3.self_attn.q_proj.lora_A"):
        peft.PeftModel.from_pretrained(whole, tmp_path / "adapter")
    assert (
        difference(logits(peft.PeftModel.from_pretrained(model, tmp_path / "adapter")), logits(ours)) < 1e-5
    )


def test_a_folder_that_does_not_fit_is_refused(tiny, facts_of, tmp_path):
    _, adapter = trained(tiny("llama"), facts_of(tiny("llama")), "fedit")
    with pytest.raises(InputError, match=r"cannot be read as an adapter of Edge Runtime.*edge_runtime.json"):
        learned.read(tmp_path / "adapter")
    with pytest.raises(InputError, match=r"trained on tiny, but the model at .* has the digest 2"):
        learned.on(adapter, facts_of(tiny("llama"), model_class="tiny@2"))
    A, B = adapter.factors[1, "q"]
    learned.write(adapter._replace(factors={(1, "q"): (A, B[:, :2])}), tmp_path / "adapter")
    with pytest.raises(
        InputError, match=r"A and B of model.layers.1.self_attn.q_proj are \(3, 32\) and \(64, 2\)"
    ):
        learned.read(tmp_path / "adapter")


CONFIG, ADAPTER, HEAD = learned.CONFIG, learned.ADAPTER, learned.HEAD
# a file, what becomes of its values or of its tensors' names, and the reason that is told
FAULTS = {
    "a scale": (CONFIG, {"lora_alpha": 6}, "has r = 3, lora_alpha = 6 and use_rslora = False"),
    "a root": (CONFIG, {"use_rslora": True}, "lora_alpha = 3 and use_rslora = True"),
    "no rank": (CONFIG, {"r": None}, "Expected `int`, got `null`"),
    "no factors": (ADAPTER, lambda name: [], "has no factors of any layer"),
    "no role": (ADAPTER, lambda name: [name] * ("1.self_attn.q_" not in name), r"no factors of \(1, 'q'\)"),
    "no A": (ADAPTER, lambda name: [name] * ("1.self_attn.q_proj.lora_A" not in name), r"\(1, 'q'\)"),
    "no B": (ADAPTER, lambda name: [name] * ("1.self_attn.q_proj.lora_B" not in name), "q_proj.lora_B"),
    "no layer": (ADAPTER, lambda name: [name.replace("s.3.", "s.9.")], r"no factors of \(3, '\w+'\)"),
    "a layer more": (ADAPTER, lambda name: [name, name.replace("s.3.", "s.4.")], "belongs to none of"),
    "a tensor more": (ADAPTER, lambda name: [name, name.replace("lora_A", "bias")], "belongs to none of"),
    "a label less": (HEAD, '["a"]', r"is \(2, 32\), but has to be \(1, 32\)"),
    "a number of labels": (HEAD, "5", "Expected `array`, got `int`"),
    "labels that are no texts": (HEAD, "[1, 2]", "Expected `str`, got `int`"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_folder_that_lacks_or_adds_something_is_refused(tiny, facts_of, fault, tmp_path):
    _, adapter = trained(tiny("llama"), facts_of(tiny("llama")), "fedit", head=settings.Head())
    learned.write(adapter, tmp_path / "adapter")
    (file, change, reason), metadata = FAULTS[fault], {"version": "3"}
    path = tmp_path / "adapter" / file
    if file == CONFIG:
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    elif file == learned.HEAD:
        save_file({"weight": adapter.head}, path, metadata | {"labels": change})
    else:
        tensors = load_file(path)
        save_file({new: tensors[name] for name in tensors for new in change(name)}, path, metadata)
    with pytest.raises(InputError, match=f"cannot be read as an adapter of Edge Runtime.*{reason}"):
        learned.read(tmp_path / "adapter")


def test_a_folder_without_peft_s_file_is_refused(tiny, facts_of, tmp_path):
    _, adapter = trained(tiny("llama"), facts_of(tiny("llama")), "fedit")
    learned.write(adapter, tmp_path / "adapter")
    (tmp_path / "adapter" / CONFIG).unlink()
    with pytest.raises(InputError, match=r"No such file .*adapter_config.json"):
        learned.read(tmp_path / "adapter")


@pytest.mark.parametrize("fault", ["scale", "layer"])
def test_the_comparison_sees_a_wrong_fold(tiny, facts_of, fault, tmp_path):
    model = tiny("llama")
    ours, adapter = trained(model, facts_of(model), "fedit")
    if fault == "scale":
        factors = {key: (A, 1.01 * B) for key, (A, B) in adapter.factors.items()}
    else:
        factors = {**adapter.factors, (0, "q"): adapter.factors[1, "q"]}
    learned.write(adapter._replace(factors=factors), tmp_path / "adapter")
    assert (
        difference(logits(peft.PeftModel.from_pretrained(model, tmp_path / "adapter")), logits(ours)) > 1e-5
    )
