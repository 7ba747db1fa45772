"""Real open weights: logits, answers, LoRA steps, scores and exports are those of transformers,
peft and lm-eval.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from flax import nnx

import crossin_jax
from crossin_jax.config import Component, Config, Data, Lora, Model, Optim, Source, Train
from crossin_jax.export import export
from crossin_jax.generation.chat import load_chat_model
from crossin_jax.parallel.mesh import make_mesh
from crossin_jax.train import train
from crossin_jax.training.state import abstract_model, load_base, model_spec
from tests.parity.families import quiet
from tests.parity.test_lora_training import our_losses, torch_losses

TEXTS = (
    "The Amazon is the largest river in the world by discharge. It flows through Brazil.",
    "¿Cuál es la capital de Francia? La capital de Francia es París.",
    "水在零度结冰。",
)
TOLERANCE = 2e-4  # of logits beside transformers in float32, absolute and relative
QUESTIONS = ("What is the capital of France?", "Name three colours.", "¿Qué es el agua?")


@pytest.fixture(scope="module")
def tokenizer(real):
    return quiet(transformers.AutoTokenizer.from_pretrained, real)


@pytest.fixture(scope="module")
def theirs(real):
    """The model as transformers computes it, in float32."""
    load = transformers.AutoModelForCausalLM.from_pretrained
    return quiet(load, real, dtype=torch.float32).eval()


def rows_of(tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Token ids (B, T) of the texts, padded on the right, and where they are not padding."""
    ids = [tokenizer(text).input_ids for text in TEXTS]
    tokens_BT = np.zeros((len(ids), max(map(len, ids))), np.int32)
    mask_BT = np.zeros(tokens_BT.shape, np.int32)
    for row, some in enumerate(ids):
        tokens_BT[row, : len(some)], mask_BT[row, : len(some)] = some, 1
    return tokens_BT, mask_BT


def their_logits(model, tokens_BT, mask_BT) -> np.ndarray:
    """Logits (tokens, V) at the positions that are not padding."""
    with torch.no_grad():
        logits = model(
            torch.as_tensor(tokens_BT, dtype=torch.long), attention_mask=torch.as_tensor(mask_BT)
        ).logits
    return logits.float().numpy()[mask_BT > 0]


def our_logits(folder, tokens_BT, mask_BT, **options) -> np.ndarray:
    model = crossin_jax.load_model(folder, progress=False, **options)
    logits = model(tokens_BT, segment_ids_BT=mask_BT)
    return np.asarray(logits, np.float32)[mask_BT > 0]


def test_logits(real, tokenizer, theirs):
    tokens_BT, mask_BT = rows_of(tokenizer)
    expected = their_logits(theirs, tokens_BT, mask_BT)
    assert np.ptp(expected) > 10  # the weights are not at random
    found = our_logits(real, tokens_BT, mask_BT)
    np.testing.assert_allclose(found, expected, atol=TOLERANCE, rtol=TOLERANCE)

    # bfloat16 has 8 bits: the likeliest token may change only where two are about as likely
    rounded = our_logits(real, tokens_BT, mask_BT, dtype="bfloat16")
    best = expected.max(-1)
    chosen = np.take_along_axis(expected, rounded.argmax(-1)[:, None], -1)[:, 0]
    assert np.mean(best - chosen < 0.25) >= 0.99
    assert np.mean(rounded.argmax(-1) == expected.argmax(-1)) >= 0.9


def prompt_ids(tokenizer, question: str) -> list[int]:
    """A question in the model's own chat template, or the bare text without one."""
    if not tokenizer.chat_template:
        return tokenizer(question).input_ids
    turns = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)


def ask_theirs(model, tokenizer, question: str, max_new_tokens: int) -> str:
    """The greedy answer of transformers."""
    ids = torch.as_tensor([prompt_ids(tokenizer, question)])
    with torch.no_grad():
        answer = quiet(
            model.generate,
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=max_new_tokens,
        )
    return tokenizer.decode(answer[0, ids.shape[1] :], skip_special_tokens=True)


def part_at_a_tie(model, tokenizer, question: str, ours: str, expected: str) -> bool:
    """Whether two answers part where the model finds both tokens equally likely.

    Logits agree within TOLERANCE, so either token may win where they are nearer than twice that.
    """
    a, b = (tokenizer(answer, add_special_tokens=False).input_ids for answer in (ours, expected))
    same = next(i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    ids = torch.as_tensor([prompt_ids(tokenizer, question) + a[:same]])
    with torch.no_grad():
        logits = model(ids).logits[0, -1]
    gap = abs(logits[a[same]] - logits[b[same]]).item()
    limit = 2 * TOLERANCE * (1 + abs(logits[a[same]]).item())
    print(f"{question!r}: {same} tokens are equal, then two whose logits differ by {gap:.1e}")
    return same > 16 and gap < limit


def test_greedy_answers_end_where_the_model_ends_its_turn(real, tokenizer, theirs):
    has_chat = bool(tokenizer.chat_template)
    ours = load_chat_model(str(real), template="chat" if has_chat else "plain", batch_size=4)
    answers = ours.answer([(question, "") for question in QUESTIONS], max_new_tokens=128)
    # the plain template adds a line break to the question
    asked = [question if has_chat else question + "\n" for question in QUESTIONS]
    expected = [ask_theirs(theirs, tokenizer, question, 128) for question in asked]
    different = [row for row in zip(asked, answers, expected, strict=True) if row[1] != row[2]]
    assert len(different) <= 1
    assert all(part_at_a_tie(theirs, tokenizer, *row) for row in different)
    if has_chat:
        assert any(len(tokenizer(answer).input_ids) < 120 for answer in answers)  # some end early


def text_batches(tokenizer, steps: int):
    """Two batches of real text in turn, with a prompt that is not learned."""
    tokens_BT, mask_BT = rows_of(tokenizer)
    tokens_BT = tokens_BT[:2, :17]  # both rows are longer, so there is no padding
    assert mask_BT[:2, :17].all()
    for step in range(steps):
        order = [0, 1] if step % 2 else [1, 0]
        yield tokens_BT[order], np.tile(np.arange(16) >= 4, (2, 1))


def test_ten_lora_steps_beside_peft(real, tokenizer, theirs, tmp_path):
    torch.manual_seed(0)
    settings = peft.LoraConfig(
        r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM"
    )
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = quiet(peft.get_peft_model, quiet(load, real, dtype=torch.float32), settings)
    quiet(model.save_pretrained, tmp_path / "adapter")
    batches = list(text_batches(tokenizer, 10))
    expected, _ = torch_losses(real, tmp_path / "adapter", batches)
    assert expected[-1] < expected[0] - 0.2  # the steps move it
    losses, *_ = our_losses(real, tmp_path / "adapter", batches)
    # The last losses are differences of logits near 20, whose steps in float32 are 2e-6.
    np.testing.assert_allclose(losses, expected, rtol=2e-4, atol=2e-6)


def test_option_scores_are_those_of_lm_eval(real, theirs, tokenizer):
    lm_eval = pytest.importorskip("lm_eval", reason="lm_eval is not installed")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    requests = [
        Instance("loglikelihood", {}, (f"Question: {question}\nAnswer:", " " + choice), i)
        for question in QUESTIONS[:2]
        for i, choice in enumerate(("Paris", "Berlin is the capital", "red, green and blue"))
    ]
    expected = quiet(HFLM, pretrained=theirs, tokenizer=tokenizer, batch_size=2).loglikelihood(
        requests, disable_tqdm=True
    )
    import crossin_jax.evaluation.harness  # noqa: F401 - registers the backend

    backend = lm_eval.api.registry.get_model("crossin_jax")
    ours = backend.create_from_arg_obj({"pretrained": str(real), "dtype": "float32"})
    found = ours.loglikelihood(requests, disable_tqdm=True)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    np.testing.assert_allclose(
        [value for value, _ in found], [value for value, _ in expected], rtol=1e-5, atol=1e-3
    )


def tuned(real: Path, folder: Path, template: str, **changes) -> Path:
    """A run of four LoRA steps on three facts, with adapters alone."""
    rows = [
        {
            "en": {"instruction": question, "output": answer},
            "es": {"instruction": other, "output": its},
        }
        for question, answer, other, its in (
            ("What is 2 plus 2?", "It is four.", "¿Cuánto es 2 más 2?", "Son cuatro."),
            ("What colour is grass?", "Green.", "¿De qué color es la hierba?", "Verde."),
            ("Who wrote Hamlet?", "Shakespeare.", "¿Quién escribió Hamlet?", "Shakespeare."),
        )
    ]
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return train(
        Config(
            name="real",
            output_dir=str(folder / "run"),
            model=Model(path=str(real), compute_dtype="float32", **changes),
            lora=Lora(rank=8, dropout=0.0, modules_to_save=()),
            data=Data(
                sources=(Source(name="rows", path=str(data)),),
                components=(Component(kind="x2x", source="rows"),),
                languages=("en", "es"),
                template=template,
                length=64,
            ),
            optim=Optim(learning_rate=1e-3),
            train=Train(steps=4, batch_size=8, checkpoint_every=None, tensorboard=False),
        )
    )


def test_exports_answer_as_the_run_does(real, tokenizer, theirs, tmp_path):
    has_chat = bool(tokenizer.chat_template)
    run = tuned(real, tmp_path, "chat" if has_chat else "plain", frozen_dtype="float32")
    merged = export(run, "merged", tmp_path / "merged", "float32")
    adapter = export(run, "peft", tmp_path / "adapter")
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = quiet(load, merged, dtype=torch.float32).eval()
    on_base = quiet(
        peft.PeftModel.from_pretrained, quiet(load, real, dtype=torch.float32), adapter
    ).eval()

    tokens_BT, mask_BT = rows_of(tokenizer)
    before = their_logits(theirs, tokens_BT, mask_BT)
    expected = their_logits(on_base, tokens_BT, mask_BT)
    assert np.abs(expected - before).max() > 0.1  # the run moved the model
    np.testing.assert_allclose(
        their_logits(model, tokens_BT, mask_BT), expected, atol=2e-3, rtol=1e-3
    )
    found = our_logits(merged, tokens_BT, mask_BT)
    np.testing.assert_allclose(found, expected, atol=2e-3, rtol=1e-3)

    question = QUESTIONS[0]
    (answer,) = load_chat_model(str(run)).answer([(question, "")], max_new_tokens=24)
    (answer_merged,) = load_chat_model(str(merged)).answer([(question, "")], max_new_tokens=24)
    assert answer == answer_merged
    if has_chat:
        exported = quiet(transformers.AutoTokenizer.from_pretrained, merged)
        assert ask_theirs(model, exported, question, 24) == answer


def loss_per_token(logits: np.ndarray, targets: np.ndarray) -> float:
    """Mean negative log-likelihood of the targets, nats."""
    losses = torch.nn.functional.cross_entropy(torch.as_tensor(logits), torch.as_tensor(targets))
    return losses.item()


@pytest.mark.parametrize(("kind", "limit"), [("nf4", 0.35), ("int8", 0.05)])
def test_quantized_bases_stay_near_the_model(real, tokenizer, theirs, kind, limit):
    """The loss of a rounded base beside the base's own on the same text. SmolLM2-135M loses .29
    nats per token with nf4 and .002 with int8; the limits are above that.
    """
    tokens_BT, mask_BT = rows_of(tokenizer)
    learned = mask_BT[:, 1:] > 0
    targets = tokens_BT[:, 1:][learned].astype(np.int64)
    config = Config(
        name="rounded",
        model=Model(path=str(real), frozen_dtype=kind, compute_dtype="float32"),
        lora=Lora(rank=1, modules_to_save=()),
    )
    model = abstract_model(config, model_spec(config), make_mesh(config.mesh, jax.devices()[:1]))
    state = nnx.merge_state(*load_base(config, model.trainable, model.frozen))
    state = jax.tree.map(  # adapters that add nothing
        lambda leaf: (
            jnp.zeros(leaf.shape, leaf.dtype) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf
        ),
        state,
    )
    logits = nnx.merge(model.graphdef, state)(tokens_BT, segment_ids_BT=mask_BT)
    rounded = loss_per_token(np.asarray(logits)[:, :-1][learned], targets)
    exact = their_logits(theirs, tokens_BT[:, :-1], mask_BT[:, :-1])
    # a row's last token has no target
    keeps = (mask_BT[:, 1:] > 0)[mask_BT[:, :-1] > 0]
    base = loss_per_token(exact[keeps], targets)
    print(f"{real.name}: {base:.4f} nats per token, {kind} {rounded:.4f}")
    assert 0 < abs(rounded - base) < limit
