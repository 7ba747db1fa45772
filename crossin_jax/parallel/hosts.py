"""Several processes as one run: start-up, agreement on when to stop, and who writes."""

import contextlib
import ctypes
import logging
import os
import signal
import subprocess
import threading
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from crossin_jax import ownership, process
from crossin_jax.config import UserError
from crossin_jax.parallel.roll_call import Place, Watch, call_roll

_watch: Watch | None = None


def start(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout_seconds: int = 300,
    loss_seconds: float = 60,
) -> None:
    """Joins the processes of a run, by explicit arguments or by what a TPU pod, SLURM or Kubernetes
    says.

    A single process has nothing to join. Raises `UserError` with the names of the processes that do
    not come in time. Later this process exits with 75 if another one is lost, which means that it
    gives no sign of life for `loss_seconds`.
    """
    global _watch
    place = detect_process(coordinator, num_processes, process_id, timeout_seconds)
    if place is None or place.num_processes == 1:
        return
    if os.environ.get("JAX_PLATFORMS", "").startswith("cpu"):
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    _watch = Watch(call_roll(place, timeout_seconds), loss_seconds)
    delay_abort()
    jax.distributed.initialize(
        place.coordinator,
        place.num_processes,
        place.process_id,
        initialization_timeout=timeout_seconds,
        heartbeat_timeout_seconds=max(100, int(4 * loss_seconds)),  # JAX aborts: ours comes first
    )
    # On CPUs the first meeting must succeed within 30 s. Later ones may take longer, for example
    # while process 0 looks for signs of life of a folder's owner (60 s).
    any_process(False)


@contextlib.contextmanager
def joined(arguments: Any) -> Iterator[None]:
    """Joins the processes that the flags or the cluster name; they learn how the block ended."""
    start(
        arguments.coordinator,
        arguments.num_processes,
        arguments.process_id,
        timeout_seconds=arguments.start_timeout,
        loss_seconds=arguments.loss_timeout,
    )
    with reported_end():
        yield


def delay_abort() -> None:
    """Lets SIGABRT wait for some seconds.

    Where process 0 is killed, JAX aborts in a thread of its own as soon as our watch sees it. The
    watch needs the time to name the process and to leave with its own code. `sleep` of the C
    library is the handler: it gets the signal's number, 6, and sleeps that many seconds; then the
    abort goes on.
    """
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))


@contextlib.contextmanager
def reported_end() -> Iterator[None]:
    """Tells the other processes how the block ended.

    After an error it first waits for the watch: a lost process may be the cause, and is reported.
    """
    code = 1
    try:
        yield
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
        raise
    except Exception as error:
        if _watch:
            _watch.wait_for_verdict()
        code = 2 if isinstance(error, UserError) else 1
        raise
    finally:
        if _watch:
            _watch.finish(code)


def report_saved(describe: Callable[[], str]) -> None:
    """Sets what this process says about its checkpoints where another process is lost."""
    if _watch:
        _watch.describe_saved = describe


def detect_process(
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    timeout_seconds: int = 300,
) -> Place | None:
    """This process among those of the run: as the flags say, else as the cluster does; None where
    there is neither.
    """
    if coordinator is not None:
        if num_processes is None or process_id is None:
            raise UserError("--coordinator needs --num_processes and --process_id as well")
        if not coordinator.rpartition(":")[2].isdigit() or not 0 <= process_id < num_processes:
            raise UserError(
                f"--coordinator={coordinator} --num_processes={num_processes} "
                f"--process_id={process_id}: give host:port of process 0, and a number below the "
                "number of processes"
            )
        return Place(coordinator, num_processes, process_id)
    if num_processes is not None or process_id is not None:
        raise UserError(
            "--num_processes and --process_id need --coordinator=host:port of process 0"
        )
    # Private, but jax.distributed.initialize itself asks it.
    from jax._src.clusters import ClusterEnv

    cpu = os.environ.get("JAX_PLATFORMS", "").startswith("cpu")
    cluster = next(
        (
            c
            for c in ClusterEnv._cluster_types
            if not c.opt_in_only_method
            and not (cpu and "tpu" in c.name)
            # Any pod is a "cluster".
            and (c.__name__ != "K8sCluster" or "JOB_COMPLETION_INDEX" in os.environ)
            and c.is_env_present()
        ),
        None,
    )
    if cluster is None or cluster.get_process_count() == 1:
        return None
    try:
        address = cluster.get_coordinator_address(
            timeout_seconds, os.environ.get("JAX_COORDINATOR_PORT")
        )
    except RuntimeError as error:
        raise UserError(f"process {cluster.get_process_id()}: {error}; is process 0 up?") from error
    return Place(
        os.environ.get("JAX_COORDINATOR_ADDRESS", address),
        cluster.get_process_count(),
        cluster.get_process_id(),
        _host_names(cluster),
    )


def _host_names(cluster: Any) -> tuple[str, ...]:
    """The host of every process, where the cluster says so. Names are only shown, so the list may
    be short.
    """
    if "tpu" in cluster.name:
        workers = cluster._get_worker_list_in_slice()
        slices = cluster.get_process_count() // len(workers)
        return tuple(
            workers
            if slices == 1
            else [f"slice {s}, worker {w}" for s in range(slices) for w in range(len(workers))]
        )
    if cluster.name == "slurm":
        try:
            hosts = subprocess.run(
                ["scontrol", "show", "hostnames", os.environ["SLURM_STEP_NODELIST"]],
                capture_output=True,
                text=True,
                timeout=10,
            ).stdout.split()
        except (OSError, subprocess.TimeoutExpired):
            return ()
        tasks = cluster.get_process_count() // max(1, len(hosts))
        return tuple(name for name in hosts for _ in range(tasks))
    return ()


class Preemption:
    """Turns signals into a question that the training loop asks between steps.

    With several processes JAX's own notifier holds SIGTERM, and its coordination service finds a
    step after which all of them stop, wherever the signal arrived; other signals are passed on to
    it. On a TPU VM a notice of the host (maintenance, preemption) is turned into SIGTERM.
    """

    def __enter__(self) -> "Preemption":
        self._is_passed_on = False
        with contextlib.ExitStack() as stack:
            stack.enter_context(process.deferred_stop())
            if jax.local_devices()[0].platform == "tpu":
                stack.callback(watch_notices().set)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stack.close()

    # All processes must leave after the same step: they compute a step together, and a process that
    # began one alone would wait forever. SIGTERM comes to process 1 (▲):
    #
    #     process 0    step 7    step 8    step 9    saves
    #     process 1    step 7 ▲  step 8    step 9    saves
    #                         └─ agreed: "after step 9", which no process has passed yet
    def reached(self, step: int) -> bool:
        """Whether all processes should save and leave after this step; every process gets the same
        answer.
        """
        if jax.process_count() == 1:
            return process.is_told_to_stop()
        if process.is_told_to_stop() and not self._is_passed_on:
            self._is_passed_on = True
            os.kill(os.getpid(), signal.SIGTERM)
        return multihost_utils.reached_preemption_sync_point(step)


def metadata_url() -> str:
    """Where a Google Cloud host announces maintenance and preemption."""
    host = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
    return f"http://{host}/computeMetadata/v1/instance"


def watch_notices(*, seconds: float = 5.0) -> threading.Event:
    """Sends this process SIGTERM when its host announces maintenance or preemption; the returned
    event ends the watch.

    A notice that is there at the start is ignored: the previous run has saved and ended because of
    it.
    """
    url, over = metadata_url(), threading.Event()

    def watch() -> None:
        before = None
        while not over.wait(seconds if before is not None else 0):
            now = {
                name: _read_notice(f"{url}/{name}") for name in ("maintenance-event", "preempted")
            }
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
        with urllib.request.urlopen(
            urllib.request.Request(url, headers={"Metadata-Flavor": "Google"}), timeout=5
        ) as answer:
            return answer.read().decode().strip()
    except (OSError, UnicodeDecodeError):
        return None


def barrier(name: str) -> None:
    """Waits until every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


@contextlib.contextmanager
def own_folder(folder: Path) -> Iterator[None]:
    """Makes a folder that all processes see and keeps other runs out: process 0 owns it for all of
    them.
    """
    with contextlib.ExitStack() as stack:
        refusal: Exception | None = None
        if jax.process_index() == 0:
            try:
                stack.enter_context(ownership.own(folder))
            except (UserError, OSError) as error:
                refusal = error
        if any_process(refusal is not None):
            raise refusal or UserError(
                f"{folder} is in use or cannot be written: process 0 says which"
            )
        check_shared(folder)
        yield


def check_shared(folder: Path) -> None:
    """Refuses an output folder that some process does not see: a checkpoint in parts on many disks
    is lost.
    """
    if jax.process_count() == 1:
        return
    number = int(
        multihost_utils.broadcast_one_to_all(
            np.random.default_rng().integers(2**31, dtype=np.int32)
        )
    )
    mark = folder / f".seen-{number}"
    if jax.process_index() == 0:
        mark.touch()
    barrier("the mark is made")
    blind = [
        str(process)
        for process in np.flatnonzero(~multihost_utils.process_allgather(np.asarray(mark.exists())))
    ]
    if jax.process_index() == 0:
        mark.unlink()
    if blind:
        raise UserError(
            f"output_dir={folder} is not shared: process {', '.join(blind[:8])} cannot see what 0 "
            "writes\n"
            "put output_dir into a bucket (docs/tpu.md), or on a file system of all hosts"
        )


# A fact that only one process knows (a full disk, its clock, a damaged file) must not choose a
# branch there alone: the others would take another branch and wait in a collective forever.
def any_process(value: bool) -> bool:
    """Whether `value` is true on any process; every process must call this, and gets the same."""
    if jax.process_count() == 1:
        return value
    return bool(multihost_utils.process_allgather(np.asarray(value)).any())
