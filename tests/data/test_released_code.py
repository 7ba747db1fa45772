"""configs/paper/released_code.py builds what the released builder builds: counts, languages and
every text.
"""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from crossin_jax.checks import check
from crossin_jax.cli import load_config_file
from crossin_jax.config import UserError
from crossin_jax.data.mixture import Mixture, load_corpora
from tests.data.conftest import parallel_rows

CONFIG = str(Path(__file__).parents[2] / "configs" / "paper" / "released_code.py")
OTHERS = ("zh", "vi", "es")


def mixture_of(tmp_path, monkeypatch, size: str) -> tuple[Mixture, list[dict]]:
    """The mixture over a folder laid out as the release's, whose rows have no ids."""
    table = parallel_rows(240)
    for folder in ("alpaca", "platypus"):
        (tmp_path / "data" / folder).mkdir(parents=True)
    for code in ("en", *OTHERS):
        texts = [row[code] for row in table]
        (tmp_path / "data" / "alpaca" / f"alpaca_{code}.json").write_text(
            json.dumps(texts), encoding="utf-8"
        )
    base = [
        {"instruction": f"Prove {i}.", "input": "", "output": f"Proof {i}.", "data_source": "x"}
        for i in range(70)
    ]
    (tmp_path / "data" / "platypus" / "platypus_en.json").write_text(json.dumps(base))
    monkeypatch.chdir(tmp_path)
    config = check(load_config_file(f"{CONFIG}:{size}"))
    return Mixture(config.data, load_corpora(config.data, config.seed), config.seed), table


def released_text(row: dict, mode: str, code: str) -> tuple[str, str, str]:
    """The record that the released builder writes for a row and a language, by its documented
    form.
    """
    english, other = row["en"], row[code]
    return {
        "en2x": (english["instruction"], f"{english['input']}\n[{code}]", other["output"]),
        "x2en": (other["instruction"], f"{other['input']}\n[en]", english["output"]),
        "trans": (
            "Translate the following sentence into English.",
            other["instruction"],
            english["instruction"],
        ),
    }[mode]


def test_every_record_has_the_released_form(tmp_path, monkeypatch):
    mixture, table = mixture_of(tmp_path, monkeypatch, "300")
    by_text = {
        released_text(row, mode, code): (i, mode, code)
        for i, row in enumerate(table)
        for mode in ("en2x", "x2en", "trans")
        for code in OTHERS
    }
    drawn = {mode: [] for mode in ("en2x", "x2en", "trans")}
    for example in mixture:
        if example.component == "base":
            assert (example.instruction.replace("Prove", "Proof"), example.input) == (
                example.output,
                "",
            )
            continue
        row, mode, code = by_text[example.instruction, example.input, example.output]
        assert mode == example.component
        drawn[mode].append((row, code))
    # The modes share their draws.
    assert Counter(drawn["en2x"]) == Counter(drawn["x2en"]) == Counter(drawn["trans"])


@pytest.mark.parametrize(("size", "count"), [("300", 300), ("60", 60), ("all", 240)])
def test_counts_per_mode_and_language(tmp_path, monkeypatch, size, count):
    mixture, _ = mixture_of(tmp_path, monkeypatch, size)
    pairs = [mixture.count_pairs(c) for c in range(4)]
    assert mixture.labels == ["base", "en2x", "x2en", "trans"] and mixture.sizes.tolist() == [
        70,
        count,
        count,
        count,
    ]
    assert pairs[0] == {("en", "en"): 70} and pairs[2] == pairs[3]
    assert {b: n for (a, b), n in pairs[1].items()} == {a: n for (a, b), n in pairs[2].items()}
    assert set(pairs[1]) == {("en", code) for code in OTHERS}
    assert all(abs(n - count / 3) < 4 * np.sqrt(count * 2 / 9) for n in pairs[1].values())


def test_rows_are_drawn_with_replacement_and_smaller_sizes_are_part_of_larger(
    tmp_path, monkeypatch
):
    mixture, _ = mixture_of(tmp_path, monkeypatch, "240")
    rows = Counter(e.id for e in mixture if e.component == "en2x")
    assert 0.55 < len(rows) / 240 < 0.72  # 1 - 1/e of them
    (tmp_path / "less").mkdir()
    small, _ = mixture_of(tmp_path / "less", monkeypatch, "120")
    assert not Counter(e.id for e in small if e.component == "en2x") - rows


def test_the_variant_is_checked():
    with pytest.raises(UserError, match="released_code.py:3k: give the samples per mode"):
        load_config_file(f"{CONFIG}:3k")
