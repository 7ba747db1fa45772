"""The roll call: process 0 hears from every process before JAX connects them, and names those that
do not come.

JAX's own start waits for all processes and, when its time is over, aborts without a word about who
was missing. The call uses the coordinator's port before JAX does, so no other port has to be open
between the hosts.

The connections of the roll call stay open for the whole run (`Watch`): they say at once which
process was killed, and after a while which one is silent. JAX would abort with a C++ stack, or wait
forever in a collective.

    process 1 ──┐
    process 2 ──┼── process 0      each side sends a beat; process 0 passes on who was lost
    process 3 ──┘
"""

import contextlib
import dataclasses
import json
import select
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from absl import flags

from crossin_jax.config import UserError
from crossin_jax.process import EXIT_INTERRUPTED, EXIT_PREEMPTED, leave

PATIENCE = 10.0  # seconds for one message, over the deadline where need be
GRACE = 5.0  # seconds to end by oneself, after another process has ended with an error


@dataclasses.dataclass(frozen=True)
class Place:
    """This process among all; `names` holds the host of every process where the cluster says so."""

    coordinator: str
    num_processes: int
    process_id: int
    names: tuple[str, ...] = ()

    def name(self, process: int, host: str | None = None) -> str:
        """A process with its host, as far as known, e.g. "3 (t1v-n-0a-w-3)"."""
        host = host or (self.names[process] if process < len(self.names) else None)
        return f"{process} ({host})" if host else str(process)


@dataclasses.dataclass
class Link:
    """An open connection to another process."""

    name: str
    socket: socket.socket
    heard: float = 0.0
    text: bytes = b""  # received so far of a line
    has_ended: bool = False  # the other process has said that it ends by itself


def define_flags() -> None:
    """The flags of every program that may be several processes."""
    flags.disclaim_key_flags()  # --help lists them as the calling program's own
    flags.DEFINE_string("coordinator", None, "host:port of process 0; default: the cluster's")
    flags.DEFINE_integer("num_processes", None, "processes of the run, with --coordinator")
    flags.DEFINE_integer("process_id", None, "number of this process, with --coordinator")
    flags.DEFINE_integer("start_timeout", 300, "seconds to wait for all processes")
    flags.DEFINE_integer(
        "loss_timeout",
        60,
        "seconds without a sign of life of another process, after which this one ends with 75",
        lower_bound=1,
    )


# The messages are lines of JSON:
#
#     process 3 to 0    {"process": 3, "of": 4, "host": "w3"}     I am here
#     0 to process 3    {"fault": null}                           all have come, start
#     all, every beat   {}                                        I am alive
#     all, at the end   {"code": 0}                               I end, with this exit code
#     0 to all          {"lost": "process 2 was lost: …"}         leave too
def call_roll(place: Place, timeout_seconds: float) -> list[Link]:
    """Returns when every process has come, with a link to each other one (process 0) or to process
    0.

    Raises `UserError` on each process with the names of those that did not come.
    """
    deadline = time.monotonic() + timeout_seconds
    if place.process_id == 0:
        fault, links = _gather(place, deadline, timeout_seconds)
    else:
        fault, links = _report(place, deadline)
    if fault:
        for link in links:
            link.socket.close()
        raise UserError(fault)
    return links


def _gather(place: Place, deadline: float, timeout_seconds: float) -> tuple[str | None, list[Link]]:
    """Process 0: hears the others and tells each of them the outcome, a fault or None."""
    came, links, fault = {0: socket.gethostname()}, {}, None
    accepted = []
    with _listen(place) as server:
        while (
            len(came) < place.num_processes
            and not fault
            and (left := deadline - time.monotonic()) > 0
        ):
            server.settimeout(left)
            # A stranger on our port, or a line cut.
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                link, _ = server.accept()
                accepted.append(link)
                hello = _receive(link)
                process, host = int(hello["process"]), str(hello["host"])
                if hello["of"] != place.num_processes:
                    fault = (
                        f"{process} ({host}) expects {hello['of']} processes, not "
                        f"{place.num_processes} as 0 does"
                    )
                elif came.get(process, host) != host:
                    fault = (
                        f"two processes call themselves {process}: on {came[process]} and on {host}"
                    )
                # A process that was started again replaces its earlier start.
                came[process], links[process] = host, link
        missing = [process for process in range(place.num_processes) if process not in came]
        if fault:
            fault += "\ngive every process the same --num_processes and a --process_id of its own"
        elif missing:
            fault = (
                f"{len(missing)} of {place.num_processes} processes did not come within "
                f"{timeout_seconds:g} s: {_list([place.name(p) for p in missing])}; here are "
                f"{_list([place.name(p, came[p]) for p in sorted(came)])}\n"
                "start the same command on those hosts too, look at their output, or raise "
                "--start_timeout"
            )
        for link in links.values():
            with contextlib.suppress(OSError):
                link.settimeout(PATIENCE)
                link.sendall(json.dumps({"fault": fault}).encode() + b"\n")
    for link in accepted:  # some may be of strangers, or of processes that were started again
        if fault or link not in links.values():
            link.close()
    return fault, [Link(place.name(i, came[i]), link) for i, link in sorted(links.items())]


def _report(place: Place, deadline: float) -> tuple[str | None, list[Link]]:
    """Other processes: say who is here and hear the outcome; what lies in between is tried again
    until the deadline.
    """
    address, _, port = place.coordinator.rpartition(":")
    hello = {"process": place.process_id, "of": place.num_processes, "host": socket.gethostname()}
    while True:
        link = None
        try:
            link = socket.create_connection((address, int(port)), timeout=PATIENCE)
            link.sendall(json.dumps(hello).encode() + b"\n")
            link.settimeout(max(deadline - time.monotonic(), 0) + PATIENCE)
            return _receive(link)["fault"], [Link(place.name(0, address), link)]
        except (OSError, ValueError, KeyError, TypeError) as error:
            if link:
                link.close()
            if time.monotonic() > deadline:
                return (
                    f"process {place.process_id}: process {place.name(0)} does not answer at "
                    f"{place.coordinator} ({str(error)[:100]})\n"
                    "start the same command there, look at its output, check --coordinator"
                ), []
            time.sleep(0.5)


def _listen(place: Place) -> socket.socket:
    port = int(place.coordinator.rpartition(":")[2])
    both = socket.has_dualstack_ipv6()
    try:
        return socket.create_server(
            ("", port),
            family=socket.AF_INET6 if both else socket.AF_INET,
            backlog=1024,
            dualstack_ipv6=both,
        )
    except OSError as error:
        raise UserError(
            f"process 0: port {port} of --coordinator cannot be opened ({error.strerror}); "
            "does an earlier run still hold it? end it, or name another port"
        ) from error


def _receive(link: socket.socket) -> dict[str, Any]:
    """One line of JSON; `ValueError` where the other side hung up or says something else."""
    if link.gettimeout() is None:
        link.settimeout(PATIENCE)
    with link.makefile("rb") as lines:
        return json.loads(lines.readline(4096))


def _list(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


class Watch:
    """Notices over the links of the roll call that another process is lost, and ends this one with
    its name.

    A process that was killed is noticed at once, since the system closes its connections. One that
    is stopped, or whose network is silent, is noticed after `seconds` without a beat. The exit code
    is 75: the same command starts again.
    """

    def __init__(self, links: list[Link], seconds: float):
        self._links, self._seconds = links, seconds
        self._beat = seconds / 6
        self._lock = threading.Lock()
        self.describe_saved: Callable[[], str] = lambda: "nothing is saved yet"
        for link in links:
            link.socket.settimeout(self._beat)
            link.heard = time.monotonic()
        threading.Thread(target=self._run, name="watch", daemon=True).start()

    def _run(self) -> None:
        turn = time.monotonic()
        while links := self._at_work():
            ready = select.select([link.socket for link in links], [], [], self._beat)[0]
            now = time.monotonic()
            if now - turn > 3 * self._beat:  # this machine slept, which is no silence of others
                for link in links:
                    link.heard = now
            turn = now
            for link in links:
                if link.socket in ready:
                    self._read(link, now)
                elif now - link.heard > self._seconds:
                    self._lose(link.name, f"no sign of life for {self._seconds:g} s")
            self._send({})

    def _at_work(self) -> list[Link]:
        """The links to processes that have not said that they end."""
        return [link for link in self._links if not link.has_ended]

    def _read(self, link: Link, now: float) -> None:
        try:
            received = link.socket.recv(4096)
        except OSError:
            received = b""
        if not received:
            self._lose(link.name, "its connection is closed")
        link.heard = now
        *lines, link.text = (link.text + received).split(b"\n")
        for message in map(json.loads, lines):
            if "lost" in message:
                self._leave(message["lost"])
            if message.get("code") in (0, EXIT_PREEMPTED, EXIT_INTERRUPTED):
                # Its socket stays open: the other side would take its end for a loss.
                link.has_ended = True
            elif "code" in message:
                # It may have said why on its own terminal, and this process may be about to say the
                # same.
                time.sleep(GRACE)
                text = f"process {link.name} ended with code {message['code']}: its output says why"
                leave(message["code"], text)

    def _lose(self, name: str, reason: str) -> None:
        text = f"process {name} was lost: {reason}"
        self._send({"lost": text})
        self._leave(text)

    def _leave(self, text: str) -> None:
        text += f"; {self.describe_saved()}; the same command starts again"
        leave(EXIT_PREEMPTED, text)

    def _send(self, message: dict[str, Any]) -> None:
        with self._lock:
            for link in self._links:
                with contextlib.suppress(OSError):  # its reader notices
                    link.socket.sendall(json.dumps(message).encode() + b"\n")

    def wait_for_verdict(self) -> None:
        """Returns where no process is lost: for a fault that may follow from one, before it is
        told.
        """
        time.sleep(GRACE / 2)
        while any(time.monotonic() - link.heard > 2 * self._beat for link in self._at_work()):
            time.sleep(self._beat)

    def finish(self, code: int) -> None:
        """Tells the others that this process ends by itself."""
        self._send({"code": code})
