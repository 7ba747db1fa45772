"""Several processes as one run: start-up, agreement on when to stop, and who writes."""

import os
import signal
import threading
from typing import Any

import jax

from crossin_jax.config import UserError


def start(coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None, *,
          timeout_seconds: int = 300) -> None:
    """Joins the processes of a run, by explicit arguments or by what a TPU pod, SLURM or GKE sets in the environment.

    A single process is left alone. Raises `UserError` where processes do not arrive within the deadline.
    """
    explicit = coordinator is not None
    if explicit and (num_processes is None or process_id is None):
        raise UserError("--coordinator needs --num_processes and --process_id as well")
    if not explicit and not _in_cluster():
        return
    if os.environ.get("JAX_PLATFORMS", "").startswith("cpu"):
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    arguments: dict[str, Any] = {"initialization_timeout": timeout_seconds}
    if explicit:
        arguments |= {"coordinator_address": coordinator, "num_processes": num_processes, "process_id": process_id}
    try:
        jax.distributed.initialize(**arguments)
    except Exception as error:
        place = coordinator or "the cluster's coordinator"
        raise UserError(f"process {process_id if explicit else '?'}: no start within {timeout_seconds} s at {place}: "
                        f"{str(error).splitlines()[0][:160]}\ncheck that every process runs this command with the same "
                        "coordinator and number of processes") from error


def _in_cluster() -> bool:
    """Whether the environment describes more than one process."""
    if int(os.environ.get("SLURM_NTASKS", "1")) > 1:
        return True
    return "," in os.environ.get("TPU_WORKER_HOSTNAMES", "") or bool(os.environ.get("MEGASCALE_COORDINATOR_ADDRESS"))


class Preemption:
    """Turns SIGTERM into a question that the training loop asks between steps; a second signal changes nothing.

    With several processes JAX's own notifier holds the signal, and its coordination service finds a step after which
    all of them stop, wherever the signal arrived.
    """

    def __init__(self) -> None:
        self._asked = threading.Event()
        self._previous: Any = None

    def __enter__(self) -> "Preemption":
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, lambda *_: self._asked.set())
        return self

    def __exit__(self, *_: Any) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)

    def reached(self, step: int) -> bool:
        """Whether all processes should save and leave after this step; every process gets the same answer."""
        if jax.process_count() == 1:
            return self._asked.is_set()
        from jax.experimental import multihost_utils
        return multihost_utils.reached_preemption_sync_point(step)
