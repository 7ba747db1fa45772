"""A real task of lm-evaluation-harness from local files, through our engine and through the harness's own backend."""

import json
import subprocess
import sys

import pytest
import yaml

pytest.importorskip("lm_eval", reason="lm_eval is not installed (pip install lm_eval)")

import lm_eval
from lm_eval.tasks import TaskManager

from crossin_jax.config import UserError
from crossin_jax.evaluation.harness import EngineLM
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.filterwarnings("ignore")  # the harness's own and those of its libraries

FACTS = [("France", "Paris"), ("Peru", "Lima"), ("Kenya", "Nairobi"), ("Laos", "Vientiane"), ("Chad", "N'Djamena"),
         ("Fiji", "Suva"), ("Oman", "Muscat"), ("Togo", "Lomé")]
TASKS = {
    "capitals": {"output_type": "multiple_choice", "doc_to_text": "What is the capital of {{country}}?\nAnswer:",
                 "doc_to_target": 0, "doc_to_choice": "{{choices}}", "num_fewshot": 3, "metric_list": [
                     {"metric": "acc"}, {"metric": "acc_norm"}]},
    "texts": {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
              "metric_list": [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}]},
    "answers": {"output_type": "generate_until", "doc_to_text": "{{country}}:", "doc_to_target": "{{choices[0]}}",
                "generation_kwargs": {"until": ["\n", "e"], "max_gen_toks": 12, "do_sample": False},
                "metric_list": [{"metric": "exact_match"}]},
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A manager that knows the tasks, whose rows are in a file."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"country": country, "choices": [city, *(other for _, other in FACTS[:i] + FACTS[i + 1:])][:2 + i % 3],
             "text": f"{city} is the capital of {country}. " * (1 + 3 * i)} for i, (country, city) in enumerate(FACTS)]
    (folder / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    for name, task in TASKS.items():
        task = {"task": name, "dataset_path": "json", "test_split": "test", "fewshot_split": "test",
                "dataset_kwargs": {"data_files": {"test": str(folder / "rows.json")},
                                   "cache_dir": str(folder / "cache")},
                "metadata": {"version": 1}} | task
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))
    return TaskManager(include_path=str(folder), include_defaults=False)


def run(model, arguments, tasks):
    found = lm_eval.simple_evaluate(model, arguments, tasks=list(TASKS), task_manager=tasks, bootstrap_iters=0,
                                    batch_size=4, device="cpu" if model == "hf" else None)
    return found["results"], {name: [row["resps"] for row in sorted(rows, key=lambda row: row["doc_id"])]
                              for name, rows in found["samples"].items()}


def flatten(value):
    """The numbers and texts in nested lists."""
    return [inner for entry in value for inner in flatten(entry)] if isinstance(value, (list, tuple)) else [value]


def test_a_real_task_gives_the_numbers_of_the_harness_own_backend(pretrained, tasks):
    arguments = {"pretrained": str(pretrained / "model"), "max_length": 64}  # the longest texts need several windows
    results, samples = run("crossin_jax", arguments, tasks)
    expected, expected_samples = run("hf", arguments | {"dtype": "float32"}, tasks)
    for name, count in (("capitals", 46), ("texts", 8), ("answers", 8)):
        ours, theirs = flatten(samples[name]), flatten(expected_samples[name])
        assert len(theirs) == count  # a likelihood and whether it is greedy; a likelihood; an answer
        for value, their_value in zip(ours, theirs, strict=True):
            # 1e-4 for what a question's choice has; a text of 300 tokens sums up more rounding
            assert value == (pytest.approx(their_value, abs=1e-4, rel=1e-6) if type(value) is float else their_value)
    for name in TASKS:
        for metric, value in expected[name].items():
            assert results[name][metric] == (pytest.approx(value, rel=1e-4) if isinstance(value, float) else value)


def test_arguments_that_cannot_be_meant_are_refused(pretrained):
    for arguments, words in (("dtype=float32", "pretrained is missing"), ("pretrained=x,peft=y", "peft=y.*takes"),
                             (f"pretrained={pretrained / 'nowhere'}", "nowhere")):
        with pytest.raises(UserError, match=words):
            EngineLM.create_from_arg_string(arguments)


def test_the_program_runs_a_task(pretrained, tasks):
    """As users start it: the harness's own command line names a device, batch sizes and more of its own accord."""
    done = subprocess.run(
        [sys.executable, "-m", "crossin_jax.harness", "run", "--model", "crossin_jax", "--model_args",
         f"pretrained={pretrained / 'model'},max_length=64", "--tasks", "capitals", "--include_path",
         tasks.include_path], capture_output=True, text=True, cwd=REPOSITORY, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    results, _ = run("crossin_jax", {"pretrained": str(pretrained / "model"), "max_length": 64}, tasks)
    row = next(line for line in done.stdout.splitlines() if line.startswith("|capitals"))
    assert float(row.split("|")[7]) == results["capitals"]["acc,none"]


def test_without_the_harness_there_is_one_line(tmp_path):
    (tmp_path / "lm_eval.py").write_text("raise ModuleNotFoundError('hidden', name='lm_eval')")
    done = subprocess.run([sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); "
                           "from crossin_jax.harness import main; main()"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip() == "error: lm_eval is not installed: pip install lm_eval"
