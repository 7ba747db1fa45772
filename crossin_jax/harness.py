"""Run EleutherAI's lm-evaluation-harness with our engine as one of its models.

  pip install lm_eval
  python -m crossin_jax.harness run --model crossin_jax \\
      --model_args pretrained=models/mine --tasks belebele
  python -m crossin_jax.harness run --model crossin_jax \\
      --model_args pretrained=runs/mine --tasks mine --include_path .

model_args: pretrained (a folder, a Hub id, an adapter or a run), adapter, tokenizer, dtype,
max_length, max_gen_toks.
"""

import sys

from crossin_jax import cli
from crossin_jax.config import UserError


def main() -> None:
    """Runs the harness's program."""
    try:
        from lm_eval.__main__ import cli_evaluate

        import crossin_jax.evaluation.harness  # noqa: F401 - registers the model
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "lm_eval":
            raise
        cli.fail("lm_eval is not installed: pip install lm_eval")
    try:
        cli_evaluate()
    except UserError as error:
        cli.fail(str(error))


if __name__ == "__main__":
    sys.exit(main())
