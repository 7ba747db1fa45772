"""The benchmarks that need torch, hardware or hours, in miniature: every line of them runs."""

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY

ENVIRONMENT = os.environ | {"JAX_PLATFORMS": "cpu"}


@pytest.mark.long
def test_training_beside_peft_has_the_same_losses(shared, tmp_path):
    pytest.importorskip("peft")
    run = subprocess.run(
        [
            sys.executable,
            "benchmarks/train_vs_peft.py",
            "--quick",
            f"--data={shared}",
            f"--out={tmp_path}/r.json",
        ],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    results = json.loads((tmp_path / "r.json").read_text())["results"]
    assert [result["layout"] for result in results] == ["unpadded", "padded", "longest"]
    assert all(
        result["losses_apart"] <= 1e-4 and 0 < result["ratio"] < result["bound"]
        for result in results
    )
    # packed and padded rows hold the same examples, and so as many learned tokens
    assert results[1]["supervised"] == results[2]["supervised"] > 0 and results[1]["examples"] > 4


@pytest.mark.long
def test_the_gpu_benchmark_runs_in_miniature(tmp_path):
    run = subprocess.run(
        [sys.executable, "benchmarks/gpu.py", "--quick", f"--out={tmp_path}/gpu.json"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
    )
    assert run.returncode == 0, run.stdout + run.stderr[-2000:]
    results = json.loads((tmp_path / "gpu.json").read_text())["results"]
    for part in ("full", "lora"):
        assert (
            results[part]["ours"]["tokens_per_second"]
            > 0
            < results[part]["theirs"]["tokens_per_second"]
        )
    # forward and backward of every matrix, and of attention; the tied embedding counts as the head
    layer = 64 * 16 * (4 + 2 + 2 + 4) + 3 * 64 * 128
    assert (
        results["full"]["ours"]["flops_per_token"]
        == 6 * (layer + 512 * 64 + 3 * 64) + 12 * 4 * 16 * 128
    )
    ours, theirs = results["decode"]["ours"], results["decode"]["theirs"]
    weights = 2 * (layer + 512 * 64 + 3 * 64)
    assert (
        ours["bytes_per_step"]
        == theirs["bytes_per_step"]
        == weights + 2 * 2 * 2 * 16 * 2 * (16 + 128)
    )


@pytest.mark.parametrize(
    ("program", "rows", "page"),
    [
        ("tpu_compile", "tpu-compile", "benchmarks/results/2026-11-26-tpu-compile.md"),
        ("maxtext_compile", "tpu-compile-turns", "benchmarks/results/2026-11-26-tpu-compile.md"),
        ("paper_plans", "paper-plans", "docs/plan.md"),
    ],
)
def test_pages_hold_the_tables_that_their_rows_give(program, rows, page):
    rows = f"benchmarks/results/2026-11-26-{rows}.jsonl"
    run = subprocess.run(
        [sys.executable, f"benchmarks/{program}.py", f"--table={rows}"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert len(run.stdout.splitlines()) >= 9 and run.stdout in (REPOSITORY / page).read_text()


def test_the_step_needs_no_more_than_the_best_peers(monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    from tpu_compile import PEERS, PRECISIONS

    lines = (
        (REPOSITORY / "benchmarks/results/2026-11-26-tpu-compile.jsonl").read_text().splitlines()
    )
    seen = set()
    for row in map(json.loads, lines):
        peak, cycles = PEERS[row["work"]][PRECISIONS.index(row["param_dtype"])]
        seen.add((row["work"], row["remat"]))
        assert row["cycles"] / 1e6 <= (0.95 if row["remat"] == "full" else 0.80) * cycles, row[
            "work"
        ]
        assert row["remat"] != "full" or row["peak_bytes"] / 2**30 <= peak, row["work"]
    assert {work for work, remat in seen if remat == "full"} == set(PEERS) and len(seen) > len(
        PEERS
    )
