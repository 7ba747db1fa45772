"""From a configuration to tokenizer, renderer and mixtures."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from crossin_jax.config import Architecture, Component, Config, Data, Model, Source
from crossin_jax.data.pipeline import open_pipeline, open_tokenizer
from crossin_jax.data.prompts import Renderer
from tests.data.conftest import parallel_rows, write_lines


def new_model(folder: Path, **changes) -> Config:
    """A new model's configuration: a text of its own, and instructions in other words."""
    lines = [{"id": i, "text": "zanzibar quagga"} for i in range(20)]
    asks = [{"id": i, "instruction": "mississippi", "output": "mississippi"} for i in range(200)]
    data = Data(
        sources=(
            Source(name="text", path=write_lines(folder / "text.jsonl", lines)),
            Source(name="asks", path=write_lines(folder / "asks.jsonl", asks)),
        ),
        components=(Component(kind="text", source="text"), Component(source="asks")),
        languages=("en",),
        template="plain",
    )
    config = Config(
        output_dir=str(folder / "run"),
        data=data,
        model=Model(architecture=Architecture(vocab_size=300, num_kv_heads=4)),
    )
    return replace(config, **changes)


def test_a_new_model_s_tokenizer_is_trained_on_its_text_alone(tmp_path):
    tokenizer = open_tokenizer(new_model(tmp_path))
    assert (
        len(tokenizer) <= 300 and len(tokenizer("quagga", add_special_tokens=False).input_ids) == 1
    )
    assert len(tokenizer("mississippi", add_special_tokens=False).input_ids) > 3
    assert len(tokenizer.get_vocab()) == len(
        open_pipeline(new_model(tmp_path)).tokenizer.get_vocab()
    )


def test_a_new_model_s_tokenizer_is_trained_once(tmp_path):
    """A run that goes on has the tokenizer that it began with, whatever its text is by now."""
    config = new_model(tmp_path)
    first = open_tokenizer(config).get_vocab()
    file = tmp_path / "run" / "tokenizer" / "tokenizer.json"
    stamp = file.stat().st_mtime_ns
    write_lines(tmp_path / "text.jsonl", [{"id": i, "text": "another text"} for i in range(20)])
    assert open_tokenizer(config).get_vocab() == first and file.stat().st_mtime_ns == stamp
    assert open_tokenizer(replace(config, output_dir=str(tmp_path / "other"))).get_vocab() != first


@pytest.mark.parametrize("change", [{"seed": 7}, {"languages": ("en", "vi")}, {"vocab_size": 900}])
def test_the_embedded_world_s_tokenizer_follows_seed_languages_and_size(tmp_path, change):
    def vocabulary(name: str, seed=0, languages=("en", "es"), vocab_size=1000) -> dict:
        data = Data(
            sources=(Source(name="w", kind="world", split="text/en"),),
            languages=languages,
            components=(Component(kind="text", source="w"),),
        )
        model = Model(architecture=Architecture(vocab_size=vocab_size))
        return open_tokenizer(
            Config(output_dir=str(tmp_path / name), seed=seed, data=data, model=model)
        ).get_vocab()

    assert vocabulary("one") == vocabulary("two") != vocabulary("other", **change)
    assert len(vocabulary("other", **change)) == change.get("vocab_size", 1000)


def test_a_tokenizer_of_its_own_comes_before_that_of_the_weights(tokenizer, tmp_path):
    open_tokenizer(new_model(tmp_path)).save_pretrained(tmp_path / "weights")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    model = Model(path=str(tmp_path / "weights"))
    assert open_tokenizer(Config(model=model)).get_vocab() != tokenizer.get_vocab()
    own = replace(model, tokenizer=str(tmp_path / "tokenizer"))
    assert open_tokenizer(Config(model=own)).get_vocab() == tokenizer.get_vocab()
    new = replace(new_model(tmp_path).model, tokenizer=str(tmp_path / "tokenizer"))
    assert open_tokenizer(new_model(tmp_path, model=new)).get_vocab() == tokenizer.get_vocab()


def test_a_pipeline_opens_what_the_settings_name(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "weights")
    rows, dev = (write_lines(tmp_path / f"{n}.jsonl", parallel_rows(n)) for n in (9, 4))
    data = Data(
        sources=(Source(name="rows", path=rows),),
        components=(Component(kind="x2x", source="rows"),),
        eval_sources=(Source(name="dev", path=dev, languages=("en", "zh")),),
        template="chatml",
        system="Be brief.",
    )
    config = Config(seed=3, model=Model(path=str(tmp_path / "weights")), data=data)
    opened = open_pipeline(config)
    assert opened.renderer.hash == Renderer(tokenizer, "chatml", system="Be brief.").hash
    assert (
        len(opened.mixture),
        opened.mixture.seed,
        len(opened.held_out),
        opened.held_out.seed,
    ) == (9, 3, 8, 3)
    assert {(e.id, e.answer_language) for e in opened.held_out} == {
        (f"r{i}", code) for i in range(4) for code in ("en", "zh")
    }
    assert open_pipeline(replace(config, data=replace(data, eval_sources=()))).held_out is None


def test_a_tokenizer_of_the_hub_is_read_at_its_revision(tokenizer, tmp_path, monkeypatch):
    """From the folder in which the Hub's client keeps what it has fetched."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = tmp_path / "hub" / "models--org--tokenizer"
    for revision, added in (("main", "[old]"), ("v2", "[new]")):
        tokenizer.save_pretrained(folder / "snapshots" / revision)
        file = folder / "snapshots" / revision / "tokenizer.json"
        content = json.loads(file.read_text())
        content["added_tokens"][-1]["content"] = added
        content["model"]["vocab"][added] = content["model"]["vocab"].pop("<|im_end|>")
        file.write_text(json.dumps(content))
        (file.parent / "config.json").write_text('{"model_type": "llama"}')
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / revision).write_text(revision)
    for model, added in (
        (Model(path="org/tokenizer"), "[old]"),
        (Model(path="org/tokenizer", revision="v2"), "[new]"),
        (Model(path="x", tokenizer="org/tokenizer", revision="v2"), "[new]"),
    ):
        assert added in open_tokenizer(Config(model=model)).get_vocab()
