"""The roll call: process 0 hears from every process before JAX connects them, and names those that do not come.

JAX's own start waits for all processes and, when its time is over, aborts without a word about who was missing.
The call uses the coordinator's port before JAX does, so no other port has to be open between the hosts.
"""

import contextlib
import dataclasses
import json
import socket
import time
from typing import Any

from crossin_jax.config import UserError

PATIENCE = 10.0  # seconds for one message, over the deadline where need be


@dataclasses.dataclass(frozen=True)
class Place:
    """This process among all; `names` holds the host of every process where the cluster tells."""

    coordinator: str
    num_processes: int
    process_id: int
    names: tuple[str, ...] = ()

    def name(self, process: int, host: str | None = None) -> str:
        """A process with its host, as far as known, e.g. "3 (t1v-n-0a-w-3)"."""
        host = host or (self.names[process] if process < len(self.names) else None)
        return f"{process} ({host})" if host else str(process)


def call_roll(place: Place, timeout_seconds: float) -> None:
    """Returns when every process has come; raises `UserError` on each of them with the names of those that did not."""
    deadline = time.monotonic() + timeout_seconds
    fault = _gather(place, deadline, timeout_seconds) if place.process_id == 0 else _report(place, deadline)
    if fault:
        raise UserError(fault)


def _gather(place: Place, deadline: float, timeout_seconds: float) -> str | None:
    """Process 0: hears the others and tells each of them the outcome, a fault or None."""
    came, links, fault = {0: socket.gethostname()}, {}, None
    with _listen(place) as server, contextlib.ExitStack() as open_links:
        while len(came) < place.num_processes and not fault and (left := deadline - time.monotonic()) > 0:
            server.settimeout(left)
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # a stranger on our port, or a line cut
                link, _ = server.accept()
                open_links.enter_context(link)
                hello = _receive(link)
                process, host = int(hello["process"]), str(hello["host"])
                if hello["of"] != place.num_processes:
                    fault = f"{process} ({host}) expects {hello['of']} processes, not {place.num_processes} as 0 does"
                elif came.get(process, host) != host:
                    fault = f"two processes call themselves {process}: on {came[process]} and on {host}"
                came[process], links[process] = host, link  # one that was started again replaces its former self
        missing = [process for process in range(place.num_processes) if process not in came]
        if fault:
            fault += "\ngive every process the same --num_processes and a --process_id of its own"
        elif missing:
            fault = (f"{len(missing)} of {place.num_processes} processes did not come within {timeout_seconds:g} s: "
                     f"{_list([place.name(p) for p in missing])}; here are "
                     f"{_list([place.name(p, came[p]) for p in sorted(came)])}\n"
                     "start the same command on those hosts too, look at their output, or raise --start_timeout")
        for link in links.values():
            with contextlib.suppress(OSError):
                link.settimeout(PATIENCE)
                link.sendall(json.dumps({"fault": fault}).encode() + b"\n")
                link.recv(1)  # they hang up first, so that the port is free at once
    return fault


def _report(place: Place, deadline: float) -> str | None:
    """Other processes: say who is here and hear the outcome; what lies in between is tried again until the deadline."""
    address, _, port = place.coordinator.rpartition(":")
    hello = {"process": place.process_id, "of": place.num_processes, "host": socket.gethostname()}
    while True:
        try:
            with socket.create_connection((address, int(port)), timeout=PATIENCE) as link:
                link.sendall(json.dumps(hello).encode() + b"\n")
                link.settimeout(max(deadline - time.monotonic(), 0) + PATIENCE)
                return _receive(link)["fault"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            if time.monotonic() > deadline:
                return (f"process {place.process_id}: process {place.name(0)} does not answer at {place.coordinator} "
                        f"({str(error)[:100]})\nstart the same command there, look at its output, check --coordinator")
            time.sleep(0.5)


def _listen(place: Place) -> socket.socket:
    port = int(place.coordinator.rpartition(":")[2])
    both = socket.has_dualstack_ipv6()
    try:
        return socket.create_server(("", port), family=socket.AF_INET6 if both else socket.AF_INET,
                                    backlog=1024, dualstack_ipv6=both)
    except OSError as error:
        raise UserError(f"process 0: port {port} of --coordinator cannot be opened ({error.strerror}); "
                        "does an earlier run still hold it? end it, or name another port") from error


def _receive(link: socket.socket) -> dict[str, Any]:
    """One line of JSON; `ValueError` where the other side hung up or says something else."""
    if link.gettimeout() is None:
        link.settimeout(PATIENCE)
    with link.makefile("rb") as lines:
        return json.loads(lines.readline(4096))


def _list(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
