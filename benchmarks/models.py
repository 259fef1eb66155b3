"""Which checkpoints are read, shown with tiny random models: every family, variant and format.

    python -m benchmarks.models            prints the table
    python -m benchmarks.models --write    writes the table to docs/models.md

A model is written in a format and loaded as a trainer loads it, with our operators. Its logits must
equal the truth of the format within TOLERANCE, or the source must be refused.
To add a format, add it to a column of FORMATS.
"""

import argparse
import re
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import gguf
import torch
from edge_kernels import apply
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from benchmarks import gguf_models
from benchmarks.model_cases import CASES, build, ids
from edge_runtime.errors import InputError
from edge_runtime.models import structure, weights
from edge_runtime.models.prepare import prepare

TOLERANCE = 1e-3  # largest difference of a logit
PAGE = Path(__file__).parent.parent / "docs" / "models.md"


class Format(NamedTuple):
    """A way to keep a model in files."""

    write: Callable[[PreTrainedModel, Path], Path]  # into a folder; returns the source
    # the model that the source should give: of the model that was written, and the source
    truth: Callable[[PreTrainedModel, Path], PreTrainedModel]


def tokenizer(folder: Path) -> None:
    """Save a tokenizer of 96 tokens to a folder."""
    vocabulary = {f"w{number}": number for number in range(96)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token="w2").save_pretrained(folder)


def save_folder(model: PreTrainedModel, path: Path) -> Path:
    """Write Hugging Face's layout."""
    tokenizer(path)
    model.save_pretrained(path)
    return path


def by_transformers(model: PreTrainedModel, source: Path) -> PreTrainedModel:
    """What transformers reads of the source."""
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.float32, attn_implementation=model.config._attn_implementation
    )
    return loaded.eval()


def gguf_file(name: str) -> Format:
    """A GGUF file whose matrices are of a kind; its truth is the model with the file's values."""
    kind = gguf.GGMLQuantizationType[name]
    return Format(
        lambda model, path: gguf_models.write(model, path / "model.gguf", kind),
        lambda model, _: gguf_models.rounded(model, kind),
    )


# by column of the table, and by name in the column; those of a column have to agree
FORMATS = {
    "safetensors": {"folder": Format(save_folder, by_transformers)},
    "GGUF": {name: gguf_file(name) for name in ("F16", "Q8_0", "Q4_1", "Q4_K", "Q6_K")},
}


def outcome(family: str, variant: str, column: str, scratch: Path) -> str:
    """`exact`, `refused: REASON`, or `wrong: NUMBER`, of a case in the formats of a column.

    scratch: an empty folder.
    """
    seen = {
        name: _outcome(build(family, variant), format, scratch) for name, format in FORMATS[column].items()
    }
    first, *others = dict.fromkeys(seen.values())
    return f"wrong: {seen}" if others else first


@torch.no_grad()
def _outcome(model: PreTrainedModel, format: Format, scratch: Path) -> str:
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        source = format.write(model, Path(folder))
        try:
            facts = prepare(str(source), scratch, Path(folder, "cache"))
            loaded = weights.load(facts, facts.layers, "float32")
        except InputError as error:
            reason = str(error).replace(str(source.absolute()), "FILE")
            return f"refused: {re.sub('(?<=FILE has )[a-z0-9]+(?=[.])', 'ARCHITECTURE', reason)}"
        apply(loaded, structure.modules(loaded))
        truth = format.truth(model, source)
        apart = float((loaded(ids()).logits - truth(ids()).logits).abs().max())
    return "exact" if apart < TOLERANCE else f"wrong: {apart:.2g}"


def outcomes(family: str, column: str) -> dict[str, str]:
    """The outcome of each variant of a family in a column."""
    with tempfile.TemporaryDirectory() as scratch:
        return {
            variant: outcome(family, variant, column, Path(scratch)) for variant in CASES[family].variants
        }


def markdown(families: Iterable[str]) -> str:
    """The table family by format; a variant that is refused is named, its reason stands below."""
    reasons: list[str] = []
    lines = [f"| family | variants | {' | '.join(FORMATS)} |", "|---|---|" + "---|" * len(FORMATS)]
    for family in families:
        cells = [_cell(outcomes(family, column), reasons) for column in FORMATS]
        lines.append(f"| `{family}` | {', '.join(CASES[family].variants)} | {' | '.join(cells)} |")
    notes = [f"{number}. {reason}" for number, reason in enumerate(reasons, 1)]
    return "\n".join([*lines, "", *notes]).strip() + "\n"


def _cell(seen_by_variant: dict[str, str], reasons: list[str]) -> str:
    """A cell; reasons that are new are added to the list."""
    others: dict[str, list[str]] = {}
    for variant, seen in seen_by_variant.items():
        if seen != "exact":
            others.setdefault(seen, []).append(variant)
    cells = ["exact"] if sum(map(len, others.values())) < len(seen_by_variant) else []
    for seen, variants in others.items():
        if seen not in reasons:
            reasons.append(seen)
        names = "" if len(variants) == len(seen_by_variant) else f" {', '.join(variants)}"
        cells.append(f"{seen.partition(':')[0]}{names} ({reasons.index(seen) + 1})")
    return "; ".join(cells)


def main() -> None:
    """Print the table, or write it to the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.models", description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true")
    text = markdown(CASES)
    if not parser.parse_args().write:
        print(text)  # noqa: T201
        return
    before, _, _ = PAGE.read_text(encoding="utf-8").partition("| family |")
    PAGE.write_text(before + text, encoding="utf-8")


if __name__ == "__main__":
    main()
