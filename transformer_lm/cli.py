"""What the commands share: flags, recipes, errors as one line, the end of the process."""

import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
# A command that runs as a script has its own folder first in the module search path, where `evaluate.py` and the like
# would stand in for libraries of the same names.
sys.path[:] = [path for path in sys.path if os.path.abspath(path or ".") != HERE]

import codecs  # noqa: E402
import contextlib  # noqa: E402
import gc  # noqa: E402
import locale  # noqa: E402
import signal  # noqa: E402

INTERRUPTED = "Interrupted; run the same command to go on.\n"
LARGE_PAGES = "glibc.malloc.hugetlb=1"
AGAIN = "transformer_lm_again"  # option of an interpreter that has begun again, which is done once


def _begin_again():
    """Begins again, on Linux, where the environment should be another from the first instruction on.

    - Memory comes in large pages, of the GNU C library: a step of training touches a gigabyte of it anew. A user's own
      GLIBC_TUNABLES stay as they are.
    - Where the locale is not UTF-8, Python's UTF-8 mode: arguments, names of files, and files that libraries open
      without an encoding are UTF-8 as well, also in child processes. The arguments are taken as bytes: decoded by such
      a locale, some do not come back.
    """
    is_utf8 = sys.flags.utf8_mode or codecs.lookup(locale.getpreferredencoding(False)).name == "utf-8"
    is_debugged = sys.gettrace() is not None or "pydevd" in sys.modules  # and would not be any more
    if is_debugged or AGAIN in sys._xoptions or (is_utf8 and "GLIBC_TUNABLES" in os.environ):
        return
    with contextlib.suppress(OSError):  # not Linux, or the interpreter may not be begun: a sandbox, another user's
        with open("/proc/self/cmdline", "rb") as file:
            program, *arguments = file.read().split(b"\0")[:-1]
        os.environ.setdefault("GLIBC_TUNABLES", LARGE_PAGES)
        if not is_utf8:
            os.environ["PYTHONUTF8"] = "1"
        mode = ["-X", AGAIN, *([] if is_utf8 else ["-X", "utf8"])]
        os.execv(sys.executable or "/proc/self/exe", [program, *mode, *arguments])


def _leave_at_once(number, frame):
    os.write(2, INTERRUPTED.encode())
    os._exit(130)


if os.path.abspath(getattr(sys.modules["__main__"], "__file__", None) or "").startswith(HERE):  # it is a command
    _begin_again()
    signal.signal(signal.SIGINT, _leave_at_once)  # while it still imports: nothing is lost yet
    gc.disable()  # until then, too: nothing is garbage yet

import argparse  # noqa: E402
import atexit  # noqa: E402
import platform  # noqa: E402
import re  # noqa: E402
import select  # noqa: E402
import threading  # noqa: E402
import traceback  # noqa: E402
import warnings  # noqa: E402
import zlib  # noqa: E402
from collections.abc import Callable  # noqa: E402
from typing import NoReturn  # noqa: E402

from absl import app, flags  # noqa: E402
from ml_collections import ConfigDict, config_flags  # noqa: E402

from transformer_lm import console, errors, recipe  # noqa: E402
from transformer_lm.checkpoints import hub  # noqa: E402
from transformer_lm.errors import UserError  # noqa: E402
from transformer_lm.files import cache_folder, forget_unused, path_of  # noqa: E402

DAYS_OF_COMPILATIONS = 90  # that nobody has asked for: of an earlier JAX, say, or of networks that were tried once


def _keep_compilations():
    """Lets JAX, which is imported after this, keep what it compiles in the user's cache, by kind of processor."""
    processor = platform.machine()  # asks no other program
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        processor = next((line for line in file if line.startswith(("flags", "Features"))), processor)
    with contextlib.suppress(OSError):
        folder = cache_folder() / f"xla-{zlib.crc32(processor.encode()):08x}"
        forget_unused(folder, DAYS_OF_COMPILATIONS)
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder))
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")  # small programs are many
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")  # it is compiled again


_keep_compilations()
SECONDS_TO_LEAVE = 5  # for what libraries do when a process ends


class _RecipeParser(flags.ArgumentParser):
    """Reads the file of --config, also from outside the package's folder; whatever is wrong with it is one line."""

    def parse(self, path: str) -> ConfigDict:
        inside = os.path.join(HERE, path)
        is_inside = recipe.is_missing(path) and not recipe.is_missing(inside)
        return recipe.load(inside if is_inside else path).lock()


_WORKDIR = flags.DEFINE_string("workdir", None, "Folder that holds all that a run is.")
_CONFIG = config_flags.DEFINE_config_file(
    "config",
    os.path.join(HERE, "configs", "base.py"),
    "Recipe: a path, absolute, from here, or from the package's folder (configs/japanese_0.1b_v1.py).",
)
flags.FLAGS["config"].parser = _RecipeParser()
_DEBUG = flags.DEFINE_bool("debug", False, "Show stack traces.")


def run(main: Callable[[ConfigDict, str], None], *, needs_config: bool = True, needs_workdir: bool = True) -> NoReturn:
    """Parses the command line, calls main(config, workdir) and ends the process, as `run_to_exit` does.

    Args:
      main: the command; `recipe` makes dataclasses of its config.
      needs_config: whether --config must be given. Where it need not, the workdir's own recipe takes its place.
      needs_workdir: whether --workdir must be; without one it is "".
    """

    def start(_):
        if needs_workdir and not _WORKDIR.value:
            raise UserError("--workdir is missing: name a folder for the run, like --workdir=logs/my_model.")
        if needs_config and not flags.FLAGS["config"].present:
            raise UserError("--config is missing: name a recipe, like --config=configs/japanese_0.1b_v1.py.")
        workdir = os.path.expanduser(_WORKDIR.value or "")
        if needs_config and hub.is_address(workdir):
            raise UserError(f"--workdir={workdir}: a run cannot be written to the hub; name a folder.")
        main(_config(workdir), workdir)

    run_to_exit(lambda: app.run(start, flags_parser=_parse_flags))


def _config(workdir: str) -> ConfigDict:
    """The recipe of the command line, or else the workdir's with the command line's overrides."""
    config, flag = _CONFIG.value, flags.FLAGS["config"]
    saved = path_of(workdir) / "config.json"
    if not flag.present and not hub.is_address(workdir) and saved.exists():
        recipe.update(config, recipe.read_saved(saved), str(saved))
        config.update(flag.override_values)
    return config


def is_said(field: str) -> bool:
    """Whether the command line says a field of the recipe, which is else the workdir's own, perhaps a stranger's."""
    return bool(flags.FLAGS["config"].present) or field in flags.FLAGS["config"].override_values


def _parse_flags(argv: list[str]) -> list[str]:
    console.set_up(_debug())  # again, since absl has put its own handler in place
    for argument in argv:
        if argument.lstrip("-").startswith(("config.", "noconfig.")) and argument.startswith("-"):
            recipe.check_name(argument.partition("=")[0].partition(".")[2], argument)
    if any(re.match("--?(no)?jax_", argument) for argument in argv):
        import jax  # here alone: preparing data imports none

        jax.config.config_with_absl()  # as the original did
    try:
        rest = flags.FLAGS(argv)
    except flags.UnrecognizedFlagError as error:
        name = error.flagname.removeprefix("no")
        of_recipe = f"Unknown flag --{error.flagname}; did you mean --config.{name}?"
        raise UserError(of_recipe if name in recipe.NAMES else str(error)) from error
    except (flags.Error, TypeError, ValueError) as error:
        raise UserError(str(error)) from error
    if len(rest) > 1:
        raise UserError(f"Unexpected argument {rest[1]!r}; options begin with --.")
    return rest


def run_without_flags(text: str, command: Callable[[], object]) -> NoReturn:
    """Calls a command that has no flags but --help, which shows `text`, and --debug; ends as `run_to_exit` does."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--debug", action="store_true", help="show stack traces")

    def start():
        _, rest = parser.parse_known_args()
        if rest:
            raise UserError(f"Unexpected argument {rest[0]!r}; there are --help and --debug.")
        command()

    run_to_exit(start)


def run_to_exit(command: Callable[[], object]) -> NoReturn:
    """Runs a command and ends the process, in UTF-8 whatever the locale.

    The exit status is 0, or 1 after any error, which is one line on standard error, or 130 after Ctrl-C. The process
    ends even while threads of libraries are at work, for which Python would wait.
    """
    _begin_again()
    gc.freeze()  # what was imported is not looked through again
    gc.enable()
    console.set_up(_debug())
    signal.signal(signal.SIGINT, _interrupt)
    status = 1
    try:
        status = _run(command)
        leaving = threading.Thread(target=atexit._run_exitfuncs, daemon=True)
        leaving.start()
        leaving.join(SECONDS_TO_LEAVE)
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(status)


def _run(command: Callable[[], object]) -> int:
    """Runs a command; returns the exit status."""
    try:
        try:
            command()
        except SystemExit as end:  # absl's end of a command, --help, or a library that gives up
            if isinstance(end.code, str):
                raise UserError(end.code) from end
            return end.code or 0
        finally:
            if sys.stdout:
                sys.stdout.flush()
    except KeyboardInterrupt:
        _say(INTERRUPTED.strip())
        return 130
    except BaseException as error:
        if isinstance(error, BrokenPipeError) and _is_closed(sys.stdout):  # by `head`, say
            return 1
        _say("".join(traceback.format_exception(error)) if _debug() else f"error: {errors.one_line(error)}")
        return 1
    return 0


def _interrupt(number, frame):
    """Ctrl-C: an exception, which cleans up on its way; libraries swallow it at times, and the process ends anyway."""
    timer = threading.Timer(SECONDS_TO_LEAVE, _leave_at_once, (number, frame))
    timer.daemon = True
    timer.start()
    raise KeyboardInterrupt


def _say(text: str):
    with contextlib.suppress(OSError, ValueError, AttributeError):  # standard error is closed
        sys.stderr.write(f"{text}\n")


def _is_closed(stream) -> bool:
    """Whether nobody reads a pipe any more."""
    poll = select.poll()
    poll.register(stream.fileno(), 0)
    return bool(poll.poll(0))


def _debug() -> bool:
    return "--debug" in sys.argv or (flags.FLAGS.is_parsed() and _DEBUG.value)
