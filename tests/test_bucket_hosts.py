"""Two processes of one run in a bucket: train, killed while they save, resume, evaluate, export."""

import numpy as np
import pytest

from crossin_jax import evaluate as evaluation
from crossin_jax import paths
from crossin_jax.checkpoint.store import list_steps
from crossin_jax.export import export
from crossin_jax.ownership import OWNER
from crossin_jax.paths import as_path
from crossin_jax.report.results import read_results
from tests.helpers import config_in
from tests.processes import TINY, finish, make_places, start_process, start_program
from tests.test_buckets import read_losses
from tests.test_evaluate_program import flags, silence


def run_pair(program: str, *arguments: str) -> list[str]:
    """The outputs of two processes of a program."""
    pair = [start_program(program, *arguments, *place) for place in make_places(2)]
    return [finish(process) for process in pair]


@pytest.fixture(scope="module")
def run(storage, pretrained, adapted):
    """A LoRA run of two processes in the bucket, on weights there. The first time, process 0 is
    killed while it writes the second checkpoint.
    """
    base, folder = as_path("gs://tests/pair/base"), as_path("gs://tests/pair/run")
    paths.upload(pretrained / "model", base)

    def start():
        config = ("--config", f"{TINY[1]}:{base}", "--config.mesh.fsdp=2")
        return [start_process(folder, *place, config=config) for place in make_places(2)]

    pair = start()

    def is_second_save(method, path):
        if method != "POST" or "checkpoints%2F6%2Fstate" not in path:
            return False
        pair[0].kill()
        return True

    with storage.failing("drop", is_second_save, 99) as killed:
        finish(pair[0], -9)
        output = finish(pair[1], 75)
    assert killed.hits and "process 0" in output and "Traceback" not in output
    assert list_steps(folder / "checkpoints") == [3]
    outputs = [finish(process) for process in start()]
    assert sum("trained: " in output for output in outputs) == 1
    return folder


@pytest.mark.long
def test_two_processes_resume_in_a_bucket(run, adapted):
    assert list_steps(run / "checkpoints") == [3, 6] and not (run / OWNER).exists()
    losses, expected = read_losses(run), read_losses(adapted)
    assert losses.keys() == expected.keys()
    np.testing.assert_allclose(list(losses.values()), list(expected.values()), rtol=1e-5)


def read_answers(folder):
    """The text or the choice and the log-likelihoods of every answer in a folder of results."""
    return {
        (predictions.method, item.id, language): (answer.text, answer.candidates, answer.scores)
        for run in read_results(folder)
        for predictions in run.predictions
        for item in predictions.items
        for language, answer in item.answers.items()
    }


@pytest.mark.long
def test_two_processes_evaluate_as_one_does(run, monkeypatch):
    """By likelihood and by generation."""
    outputs = run_pair("evaluate", f"--checkpoint={run}", "--out=gs://tests/pair/two")
    assert sum("report.html" in output for output in outputs) == 1  # process 0 speaks
    silence(monkeypatch)
    config = config_in(run, "gs://tests/pair/base")
    evaluation.main(config, flags(checkpoint=str(run), out="gs://tests/pair/one"))
    two, one = (read_answers(as_path(f"gs://tests/pair/{name}")) for name in ("two", "one"))
    assert two.keys() == one.keys() and {method for method, *_ in one} == {"choices", "generate"}
    for key, (*answer, scores) in one.items():
        assert two[key][:2] == tuple(answer)
        if scores is not None:
            np.testing.assert_allclose(two[key][2], scores, rtol=1e-4)


@pytest.mark.long
@pytest.mark.parametrize("format", ["peft", "merged"])
def test_two_processes_export_as_one_does(run, format, tmp_path):
    there = as_path(f"gs://tests/pair/{format}")
    outputs = run_pair("export", f"--checkpoint={run}", f"--format={format}", f"--out={there}")
    assert sum(f"wrote {there}: " in output for output in outputs) == 1
    here = export(str(run), format, tmp_path / format)
    assert paths.measure_files(there).keys() == paths.measure_files(here).keys()
    for file in here.glob("*.safetensors"):
        assert (there / file.name).read_bytes() == file.read_bytes()
