"""Commands that programs print are complete."""

import shlex

import pytest

from crossin_jax import cli
from crossin_jax.plan.__main__ import train_command


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
    program, *rest = shlex.split(train_command(["plan", *given, *changes], out))[2:]
    assert program == "crossin_jax.train"
    assert rest == ["--config=my configs/a.py:small", *changes, f"--tuned={out}"]
    assert cli.flag_value(rest, "config") == "my configs/a.py:small"
