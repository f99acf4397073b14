"""Names of new directories are on disk before anything is written into them."""

import os

from shardes.storage import files


def test_the_parents_of_a_new_directory_are_flushed(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(
        os, "fsync", lambda handle: flushed.append(os.readlink(f"/proc/self/fd/{handle}"))
    )
    files.make_directory(tmp_path / "a" / "b" / "c")
    assert (tmp_path / "a" / "b" / "c").is_dir()
    assert set(flushed) == {str(tmp_path), str(tmp_path / "a"), str(tmp_path / "a" / "b")}
    files.make_directory(tmp_path / "a" / "b" / "c")
    assert len(flushed) == 3
