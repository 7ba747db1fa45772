"""Output files: refused before any work, and written whole or not at all."""

import os
import resource
import signal
import threading
from pathlib import Path

import pytest

from crossin_jax.config import UserError
from crossin_jax.outputs import check_output, write_whole


@pytest.fixture
def places(tmp_path):
    """A folder with a file, a folder, a pipe, and links to a file and to nothing."""
    (tmp_path / "file").write_text("old")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    return tmp_path


@pytest.mark.parametrize("name", ["new.json", "file", "folder/new.json", "link"])
def test_what_can_be_written_passes(places, name):
    """A new file, or one that is replaced; looking changes nothing."""
    before = sorted(places.rglob("*"))
    check_output("--out", places / name)
    assert sorted(places.rglob("*")) == before and (places / "file").read_text() == "old"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("folder", "a folder; name a file in it"),
        ("pipe", "not a regular file"),
        ("absent/new.json", "absent does not exist; make it first"),
        ("file/new.json", "does not exist; make it first"),
    ],
)
def test_what_cannot_be_written_is_refused_with_its_flag(places, name, words):
    """The message names flag, path and remedy."""
    with pytest.raises(UserError, match=words) as told:
        check_output("--out", places / name)
    assert str(told.value).startswith(f"--out={places / name}: ")


def test_devices_are_not_replaced():
    """/dev/null is no file to put another one in the place of."""
    with pytest.raises(UserError, match="--report=/dev/null: not a regular file"):
        check_output("--report", Path("/dev/null"))


def test_a_folder_without_permission_is_refused(places, monkeypatch):
    """Also for those who may write everywhere, here by what the system says."""
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    with pytest.raises(UserError, match="is not writable; choose another"):
        check_output("--out", places / "new.json")


@pytest.mark.parametrize("content", ["é\n", b"\x00\xff", "", "x" * 100_000])
def test_a_file_holds_what_was_written(places, content):
    """Texts as UTF-8, bytes as they are; nothing else stays in the folder."""
    write_whole(places / "file", content)
    raw = content.encode() if isinstance(content, str) else content
    assert (places / "file").read_bytes() == raw
    assert {file.name for file in places.iterdir()} == {"file", "folder", "pipe", "link"}


@pytest.fixture
def small_files():
    """This process may write 1,000 bytes into a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("name", ["file", "new"])
def test_where_writing_is_cut_the_old_file_stays(places, name, small_files):
    """As on a full disk: the error arrives, the old file is whole, and no part of the new stays."""
    before = {file.name for file in places.iterdir()}
    with pytest.raises(OSError, match="File too large"):
        write_whole(places / name, "n" * 5000)
    assert (places / "file").read_text() == "old"
    assert {file.name for file in places.iterdir()} == before


def test_a_reader_sees_one_whole_file_while_several_write(places):
    """Writers do not meet in each other's parts."""
    texts = [letter * 40_000 for letter in "abc"]
    file, stop = places / "file", threading.Event()
    write_whole(file, texts[0])

    def write(text):
        while not stop.is_set():
            write_whole(file, text)

    threads = [threading.Thread(target=write, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    try:
        assert all(file.read_text() in texts for _ in range(200))
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert {part.name for part in places.iterdir()} == {"file", "folder", "pipe", "link"}
