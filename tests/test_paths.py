"""Paths in buckets against storage on loopback: the same methods as on a disk, requests that fail,
and what a user is told.
"""

import asyncio
import gzip
import json
import types
import urllib.request

import pytest

from crossin_jax import files, paths
from crossin_jax.config import UserError
from crossin_jax.paths import BucketPath, as_path


@pytest.fixture(params=["gs", "s3", "disk"])
def folder(request, storage, tmp_path):
    """A new folder in each kind of place."""
    if request.param == "disk":
        return tmp_path
    return as_path(f"{request.param}://tests/{tmp_path.name}")


@pytest.fixture
def impatient(monkeypatch):
    """gcsfs repeats a request at once instead of after seconds."""
    as_path("gs://tests")  # before gcsfs is imported
    short = types.SimpleNamespace(sleep=lambda seconds: asyncio.sleep(0.01))
    monkeypatch.setattr("gcsfs.retry.asyncio", short)


def test_a_bucket_does_what_a_folder_does(folder):
    (folder / "a").mkdir(parents=True)
    files.write_whole(folder / "a/x.txt", "één")
    files.write_whole(folder / "a/x.txt", "två")
    files.write_whole(folder / "a/y.bin", b"\0\1\2\3")
    (folder / "a/b").mkdir()
    (folder / "a/b/z.json").write_text("{}")
    assert (folder / "a/x.txt").read_text("utf-8") == "två"
    assert sorted(path.name for path in (folder / "a").iterdir()) == ["b", "x.txt", "y.bin"]
    assert [path.name for path in (folder / "a").glob("*.txt")] == ["x.txt"]
    assert [path.name for path in folder.rglob("z.json")] == ["z.json"]
    assert (folder / "a").is_dir() and not (folder / "a").is_file()
    assert (folder / "a/y.bin").is_file() and not (folder / "a/y.bin").is_dir()
    assert not (folder / "a/none").exists() and not (folder / "a/x").exists()
    assert (folder / "a/y.bin").stat().st_size == 4
    sizes = {"x.txt": 4, "y.bin": 4, "b/z.json": 2}
    assert paths.measure_files(folder / "a") == sizes
    paths.move(folder / "a", folder / "c")
    assert paths.measure_files(folder / "c") == sizes and not (folder / "a/x.txt").exists()
    with (folder / "c/y.bin").open("rb") as file:
        file.seek(1)
        assert file.read(2) == b"\1\2"
    with pytest.raises(FileNotFoundError, match="gone"):
        (folder / "gone").read_bytes()
    (folder / "c/x.txt").unlink()
    (folder / "c/x.txt").unlink(missing_ok=True)
    assert "x.txt" not in paths.measure_files(folder / "c")
    assert str(folder / "c") == f"{folder}/c" and folder.resolve() == folder


def test_users_files_are_read_from_everywhere(folder):
    rows = [{"id": i, "text": "ß" * i} for i in range(3)]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (folder / "rows.jsonl").write_bytes(lines)
    (folder / "rows.jsonl.gz").write_bytes(gzip.compress(lines))
    for name in ("rows.jsonl", "rows.jsonl.gz"):
        assert [row for _, row in files.read_json_lines(folder / name)] == rows
        assert [row for _, row in files.read_json_lines(str(folder / name))] == rows
    with pytest.raises(UserError, match=r"none\.json: no such file; bring it$"):
        files.read_json(folder / "none.json", remedy="bring it")
    (folder / "cut.gz").write_bytes(gzip.compress(lines)[:-9])
    with pytest.raises(UserError, match=r"cut\.gz: damaged gzip"):
        files.read_bytes(folder / "cut.gz")
    found = [path.name for path in paths.find_paths(f"{folder}/*.jsonl")]
    assert found == ["rows.jsonl"]


def test_lines_are_in_the_file_after_a_flush_and_go_on(folder, monkeypatch):
    file = folder / "metrics.jsonl"
    for word in ("a", "b"):
        lines = files.Lines(file)
        lines.write(word)
        lines.flush()
        assert file.read_text().endswith(word + "\n")
        lines.close()
    assert file.read_text() == "a\nb\n"
    monkeypatch.setattr(files, "PUT_SECONDS", 0)
    lines = files.Lines(file)
    lines.write("c")
    assert file.read_text() == "a\nb\nc\n"
    lines.close()


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_only_one_of_two_puts_creates_an_object(storage, scheme):
    file = as_path(f"{scheme}://tests/created.{scheme}")
    file.create(b"first")
    with pytest.raises(FileExistsError):
        file.create(b"second")
    assert file.read_bytes() == b"first"


@pytest.mark.parametrize("kind", ["503", "cut", "drop", "stall"])
def test_a_request_that_fails_is_repeated(storage, impatient, kind, monkeypatch):
    file = as_path(f"gs://tests/faults/{kind}")
    if kind == "stall":
        monkeypatch.setattr(file.fs, "requests_timeout", 0.3)
    with storage.failing(
        "503" if kind == "cut" else kind, lambda method, _: method == "POST"
    ) as put:
        file.write_bytes(b"0123456789" * 100)
    with storage.failing(kind, lambda method, path: kind in path and method == "GET", 2) as get:
        assert file.read_range(10, 20) == b"0123456789"
    assert (put.hits, get.hits) == (1, 2)


def test_a_bucket_that_never_answers_is_named_in_one_line(storage, impatient, caplog):
    file = as_path("gs://tests/faults/busy")
    with (
        storage.failing("503", lambda method, path: "busy" in path, 99),
        pytest.raises(UserError, match=r"^gs://tests/faults/busy: cannot be read \(.*503\)$"),
    ):
        files.read_bytes(file)
    assert not [record for record in caplog.records if record.name == "gcsfs"]
    with pytest.raises(OSError, match="no such object or bucket: 'gs://nobucket/x'"):
        as_path("gs://nobucket/x").write_bytes(b"")


def test_what_another_process_writes_is_seen_at_once(storage):
    """Another process is a client of its own, which this one's cannot know of."""
    folder = as_path("gs://tests/seen")
    (folder / "a").write_text("a")
    assert [path.name for path in folder.iterdir()] == ["a"]
    url = f"{storage.url}/upload/storage/v1/b/tests/o?uploadType=media&name=seen%2Fb"
    urllib.request.urlopen(urllib.request.Request(url, b"b", method="POST")).close()
    assert sorted(path.name for path in folder.iterdir()) == ["a", "b"]
    assert paths.measure_files(folder) == {"a": 1, "b": 1}


def test_files_are_fetched_once_while_they_do_not_change(storage, tmp_path, monkeypatch):
    monkeypatch.setenv("CROSSIN_CACHE", str(tmp_path))
    folder = as_path("gs://tests/fetched")
    for name in ("a.json", "more/b.txt", "other"):
        (folder / name).write_text(name)
    names = ("a.json", "absent", "more/*")
    first = paths.fetch_files(folder, names)
    assert paths.measure_files(first) == {"a.json": 6, "more/b.txt": 10}
    storage.seen.clear()
    assert paths.fetch_files(folder, names) == first
    assert not [path for _, path, _ in storage.seen if "alt=media" in path]
    (folder / "a.json").write_text("{}")
    second = paths.fetch_files(folder, names)
    assert second != first and (second / "a.json").read_text() == "{}"


@pytest.mark.parametrize(
    ("scheme", "package", "extra"), [("gs", "gcsfs", "gcs"), ("s3", "s3fs", "s3")]
)
def test_a_missing_package_is_named(monkeypatch, scheme, package, extra):
    monkeypatch.setattr(paths.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError) as error:
        as_path(f"{scheme}://bucket/x")
    assert str(error.value) == (
        f"{scheme}://bucket/x: needs the package {package}; install it: "
        f"pip install 'crossin_jax[{extra}]'"
    )


def test_paths_that_are_no_buckets(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert as_path("~/x") == tmp_path / "x"
    assert not isinstance(as_path("gs:/x"), BucketPath)
    with pytest.raises(UserError, match="names no bucket"):
        as_path("gs://")
