"""What a run says of itself, and to whom: console, JSONL, TensorBoard, W&B; process 0 alone
speaks.
"""

import io
import json
import logging
import struct
import sys
import types

import jax
import numpy as np
import pytest

from crossin_jax.config import Lora
from crossin_jax.models.spec import spec_from_architecture
from crossin_jax.parallel.mesh import make_mesh
from crossin_jax.training import telemetry as module
from crossin_jax.training.state import abstract_model, flops_per_token
from crossin_jax.training.telemetry import (
    Profiler,
    Telemetry,
    is_recorded,
    peak_flops,
)
from tests.helpers import config_in, small_architecture

GROUPS = [("base", "en"), ("x2x", "zh")]


def metrics(loss: float = 2.0) -> dict[str, np.ndarray]:
    """What a step returns: 30 learned tokens of base/en at 1.0 and 10 of x2x/zh at 5.0, out
    of 100.
    """
    return {
        "loss": np.float32(loss),
        "count": np.float32(40),
        "tokens": np.float32(100),
        "grad_norm": np.float32(0.5),
        "group_loss": np.float32([30, 50]),
        "group_count": np.float32([30, 10]),
    }


@pytest.fixture
def clock(monkeypatch):
    """Two seconds pass between readings."""
    readings = iter(range(0, 1000, 2))
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(readings))


@pytest.fixture
def start(tmp_path, clock):
    """Starts a telemetry of ten steps that reports every second one."""
    started = []

    def start(**changes) -> Telemetry:
        started.append(
            Telemetry(
                tmp_path,
                **{
                    "name": "mine",
                    "start": 0,
                    "num_steps": 10,
                    "log_every": 2,
                    "groups": GROUPS,
                    "flops_per_token": 1e9,
                    "use_tensorboard": False,
                    "use_wandb": False,
                    "config": {"seed": 1},
                }
                | changes,
            )
        )
        return started[-1]

    yield start
    for telemetry in started:
        telemetry.close()


def take_steps(telemetry: Telemetry, steps: int = 4) -> None:
    for step in range(1, steps + 1):
        telemetry.add(step, metrics(), 1e-4)


def read_records(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_record_holds_all_there_is_to_know(start, tmp_path, monkeypatch):
    device = types.SimpleNamespace(
        device_kind="TPU v5 lite", memory_stats=lambda: {"peak_bytes_in_use": 3 * 2**30}
    )
    for name in ("devices", "local_devices"):
        monkeypatch.setattr(jax, name, lambda: [device] * 8)
    take_steps(start())
    first, second, third = read_records(tmp_path)
    # The first step compiles: not timed.
    assert [record["step"] for record in (first, second, third)] == [
        1,
        2,
        4,
    ]
    assert not {"tokens_per_second", "mfu", "seconds_left"} & first.keys()
    host = third.pop("peak_host_memory_gib")
    assert 0.05 < host < 100
    assert third == {
        "step": 4,
        "loss": 2.0,
        "losses": [2.0, 2.0],
        "grad_norm": 0.5,
        "learning_rate": 1e-4,
        "loss/base/en": 1.0,
        "loss/x2x/zh": 5.0,
        "share/base/en": 0.75,
        "share/x2x/zh": 0.25,
        "tokens_per_second": 100.0,
        "learned_tokens_per_second": 40.0,
        "seconds_left": 6.0,
        "mfu": pytest.approx(100 * 1e9 / (8 * 197e12)),
        "peak_memory_gib": 3.0,
    }


def test_a_log_file_gets_a_line_per_report(start, tmp_path, capsys):
    telemetry = start()
    take_steps(telemetry)
    telemetry.write({"step": 4, "held_out/loss": 1.25})
    assert capsys.readouterr().err.splitlines() == [
        f"step 0/10 starts a new run in {tmp_path}; its first step takes longer, because it "
        "compiles",
        "step 1/10 loss 2.000 norm 0.50 rate 1.00e-04",
        "step 2/10 loss 2.000 norm 0.50 rate 1.00e-04 tok/s 50 left 0:00:16",
        "step 4/10 loss 2.000 norm 0.50 rate 1.00e-04 tok/s 100 left 0:00:06",
        "step 4/10 held-out loss 1.250",
    ]


def test_a_terminal_gets_a_bar_with_the_time_left(start, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    telemetry = start()
    take_steps(telemetry)
    telemetry._bar.refresh()
    last = terminal.getvalue().split("\r")[-1]
    assert (
        "mine:  40%" in last
        and "| 4/10 [" in last
        and "<" in last
        and "tok/s=100" in last
        and "loss=2.000" in last
    )


def test_tensorboard_gets_every_number(start, tmp_path):
    from tensorboardX.proto.event_pb2 import Event

    telemetry = start(use_tensorboard=True)
    take_steps(telemetry)
    telemetry.close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    data, values = file.read_bytes(), {}
    while data:  # records of length, checksum, event, checksum
        (length,) = struct.unpack("<Q", data[:8])
        event = Event.FromString(data[12 : 12 + length])
        values |= {(event.step, value.tag): value.simple_value for value in event.summary.value}
        data = data[16 + length :]
    for record in read_records(tmp_path):
        for name, value in record.items():
            if isinstance(value, float):
                assert values[record["step"], name] == pytest.approx(value)


def test_wandb_gets_them_where_it_is_installed_and_asked_for(start, tmp_path, monkeypatch, caplog):
    calls = []
    run = types.SimpleNamespace(
        log=lambda values, step: calls.append((step, values)),
        finish=lambda: calls.append("finished"),
    )
    fake = types.SimpleNamespace(init=lambda **options: calls.append(options) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    telemetry = start(use_wandb=True)
    take_steps(telemetry, 1)
    telemetry.close()
    assert calls[0]["name"] == "mine" and calls[0]["config"] == {"seed": 1}
    assert calls[1][0] == 1 and calls[1][1]["loss/x2x/zh"] == 5.0 and calls[2] == "finished"
    monkeypatch.setitem(sys.modules, "wandb", None)
    with caplog.at_level(logging.WARNING):
        take_steps(start(use_wandb=True), 1)
    assert "wandb is not installed" in caplog.text


def test_only_process_0_writes(start, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setitem(sys.modules, "wandb", None)
    telemetry = start(use_tensorboard=True, use_wandb=True)
    take_steps(telemetry)
    telemetry.write({"step": 4, "held_out/loss": 1.0})
    assert not list(tmp_path.iterdir()) and capsys.readouterr().err == ""
    with pytest.raises(FloatingPointError):  # but every process stops
        telemetry.add(5, metrics(np.nan), 1e-4)
        telemetry.add(6, metrics(), 1e-4)


def test_a_fault_is_told_by_its_first_step(start):
    telemetry = start(log_every=8)
    telemetry.add(1, metrics(), 1e-4)
    for step in range(2, 8):
        telemetry.add(step, metrics(np.inf if step > 4 else 1.0), 1e-4)
    with pytest.raises(FloatingPointError) as fault:
        telemetry.add(8, metrics(), 1e-4)
    assert fault.value.args == (5,)


@pytest.mark.parametrize(
    ("first", "last", "expected"),
    [
        (1, 9, [("start", 4), ("stop", 6)]),
        (5, 9, [("start", 5), ("stop", 6)]),
        (7, 9, []),
        (1, 5, [("start", 4), ("stop", 5)]),
    ],
)
def test_the_profiler_runs_in_its_window(first, last, expected, tmp_path, monkeypatch):
    """From the start, resumed inside the window or behind it, and ended inside it."""
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append(("start", step)))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append(("stop", step)))
    profiler = Profiler((4, 6), tmp_path)
    for step in range(first, last + 1):
        profiler.after(step, ())
    profiler.close()
    assert calls == expected
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    Profiler((4, 6), tmp_path).after(4, ())
    assert calls == expected


def test_what_is_recorded_is_found(start, tmp_path):
    assert not is_recorded(tmp_path, 2, "held_out/")
    telemetry = start()
    take_steps(telemetry, 2)
    telemetry.write({"step": 2, "held_out/loss": 1.0})
    assert is_recorded(tmp_path, 2, "held_out/") and not is_recorded(tmp_path, 1, "held_out/")
    assert not is_recorded(tmp_path, 2, "cross_mmlu")


def test_records_are_exact_to_the_step(start, tmp_path):
    """Step 2 is neither step 12 nor 20; a line that was cut by a kill counts as none."""
    telemetry = start(num_steps=30)
    for step in (12, 20):
        telemetry.write({"step": step, "held_out/loss": 1.0})
    assert not any(is_recorded(tmp_path, step, "held_out/") for step in (1, 2, 0, 120))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 25, "held_out/loss": 1.')
    assert not is_recorded(tmp_path, 25, "held_out/")


def test_a_log_is_cut_to_the_checkpoint_that_is_continued(start, tmp_path, capsys):
    """Steps 4 and 5 were not saved: they come again, and every step is there once."""
    (telemetry := start(log_every=1)).write({"step": 0, "held_out/loss": 3.0})
    take_steps(telemetry, 5)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "loss": 2.0, "lo')
    telemetry = start(start=3, log_every=1)
    assert f"step 3/10 continues from the checkpoint in {tmp_path}" in capsys.readouterr().err
    assert [record["step"] for record in read_records(tmp_path)] == [0, 1, 2, 3]
    for step in (4, 5, 6):
        telemetry.add(step, metrics(), 1e-4)
    assert [record["step"] for record in read_records(tmp_path)] == [0, 1, 2, 3, 4, 5, 6]
    start()  # in a folder without a checkpoint
    assert read_records(tmp_path) == []


# step: loss, learned tokens, tokens, gradient norm, sums of losses and learned tokens by group
STEPS = {
    1: (9.0, 10, 90, 8.0, (60, 30), (6, 4)),
    2: (8.0, 20, 70, 7.0, (100, 60), (15, 5)),
    3: (7.0, 30, 80, 6.0, (10, 200), (5, 25)),
    4: (6.0, 10, 20, 5.0, (60, 0), (10, 0)),
    5: (2.0, 30, 60, 4.0, (60, 0), (30, 0)),
    6: (1.0, 60, 100, 3.0, (60, 0), (60, 0)),
    7: (0.0, 0, 10, 0.0, (0, 0), (0, 0)),
}


def test_every_field_of_a_record_is_what_it_is_said_to_be(start, tmp_path, monkeypatch):
    """Steps that differ in everything, reported at the first, at every third and at the last."""
    device = types.SimpleNamespace(device_kind="TPU v4", memory_stats=lambda: None)
    for name in ("devices", "local_devices"):
        monkeypatch.setattr(jax, name, lambda: [device] * 4)
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    telemetry = start(log_every=3, num_steps=7, flops_per_token=2e9)
    for step, (loss, count, tokens, norm, group_loss, group_count) in STEPS.items():
        telemetry.add(
            step,
            {
                name: np.float32(value)
                for name, value in {
                    "loss": loss,
                    "count": count,
                    "tokens": tokens,
                    "grad_norm": norm,
                    "group_loss": group_loss,
                    "group_count": group_count,
                }.items()
            },
            step / 100,
        )
    mfu = 2e9 / (4 * 275e12)  # of one token a second
    expected = [
        {
            "step": 1,
            "loss": 9.0,
            "grad_norm": 8.0,
            "learning_rate": 0.01,
            "loss/base/en": 10.0,
            "loss/x2x/zh": 7.5,
            "share/base/en": 0.6,
            "share/x2x/zh": 0.4,
        },
        # two steps in two seconds: 160 and 210 are the sums of losses of 20 and 30 tokens
        {
            "step": 3,
            "loss": (160 + 210) / 50,
            "grad_norm": 6.0,
            "learning_rate": 0.03,
            "loss/base/en": 110 / 20,
            "loss/x2x/zh": 260 / 30,
            "share/base/en": 0.4,
            "share/x2x/zh": 0.6,
            "tokens_per_second": 75.0,
            "learned_tokens_per_second": 25.0,
            "seconds_left": 4.0,
            "mfu": 75 * mfu,
        },
        # a group of which nothing was learned is not named
        {
            "step": 6,
            "loss": 180 / 100,
            "grad_norm": 3.0,
            "learning_rate": 0.06,
            "loss/base/en": 1.8,
            "share/base/en": 1.0,
            "tokens_per_second": 90.0,
            "learned_tokens_per_second": 50.0,
            "seconds_left": 2 / 3,
            "mfu": 90 * mfu,
        },
        {
            "step": 7,
            "loss": 0.0,
            "grad_norm": 0.0,
            "learning_rate": 0.07,
            "tokens_per_second": 5.0,
            "learned_tokens_per_second": 0.0,
            "seconds_left": 0.0,
            "mfu": 5 * mfu,
        },
    ]
    records = read_records(tmp_path)
    assert [record.pop("losses") for record in records] == [
        [9.0],
        [8.0, 7.0],
        [6.0, 2.0, 1.0],
        [0.0],
    ]
    for record in records:
        assert record.pop("peak_host_memory_gib") > 0
    assert records == [pytest.approx(record) for record in expected]


def test_a_report_between_takes_what_has_gathered_and_no_step_twice(start, tmp_path):
    """As before a checkpoint: the steps since the last report, and nothing where there are none."""
    telemetry = start(log_every=100)
    take_steps(telemetry, 3)
    telemetry.report(1e-4)
    telemetry.report(1e-4)
    telemetry.add(4, metrics(), 1e-4)
    telemetry.report(1e-4)
    records = read_records(tmp_path)
    assert [(one["step"], len(one["losses"])) for one in records] == [(1, 1), (3, 2), (4, 1)]


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_told_and_not_written(name, value, start, tmp_path):
    telemetry = start()
    take_steps(telemetry, 2)
    telemetry.add(3, metrics() | {name: np.float32(value)}, 1e-4)
    with pytest.raises(FloatingPointError) as fault:
        telemetry.report(1e-4)
    assert fault.value.args == (3,)
    assert [record["step"] for record in read_records(tmp_path)] == [1, 2]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "lora",
    [
        None,
        Lora(rank=3, modules_to_save=()),
        Lora(rank=3, targets=("o_proj", "up_proj"), use_dora=True, modules_to_save=("lm_head",)),
    ],
    ids=["full", "adapters", "dora_and_head"],
)
def test_flops_are_counted_by_what_trains_and_what_is_frozen(tied, lora):
    """A token costs 6 for a number that trains and 4 for a frozen one; a look-up costs nothing."""
    D, F, L, N, K, H, V, T = 32, 48, 2, 8, 2, 4, 300, 16
    spec = spec_from_architecture(small_architecture(tie_embeddings=tied), V)
    config = config_in("x", lora=lora)
    sizes = {
        "q_proj": (D, N * H),
        "k_proj": (D, K * H),
        "v_proj": (D, K * H),
        "o_proj": (N * H, D),
        "gate_proj": (D, F),
        "up_proj": (D, F),
        "down_proj": (F, D),
    }
    layers = L * (sum(a * b for a, b in sizes.values()) + 2 * D)
    head = V * D  # also where it is the embedding too
    if lora is None:
        expected = 6 * (layers + head + D)
    else:
        pairs = sum(3 * sum(sizes[name]) for name in lora.targets)
        magnitudes = sum(sizes[name][1] for name in lora.targets if lora.use_dora)
        expected = 6 * L * (pairs + magnitudes) + 4 * (layers + D)
        expected += (6 if lora.modules_to_save else 4) * head
    model = abstract_model(config, spec, make_mesh(config.mesh))
    assert flops_per_token(model, T) == expected + 12 * L * N * H * T


def test_flops_and_peaks():
    """The count of a small model by hand: the embedding is tied, so it is a matrix that tokens pass
    through.
    """
    spec = spec_from_architecture(small_architecture(), 300)
    model = abstract_model(
        config_in("x", model=config_in("x").model), spec, make_mesh(config_in("x").mesh)
    )
    width, heads, kv, head, ff, layers = 32, 8, 2, 4, 48, 2
    matrices = layers * (width * head * (2 * heads + 2 * kv) + 3 * width * ff) + 300 * width
    norms = (2 * layers + 1) * width
    assert flops_per_token(model, 16) == 6 * (matrices + norms) + 12 * layers * heads * head * 16
    for kind, peak in (
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5e", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
        ("TPU v6e", 918e12),
        ("cpu", None),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GeForce", None),
    ):
        assert peak_flops(types.SimpleNamespace(device_kind=kind)) == peak
