"""Commands that programs print run as printed: whole, quoted, with every changed setting."""

import re
import shlex
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from absl import flags
from safetensors.torch import load_file

from crossin_jax import cli, train
from crossin_jax.checkpoint import hf, peft
from crossin_jax.checkpoint.open import open_model
from crossin_jax.config import Config, Lora, Source, UserError
from crossin_jax.export import export
from crossin_jax.files import read_json, read_json_lines
from crossin_jax.plan import __main__ as plan
from crossin_jax.plan.plan import describe_change
from crossin_jax.prepare import commands as prepare
from tests.checkpoint.runs import make_run, write_base
from tests.conftest import REPOSITORY
from tests.helpers import config_in

TINY = str(REPOSITORY / "tests/configs/tiny.py")


def read_overrides(words, variant="pretrain"):
    """The configuration that flags describe."""
    values, argv = flags.FlagValues(), ["program", f"--config={TINY}:{variant}", *words]
    config = cli.define_config(argv, values)
    assert values(argv) == ["program"]
    return config()


def split_message(error, start):
    """The words of the command in a message, from its first word to the end of its line."""
    (line,) = [line for line in str(error).split("\n") if start in line]
    return shlex.split(line[line.index(start) :].partition("`")[0])


# ---- plan


@pytest.mark.parametrize(
    "given",
    [
        ["--config", "my configs/a.py:small", "--topology", "v5e:4x4", "--tune"],
        ["--config=my configs/a.py:small", "--topology=v5e:4x4", "--tune"],
    ],
)
def test_plan_prints_the_training_command_of_its_configuration(given, tmp_path):
    """With the file, its variant and every setting that was changed."""
    changes = ["--config.optim.learning_rate=1e-4", "--config.name=two words"]
    out = str(tmp_path / "p 1.json")
    program, *rest = shlex.split(plan.train_command(["plan", *given, *changes], out))[2:]
    assert program == "crossin_jax.train"
    assert rest == ["--config=my configs/a.py:small", *changes, f"--tuned={out}"]
    assert cli.flag_value(rest, "config") == "my configs/a.py:small"


def test_plan_prints_what_was_typed_and_not_what_parsing_left(monkeypatch, capsys):
    """Parsing takes the file, settings that are off, and spaces before values out of `sys.argv`."""
    typed = [f"--config={TINY}", "--config.seed", "7", "--config.train.tensorboard"]
    typed += ["--config.lora=none", "--config.evaluation.benchmarks=a,b,"]
    argv = [plan.__file__, *typed, "--tune"]
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "crossin_jax.plan", *argv[1:]])
    monkeypatch.setattr(sys, "argv", argv)
    config = cli.define_config(argv)
    flags.FLAGS(argv[:1])
    chosen = SimpleNamespace(change={"model.remat": "full"}, fits=True)
    monkeypatch.setattr("crossin_jax.plan.tune.propose", lambda *_: chosen)
    monkeypatch.setattr(plan, "render", lambda _: "")
    assert (
        plan._tune(config(), None, SimpleNamespace(json=False, out="p 1.json", format="text")) == 0
    )
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "to train" in line]
    words = shlex.split(line.partition(": ")[2])
    assert words[:4] == ["python", "-m", "crossin_jax.train", f"--config={TINY}"]
    assert words.pop() == "--tuned=p 1.json"
    again = read_overrides(words[4:])
    assert (again.seed, again.lora, again.train.tensorboard) == (7, None, True)
    assert again.evaluation.benchmarks == ("a", "b")


@pytest.mark.parametrize(
    "change",
    [
        {"model.remat": "q+k+attention", "train.accumulation": 4},
        {"mesh.data": None, "mesh.fsdp": 2, "mesh.tensor": 4},
    ],
)
def test_a_change_of_plan_is_read_back(change):
    config = read_overrides(describe_change(change).split())
    for name, value in change.items():
        section, field = name.split(".")
        assert getattr(getattr(config, section), field) == value


# ---- train, evaluate, generate: the next command is typed in tests/test_evaluate.py


@pytest.mark.parametrize("benchmarks", [(), ("world",)])
def test_the_next_command_is_quoted(benchmarks, tmp_path):
    config = config_in(tmp_path)
    config.evaluation.benchmarks = benchmarks
    words = shlex.split(train.next_command(config, tmp_path / "a run; it's mine"))
    assert words[:2] == ["python", "-m"] and words[4] == str(tmp_path / "a run; it's mine")
    assert words[2:4] == (
        ["crossin_jax.evaluate", "--checkpoint"]
        if benchmarks
        else ["crossin_jax.generate", "--model"]
    )


# ---- prepare


@pytest.mark.parametrize("name", ["x.json", "a folder/it's.json", "a,b.json"])
def test_the_benchmark_that_prepare_wrote_is_named_for_evaluate(
    name, tmp_path, monkeypatch, capsys
):
    out = tmp_path / name
    for part, value in (
        ("find_source", Source(name="s", path="p")),
        ("output_path", out),
    ):
        monkeypatch.setattr(prepare, part, lambda *_, value=value: value)
    monkeypatch.setattr("crossin_jax.data.corpus.load_corpus", lambda *_, **__: Corpus())
    monkeypatch.setattr("crossin_jax.prepare.cross_xquad.build_cross_xquad", lambda *_, **__: [])
    prepare.cross_xquad(Config(), SimpleNamespace(source=None))
    flag = shlex.split(capsys.readouterr().out.partition("evaluate with ")[2])
    assert read_overrides(flag).evaluation.benchmarks == (str(out),)


class Corpus:
    """One question."""

    def __len__(self):
        return 1

    def ids(self):
        return ["1"]


@pytest.mark.parametrize(
    ("encoding", "read"),
    [
        ("utf-16", partial(read_json, expect=list)),
        ("latin1", partial(read_json, expect=list)),
        ("latin1", lambda file: list(read_json_lines(file))),
    ],
)
def test_a_conversion_makes_the_file_that_is_read(encoding, read, tmp_path):
    file = tmp_path / "it's é.json"
    file.write_bytes('["é"]\n'.encode(encoding))
    with pytest.raises(UserError, match="iconv") as error:
        read(file)
    command = re.search("iconv.*", str(error.value))[0]
    subprocess.run(command, shell=True, check=True, cwd="/")
    assert "é" in str(read(tmp_path / "it's é.json.utf8"))


# ---- models and adapters


def test_a_pickle_is_converted_by_the_command_that_is_printed(tmp_path):
    folder = write_base(tmp_path / "it's/base", "llama3.1")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="is a pickle") as error:
        hf.read_tensors(folder)
    python, *words = split_message(error.value, "python -c")
    assert python == "python"
    subprocess.run([sys.executable, *words], check=True, capture_output=True, timeout=120)
    assert hf.read_tensors(tmp_path / "it's/base-safetensors")


def test_what_an_adapter_asks_for_opens_it(tmp_path):
    """`generate` with another base, and training with the adapter's own settings."""
    lora = Lora(rank=3, alpha=2.5, targets=("q_proj",), modules_to_save=(), use_rslora=True)
    config = make_run(tmp_path / "a run", lora=lora)
    adapter = export(tmp_path / "a run/run", "peft", tmp_path / "an adapter")
    (tmp_path / "a run/base").rename(tmp_path / "moved base")
    with pytest.raises(UserError) as error:
        peft.find_base(adapter)
    words = split_message(error.value, "--base=BASE")
    assert words == ["--base=BASE", f"--model={adapter}"]
    spec = open_model(tmp_path / "moved base", adapter=words[1][8:], progress=False).spec
    with pytest.raises(UserError) as error:
        peft.read_adapter(adapter, spec, Lora(path=str(adapter)))
    words = str(error.value).split("\n")[-1].split()
    lora = read_overrides(words, variant=tmp_path / "moved base").lora
    assert peft.read_adapter(adapter, spec, lora).lora.rank == config.lora.rank


@pytest.mark.parametrize("revision", [None, "v1"])
def test_the_download_is_whole(revision, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError) as error:
        hf.resolve_folder("nobody/nothing", revision)
    words = split_message(error.value, "hf download")
    assert words == [
        "hf",
        "download",
        "nobody/nothing",
        *(["--revision", "v1"] if revision else []),
    ]
