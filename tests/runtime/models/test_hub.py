"""What is asked of the hub, whose repositories are lists of files here."""

from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
import pytest

from edge_runtime.errors import InputError
from edge_runtime.models import checkpoint, hub
from edge_runtime.models.prepare import prepare

SHARD = "model-00001-of-00001.safetensors"
COMMIT = "0123abcd"
GGUF = [
    "README.md",
    "tiny-Q4_K_M.gguf",
    "tiny-Q8_0.gguf",
    "f16/tiny-00001-of-00002.gguf",
    "f16/tiny-00002-of-00002.gguf",
]


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """repository(files): owner/name with these files; returns its place in the cache, and what is asked of it."""

    def having(files):
        asked, folder = [], tmp_path / "models--owner--name" / "snapshots" / COMMIT

        def download(repository, revision, allow_patterns):
            assert repository == "owner/name"
            folder.mkdir(parents=True, exist_ok=True)
            for name in files:
                if any(fnmatch(name, pattern) for pattern in allow_patterns):
                    (folder / name).parent.mkdir(exist_ok=True)
                    (folder / name).write_text(f'{{"weight_map": {{"x": "{SHARD}"}}}}')
            asked.append((revision, allow_patterns))
            return str(folder)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda *_, **__: files)
        return folder, asked

    return having


@pytest.mark.parametrize(
    ("files", "fetched"),
    [
        (["model.safetensors", checkpoint.INDEX], ["model.safetensors"]),
        ([checkpoint.INDEX, SHARD, "old.safetensors"], [SHARD]),
        (["other.safetensors", *GGUF], ["*.safetensors"]),
    ],
)
def test_the_hub_is_asked_for_the_files_that_are_read(repository, files, fetched):
    folder, asked = repository(files)
    assert hub.fetch("owner/name@main") == folder
    weights = [name for _, patterns in asked for name in patterns if "safetensors" in name]
    assert [name for name in weights if name != checkpoint.INDEX] == list(
        dict.fromkeys(["model.safetensors", *fetched])
    )
    assert [revision for revision, _ in asked] == ["main", COMMIT][: len(asked)]


@pytest.mark.parametrize(
    ("name", "patterns"),
    [
        ("tiny-Q8_0.gguf", ["tiny-Q8_0.gguf"]),
        ("f16/tiny-00001-of-00002.gguf", ["f16/tiny-*-of-00002.gguf"]),
    ],
)
def test_a_gguf_file_is_fetched_by_its_name(repository, name, patterns):
    folder, asked = repository(GGUF)
    path = hub.fetch(f"owner/name/{name}@main")
    assert path == folder / name and asked == [("main", patterns)]
    assert len(list(path.parent.glob("*.gguf"))) == (1 if name in patterns else 2)
    assert hub.id_of(path) == f"owner/name/{name}@{COMMIT}" and hub.id_of(folder) == f"owner/name@{COMMIT}"
    assert hub.is_id(hub.id_of(path))


@pytest.mark.parametrize("source", ["owner/name", "owner/name/tiny.gguf"])
def test_a_repository_of_gguf_files_says_which_can_be_named(repository, source, tmp_path):
    repository(GGUF)
    with pytest.raises(InputError) as caught:
        prepare(source, tmp_path / "models", tmp_path / "cache")
    assert str(caught.value).endswith(
        "name one of its GGUF files, as owner/name/f16/tiny-00001-of-00002.gguf; it has "
        "f16/tiny-00001-of-00002.gguf, tiny-Q4_K_M.gguf, tiny-Q8_0.gguf"
    )


def test_a_repository_without_a_model_is_refused(repository):
    repository(["README.md", "pytorch_model.bin"])
    with pytest.raises(InputError, match=r"has no .safetensors file at its top; nor has it a GGUF file"):
        hub.fetch("owner/name")


@pytest.mark.parametrize(
    ("source", "known"),
    [
        ("owner/name", True),
        ("owner/name@refs/pr/1", True),
        ("owner/name/a.gguf", True),
        ("owner/name/b/a.gguf@main", True),
        ("name", False),
        ("a/b/c", False),
        ("folder/a.gguf", False),
        ("./owner/name", False),
        ("/owner/name/a.gguf", False),
    ],
)
def test_other_sources_are_no_ids(source, known):
    assert hub.is_id(source) == known
    assert hub.id_of(Path(source)) is None
