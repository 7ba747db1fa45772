"""A small parallel corpus and a byte-level tokenizer, built in memory."""

import json

import pytest

WORDS = {
    "en": "What is the capital of {} ? Name the {} . Paris city river",
    "zh": "{} 的首都是什么？ 请说出 {} 。 巴黎 城市 河",
    "vi": "Thủ đô của {} là gì ? Hãy nêu {} . Paris thành phố",
    "es": "¿Cuál es la capital de {} ? Nombra {} . París ciudad",
}


def parallel_rows(count: int, languages=("en", "zh", "vi", "es"), start: int = 0) -> list[dict]:
    """Rows in the layout with one column group per language; every third has an input."""
    return [
        {
            "id": f"r{i}",
            **{
                code: {
                    "instruction": WORDS[code].format(i, i),
                    "input": "" if i % 3 else f"{code} input {i}",
                    "output": f"{code} answer {i}",
                }
                for code in languages
            },
        }
        for i in range(start, start + count)
    ]


def write_lines(path, rows) -> str:
    path.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )
    return str(path)


@pytest.fixture(scope="session")
def tokenizer():
    """Byte-level BPE with <s>, </s>, <pad> and the ChatML tokens; BOS is added by default, as
    Llama's does.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    lines = [text * 3 for text in WORDS.values()] + ["### Instruction:\n### Response:\n"] * 5
    backend.train_from_iterator(lines, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


@pytest.fixture(scope="session")
def parallel_file(tmp_path_factory) -> str:
    """A JSONL file with 200 rows in four languages."""
    return write_lines(tmp_path_factory.mktemp("parallel") / "rows.jsonl", parallel_rows(200))
