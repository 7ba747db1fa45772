"""Output files: refused before any work, and written whole or not at all."""

import gzip
import json
import os
import resource
import signal
import threading
import tracemalloc
from pathlib import Path

import pytest

from crossin_jax import files
from crossin_jax.config import UserError
from crossin_jax.files import check_fields, check_output, check_value, write_whole


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


# ── reading what a user named ────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"a": 1}\n{"a": \n', "row 2: not JSON at column"),
        (b'{"a": 1}\n{"a": "\xe9"}\n', "row 2: byte 0xe9 is not UTF-8"),
        (b'{"a": 1}\n' + b"[" * 100_000, "row 2: nested too deeply"),
    ],
)
def test_a_bad_line_is_named_by_its_row(tmp_path, content, words):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(content)
    with pytest.raises(UserError, match=words):
        list(files.read_json_lines(file))


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_lines_without_text_are_left_out(tmp_path, pack):
    """A byte order mark alone, spaces of any kind and nothing at all are no rows."""
    file = tmp_path / "rows.jsonl"
    file.write_bytes(pack("\ufeff\n\u00a0\n\n1\n".encode()))
    assert list(files.read_json_lines(file)) == [(4, 1)]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no such file; write it again"),
        (b"", "not JSON at column 1"),
        (b'{\n"a": }', "not JSON at line 2, column 6"),
        (b'{\n"a": "\xff"}', "line 2: byte 0xff is not UTF-8"),
        (b"[1]", "holds a list, but a test is an object; write it again"),
        (b"\x1f\x8b nothing", "damaged gzip"),
        (b'{"a": ' + b"9" * 5000 + b"}", "Exceeds the limit"),
        (b'{"a": ' + b"[" * 100 + b"]" * 100 + b"}", "nested too deeply"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
    ],
)
def test_a_bad_file_is_named_with_place_and_remedy(tmp_path, content, words):
    file = tmp_path / "value.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=words) as error:
        files.read_json(file, expect=dict, what="a test", remedy="write it again")
    assert str(file) in str(error.value)


def test_a_relative_path_says_where_it_starts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"^none.json: no such file; paths start at {tmp_path}$"):
        files.read_json("none.json")


@pytest.mark.parametrize(
    "reader", [files.read_json, lambda path: list(files.read_json_lines(path))]
)
def test_a_pipe_or_folder_is_refused_and_not_waited_for(places, reader):
    """A pipe that nobody writes to would be read for ever."""
    with pytest.raises(UserError, match="pipe: a pipe or device; write its content to a file"):
        reader(places / "pipe")
    with pytest.raises(UserError, match="folder: a folder; name a file in it"):
        reader(places / "folder")


def test_depth_is_counted_and_not_brackets(tmp_path):
    file = tmp_path / "value.json"
    file.write_text(json.dumps([[1]] * 1000 + ["[" * 1000]))
    assert len(files.read_json(file)) == 1001
    file.write_text("[" * 100 + "]" * 100)
    assert isinstance(files.read_json(file), list)


def test_a_file_that_unpacks_to_more_than_is_read_is_refused(tmp_path, monkeypatch):
    file = tmp_path / "bomb.json.gz"
    file.write_bytes(gzip.compress(b" " * 3_000_000))
    monkeypatch.setattr(files, "MAX_BYTES", 1 << 20)
    with pytest.raises(UserError, match="bomb.json.gz: above"):
        files.read_json(file)


def test_a_small_file_reserves_little_memory(tmp_path):
    file = tmp_path / "value.json"
    file.write_text("[1]")
    tracemalloc.start()
    assert files.read_json(file) == [1]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20


@pytest.mark.parametrize("text", ["", "https://me:secret@host/x", "a long token of this machine"])
def test_a_text_of_an_outside_file_may_be_anything(text, monkeypatch):
    """Many of its fields are read by other programs only. A setting is judged: it is stored."""
    monkeypatch.setenv("MY_TOKEN", "a long token of this machine")
    check_fields({"name": text, "list": [text]}, {"name": str, "list": list[str]}, "file.json")
    with pytest.raises(UserError, match=r"is empty|password or token"):
        check_value("name", text, str, {})
    with pytest.raises(UserError, match=r"file\.json: name=3 is a int; it takes str"):
        check_fields({"name": 3}, {"name": str}, "file.json")
    with pytest.raises(UserError, match="is not one of a, b"):
        check_fields({"name": text}, {"name": (str, {"choices": ("a", "b")})}, "file.json")
