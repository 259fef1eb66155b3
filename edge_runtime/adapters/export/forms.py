"""The forms that an adapter is exported in, each opened in the tool that it is for before it is there.

    peft           adapter_config.json, ...; base/ where PEFT has no folder of the base as trained
    gguf           adapter.gguf; base.gguf of a slice
    merged         the base as a folder in Hugging Face's layout, with the adapter in its weights
    merged-gguf    model.gguf, the same as a GGUF file
    onnx           onnx.py

The label head and its labels lie beside each, if there are any. A folder is written beside its
place, and gets its name once a tool has computed with it what the trainer computes.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, TypeAlias, get_args

from edge_broker import files

from edge_runtime.adapters.export import (
    Form,
    check,
    checkpoint,
    gguf_adapter,
    gguf_model,
    onnx_form,
    tools,
)
from edge_runtime.adapters.export.check import EXACT, ROUGH, ROUNDED, Outputs, Prompts
from edge_runtime.adapters.export.gguf_model import Format
from edge_runtime.adapters.learned import Learned, write, write_head
from edge_runtime.errors import InputError
from edge_runtime.models import weights
from edge_runtime.models.facts import Facts
from edge_runtime.models.prepare import prepare
from edge_runtime.state import scratch

# formats of weights that a form may be asked for; the first is the default, None: the base's own
WEIGHTS: dict[Form, tuple[str | None, ...]] = {
    "merged-gguf": (None, *get_args(Format)),
    "onnx": onnx_form.WEIGHTS,
}


# packages that open a form again, and the extra that they come with
TOOLS: dict[Form, tuple[str, str]] = {
    "peft": ("peft", "export"),
    "gguf": ("xllamacpp", "export"),
    "merged-gguf": ("xllamacpp", "export"),
    "onnx": ("onnxruntime", "serve"),
}


# forms whose tool reads a few layers at a time; the others' hold the whole base
PIECEWISE: tuple[Form, ...] = ("gguf", "merged-gguf")


# what llama.cpp tells by the number of a layer or of all (load_arch_hparams in its src/models/*.cpp)
DERIVED = {
    "layer_types": "which layers have a sliding window",
    "query_pre_attn_scalar": "the scale of attention's scores",
}


Tell: TypeAlias = Callable[[str], object]


class Export(NamedTuple):
    """What is written, and where."""

    learned: Learned  # with its base at hand
    part: Path  # folder to write to
    out: Path  # the folder's name in the end
    format: Any  # of the weights that are written, one of WEIGHTS
    prompts: Prompts
    tell: Tell


def export(
    form: Form, learned: Learned, out: Path, format: str | None = None, tell: Tell = lambda _: None
) -> None:
    """Write an export.

    Args:
        learned: with its base at hand.
        format: of the weights that are written; None: the form's own.
        tell: called with a few words when a stage begins, each of which may take minutes.

    Raises:
        InputError: the folder exists, the base cannot be read or is too large for this machine, or
            the form does not fit the base.
        EdgeError: the tool does not compute what the trainer computes. Nothing is left behind.
    """
    if out.exists():
        raise InputError(f"{out} exists: give --out a folder that does not")
    formats = WEIGHTS.get(form, (None,))
    if format is not None and format not in formats:
        known = ", ".join(filter(None, formats)) or "none"
        raise InputError(f"--weights is {format}, but formats that --to {form} takes are: {known}")
    package, extra = TOOLS.get(form, ("transformers", "agent"))
    if find_spec(package) is None:
        raise InputError(
            f"the package {package}, which opens the export again, is not installed: in a clone of Edge Runtime, run pip "
            f"install '.[{extra}]'"
        )
    check.require_memory(learned.facts, 1 if form in PIECEWISE else len(learned.layers))
    tell(f"writing {out}")
    out, prompts = out.absolute(), check.prompts(learned.facts.vocabulary)
    # no other export to the same place writes there, and nobody's files have the name
    with scratch(out) as folder:
        part = folder / "export"
        FORMS[form](Export(learned, part, out, format or formats[0], prompts, tell))
        write_head(learned, part)
        files.put(part, out)


def _peft(job: Export) -> None:
    learned, inner = job.learned, job.part / "base"
    folder = Path(learned.facts.weights)
    is_whole = not learned.sliced and _has_plain_weights(folder)
    write(learned, job.part, base=None if is_whole else str(job.out / inner.name))
    checkpoint.copy_tokenizer(learned, job.part)
    if not is_whole:
        checkpoint.write(learned, inner, merged=False)
    truth = _truth(job, "PEFT")
    outputs = tools.peft(job.part, folder if is_whole else inner, job.prompts)
    check.require(outputs, truth, ROUNDED if _is_gguf(learned) else EXACT, "PEFT")


def _gguf(job: Export) -> None:
    learned, base = job.learned, _gguf_file(job.learned)
    job.part.mkdir(parents=True)
    if learned.sliced:
        source, base = base, job.part / "base.gguf"
        gguf_model.write(learned, source, base, merged=False)
        with _read_again(learned, base):
            pass
    adapter = job.part / "adapter.gguf"
    gguf_adapter.write(learned, adapter)
    gguf_adapter.require(learned, adapter)
    truth = _truth(job, "llama.cpp")
    outputs = tools.llama_cpp(base, adapter, learned.facts.vocabulary, job.prompts)
    check.require(Outputs(*outputs), truth, ROUGH, "llama.cpp")


def _merged(job: Export) -> None:
    checkpoint.write(job.learned, job.part, merged=True)
    truth = _truth(job, "transformers")
    outputs = Outputs(truth.plain, tools.transformers(job.part, job.prompts))
    _require_adapter(outputs, truth, "weights of the base's precision", "keep it apart with --to peft")


def _merged_gguf(job: Export) -> None:
    learned, model = job.learned, job.part / "model.gguf"
    source = _gguf_file(learned)
    job.part.mkdir(parents=True)
    gguf_model.write(learned, source, model, merged=True, format=job.format)
    truth = _truth(job, "llama.cpp")
    with _read_again(learned, model) as facts:  # without llama.cpp's rounding of activations
        read = check.logits(check.loaded(facts, facts.layers), job.prompts)
    instead = "merge with --weights f16, or keep it apart with --to gguf or --to peft"
    _require_adapter(Outputs(truth.plain, read), truth, f"weights of {source.name}'s formats", instead)
    (outputs,) = tools.llama_cpp(model, None, learned.facts.vocabulary, job.prompts)
    check.require_near(outputs, read, ROUGH, "llama.cpp")


def _onnx(job: Export) -> None:
    from edge_runtime.adapters.export import onnx  # its packages are for those who serve

    onnx.to_onnx(job.learned, job.format, job.part)


def _truth(job: Export, tool: str) -> Outputs:
    """The trainer's logits; the tool's are taken after this."""
    job.tell("computing the trainer's logits")
    truth = check.trainer(job.learned, job.prompts)
    job.tell(f"opening the export in {tool}, to compare its logits")
    return truth


def _require_adapter(outputs: Outputs, truth: Outputs, where: str, instead: str) -> None:
    """Raise InputError where a merged model has lost the adapter."""
    found = check.difference(outputs, truth)
    if not found <= ROUGH:
        raise InputError(
            f"the adapter is lost in {where}: {found:.0%} of what it changes in the logits differ after rounding, and at "
            f"most {ROUGH:.0%} may; {instead}"
        )


@contextmanager
def _read_again(learned: Learned, file: Path) -> Iterator[Facts]:
    """A written GGUF model's facts, while inside.

    Raises:
        InputError: llama.cpp computes the slice in another way than the whole model, as it tells some
            settings by the number of layers; short prompts do not show all of them.
    """
    with TemporaryDirectory() as cache:
        facts = prepare(str(file), file.parent, Path(cache))
        numbers = tuple(range(facts.layers))
        pairs = ((facts, numbers), (learned.facts, learned.layers))
        written, needed = (weights.configuration(*pair).get_text_config().to_dict() for pair in pairs)
        for key in sorted(needed.keys() - {"_name_or_path"}):
            if written.get(key) != needed[key]:
                raise InputError(
                    f"llama.cpp tells {DERIVED.get(key, key)} by the number of a layer or of all, and would compute the "
                    f"slice of {facts.layers} of {learned.facts.layers} layers in another way than it was trained ({key}): "
                    "export with --to peft or --to merged"
                )
        yield facts


def _has_plain_weights(base: Path) -> bool:
    """Whether the base is a folder that transformers loads with the weights that were trained on."""
    config = base / "config.json"
    return config.exists() and "quantization_config" not in json.loads(config.read_text(encoding="utf-8"))


def _is_gguf(learned: Learned) -> bool:
    return Path(learned.facts.weights).suffix == ".gguf"


def _gguf_file(learned: Learned) -> Path:
    gguf_adapter.architecture(learned.facts)
    if not _is_gguf(learned):
        raise InputError(
            f"llama.cpp needs the base as a GGUF file, and {learned.facts.weights} is a folder: make the file with "
            "llama.cpp's convert_hf_to_gguf.py, and give it with --base"
        )
    return Path(learned.facts.weights)


FORMS: dict[Form, Callable[[Export], None]] = {
    "peft": _peft,
    "gguf": _gguf,
    "merged": _merged,
    "merged-gguf": _merged_gguf,
    "onnx": _onnx,
}
