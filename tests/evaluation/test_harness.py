"""A real task of lm-evaluation-harness from local files, through our engine and through the
harness's own backend.
"""

import copy
import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

pytest.importorskip("lm_eval", reason="lm_eval is not installed (pip install lm_eval)")

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from crossin_jax.config import UserError
from crossin_jax.data.pipeline import load_tokenizer
from crossin_jax.evaluation.harness import NEUTRAL, EngineLM
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.filterwarnings("ignore")  # the harness's own and those of its libraries

FACTS = [
    ("France", "Paris"),
    ("Peru", "Lima"),
    ("Kenya", "Nairobi"),
    ("Laos", "Vientiane"),
    ("Chad", "N'Djamena"),
    ("Fiji", "Suva"),
    ("Oman", "Muscat"),
    ("Togo", "Lomé"),
]
TASKS = {
    "capitals": {
        "output_type": "multiple_choice",
        "doc_to_text": "What is the capital of {{country}}?\nAnswer:",
        "doc_to_target": 0,
        "doc_to_choice": "{{choices}}",
        "num_fewshot": 3,
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "texts": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}],
    },
    "answers": {
        "output_type": "generate_until",
        "doc_to_text": "{{country}}:",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["\n", "e"], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A manager that knows the tasks, whose rows are in a file."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {
            "country": country,
            "choices": [city, *(other for _, other in FACTS[:i] + FACTS[i + 1 :])][: 2 + i % 3],
            "text": f"{city} is the capital of {country}. " * (1 + 3 * i),
        }
        for i, (country, city) in enumerate(FACTS)
    ]
    (folder / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    for name, task in TASKS.items():
        task = {
            "task": name,
            "dataset_path": "json",
            "test_split": "test",
            "fewshot_split": "test",
            "dataset_kwargs": {
                "data_files": {"test": str(folder / "rows.json")},
                "cache_dir": str(folder / "cache"),
            },
            "metadata": {"version": 1},
        } | task
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))
    return TaskManager(include_path=str(folder), include_defaults=False)


def run(model, arguments, tasks):
    found = lm_eval.simple_evaluate(
        model,
        arguments,
        tasks=list(TASKS),
        task_manager=tasks,
        bootstrap_iters=0,
        batch_size=4,
        device="cpu" if model == "hf" else None,
    )
    return found["results"], {
        name: [row["resps"] for row in sorted(rows, key=lambda row: row["doc_id"])]
        for name, rows in found["samples"].items()
    }


def flatten(value):
    """The numbers and texts in nested lists."""
    return (
        [inner for entry in value for inner in flatten(entry)]
        if isinstance(value, (list, tuple))
        else [value]
    )


def test_a_real_task_gives_the_numbers_of_the_harness_own_backend(pretrained, tasks):
    # The longest texts need several windows.
    arguments = {
        "pretrained": str(pretrained / "model"),
        "max_length": 64,
    }
    results, samples = run("crossin_jax", arguments, tasks)
    expected, expected_samples = run("hf", arguments | {"dtype": "float32"}, tasks)
    for name, count in (("capitals", 46), ("texts", 8), ("answers", 8)):
        ours, theirs = flatten(samples[name]), flatten(expected_samples[name])
        # A likelihood and whether it is greedy; a likelihood; an answer.
        assert len(theirs) == count
        for value, their_value in zip(ours, theirs, strict=True):
            # 1e-4 for what a question's choice has; a text of 300 tokens sums up more rounding
            assert value == (
                pytest.approx(their_value, abs=1e-4, rel=1e-6)
                if type(value) is float
                else their_value
            )
    for name in TASKS:
        for metric, value in expected[name].items():
            assert results[name][metric] == (
                pytest.approx(value, rel=1e-4) if isinstance(value, float) else value
            )


class Recorder:
    """Stands in for an engine: repeats one text as every answer, scores a continuation by its
    length.
    """

    def __init__(self, tokenizer, text="", max_length=40):
        self.ids, self.max_length = tokenizer.encode(text, add_special_tokens=False), max_length
        self.calls = []

    def generate(self, prompts, **options):
        self.calls.append((prompts, options))
        return [list(self.ids) for _ in prompts]

    def score_with_greedy(self, prompts, continuations, **options):
        self.calls.append((prompts, continuations))
        return [
            (
                np.array([-len(prompt) - len(choice) / 64 for choice in entry]),
                np.array([len(choice) % 2 == 0 for choice in entry]),
            )
            for prompt, entry in zip(prompts, continuations, strict=True)
        ]


@pytest.fixture(scope="module")
def tokenizer(pretrained):
    return load_tokenizer(str(pretrained / "model"))


def ask(model, *requests):
    """The answers to (context, generation settings)."""
    return model.generate_until(
        [Instance("generate_until", {}, request, i) for i, request in enumerate(requests)],
        disable_tqdm=True,
    )


SAMPLED = {"temperature": 0.7, "top_k": 3, "top_p": 0.9}
REACHES = [  # settings of a task, and what the engine gets of them
    ({}, {}),
    ({"until": ["\n", "Q:"]}, {"stop": ["\n", "Q:", "</s>"]}),
    ({"until": "x"}, {"stop": ["x", "</s>"]}),
    *(
        ({name: 9}, {"max_new_tokens": 9})
        for name in ("max_gen_toks", "max_new_tokens", "max_tokens")
    ),
    ({"do_sample": True, **SAMPLED}, SAMPLED),
    ({"temperature": 0.3}, {"temperature": 0.3}),
    ({"do_sample": True}, {"temperature": 1.0}),
    ({"do_sample": True, "top_p": 0.5}, {"temperature": 1.0, "top_p": 0.5}),
    ({"do_sample": False}, {}),
    ({"do_sample": False, **SAMPLED}, {}),
    ({"temperature": 0.0}, {}),
    ({"do_sample": True, "temperature": 0.0, "top_p": 0.9}, {}),
    ({"do_sample": True, "top_k": 0}, {"temperature": 1.0}),
    ({"do_sample": True, "top_k": -1, "top_p": None}, {"temperature": 1.0}),
    ({"until": [""]}, {}),
    # what lm-eval's own tasks and people's copies of them say besides, and what changes nothing
    *(({name: value}, {}) for name, values in NEUTRAL.items() for value in values),
    ({"num_beams": 1.0, "repetition_penalty": 1.0, "use_cache": True, "early_stopping": False}, {}),
]


@pytest.mark.parametrize(("given", "expected"), REACHES, ids=str)
def test_every_setting_of_generation_reaches_the_engine(tokenizer, given, expected):
    """Stops, length and sampling are those of the task; greedy where it does not sample."""
    engine = Recorder(tokenizer)
    ask(EngineLM(engine, tokenizer, max_gen_toks=7), ("France:", given))
    ((prompts, options),) = engine.calls
    assert prompts == [tokenizer.encode("France:")] and options.pop("progress") is False
    assert options.pop("detokenize")(prompts[0]) == "France:" and len(options.pop("seeds")) == 1
    assert options == {"max_new_tokens": 7, "stop": ["</s>"]} | expected


@pytest.mark.parametrize(
    "given",
    [
        {"repetition_penalty": 1.2},
        {"num_beams": 2},
        {"min_p": 0.1},
        {"seed": 3},
        {"no_repeat_ngram_size": 3},
        {"min_new_tokens": 4},
    ],
    ids=str,
)
def test_settings_that_the_engine_does_not_know_are_refused(tokenizer, given):
    engine = Recorder(tokenizer)
    with pytest.raises(
        UserError, match=f"generation_kwargs {next(iter(given))}: the engine knows do_sample"
    ):
        ask(EngineLM(engine, tokenizer), ("France:", {"max_gen_toks": 5} | given))
    with pytest.raises(
        UserError, match="max_gen_toks=40 leaves no room for a prompt in max_length=40"
    ):
        ask(EngineLM(engine, tokenizer), ("France:", {"max_gen_toks": 40}))
    assert not engine.calls


def test_requests_keep_their_own_settings_and_places(tokenizer):
    """Answers end before their own stop; requests of equal settings are asked together."""
    engine = Recorder(tokenizer, "one two three")
    answers = ask(
        EngineLM(engine, tokenizer, max_gen_toks=5),
        ("a", {"until": ["two"]}),
        ("b", {"until": ["three"]}),
        ("c", {"until": ["two"]}),
        ("d", {"until": ["two"], "temperature": 0.5}),
        ("e", {}),
    )
    assert answers == ["one ", "one two ", "one ", "one ", "one two three"]
    told = [
        (
            [tokenizer.decode(ids, skip_special_tokens=True) for ids in prompts],
            options.get("temperature"),
        )
        for prompts, options in engine.calls
    ]
    assert told == [(["a", "c"], None), (["b"], None), (["d"], 0.5), (["e"], None)]


def test_an_answer_ends_before_a_special_token_that_a_task_names(tokenizer):
    """Alone or beside other characters; special tokens that no stop names are left out."""
    told = "one</s>two<s> three"
    for until, expected in (
        ("</s>", "one"),
        ("</s> t", "one"),
        (["<s>"], "one two"),
        (["<s> th", "e</s>"], "on"),
        ("three", "one two "),
    ):
        lm = EngineLM(Recorder(tokenizer, told), tokenizer, max_gen_toks=5)
        lm.tokenizer = SimpleEnd(tokenizer)
        assert ask(lm, ("a", {"until": until})) == [expected], until


class SimpleEnd:
    """A tokenizer whose EOS is in no answer."""

    eos_token_id = 0

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)


CHATS = {
    "refuses": "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}",
    "alternates": "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif "
    "%}",
    "takes": "",
}


@pytest.mark.parametrize("form", list(CHATS))
def test_a_chat_with_a_system_turn_is_rendered_by_every_template(tokenizer, form):
    asked = copy.deepcopy(tokenizer)
    asked.chat_template = (
        CHATS[form] + "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}</s>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    lm = EngineLM(Recorder(asked), asked)
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi "}]
    expected = (
        "[system]Be brief.</s>[user]Hi</s>" if form == "takes" else "[user]Be brief.\n\nHi</s>"
    )
    assert lm.apply_chat_template(chat) == expected + "[assistant]"
    opened = [*chat, {"role": "assistant", "content": "The answer is "}]
    text = lm.apply_chat_template(opened, add_generation_prompt=False)
    assert text == expected + "[assistant]The answer is"
    asked.chat_template = "{{ raise_exception('never') }}"
    with pytest.raises(UserError, match="refuses the turns user: never"):
        EngineLM(Recorder(asked), asked).apply_chat_template(chat)


@pytest.mark.parametrize("trims", [True, False])
@pytest.mark.parametrize("content", ["", "Hi", "The answer is ", " a\n", "<s>"])
def test_a_turn_is_continued_where_transformers_continues_it(tokenizer, content, trims):
    """Also one that is empty, that stands in an earlier turn, or that a template strips."""
    asked = copy.deepcopy(tokenizer)
    asked.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content"
        + " | trim" * trims
        + " }}</s>{% endfor %}"
    )
    chat = [
        {"role": role, "content": text} for role, text in (("user", "Hi"), ("assistant", content))
    ]
    expected = asked.apply_chat_template(chat, tokenize=False, continue_final_message=True)
    lm = EngineLM(Recorder(asked), asked)
    assert lm.apply_chat_template(chat, add_generation_prompt=False) == expected


def test_a_prompt_that_is_asked_several_times_is_drawn_several_times(tokenizer):
    """Tasks with repeats sample one prompt anew each time, and alike in every run."""
    seeds = []
    for _ in range(2):
        engine = Recorder(tokenizer)
        ask(EngineLM(engine, tokenizer, max_gen_toks=5), *[(text, SAMPLED) for text in "abaca"])
        seeds.append(engine.calls[0][1]["seeds"])
    assert seeds[0] == seeds[1] and len(set(seeds[0])) == 5


def test_long_contexts_lose_their_first_tokens(tokenizer):
    """What is kept fits with the answer, or with the continuation but its last token."""
    engine, text = Recorder(tokenizer), " ".join(["city"] * 60)
    ids = tokenizer.encode(text)
    model = EngineLM(engine, tokenizer, max_gen_toks=6)
    ask(model, (text, {}), (text, {"max_gen_toks": 9}))
    assert [prompts for prompts, _ in engine.calls] == [[ids[-34:]], [ids[-31:]]]
    engine.calls.clear()
    requests = [
        (("", ""), ids, [5]),
        (("", ""), ids, [5, 6, 7]),
        (("", ""), ids[:3], [5, 6]),
        (("", ""), ids, [8]),
    ]
    found = model._loglikelihood_tokens(requests, disable_tqdm=True)
    ((prompts, continuations),) = engine.calls
    assert list(map(list, prompts)) == [ids[-40:], ids[-38:], ids[:3]]
    assert continuations == [[[5], [8]], [[5, 6, 7]], [[5, 6]]]
    assert found == [
        (-40 - 1 / 64, False),
        (-38 - 3 / 64, False),
        (-3 - 2 / 64, True),
        (-40 - 1 / 64, False),
    ]
    with pytest.raises(
        UserError, match="request 1: a continuation of 41 tokens is longer than max_length=40"
    ):
        model._loglikelihood_tokens([requests[0], (("", ""), ids, [5] * 41)], disable_tqdm=True)
    assert EngineLM(engine, tokenizer, max_length=30).max_length == 30
    assert EngineLM(engine, tokenizer, max_length=50).max_length == 40


ARGUMENTS = [  # model_args, the harness's flags, what the model is opened with, limits
    ("pretrained=m", {}, {"batch_size": 16}, {}),
    (
        "pretrained=m,adapter=a,tokenizer=t,dtype=bfloat16",
        {"device": "cuda:0", "max_batch_size": 8},
        {"adapter": "a", "tokenizer": "t", "dtype": "bfloat16", "batch_size": 16},
        {},
    ),
    (
        "pretrained=m,max_length=30,max_gen_toks=5",
        {"batch_size": 4},
        {"batch_size": 4},
        {"max_length": 30, "max_gen_toks": 5},
    ),
    ("pretrained=m", {"batch_size": "auto:2"}, {"batch_size": 16}, {}),
    *(
        ("pretrained=m,batch_size=32", {"batch_size": size}, {"batch_size": 32}, {})
        for size in (None, 1)
    ),
]


@pytest.mark.parametrize(("arguments", "flags", "opened", "limits"), ARGUMENTS)
def test_every_argument_of_the_model_reaches_it(
    tokenizer, monkeypatch, arguments, flags, opened, limits
):
    """Folder, adapter, tokenizer, precision, rows and limits; devices are JAX's affair."""
    asked = []

    def load_chat_model(path, **options):
        asked.append((path, options))
        return SimpleNamespace(engine=Recorder(tokenizer), tokenizer=tokenizer)

    monkeypatch.setattr("crossin_jax.evaluation.harness.load_chat_model", load_chat_model)
    model = EngineLM.create_from_arg_string(arguments, flags)
    usual = {"adapter": None, "tokenizer": None, "dtype": "auto", "template": "plain"}
    assert asked == [("m", usual | opened)]
    assert (model.max_length, model.max_gen_toks) == (
        limits.get("max_length", 40),
        limits.get("max_gen_toks", 256),
    )
    assert model.tokenizer is tokenizer


def test_texts_are_tokenized_with_one_bos(tokenizer):
    """BOS comes first unless the text brings it or the harness says otherwise; it starts a text
    without context.
    """
    model = EngineLM(Recorder(tokenizer), tokenizer)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    plain = tokenizer.encode("Lima", add_special_tokens=False)
    assert (
        model.tok_encode("Lima")
        == model.tok_encode("Lima", add_special_tokens=True)
        == [bos, *plain]
    )
    assert model.tok_encode("Lima", add_special_tokens=False) == plain
    assert model.tok_encode("<s>Lima").count(bos) == 1
    assert (model.prefix_token_id, model.eot_token_id) == (bos, eos)
    without = SimpleNamespace(bos_token_id=None, eos_token_id=7, name_or_path="a/b")
    model = EngineLM(Recorder(tokenizer), without)
    assert (model.prefix_token_id, model.eot_token_id, model.tokenizer_name) == (7, 7, "a__b")


def test_arguments_that_cannot_be_meant_are_refused(pretrained):
    for arguments, words in (
        ("dtype=float32", "pretrained is missing"),
        ("pretrained=x,peft=y", "peft=y.*takes"),
        (f"pretrained={pretrained / 'nowhere'}", "nowhere"),
    ):
        with pytest.raises(UserError, match=words):
            EngineLM.create_from_arg_string(arguments)


def test_the_program_runs_a_task(pretrained, tasks):
    """As users start it: the harness's own command line names a device, batch sizes and more of its
    own accord.
    """
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "crossin_jax.harness",
            "run",
            "--model",
            "crossin_jax",
            "--model_args",
            f"pretrained={pretrained / 'model'},max_length=64",
            "--tasks",
            "capitals",
            "--include_path",
            tasks.include_path,
        ],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    results, _ = run(
        "crossin_jax", {"pretrained": str(pretrained / "model"), "max_length": 64}, tasks
    )
    row = next(line for line in done.stdout.splitlines() if line.startswith("|capitals"))
    assert float(row.split("|")[7]) == results["capitals"]["acc,none"]


def test_without_the_harness_there_is_one_line(tmp_path):
    (tmp_path / "lm_eval.py").write_text("raise ModuleNotFoundError('hidden', name='lm_eval')")
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import sys; sys.path.insert(0, {str(tmp_path)!r}); "
            "from crossin_jax.harness import main; main()",
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.strip() == "error: lm_eval is not installed: pip install lm_eval"
