"""Prepare data: build, preview, audit and translate a mixture.

  python -m crossin_jax.prepare build       --config FILE [--out DIR] [--file_format jsonl]
  python -m crossin_jax.prepare preview     --config FILE [-n 5] [--html PAGE]
  python -m crossin_jax.prepare audit       --config FILE [--out DIR] [--format csv]
  python -m crossin_jax.prepare translate   --config FILE [--command CMD] [--out FILE]
  python -m crossin_jax.prepare cross_xquad --config FILE [--out FILE]

build writes the mixture. preview shows what is learned, token by token. audit reports languages,
lengths and leakage. translate fills missing languages. cross_xquad makes a benchmark from XQuAD.
"""

import sys

from absl import flags

from crossin_jax import cli
from crossin_jax.config import hint
from crossin_jax.prepare.commands import COMMANDS
from crossin_jax.tables import FORMAT_FLAG

FILE_FORMATS = ("parquet", "jsonl")


def define_flags() -> None:
    """Flags beside --config."""
    flags.DEFINE_string("out", None, "folder or file to write; by default inside output_dir")
    flags.DEFINE_enum(*FORMAT_FLAG)
    flags.DEFINE_enum("file_format", FILE_FORMATS[0], FILE_FORMATS, "file format of build")
    flags.DEFINE_integer("n", 5, "examples in preview", lower_bound=1)
    flags.DEFINE_string("html", None, "HTML page that preview writes")
    flags.DEFINE_string(
        "source", None, "source that translate and cross_xquad read; needed where there are several"
    )
    flags.DEFINE_string(
        "command", None, "shell command that translates; without it the configured model does"
    )
    flags.DEFINE_integer(
        "max_new_tokens", 512, "longest translation of a text, tokens", lower_bound=1
    )


def rename_flag(word: str) -> str:
    """--format of a command line that asks `build` for a file format, as --file_format: so the flag
    was named before tables had formats.
    """
    name, equals, value = word.lstrip("-").partition("=")
    return f"--file_format{equals}{value}" if word[:1] == "-" and name == "format" else word


def main() -> None:
    """Takes the command's name off the command line and runs it."""
    name = sys.argv.pop(1) if len(sys.argv) > 1 and not sys.argv[1].startswith("-") else None
    if name is None and not {"-h", "--help", "-help"} & set(sys.argv):
        cli.fail(f"name a command: {', '.join(COMMANDS)}")
    if name is not None and name not in COMMANDS:
        names = ", ".join(COMMANDS)
        cli.fail(f"{name!r} is not a command of prepare{hint(name, COMMANDS)}; commands: {names}")
    if name == "build" and cli.flag_value(sys.argv, "format") in FILE_FORMATS:
        sys.argv[:] = map(rename_flag, sys.argv)
    cli.run(COMMANDS.get(name), define=define_flags)


if __name__ == "__main__":
    main()
