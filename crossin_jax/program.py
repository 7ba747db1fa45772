"""How every program starts: flags, configuration, and errors that a user can act on."""

import dataclasses
import functools
import glob
import importlib.util
import logging
import os
import sys
import traceback
import typing
from collections.abc import Callable
from typing import Any

from absl import flags
from ml_collections import config_flags

from crossin_jax.checks import check
from crossin_jax.config import Config, UserError, hint, iterate_fields

EXIT_USER_ERROR = 2


def run(main: Callable[..., int | None], *, define: Callable[[], None] | None = None, takes_config: bool = True,
        run_flag: tuple[str, Callable[[str], Config]] | None = None) -> None:
    """Parses the command line, calls `main(config, FLAGS)` or `main(FLAGS)`, and exits.

    `run_flag` is the flag that names a run, and what reads the run's configuration: it serves where --config is absent.
    A `UserError` or a fault in a flag prints one to three lines and exits with 2; anything else is our fault and keeps
    its traceback.
    """
    argv = sys.argv
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax warns of what is as intended
    # set by JAX where it finds no chips, but on Kubernetes also where there are some
    if os.environ.get("TPU_SKIP_MDS_QUERY") and not glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*"):
        from crossin_jax.parallel.topology import stand_in_for_tpus
        stand_in_for_tpus()  # no TPU, but libtpu may be here for `plan`
    if define:
        define()
    if {"-h", "--help", "-help"} & set(argv[1:]):
        print(_help(takes_config))
        sys.exit(0)
    try:
        config = define_config(argv, run_flag=run_flag) if takes_config else None
        rest = flags.FLAGS(argv)[1:]
        if rest:
            raise UserError(f"unexpected argument {rest[0]!r}; flags start with --")
        arguments = (check(config()), flags.FLAGS) if takes_config else (flags.FLAGS,)
        sys.exit(main(*arguments) or 0)
    except (UserError, flags.Error) as error:
        fail(str(error))
    except KeyboardInterrupt:
        print("stopped by the keyboard", file=sys.stderr)
        sys.exit(130)
    except OSError as error:  # a full disk or an unwritable folder; the path is in the message
        if error.filename is None and error.errno is None:
            raise
        fail(f"{error.filename or 'output'}: {os.strerror(error.errno) if error.errno else error}")


def fail(message: str) -> None:
    """Prints a user error and exits with 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(EXIT_USER_ERROR)


def load_config_file(path: str) -> Any:
    """The value of `get_config()` in a file; `FILE.py:variant` passes the variant to it."""
    return call_config_file(path, "get_config")


def call_config_file(path: str, function: str, **options: Any) -> Any:
    """Loads a configuration file and calls one of its functions, with the text after the colon as argument if any."""
    file, colon, variant = path.partition(":")
    if not os.path.isfile(file):
        raise UserError(f"--config={file}: no such file; pass a Python file with {function}()")
    spec = importlib.util.spec_from_file_location("crossin_jax_config", file)
    if spec is None or spec.loader is None:
        raise UserError(f"--config={file}: not a Python file; it must end in .py and define {function}()")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if not hasattr(module, function):
            raise UserError(f"--config={file} defines no {function}()")
        return getattr(module, function)(*([variant] if colon else []), **options)
    except UserError:
        raise
    except Exception as error:
        lines = [entry for entry in traceback.extract_tb(error.__traceback__) if entry.filename == file]
        line = f":{lines[-1].lineno}" if lines else ""
        raise UserError(f"--config={file}{line}: {type(error).__name__}: {error}") from error


def define_config(argv: list[str], flag_values: flags.FlagValues = flags.FLAGS,
                  run_flag: tuple[str, Callable[[str], Config]] | None = None) -> Callable[[], Config]:
    """Registers `--config` with its overrides; returns a function that yields the configuration after parsing.

    The file named by `--config` is loaded here, so that `--config.field=value` is typed by the field it overrides.
    """
    path = flag_value(argv, "config")
    named = flag_value(argv, run_flag[0]) if run_flag and path is None else None
    config = run_flag[1](named) if named is not None else None
    if sum(argument.partition("=")[0] in ("--config", "-config") for argument in argv) > 1:
        raise UserError("--config is given twice; one run has one file")
    if path is None and config is None:
        flags_that_serve = ["--config", *([f"--{run_flag[0]}"] if run_flag else [])]
        for flag in (argument.partition("=")[0] for argument in argv[1:] if argument.startswith("--")):
            if "." not in flag and flag not in flags_that_serve and (near := hint(flag, flags_that_serve)):
                raise UserError(f"{flag}: no such flag{near}")
        or_run = f" or --{run_flag[0]}=RUN" if run_flag else ""
        raise UserError(f"--config=FILE.py{or_run} is missing; see configs/ for examples")
    config = config or load_config_file(path)
    if not isinstance(config, Config):
        raise UserError(f"--config={path}: get_config() returns {type(config).__name__}, not crossin_jax.config.Config")
    known = {name: field for name, _, field in iterate_fields(config)}
    switched_off = []
    for i, argument in enumerate(argv):
        key, _, value = argument.partition("=")
        if key.startswith(("--config.", "-config.")):
            name = key.lstrip("-").removeprefix("config.")
            if name not in known and not _is_section(config, name):
                raise UserError(f"--config.{name}: no such setting{hint(name, known)}")
            if value.lower() == "none":
                switched_off.append((name, argument))
            elif name in known and _takes_tuple(known[name]) and not any(bracket in value for bracket in "([{"):
                argv[i] = f"{key}=({','.join(map(_literal, value.removesuffix(',').split(',')))},)"
    argv[:] = [a for a in _without_flag(argv, "config") if a not in [argument for _, argument in switched_off]]
    holder = config_flags.DEFINE_config_dataclass("config", config, sys_argv=argv, flag_values=flag_values)

    def resolve() -> Config:
        for name, _ in switched_off:
            *parents, last = name.split(".")
            setattr(functools.reduce(getattr, parents, holder.value), last, None)
        return holder.value

    return resolve


def _takes_tuple(field: dataclasses.Field) -> bool:
    """Whether a setting is a sequence, for which a,b,c and a, are short forms."""
    return typing.get_origin(field.type) is tuple


def _literal(text: str) -> str:
    try:
        return repr(int(text))
    except ValueError:
        return repr(text.strip("'\" "))


def _is_section(config: Any, name: str) -> bool:
    for part in name.split("."):
        if not dataclasses.is_dataclass(config) or not hasattr(config, part):
            return False
        config = getattr(config, part)
    return True


def flag_value(argv: list[str], name: str) -> str | None:
    """What the command line gives a flag, before flags are parsed; None where it is absent."""
    for i, argument in enumerate(argv):
        key, equals, value = argument.partition("=")
        if key.lstrip("-") == name and key.startswith("-"):
            return value if equals else argv[i + 1] if i + 1 < len(argv) else None
    return None


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
        lines.append(f"  --{flag.name}  {flag.help} (default: {flag.default})")
    if takes_config:
        lines += ["  --config=FILE.py[:VARIANT]  experiment; every setting can be overridden:"]
        for name, value, field in iterate_fields(Config()):
            lines.append(f"  --config.{name}  {field.metadata['doc']} (default: {value})")
    return "\n".join(lines)
