"""The families' table: every row has a case, and no family is named elsewhere in the product."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import edge_broker
import edge_kernels
import edge_profiles
import pytest
from family_cases import CASES
from torch import nn
from transformers.pytorch_utils import Conv1D

import edge_runtime
from edge_runtime.errors import InputError
from edge_runtime.models import families, gguf_tokenizer, structure
from edge_runtime.models.families import FAMILIES, family_of

PACKAGES = [Path(next(iter(of.__path__))) for of in (edge_runtime, edge_kernels, edge_broker, edge_profiles)]
PROGRAM = r"llama[._]cpp"  # not a family's name
# words that name a family, and why their room or file may use them
ALLOWED = {
    # the baseline is measured with a model of almost nothing, which has to be of some family
    "trainer": {"LlamaConfig", "LlamaForCausalLM"},
    # names in the library of that program
    "llama_cpp": {"llama_flash_attn_type", "LLAMA_FLASH_ATTN_TYPE_DISABLED"},
    # GGUF files name tokenizers, and ways to split a text, after the first model that had them
    # a way to scale rotary positions has the name of the family that had it first
    "configuration": {"llama3"},
    "gguf_tokenizer": {"gpt2", "llama", *gguf_tokenizer.SPLITS},
}


def family_names():
    stems = {
        re.sub(r"(_text|\d+)$", "", re.sub("_text$", "", name)) for row in FAMILIES for name in row.types
    }
    return re.compile(rf"(?<![a-z])({'|'.join(sorted(stems))})(?![a-z])", re.IGNORECASE)


def code_words(source):
    """Names, arguments, imports and strings of a file's code, without its documentation."""
    tree = ast.parse(source)
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        for field in ("id", "attr", "arg", "name", "module"):
            if isinstance(word := getattr(node, field, None), str):
                yield node, word
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            yield node, node.value


def named_in(source, allowed=()):
    def apart(word):
        """LlamaConfig: Llama Config. llama.cpp is a program."""
        return re.sub(r"([a-z0-9])([A-Z])", r"\1 \2", re.sub(PROGRAM, "", word))

    return [
        f"{node.lineno}: {word}"
        for node, word in code_words(source)
        if family_names().search(apart(word)) and word not in allowed
    ]


def test_every_row_has_a_case_and_every_case_a_row():
    assert [row.types[0] for row in FAMILIES] == list(CASES)


def test_no_type_and_no_class_prefix_is_listed_twice():
    for values in ([name for row in FAMILIES for name in row.types], [row.classes for row in FAMILIES]):
        assert len(values) == len(set(values))


def test_no_family_is_named_outside_the_table():
    named = {}
    for package in PACKAGES:
        for path in sorted(package.rglob("*.py")):
            allowed = ALLOWED.get(path.parent.name, ALLOWED.get(path.stem, ()))
            lines = named_in(path.read_text(encoding="utf-8"), allowed)
            if lines and path != Path(families.__file__):
                named[str(path)] = lines
    assert named == {}


@pytest.mark.parametrize(
    "code",
    [
        'UNGATED = ("gpt2", "phi")',
        'OFFSETS = {"LlamaRMSNorm": 0.0}',
        "from transformers import Qwen2Config",
        'def f(x):\n    "Of x."\n    return x == "gemma3_text"',
        "import transformers.models.mistral as m",
    ],
)
def test_the_search_sees_a_family_that_is_named(code):
    assert len(named_in(code)) >= 1
    assert named_in(f'"""{code.replace(chr(34), chr(39))}"""\nphilosophy = "philanthropy"') == []


def test_an_allowed_place_still_names_a_family():
    for place in ALLOWED:
        files = [path for path in PACKAGES[0].rglob("*.py") if place in (path.parent.name, path.stem)]
        assert any(named_in(path.read_text(encoding="utf-8")) for path in files), place


def test_an_unknown_type_is_refused_with_the_known_ones():
    known = ", ".join(name for row in FAMILIES for name in row.types)
    with pytest.raises(InputError, match=f"models of type mamba are not supported; known: {known}"):
        family_of("mamba")


def test_reading_the_table_imports_no_torch():
    code = (
        "import sys, edge_runtime.models.families; sys.exit(not {'torch', 'numpy'}.isdisjoint(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


@pytest.mark.parametrize("family", CASES)
def test_every_linear_layer_of_a_block_has_its_role_and_widths(tiny, facts_of, family):
    model, case = tiny(family), CASES[family]
    facts, row = facts_of(model), structure.family(model)
    assert list(facts.linears.items()) == list(case.linears.items())
    assert (facts.layers, facts.hidden, facts.heads, facts.vocabulary, facts.positions) == (4, 32, 4, 96, 64)
    for block in structure.blocks(model):
        layers = [module for module in block.modules() if isinstance(module, (nn.Linear, Conv1D))]
        assert list(structure.linears(block, row).values()) == layers
    assert {role: path for role, path in row.linears.items() if not path.endswith(case.names[role])} == {}


def test_a_block_that_lacks_a_linear_layer_is_refused_by_name(tiny):
    model = tiny("llama")
    block = structure.blocks(model)[0]
    del block.mlp.up_proj
    with pytest.raises(InputError, match=r"another LlamaDecoderLayer than is known: .*up_proj"):
        structure.widths(block, structure.family(model))
