"""Commands that go wrong: one line on stderr, the right status, valid JSON or none, and nothing left behind.

All commands and options are found by asking typer, so a new one is tested without another line here.
"""

import contextlib
import dataclasses
import enum
import inspect
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
import typing
from pathlib import Path

import pytest
import typer
from safetensors.torch import save_file
from typer.testing import CliRunner

from swan import calibrate, cli, interrupts
from swan.cli.app import app
from swan.evaluation.texts import calibration_text, token_windows
from tests.tiny import save_with_words


@dataclasses.dataclass
class Parameter:
    """A parameter of a command, as its function declares it."""

    name: str
    type: type
    flag: str  # "" for an argument
    least: float | None
    is_needed: bool

    @property
    def is_switch(self):
        return self.type is bool


def parameters(function):
    for name, parameter in inspect.signature(function).parameters.items():
        hint, info = typing.get_args(parameter.annotation)[:2]
        inner = [t for t in typing.get_args(hint) if t is not type(None)]
        hint = inner[0] if inner else hint
        hint = typing.get_args(hint)[0] if typing.get_args(hint) else hint
        is_option = isinstance(info, typer.models.OptionInfo)
        flag = (info.param_decls or ["--" + name.replace("_", "-")])[0] if is_option else ""
        yield Parameter(name, hint, flag, info.min, parameter.default is parameter.empty)


def commands(group=app, path=()):
    """Every command of the program by its name in words, with its parameters."""
    for command in group.registered_commands:
        name = command.name or command.callback.__name__
        yield (*path, name), list(parameters(command.callback))
    for inner in group.registered_groups:
        yield from commands(inner.typer_instance, (*path, inner.name))


COMMANDS = dict(commands())
OPTIONS = [(path, option) for path, options in COMMANDS.items() for option in options if option.flag]
named = [pytest.param(p, id=" ".join(p)) for p, options in COMMANDS.items() if any(o.name == "model" for o in options)]


def arguments_of(path, model="no-model.gguf"):
    """The command with a value for each argument that it needs, and a model where that is an option."""
    given = list(path)
    for parameter in COMMANDS[path]:
        value = model if parameter.name == "model" else "Hello"
        given += [value] if not parameter.flag else ["--model", model] if parameter.name == "model" else []
    return given


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def assert_one_line(result, status, said=""):
    """One line on stderr; on stdout nothing but what a command says as it goes."""
    assert result.exit_code == status, (result.exit_code, result.output)
    assert result.stdout.strip().startswith(said) if said else result.stdout == ""
    lines = unannounced(result.stderr)
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr


def unannounced(text):
    """Lines on stderr beside those that announce work ("loading ... ...") and the dtype."""
    return [line for line in text.splitlines() if not line.startswith("dtype: ") and not line.endswith(" ...")]


def bad_values(option):
    """Values that an option does not take."""
    values = {int: ["x", "1.5", "", "9" * 5000], float: ["x", "1,5", ""]}.get(option.type, [])
    values = values + (["nonsense", ""] if issubclass(option.type, enum.Enum) else [])
    values += [str(option.least - 1), "-" + "9" * 30] if option.least is not None else []
    values += ["nan", "0", "-1", "1.01", "inf"] if "retention" in option.name else []
    values += ["much", "-1MiB", "0B", "1 parsec"] if option.name in ("memory", "budget") else []
    values += ["8x8", "0/0/0", "3/2/8", "8/8/1000", "1/1/-1"] if option.name == "shape" else []
    return values


def test_all_commands_are_found():
    assert len(COMMANDS) >= 11 and len(OPTIONS) > 80
    assert sum(len(bad_values(option)) for _, option in OPTIONS) > 150


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_bad_usage(path):
    """Nothing is loaded, and the status is 2, for every value that an option cannot have."""
    given = arguments_of(path)
    assert_one_line(invoke(*given, "--no-such-option"), 2)
    assert_one_line(invoke(*given, "one", "more", "argument"), 2)
    if any(parameter.is_needed for parameter in COMMANDS[path]):
        assert_one_line(invoke(*path), 2)  # an argument is missing
    for option in (parameter for parameter in COMMANDS[path] if parameter.flag):
        assert_one_line(invoke(*given, option.flag + "=1" if option.is_switch else option.flag), 2)
        for value in bad_values(option):
            assert_one_line(invoke(*given, f"{option.flag}={value}"), 2)


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_outputs_are_checked_before_anything_is_computed(path, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "swan-demo.png").mkdir()
    before = sorted(tmp_path.rglob("*"))
    bad = {"out": [tmp_path, tmp_path / "file" / "x"], "plot": [tmp_path, "/dev/null", tmp_path / "x.odd"]}
    for option in COMMANDS[path]:
        for value in bad.get(option.name, []):
            assert_one_line(invoke(*arguments_of(path), option.flag, value), 1)
    assert sorted(tmp_path.rglob("*")) == before and (tmp_path / "file").read_text() == "mine"


# Models that cannot be read ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Folder of a tiny model, and the file of its calibration."""
    folder = tmp_path_factory.mktemp("tiny")
    model, tokenizer = save_with_words(folder)
    windows = token_windows(
        calibration_text(), tokenizer, windows=1, length=60
    )  # no effects: after a backward pass no fork could run one
    calibrate(model, [windows], progress=False).save(folder / "calibration")
    return folder


def truncated(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


BROKEN = {
    "no folder": lambda folder: None,
    "an empty folder": lambda folder: [file.unlink() for file in folder.iterdir()],
    "half a config": lambda folder: truncated(folder / "config.json"),
    "a config of lists": lambda folder: (folder / "config.json").write_text("[" * 100_000),
    "a config that is none": lambda folder: (folder / "config.json").write_text("[]"),
    "another kind of model": lambda folder: (folder / "config.json").write_text('{"model_type": "[/bold]abacus"}'),
    "bytes that are no text": lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe\0"),
    "half of the weights": lambda folder: truncated(folder / "model.safetensors"),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "half a tokenizer": lambda folder: truncated(folder / "tokenizer.json"),
    "no tokenizer": lambda folder: [file.unlink() for file in folder.glob("tok*")],
}


def broken_model(tiny, how, tmp_path):
    folder = tmp_path / "model [/bold]"  # which looks like markup of rich
    if how != "no folder":
        folder.mkdir(parents=True)
        for file in tiny.iterdir():
            (os.link if file.suffix == ".safetensors" and "weights" not in how else copy)(file, folder / file.name)
        BROKEN[how](folder)
    return folder


def copy(source, target):
    target.write_bytes(source.read_bytes())


@pytest.mark.parametrize("how", BROKEN)
def test_models_that_cannot_be_read(tiny, how, tmp_path):
    result = invoke("generate", broken_model(tiny, how, tmp_path), "Hello", "--tokens", "1", "--dtype", "float32")
    assert_one_line(result, 1)
    assert "model [/bold]" in result.stderr and len(result.stderr) < 900


@pytest.mark.slow
@pytest.mark.parametrize("how", BROKEN)
@pytest.mark.parametrize("path", named)
def test_models_that_no_command_can_read(tiny, how, path, tmp_path):
    result = invoke(*arguments_of(path, broken_model(tiny, how, tmp_path)))
    if path == ("capacity",) and ("weights" in how or "tokenizer" in how):
        assert result.exit_code == 0, result.output  # it counts bytes, and reads the configuration alone
    else:
        assert_one_line(result, 1, "loading" if path == ("demo",) else "")


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF\3\0\0\0" + b"\xff" * 64, b"\0" * 1000])
def test_gguf_files_that_are_none(content, tmp_path):
    (tmp_path / "model.gguf").write_bytes(content)
    assert_one_line(invoke("generate", tmp_path / "model.gguf", "Hello", "--dtype", "float32"), 1)


@pytest.mark.parametrize("name", ["text.txt", "text.txt.gz", "short.txt"])
def test_texts_that_cannot_be_read(tiny, name, tmp_path):
    (tmp_path / name).write_bytes(b"too short" if name == "short.txt" else b"\x1f\x8b\xff\xff\xff")
    for command in ("calibrate", "evaluate"):
        out = ["--out", tmp_path / "new"] if command == "calibrate" else []
        assert_one_line(invoke(command, tiny, "--text", tmp_path / name, *out), 1)
    assert os.listdir(tmp_path) == [name]


def test_calibrations_that_cannot_be_read(tiny, tmp_path):
    save_file({}, tmp_path / "other")
    for file in (tmp_path, tmp_path / "nowhere", tmp_path / "other", tiny / "config.json"):
        assert_one_line(invoke("generate", tiny, "Hello", "--calibration", file), 1)


# Output ----------------------------------------------------------------------------------------------


def forked(*arguments, stdout=None, prepare=lambda: None, interrupt=None, folder):
    """Run the program in a fork of this process, which has imported it already.

    Returns:
        Its status, what it wrote to stdout (where that is not given) and stderr, and what it left in `folder`.
    """
    out, err = folder / "stdout", folder / "stderr"
    scratch = folder / "scratch"
    scratch.mkdir(exist_ok=True)
    child = os.fork()
    if child == 0:
        status = 99
        with contextlib.suppress(BaseException):
            for number, file in ((1, stdout or out), (2, err)):
                target = file if isinstance(file, int) else os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(target, number)
            sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
            sys.argv = ["swan", *map(str, arguments)]
            os.environ["TMPDIR"] = str(scratch)
            interrupts.during_imports()  # as it is in a process of its own
            prepare()
            try:
                cli.main()
            except SystemExit as error:
                status = error.code or 0
            except KeyboardInterrupt:
                sys.excepthook(*sys.exc_info())
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
        os._exit(status)
    if interrupt is not None:
        time.sleep(interrupt)
        os.kill(child, signal.SIGINT)
    _, wait = os.waitpid(child, 0)
    written = out.read_text() if out.exists() else ""
    return os.waitstatus_to_exitcode(wait), written, err.read_text(), os.listdir(scratch)


GENERATE = ("Hello", "--tokens", "3", "--dtype", "float32", "--calibration")


def closed_pipe():
    reader, writer = os.pipe()
    os.close(reader)
    return writer


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["bench", "--help"], ["info"], ["info", "--json"], ["generate"], ["generate", "--json"]],
    ids=" ".join,
)
def test_a_closed_pipe(arguments, tiny, tmp_path):
    if arguments[0] == "generate":
        arguments = ["generate", tiny, *GENERATE, tiny / "calibration", *arguments[1:]]
    status, _, errors, left = forked(*arguments, stdout=closed_pipe(), folder=tmp_path)
    assert status == 141 and left == []
    assert unannounced(errors) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
@pytest.mark.parametrize("arguments", [["info"], ["info", "--json"]], ids=" ".join)
def test_a_full_output(arguments, tmp_path):
    status, _, errors, _ = forked(*arguments, stdout=os.open("/dev/full", os.O_WRONLY), folder=tmp_path)
    assert (status, errors) == (1, "error: the output: No space left on device\n")


def full():
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))


def test_a_full_disk(tiny, tmp_path):
    arguments = ("calibrate", tiny, "--tokens", "64", "--dtype", "float32", "--out", tmp_path / "new" / "calibration")
    status, written, errors, left = forked(*arguments, prepare=full, folder=tmp_path)
    assert (status, written, left) == (1, "", [])
    (line,) = unannounced(errors)
    assert "calibration could not be written, and is as it was" in line
    assert os.listdir(tmp_path / "new") == []


def test_json_is_all_that_is_on_stdout(tiny, tmp_path):
    calls = [["info"], ["generate", tiny, *GENERATE, tiny / "calibration"]]
    calls += [["calibrate", tiny, "--tokens", "64", "--out", tmp_path / "c"]]
    for call in calls:
        status, written, errors, left = forked(*call, "--json", folder=tmp_path)
        assert status == 0 and left == [], errors
        json.loads(written, parse_constant=lambda constant: pytest.fail(f"{constant} is no JSON"))


def test_numbers_that_json_does_not_have_become_null(capsys):
    from swan.cli.common import print_json

    print_json({"a": float("nan")}, [{"b": (1.5, float("inf"))}])
    result = json.loads(capsys.readouterr().out)
    assert (result["settings"], result["rows"]) == ({"a": None}, [{"b": [1.5, None]}])


# Ctrl-C ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [0.05, 0.3, 0.8])
def test_interrupted(tiny, after, tmp_path):
    before = sorted(tiny.iterdir())
    arguments = (
        "generate",
        tiny,
        "Hello",
        "--tokens",
        "100000",
        "--dtype",
        "float32",
        "--calibration",
        tiny / "calibration",
    )
    status, _, errors, left = forked(*arguments, "--json", interrupt=after, folder=tmp_path)
    assert status == interrupts.STATUS and left == []
    assert unannounced(errors) == ["interrupted"]
    assert sorted(tiny.iterdir()) == before


def test_interrupted_where_the_exception_is_swallowed(monkeypatch, tmp_path):
    """As in a finalizer: the process ends all the same, some seconds later."""

    def sleepy(**_):
        for _ in range(200):
            with contextlib.suppress(KeyboardInterrupt):
                time.sleep(0.1)

    monkeypatch.setattr(interrupts, "PATIENCE", 1)
    monkeypatch.setattr("swan.cli.info.machine", sleepy)
    begun = time.perf_counter()
    status, _, errors, _ = forked("info", interrupt=0.3, folder=tmp_path)
    assert (status, errors) == (interrupts.STATUS, "interrupted\n") and time.perf_counter() - begun < 10


def test_interrupted_where_the_exception_becomes_another(monkeypatch, tmp_path):
    def wrapped(**_):
        try:
            time.sleep(30)
        except BaseException:
            raise SystemError("unreported exception") from None

    monkeypatch.setattr("swan.cli.info.machine", wrapped)
    status, _, errors, _ = forked("info", interrupt=0.5, folder=tmp_path)
    assert (status, errors) == (interrupts.STATUS, "interrupted\n")


PRESSED = """
import os, signal, sys, threading, time, types
from swan import interrupts
from swan.cli import main

signal.signal(signal.SIGINT, signal.default_int_handler)  # who runs tests in the background ignores it

def press():
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(1)

def caught():
    try:
        press()
    except KeyboardInterrupt:
        time.sleep(0.2)
        sys.exit(interrupts.STATUS)

def fail():
    time.sleep(0.1)
    raise OSError

class Slow:
    def __del__(self, sleep=time.sleep):
        sleep(2)

sys.modules["swan.cli.app"] = commands = types.ModuleType("commands")
"""
WITHOUT_A_CATCHER = {
    "before": ("commands.app = press; main()", "interrupted\n"),  # while typer makes the commands
    "after": ("commands.app = lambda: None; main(); press()", "interrupted\n"),
    "in a thread": ("commands.app = lambda: (threading.Thread(target=fail).start(), caught()); main()", ""),
    "while modules are unloaded": ("interrupts.PATIENCE = 1; sys.slow = Slow(); commands.app = caught; main()", ""),
}


@pytest.mark.parametrize("place", WITHOUT_A_CATCHER)
def test_interrupted_where_nobody_catches(place, tmp_path):
    call, said = WITHOUT_A_CATCHER[place]
    command = [sys.executable, "-c", PRESSED + call]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert (run.returncode, run.stderr) == (interrupts.STATUS, said)


PROGRAM = "import sys; sys.argv[0] = 'swan'; from swan.cli import main; sys.exit(main())"


@pytest.mark.slow
@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_interrupted_at_any_second(path, tiny, tmp_path):
    """In a process of its own, while it imports too."""
    small = ["--lengths", "200"] if path[0] == "bench" and path[1] != "model" else []
    small += ["--calibration", str(tiny / "calibration")] if path == ("serve",) else []
    arguments = [*arguments_of(path, str(tiny)), *small]
    environment = os.environ | {"TMPDIR": str(tmp_path), "SWAN_CACHE": os.environ.get("SWAN_CACHE", "")}
    for tenths in range(1, 100, 9):
        command = [sys.executable, "-c", PROGRAM, *arguments]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=tmp_path
        ) as run:
            try:
                run.wait(timeout=tenths / 10)
            except subprocess.TimeoutExpired:
                run.send_signal(signal.SIGINT)
            _, errors = run.communicate(timeout=120)
        # Python gives signals back before it unloads torch: a shell reports 130 for that too.
        assert run.returncode in (0, interrupts.STATUS, -signal.SIGINT), errors
        assert "Traceback" not in errors
        others = re.compile(
            r"torchinductor|cc\w{6}\.[sco]$"
        )  # of torch's compiler, and of a C++ compiler that was killed
        assert [name for name in os.listdir(tmp_path) if not others.match(name)] == []


@pytest.mark.slow
@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_a_pipe_that_is_closed_after_a_line(path, tiny, tmp_path):
    program = f'{sys.executable} -c "{PROGRAM}" {" ".join(path)} --help | head -1; echo ${{PIPESTATUS[0]}}'
    run = subprocess.run(["bash", "-c", program], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert run.stdout.splitlines()[-1] in ("0", "141") and run.stderr == ""
    assert list(Path(tmp_path).iterdir()) == []
