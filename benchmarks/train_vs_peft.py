"""Supervised tokens per second of our training step beside `transformers` + `peft`: the same Llama,
LoRA and examples.

    python benchmarks/train_vs_peft.py [--repeats 5] [--out FILE.json]
    python benchmarks/train_vs_peft.py --quick

A Llama of random weights with a real vocabulary (Llama 2, 32,000 pieces) learns 175 real
instructions (Alpaca's seed tasks) with LoRA r=64 on all projections, AdamW, in float32, on the
processor. Each side has a process of its own; they take turns, so that other work on the machine
hits both, and medians are compared. Three ways to lay out examples:

  unpadded  rows of 512 tokens, filled by joining examples, the same rows for both
  padded    one example per row, filled to 512 tokens, for peft; the same examples packed for ours
  longest   as before, but peft's rows are only as long as the longest of their batch, and its
            examples are sorted by length

The peer gets the number of threads and the micro-batch that are best for it on a sample, ours the
micro-batch. An optimizer step sees the same examples on both sides and its loss is their mean over
all learned tokens; where losses are further apart than 1e-4, the exit code is 1. Compilation is not
counted.

Last comes a bound: the products that no step can do without, at the speed of one large product on
this machine. Were everything else free, ours would be so many times as fast as peft was.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from record import write_record

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK, ALPHA, RATE, TOLERANCE = 64, 128, 2e-4, 1e-4
Example = tuple[np.ndarray, np.ndarray]  # ids, learned


class Ours:
    """Our training step from the same start at every run; compiled once per number of
    micro-batches.
    """

    def __init__(self, config: Any, *, is_random: bool = False):
        import jax

        from crossin_jax.parallel.mesh import make_mesh
        from crossin_jax.training.optim import make_optimizer
        from crossin_jax.training.state import abstract_model, abstract_state, model_spec

        self.config, self.spec, self.is_random = config, model_spec(config), is_random
        self.mesh = make_mesh(config.mesh, jax.devices()[:1])
        self.model = abstract_model(config, self.spec, self.mesh)
        self.optimizer = make_optimizer(config.optim, 1000)
        self.abstract = abstract_state(self.model, self.optimizer, self.mesh)
        self.steps: dict[int, Any] = {}

    def start(self) -> Any:
        """The state before the first step."""
        import jax
        from flax import nnx

        from crossin_jax.training.state import build, shardings_of, start_state
        from crossin_jax.training.step import init_state

        if not self.is_random:
            return start_state(self.config, self.model, self.abstract, self.optimizer)

        def draw():
            model = nnx.state(build(self.config, self.spec, jax.random.key(0)))
            trains = {path for path, _ in nnx.to_flat_state(self.model.trainable)}
            trainable, frozen = nnx.split_state(model, lambda path, _: path in trains, ...)
            return init_state(trainable, frozen, self.optimizer)

        return jax.jit(draw, out_shardings=shardings_of(self.abstract))()

    def run(
        self, batches: list[dict[str, np.ndarray]], parts: int, around: Any = None
    ) -> tuple[float, list[float]]:
        """Seconds for all steps, and the loss of each; `around` is entered for these steps alone,
        after compilation.
        """
        import jax

        from crossin_jax.training.state import to_mesh
        from crossin_jax.training.step import COMPILER_OPTIONS, StepSettings, make_train_step

        model, is_new = self.config.model, parts not in self.steps
        with jax.set_mesh(self.mesh):
            if is_new:
                static = StepSettings(
                    parts, self.config.train.loss_chunk, model.remat, model.attention, 0, 1
                )
                self.steps[parts] = jax.jit(
                    make_train_step(self.model.graphdef, self.optimizer, static),
                    donate_argnums=0,
                    compiler_options=COMPILER_OPTIONS.get(jax.default_backend()),
                )
                state = self.start()
                jax.block_until_ready(self.steps[parts](state, to_mesh(batches[0], self.mesh)))
            state, losses = jax.block_until_ready(self.start()), []
            with around or nullcontext():
                start = time.perf_counter()
                for batch in batches:
                    state, metrics = self.steps[parts](state, to_mesh(batch, self.mesh))
                    losses.append(metrics["loss"])
                jax.block_until_ready(state)
                seconds = time.perf_counter() - start
            return seconds, [float(loss) for loss in losses]


class Theirs:
    """A `transformers` model, with adapters of `peft` where asked, from the same start at every
    run.
    """

    def __init__(self, model: Any, *, device: str = "cpu", fused: bool = False):
        self.model, self.device, self.fused = model.to(device).train(), device, fused
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.saved = [p.detach().clone() for p in self.trained]

    def run(
        self, steps: list[list[dict[str, np.ndarray]]], threads: int | None
    ) -> tuple[float, list[float]]:
        """Seconds for all steps, each a list of micro-batches, and the loss of each."""
        import torch

        if threads:
            torch.set_num_threads(threads)
        with torch.no_grad():
            for parameter, saved in zip(self.trained, self.saved, strict=True):
                parameter.copy_(saved)
        optimizer = torch.optim.AdamW(self.trained, lr=RATE, weight_decay=0.0, fused=self.fused)
        losses = []
        start = time.perf_counter()
        for micro_batches in steps:
            count = sum(int((batch["labels"][:, 1:] >= 0).sum()) for batch in micro_batches)
            total = 0.0
            for batch in micro_batches:
                inputs = {
                    name: torch.from_numpy(array).to(self.device) for name, array in batch.items()
                }
                loss = self.model(**inputs, num_items_in_batch=count, use_cache=False).loss
                loss.backward()
                total = total + loss.detach()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(total)
        losses = [float(loss) for loss in losses]  # waits for the device
        return time.perf_counter() - start, losses


# ---- examples and rows


def read_examples(data: Path, length: int) -> list[Example]:
    """Alpaca's seed tasks as ids and masks, those that fit a row."""
    from crossin_jax.data.pipeline import load_tokenizer
    from crossin_jax.data.prompts import Renderer

    renderer = Renderer(load_tokenizer(str(data / "tokenizers/llama2")), "alpaca")
    tasks = map(json.loads, (data / "alpaca/seed_tasks.jsonl").read_text().splitlines())
    rendered = [
        renderer.render_answer(task["instruction"], *task["instances"][0].values())
        for task in tasks
    ]
    kept = [(one.ids, one.loss_mask) for one in rendered if len(one.ids) <= length]
    return [kept[i] for i in np.random.default_rng(0).permutation(len(kept))]


def join_examples(examples: list[Example], length: int) -> list[Example]:
    """Rows without padding: examples one after the other, cut at every `length` tokens."""
    ids, loss_mask = (np.concatenate(part) for part in zip(*examples, strict=True))
    return [
        (ids[i : i + length], loss_mask[i : i + length])
        for i in range(0, len(ids) - length + 1, length)
    ]


def fill_rows(rows: list[list[Example]], length: int) -> dict[str, np.ndarray]:
    """Our batch: the examples of a row side by side, each a segment."""
    names = ("tokens", "targets", "segment_ids", "positions", "group", "loss_mask")
    batch = {
        f"{name}_BT": np.zeros((len(rows), length), bool if name == "loss_mask" else np.int32)
        for name in names
    }
    for row, examples in enumerate(rows):
        at = 0
        for segment, (ids, loss_mask) in enumerate(examples, 1):
            here = slice(at, at := at + len(ids))
            inner = slice(here.start, at - 1)  # the last token of an example predicts nothing
            batch["tokens_BT"][row, here], batch["segment_ids_BT"][row, here] = ids, segment
            batch["positions_BT"][row, here] = np.arange(len(ids))
            batch["targets_BT"][row, inner], batch["loss_mask_BT"][row, inner] = (
                ids[1:],
                loss_mask[1:],
            )
    return batch


def pad_rows(examples: list[Example], size: int, length: int | None) -> list[dict[str, np.ndarray]]:
    """Their micro-batches of `size` examples, filled to `length`, or sorted and to the longest
    where it is None.
    """
    if length is None:
        examples = sorted(examples, key=lambda example: len(example[0]))
    batches = []
    for first in range(0, len(examples), size):
        some = examples[first : first + size]
        shape = (len(some), length or max(len(ids) for ids, _ in some))
        batch = {
            "input_ids": np.zeros(shape, np.int64),
            "attention_mask": np.zeros(shape, np.int64),
            "labels": np.full(shape, -100, np.int64),
        }
        for row, (ids, loss_mask) in enumerate(some):
            batch["input_ids"][row, : len(ids)], batch["attention_mask"][row, : len(ids)] = ids, 1
            batch["labels"][row, : len(ids)] = np.where(loss_mask, ids, -100)
        batches.append(batch)
    return batches


def lay_out(
    examples: list[Example], length: int, rows: int, num_steps: int
) -> dict[str, list[list[list[Example]]]]:
    """Rows of examples by step: packed, and joined without padding."""
    from crossin_jax.data.packing import pack_rows

    packed = [
        [examples[i] for i in row] for row in pack_rows([len(ids) for ids, _ in examples], length)
    ]
    packed = [packed[i] for i in np.random.default_rng(1).permutation(len(packed))]
    joined = [[row] for row in join_examples(examples, length)]
    assert min(len(packed), len(joined)) >= rows * num_steps, "too few examples for so many steps"
    return {
        name: [some[s * rows : (s + 1) * rows] for s in range(num_steps)]
        for name, some in (("packed", packed), ("joined", joined))
    }


# ---- what is possible


def count_flops(shape: dict[str, int], tokens: int, supervised: int) -> int:
    """Of a step's products: forward and back through all matrices, logits of learned tokens,
    gradients of adapters.

    Attention's own products are left out.
    """
    width, inner, layers = (
        shape[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers")
    )
    matrices = layers * (4 * width * width + 3 * width * inner)
    adapters = layers * RANK * (4 * 2 * width + 3 * (width + inner))
    return 2 * (
        tokens * (2 * matrices + 3 * adapters) + 2 * supervised * width * shape["vocab_size"]
    )


def measure_products(shape: dict[str, int], rows: int) -> float:
    """FLOPs per second of a product with the MLP's matrix, the better of XLA's and torch's."""
    import jax
    import torch

    width, inner = shape["hidden_size"], shape["intermediate_size"]
    left, right = np.ones((rows, width), np.float32), np.ones((width, inner), np.float32)
    multiply = jax.jit(lambda a, b: a @ b)
    times = []
    for a, b, product in (
        (
            jax.numpy.asarray(left),
            jax.numpy.asarray(right),
            lambda a, b: multiply(a, b).block_until_ready(),
        ),
        (torch.from_numpy(left), torch.from_numpy(right), torch.mm),
    ):
        for _ in range(40):
            start = time.perf_counter()
            product(a, b)
            times.append(time.perf_counter() - start)
    return 2 * rows * width * inner / min(times)


# ---- the two processes


def make_peft(folder: Path, shape: dict[str, int]) -> Any:
    """A Llama of random weights and its adapter, saved for both sides."""
    import peft
    import torch
    import transformers

    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**shape, tie_word_embeddings=True)
    )
    model.save_pretrained(folder)
    adapted = peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=RANK,
            lora_alpha=ALPHA,
            lora_dropout=0.0,
            target_modules=list(TARGETS),
            task_type="CAUSAL_LM",
        ),
    )
    adapted.save_pretrained(folder / "adapter")
    return adapted


def open_ours(folder: Path, length: int) -> Ours:
    """Our side on what `make_peft` saved."""
    from crossin_jax.config import Config, Data, Lora, Model, Optim, Train

    return Ours(
        Config(
            model=Model(path=str(folder), frozen_dtype="float32", compute_dtype="float32"),
            data=Data(length=length),
            lora=Lora(
                rank=RANK,
                alpha=ALPHA,
                dropout=0.0,
                modules_to_save=(),
                path=str(folder / "adapter"),
            ),
            optim=Optim(
                learning_rate=RATE,
                weight_decay=0.0,
                clip_norm=None,
                warmup_share=0.0,
                schedule="constant",
            ),
            train=Train(loss_chunk=length),
        )
    )


def serve(pipe: Any, opens: Callable[..., Any], *arguments: Any) -> None:
    """A side: opened once, then a run for every message."""
    side = opens(*arguments)
    pipe.send(None)
    while (message := pipe.recv()) is not None:
        pipe.send(side.run(*message))


class Side:
    """A side in a process of its own."""

    def __init__(self, opens: Callable[..., Any], *arguments: Any):
        context = multiprocessing.get_context("spawn")
        self.pipe, far = context.Pipe()
        self.process = context.Process(target=serve, args=(far, opens, *arguments), daemon=True)
        self.process.start()
        far.close()
        self.pipe.recv()

    def run(self, *message: Any) -> Any:
        """What the side's `run` gives; the caller waits, so the two never work at the same time."""
        self.pipe.send(message)
        return self.pipe.recv()

    def close(self) -> None:
        self.pipe.send(None)
        self.process.join()


def open_theirs(folder: Path, shape: dict[str, int]) -> Theirs:
    """Their side; it also makes the weights."""
    return Theirs(make_peft(folder, shape))


def compare(
    sides: tuple[Side, Side],
    name: str,
    layouts: dict,
    shape: dict[str, int],
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """The two sides on one layout: settings chosen on the first step, then taking turns."""
    ours, theirs = sides
    steps = layouts["joined" if name == "unpadded" else "packed"]
    batches = [fill_rows(rows, arguments.length) for rows in steps]
    examples = [[example for row in rows for example in row] for rows in steps]
    supervised = sum(int(batch["loss_mask_BT"].sum()) for batch in batches)

    def their_steps(size: int, count: int | None = None) -> list[list[dict[str, np.ndarray]]]:
        return [
            pad_rows(some, size, None if name == "longest" else arguments.length)
            for some in examples[:count]
        ]

    parts = [n for n in arguments.parts if arguments.rows % n == 0]
    our_sample = {n: ours.run(batches[:1], n)[0] for n in parts}
    our_best = min(our_sample, key=our_sample.get)
    theirs.run(their_steps(arguments.sizes[0], 1), None)  # warm
    sample = {
        (size, threads): theirs.run(their_steps(size, 1), threads)[0]
        for size in arguments.sizes
        for threads in arguments.threads
    }
    size, threads = min(sample, key=sample.get)
    seconds, apart = ([], []), 0.0
    for _ in range(arguments.repeats):
        spent, losses = ours.run(batches, our_best)
        their_spent, their_losses = theirs.run(their_steps(size), threads)
        seconds[0].append(spent)
        seconds[1].append(their_spent)
        apart = max(apart, *(abs(a - b) for a, b in zip(losses, their_losses, strict=True)))
    rates = [[supervised / one for one in some] for some in seconds]
    ratio = statistics.median(rates[0]) / statistics.median(rates[1])
    print(
        f"{name:9} supervised tokens/s, median of {arguments.repeats}: ours "
        f"{statistics.median(rates[0]):.1f} (micro-batches {our_best}), peft "
        f"{statistics.median(rates[1]):.1f} (batch {size}, threads {threads}): {ratio:.2f} x; "
        f"losses at most {apart:.1e} apart",
        flush=True,
    )
    flops = sum(
        count_flops(
            shape, int((batch["segment_ids_BT"] > 0).sum()), int(batch["loss_mask_BT"].sum())
        )
        for batch in batches
    )
    return {
        "layout": name,
        "ratio": ratio,
        "flops": flops,
        "seconds": seconds,
        "rates": rates,
        "supervised": supervised,
        "losses_apart": apart,
        "ours": our_best,
        "theirs": (size, threads),
        "examples": sum(map(len, examples)),
        "our_sample": our_sample,
        "their_sample": {str(key): value for key, value in sample.items()},
    }


def numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def main() -> int:
    """Prints a line for each layout; 1 where losses differ."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, default=Path(__file__).resolve().parents[2] / "shared" / "data"
    )
    parser.add_argument("--layouts", default="unpadded,padded,longest")
    parser.add_argument("--length", type=int, default=512, help="tokens per row")
    parser.add_argument("--rows", type=int, default=4, help="our rows per optimizer step")
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps per repetition")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each side")
    parser.add_argument(
        "--parts", type=numbers, default=[1, 2, 4], help="numbers of micro-batches tried for ours"
    )
    parser.add_argument(
        "--sizes", type=numbers, default=[1, 2, 4, 8], help="micro-batch sizes tried for peft"
    )
    parser.add_argument(
        "--threads", type=numbers, default=sorted({1, os.cpu_count() or 1}), help="tried for peft"
    )
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument(
        "--quick", action="store_true", help="a tiny model, to see that everything works"
    )
    parser.add_argument("--out", type=Path, help="write JSON")
    arguments = parser.parse_args()
    if arguments.quick:
        vars(arguments).update(
            length=256,
            rows=2,
            steps=2,
            repeats=1,
            parts=[1],
            sizes=[2],
            threads=[1],
            width=32,
            layers=1,
        )
    shape = {
        "vocab_size": 32_000,
        "hidden_size": arguments.width,
        "intermediate_size": arguments.width * 8 // 3,
        "num_hidden_layers": arguments.layers,
        "num_attention_heads": max(1, arguments.width // 64),
        "max_position_embeddings": 2048,
    }
    shape["num_key_value_heads"] = shape["num_attention_heads"]
    load = os.getloadavg()[0]
    layouts = lay_out(
        read_examples(arguments.data, arguments.length),
        arguments.length,
        arguments.rows,
        arguments.steps,
    )
    with tempfile.TemporaryDirectory() as folder:
        theirs = Side(open_theirs, Path(folder), shape)
        ours = Side(open_ours, Path(folder), arguments.length)
        results = [
            compare((ours, theirs), name, layouts, shape, arguments)
            for name in arguments.layouts.split(",")
        ]
        ours.close()
        theirs.close()
    speed = measure_products(shape, arguments.rows * arguments.length)
    print(f"one large product: {speed / 1e9:.0f} GFLOP/s")
    for result in results:
        least = result["flops"] / speed
        ours, theirs = map(statistics.median, result["seconds"])
        result["bound"] = theirs / least
        print(
            f"{result['layout']:9} products alone would take {least:.2f} s; ours took "
            f"{ours:.2f}, peft {theirs:.2f}: at most {result['bound']:.2f} x"
        )
    print(f"load {load:.1f} before, {os.getloadavg()[0]:.1f} after")
    if arguments.out:
        write_record(
            arguments.out,
            arguments,
            results=results,
            shape=shape,
            product_flops_per_second=speed,
            load=load,
        )
    return int(any(result["losses_apart"] > TOLERANCE for result in results))


if __name__ == "__main__":
    sys.exit(main())
