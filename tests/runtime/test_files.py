import errno
import fcntl
import os
import platform
import re
import subprocess
import sys

import pytest

from swinsmt_jax.checks import UserError
from swinsmt_jax.runtime import files

HOLD = """
import sys
from pathlib import Path
from swinsmt_jax.runtime import files
with files.locked(Path(sys.argv[1]), what="the run", remedy="give up"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_file_or_a_folder_appears_whole_and_replaces_what_was_there(tmp_path):
    files.write_json(tmp_path / "a.json", {"b": [1]})
    files.write_json(tmp_path / "a.json", {"b": 2})
    assert (tmp_path / "a.json").read_text() == '{\n "b": 2\n}\n'
    for name in ("old", "new"):
        with files.replacing(tmp_path / "folder") as partial:
            partial.mkdir()
            (partial / name).write_text(name)
            assert partial.name == "folder"
    assert [p.name for p in (tmp_path / "folder").iterdir()] == ["new"]
    assert {p.name for p in tmp_path.iterdir()} == {"a.json", "folder"}


def test_an_error_leaves_the_old_file_and_no_partial_one(tmp_path):
    file = tmp_path / "a.txt"
    files.write_text(file, "old")
    with pytest.raises(ZeroDivisionError), files.replacing(file) as partial:
        partial.write_text("ne")
        raise ZeroDivisionError
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]


def test_a_kill_between_two_folders_leaves_the_new_one(tmp_path):
    def swap(name):
        with files.replacing(tmp_path / "folder") as partial:
            partial.mkdir()
            (partial / name).write_text(name)

    swap("old")
    killed = """
import os, sys
from pathlib import Path
from swinsmt_jax.runtime import files
path, replace = Path(sys.argv[1]), os.replace
os.replace = lambda a, b: os.kill(os.getpid(), 9) if b == path else replace(a, b)
with files.replacing(path) as partial:
    partial.mkdir()
    (partial / "new").write_text("new")
"""
    command = [sys.executable, "-c", killed, tmp_path / "folder"]
    assert subprocess.run(command).returncode == -9
    assert not (tmp_path / "folder").exists()
    files.remove_partial(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]
    assert [p.name for p in (tmp_path / "folder").iterdir()] == ["new"]
    (tmp_path / ".partial-folder-abcdefgh" / "folder").mkdir(parents=True)
    files.remove_partial(tmp_path, of="other")
    assert (tmp_path / ".partial-folder-abcdefgh").exists()
    files.remove_partial(tmp_path, of="folder")  # half-written, and of no use
    assert [p.name for p in (tmp_path / "folder").iterdir()] == ["new"]


def test_content_is_on_the_disk_before_the_name(tmp_path, monkeypatch):
    events = []
    real = {"fsync": os.fsync, "replace": os.replace}
    for name in real:

        def note(*arguments, name=name):
            events.append(name)
            return real[name](*arguments)

        monkeypatch.setattr(os, name, note)
    files.write_text(tmp_path / "a.txt", "new")
    assert events == ["fsync", "replace", "fsync"]


def test_a_file_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    words = "file/a.txt cannot be written: Not a directory; make room or fix"
    with pytest.raises(UserError, match=words):
        files.write_text(tmp_path / "file" / "a.txt", "new")


def test_what_killed_processes_left_is_removed(tmp_path):
    (tmp_path / f"{files.PARTIAL}a").mkdir()
    (tmp_path / f"{files.PARTIAL}b").write_text("")
    (tmp_path / "c").write_text("")
    files.remove_partial(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_a_lock_names_its_holder_and_ends_with_it(tmp_path):
    file = tmp_path / "lock"
    command = [sys.executable, "-c", HOLD, str(file)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        process.stdout.readline()
        for _ in range(2):  # the first refusal leaves the holder's name
            words = rf"the run is in use by a live run \(process {process.pid} on .*up"
            with (
                pytest.raises(UserError, match=words),
                files.locked(file, what="the run", remedy="give up"),
            ):
                pass
        process.kill()
    with files.locked(file, what="the run", remedy="give up"):
        assert file.read_text().startswith(f"process {os.getpid()} on ")


@pytest.fixture
def no_locks(monkeypatch):
    """A file system as Lustre without flock; short leases."""

    def flock(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(files, "LEASE", 0.4)


def hold(file):
    return files.locked(file, what="the run", remedy="give up")


def test_a_file_holds_a_lock_where_the_file_system_has_none(tmp_path, no_locks, caplog):
    file = tmp_path / "lock"
    for _ in range(2):
        with hold(file):
            assert "cannot be locked: its file system has no locks" in caplog.text
            words = (
                rf"in use by a live run \(process {os.getpid()} on {platform.node()}"
            )
            with pytest.raises(UserError, match=words), hold(file):
                pass
        assert not files.lease_of(file).exists()


def test_a_lock_that_nobody_renews_is_taken_over(tmp_path, no_locks):
    file = tmp_path / "lock"
    with hold(file):
        left = files.lease_of(file).read_text()
    left = re.sub("host=.*", "host=elsewhere", left)  # whose processes nobody knows
    files.lease_of(file).write_text(left)
    with hold(file):
        assert f"host={platform.node()}" in files.lease_of(file).read_text()
    for name in (files.lease_of(file), file):
        name.write_text(left)
    claims = []
    while files.Claim.BUSY in claims or not claims:
        with files.claimed(file) as claim:
            claims = [*claims, claim] if claim is files.Claim.BUSY else [claim]
    assert claims == [files.Claim.LEFT]


def test_claims_exclude_each_other_without_locks(tmp_path, no_locks):
    with hold(file := tmp_path / "a"), files.claimed(tmp_path / "b") as claim:
        assert claim is files.Claim.FREE and files.lease_of(file).exists()
    assert not (tmp_path / "b").exists()


def test_paths_of_users_are_made_absolute_and_have_a_name(tmp_path, monkeypatch):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "a" / "b")
    monkeypatch.chdir(tmp_path / "a")
    monkeypatch.setenv("HOME", str(tmp_path))
    for given, found in (
        ("b", "a/b"),
        (".", "a"),
        ("..", "."),
        ("../x", "x"),
        ("b/..", "a"),
        ("../link", "link"),
        ("../link/../c", "a/c"),
        ("~/out", "out"),
        ("~", "."),
    ):
        assert files.absolute(given) == tmp_path / found
    with pytest.raises(UserError, match="~nobody_here/x begins with ~"):
        files.absolute("~nobody_here/x")
