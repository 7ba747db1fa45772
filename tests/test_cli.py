"""Command lines: overrides are typed; a typo costs one line and exit code 2, never a traceback."""

import functools
import logging
import os
import re
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
from absl import flags

from crossin_jax import cli
from crossin_jax.checks import check
from crossin_jax.cli import call_config_file, define_config, load_config_file, run
from crossin_jax.config import UserError
from tests.architecture import PROGRAMS, find_modules

QUICKSTART = "configs/quickstart.py:x2x"


def run_program(*arguments: str, module: str = "crossin_jax.train") -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", module, *arguments], capture_output=True, text=True, timeout=120
    )


@pytest.fixture
def parse():
    """Parses a command line into a configuration, with flags of its own."""

    def parse(*arguments: str):
        values, argv = flags.FlagValues(), ["program", *arguments]
        config = define_config(argv, values)
        values(argv)
        return check(config())

    return parse


@pytest.mark.parametrize("value", ["xq.json", "xq.json,", "('xq.json',)", "['xq.json']"])
def test_a_sequence_of_one_may_have_a_comma_at_its_end(parse, value):
    config = parse(f"--config={QUICKSTART}", f"--config.evaluation.benchmarks={value}")
    assert tuple(config.evaluation.benchmarks) == ("xq.json",)


def test_a_text_with_a_comma_stays_a_text(parse):
    assert (
        parse(f"--config={QUICKSTART}", "--config.data.system=Be brief, please").data.system
        == "Be brief, please"
    )


def test_overrides_take_the_type_of_their_field(parse):
    config = parse(
        f"--config={QUICKSTART}",
        "--config.optim.learning_rate=1e-4",
        "--config.train.steps=7",
        "--config.data.languages=en,zh",
        "--config.evaluation.prompts=1,3",
        "--config.data.packing=false",
        "--config.optim.clip_norm=none",
        "--config.lora.rank=8",
        "--config.model.path=some/where",
    )
    assert (config.optim.learning_rate, config.train.steps, config.lora.rank) == (1e-4, 7, 8)
    assert (config.data.languages, config.evaluation.prompts) == (("en", "zh"), (1, 3))
    assert (config.data.packing, config.optim.clip_norm, config.model.path) == (
        False,
        None,
        "some/where",
    )


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--config.optim.learning_rat=1", "did you mean optim.learning_rate?"),
        ("--config.trian.steps=1", "did you mean train.steps?"),
        ("--config.lora.r=4", "did you mean lora.rank?"),
        ("--config.optim.lr=4", "did you mean optim.learning_rate?"),
        ("--config.lr=4", "did you mean optim.learning_rate?"),
        ("--config.train.eval_steps=4", "did you mean train.eval_every?"),
        ("--config.lora.rank.x=4", "no such setting"),
        ("--config.model.architecture.width=4", "model.architecture is None"),
        ("--config.lora.rank", "--config.lora.rank: no value"),
    ],
)
def test_unknown_settings_name_the_nearest(parse, argument, words):
    with pytest.raises(UserError, match=re.escape(words)):
        parse(f"--config={QUICKSTART}", argument)


@pytest.mark.parametrize("order", [1, -1])
def test_a_section_is_not_switched_off_and_set(parse, order):
    """Else the run would train all weights, and the rank that the user gave would have no
    effect.
    """
    arguments = ["--config.lora=none", "--config.lora.rank=4"][::order]
    with pytest.raises(UserError, match="lora=none contradicts --config.lora.rank=4"):
        parse(f"--config={QUICKSTART}", *arguments)
    config = parse(
        f"--config={QUICKSTART}", "--config.lora=none", "--config.model.frozen_dtype=float32"
    )
    assert config.lora is None


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("Lora(r=8)", "Lora.r is not a setting; did you mean Lora.rank?"),
        ("Optim(lr=1e-4)", "Optim.lr is not a setting; did you mean Optim.learning_rate?"),
        ("Train(max_steps=10)", "Train.max_steps is not a setting; did you mean Train.steps?"),
        ("setattr(Optim(), 'lr', 1)", "Optim.lr is not a setting"),
        ("Cell(nmae='a')", "Cell.nmae is not a setting; did you mean Cell.name?"),
    ],
)
def test_a_wrong_name_in_a_file_is_refused_at_its_line(tmp_path, line, words):
    file = tmp_path / "c.py"
    file.write_text(
        "from crossin_jax.config import *\ndef get_config():\n    return Config(name=\n        "
        f"{line})\n"
    )
    with pytest.raises(UserError, match=re.escape(words)) as error:
        load_config_file(str(file))
    assert str(error.value).startswith((f"--config={file}:4: ", f"--config={file}:3: "))


def test_a_configuration_that_fails_says_where(tmp_path):
    file = tmp_path / "broken.py"
    file.write_text("def get_config():\n    return 1 / 0\n")
    with pytest.raises(UserError, match=r"broken.py:2: ZeroDivisionError"):
        load_config_file(str(file))
    file.write_text("x = 1\n")
    with pytest.raises(UserError, match="defines no get_config"):
        load_config_file(str(file))


@pytest.mark.parametrize(
    ("written", "value"),
    [("none", None), ("None", None), ("NONE", None), ("0.5", 0.5), ("1e-3", 1e-3), ("2", 2.0)],
)
def test_a_setting_can_be_switched_off(parse, written, value):
    """none, however it is spelt, is no value; a later flag does not lose the others."""
    config = parse(
        f"--config={QUICKSTART}",
        f"--config.optim.clip_norm={written}",
        "--config.optim.weight_decay=0.25",
        "-config.seed=7",
    )
    assert (config.optim.clip_norm, config.optim.weight_decay, config.seed) == (value, 0.25, 7)


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("en,zh", ("en", "zh")),
        ("('en','zh')", ("en", "zh")),
        ("en, zh", ("en", "zh")),
        ("('en',)", ("en",)),
        ("en,zh,", ("en", "zh")),
        ("['en', 'zh']", ("en", "zh")),
        ("", ()),
    ],
)
@pytest.mark.parametrize("is_apart", [False, True])
def test_lists_are_written_with_commas(parse, written, value, is_apart):
    """Words need no quotes; the value may follow the flag after "=" or after a space."""
    flag = "--config.evaluation.languages"
    words = (flag, written) if is_apart else (f"{flag}={written}",)
    config = parse(f"--config={QUICKSTART}", *words)
    assert tuple(config.evaluation.languages) == value


def test_a_path_with_braces_is_one_entry(parse):
    config = parse(f"--config={QUICKSTART}", "--config.evaluation.benchmarks=a/xq_{lang}[1].json")
    assert config.evaluation.benchmarks == ("a/xq_{lang}[1].json",)


def test_the_file_can_be_named_in_two_ways_and_gets_the_variant(parse, tmp_path):
    """--config FILE and --config=FILE; what stands after the colon goes to get_config."""
    file = tmp_path / "c.py"
    file.write_text(
        "from crossin_jax.config import *\ndef get_config(name='plain'):\n"
        "    return Config(name=name or 'empty', model=Model(path='m'))\n"
    )
    for words in ((f"--config={file}",), ("--config", str(file)), ("-config", str(file))):
        assert parse(*words).name == "plain"
    for words in ((f"--config={file}:other",), ("--config", f"{file}:other", "--config.seed=3")):
        assert parse(*words).name == "other"
    assert parse(f"--config={file}:").name == "empty"


def test_a_function_of_a_file_gets_its_options(tmp_path):
    """The text after the colon first, then the options by name; an error of the user says where it
    was raised.
    """
    file = tmp_path / "c.py"
    file.write_text(
        "def get_study(part='all', seeds=()):\n    return part, seeds\n"
        "def broken():\n    from crossin_jax.config import UserError\n"
        "    raise UserError('set it')\n"
    )
    assert call_config_file(str(file), "get_study") == ("all", ())
    assert call_config_file(f"{file}:half", "get_study", seeds=(1, 2)) == ("half", (1, 2))
    with pytest.raises(UserError, match=rf"^--config={file}:5: set it$"):
        call_config_file(str(file), "broken")
    with pytest.raises(UserError, match="not a Python file; it must end in .py"):
        (tmp_path / "c.txt").write_text("")
        call_config_file(str(tmp_path / "c.txt"), "get_study")


def end(fault: BaseException | int | None):
    """A program that ends so."""

    def main(_):
        if isinstance(fault, BaseException):
            raise fault
        return fault

    return main


ENDS = [  # (how main ends, exit code, what is said)
    (None, 0, ""),
    (0, 0, ""),
    (1, 1, ""),
    (75, 75, ""),
    (SystemExit(75), 75, ""),
    (UserError("a.b=1: too low; use 2"), 2, "error: a.b=1: too low; use 2\n"),
    (KeyboardInterrupt(), 130, "stopped by the keyboard\n"),
    (
        OSError(28, "No space left on device", "/data/x"),
        2,
        "error: /data/x: No space left on device\n",
    ),
    (OSError(28, "No space left on device"), 2, "error: output: No space left on device\n"),
]


@pytest.mark.parametrize(("fault", "code", "words"), ENDS)
def test_a_program_ends_with_a_code_that_scripts_can_go_by(fault, code, words, monkeypatch, capsys):
    """0 for success, 2 for what the user can mend, 130 where the keyboard stopped it."""
    monkeypatch.setattr(sys, "argv", ["program"])
    with pytest.raises(SystemExit) as stop:
        run(end(fault), takes_config=False)
    assert stop.value.code == code and capsys.readouterr().err == words


@pytest.mark.parametrize("before", ["pass", "logging.basicConfig()"])
def test_a_warning_has_no_name_of_a_logger(before):
    """What a user reads is the message, also after an import has set up logging as Orbax does."""
    code = f"import logging; {before}; from crossin_jax import cli; "
    code += "cli.run(lambda _: logging.warning('%s is old', 'x'), takes_config=False)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr == "WARNING: x is old\n"


@pytest.mark.parametrize(
    "fault", [RuntimeError("ours"), OSError("no errno: ours"), AssertionError()]
)
def test_a_fault_of_ours_keeps_its_traceback(fault, monkeypatch):
    """It is not told as if the user could mend it."""
    monkeypatch.setattr(sys, "argv", ["program"])
    with pytest.raises(type(fault)):
        run(end(fault), takes_config=False)


@pytest.mark.parametrize("word", ["left", "-x", "--unknown=1"])
def test_what_no_flag_takes_is_refused(word, monkeypatch, capsys):
    """Before anything runs."""
    monkeypatch.setattr(sys, "argv", ["program", word])
    with pytest.raises(SystemExit) as stop:
        run(end(RuntimeError("it ran")), takes_config=False)
    assert stop.value.code == 2 and word.lstrip("-").split("=")[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "--config=FILE.py is missing"),
        (("--confg", "tests/configs/tiny.py"), "--confg: no such flag; did you mean --config?"),
        (("--config.seed=1",), "--config=FILE.py is missing"),
        (("--config", "nowhere.py"), "nowhere.py: no such file"),
        (("--config", "configs/quickstart.py:x2y"), "choose pretrain or one of english, x2x"),
        (("--config", QUICKSTART, "--config.train.steps=many"), "train.steps=many"),
        (("--config", QUICKSTART, "--confog.x=1"), "confog"),
        (
            ("--config", QUICKSTART, "--steps=3"),
            "--steps: no such flag; did you mean --config.train.steps?",
        ),
        (
            ("--config", QUICKSTART, "--lr", "1e-4"),
            "--lr: no such flag; did you mean --config.optim.learning_rate?",
        ),
        (
            ("--config", QUICKSTART, "--languages=fr"),
            "did you mean --config.data.languages or --config.evaluation.languages?",
        ),
        (("--config", QUICKSTART, "--resum"), "--resum: no such flag; did you mean --resume?"),
        (("--config", QUICKSTART, "--zzz"), "--zzz: no such flag; --help lists the flags"),
        (
            ("--config", QUICKSTART, "--profile_steps=12,10"),
            "--profile_steps=12,10: give two steps",
        ),
        (("--config", QUICKSTART, "extra"), "unexpected argument 'extra'"),
        (("--config", QUICKSTART, "--config=other.py"), "--config is given twice"),
        (("--config", QUICKSTART, "--config.data.components=1"), "it takes tuple[Component, ...]"),
        (("--config", QUICKSTART, "--config.output_dir=/proc/x"), "/proc/x"),
        (("--config", QUICKSTART, "--config.model.path=/no/where"), "/no/where: no such folder"),
    ],
)
def test_user_errors_are_short_and_exit_with_2(arguments, words):
    done = run_program(*arguments)
    assert done.returncode == 2, done.stderr
    assert words in done.stderr and "Traceback" not in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.strip()]) <= 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "--config=FILE.py or --checkpoint=RUN is missing"),
        (("--checkpoint",), "--config=FILE.py or --checkpoint=RUN is missing"),
        (("--chekpoint=run",), "--chekpoint: no such flag; did you mean --checkpoint?"),
        (("--confg=x.py",), "--confg: no such flag; did you mean --config?"),
        (("--checkpoint=/no/where",), "/no/where: no such run"),
    ],
)
def test_a_run_may_serve_in_place_of_a_configuration(words, message):
    """Where neither is named, the message names both, or the one that was mistyped."""

    def read_run(path):
        raise UserError(f"{path}: no such run")

    with pytest.raises(UserError, match=re.escape(message)):
        define_config(["program", *words], flags.FlagValues(), ("checkpoint", read_run))


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("flag --out=None: Flag --out must have a value other than None.", "--out is missing; "),
        (
            "flag --a.b=ten: invalid literal for int() with base 10: 'ten'",
            "--a.b=ten: give a ",
        ),
        ("flag --a.b=x: could not convert string to float: 'x'", "--a.b=x: give a number\n"),
        ("flag --a=7: ('Non-boolean argument to boolean flag', '7')", "--a=7: give true or false"),
    ],
)
def test_what_absl_says_of_a_flag_is_said_in_words(fault, words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["program"])
    with pytest.raises(SystemExit, match="2"):
        run(end(flags.Error(fault)), takes_config=False)
    assert capsys.readouterr().err.startswith(f"error: {words}")


def test_help_lists_every_setting():
    done = run_program("--help")
    assert done.returncode == 0
    assert "--config.optim.learning_rate  peak learning rate (default: 0.0002)" in done.stdout
    assert "--coordinator  host:port of process 0" in done.stdout


def test_the_tpu_library_of_plan_is_silent_where_there_is_no_tpu():
    pytest.importorskip("libtpu")
    code = (
        "import jax; from crossin_jax import cli;"
        "cli.run(lambda flags: print(jax.devices()[0].platform), takes_config=False)"
    )
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "TPU_"))
    }
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment
    )
    assert run.returncode == 0 and run.stdout.strip()
    assert "TPU" not in run.stderr and "libtpu" not in run.stderr


def test_the_package_lists_its_programs():
    """Each with a line of its own, and every program that there is."""
    done = run_program(module="crossin_jax")
    listed = re.findall(r"^  python -m crossin_jax\.(\w+) +\w.{20,80}[.?]$", done.stdout, re.M)
    programs = {name for name in PROGRAMS if not name.startswith("__")}
    programs |= {
        name.removesuffix(".__main__")
        for name in find_modules()
        if "." in name and name.endswith("__main__")
    }
    assert done.returncode == 0 and len(listed) == len(programs) and set(listed) == programs
    for word, hint in (("trian", "did you mean train?"), ("train", "python -m crossin_jax.train")):
        done = run_program(word, module="crossin_jax")
        assert done.returncode == 2 and hint in done.stderr and "Traceback" not in done.stderr


def test_completion_finds_load_model_and_importing_the_package_is_cheap():
    code = (
        "import sys, crossin_jax; assert {'load_model', '__version__'} <= set(dir(crossin_jax)); "
        "assert not {'jax', 'numpy', 'transformers'} & set(sys.modules), 'heavy imports'; "
        "assert callable(crossin_jax.load_model) and 'jax' in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("installed", [(), ("xla_cuda13",)])
@pytest.mark.parametrize(
    ("names", "words"),
    [
        ("cuda", "pip install 'crossin_jax[cuda]'"),
        ("gpu,cpu", "pip install 'crossin_jax[cuda]'"),
        ("cdua", "did you mean cuda?"),
        ("cpu, CPU", None),
        ("", None),
    ],
)
def test_a_platform_without_its_plugin_is_refused_with_what_to_install(
    names, words, installed, monkeypatch
):
    plugins = [type("Plugin", (), {"name": name}) for name in installed]
    monkeypatch.setattr(cli, "entry_points", lambda group: plugins)
    if words is None or installed and "cdua" not in names:
        cli.check_platforms(names)
    else:
        with pytest.raises(UserError, match=re.escape(words)):
            cli.check_platforms(names)


def test_a_platform_without_a_device_ends_in_two_lines(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["program"])
    fault = RuntimeError(
        "Unable to initialize backend 'tpu': NOT_FOUND: no device (set JAX_PLATFORMS='' to choose)"
    )
    with pytest.raises(SystemExit) as stop:
        run(end(fault), takes_config=False)
    assert stop.value.code == 2
    assert capsys.readouterr().err == (
        "error: Unable to initialize backend 'tpu': NOT_FOUND: no device\n"
        "unset JAX_PLATFORMS, or set it to what this machine has, e.g. cpu\n"
    )


def test_the_environment_is_looked_at_before_anything_is_loaded():
    done = subprocess.run(
        [sys.executable, "-m", "crossin_jax.generate", "--model", "/no/where", "--prompt", "a"],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"JAX_PLATFORMS": "no_such_platform"},
    )
    assert done.returncode == 2 and "JAX_PLATFORMS=no_such_platform" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("path", "has_traceback", "is_shown"),
    [
        ("/x/orbax/checkpoint/futures.py", True, False),
        ("/x/orbax/checkpoint/futures.py", False, True),
        ("/x/jax/compiler.py", True, True),
    ],
)
def test_what_a_thread_of_orbax_raises_is_reported_once(path, has_traceback, is_shown):
    """As an error of one to three lines, without the thread's own traceback."""
    trace = (ValueError, ValueError("full"), None) if has_traceback else None
    record = logging.LogRecord("absl", logging.ERROR, path, 1, "raised", (), trace)
    assert cli.is_news(record) == is_shown


@pytest.mark.parametrize(
    ("words", "in_thread", "is_shown"),
    [
        ("Event loop is closed", True, False),
        ("Event loop is closed", False, True),
        ("cannot reshape", True, True),
    ],
)
def test_an_event_loop_that_a_failed_save_has_closed_is_not_reported(
    words, in_thread, is_shown, monkeypatch
):
    """The failure itself is reported, in at most three lines."""
    shown = []
    monkeypatch.setattr(sys, "__unraisablehook__", shown.append)
    call = functools.partial(cli.report, SimpleNamespace(exc_value=RuntimeError(words)))
    if in_thread:
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
    else:
        call()
    assert len(shown) == is_shown
