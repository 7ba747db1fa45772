"""Directions and tags: who says what in which language."""

import pytest

from crossin_jax.data.corpus import Record, Text
from crossin_jax.data.crosslingual import SENTENCES, add_tag, make_example, request_language

RECORD = Record("r1", {"en": Text("Name it.", "A river", "Seine"), "zh": Text("请说出。", "一条河", "塞纳河"),
                       "es": Text("Nómbralo.", "", "Sena")})


@pytest.mark.parametrize(("kind", "pair", "expected"), [
    ("base", ("en", "en"), ("Name it.", "A river", "Seine")),
    ("en2x", ("en", "zh"), ("Name it.", "A river\n[zh]", "塞纳河")),
    ("x2en", ("zh", "en"), ("请说出。", "一条河\n[en]", "Seine")),
    ("x2x", ("zh", "es"), ("请说出。", "一条河\n[es]", "Sena")),
    ("x2x", ("es", "zh"), ("Nómbralo.\n[zh]", "", "塞纳河")),
    ("same", ("zh", "zh"), ("请说出。", "一条河\n[zh]", "塞纳河")),
    ("trans", ("zh", "en"), ("Translate the following sentence into English.", "请说出。", "Name it.")),
    ("trans", ("en", "zh"), ("Translate the following sentence into Chinese.", "Name it.", "请说出。")),
    ("text", ("zh", "zh"), ("", "", "塞纳河")),
])
def test_each_direction_joins_the_right_sides(kind, pair, expected):
    example = make_example(RECORD, kind, *pair, tag="input")
    assert (example.instruction, example.input, example.output) == expected
    assert (example.id, example.component, example.prompt_language, example.answer_language) == ("r1", kind, *pair)


def test_translation_of_the_whole_record():
    example = make_example(RECORD, "trans", "zh", "en", tag="input", translate_what="record")
    assert example.instruction == "Translate the following text into English."
    assert (example.input, example.output) == ("请说出。\n\n一条河\n\n塞纳河", "Name it.\n\nA river\n\nSeine")


@pytest.mark.parametrize(("style", "with_input", "without"), [
    ("none", ("Q", "I"), ("Q", "")),
    ("input", ("Q", "I\n[zh]"), ("Q\n[zh]", "")),
    ("input_released", ("Q", "I\n[zh]"), ("Q", "\n[zh]")),
    ("instruction", ("Q\n[zh]", "I"), ("Q\n[zh]", "")),
    ("sentence", ("Q Answer in Chinese.", "I"), ("Q Answer in Chinese.", "")),
])
def test_tag_styles(style, with_input, without):
    assert add_tag("Q", "I", "zh", "en", style) == with_input
    assert add_tag("Q", "", "zh", "en", style) == without


def test_base_rows_carry_a_sentence_but_no_marker():
    assert make_example(RECORD, "base", "en", "en", tag="input_released").input == "A river"
    assert make_example(RECORD, "base", "en", "en", tag="sentence").instruction == "Name it. Answer in English."


def test_every_seaeval_language_asks_for_every_other_in_its_own_words():
    sentences = {(a, b): request_language(a, b) for a in SENTENCES for b in SENTENCES}
    assert len(set(sentences.values())) == len(sentences) == 49
    assert sentences["zh", "en"] == "请用英语回答。" and sentences["es", "zh"] == "Responde en chino."
    assert request_language("de", "zh") == "Answer in Chinese." and request_language("zh", "de") == "Answer in German."


def test_chats_take_user_turns_from_one_side_and_replies_from_the_other():
    def chat(hi, ho):
        turns = ("system", "s"), ("user", hi), ("assistant", ho), ("user", hi + "2"), ("assistant", ho + "2")
        return Text(hi, "", ho, turns)
    record = Record("c", {"en": chat("hi", "ho"), "zh": chat("你", "好")})
    example = make_example(record, "x2x", "en", "zh", tag="input")
    assert example.messages == (("system", "s"), ("user", "hi\n[zh]"), ("assistant", "好"), ("user", "hi2\n[zh]"),
                                ("assistant", "好2"))
