"""How a process is stopped by signals, and what it removes before it exits.

A handler only sets a flag. Between its steps a phase that can save asks `is_told_to_stop`; outside
of such a phase a thread removes unfinished files and leaves, so that no signal can interrupt a
library in the middle of its work.
"""

import contextlib
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

EXIT_PREEMPTED = 75  # EX_TEMPFAIL: the same command continues
EXIT_INTERRUPTED = 130  # 128 + SIGINT: a person stopped it, so nothing should start it again

_told = threading.Event()
_exit_code = EXIT_PREEMPTED
_is_deferred = False  # a phase asks for the flag and saves before it leaves
_is_leaving = threading.Event()
_watcher: threading.Thread
_before: dict[int, Any] = {}  # the handlers that ours replaced
_cleanups: list[Callable[[], None]] = []


def listen() -> bool:
    """Starts to note SIGTERM, SIGHUP and Ctrl-C; False where this process does so already, or
    cannot.

    A signal that was ignored from the start (`nohup`, a background job) stays ignored.
    """
    if _before or threading.current_thread() is not threading.main_thread():
        return False
    global _exit_code
    _told.clear()
    _exit_code = EXIT_PREEMPTED
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        if signal.getsignal(number) is not signal.SIG_IGN:
            _before[number] = signal.signal(number, lambda number, _: _note(number))
    # Python runs a handler only between two bytecodes of the main thread, which may be compiling
    # for minutes. The wakeup descriptor gets each signal's number at once, and a thread reads it.
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    global _watcher
    _watcher = threading.Thread(target=_watch, args=(reader,), name="signals", daemon=True)
    _watcher.start()
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
    return True


def unlisten() -> None:
    """Restores the signal handlers from before `listen`, and forgets signals that came."""
    if not _before:
        return
    for number, handler in _before.items():
        signal.signal(number, handler)
    _before.clear()
    writer = signal.set_wakeup_fd(-1)
    os.close(writer)
    _watcher.join()  # it reads what is still in the pipe, and then its end
    _told.clear()


def _note(number: int) -> None:
    global _exit_code
    if number == signal.SIGINT:
        _exit_code = EXIT_INTERRUPTED
    _told.set()


def _watch(reader: int) -> None:
    """Acts on signals: leaves at once, except where a phase asks for the flag and this is no second
    Ctrl-C.
    """
    is_second = False
    while number := int.from_bytes(os.read(reader, 1)):
        if number not in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            continue
        _note(number)
        is_keyboard = number == signal.SIGINT
        if not _is_deferred or is_keyboard and is_second:
            name = "the keyboard" if is_keyboard else signal.Signals(number).name
            leave(_exit_code, f"stopped by {name}")
        if is_keyboard:
            is_second = True
            say("stopping: the run saves after this step; press Ctrl-C again to leave at once")
    os.close(reader)


def is_told_to_stop() -> bool:
    """Whether a signal has asked this process to stop."""
    return _told.is_set()


def exit_code() -> int:
    """What to leave with after a signal: 130 after Ctrl-C, else 75."""
    return _exit_code


def check_stop() -> None:
    """Raises `SystemExit` where a signal has asked this process to stop: for the gaps between
    phases that save.
    """
    if _told.is_set():
        raise SystemExit(_exit_code)


@contextlib.contextmanager
def deferred_stop() -> Iterator[None]:
    """The block asks `is_told_to_stop` and saves: until then signals are only noted."""
    global _is_deferred
    is_mine, _is_deferred = listen(), True
    try:
        yield
    finally:
        if is_mine:
            unlisten()
        # After a signal the program is about to exit: a further signal changes nothing.
        _is_deferred = _told.is_set()


def say(message: str) -> None:
    """Writes a line to standard error from any thread, below a progress bar."""
    with contextlib.suppress(OSError):
        os.write(2, f"\n{message}\n".encode())


def leave(code: int, message: str) -> None:
    """Ends this process at once, from any thread: one line, what is half done removed, no
    traceback.
    """
    if _is_leaving.is_set():
        threading.Event().wait()
    _is_leaving.set()
    say(message)
    # Another thread may hold the buffer of standard output forever.
    flush = threading.Thread(target=lambda: sys.stdout and sys.stdout.flush(), daemon=True)
    flush.start()
    flush.join(1.0)
    for clean in reversed(_cleanups.copy()):
        with contextlib.suppress(Exception):  # the others must still be removed
            clean()
    os._exit(code)  # not sys.exit: threads of XLA are still at work


def wait_if_leaving() -> None:
    """Blocks where another thread is ending this process: errors that this causes are not
    reported.
    """
    if _is_leaving.is_set():
        threading.Event().wait()


@contextlib.contextmanager
def cleanup(clean: Callable[[], None]) -> Iterator[None]:
    """Calls `clean` after the block, and also where a signal ends the process in it."""
    _cleanups.append(clean)
    try:
        yield
    finally:
        _cleanups.remove(clean)
        clean()


@contextlib.contextmanager
def temporary(path: Path) -> Iterator[Path]:
    """A file or folder to write before it gets its final name; what is left of it is removed."""
    with cleanup(partial(remove, path)):
        yield path


def remove(path: Path) -> None:
    """Deletes a file or a folder, or nothing; other threads may still be writing into the
    folder.
    """
    for _ in range(20):
        if hasattr(path, "rmtree"):  # in a bucket
            path.rmtree(missing_ok=True)
            return
        if not path.is_dir():
            path.unlink(missing_ok=True)
            return
        shutil.rmtree(path, ignore_errors=True)
