"""Where processes keep what they make, also for users without a home."""

from pathlib import Path

import pytest

from edge_runtime.errors import InputError
from edge_runtime.planning import processes


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    for name in ("EDGE_RUNTIME_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("variable", "folder"),
    [("EDGE_RUNTIME_CACHE", ""), ("XDG_CACHE_HOME", "edge-runtime"), ("HOME", ".cache/edge-runtime")],
)
def test_the_cache_is_where_a_variable_says(monkeypatch, tmp_path, variable, folder):
    monkeypatch.setenv(variable, str(tmp_path / "given"))
    assert processes.cache_folder() == tmp_path / "given" / folder
    assert processes.cache_folder().is_dir()


def test_a_cache_that_cannot_be_made_names_the_variable(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("EDGE_RUNTIME_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(InputError, match=r"Not a directory: .*; set EDGE_RUNTIME_CACHE to a folder"):
        processes.cache_folder()


def test_libraries_without_a_home_keep_their_caches_in_ours(monkeypatch, tmp_path):
    monkeypatch.setenv("EDGE_RUNTIME_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", "/nowhere")
    assert processes.environment()["HOME"] == str(tmp_path / "cache")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert processes.environment()["HOME"] == str(tmp_path)
    assert Path(processes.environment()["HOME"]).is_dir()


def test_what_a_process_prints_is_utf8_whatever_the_locale(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PYTHONIOENCODING", "iso-8859-1")
    file = tmp_path / "names.json"
    file.write_text('"äß模型"\n', encoding="utf-8")
    printed = processes.output(["json.tool", "--no-ensure-ascii", str(file)], 60, InputError)
    assert printed.decode() == '"äß模型"\n'
