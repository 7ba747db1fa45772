"""Several hosts as one run: found by flags or by the cluster, missing ones named, told to stop by
signal or notice.
"""

import contextlib
import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from crossin_jax import process
from crossin_jax.config import UserError
from crossin_jax.parallel import hosts, roll_call
from crossin_jax.parallel.roll_call import Link, Place, Watch, call_roll
from tests.processes import REPOSITORY, free_port


def join(place: Place, seconds: float) -> None:
    """The roll call alone; the links that it leaves open are closed."""
    for link in call_roll(place, seconds):
        link.socket.close()


def roll(
    *processes: int,
    number: int = 3,
    names: tuple[str, ...] = (),
    seconds: float = 20,
    numbers: dict[int, int] | None = None,
) -> list[str | None]:
    """What each of the processes that come hears: None, or the error."""
    coordinator, answers = f"localhost:{free_port()}", [None] * len(processes)

    def come(i: int, process: int) -> None:
        try:
            place = Place(coordinator, (numbers or {}).get(process, number), process, names)
            join(place, seconds)
        except UserError as error:
            answers[i] = str(error)

    threads = [threading.Thread(target=come, args=pair) for pair in enumerate(processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


def test_a_full_roll_passes_in_any_order():
    assert roll(2, 0, 1) == [None, None, None]


def test_missing_processes_are_named_on_every_host():
    for answer in roll(0, 2, number=5, names=tuple(f"host-{i}" for i in range(5)), seconds=2):
        assert answer.startswith(
            "3 of 5 processes did not come within 2 s: 1 (host-1), 3 (host-3), 4 (host-4); "
            f"here are 0 ({socket.gethostname()}), 2 ({socket.gethostname()})\n"
        )
    assert roll(0, number=40, seconds=0.2)[0].startswith(
        "39 of 40 processes did not come within 0.2 s: 1, 2, 3, 4, 5, "
        "6, 7, 8 and 31 more; here are 0 ("
    )


def test_without_process_0_its_address_is_named(monkeypatch):
    (answer,) = roll(1, names=("host-0",), seconds=0.2)
    assert "process 0 (host-0) does not answer at localhost:" in answer


def test_processes_that_disagree_are_refused():
    assert all(
        "1 (" in answer and "expects 4 processes, not 3 as 0 does" in answer
        for answer in roll(0, 1, numbers={1: 4})
    )


def test_a_number_given_twice_is_refused(monkeypatch):
    names = iter(["a", "b", "c", "d", "e"])
    monkeypatch.setattr(socket, "gethostname", lambda: next(names))
    answers = [answer for answer in roll(0, 1, 1, seconds=2) if answer]
    assert any("two processes call themselves 1: on " in answer for answer in answers)


def hang_up_after(place: Place, process: int, words: bytes) -> None:
    """A process that says who it is, and is gone before it hears the outcome."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        with (
            contextlib.suppress(ConnectionRefusedError),
            socket.create_connection(
                ("localhost", int(place.coordinator.rpartition(":")[2]))
            ) as link,
        ):
            link.sendall(words)
            return
        time.sleep(0.02)


def test_a_process_that_was_started_again_hears_the_outcome():
    """The roll goes by the last connection of each number: the former self does not hear."""
    place = Place(f"localhost:{free_port()}", 3, 0)
    answers = {}

    def come(process):
        try:
            join(Place(place.coordinator, 3, process), 6)
            answers[process] = "passed"
        except UserError as error:
            answers[process] = str(error)

    zero = threading.Thread(target=come, args=(0,))
    zero.start()
    hello = {"process": 1, "of": 3, "host": socket.gethostname()}
    hang_up_after(place, 1, json.dumps(hello).encode() + b"\n")
    time.sleep(0.1)
    one = threading.Thread(target=come, args=(1,))
    one.start()
    time.sleep(0.3)
    assert not answers  # process 2 is still to come
    come(2)
    for thread in (zero, one):
        thread.join()
    assert answers == {0: "passed", 1: "passed", 2: "passed"}


@pytest.mark.parametrize(
    ("process", "host", "shown"),
    [
        (0, None, "0 (a)"),
        (1, None, "1 (b)"),
        (2, None, "2"),
        (1, "other", "1 (other)"),
        (2, "c", "2 (c)"),
    ],
)
def test_a_process_is_named_with_its_host_where_it_is_known(process, host, shown):
    """What it says of itself goes before what the cluster says."""
    assert Place("host:1", 3, 0, ("a", "b")).name(process, host) == shown


def test_strangers_on_the_port_change_nothing():
    place = Place(f"localhost:{free_port()}", 2, 0)
    zero = threading.Thread(target=join, args=(place, 20))
    zero.start()
    for word in (b"GET / HTTP/1.1\r\n\r\n", b'{"process": 1}\n', b""):
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            try:
                with socket.create_connection(
                    ("localhost", int(place.coordinator.split(":")[1]))
                ) as link:
                    link.sendall(word)
                break
            except ConnectionRefusedError:
                time.sleep(0.05)
    join(Place(place.coordinator, 2, 1), 20)
    zero.join()


def test_a_port_in_use_is_named():
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(
            UserError, match=f"port {port} of --coordinator cannot be opened .*earlier run"
        ):
            call_roll(Place(f"localhost:{port}", 2, 0), 1)


def test_flags_say_where_this_process_stands():
    assert hosts.detect_process("host:99", 4, 3) == Place("host:99", 4, 3)
    for flags, words in (
        (("host:99", None, None), "needs --num_processes"),
        (("host", 4, 3), "give host:port"),
        (("host:99", 4, 4), "below the number"),
        ((None, 4, 3), "need --coordinator"),
        (("host:99", 4, -1), "below the number"),
        (("host:99", 4, None), "needs --num_processes"),
        (("host:99", None, 1), "needs --num_processes"),
        ((None, None, 0), "need --coordinator"),
    ):
        with pytest.raises(UserError, match=words):
            hosts.detect_process(*flags)


def test_slurm_tells_the_place_and_the_names(monkeypatch, tmp_path):
    (tmp_path / "scontrol").write_text(
        '#!/bin/sh\n[ "$*" = "show hostnames gpu[01-02]" ] && echo gpu01 gpu02\n'
    )
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name, value in {
        "JOB_ID": "7",
        "STEP_NODELIST": "gpu[01-02]",
        "NTASKS": "4",
        "PROCID": "3",
        "LOCALID": "1",
        "STEP_NUM_NODES": "2",
    }.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    place = hosts.detect_process(None, None, None)
    assert place == Place(
        f"gpu01:{65535 - 2**12 + 1 + 7}", 4, 3, ("gpu01", "gpu01", "gpu02", "gpu02")
    )
    monkeypatch.setenv("JAX_COORDINATOR_PORT", "1234")
    assert hosts.detect_process(None, None, None).coordinator == "gpu01:1234"
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "10.0.0.7:99")
    assert hosts.detect_process(None, None, None) == Place("10.0.0.7:99", 4, 3, place.names)
    # Flags go before the cluster.
    assert hosts.detect_process("host:99", 2, 0) == Place("host:99", 2, 0)
    monkeypatch.setenv("PATH", "")  # no scontrol: names are only shown
    assert hosts.detect_process(None, None, None).names == ()
    monkeypatch.setenv("SLURM_NTASKS", "1")
    assert hosts.detect_process(None, None, None) is None


@pytest.mark.parametrize(
    ("more", "is_cluster"), [({}, False), ({"JOB_COMPLETION_INDEX": "1"}, True)]
)
def test_a_pod_of_kubernetes_is_one_of_several_only_in_a_job(monkeypatch, more, is_cluster):
    """Any pod tells that it runs under Kubernetes; an indexed job tells its number as well."""
    from jax._src.clusters import k8s_cluster

    asked = []

    def count(_):
        asked.append(True)
        return 1  # so that nothing else is asked of a cluster that is not there

    monkeypatch.setattr(k8s_cluster.K8sCluster, "is_env_present", classmethod(lambda _: True))
    monkeypatch.setattr(k8s_cluster.K8sCluster, "get_process_count", classmethod(count))
    for name, value in more.items():
        monkeypatch.setenv(name, value)
    assert hosts.detect_process(None, None, None) is None and bool(asked) == is_cluster


def test_tpu_pods_tell_the_place_and_the_names(monkeypatch):
    from jax._src.clusters import cloud_tpu_cluster

    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")  # Kubernetes Engine: all is in the environment
    for name, value in {
        "TPU_WORKER_HOSTNAMES": "localhost,w1",
        "TPU_WORKER_ID": "1",
        "MEGASCALE_NUM_SLICES": "2",
        "MEGASCALE_SLICE_ID": "1",
        "MEGASCALE_COORDINATOR_ADDRESS": "localhost:1",
    }.items():
        monkeypatch.setenv(name, value)
    # JAX_PLATFORMS=cpu: a pod's host computing for itself.
    assert hosts.detect_process(None, None, None) is None
    monkeypatch.setenv("JAX_PLATFORMS", "")
    names = ("slice 0, worker 0", "slice 0, worker 1", "slice 1, worker 0", "slice 1, worker 1")
    assert hosts.detect_process(None, None, None) == Place("localhost:8482", 4, 3, names)
    monkeypatch.setenv("MEGASCALE_NUM_SLICES", "1")
    monkeypatch.setenv("MEGASCALE_SLICE_ID", "0")
    assert hosts.detect_process(None, None, None).names == ("localhost", "w1")


def test_the_metadata_server_of_a_tpu_vm_tells_the_place(monkeypatch, metadata):
    from jax._src.clusters import cloud_tpu_cluster

    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setenv("JAX_PLATFORMS", "tpu,cpu")
    monkeypatch.delenv("TPU_SKIP_MDS_QUERY", raising=False)
    metadata.entries |= {
        "attributes/agent-worker-number": "1",
        "attributes/tpu-env": "ZONE: 'z'",
        "attributes/worker-network-endpoints": "x:0:127.0.0.1,x:1:10.0.0.2",
    }
    assert hosts.detect_process(None, None, None) == Place(
        "127.0.0.1:8482", 2, 1, ("127.0.0.1", "10.0.0.2")
    )


# ---- Losing a process


@pytest.fixture
def group(monkeypatch):
    """Connected watches of processes 0, 1 and 2 that all live here, and how each of them left."""
    left = {}

    def leave(code, text):
        left[threading.current_thread()] = code, text
        raise SystemExit  # ends the thread of the watch

    monkeypatch.setattr(threading, "excepthook", lambda _: None)

    monkeypatch.setattr(roll_call, "leave", leave)
    monkeypatch.setattr(roll_call, "GRACE", 0.05)
    pairs = {i: socket.socketpair() for i in (1, 2)}
    before, watches = set(threading.enumerate()), []

    def watch(process: int, links: list[Link], seconds: float) -> Watch:
        watch = Watch(links, seconds)
        watch.describe_saved = lambda: f"step {process}0 is saved"
        (watch.thread,) = set(threading.enumerate()) - before
        before.add(watch.thread)
        watches.append(watch)
        watch.left = lambda: wait_until(lambda: watch.thread in left) and left[watch.thread]
        return watch

    def start(seconds: float = 30, only: tuple[int, ...] = (0, 1, 2)) -> dict[int, Watch]:
        links = {i: [Link(f"0 ({i}'s)", pair[1])] for i, pair in pairs.items()}
        links[0] = [Link(f"{i} (host-{i})", pair[0]) for i, pair in pairs.items()]
        return {i: watch(i, links[i], seconds) for i in only}

    yield start, pairs
    for watch in watches:
        watch._links.clear()
        watch.thread.join()
    for pair in pairs.values():
        for end in pair:
            end.close()


def test_a_killed_process_is_named_by_all_others(group):
    """Process 0 sees its closed connection and passes it on."""
    start, pairs = group
    watches = start(only=(0, 2))
    pairs[1][1].close()
    for i in (0, 2):
        assert watches[i].left() == (
            75,
            f"process 1 (host-1) was lost: its connection is closed; step {i}0 is saved; the same "
            "command starts again",
        )


def test_a_silent_process_is_named_after_a_while(group):
    start, _ = group
    watches = start(seconds=0.3, only=(0, 2))  # nobody speaks for 1
    assert "process 1 (host-1) was lost: no sign of life for 0.3 s" in watches[0].left()[1]
    assert "process 1 (host-1) was lost" in watches[2].left()[1]


def test_process_0_is_missed_too(group):
    start, pairs = group
    watches = start(seconds=0.3, only=(1, 2))
    assert watches[1].left()[1].startswith("process 0 (1's) was lost: no sign of life for 0.3 s")


def test_processes_that_beat_are_left_alone(group):
    start, _ = group
    watches = start(seconds=0.3)
    time.sleep(0.9)
    assert all(watch.thread.is_alive() for watch in watches.values())
    began = time.monotonic()
    watches[1].wait_for_verdict()
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("code", [0, 75, 130])
def test_a_process_that_ends_as_it_should_is_not_missed(code, group):
    start, pairs = group
    watches = start(only=(0, 1))
    watches[1].finish(code)
    assert wait_until(lambda: len(watches[0]._at_work()) == 1)
    pairs[1][1].close()
    time.sleep(0.2)
    assert watches[0].thread.is_alive()


def test_two_processes_that_end_hear_each_other(group):
    """The first word of an end must not close the link: the second one would be taken for a
    loss.
    """
    start, _ = group
    watches = start(only=(0, 1))
    watches[1].finish(75)
    assert wait_until(lambda: len(watches[0]._at_work()) == 1)
    watches[0].finish(75)
    assert wait_until(lambda: not watches[1]._at_work())


@pytest.mark.parametrize("code", [1, 2])
def test_a_process_that_ends_with_an_error_takes_the_others_with_it(code, group):
    """Else they wait for it in their next collective."""
    start, _ = group
    watches = start(only=(0, 1))
    watches[1].finish(code)
    assert watches[0].left() == (
        code,
        f"process 1 (host-1) ended with code {code}: its output says why",
    )


# ---- Being told to stop


class Metadata(http.server.BaseHTTPRequestHandler):
    """A metadata server with the entries of its class."""

    entries: dict[str, str] = {}

    def do_GET(self):
        name = self.path.removeprefix("/computeMetadata/v1/instance/")
        found = name in self.entries and self.headers["Metadata-Flavor"] == "Google"
        self.send_response(200 if found else 404)
        self.end_headers()
        self.wfile.write(self.entries.get(name, "").encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def metadata(monkeypatch):
    """A loopback metadata server without news."""
    Metadata.entries = {"maintenance-event": "NONE", "preempted": "FALSE"}
    with http.server.ThreadingHTTPServer(("localhost", 0), Metadata) as server:
        monkeypatch.setenv("GCE_METADATA_IP", f"localhost:{server.server_port}")
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        yield Metadata
        server.shutdown()


@pytest.fixture
def told(monkeypatch):
    """Set when this process gets SIGTERM."""
    event = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: event.set())
    yield event
    signal.signal(signal.SIGTERM, before)


def wait_until(condition) -> bool:
    deadline = time.monotonic() + 5
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


@pytest.mark.parametrize(
    ("name", "notice"),
    [("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE"), ("preempted", "TRUE")],
)
def test_a_notice_of_the_host_becomes_the_signal(name, notice, metadata, told):
    over = hosts.watch_notices(seconds=0.02)
    time.sleep(0.2)
    assert not told.is_set()
    metadata.entries[name] = notice
    assert wait_until(told.is_set)
    over.set()


def test_on_a_tpu_a_notice_stops_the_run(metadata, told, monkeypatch):
    watch = hosts.watch_notices
    monkeypatch.setattr(hosts, "watch_notices", lambda: watch(seconds=0.02))
    monkeypatch.setattr(hosts.jax, "local_devices", lambda: [SimpleNamespace(platform="tpu")])
    with hosts.Preemption() as preemption:
        time.sleep(0.2)
        assert not preemption.reached(1)
        metadata.entries["preempted"] = "TRUE"
        assert wait_until(lambda: preemption.reached(1)) and not told.is_set()


def test_a_notice_that_stands_already_stops_nothing(metadata, told):
    metadata.entries["maintenance-event"] = "TERMINATE_ON_HOST_MAINTENANCE"
    over = hosts.watch_notices(seconds=0.02)
    time.sleep(0.3)
    metadata.entries["maintenance-event"] = "NONE"  # over
    time.sleep(0.3)
    assert not told.is_set()
    metadata.entries["maintenance-event"] = "TERMINATE_ON_HOST_MAINTENANCE"  # the next one
    assert wait_until(told.is_set)
    over.set()


def test_a_notice_stands_while_the_server_is_silent(metadata, told):
    """A server that fails for a while does not make an old notice a new one."""
    metadata.entries["maintenance-event"] = "TERMINATE_ON_HOST_MAINTENANCE"
    over = hosts.watch_notices(seconds=0.02)
    time.sleep(0.2)
    standing = metadata.entries.pop("maintenance-event")
    time.sleep(0.2)
    metadata.entries["maintenance-event"] = standing
    time.sleep(0.2)
    assert not told.is_set()
    metadata.entries["preempted"] = "TRUE"  # the other kind is still looked at
    assert wait_until(told.is_set)
    over.set()


def test_a_watch_that_is_over_stops_nothing(metadata, told):
    """Leaving the training loop ends it."""
    over = hosts.watch_notices(seconds=0.02)
    time.sleep(0.1)
    over.set()
    time.sleep(0.1)
    metadata.entries["preempted"] = "TRUE"
    time.sleep(0.2)
    assert not told.is_set()


def test_hosts_without_a_metadata_server_are_left_alone(told, monkeypatch):
    monkeypatch.setenv("GCE_METADATA_IP", f"localhost:{free_port()}")
    over = hosts.watch_notices(seconds=0.01)
    time.sleep(0.2)
    assert not told.is_set()
    over.set()


def test_signals_are_a_question_and_the_second_changes_nothing(told):
    process.listen()  # as every program does
    with hosts.Preemption() as preemption:
        assert not preemption.reached(1)
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        assert wait_until(lambda: preemption.reached(2)) and process.exit_code() == 75
    os.kill(os.getpid(), signal.SIGTERM)  # while the interpreter ends
    process.unlisten()
    assert not told.is_set()


def test_the_first_ctrl_c_is_a_question(capfd):
    """The second one ends the process: see tests/test_process.py."""
    before = signal.getsignal(signal.SIGINT)
    with hosts.Preemption() as preemption:
        assert not preemption.reached(1)
        os.kill(os.getpid(), signal.SIGINT)
        assert wait_until(lambda: preemption.reached(2)) and process.exit_code() == 130
    assert "press Ctrl-C again to leave at once" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGINT) == before


def test_a_loop_that_nobody_stopped_gives_the_signal_back(told):
    """Afterwards a signal does what it did before."""
    with hosts.Preemption() as preemption:
        assert not preemption.reached(1)
    os.kill(os.getpid(), signal.SIGTERM)
    assert wait_until(told.is_set)


TOGETHER = """
import sys
from pathlib import Path
from crossin_jax.config import UserError
from crossin_jax.parallel import hosts
coordinator, process, root = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
hosts.start(coordinator, 2, process)
print("agree", [hosts.any_process(value) for value in (process == 1, process == 0, False, True)])
for folders in (("one", "one"), ("one", "two")):
    try:
        hosts.check_shared(root / folders[process])
        print("shared")
    except UserError as error:
        print("private", str(error).splitlines()[0])
hosts.barrier("the end")
"""


def test_two_processes_agree_and_see_one_folder(tmp_path):
    """What is true on one is true for both; a folder that is not the same for both is refused."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    coordinator = f"localhost:{free_port()}"
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu"}
    pair = [
        subprocess.Popen(
            [sys.executable, "-c", TOGETHER, coordinator, str(i), str(tmp_path)],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0].splitlines() for process in pair]
    assert [process.returncode for process in pair] == [0, 0]
    for lines, name in zip(outputs, ("one", "two"), strict=True):
        assert lines[-3:] == [  # after what the library says of its links
            "agree [True, True, False, True]",
            "shared",
            f"private output_dir={tmp_path / name} is not shared: process 1 cannot see "
            "what 0 writes",
        ]
    assert not list(tmp_path.rglob(".seen*"))


APART = """
import sys, time
from crossin_jax.parallel import hosts
hosts.start(sys.argv[1], 2, int(sys.argv[2]))
time.sleep(40 if sys.argv[2] == "0" else 0)
print("agree", hosts.any_process(True))
"""


@pytest.mark.long
def test_processes_wait_for_one_that_is_busy_after_the_start():
    """For example with the owner of a folder, who may be dead; Gloo alone would wait for 30 s."""
    coordinator = f"localhost:{free_port()}"
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", APART, coordinator]
    pair = [
        subprocess.Popen([*command, i], env=environment, stdout=subprocess.PIPE, text=True)
        for i in "01"
    ]
    assert all("agree True" in process.communicate(timeout=240)[0] for process in pair)


def test_one_process_agrees_with_itself(tmp_path):
    """Nothing is asked of others, and no folder is touched."""
    assert [hosts.any_process(value) for value in (True, False)] == [True, False]
    hosts.check_shared(tmp_path / "absent")
    hosts.barrier("nobody")


def test_one_process_waits_for_nobody():
    hosts.start()
    hosts.start("localhost:1", 1, 0)
