"""Every example of docs/python.md runs, one after the other, in a folder with a small run."""

import re
import shutil
import types

from tests.conftest import REPOSITORY


def test_the_examples_run(adapted, tmp_path, monkeypatch, capsys):
    from crossin_jax.checkpoint.store import read_config

    text = (REPOSITORY / "docs/python.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(adapted, tmp_path / "runs/mine")
    mine = types.SimpleNamespace(get_config=lambda: read_config(adapted))
    monkeypatch.setitem(__import__("sys").modules, "configs.mine", mine)
    names: dict = {}
    for block in blocks:
        exec(compile(block, "docs/python.md", "exec"), names)
    assert len(blocks) == 5 and len(names["answers"]) == 2 and len(names["mixture"][0:10]) == 10
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3] == "0.5" and "examples per epoch" in lines[-4]
    assert names["logits"].shape == (1, 4, names["model"].spec.vocab_size)
