"""The study on BMLAMA-17 of docs/evaluation.md, with a tiny model and five facts in four
languages.
"""

import dataclasses
import json
import re

import pytest

from crossin_jax.config import Cell, Evaluation
from crossin_jax.score import main as score_main
from crossin_jax.study import run as program
from crossin_jax.study.__main__ import main as study_main
from tests.conftest import REPOSITORY
from tests.helpers import config_in, study_flags

HEAD = "Prompt\tAns\tCandidate Ans\tSubject"
# as in the published files: two to four candidates, gold last, one with a comma, two that are equal
FACTS = {
    "en": [
        "Vienna lies on the <mask> river.\tDanube\tRhine, Danube",
        "<mask> is the capital of Peru.\tLima\tRome, Oslo, Lima",
        "Ann was born in <mask>.\tWashington, D.C.\tRome, Washington, D.C.",
        "Bo speaks <mask>.\tPersian\tGreek, Farsi, Dutch, Persian",
        "Oslo is in <mask>.\tNorway\tPeru, Norway",
    ],
    "zh": [
        "维也纳位于<mask>。\t多瑙河\t莱茵河, 多瑙河",
        "<mask>是秘鲁的首都。\t利马\t罗马, 奥斯陆, 利马",
        "安出生于<mask>。\t华盛顿\t罗马, 华盛顿",
        "波说<mask>。\t波斯语\t希腊语, 波斯语, 荷兰语, 波斯语",
        "奥斯陆位于<mask>。\t挪威\t秘鲁, 挪威",
    ],
    "vi": [
        "Viên nằm bên sông <mask>.\tDanube\tRhine, Danube",
        "<mask> là thủ đô của Peru.\tLima\tRoma, Oslo, Lima",
        "Ann sinh ra ở <mask>.\tWashington\tRoma, Washington",
        "Bo nói <mask>.\ttiếng Ba Tư\ttiếng Hy Lạp, tiếng Farsi, tiếng Hà Lan, tiếng Ba Tư",
        "Oslo ở <mask>.\tNa Uy\tPeru, Na Uy",
    ],
    "es": [
        "Viena está a orillas del <mask>.\tDanubio\tRin, Danubio",
        "<mask> es la capital de Perú.\tLima\tRoma, Oslo, Lima",
        "Ann nació en <mask>.\tWashington\tRoma, Washington",
        "Bo habla <mask>.\tpersa\tgriego, farsi, neerlandés, persa",
        "Oslo está en <mask>.\tNoruega\tPerú, Noruega",
    ],
}
# one step of two arms, from a model that is there already
SHRUNK = """
from dataclasses import replace

from crossin_jax.cli import call_config_file

def get_study():
    study, cells = call_config_file("configs/facts.py", "get_study"), []
    for cell in study.cells[1:3]:
        model = replace(cell.config.model, path={path!r})
        train = replace(cell.config.train, steps=1, batch_size=8)
        config = replace(cell.config, model=model, train=train)
        cells.append(replace(cell, config=config, needs=()))
    return replace(study, cells=tuple(cells))
"""


@pytest.fixture(scope="module")
def folder(pretrained, tmp_path_factory):
    """A folder with the study that the documentation shows, run."""
    folder = tmp_path_factory.mktemp("facts")
    data = folder / "data" / "BMLAMA17"
    data.mkdir(parents=True)
    for code, rows in FACTS.items():
        head = HEAD.replace("Candidate Ans", "Candidate\tAns") if code == "zh" else HEAD
        lines = [head, *(f"{row}\tX" for row in rows)]
        (data / f"{code}.tsv").write_bytes("".join(f"{line}\r\n" for line in lines).encode())
    page = (REPOSITORY / "docs/evaluation.md").read_text()
    (block,) = re.findall(r"^```python\n# file: configs/facts.py\n(.*?)^```", page, re.M | re.S)
    (folder / "configs").mkdir()
    (folder / "configs/facts.py").write_text(block)
    (folder / "configs/small.py").write_text(SHRUNK.format(path=str(pretrained / "model")))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        study_main(study_flags(config="configs/small.py", dry_run=False))
    return folder / "runs" / "facts"


def test_both_arms_have_every_measure_of_every_language(folder):
    results = json.loads((folder / "results.json").read_text())
    assert results["title"] == "Facts of BMLAMA-17"
    (block,) = results["blocks"]
    assert (block["benchmark"], block["method"], block["kind"]) == (
        *("bmlama17", "sentence"),
        "parallel",
    )
    assert block["languages"] == list(FACTS) and block["num_items"] == 5
    assert block["chance"] == pytest.approx((1 / 2 + 1 / 3 + 1 / 2 + 1 / 4 + 1 / 2) / 5)
    assert [row["arm"] for row in block["rows"]] == ["english", "x2x"]
    for row in block["rows"]:
        names = {"accuracy", "consistency_4", "AC3_3", "rankc", "agreement_right", "conductivity"}
        names |= {f"accuracy/{code}" for code in FACTS} | {"transfer/zh", "conductivity/es"}
        assert names <= row["scores"].keys()
        assert list(row["pairs"]) == ["rankc", "agreement", "agreement_right"]
    changed = block["rows"][1]
    assert changed["scores"]["rankc"]["change"]["p"] <= 1
    assert changed["pairs"]["rankc"]["p"][0][1] <= 1


def test_the_page_has_the_questions_and_a_map_of_the_pairs(folder):
    page = (folder / "report.html").read_text()
    assert "RankC of language pairs" in page and "change from the first model" in page
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])
    shown = {item["id"]: item["text"] for item in data["items"]}
    assert len(shown) == 5
    for code, rows in FACTS.items():
        for number, row in enumerate(rows, 1):
            prompt, gold, candidates = row.split("\t")
            texts = shown[str(number)][code]
            assert texts["q"] == prompt
            assert any(choice[4:] == gold for choice in texts["c"])
            assert len(texts["c"]) == (2 if "," in gold else len(candidates.split(", ")))


def test_score_finds_the_same_measures_in_the_log_of_an_arm(folder):
    (block,) = json.loads((folder / "results.json").read_text())["blocks"]
    for row in block["rows"]:
        log = folder / "seed0" / row["arm"] / "evaluation/logs/bmlama17_sentence_p0.json"
        out = folder / f"{row['arm']}.json"
        flags = {"log": log, "out": out, "answers": None, "alignments": None, "few_shot": "auto"}
        flags |= {"mode": "expectation", "rankc": "softmax", "seed": 0}
        score_main(study_flags(**flags))
        scores = json.loads(out.read_text())
        ours = scores["crossin_jax"]
        # of the candidates that are equal in Chinese, both were chosen or none
        assert not any(ours["coin_share"]["Chinese"][why] for why in ("empty", "unreadable"))
        assert scores["overall_acc"] == pytest.approx(row["scores"]["accuracy"]["value"])
        for name in ("rankc", "agreement_right", "transfer", "conductivity"):
            assert ours["measures"][name] == pytest.approx(row["scores"][name]["value"])


def test_questions_that_cannot_be_read_any_more_are_left_out(tmp_path, capsys):
    """The Hub may be out of reach when a report is written once more."""
    (tmp_path / "own.jsonl").write_text(
        json.dumps({"id": "q", "en": {"question": "?", "choices": ["a", "b"], "answer": "b"}})
    )
    cells = []
    for name in ("nobody/nothing", "own"):
        benchmarks = (str(tmp_path / "own.jsonl"),) * (name == "own") or (name,)
        asked = Evaluation(benchmarks=(*benchmarks, "cross_world:dev"), languages=("en",), limit=1)
        config = dataclasses.replace(config_in(tmp_path / name), evaluation=asked)
        cells.append(Cell(name=name, config=config))
    found = program.read_questions(cells)
    assert [benchmark.name for benchmark in found] == ["cross_world:dev", "own"]
    assert [len(benchmark.items) for benchmark in found] == [1, 1]
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith("the report has no questions of nobody/nothing: ")
