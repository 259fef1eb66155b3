"""What has a name is whole, whenever the power went."""

import pytest
from edge_broker import files


@pytest.fixture
def synced(monkeypatch, tmp_path):
    """What was made durable, in order, with the names that the scratch folder had by then."""
    seen = []
    really = files.sync

    def sync(path):
        really(path)
        seen.append((path.name, sorted(one.name for one in tmp_path.iterdir())))

    monkeypatch.setattr(files, "sync", sync)
    return seen


def test_the_bytes_of_a_file_are_durable_before_its_name(synced, tmp_path):
    (tmp_path / "fresh").write_bytes(b"new")
    (tmp_path / "name").write_bytes(b"old")
    files.put(tmp_path / "fresh", tmp_path / "name")
    assert (tmp_path / "name").read_bytes() == b"new"
    assert synced == [("fresh", ["fresh", "name"]), (tmp_path.name, ["name"])]


def test_all_that_lies_in_a_folder_is_durable_before_its_name(synced, tmp_path):
    (tmp_path / "fresh" / "inner").mkdir(parents=True)
    (tmp_path / "fresh" / "inner" / "file").write_bytes(b"new")
    files.put(tmp_path / "fresh", tmp_path / "name")
    assert (tmp_path / "name" / "inner" / "file").read_bytes() == b"new"
    assert sorted(synced[:3]) == [("file", ["fresh"]), ("fresh", ["fresh"]), ("inner", ["fresh"])]
    assert synced[3:] == [(tmp_path.name, ["name"])]


def test_a_folder_takes_no_others_place(tmp_path):
    for name in ("fresh", "name"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    with pytest.raises(OSError, match="not empty"):
        files.put(tmp_path / "fresh", tmp_path / "name")
    assert (tmp_path / "name" / "file").read_text() == "name"
