"""Files and folders. Reference: the file system."""

import os
import re
import stat
from contextlib import suppress
from pathlib import Path

import pytest

from sae_lens_multilayer import files
from sae_lens_multilayer.files import (
    check_writable,
    complete_or_absent,
    free_path,
    locked,
    read_json,
    read_tensors,
    save_somewhere,
    write_whole,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def write(path, text="whole"):
    with complete_or_absent(path) as partial:
        (partial / "file").write_text(text)


def write_half(path, error):
    with complete_or_absent(path) as partial:
        (partial / "file").write_text("half")
        raise error


def test_the_hash_of_files_changes_with_their_names_sizes_and_ends(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    assert files.files_hash(None) is None
    assert files.files_hash(tmp_path / "missing") is None
    hashes = [files.files_hash(data)]
    for name, content in [("a", b"text"), ("a", b"texts"), ("a", b"tests"), ("b", b"")]:
        (data / name).write_bytes(content)
        hashes.append(files.files_hash(data))
    assert len(set(hashes)) == 5
    (data / "cache-1.arrow").write_bytes(b"x")
    assert files.files_hash(data) == hashes[-1]
    assert files.files_hash(data / "a") != files.files_hash(data / "b")


def test_folder_appears_when_the_block_ends(tmp_path):
    with complete_or_absent(tmp_path / "new") as partial:
        (partial / "sub").mkdir()
        (partial / "sub" / "file").write_text("whole")
        assert partial.parent == tmp_path  # so that the rename is atomic
        assert not (tmp_path / "new").exists()
    assert names(tmp_path) == ["new"]
    assert (tmp_path / "new" / "sub" / "file").read_text() == "whole"


def test_missing_parents_are_made(tmp_path):
    write(tmp_path / "a" / "b" / "new")
    assert names(tmp_path / "a" / "b") == ["new"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("exists", [False, True])
def test_nothing_is_left_when_the_block_raises(tmp_path, error, exists):
    target = tmp_path / "new"
    if exists:
        target.mkdir()
    with pytest.raises(error):
        write_half(target, error)
    assert names(tmp_path) == (["new"] if exists else [])
    assert target.exists() == exists


def test_nothing_is_left_when_the_disk_fails(tmp_path, monkeypatch):
    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "new")
    assert names(tmp_path) == []


def test_everything_is_flushed_before_the_rename(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(files, "_flush", lambda path: flushed.append(path.name))
    rename = os.replace
    monkeypatch.setattr(
        os, "replace", lambda a, b: (flushed.append("rename"), rename(a, b))
    )
    write(tmp_path / "new")
    assert flushed[0] == "file"
    assert flushed[1].startswith(".partial-")
    assert flushed[2:] == ["rename", tmp_path.name]


def test_an_empty_folder_may_be_filled(tmp_path):
    (tmp_path / "new").mkdir()
    write(tmp_path / "new")
    assert names(tmp_path / "new") == ["file"]


def make_full_folder(path):
    path.mkdir()
    (path / "old").write_text("old")


def make_file(path):
    path.write_text("old")


def make_pipe(path):
    os.mkfifo(path)


@pytest.mark.parametrize("make", [make_full_folder, make_file, make_pipe])
def test_existing_files_are_never_overwritten(tmp_path, make):
    target = tmp_path / "there"
    make(target)
    mode = target.lstat().st_mode
    with pytest.raises(FileExistsError, match="must be a new or an empty folder"):
        write(target)
    with pytest.raises(FileExistsError, match="must be a new or an empty"):
        check_writable(target, "output_path")
    assert names(tmp_path) == ["there"]
    assert target.lstat().st_mode == mode
    if make is make_full_folder:
        assert names(target) == ["old"]
    if make is make_file:
        assert target.read_text() == "old"


def test_a_path_taken_while_writing_is_kept_and_nothing_is_lost(tmp_path):
    def write_while_another_does():
        with complete_or_absent(tmp_path / "a") as partial:
            (partial / "file").write_text("new")
            make_full_folder(tmp_path / "a")

    with pytest.raises(FileExistsError, match=r"has appeared at .*/a; .* saved at"):
        write_while_another_does()
    kept = [name for name in names(tmp_path) if name != "a"]
    assert (tmp_path / "a" / "old").read_text() == "old"
    assert [name[:2] for name in kept] == ["a-"]
    assert (tmp_path / kept[0] / "file").read_text() == "new"


def test_a_path_that_is_taken_is_replaced_by_a_logged_one(tmp_path, caplog):
    target = tmp_path / "report.html"
    assert free_path(target) == target
    assert not caplog.text
    make_file(target)
    path = free_path(target)
    assert path.parent == tmp_path
    assert path.name.startswith("report-")
    assert path.suffix == ".html"
    assert f"saving to {path}" in caplog.text


def test_a_file_that_appears_while_one_is_written_is_kept(tmp_path, monkeypatch):
    flush = files._flush
    monkeypatch.setattr(
        files, "_flush", lambda path: (make_file(tmp_path / "a"), flush(path))
    )
    with pytest.raises(FileExistsError):
        write_whole(tmp_path / "a", "new", replace=False)
    assert {name: (tmp_path / name).read_text() for name in names(tmp_path)} == {
        "a": "old"
    }


def refuse(*args):
    raise PermissionError(1, "Operation not permitted")


@pytest.mark.parametrize("killed_in", ["link", "replace", "unlink", "fsync"])
def test_a_kill_leaves_no_half_file_that_would_prevent_the_next_run(
    tmp_path, monkeypatch, killed_in
):
    for after in (False, True):
        path, original = tmp_path / f"{after}" / "a", getattr(os, killed_in)

        def kill(*args, after=after, original=original):
            # What follows would not happen after a kill.
            monkeypatch.setattr(files.Path, "unlink", lambda *_, **__: None)
            if after:
                original(*args)
            raise KeyboardInterrupt

        with monkeypatch.context() as patched, suppress(KeyboardInterrupt):
            patched.setattr(os, killed_in, kill)
            write_whole(path, "whole", replace=False)
        monkeypatch.undo()
        if not path.exists():
            write_whole(path, "whole", replace=False)
        assert path.read_text() == "whole"


@pytest.mark.parametrize("exists", [False, True])
def test_a_new_file_needs_no_hard_links(tmp_path, monkeypatch, exists):
    monkeypatch.setattr(os, "link", refuse)
    if exists:
        make_file(tmp_path / "a")
        with pytest.raises(FileExistsError):
            write_whole(tmp_path / "a", "whole", replace=False)
    else:
        write_whole(tmp_path / "a", "whole", replace=False)
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_text() == ("old" if exists else "whole")


def test_a_folder_that_is_kept_beside_a_taken_path_is_saved_once(tmp_path, caplog):
    path, calls = tmp_path / "result", []

    def save(path):
        calls.append(path)
        with complete_or_absent(path) as folder:
            (folder / "file").write_text("whole")
            make_full_folder(path)

    kept = save_somewhere(path, save, tmp_path / "fallback")
    assert calls == [path] != [kept]
    assert (kept / "file").read_text() == "whole"
    assert str(kept) in caplog.text
    assert not (tmp_path / "fallback").exists()


@pytest.mark.parametrize("save", [write, lambda p: write_whole(p, "whole", False)])
@pytest.mark.parametrize("make", [make_full_folder, make_file, None])
@pytest.mark.parametrize("n_failures", [0, 1, 2, 4])
def test_what_is_saved_replaces_nothing_and_is_not_lost(
    tmp_path, monkeypatch, save, make, n_failures
):
    for name in ("there", "fallback", "temporary", "working"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    monkeypatch.chdir(tmp_path / "working")
    path, calls = tmp_path / "there/result", []
    if make:
        make(path)
    before = sorted(tmp_path.rglob("*"))

    def save_later(path):
        calls.append(path)
        if len(calls) <= n_failures:
            # `torch.save` raises RuntimeError.
            raise (OSError, RuntimeError)[len(calls) % 2]("disk is full")
        save(path)

    def new():
        found = [p for p in tmp_path.rglob("*") if p.is_file() and p not in before]
        return [p.read_text() for p in found]

    if n_failures == 0:
        kept = save_somewhere(path, save_later, tmp_path / "fallback")
        assert kept.parent == path.parent
        assert (kept == path) == (make is None)
    else:
        with pytest.raises(OSError, match="disk is full") as info:
            save_somewhere(path, save_later, tmp_path / "fallback")
        kept = re.search(r"is saved at (.*)\.$", str(info.value))
        assert bool(kept) == (n_failures < 4)
        assert kept is None or Path(kept[1]).exists()
    assert new() == ["whole"] * (n_failures < 4)
    assert set(before) <= set(tmp_path.rglob("*"))


def test_a_folder_is_locked_for_one_process_at_a_time(tmp_path):
    with (
        locked(tmp_path / "new"),
        pytest.raises(BlockingIOError, match=r"Another process.*new"),
        locked(tmp_path / "new"),
    ):
        pass
    with locked(tmp_path / "new"):
        pass


@pytest.mark.parametrize("content", ["", "{", "\x00"])
def test_invalid_json_is_an_error_that_names_the_file(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=r"a\.json must be .*JSON"):
        read_json(tmp_path / "a.json")
    with pytest.raises(ValueError, match=r"a\.json must be safetensors"):
        read_tensors(tmp_path / "a.json")


def test_a_second_write_does_not_replace_the_first(tmp_path):
    write(tmp_path / "new", "first")
    with pytest.raises(FileExistsError, match="so that nothing is overwritten"):
        write(tmp_path / "new", "second")
    assert (tmp_path / "new" / "file").read_text() == "first"


@pytest.mark.parametrize("target_exists", [True, False])
def test_a_link_to_an_empty_or_missing_folder_is_followed(tmp_path, target_exists):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    if target_exists:
        (scratch / "real").mkdir()
    (tmp_path / "link").symlink_to(scratch / "real")
    check_writable(tmp_path / "link", "output_path")
    write(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert names(tmp_path / "link") == ["file"]
    assert names(scratch) == ["real"]


def test_a_relative_path_starts_at_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_writable("runs/new", "output_path")
    assert names(tmp_path) == []  # a check leaves nothing behind
    write("runs/new")
    write("plain")
    assert names(tmp_path) == ["plain", "runs"]


def test_working_folder_itself_may_be_the_target(tmp_path, monkeypatch):
    target = tmp_path / "here"
    target.mkdir()
    monkeypatch.chdir(target)
    check_writable(".", "output_path")
    write(".")
    assert names(tmp_path) == ["here"]
    assert names(target) == ["file"]


def test_a_change_of_the_working_folder_in_the_block_does_no_harm(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    with complete_or_absent("new") as partial:
        monkeypatch.chdir(tmp_path / "elsewhere")
        (partial / "file").write_text("whole")
    assert names(tmp_path) == ["elsewhere", "new"]


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o755), (0o077, 0o700)])
def test_folder_has_the_mode_that_mkdir_would_give(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        write(tmp_path / "new")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == mode


def test_a_path_below_a_file_cannot_be_written(tmp_path):
    make_file(tmp_path / "file")
    for path in (tmp_path / "file" / "x", tmp_path / "file" / "x" / "y"):
        with pytest.raises(
            NotADirectoryError, match="`checkpoint_path` must be a path that can be"
        ):
            check_writable(path, "checkpoint_path")
    with pytest.raises(OSError, match=r"`output_path` must be a path.*/dev/null/x"):
        check_writable("/dev/null/x", "output_path")


def test_a_folder_without_permission_cannot_be_written(tmp_path, monkeypatch):
    # Permissions do not hold for root, so the system's answer is played.
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(files.tempfile, "TemporaryDirectory", refuse)
    with pytest.raises(PermissionError, match=r"`output_path` must be.*denied") as info:
        check_writable(tmp_path / "new", "output_path")
    assert info.value.errno == 13
    assert info.value.filename == str(tmp_path / "new")


def test_a_name_that_is_too_long_cannot_be_written(tmp_path):
    with pytest.raises(OSError, match="File name too long"):
        check_writable(tmp_path / ("x" * 300), "output_path")


def test_a_mount_point_cannot_be_replaced(tmp_path, monkeypatch):
    # Nothing can be renamed onto one.
    (tmp_path / "disk").mkdir()
    monkeypatch.setattr(files.Path, "is_mount", lambda path: path.name == "disk")
    with pytest.raises(FileExistsError, match="root of a file system"):
        check_writable(tmp_path / "disk", "output_path")
    check_writable(tmp_path / "disk" / "new", "output_path")
