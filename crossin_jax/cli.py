"""How every program starts: flags, configuration, and errors that a user can act on."""

import dataclasses
import functools
import glob
import importlib.util
import logging
import os
import re
import sys
import threading
import traceback
import typing
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any

from absl import flags
from ml_collections import config_flags

from crossin_jax import process
from crossin_jax.checks import check
from crossin_jax.config import (
    Config,
    Lora,
    UserError,
    hint,
    iterate_fields,
)
from crossin_jax.paths import explain
from crossin_jax.settings import OTHER_NAMES, hint_setting, redact, shorten

EXIT_USER_ERROR = 2
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE: the reader of the output has ended, as with `| head`
# What absl says of a flag, and what we say
FLAG_FAULTS = {
    r"flag --(\w+)=None: Flag --\1 must have.*": r"--\1 is missing; --help lists the flags",
    r"flag (--.*): invalid literal for int\(\).*": r"\1: give a whole number",
    r"flag (--.*): could not convert string to float.*": r"\1: give a number",
    r"flag (--.*): \('Non-boolean argument.*": r"\1: give true or false",
}


def run(
    main: Callable[..., int | None],
    *,
    define: Callable[[], None] | None = None,
    takes_config: bool = True,
    run_flag: tuple[str, Callable[[str], Config]] | None = None,
) -> None:
    """Parses the command line, calls `main(config, FLAGS)` or `main(FLAGS)`, and exits.

    `run_flag` is the flag that names a run, and what reads the run's configuration: it serves where
    --config is absent. A `UserError` or a fault in a flag prints one to three lines and exits with
    2; anything else is our fault and keeps its traceback. docs/reliability.md lists all exit codes.
    """
    process.listen()
    try:
        _run(main, define, takes_config, run_flag)
    except BrokenPipeError:
        silence()
        sys.exit(EXIT_BROKEN_PIPE)
    finally:
        process.wait_if_leaving()


def _run(
    main: Callable[..., int | None],
    define: Callable[[], None] | None,
    takes_config: bool,
    run_flag: tuple[str, Callable[[str], Config]] | None,
) -> None:
    argv = sys.argv
    logging.basicConfig()
    for handler in logging.root.handlers:
        if type(handler) is logging.StreamHandler:  # ours, or one that an import has made
            handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    logger = logging.getLogger("absl")
    logger.setLevel(logging.ERROR)  # hides warnings of Orbax about behaviour that we rely on
    logger.addFilter(is_news)
    sys.unraisablehook = report
    # JAX sets it where it finds no chips, and on Kubernetes even where there are some.
    if os.environ.get("TPU_SKIP_MDS_QUERY") and not glob.glob("/dev/accel*") + glob.glob(
        "/dev/vfio/[0-9]*"
    ):
        set_libtpu_env()  # no TPU, but libtpu may be here for `plan`
    if define:
        define()
    if {"-h", "--help", "-help"} & set(argv[1:]):
        print(_help(takes_config), flush=True)
        sys.exit(0)
    try:
        check_platforms(os.environ.get("JAX_PLATFORMS", ""))
        config = define_config(argv, run_flag=run_flag) if takes_config else None
        rest = flags.FLAGS(argv)[1:]
        if rest:
            raise UserError(f"unexpected argument {rest[0]!r}; flags start with --")
        arguments = (check(config()), flags.FLAGS) if takes_config else (flags.FLAGS,)
        code = main(*arguments) or 0
        print(end="", flush=True)  # a full disk raises here, and not during the exit
        sys.exit(code)
    except flags.UnrecognizedFlagError as error:
        fail(describe_unknown_flag(error.flagname, takes_config))
    except UserError as error:
        fail(str(error))
    except flags.Error as error:
        text = str(error)
        for theirs, ours in FLAG_FAULTS.items():
            text = re.sub(theirs, ours, text)
        fail(text)
    except KeyboardInterrupt:
        print("stopped by the keyboard", file=sys.stderr)
        sys.exit(process.EXIT_INTERRUPTED)
    except RuntimeError as error:
        # JAX has no type of its own for a platform that is named and has no device.
        if not str(error).startswith("Unable to initialize backend"):
            raise
        reason = str(error).partition(" (set JAX_PLATFORMS")[0]
        fail(f"{reason}\nunset JAX_PLATFORMS, or set it to what this machine has, e.g. cpu")
    except BrokenPipeError:
        raise
    except OSError as error:  # a full disk or an unwritable folder; the path is in the message
        if error.filename is None and error.errno is None:
            raise
        silence(1)
        fail(f"{error.filename or 'output'}: {error.strerror or error}")
    except Exception as error:
        if (reason := explain(error)) is None:
            raise
        fail(f"a bucket could not be read or written: {reason}")


def is_news(record: logging.LogRecord) -> bool:
    """False for tracebacks that Orbax's threads log: the main thread reports the same error."""
    return not (record.exc_info and "orbax" in record.pathname)


def report(ignored: Any) -> None:
    """Python's report of an error that it can raise nowhere, for `sys.unraisablehook`.

    Where one file of a checkpoint cannot be written, Orbax's event loop ends, and TensorStore's
    threads fail to tell it of the other files. That is no news: the main thread reports the first.
    """
    is_known = str(ignored.exc_value) == "Event loop is closed"
    if not is_known or threading.current_thread() is threading.main_thread():
        sys.__unraisablehook__(ignored)


def describe_unknown_flag(name: str, takes_config: bool) -> str:
    """The message about a flag that the program does not have. A setting is named in full: "steps"
    and "lr" are --config.train.steps and --config.optim.learning_rate.
    """
    settings = [name for name, _, _ in iterate_fields(Config(lora=Lora()))] if takes_config else []
    wanted = {name, OTHER_NAMES.get(name)}
    meant = [f"--config.{path}" for path in settings if path.rpartition(".")[2] in wanted]
    own = [f"--{flag.name}" for flag in flags.FLAGS.get_flags_for_module("__main__")]
    near = hint(f"--{name}", own) or "; --help lists the flags"
    return f"--{name}: no such flag" + (f"; did you mean {' or '.join(meant)}?" if meant else near)


def check_platforms(names: str) -> None:
    """Refuses a value of JAX_PLATFORMS that names a platform whose plugin is not installed.

    JAX itself ends with an AssertionError there, after many imports.
    """
    installed = {"cpu"} | ({"tpu"} if importlib.util.find_spec("libtpu") else set())
    plugins = " ".join(plugin.name for plugin in entry_points(group="jax_plugins"))
    installed |= {name for name in ("cuda", "rocm") if name in plugins} | set(plugins.split())
    installed |= {"gpu"} if {"cuda", "rocm"} & installed else set()
    extras = {"cuda": "cuda", "gpu": "cuda", "tpu": "tpu"}
    for name in filter(None, names.lower().replace(" ", "").split(",")):
        if name in installed:
            continue
        known = sorted(installed | extras.keys())
        remedy = (
            f"pip install 'crossin_jax[{extras[name]}]'"
            if name in extras
            else f"there are {', '.join(known)}{hint(name, known)}"
        )
        raise UserError(
            f"JAX_PLATFORMS={names}: JAX has no plugin for {name!r} here; {remedy}, or unset "
            "JAX_PLATFORMS"
        )


def set_libtpu_env() -> None:
    """Sets what libtpu reads about its host when it is loaded; without it, libtpu prints a page of
    complaints.
    """
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # no questions to a metadata server that is not there
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")


def silence(*outputs: int) -> None:
    """Discards further output, which cannot be written, to standard output and standard error."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for output in outputs or (1, 2):
        os.dup2(nowhere, output)


def fail(message: str) -> None:
    """Prints a user error and exits with 2."""
    print(f"error: {shorten(redact(message))}", file=sys.stderr)
    sys.exit(EXIT_USER_ERROR)


def load_config_file(path: str) -> Any:
    """The value of `get_config()` in a file; `FILE.py:variant` passes the variant to it."""
    return call_config_file(path, "get_config")


def call_config_file(path: str, function: str, **options: Any) -> Any:
    """Loads a configuration file and calls one of its functions, with the text after the colon as
    argument if any.
    """
    file, colon, variant = path.partition(":")
    if not os.path.isfile(file):
        raise UserError(f"--config={file}: no such file; pass a Python file with {function}()")
    spec = importlib.util.spec_from_file_location("crossin_jax_config", file)
    if spec is None or spec.loader is None:
        raise UserError(
            f"--config={file}: not a Python file; it must end in .py and define {function}()"
        )
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if not hasattr(module, function):
            raise UserError(f"defines no {function}()")
        return getattr(module, function)(*([variant] if colon else []), **options)
    except Exception as error:
        lines = [
            entry for entry in traceback.extract_tb(error.__traceback__) if entry.filename == file
        ]
        line = f":{lines[-1].lineno}" if lines else ""
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        raise UserError(f"--config={file}{line}: {kind}{error}") from error


def define_config(
    argv: list[str],
    flag_values: flags.FlagValues = flags.FLAGS,
    run_flag: tuple[str, Callable[[str], Config]] | None = None,
) -> Callable[[], Config]:
    """Registers `--config` with its overrides; returns a function that yields the configuration
    after parsing.

    The file named by `--config` is loaded here, so that `--config.field=value` is typed by the
    field it overrides.
    """
    path = flag_value(argv, "config")
    named = flag_value(argv, run_flag[0]) if run_flag and path is None else None
    config = run_flag[1](named) if named is not None else None
    if sum(argument.partition("=")[0] in ("--config", "-config") for argument in argv) > 1:
        raise UserError("--config is given twice; one run has one file")
    if path is None and config is None:
        flags_that_serve = ["--config", *([f"--{run_flag[0]}"] if run_flag else [])]
        for flag in (
            argument.partition("=")[0] for argument in argv[1:] if argument.startswith("--")
        ):
            if (
                "." not in flag
                and flag not in flags_that_serve
                and (near := hint(flag, flags_that_serve))
            ):
                raise UserError(f"{flag}: no such flag{near}")
        or_run = f" or --{run_flag[0]}=RUN" if run_flag else ""
        raise UserError(f"--config=FILE.py{or_run} is missing; see configs/ for examples")
    config = config or load_config_file(path)
    if not isinstance(config, Config):
        raise UserError(
            f"--config={path}: get_config() returns {type(config).__name__}, not "
            "crossin_jax.config.Config"
        )
    switched_off = _prepare_overrides(argv, config)
    holder = config_flags.DEFINE_config_dataclass(
        "config", config, sys_argv=argv, flag_values=flag_values
    )

    def resolve() -> Config:
        for name in switched_off:
            *parents, last = name.split(".")
            setattr(functools.reduce(getattr, parents, holder.value), last, None)
        return holder.value

    return resolve


def _prepare_overrides(argv: list[str], config: Config) -> list[str]:
    """Checks the overrides in `argv` and brings them into a form that absl parses; --config itself
    is taken out.

    Returns the names that are switched off with none, which are taken out too: absl has no flag for
    "no section".
    """
    known = {name: field for name, _, field in iterate_fields(config)}
    given: dict[str, str] = {}
    rest = []
    words = iter(_without_flag(argv, "config"))
    for word in words:
        key, equals, value = word.partition("=")
        if not key.startswith(("--config.", "-config.")):
            rest.append(word)
            continue
        name = key.lstrip("-").removeprefix("config.")
        _check_name(config, name, list(known))
        if not equals and (name not in known or known[name].type is not bool):
            value = next(words, None)
            if value is None:
                raise UserError(f"--config.{name}: no value; write --config.{name}=VALUE")
            word = f"{key}={value}"
        given[name] = value
        if value.lower() == "none":
            continue
        # A sequence may be written as a,b,c or a, without brackets and quotes.
        is_tuple = name in known and typing.get_origin(known[name].type) is tuple
        if is_tuple and not value.lstrip().startswith(("(", "[")):
            entries = value.strip().removesuffix(",").split(",") if value.strip() else []
            word = f"{key}=({''.join(_literal(entry) + ',' for entry in entries)})"
        rest.append(word)
    argv[:] = rest
    switched_off = [name for name, value in given.items() if value.lower() == "none"]
    for name in switched_off:
        if inside := [other for other in given if other.startswith(f"{name}.")]:
            raise UserError(
                f"--config.{name}=none contradicts --config.{inside[0]}={given[inside[0]]}; "
                "leave one of them out"
            )
    return switched_off


def _check_name(config: Config, name: str, known: list[str]) -> None:
    """Raises `UserError` where an override names no setting, or one inside a section that is
    off.
    """
    value: Any = config
    parts = name.split(".")
    for i, part in enumerate(parts):
        if value is None and i:
            off = ".".join(parts[:i])
            raise UserError(
                f"--config.{name}: {off} is None in this configuration; set {off} in its file"
            )
        if not dataclasses.is_dataclass(value) or not hasattr(value, part):
            raise UserError(f"--config.{name}: no such setting{hint_setting(name, known)}")
        value = getattr(value, part)


def _literal(text: str) -> str:
    try:
        return repr(int(text))
    except ValueError:
        return repr(text.strip("'\" "))


def flag_value(argv: list[str], name: str) -> str | None:
    """What the command line gives a flag, before flags are parsed; None where it is absent."""
    for i, argument in enumerate(argv):
        key, equals, value = argument.partition("=")
        if key.lstrip("-") == name and key.startswith("-"):
            return value if equals else argv[i + 1] if i + 1 < len(argv) else None
    return None


def list_config_flags(argv: list[str]) -> list[str]:
    """The words of a command line that name and change the configuration, each as --config…=VALUE.

    `sys.orig_argv` has them all; parsing takes some out of `sys.argv`.
    """
    found = []
    for word, following in zip(argv, [*argv[1:], "--"], strict=True):
        key, equals, _ = word.partition("=")
        if key.startswith("-") and key.lstrip("-").partition(".")[0] == "config":
            has_value = not equals and not following.startswith("--")
            found.append(f"{word}={following}" if has_value else word)
    return found


def _without_flag(argv: list[str], name: str) -> list[str]:
    result, skip = [], False
    for argument in argv:
        key, equals, _ = argument.partition("=")
        if skip:
            skip = False
        elif key.startswith("-") and key.lstrip("-") == name:
            skip = not equals
        else:
            result.append(argument)
    return result


def _help(takes_config: bool) -> str:
    main = sys.modules["__main__"]
    lines = [(main.__doc__ or "").strip(), ""]
    for flag in flags.FLAGS.get_flags_for_module(main.__name__):
        text = " ".join((flag.help or "").split())
        is_known = flag.default in (None, "", []) or "default:" in text
        lines.append(f"  --{flag.name}  {text}{'' if is_known else f' (default: {flag.default})'}")
    if takes_config:
        lines += ["  --config=FILE.py[:VARIANT]  experiment; every setting can be overridden:"]
        for name, value, field in iterate_fields(Config()):
            lines.append(f"  --config.{name}  {field.metadata['doc']} (default: {value})")
    return "\n".join(lines)
