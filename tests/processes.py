"""The processes of the tests, and what keeps their processor time low.

- Small programs are compiled hundreds of times and run for a moment: XLA's code generator optimizes nothing, fuses as
  it did before it emitted fusions one by one, and does not split a program for several threads. A step of training is
  compiled in 0.9 s of a processor, not 9.2.
- What one process has compiled others take from JAX's persistent cache. It is of this session alone: a process that is
  killed may leave half an entry, which JAX would report, and not replace, for ever.
- What has been imported is no garbage: Python's collector does not look through it again and again while JAX traces.
- Commands are forks of a process that has imported what they import: the fork server, which is this file as a script.
  It imports neither cli.py nor a command's module nor what only some commands need, so that a command defines its flags
  and runs from its first line on as under `python -m`.
"""

import atexit
import functools
import gc
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
from collections.abc import Mapping

if "TRANSFORMER_LM_TESTS" not in os.environ:  # else, a process of a test has imported this
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # every process would compile the package anew
    quick = "--xla_backend_optimization_level=0"
    if importlib.metadata.version("jaxlib").startswith("0.10."):  # XLA dies of a flag that it does not know
        quick += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    CACHE = tempfile.TemporaryDirectory(prefix="transformer-lm-tests-")
    os.environ |= {
        "TRANSFORMER_LM_TESTS": "1",
        "JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "cpu"),
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {quick}",
        "JAX_COMPILATION_CACHE_DIR": CACHE.name,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.04",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "JAX_TRACEBACK_IN_LOCATIONS_LIMIT": "0",
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",  # commands have it, and begin again where it is missing
        "NO_PROXY": "127.0.0.1,localhost",
        "no_proxy": "127.0.0.1,localhost",  # of servers that tests begin
        "NPROC": "2",  # threads of XLA; with one alone the interpreter of TPU kernels waits for ever
    }

TIMEOUT_SECONDS = 300
# What is read after the fork, by libraries that a command imports when it needs them, and by the package.
READ_LATE = {
    "PYTEST_CURRENT_TEST", "HF_HOME", "HF_HUB_OFFLINE", "TFDS_DATA_DIR", "TRANSFORMER_LM_CACHE",
    "STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL", "GOOGLE_AUTH_TOKEN_FOR_TESTING", "GOOGLE_CLOUD_PROJECT",
    "FSSPEC_GS_TOKEN", "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT",
}  # fmt: skip


class Fork:
    """`python -m` or `python -c` in a fork of the fork server; of subprocess.Popen's interface, what tests need."""

    def __init__(
        self,
        arguments: list[str],
        env: Mapping[str, str] = os.environ,
        cwd: os.PathLike | str | None = None,
        input: str = "",
    ):
        self._input, *self._outputs = (tempfile.NamedTemporaryFile("w+") for _ in range(3))  # noqa: SIM115
        self._input.write(input)
        self._input.flush()
        files = [file.name for file in (self._input, *self._outputs)]
        self.returncode: int | None = None
        folder = os.fspath(cwd or os.getcwd())
        self.pid = _ask("fork", list(map(os.fspath, arguments[1:])), dict(env), folder, files)

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = _ask("wait", self.pid, os.WNOHANG)
        return self.returncode

    def send_signal(self, number: int):
        if self.poll() is None:
            os.kill(self.pid, number)

    def errors_so_far(self) -> str:
        with open(self._outputs[1].name) as file:
            return file.read()

    def communicate(self, timeout: float = TIMEOUT_SECONDS) -> tuple[str, str]:
        """Waits for the end, which comes by SIGKILL after the timeout."""
        if self.returncode is None:
            too_long = threading.Timer(timeout, os.kill, [self.pid, signal.SIGKILL])
            too_long.start()
            self.returncode = _ask("wait", self.pid, 0)
            too_long.cancel()
        return tuple(file.read() for file in self._outputs)


def collect_seldom():
    """Garbage of what is there now is not looked for, and of what comes seldom."""
    gc.freeze()
    gc.set_threshold(200_000, 20, 100)


def run(arguments: list[str], **options) -> subprocess.CompletedProcess:
    """Runs a command to its end, as a fork where that does the same as a process of its own."""
    changed = {name for name, _ in options.get("env", os.environ).items() ^ os.environ.items()}
    is_command = arguments[:2] == [sys.executable, "-m"] and arguments[2].startswith("transformer_lm.")
    if not is_command or not changed <= READ_LATE or not options.keys() <= {"env", "cwd", "input"}:
        return subprocess.run(arguments, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, **options)
    return run_fork(arguments, **options)


def run_fork(arguments: list[str], **options) -> subprocess.CompletedProcess:
    """Runs a `Fork` to its end."""
    process = Fork(arguments, **options)
    outputs = process.communicate()
    return subprocess.CompletedProcess(arguments, process.returncode, *outputs)


@functools.cache
def _server() -> subprocess.Popen:
    server = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(server.communicate)  # closes its standard input, at which it ends
    return server


def _ask(*request):
    """What the fork server answers."""
    server = _server()
    server.stdin.write(f"{json.dumps(request)}\n")
    server.stdin.flush()
    return json.loads(server.stdout.readline())


def serve() -> list:
    """Answers requests, a line each: "fork" with the id of a fork, in which it returns; "wait" with an exit status."""
    from transformer_lm import recipe  # noqa: F401
    from transformer_lm.checkpoints import loading  # noqa: F401
    from transformer_lm.data import preparation  # noqa: F401
    from transformer_lm.training import loop  # noqa: F401

    collect_seldom()
    for line in sys.stdin:
        what, *arguments = json.loads(line)
        if what == "wait":
            ended, status = os.waitpid(*arguments)
            answer = os.waitstatus_to_exitcode(status) if ended else None
        else:
            with warnings.catch_warnings(action="ignore"):  # JAX's, of its threads, which begin when it is used first
                answer = os.fork()
            if not answer:
                return arguments
        print(json.dumps(answer), flush=True)
    sys.exit()


def become(arguments: list[str], environment: dict[str, str], folder: str, files: list[str]):
    """Does what `python` with the arguments does, in an environment and a folder, with files for 0, 1 and 2."""
    for number, path in enumerate(files):
        os.dup2(os.open(path, os.O_RDWR), number)
    os.chdir(folder)
    multiprocessing.process.ORIGINAL_DIR = folder
    os.environ.clear()
    os.environ.update(environment)
    sys.path[0] = folder
    how, what, *rest = arguments
    sys.argv = [how, *rest]
    if how == "-c":
        exec(what, {"__name__": "__main__"})
    else:
        runpy.run_module(what, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    become(*serve())
