"""Several processes as one run: start-up, agreement on when to stop, and who writes."""

import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from crossin_jax import outputs
from crossin_jax.config import UserError
from crossin_jax.parallel.roll_call import Place, call_roll

EXIT_PREEMPTED = 75  # EX_TEMPFAIL: the same command continues the run
EXIT_INTERRUPTED = 130  # 128 + SIGINT: a person stopped the run, so that nothing should start it again by itself


def start(coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None, *,
          timeout_seconds: int = 300) -> None:
    """Joins the processes of a run, by explicit arguments or by what a TPU pod, SLURM or Kubernetes tells.

    A single process is left alone. Raises `UserError` with the names of the processes that do not come in time.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_PREEMPTED))  # until the first step nothing can be lost
    place = find_place(coordinator, num_processes, process_id, timeout_seconds)
    if place is None or place.num_processes == 1:
        return
    if os.environ.get("JAX_PLATFORMS", "").startswith("cpu"):
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    call_roll(place, timeout_seconds)
    jax.distributed.initialize(place.coordinator, place.num_processes, place.process_id,
                               initialization_timeout=timeout_seconds)


def find_place(coordinator: str | None, num_processes: int | None, process_id: int | None,
               timeout_seconds: int = 300) -> Place | None:
    """This process among those of the run: as the flags say, else as the cluster does; None where there is neither."""
    if coordinator is not None:
        if num_processes is None or process_id is None:
            raise UserError("--coordinator needs --num_processes and --process_id as well")
        if not coordinator.rpartition(":")[2].isdigit() or not 0 <= process_id < num_processes:
            raise UserError(f"--coordinator={coordinator} --num_processes={num_processes} --process_id={process_id}: "
                            "give host:port of process 0, and a number below the number of processes")
        return Place(coordinator, num_processes, process_id)
    if num_processes is not None or process_id is not None:
        raise UserError("--num_processes and --process_id need --coordinator=host:port of process 0")
    from jax._src.clusters import ClusterEnv  # private, but it is what jax.distributed.initialize itself asks
    cpu = os.environ.get("JAX_PLATFORMS", "").startswith("cpu")
    cluster = next((c for c in ClusterEnv._cluster_types if not c.opt_in_only_method
                    and not (cpu and "tpu" in c.name)
                    and (c.__name__ != "K8sCluster" or "JOB_COMPLETION_INDEX" in os.environ)  # any pod is a "cluster"
                    and c.is_env_present()), None)
    if cluster is None or cluster.get_process_count() == 1:
        return None
    try:
        address = cluster.get_coordinator_address(timeout_seconds, os.environ.get("JAX_COORDINATOR_PORT"))
    except RuntimeError as error:
        raise UserError(f"process {cluster.get_process_id()}: {error}; is process 0 up?") from error
    return Place(os.environ.get("JAX_COORDINATOR_ADDRESS", address), cluster.get_process_count(),
                 cluster.get_process_id(), _host_names(cluster))


def _host_names(cluster: Any) -> tuple[str, ...]:
    """The host of every process, where the cluster says so; a name too few is no fault, it is only shown."""
    if "tpu" in cluster.name:
        workers = cluster._get_worker_list_in_slice()
        slices = cluster.get_process_count() // len(workers)
        return tuple(workers if slices == 1 else [f"slice {s}, worker {w}" for s in range(slices)
                                                  for w in range(len(workers))])
    if cluster.name == "slurm":
        try:
            told = subprocess.run(["scontrol", "show", "hostnames", os.environ["SLURM_STEP_NODELIST"]],
                                  capture_output=True, text=True, timeout=10).stdout.split()
        except (OSError, subprocess.TimeoutExpired):
            return ()
        tasks = cluster.get_process_count() // max(1, len(told))
        return tuple(name for name in told for _ in range(tasks))
    return ()


class Preemption:
    """Turns SIGTERM and Ctrl-C into a question that the training loop asks between steps.

    A second SIGTERM changes nothing; a second Ctrl-C leaves at once, without saving. With several processes JAX's own
    notifier holds SIGTERM, and its coordination service finds a step after which all of them stop, wherever the signal
    arrived; Ctrl-C is passed on as SIGTERM. On a TPU VM a notice of the host (maintenance, preemption) is turned into
    SIGTERM.
    """

    def __init__(self) -> None:
        self._asked = threading.Event()
        self._previous: dict[int, Any] = {}
        self._watch: threading.Event | None = None
        self.exit_code = EXIT_PREEMPTED

    def __enter__(self) -> "Preemption":
        if threading.current_thread() is threading.main_thread():
            self._previous[signal.SIGINT] = signal.signal(signal.SIGINT, self._interrupt)
            if jax.process_count() == 1:
                self._previous[signal.SIGTERM] = signal.signal(signal.SIGTERM, lambda *_: self._asked.set())
        if jax.local_devices()[0].platform == "tpu":
            self._watch = watch_notices()
        return self

    def _interrupt(self, *_: Any) -> None:
        """The first Ctrl-C: save after this step; from now on Ctrl-C raises `KeyboardInterrupt` again."""
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.write(2, b"\nstopping: the run saves after this step; press Ctrl-C again to leave without saving\n")
        self.exit_code = EXIT_INTERRUPTED
        os.kill(os.getpid(), signal.SIGTERM)

    def __exit__(self, *_: Any) -> None:
        if self._watch:
            self._watch.set()
        for number, previous in self._previous.items():
            is_leaving = number == signal.SIGTERM and self._asked.is_set()  # it is not told again
            signal.signal(number, signal.SIG_IGN if is_leaving else previous)

    def reached(self, step: int) -> bool:
        """Whether all processes should save and leave after this step; every process gets the same answer."""
        if jax.process_count() == 1:
            return self._asked.is_set()
        return multihost_utils.reached_preemption_sync_point(step)


def metadata_url() -> str:
    """Where a Google Cloud host tells what awaits it."""
    return f"http://{os.environ.get('GCE_METADATA_IP', 'metadata.google.internal')}/computeMetadata/v1/instance"


def watch_notices(url: str | None = None, *, seconds: float = 5.0) -> threading.Event:
    """Sends this process SIGTERM when its host announces maintenance or preemption; the returned event ends the watch.

    A notice that stands from the start is the one that an earlier start of the run has saved for: it stops nothing.
    """
    url, over = url or metadata_url(), threading.Event()

    def watch() -> None:
        before = None
        while not over.wait(seconds if before is not None else 0):
            now = {name: _read_notice(f"{url}/{name}") for name in ("maintenance-event", "preempted")}
            for name, notice in now.items():
                if before is not None and notice not in (None, "NONE", "FALSE", before[name]):
                    logging.warning("the host announces %s: %s", name, notice)
                    os.kill(os.getpid(), signal.SIGTERM)
                    return
            before = {name: notice or (before or {}).get(name) for name, notice in now.items()}

    threading.Thread(target=watch, name="notices", daemon=True).start()
    return over


def _read_notice(url: str) -> str | None:
    """The text of a metadata entry, or None where the server does not answer."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers={"Metadata-Flavor": "Google"}),
                                    timeout=5) as answer:
            return answer.read().decode().strip()
    except (OSError, UnicodeDecodeError):
        return None


def meet(name: str) -> None:
    """Waits until every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


@contextlib.contextmanager
def own_folder(folder: Path) -> Iterator[None]:
    """Keeps other runs out of a folder: process 0 takes the lock, and all processes leave where it cannot."""
    with contextlib.ExitStack() as stack:
        refusal = None
        if jax.process_index() == 0:
            try:
                stack.enter_context(outputs.own_folder(folder))
            except UserError as error:
                refusal = error
        if agree(refusal is not None):
            raise refusal or UserError(f"{folder} is in use: process 0 names its owner")
        yield


def check_shared(folder: Path) -> None:
    """Refuses an output folder that some process does not see: a checkpoint in parts on many disks is lost."""
    if jax.process_count() == 1:
        return
    number = int(multihost_utils.broadcast_one_to_all(np.random.default_rng().integers(2**31, dtype=np.int32)))
    mark = folder / f".seen-{number}"
    if jax.process_index() == 0:
        mark.touch()
    meet("the mark is made")
    blind = [str(process) for process in np.flatnonzero(~multihost_utils.process_allgather(np.asarray(mark.exists())))]
    if jax.process_index() == 0:
        mark.unlink()
    if blind:
        raise UserError(f"output_dir={folder} is not shared: process {', '.join(blind[:8])} cannot see what 0 writes\n"
                        "mount one file system on all hosts (docs/tpu.md) and put output_dir there")


def agree(value: bool) -> bool:
    """Whether a thing is true on any process; every process must ask, and gets the same answer."""
    if jax.process_count() == 1:
        return value
    return bool(multihost_utils.process_allgather(np.asarray(value)).any())
