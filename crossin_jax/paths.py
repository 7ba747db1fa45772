"""Paths of this machine and in buckets: `as_path("gs://bucket/runs/x")` has the methods of
`pathlib.Path`.

A bucket has objects and no folders, and it cannot rename. Three rules follow for everything that
writes:

    a file            one put: readers see the old object or the new one
    a folder          written in place; the object that makes it whole comes last, or the object
                      that says that it is unfinished goes last (`marked_folder`)
    a new file only   a put that the bucket refuses where the object exists (`create`)

gs:// goes through the package gcsfs (extra "gcs"), s3:// through s3fs (extra "s3").
"""

import contextlib
import errno
import functools
import glob
import hashlib
import importlib.util
import io
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from etils.epath.gpath import PosixGPath

from crossin_jax.process import cleanup, remove, temporary
from crossin_jax.settings import UserError

PACKAGES = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}  # scheme → (package, extra)
TIMEOUT = 120  # seconds without an answer, after which a request counts as failed and is repeated
ATTEMPTS = 3
UNFINISHED = ".unfinished"  # marks a folder of a bucket that is not whole yet
READ_BYTES = 4 << 20  # of a stream, read at once
WRITE_BYTES = 16 << 20  # of a large object, sent at once
# The libraries whose exceptions mean that a bucket did not do what was asked.
_LIBRARIES = ("gcsfs", "s3fs", "fsspec", "google", "aiohttp", "botocore", "aiobotocore", "requests")


def is_bucket(path: str | os.PathLike) -> bool:
    """Whether a path lies in a bucket."""
    return os.fspath(path).startswith(tuple(f"{scheme}://" for scheme in PACKAGES))


def as_path(path: str | os.PathLike) -> Any:
    """A path of this machine (`pathlib.Path`, with ~ expanded) or in a bucket (`BucketPath`).

    Raises `UserError` where the package for the bucket is not installed.
    """
    if not is_bucket(path):
        return Path(path).expanduser()
    scheme, _, place = os.fspath(path).partition("://")
    package, extra = PACKAGES[scheme]
    if importlib.util.find_spec(package) is None:
        raise UserError(
            f"{path}: needs the package {package}; install it: pip install 'crossin_jax[{extra}]'"
        )
    if not place.strip("/"):
        raise UserError(f"{path}: names no bucket; write {scheme}://BUCKET/FOLDER")
    _configure(scheme)
    return BucketPath(path)


def absolute(path: str | os.PathLike) -> Any:
    """The same place whatever the current folder is, with links followed."""
    return as_path(path).resolve()


class BucketPath(PosixGPath):
    """An object or a prefix of objects in a bucket, with the methods of `pathlib.Path`.

    Faults of the bucket, of the network and of credentials become `OSError` with the path. Requests
    that fail for a moment are repeated by gcsfs and s3fs.
    """

    @property
    def fs(self) -> Any:
        """The file system of fsspec."""
        return _open_filesystem(self.parts[1])

    def expanduser(self) -> "BucketPath":
        return self

    def resolve(self, strict: bool = False) -> "BucketPath":
        return self

    def absolute(self) -> "BucketPath":
        return self

    def _ask(self, what: str, *arguments: Any, **options: Any) -> Any:
        """Calls a method of the file system for this path; a request that stalls is repeated."""
        method = getattr(self.fs, what)
        with _explained(self):
            for _ in range(ATTEMPTS - 1):
                with contextlib.suppress(TimeoutError):
                    return method(str(self), *arguments, **options)
            return method(str(self), *arguments, **options)

    def _info(self) -> dict[str, Any] | None:
        try:
            return self._ask("info")
        except FileNotFoundError:
            return None

    def exists(self) -> bool:
        return self._info() is not None

    def is_dir(self) -> bool:
        return (self._info() or {}).get("type") == "directory"

    def is_file(self) -> bool:
        return (self._info() or {}).get("type") == "file"

    def stat(self) -> Any:
        """Size, and the number of the object's generation in place of times: it changes with every
        put. `content` is a checksum that the bucket keeps."""
        info = self._info()
        if info is None:
            raise FileNotFoundError(errno.ENOENT, "no such object", str(self))
        changed = info.get("LastModified")
        time = int(info.get("generation") or 0) * 1000 or int(
            changed.timestamp() * 1e9 if changed else 0
        )
        content = info.get("md5Hash") or info.get("crc32c") or info.get("ETag") or ""
        return SimpleNamespace(
            st_size=info["size"], st_mtime_ns=time, st_ctime_ns=time, content=content.strip('"')
        )

    def iterdir(self) -> Iterator["BucketPath"]:
        for name in self._ask("ls", detail=False):
            if (child := name.rstrip("/").rpartition("/")[2]) != self.name or "/" not in name:
                yield self / child

    def glob(self, pattern: str) -> Iterator["BucketPath"]:
        """What lies below this prefix and matches; "**/NAME" is NAME at any depth."""
        names = (self / pattern)._ask("glob")
        return (BucketPath(f"{self.parts[1]}://{name}") for name in names)

    def rglob(self, pattern: str) -> Iterator["BucketPath"]:
        return self.glob(f"**/{pattern}")

    def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        """Nothing to make: a bucket has no folders."""

    def rmdir(self) -> None:
        """Nothing to remove: a bucket has no folders."""

    def unlink(self, missing_ok: bool = False) -> None:
        try:
            self._ask("rm_file")
        except FileNotFoundError:
            if not missing_ok:
                raise

    def rmtree(self, missing_ok: bool = False) -> None:
        try:
            self._ask("rm", recursive=True)
        except FileNotFoundError:
            if not missing_ok:
                raise

    def read_bytes(self) -> bytes:
        return self._ask("cat_file")

    def read_range(self, start: int, stop: int) -> bytes:
        """The bytes from `start` to `stop`, fewer where the object ends before."""
        return self._ask("cat_file", start=start, end=stop)

    def read_text(self, encoding: str | None = None) -> str:
        return self.read_bytes().decode(encoding or "utf-8")

    def write_bytes(self, data: bytes) -> int:
        """Replaces the object by one put."""
        self._ask("pipe_file", data)
        return len(data)

    def write_text(self, data: str, encoding: str | None = None, errors: str | None = None) -> int:
        return self.write_bytes(data.encode(encoding or "utf-8", errors or "strict"))

    def create(self, data: bytes) -> None:
        """Writes an object that does not exist yet; `FileExistsError` where it does.

        It may also be raised where this call has written the object and the answer was lost.
        """
        self._ask("pipe_file", data, mode="create")

    def touch(self, mode: int = 0o666, exist_ok: bool = True) -> None:
        self.write_bytes(b"")

    def open(self, mode: str = "r", encoding: str | None = None, **options: Any) -> Any:
        """A stream, read in ranges; what is written appears when the stream is closed."""
        if mode in ("r", "rb"):
            file = io.BufferedReader(_Ranges(self), READ_BYTES)
            return file if mode == "rb" else io.TextIOWrapper(file, encoding or "utf-8", **options)
        return self._ask("open", mode, block_size=WRITE_BYTES)


class _Ranges(io.RawIOBase):
    """An object as a file that is read by ranges."""

    def __init__(self, path: BucketPath):
        self._path, self._size, self._at = path, path.stat().st_size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        stop = min(self._at + len(buffer), self._size)
        data = self._path.read_range(self._at, stop) if self._at < stop else b""
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


@functools.cache
def _configure(scheme: str) -> None:
    """Sets what gcsfs and s3fs read when they are imported or opened, also by Orbax."""
    # Kinds of buckets of which only gcsfs' newest code knows would cost a question at each call.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    # It logs a traceback where requests fail for good; the error that it raises says the same.
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
    import fsspec

    # A listing that is kept would hide what other processes write.
    known = fsspec.config.conf.setdefault(scheme, {})
    known.setdefault("use_listings_cache", False)
    if scheme == "gs":
        known.setdefault("requests_timeout", TIMEOUT)


@functools.cache
def _open_filesystem(scheme: str) -> Any:
    import fsspec

    return fsspec.filesystem(scheme)


@contextlib.contextmanager
def marked_folder(target: BucketPath) -> Iterator[None]:
    """A folder of a bucket that holds a mark while it is written; what is left of a block that
    fails is removed.
    """
    remove(target)  # of a process that was killed
    (target / UNFINISHED).write_text("a program is writing this folder, or was killed meanwhile")
    is_whole = False

    def clean() -> None:
        if not is_whole:
            remove(target)

    with cleanup(clean):
        yield
        (target / UNFINISHED).unlink()
        is_whole = True


def check_finished(folder: BucketPath) -> None:
    """Refuses a folder of a bucket that a program is writing, or that a killed process left."""
    if (folder / UNFINISHED).exists():
        raise UserError(
            f"{folder} is not finished: a program is writing it, or was killed; export it again"
        )


@contextlib.contextmanager
def _explained(path: BucketPath) -> Iterator[None]:
    """Faults of a bucket become `OSError` with path and reason."""
    try:
        yield
    except FileExistsError:
        raise
    except FileNotFoundError:
        raise FileNotFoundError(errno.ENOENT, "no such object or bucket", str(path)) from None
    except Exception as error:
        if (reason := explain(error)) is None:
            raise
        raise OSError(errno.EIO, reason, str(path)) from error


def explain(error: BaseException) -> str | None:
    """What a bucket, the network or the credentials have against a request, in one line; None for a
    fault of another kind.
    """
    if isinstance(error, OSError) and error.filename is not None:
        return None
    is_theirs = type(error).__module__.partition(".")[0] in _LIBRARIES
    if not is_theirs and not isinstance(error, OSError):
        return None
    return (str(error).strip() or type(error).__name__).replace("\n", "; ")[:200]


def find_paths(pattern: str) -> list[Any]:
    """The paths that match a pattern whose only special sign is *, in order."""
    parts = os.fspath(as_path(pattern)).split("*")
    escaped = "*".join(map(glob.escape, parts))
    if not is_bucket(pattern):
        return [Path(path) for path in sorted(glob.glob(escaped))]
    scheme, _, inside = escaped.partition("://")
    start = as_path(f"{scheme}://{pattern.partition('://')[2].partition('/')[0]}")
    with _explained(start):
        names = start.fs.glob(inside)
    return [BucketPath(f"{scheme}://{name}") for name in sorted(names)]


def measure_files(folder: Any) -> dict[str, int]:
    """{path below the folder: bytes} of every file."""
    if not is_bucket(folder):
        return {
            str(file.relative_to(folder)): file.stat().st_size
            for file in folder.rglob("*")
            if file.is_file()
        }
    start = f"{folder}/".partition("://")[2]
    found = folder._ask("find", detail=True)
    return {name.removeprefix(start): info["size"] for name, info in found.items()}


def move(source: Any, target: Any, marker: str = "") -> None:
    """Moves a file or folder within one place. In a bucket each object is copied and then deleted:
    the file `marker`, which makes a folder whole, is deleted first and copied last.
    """
    if not is_bucket(source):
        shutil.move(source, target)
        return
    if source.is_file():
        names = [""]
    else:
        names = sorted(measure_files(source), key=lambda name: (name == marker, name))
    with _explained(source):
        for name in names:
            source.fs.cp_file(f"{source}/{name}".rstrip("/"), f"{target}/{name}".rstrip("/"))
        for name in reversed(names):
            source.fs.rm_file(f"{source}/{name}".rstrip("/"))


class LocalFolder:
    """A folder for libraries that write to this machine only: for one in a bucket, a temporary
    copy that is uploaded.
    """

    def __init__(self, folder: Any):
        self._target, self.is_copy = folder, is_bucket(folder)
        self._temporary = tempfile.TemporaryDirectory() if self.is_copy else None
        self.path = Path(self._temporary.name) if self._temporary else folder

    def upload(self) -> None:
        """Copies every file into the bucket."""
        upload(self.path, self._target)

    def close(self) -> None:
        """Uploads and removes the copy."""
        if self._temporary:
            self.upload()
            self._temporary.cleanup()


def upload(folder: Path, target: Any) -> None:
    """Copies every file of a folder of this machine into a bucket."""
    for name in measure_files(folder):
        with (folder / name).open("rb") as file, (target / name).open("wb") as copy:
            shutil.copyfileobj(file, copy, WRITE_BYTES)


def fetch_files(folder: BucketPath, names: Sequence[str]) -> Path:
    """A folder of this machine with the named files of a prefix, as far as they exist; "NAME/*" is
    a folder's.

    It lies in a cache by content: $CROSSIN_CACHE/objects, else ~/.cache/crossin_jax/objects. Files
    that have not changed are fetched once.
    """
    wanted = {}
    for name in names:
        found = folder.glob(name) if "*" in name else [folder / name]
        for file in found:
            with contextlib.suppress(FileNotFoundError):
                stat = file.stat()
                wanted[str(file)] = (stat.st_size, stat.st_mtime_ns, stat.content)
    key = json.dumps([str(folder), sorted(wanted.items())])
    cache = as_path(os.environ.get("CROSSIN_CACHE", "~/.cache/crossin_jax")) / "objects"
    place = cache / hashlib.sha256(key.encode()).hexdigest()[:16]
    if place.is_dir():
        return place
    cache.mkdir(parents=True, exist_ok=True)
    with temporary(Path(tempfile.mkdtemp(dir=cache, suffix=".part"))) as part:
        for name in wanted:
            copy = part / name.removeprefix(f"{folder}/")
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(as_path(name).read_bytes())
        try:
            os.rename(part, place)
        except OSError:
            if not place.is_dir():  # else another process made it meanwhile
                raise
    return place
