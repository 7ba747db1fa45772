"""docs/data.md: every file, command and snippet on the page, in order, in an empty folder with the
real data.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

from tests.data.conftest import parallel_rows, write_lines

PAGE = Path(__file__).parents[2] / "docs" / "data.md"
NOT_RUN = ("import ctranslate2",)  # needs a translation model


def test_the_page_runs_as_written(shared, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(PAGE.parents[1]))
    (tmp_path / "data").mkdir()
    (tmp_path / "models").mkdir()
    for name in ("xquad", "alpaca", "seaeval"):
        (tmp_path / "data" / name).symlink_to(shared / name)
    (tmp_path / "models" / "llama-2").symlink_to(shared / "tokenizers" / "llama2")
    rows = parallel_rows(5)
    del rows[3]["vi"]
    write_lines(tmp_path / "gaps.jsonl", rows)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "gaps.py").write_text(
        "from crossin_jax.config import *\ndef get_config():\n    return "
        "Config(output_dir='runs/gaps', model="
        "Model(path='models/llama-2'), data=Data(sources=(Source(name='gaps', "
        "path='gaps.jsonl'),)))\n"
    )
    (tmp_path / "translate.py").write_text(
        "import json, sys\nfor line in sys.stdin:\n    print(json.dumps('vi ' + "
        "json.loads(line)['text']))\n"
    )
    blocks = re.findall(r"```(python|bash|json)\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    assert len(blocks) >= 9
    for kind, text in blocks:
        if any(mark in text for mark in NOT_RUN):
            continue
        if kind == "json":
            assert "prompt_input" in json.loads(text)
        elif kind == "bash":
            for line in text.strip().splitlines():
                done = subprocess.run(
                    line.replace("python", sys.executable),
                    shell=True,
                    capture_output=True,
                    text=True,
                    timeout=300,
                )
                assert done.returncode == 0, (line, done.stderr)
        elif match := re.match(r"# file: (\S+)\n", text):
            path = tmp_path / match[1]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        else:
            exec(compile(text, str(PAGE), "exec"), {})
    manifest = json.loads((tmp_path / "runs/mine/data/manifest.json").read_text())
    assert manifest["examples"] == 600 and (tmp_path / "runs/mine/audit/audit.png").is_file()
    assert len((tmp_path / "built/seeds/mixture.jsonl").read_text().splitlines()) == 175
    filled = [
        json.loads(line) for line in (tmp_path / "runs/gaps/gaps.jsonl").read_text().splitlines()
    ]
    assert filled[3]["vi"]["instruction"].startswith("vi What")
