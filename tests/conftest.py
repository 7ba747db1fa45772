"""Stricter than production: eight simulated devices, no network, rank promotion raises."""

import os
import signal
import tempfile
from importlib.metadata import version
from pathlib import Path

WORKER = os.environ.get("PYTEST_XDIST_WORKER")
# A background job of a shell ignores Ctrl-C, and nohup a closed terminal. Programs that the tests
# start would inherit that, and the tests send them these signals.
for _number, _handler in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGHUP, signal.SIG_DFL),
):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _handler)
if WORKER is None:  # else what the first process set is inherited
    os.environ["JAX_PLATFORMS"] = "cpu"
    # Most of the suite's time is compilation of programs that run once: the compiler is told not to
    # try hard. scripts/test_real.sh asks for one device and quick programs.
    if os.environ.get("TEST_DEVICES", "8") == "8":
        os.environ["XLA_FLAGS"] = (
            "--xla_force_host_platform_device_count=8 --xla_llvm_disable_expensive_passes=true "
            "--xla_backend_optimization_level=0 " + os.environ.get("XLA_FLAGS", "")
        )
    # Later ones do not know the flag, and an unknown flag ends the process.
    if version("jaxlib").startswith("0.10."):
        # Eight devices share two cores: where another program takes those for 40 s, XLA would end
        # the process.
        os.environ["XLA_FLAGS"] = (
            os.environ.get("XLA_FLAGS", "") + " --xla_cpu_use_fusion_emitters=false"
            " --xla_cpu_collective_call_terminate_timeout_seconds=300"
        )
    # A program that two tests share is compiled once.
    _CACHE = tempfile.TemporaryDirectory(prefix="crossin_jax_tests_")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _CACHE.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["HF_DATASETS_OFFLINE"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
else:
    os.environ["JAX_COMPILATION_CACHE_DIR"] += (
        f"/{WORKER}"  # jax does not write its entries atomically
    )

import jax  # noqa: E402 - after the environment is set
import pytest  # noqa: E402 - as above

from crossin_jax import process  # noqa: E402 - as above

jax.config.update("jax_numpy_rank_promotion", "raise")

REPOSITORY = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(items: list) -> None:
    """Tests with the TPU compiler run last: where libtpu 0.0.52 is loaded, jax's profiler ends the
    process.
    """
    items.sort(key=lambda item: hasattr(item.module, "topology"))


@pytest.fixture(autouse=True)
def signals():
    """A program that a test calls in this process takes the signals; afterwards they are pytest's
    again.
    """
    yield
    process.unlisten()


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real benchmark rows, answers, tokenizers and parallel text, beside the repository; absent on
    users' machines.
    """
    folder = REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("real data folder ../shared/data is not beside this checkout")
    return folder


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory) -> Path:
    """A run of six uninterrupted steps, with the exported model in `model`."""
    from crossin_jax.export import export
    from crossin_jax.train import train
    from tests.helpers import config_in

    folder = train(config_in(tmp_path_factory.mktemp("tiny") / "whole"))
    export(folder, "hf", folder / "model")
    return folder


@pytest.fixture(scope="session")
def adapted(pretrained) -> Path:
    """A run of six uninterrupted LoRA steps with dropout on the pretrained model."""
    from crossin_jax.train import train
    from tests.helpers import config_in

    return train(config_in(pretrained.parent / "adapted", str(pretrained / "model")))


@pytest.fixture(scope="session")
def storage():
    """The proxy before a server of Google's storage, with the bucket "tests"; S3 runs beside it.

    One pair serves the session: gcsfs, s3fs and TensorStore keep the address that they saw first.
    """
    from tests.buckets import amazon_storage, google_storage

    with google_storage() as proxy, amazon_storage():
        yield proxy
