"""The processes of the tests, and what keeps their processor time low.

- Small programs are compiled hundreds of times and run for a moment: XLA's code generator optimizes nothing, and fuses
  as it did before it emitted fusions one by one. A step of training is compiled in 1.3 s of a processor, not 9.2.
- What one process has compiled others take from JAX's persistent cache. It is of this session alone: a process that is
  killed may leave half an entry, which JAX would report, and not replace, for ever.
- Commands are forks of a process that has imported what they import: the fork server, which is this file as a script.
  It imports neither cli.py nor a command's module nor what only some commands need, so that a command defines its flags
  and runs from its first line on as under `python -m`.
"""

import atexit
import functools
import importlib.metadata
import json
import multiprocessing.process
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import warnings

if "TRANSFORMER_LM_TESTS" not in os.environ:  # else, a process of a test has imported this
    quick = "--xla_backend_optimization_level=0"
    if importlib.metadata.version("jaxlib").startswith("0.10."):  # XLA dies of a flag that it does not know
        quick += " --xla_cpu_use_fusion_emitters=false"
    CACHE = tempfile.TemporaryDirectory(prefix="transformer-lm-tests-")
    os.environ |= {
        "TRANSFORMER_LM_TESTS": "1",
        "JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "cpu"),
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {quick}",
        "JAX_COMPILATION_CACHE_DIR": CACHE.name,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }

TIMEOUT_SECONDS = 300
# What is read after the fork, by libraries that a command imports when it needs them, and by the package.
READ_LATE = {"PYTEST_CURRENT_TEST", "HF_HOME", "HF_HUB_OFFLINE", "TFDS_DATA_DIR", "TRANSFORMER_LM_CACHE"}


def run(arguments: list[str], **options) -> subprocess.CompletedProcess:
    """Runs a command to its end, by a fork of the fork server where that does the same."""
    environment = dict(options.get("env", os.environ))
    changed = {name for name, _ in environment.items() ^ os.environ.items()}
    is_command = arguments[:2] == [sys.executable, "-m"] and arguments[2].startswith("transformer_lm.")
    if not is_command or not changed <= READ_LATE or not options.keys() <= {"env", "cwd"}:
        return subprocess.run(arguments, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, **options)
    with tempfile.NamedTemporaryFile("r") as stdout, tempfile.NamedTemporaryFile("r") as stderr:
        files = [os.devnull, stdout.name, stderr.name]
        folder = os.fspath(options.get("cwd", os.getcwd()))
        request = json.dumps([list(map(os.fspath, arguments[2:])), environment, folder, files])
        return subprocess.CompletedProcess(arguments, _fork(request), stdout.read(), stderr.read())


@functools.cache
def _server() -> subprocess.Popen:
    server = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(server.communicate)  # closes its standard input, at which it ends
    return server


def _fork(request: str) -> int:
    """Has the fork server do a command; returns its exit status."""
    server = _server()
    server.stdin.write(f"{request}\n")
    server.stdin.flush()
    too_long = threading.Timer(TIMEOUT_SECONDS, os.kill, [int(server.stdout.readline()), signal.SIGKILL])
    too_long.start()
    status = int(server.stdout.readline())
    too_long.cancel()
    return status


def next_command() -> list:
    """Forks for each line of standard input and says the fork's id, then its exit status; returns only in a fork."""
    from transformer_lm import recipe  # noqa: F401
    from transformer_lm.checkpoints import loading  # noqa: F401
    from transformer_lm.data import preparation  # noqa: F401
    from transformer_lm.training import loop  # noqa: F401

    for line in sys.stdin:
        with warnings.catch_warnings(action="ignore"):  # JAX's, of its threads, which begin when it is used first
            process = os.fork()
        if not process:
            return json.loads(line)
        print(process, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
    sys.exit()


def become(arguments: list[str], environment: dict[str, str], folder: str, files: list[str]):
    """Does what `python -m` with the arguments does, in an environment and a folder, with files for 0, 1 and 2."""
    for number, path in enumerate(files):
        os.dup2(os.open(path, os.O_RDWR), number)
    os.chdir(folder)
    multiprocessing.process.ORIGINAL_DIR = folder
    os.environ.clear()
    os.environ.update(environment)
    sys.path[0] = folder
    sys.argv = ["-m", *arguments[1:]]
    runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    become(*next_command())
