"""What a program must not do with what it is given: leak a secret, call somebody, or run what a
model wrote.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from crossin_jax.checks import check
from crossin_jax.config import Config, Data, Model, Source, UserError
from crossin_jax.evaluation.items import Benchmark, Item, Version
from crossin_jax.evaluation.predictions import Answer, ItemAnswers, Predictions
from crossin_jax.report.results import write_results
from crossin_jax.report.summary import Run
from crossin_jax.settings import redact

REPOSITORY = Path(__file__).resolve().parent.parent
SECRETS = {
    "HF_TOKEN": "hf_SecretOfTheTest",
    "WANDB_API_KEY": "0123456789abcdefSecret",
    "HTTPS_PROXY": "http://somebody:SecretWord@proxy.example:3128",
}
# Starts a program that cannot reach anybody, and says whom it wanted to reach.
DENY = """
import runpy, socket, sys
def connect(self, address, *rest):
    if self.family == socket.AF_UNIX:
        return real(self, address, *rest)
    print("CONNECTS", address, file=sys.stderr, flush=True)
    raise OSError(101, "denied by the test")
def look_up(*address, **_):
    print("LOOKS UP", address[:2], file=sys.stderr, flush=True)
    raise socket.gaierror(-2, "denied by the test")
real = socket.socket.connect
socket.socket.connect = socket.socket.connect_ex = connect
socket.getaddrinfo = look_up
module, *sys.argv[1:] = sys.argv[1:]
sys.argv[0] = module
runpy.run_module(module, run_name="__main__")
"""


def run_alone(*arguments) -> subprocess.CompletedProcess:
    """A program without network, and without the settings that keep the Hub's library off it."""
    environment = {k: v for k, v in os.environ.items() if not k.endswith("_OFFLINE")} | SECRETS
    words = [sys.executable, "-c", DENY, *map(str, arguments)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    assert "CONNECTS" not in done.stderr and "LOOKS UP" not in done.stderr, done.stderr
    return done


def test_with_local_paths_nothing_connects_and_no_secret_is_written(tmp_path):
    """A run and answers from it: sockets are denied, and every file and line is searched."""
    out = tmp_path / "run"
    told = [
        run_alone(
            "crossin_jax.train",
            "--config=tests/configs/tiny.py",
            f"--config.output_dir={out}",
            "--config.train.steps=1",
            "--config.train.tensorboard=true",
        ),
        run_alone("crossin_jax.generate", "--model", out, "--prompt=a", "--max_new_tokens=1"),
    ]
    written = [file.read_bytes() for file in out.rglob("*") if file.is_file()]
    assert len(written) > 10
    texts = [*written, *(text.encode() for done in told for text in (done.stdout, done.stderr))]
    for secret in (*list(SECRETS.values())[:2], "SecretWord"):
        assert not any(secret.encode() in text for text in texts)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("path", "https://somebody:SecretWord@example.org/x.jsonl"),
        ("path", "s3://key:SecretWord@bucket/x"),
        ("path", "x/hf_SecretOfTheTest"),
        ("split", "hf_SecretOfTheTest"),
    ],
)
def test_a_setting_that_holds_a_secret_is_refused_without_repeating_it(name, value, monkeypatch):
    """Settings are stored beside checkpoints and results."""
    monkeypatch.setenv("HF_TOKEN", SECRETS["HF_TOKEN"])
    source = Source(**({"name": "s", "path": "x"} | {name: value}))
    with pytest.raises(UserError, match="has a password or token") as error:
        check(Config(model=Model(path="m"), data=Data(sources=(source,))))
    assert "Secret" not in str(error.value) and "***" in str(error.value)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://u:p@h/x", "http://***@h/x"),
        ("two: a://b:c@d e://f:g@h", "two: a://***@d e://***@h"),
        ("a@b:c, http://h:80/x@y", "a@b:c, http://h:80/x@y"),
        ("the key abcdefgh", "the key ***"),
        ("a short abc", "a short abc"),
    ],
)
def test_messages_are_redacted(text, shown, monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "abcdefgh")
    monkeypatch.setenv("OTHER_KEY", "abc")
    assert redact(text) == shown and str(UserError(text)) == shown


BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


@pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine: no page is opened")
def test_a_browser_runs_nothing_that_a_model_wrote(tmp_path):
    """Scripts in answers, names of files, languages and models: the page's title tells if one
    ran.
    """
    script = "document.title='BROKEN'"
    evil = (
        f'</script></title><script>{script}</script><img src=x onerror="{script}"><svg '
        f"onload={script}>"
    )
    languages = ("en", f"l{evil}")
    version = Version(evil, (f"(A) {evil}", "(B) no"), 0, evil)
    item = Item(f"i{evil}", dict.fromkeys(languages, version), (f"t{evil}",))
    answers = {
        "en": Answer((0,), "matched", evil),
        languages[1]: Answer((0, 1), "unreadable", evil),
    }
    predictions = Predictions(
        f"b{evil}",
        "generate",
        1,
        languages,
        (ItemAnswers(item.id, dict.fromkeys(languages, 0), 2, answers, item.tags),),
    )
    runs = [Run(f"{arm}{evil}", 0, [predictions], {evil: evil}) for arm in ("a", "b")]
    benchmark = Benchmark(predictions.benchmark, (item,), languages, f"s{evil}")
    write_results(tmp_path, runs, title=f"title {evil}", benchmarks=[benchmark])
    page = tmp_path / "report.html"
    opened = (
        "<script>document.querySelectorAll('details').forEach(d => d.open = true)</script></body>"
    )
    page.write_text(page.read_text().replace("</body>", opened))
    words = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--dump-dom"]
    words += ["--disable-background-networking", "--disable-sync", "--virtual-time-budget=2000"]
    words += [f"--user-data-dir={tmp_path / 'profile'}", f"file://{page}"]
    dom = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True).stdout
    assert "<title>BROKEN" not in dom and "<title>title " in dom
    assert "<img" not in dom and dom.count("BROKEN") > 5  # shown as text


def test_the_bill_of_materials_names_every_requirement_with_its_version(tmp_path):
    """What setup.py asks for, and what that needs in turn."""
    words = [sys.executable, "scripts/sbom.py", str(tmp_path / "bill.json")]
    subprocess.run(words, check=True, timeout=60)
    bill = json.loads((tmp_path / "bill.json").read_text())
    versions = {entry["name"]: entry["version"] for entry in bill["components"]}
    stored = json.loads((REPOSITORY / "docs" / "sbom.json").read_text())
    setup = (REPOSITORY / "setup.py").read_text().split("extras_require")[0]
    needed = re.findall(r'^ {8}"([A-Za-z][\w.-]*)[>~=]=', setup, flags=re.M)
    assert len(needed) > 10 and "jaxlib" in versions
    for names in (versions, {entry["name"] for entry in stored["components"]}):
        assert {name.lower().replace("_", "-") for name in needed} <= set(names)
    assert all(versions[name] == version(name) for name in ("jax", "numpy", "safetensors"))
