"""The plan of a run: what it counts, what it needs, what it proposes; compiled for TPUs that are
not there.
"""

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import jax
import pytest

from crossin_jax.checkpoint import tensors
from crossin_jax.checkpoint import weights as stream
from crossin_jax.config import (
    Architecture,
    Config,
    Data,
    Evaluation,
    Lora,
    Mesh,
    Model,
    Train,
    UserError,
)
from crossin_jax.models.spec import spec_from_hf, spec_to_hf
from crossin_jax.plan import __main__ as plan_command
from crossin_jax.plan.cost import Cost
from crossin_jax.plan.plan import (
    Phase,
    Plan,
    _estimate,
    changes,
    describe_change,
    find_change,
    make_plan,
)
from crossin_jax.plan.report import render
from crossin_jax.plan.schedule import Event
from crossin_jax.plan.topology import CHIPS, open_topology
from crossin_jax.tables import STYLES, render_parts
from tests.conftest import REPOSITORY
from tests.models.published import CHECKPOINTS
from tests.parallel.tpu import topology

ROWS, T = 8, 256
SPEC = dataclasses.replace(
    spec_from_hf(CHECKPOINTS["meta-llama/Llama-2-7b-hf"][0], "llama"),
    width=256,
    ff_width=512,
    num_layers=3,
    num_heads=2,
    num_kv_heads=2,
    vocab_size=1024,
    max_length=1024,
)
LAYER = 4 * 256 * 256 + 3 * 256 * 512  # numbers in the matrices of a layer
TOKENS = ROWS * T // 4  # per chip


def show(plan: Plan, style: str = "text") -> str:
    """What the program prints of a plan."""
    return "\n".join(render_parts(style, render(plan))[0])


def config_of(folder, **changes) -> Config:
    """Full fine-tuning of a model of which only config.json exists."""
    (folder / "config.json").write_text(json.dumps(spec_to_hf(SPEC)))
    return dataclasses.replace(
        Config(
            model=Model(path=str(folder)),
            mesh=Mesh(fsdp=4),
            data=Data(length=T),
            train=Train(steps=7200, batch_size=ROWS),
            evaluation=Evaluation(benchmarks=("cross_mmlu",), batch_size=32, max_new_tokens=32),
        ),
        **changes,
    )


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """The configuration and its plan."""
    topology("v5e:2x2")
    config = config_of(tmp_path_factory.mktemp("model"))
    return config, make_plan(config, "v5e:2x2")


def test_the_training_step_is_counted_to_the_last_product(planned):
    _, plan = planned
    train = plan.phases["train"]
    # forward and two products backward, for every matrix that tokens pass; the embedding is a
    # look-up
    assert train.flops - train.kernel_flops == 3 * 2 * TOKENS * (3 * LAYER + 1024 * 256)
    # one tile of attention per row and head: 2 products forward, 3 + 4 backward
    assert train.kernel_flops == 3 * 9 * 2 * T * T * 128 * 2 * (ROWS // 4)
    assert sum(train.sent_bytes.values()) > 0 and 0 < train.matrix_cycles < train.cycles


def test_decoding_does_not_gather_the_weights(planned):
    """32 rows of width 256: the tokens travel, see `mesh.weights_stay`."""
    _, plan = planned
    gathered = 2 * SPEC.num_parameters * 3 / 4  # the other chips' bfloat16 weights
    assert 0 < sum(plan.phases["decode"].sent_bytes.values()) < gathered / 3
    # Prompts have so many tokens that their weights are gathered, as in training.
    assert sum(plan.phases["prefill"].sent_bytes.values()) > gathered / 3


def test_memory_is_that_of_the_sharded_state(planned):
    _, plan = planned
    train, limit = plan.phases["train"], topology("v5e:2x2").hbm_limit
    norms = (2 * 3 + 1) * 256
    # Weights and two moments in float32; norms are whole.
    state = 3 * 4 * ((SPEC.num_parameters - norms) // 4 + norms)
    batch = 5 * 4 * TOKENS + TOKENS
    assert state + batch <= train.argument_bytes <= state + batch + 64  # the counters of the steps
    assert train.argument_bytes < train.peak_bytes < limit == plan.hbm_limit and plan.fits
    assert plan.read_bytes == 2 * SPEC.num_parameters  # one host, every number once, in bfloat16
    assert plan.host_peak_bytes >= 1024 * 256 * 2 and abs(plan.saved_bytes - 4 * state) < 64
    assert set(os.listdir(planned[0].model.path)) == {"config.json"}


def test_loading_holds_the_weights_and_a_piece(planned):
    config, plan = planned
    load, norms = plan.phases["load"], (2 * 3 + 1) * 256
    weights = 4 * ((SPEC.num_parameters - norms) // 4 + norms)
    piece = 2 * 256 * 512 // 4  # half of the largest tensor, the embedding: one layer, in bfloat16
    assert (
        load.argument_bytes == pytest.approx(weights + piece, abs=64)
        and load.argument_bytes <= load.peak_bytes
    )
    frozen = dataclasses.replace(
        config,
        lora=Lora(rank=4, modules_to_save=()),
        model=dataclasses.replace(config.model, frozen_dtype="int8"),
    )
    codes = make_plan(frozen, "v5e:2x2", ("load",)).phases["load"]
    embeddings = 2 * 2 * 1024 * 256 // 4  # bfloat16, as the norms
    # One per output; those of o_proj and down_proj are sharded.
    scales = 3 * 4 * (3 * 256 + 2 * 512 + 2 * 256 // 4)
    expected = 3 * LAYER // 4 + scales + embeddings + 2 * norms + piece
    assert codes.argument_bytes == pytest.approx(expected, abs=64)
    assert codes.argument_bytes <= codes.peak_bytes < load.peak_bytes


def test_what_is_offloaded_is_in_the_hosts_memory(planned):
    config, plan = planned
    model = dataclasses.replace(config.model, remat="offload")
    offloading = make_plan(dataclasses.replace(config, model=model), "v5e:2x2", ("train",))
    train, kept = offloading.phases["train"], plan.phases["train"]
    # queries, keys, values, context and output; gate and up; in bfloat16, for every layer
    assert train.offloaded_bytes == pytest.approx(3 * TOKENS * (5 * 256 + 2 * 512) * 2, rel=0.02)
    assert kept.offloaded_bytes == 0 and train.argument_bytes < train.peak_bytes < kept.peak_bytes
    assert "memory of its host" in show(offloading) and "memory of its host" not in show(plan)


def test_prefill_and_decoding_are_the_engines(planned):
    _, plan = planned
    prefill, decode = plan.phases["prefill"], plan.phases["decode"]
    matrices, head = 3 * LAYER, 1024 * 256
    # One prompt per chip, and for the logits after all four a quarter of the columns of the head.
    assert prefill.flops - prefill.kernel_flops == 2 * T * matrices + 2 * head
    # Eight rows per chip; attention of one query is made of sums too.
    assert decode.flops == 8 * 2 * (matrices + head)
    slots = T + 32  # room for prompts and for what is drawn
    assert decode.argument_bytes > 8 * 2 * 3 * slots * 256 * 2  # the cache of eight rows per chip


def test_every_host_reads_and_writes_its_part(tmp_path):
    """Two hosts of four chips: a host reads what its chips hold, and writes their trained state."""
    topology("v5e:2x2")
    config = config_of(tmp_path, mesh=Mesh(fsdp=8), train=Train(batch_size=ROWS))
    plan = make_plan(config, "v4:2x2x2", ())
    norms = (2 * 3 + 1) * 256
    sharded = SPEC.num_parameters - norms
    assert (plan.chips, plan.hosts, plan.mesh) == (8, 2, {"data": 1, "fsdp": 8, "tensor": 1})
    assert plan.read_bytes == 2 * (sharded // 2 + norms)  # bfloat16
    assert plan.saved_bytes == pytest.approx(4 * 3 * 4 * (sharded // 8 + norms), abs=64)
    largest = 2 * 1024 * 256  # the embedding
    assert plan.host_peak_bytes == pytest.approx(
        stream.resident_bytes() + largest + stream.WORKERS * tensors.CHUNK, rel=0.05
    )
    assert plan.tokens_per_step == ROWS * T and (plan.steps, plan.hours) == (None, None)
    assert plan.phases == {} and plan.fits and plan.change == {}
    config.lora, config.model.frozen_dtype = Lora(rank=8, modules_to_save=()), "int8"
    adapted = make_plan(config, "v4:2x2x2", ())
    # pairs of every projection: their inputs and outputs times the rank, a part on each chip
    pairs = 3 * 8 * (4 * (256 + 256) + 2 * (256 + 512) + (512 + 256))
    assert adapted.saved_bytes == pytest.approx(4 * 3 * 4 * pairs // 8, abs=256)
    assert adapted.read_bytes == plan.read_bytes  # neither adapters nor scales lie in the files
    fresh = dataclasses.replace(config, lora=None, model=Model(architecture=Architecture()))
    assert make_plan(fresh, "v4:2x2x2", ()).read_bytes == 0  # there is no file


def test_micro_batches_attend_to_their_own_rows(planned):
    """As many rows pass the kernels as without micro-batches, in two parts."""
    config, plan = planned
    train = dataclasses.replace(config.train, accumulation=2)
    halves = make_plan(dataclasses.replace(config, train=train), "v5e:2x2", ("train",)).phases[
        "train"
    ]
    assert halves.kernel_flops == plan.phases["train"].kernel_flops
    assert halves.flops == plan.phases["train"].flops


def test_a_benchmark_in_training_finds_the_moments_in_memory(planned):
    """Without one the run would fit: moments are two thirds of the state."""
    config, plan = planned
    peak = max(plan.phases[name].peak_bytes for name in ("prefill", "decode"))
    slice_ = dataclasses.replace(
        topology("v5e:2x2"), hbm_limit=peak + plan.phases["train"].argument_bytes // 2
    )
    train = dataclasses.replace(config.train, benchmark_every=100)
    assert not make_plan(dataclasses.replace(config, train=train), slice_, ("decode",)).fits


def test_prompts_leave_room_for_answers(tmp_path):
    """Of the 1,024 positions that the model has, 512 are for answers."""
    slice_ = topology("v5e:2x2")
    asked = Evaluation(benchmarks=("cross_mmlu",), batch_size=4, max_new_tokens=512)
    plan = make_plan(
        config_of(tmp_path, data=Data(length=1024), evaluation=asked), slice_, ("prefill",)
    )
    prefill = plan.phases["prefill"]
    assert prefill.flops - prefill.kernel_flops == 2 * 512 * 3 * LAYER + 2 * 1024 * 256


GIB = 2**30
MADE_UP = Plan(
    topology="v5e:4x4",
    chips=16,
    hosts=4,
    hbm_limit=16 * GIB,
    mesh={"data": 1, "fsdp": 8, "tensor": 2},
    fits=True,
    phases={
        "train": Phase(
            3 * GIB,
            5 * GIB,
            9 * GIB,
            GIB // 2,
            61.4,
            7e12,
            2e12,
            11e9,
            300e6,
            75e6,
            {"all-gather": 4e9, "all-reduce": 6e9},
            {"all-gather": 20, "all-reduce": 3},
            0.25,
            (0.03, 0.125),
            (0.28, 0.625),
            {"all-gather": 3e9},
        ),
        "decode": Phase(2 * GIB, GIB, 4 * GIB, 0, 8.0),
    },
    read_bytes=6 * GIB,
    host_peak_bytes=7 * GIB,
    saved_bytes=12 * GIB,
    tokens_per_step=4096,
    steps=7200,
    hours=(0.56, 1.25),
    answer_hours=(0.005, 150.0),
    answer_tokens=128,
    change={},
)
SHOWN = {
    "HBM, arguments, GiB": ("3.00", "2.00"),
    "HBM, temporaries, GiB": ("5.00", "1.00"),
    "HBM, peak of 16.00 GiB": ("9.00", "4.00"),
    "memory of its host, GiB": ("0.50", "0.00"),
    "matrix TFLOP executed": ("7.000", "-"),
    "of it in attention kernels (formula)": ("2.000", "-"),
    "HBM traffic, GB": ("11.00", "-"),
    "compiler's Mcycles": ("300.0", "-"),
    "of it matrix work": ("25%", "-"),
    "sent by all-gather, GB": ("4.00", "0.00"),
    "sent by all-reduce, GB": ("6.00", "0.00"),
    "compiled here in seconds": ("61", "8"),
    "seconds at least (ceiling of the chip)": ("0.2500", "-"),
    "seconds waiting": ("0.03 to 0.125", "-"),
    "seconds, estimated": ("0.28 to 0.625", "-"),
}


def test_every_number_is_printed_in_its_unit():
    """One line per number, one column per program; a dash where a program does not fit."""
    lines = show(MADE_UP).splitlines()
    assert lines[0] == (
        "v5e:4x4: 16 chips on 4 hosts, mesh data 1 x fsdp 8 x tensor 2, 4,096 tokens per step"
    )
    found = {}
    for line in lines[2:]:
        label, _, cells = line.strip().partition("  ")
        found[label] = tuple(re.split(" {2,}", cells.strip()))
    assert {label: found.get(label) for label in SHOWN} == SHOWN
    assert [tuple(line.split()) for line in lines if line.startswith(("  times", "  of it b"))] == [
        ("of", "it", "beside", "other", "work", "75%", "-"),
        ("times", "20", "0"),
        ("of", "it", "beside", "other", "work", "0%", "-"),
        ("times", "3", "0"),
    ]
    assert lines[-5:] == [
        "loading: a host reads 6.00 GiB of weights; its memory peaks at about 7.00 GiB",
        "checkpoints: a host copies and writes 12.00 GiB",
        "training, estimated: 6,554 to 14,629 tokens/s; 7,200 steps take 0.56 to 1.25 hours, "
        "8.96 to 20 chip-hours",
        "evaluation, estimated: 1,000 prompts of full length with answers of 128 tokens take "
        "0.005 to 150 hours, 0.08 to 2,400 chip-hours",
        "fits",
    ]
    other = dataclasses.replace(
        MADE_UP, fits=False, steps=None, hours=None, answer_hours=None, read_bytes=0
    )
    assert show(other).splitlines()[-2:] == [
        "training, estimated: 6,554 to 14,629 tokens/s; set train.steps for the hours of the run",
        "does not fit",
    ]
    assert "loading" not in show(other)


@pytest.mark.parametrize("style", STYLES)
def test_the_program_prints_every_style(style, capsys, monkeypatch):
    monkeypatch.setattr(plan_command, "make_plan", lambda *_: MADE_UP)
    monkeypatch.setattr(plan_command, "open_topology", lambda _: None)
    flags = dict.fromkeys(("out", "tune", "search", "json"))
    plan_command.main(Config(), SimpleNamespace(topology="v5e:4x4", format=style, **flags))
    said = capsys.readouterr()
    row = {
        "text": r"HBM traffic, GB +11.00 +-",
        "markdown": r"\| HBM traffic, GB \| 11.00 \| - \|",
        "latex": r"HBM traffic, GB & 11.00 & - ",
        "csv": r'"HBM traffic, GB",11.00,-',
    }[style]
    assert re.search(row, said.out)
    assert ("16 chips on 4 hosts" in said.err) == (style == "csv") != ("fits" in said.out)


def test_floors_follow_from_the_data_sheet(planned):
    config, plan = planned
    train = plan.phases["train"]
    assert train.floor_seconds == max(train.flops / 197e12, train.argument_bytes / 8.19e11)
    # The upper estimate: the compiler's cycles, attention at half the peak, and longer waiting.
    (low, high), (least, most) = train.waiting_seconds, train.seconds
    assert 0 < low < high and least == train.floor_seconds + low
    work = train.cycles / 1.5e9 + 2 * train.kernel_flops / 197e12
    assert most == pytest.approx(max(work, train.floor_seconds) + high)
    assert plan.hours == pytest.approx((2 * least, 2 * most))
    prefill, decode = plan.phases["prefill"], plan.phases["decode"]
    pairs = zip(prefill.seconds, decode.seconds, strict=True)
    answers = [1000 * (first / prefill.rows + 32 * more / 32) for first, more in pairs]
    assert plan.answer_hours == pytest.approx([seconds / 3600 for seconds in answers])
    assert plan.phases["load"].seconds is plan.phases["load"].waiting_seconds is None
    assert all(train.beside_bytes[kind] <= sent for kind, sent in train.sent_bytes.items())
    text = show(plan)
    assert "7,200 steps take" in text and "HBM, peak of 15.75 GiB" in text and text.endswith("fits")
    json.dumps(dataclasses.asdict(plan))


def test_the_program_prints_its_plan_and_says_whether_it_fits(planned, capsys, monkeypatch):
    config, plan = planned
    options = {"topology": "v5e:2x2", "out": None, "tune": False, "search": True, "format": "text"}

    def run(fits, better=None, **more):
        monkeypatch.setattr(
            plan_command, "make_plan", lambda *_: dataclasses.replace(plan, fits=fits)
        )
        monkeypatch.setattr(plan_command, "find_change", lambda *_: better)
        code = plan_command.main(config, SimpleNamespace(**options | more))
        return code, capsys.readouterr().out

    assert run(True, json=False) == (0, show(plan) + "\n")
    code, text = run(True, json=True)
    assert code == 0 and json.loads(text) == {
        "plan": json.loads(json.dumps(dataclasses.asdict(plan))),
        "change": None,
    }
    better = dataclasses.replace(plan, change={"model.remat": "dots"})
    code, text = run(False, better, json=False)
    assert (
        code == 0
        and f"the smallest change that fits: --config.model.remat=dots\n{show(better)}" in text
    )
    code, text = run(False, json=False)
    assert code == 1 and "does not fit\n" in text and "take more chips" in text
    monkeypatch.setattr(plan_command, "find_change", None)
    monkeypatch.setattr(plan_command, "make_plan", lambda *_: dataclasses.replace(plan, fits=False))
    code = plan_command.main(config, SimpleNamespace(**options | {"search": False}, json=False))
    text = capsys.readouterr().out
    assert code == 1 and text.endswith("does not fit\n")  # nothing was looked for


TUNED = [  # (what is proposed, exit code, words)
    (MADE_UP, 0, "fits\n\nproposed: the configuration as it is\n"),
    (
        dataclasses.replace(MADE_UP, change={"model.remat": "dots"}),
        0,
        "proposed: --config.model.remat=dots\nto train with it: python -m crossin_jax.train ",
    ),
    (dataclasses.replace(MADE_UP, fits=False), 1, "does not fit\n\nproposed: "),
    (None, 1, "nothing fits: take more chips, LoRA, or model.param_dtype=bfloat16\n"),
]


@pytest.mark.parametrize(("proposed", "code", "words"), TUNED)
def test_tuning_says_what_it_proposes_and_whether_it_fits(
    proposed, code, words, tmp_path, capsys, monkeypatch
):
    """Text or JSON; the exit code tells scripts."""
    topology("v5e:2x2")
    asked = []
    monkeypatch.setattr(
        "crossin_jax.plan.tune.propose", lambda *given: asked.append(given) or proposed
    )
    out = str(tmp_path / "p.json")
    options = {"topology": "v5e:2x2", "out": out, "tune": True, "search": True, "format": "text"}
    assert plan_command.main(Config(), SimpleNamespace(**options, json=False)) == code
    text = capsys.readouterr().out
    assert words in text and ("--tuned=" + out in text) == (proposed is not None)
    assert asked[0][0] == Config() and asked[0][1].name == "v5e:2x2" and asked[0][2] == out
    assert plan_command.main(Config(), SimpleNamespace(**options, json=True)) == code
    told = json.loads(capsys.readouterr().out)
    assert told == {"plan": proposed and json.loads(json.dumps(dataclasses.asdict(proposed)))}
    with pytest.raises(UserError, match="--out is for the proposal of --tune"):
        plan_command.main(Config(), SimpleNamespace(**options | {"tune": False}, json=False))


def test_the_smallest_change_that_fits_is_found_by_compiling(planned):
    config, plan = planned
    config = dataclasses.replace(config, evaluation=Evaluation())
    slice_ = dataclasses.replace(topology("v5e:2x2"), hbm_limit=plan.phases["train"].peak_bytes - 1)
    failed = dataclasses.replace(plan, phases={"train": plan.phases["train"]}, fits=False)
    better = find_change(config, slice_, failed)
    assert (
        better.change == {"model.remat": "dots"}
        and better.phases["train"].peak_bytes <= slice_.hbm_limit
    )
    assert describe_change(better.change) == "--config.model.remat=dots"
    hopeless = dataclasses.replace(slice_, hbm_limit=plan.phases["train"].argument_bytes // 2)
    # The state alone is too big everywhere: nothing is compiled.
    assert find_change(config, hopeless, failed) is None


def test_where_only_the_benchmarks_do_not_fit_they_take_fewer_rows(planned, capsys):
    config, plan = planned
    slice_ = dataclasses.replace(
        topology("v5e:2x2"), hbm_limit=plan.phases["decode"].peak_bytes - 1
    )
    # As if the training step were small.
    train = dataclasses.replace(plan.phases["train"], peak_bytes=1)
    failed = dataclasses.replace(plan, phases=plan.phases | {"train": train}, fits=False)
    better = find_change(config, slice_, failed)
    rows = better.change["evaluation.batch_size"]
    assert (
        rows == config.evaluation.batch_size // 2
        and better.phases["train"] == train
        and better.fits
    )
    assert better.phases["decode"].peak_bytes <= slice_.hbm_limit < plan.phases["decode"].peak_bytes
    assert describe_change(better.change) == f"--config.evaluation.batch_size={rows}"
    assert capsys.readouterr().err == f"trying --config.evaluation.batch_size={rows}\n"


def test_decoding_reads_the_cache_as_it_lies(planned):
    """Left to itself the compiler turns the cache around a loop; then traffic is 1.7 times the
    arguments here.
    """
    decode = planned[1].phases["decode"]
    assert decode.hbm_bytes < 1.5 * decode.argument_bytes


def moved(fsdp: int, tensor: int) -> dict[str, int | None]:
    """Another mesh over four chips."""
    return {"mesh.data": None, "mesh.fsdp": fsdp, "mesh.tensor": tensor}


@pytest.mark.parametrize(("kind", "is_known"), [("v4", False), ("v5e", True)])
def test_time_between_slices_is_estimated_where_the_data_sheet_has_the_network(kind, is_known):
    """Four gigabytes over 25 gigabits per second; half of that in the upper estimate."""
    cost = Cost(sent=Counter({"all-reduce between slices": 4e9}))
    steps = [Event("start", 4e9, "sum", True), Event("done", key="sum")]
    cost.timelines.append((1, steps))
    waiting, seconds = _estimate(CHIPS[kind], cost, 0.5, 0.0)
    if not is_known:
        assert waiting is seconds is None
    else:
        assert waiting == pytest.approx((4 / 3.125, 8 / 3.125 + 1e-4))
        assert seconds == pytest.approx((0.5 + waiting[0], 0.5 + waiting[1]))


FULL, DOTS = {"model.remat": "full"}, {"model.remat": "dots"}
PARTS = {parts: {"train.accumulation": parts} for parts in (2, 4, 8, 16, 32)}
CHANGES = [  # (remat, batch size, micro-batches, mesh, what is tried, in this order)
    (
        "none",
        16,
        4,
        Mesh(),
        [
            DOTS,
            FULL,
            FULL | PARTS[8],
            FULL | PARTS[16],
            *(
                step
                for mesh in (moved(4, 1), moved(2, 2), moved(1, 4))
                for step in (mesh, mesh | FULL, mesh | FULL | PARTS[16])
            ),
        ],
    ),
    (
        "dots",
        6,
        1,
        Mesh(fsdp=4),
        [
            FULL,
            FULL | PARTS[2],
            *(
                step
                for mesh in (moved(2, 2), moved(1, 4))
                for step in (mesh, mesh | FULL, mesh | FULL | PARTS[2])
            ),
        ],
    ),
    (
        "full",
        8,
        2,
        Mesh(fsdp=1, tensor=2),
        [
            PARTS[4],
            PARTS[8],
            *(step for mesh in (moved(2, 2), moved(1, 4)) for step in (mesh, mesh | PARTS[8])),
        ],
    ),
    (
        "offload",
        5,
        1,
        Mesh(fsdp=2, tensor=2),
        [FULL, moved(1, 4), moved(1, 4) | FULL, moved(1, 4) | FULL],
    ),
    ("q+k", 3, 1, Mesh(fsdp=1, tensor=4), [FULL]),
    ("full", 3, 1, Mesh(fsdp=1, tensor=4), []),
]


@pytest.mark.parametrize(("remat", "rows", "parts", "mesh", "expected"), CHANGES)
def test_changes_go_from_cheap_to_dear(remat, rows, parts, mesh, expected):
    """First what costs only speed, then meshes with as much or more tensor parallelism."""
    asked = Config(
        model=Model(path="m", remat=remat),
        mesh=mesh,
        train=Train(batch_size=rows, accumulation=parts),
    )
    assert list(changes(asked, SimpleNamespace(devices=(None,) * 4))) == expected
    two = [SimpleNamespace(slice_index=i // 4) for i in range(8)]
    assert list(changes(asked, SimpleNamespace(devices=two))) == expected


def test_lora_pairs_are_sharded_on_both_sides(tmp_path):
    slice_ = topology("v5e:2x2")
    config = config_of(tmp_path, lora=Lora(rank=8, modules_to_save=()))
    from crossin_jax.parallel.mesh import make_mesh
    from crossin_jax.training.state import abstract_model

    model = abstract_model(config, SPEC, make_mesh(config.mesh, list(slice_.devices)))
    assert all(
        leaf.sharding.shard_shape(leaf.shape) != leaf.shape
        for leaf in jax.tree.leaves(model.trainable)
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--topology=v5e:3x3"], "v5e:4x4"),
        (["--topology=v5p:2x2"], "v5p has three sides"),
        (["--topology=v5e:2x2x1"], "v5e has two sides"),
        (["--topology=v9:2x2"], "v4, v5e, v5p, v6e"),
        ([], "--topology is missing"),
        (["--topology=v5e:2x2", "--config.mesh.fsdp=3"], "4 devices"),
        (["--topology=v5e:2x2", "--config.train.batch_size=6"], "use 4 or 8"),
        (["--topology=v5e:2x2", "--tune", "--out=/no/where/p.json"], "/no/where does not exist"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_a_line(tmp_path, arguments, words):
    topology("v5e:2x2")
    config_of(tmp_path)
    (tmp_path / "c.py").write_text(
        "from crossin_jax.config import *\ndef get_config():\n"
        f"    return Config(model=Model(path={str(tmp_path)!r}), mesh=Mesh(fsdp=4))\n"
    )
    command = [sys.executable, "-m", "crossin_jax.plan", f"--config={tmp_path}/c.py", *arguments]
    run = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, env={**os.environ, "XLA_FLAGS": ""}
    )
    assert run.returncode == 2 and run.stderr.startswith("error: ") and words in run.stderr, (
        run.stderr
    )
    assert len(run.stderr.strip().splitlines()) <= 3 and not run.stdout
    assert open_topology("v5e:2x2").num_hosts == 1
