"""The commands' edges: one line and exit status 1 for what a user can cause, before any long work."""

import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, command, one_line_error, run
from processes import run_fork

from transformer_lm import cli, errors
from transformer_lm.errors import UserError

PACKAGE = ROOT / "transformer_lm"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_layer": 2}, ["--config.num_layer=2: no recipe has the field 'num_layer'; did you mean 'num_layers'?"]),
        ({"num_layers": "many"}, ["num_layers", "many"]),
        ({"num_heads": 3}, ["qkv_dim=16 does not divide by num_heads=3"]),
        ({"eval_split": "test"}, ["has no split 'test'", "train, validation"]),
        ({"per_device_batch_size": 0}, ["per_device_batch_size=0 must be at least 1"]),
        ({"seed": -1}, ["seed=-1 must be at least 0"]),
        ({"mesh_fsdp": 3}, ["1 device(s) do not divide by mesh_fsdp=3 x mesh_tensor=1"]),
        ({"gradient_accumulation_steps": 3}, ["A step of 2 rows does not divide by 1 device(s) x"]),
        ({"learning_rate": "nan"}, ["learning_rate=nan must be finite"]),
    ],
)
def test_wrong_fields(tmp_path, fields, words):
    done = run(command("main", tmp_path / "workdir", **fields))
    assert_one_line(done, words)
    assert not (tmp_path / "workdir").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config=configs/lm1b_default.py"], ["--workdir is missing"]),
        (["--workdir=x"], ["--config is missing"]),
        (["--workdir=x", "--config=configs/no_such.py"], ["--config=configs/no_such.py: no such file"]),
        (["--workdir", "x", "--config", "configs/no_such.py"], ["--config=configs/no_such.py: no such file"]),
        (["--workdir=x", "--config=configs/lm1b_default.py", "more"], ["Unexpected argument 'more'"]),
        (["--work=x"], ["work"]),
        (["--workdir=x", "--jax_platformz=cpu"], ["Unknown command line flag 'jax_platformz'", "jax_platforms"]),
        (["--workdir=x", "--num_train_steps=3"], ["--num_train_steps; did you mean --config.num_train_steps?"]),
        (
            ["--workdir=file:///tmp/x", "--config=configs/lm1b_default.py"],
            ["file:///tmp/x: 'file://' is not known here"],
        ),
    ],
)
def test_wrong_arguments(tmp_path, arguments, words):
    assert_one_line(run([sys.executable, "-m", "transformer_lm.main", *arguments], cwd=tmp_path), words)
    assert not list(tmp_path.iterdir())


def assert_one_line(done: subprocess.CompletedProcess, words: list[str]):
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 1, done.stderr
    assert [line.startswith("error: ") for line in lines] == [True], done.stderr
    for word in words:
        assert word in lines[0]


TROUBLE = """
import asyncio, gc, logging, sys, threading, time
from transformer_lm import cli, console, errors

class Broken:
    def __del__(self):
        raise ValueError("unraisable")

def fail(message):
    raise ValueError(message)

def command():
    thread = threading.Thread(target=fail, args=("of a thread",))
    thread.start()
    thread.join()
    Broken()
    loop = asyncio.new_event_loop()
    async def task():
        asyncio.create_task(asyncio.to_thread(fail, "of a task"))
        await asyncio.sleep(0.1)
    loop.run_until_complete(task())
    gc.collect()
    try:
        fail("that is logged")
    except ValueError:
        logging.getLogger("a library").exception("a library says so")
    threading.Thread(target=time.sleep, args=(1000,)).start()  # as Orbax's, for which Python would wait
    print("語")
    with errors.stage("making the test", lower="its size"), errors.stage("failing"):
        {FAILURE}

cli.run_to_exit(command)
"""


def trouble(failure: str, *arguments, **environment) -> subprocess.CompletedProcess:
    line = [sys.executable, "-c", TROUBLE.replace("{FAILURE}", failure), *arguments]
    return run(line, env=os.environ | environment, encoding="utf-8") if environment else run_fork(line)


@pytest.mark.parametrize(
    ("failure", "status", "line"),
    [
        (
            "raise RuntimeError('a\\nb')",
            1,
            "error: RuntimeError while failing: a b; run again with --debug for the stack",
        ),
        ("raise MemoryError", 1, "error: memory is exhausted while failing; lower its size (MemoryError)."),
        ("command()", 1, "error: "),
        ("open('/no/such')", 1, "error: [Errno 2] No such file or directory: '/no/such' while failing"),
        (
            "import os; os.mkdir('/dev/null')",
            1,
            "error: /dev/null: a file or a broken link is where a folder must be while failing",
        ),
        ("raise errors.UserError('mend \\ud83d it')", 1, "error: mend \\ud83d it"),
        ("raise KeyboardInterrupt", 130, "Interrupted; run the same command to go on."),
        ("sys.exit('a library gives up')", 1, "error: a library gives up"),
        ("sys.exit(3)", 3, ""),
        ("pass", 0, ""),
    ],
)
def test_last_resort(failure, status, line):
    """One line of anything, among what threads, tasks and libraries say, and the process ends."""
    if failure == "command()":
        failure = "f = lambda: f(); f()"
        line = "error: RecursionError while failing: maximum recursion depth exceeded"
    done = trouble(failure)
    assert done.returncode == status
    assert done.stdout == "語\n"
    assert done.stderr.count("\n") == bool(line), done.stderr
    assert done.stderr.startswith(line)


def test_debug_shows_all_stacks():
    done = trouble("raise RuntimeError", "--debug")
    assert done.returncode == 1
    for words in ("of a thread", "of a task", "a library says so", "unraisable", "RuntimeError"):
        assert words in done.stderr
    assert done.stderr.count("Traceback") >= 5


@pytest.mark.parametrize("environment", [{"PYTHONIOENCODING": "latin-1"}, {"LC_ALL": "C"}, {"PYTHONUTF8": "0"}])
def test_output_is_utf8(environment):
    done = trouble("raise errors.UserError('日本語')", **environment)
    assert (done.stdout, done.stderr) == ("語\n", "error: 日本語\n")


def test_a_locale_that_is_not_utf8(tmp_path):
    """Arguments, names of files and files without an encoding are UTF-8 there, too."""
    make = ["localedef", "-i", "ja_JP", "-f", "EUC-JP", tmp_path / "ja_JP.eucJP"]
    if not shutil.which("localedef") or subprocess.run(make, capture_output=True, check=False).returncode > 1:
        pytest.skip("this machine cannot make the locale")
    code = """
import sys
from transformer_lm import cli
def command():
    open(sys.argv[1], "w").write(sys.argv[2])
    print(open(sys.argv[1]).read())
cli.run_to_exit(command)
"""
    environment = {"LOCPATH": str(tmp_path), "LC_ALL": "ja_JP.eucJP"}
    done = run([sys.executable, "-c", code, tmp_path / "昔話", "髙い"], env=os.environ | environment, encoding="utf-8")
    assert (done.stdout, done.stderr, done.returncode) == ("髙い\n", "", 0)
    assert (tmp_path / "昔話").read_text(encoding="utf-8") == "髙い"


of_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of Linux's C library")


def environment_of_a_user(**changes: str) -> dict[str, str]:
    """Without the tests' own choice of memory."""
    return {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"} | changes


@of_linux
@pytest.mark.parametrize("own", [None, "glibc.malloc.check=0"])
def test_memory_in_large_pages(tmp_path, own):
    """A command begins again with them at once, as the same process, unless the user has chosen otherwise."""
    note = "import os\nprint(os.getpid(), os.environ.get('GLIBC_TUNABLES'), flush=True)\n"
    (tmp_path / "sitecustomize.py").write_text(note)
    environment = environment_of_a_user(PYTHONPATH=str(tmp_path)) | ({"GLIBC_TUNABLES": own} if own else {})
    done = subprocess.run(
        [sys.executable, "-m", "transformer_lm.prepare_data", "--workdir=語 x"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert_one_line(done, ["--config is missing"])
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [tunables for _, tunables in lines] == ([own] if own else ["None", cli.LARGE_PAGES])
    assert len({pid for pid, _ in lines}) == 1


@of_linux
@pytest.mark.parametrize(
    ("hindrance", "times"), [("os.environ.pop('GLIBC_TUNABLES', None)", 2), ("os.remove(sys.executable)", 1)]
)
def test_memory_that_cannot_be_in_large_pages(tmp_path, hindrance, times):
    """The C library takes the choice from a privileged interpreter; another's may not be begun: it works without."""
    (tmp_path / "sitecustomize.py").write_text(f"import os, sys\nprint('begun', flush=True)\n{hindrance}\n")
    environment = environment_of_a_user(PYTHONPATH=os.pathsep.join([str(tmp_path), *filter(None, sys.path)]))
    (tmp_path / "python").symlink_to(os.path.realpath(sys.executable))
    line = [tmp_path / "python", "-m", "transformer_lm.prepare_data", f"--workdir={tmp_path}"]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=60)
    assert_one_line(done, ["--config is missing"])
    assert done.stdout == "begun\n" * times


def test_garbage_is_collected(tmp_path):
    """From a command's start on, though not while it imports."""
    note = "import atexit, gc\natexit.register(lambda: print(gc.isenabled(), gc.get_freeze_count() > 10_000))\n"
    (tmp_path / "sitecustomize.py").write_text(note)
    line = [sys.executable, "-m", "transformer_lm.prepare_data", "--workdir=w"]
    done = subprocess.run(line, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    assert_one_line(done, ["--config is missing"])
    assert done.stdout == "True True\n"


def test_standard_output_that_is_closed_or_full():
    code = "from transformer_lm import cli\ncli.run_to_exit(lambda: print('x\\n' * 100_000))"
    script = f'"{sys.executable}" -c "$CODE" | head -1'
    done = run(["bash", "-c", script], env=os.environ | {"CODE": code})
    assert (done.stdout, done.stderr) == ("x\n", "")
    done = run(["bash", "-c", script.replace("| head -1", "> /dev/full")], env=os.environ | {"CODE": code})
    assert done.stderr == "error: [Errno 28] No space left on device\n"
    assert done.returncode == 1
    done = run(["bash", "-c", script.replace("| head -1", ">&- 2>&-")], env=os.environ | {"CODE": code})
    assert done.returncode == 0


def test_debug_shows_the_stack(tmp_path):
    done = run(command("main", tmp_path, "--debug", num_heads=3))
    assert "Traceback" in done.stderr


def test_the_originals_commands_from_inside_the_folder(tmp_path):
    """`python3 main.py` in transformer_lm/, as the original is run, then `generate_text.py`."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    fields = {"num_train_steps": 4, "eval_every_steps": 4, "log_every_steps": 2, "num_eval_steps": 1}
    main = command("main", tmp_path, **fields)
    main[1:3] = ["main.py"]
    done = run(main, cwd=PACKAGE, env=environment)
    assert done.returncode == 0, done.stderr
    assert {"config.json", "sentencepiece_model", "checkpoints", "metrics.jsonl"} <= set(os.listdir(tmp_path))
    assert any(name.startswith("events.out.tfevents") for name in os.listdir(tmp_path))

    generate = command("generate_text", tmp_path, "--num_generated_texts=2")
    generate[1:3] = ["generate_text.py"]
    done = run(generate, cwd=PACKAGE, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("Sample: 昔々あるところに") == 2


COMPILE = """
from transformer_lm import cli
import jax
cli.run_to_exit(lambda: print(jax.jit(lambda x: x * x + 1)(3.0), jax.jit(lambda x: x * 2)(3.0)))
"""


def test_compilations_are_kept_and_damaged_ones_do_no_harm(tmp_path):
    """The second start compiles nothing; what is cut short or garbled is compiled again, without a word."""
    environment = os.environ | {"TRANSFORMER_LM_CACHE": str(tmp_path / "cache")}
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    del environment["JAX_COMPILATION_CACHE_DIR"]
    texts, kept = [], []
    for _ in range(3):
        done = run([sys.executable, "-c", COMPILE], env=environment)
        assert done.returncode == 0, done.stderr
        texts.append(done.stdout)
        [folder] = (tmp_path / "cache").glob("xla-*")
        kept.append({path.name: path.stat().st_mtime_ns for path in folder.glob("jit*")})
        if len(texts) == 2:
            for number, path in enumerate(folder.glob("jit*")):
                whole = path.read_bytes()
                half = len(whole) // 2
                path.write_bytes(whole[:half] if number % 2 else whole[:half] + bytes(32) + whole[half + 32 :])
    assert kept[0] == kept[1] != {}
    assert texts == ["10.0 6.0\n"] * 3
    assert "cache" not in done.stderr


@pytest.mark.parametrize("name", ["demo", "demo_chat"])
def test_a_demo_asked_for_help_trains_nothing(name, tmp_path):
    line = [sys.executable, "-m", f"transformer_lm.{name}"]
    done = run([*line, "--help"], cwd=tmp_path)
    assert (done.returncode, f"python -m transformer_lm.{name}" in done.stdout) == (0, True)
    assert "Unexpected argument '--steps=3'" in one_line_error(run([*line, "--steps=3"], cwd=tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_terminal_obeys_no_error():
    """Values of somebody's files are told as they are, but for what would move the cursor or change the title."""
    assert errors.one_line(UserError("architectures: \x1b]0;昔々\x07\nか")) == "architectures: \\x1b]0;昔々\\x07 か"
