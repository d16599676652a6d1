"""What the commands share: flags, recipes, errors as one line."""

import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
# A command that runs as a script has its own folder first in the module search path, where `evaluate.py` and the like
# would stand in for libraries of the same names.
sys.path[:] = [path for path in sys.path if os.path.abspath(path or ".") != HERE]

import contextlib  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402

from absl import app, flags  # noqa: E402
from etils import epath  # noqa: E402
from ml_collections import ConfigDict, config_flags  # noqa: E402

from transformer_lm import console, recipe  # noqa: E402
from transformer_lm.checkpoints import hub  # noqa: E402
from transformer_lm.errors import UserError  # noqa: E402

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder that holds all that a run is.")
_CONFIG = config_flags.DEFINE_config_file(
    "config",
    os.path.join(HERE, "configs", "base.py"),
    "Recipe: a path, absolute, from here, or from the package's folder (configs/japanese_0.1b_v1.py).",
)
_DEBUG = flags.DEFINE_bool("debug", False, "Show stack traces.")


def run(main: Callable[[ConfigDict, str], None], *, needs_config: bool = True):
    """Parses the command line and calls main(config, workdir); `recipe` makes dataclasses of the config.

    An error that the user can mend is one line on standard error and exit status 1; so is Ctrl-C, with status 130.

    Args:
      main: the command.
      needs_config: whether --config must be given. Where it need not, the workdir's own recipe takes its place.
    """

    def start(_):
        with one_line_errors():
            if not _WORKDIR.value:
                raise UserError("--workdir is missing: name a folder for the run, like --workdir=logs/my_model.")
            if needs_config and not flags.FLAGS["config"].present:
                raise UserError("--config is missing: name a recipe, like --config=configs/japanese_0.1b_v1.py.")
            workdir = os.path.expanduser(_WORKDIR.value)
            if needs_config and hub.is_address(workdir):
                raise UserError(f"--workdir={workdir}: a run cannot be written to the hub; name a folder.")
            main(_config(workdir), workdir)

    app.run(start, flags_parser=_parse_flags)


def _config(workdir: str) -> ConfigDict:
    """The recipe of the command line, or else the workdir's with the command line's overrides."""
    config = _CONFIG.value
    if hub.is_address(workdir):
        return config
    saved = epath.Path(workdir) / "config.json"
    if flags.FLAGS["config"].present or not saved.exists():
        return config
    overrides = flags.FLAGS["config"].override_values
    saved_fields = recipe.read_saved(saved)
    with config.unlocked():
        config.update({name: value for name, value in saved_fields.items() if name in config})
        config.update(overrides)
    return config


def _parse_flags(argv: list[str]) -> list[str]:
    console.set_up_logging()
    with one_line_errors("--debug" in argv):
        argv = [_find_recipe(argument) for argument in argv]
        sys.argv = argv  # config_flags reads the overrides from here
        try:
            rest = flags.FLAGS(argv)
        except flags.Error as error:
            raise UserError(str(error)) from error
        except (AttributeError, KeyError) as error:  # an override of a field that the recipe does not have
            message = " ".join(str(error).strip("'\"").replace("\\n", " ").replace("\\'", "'").split())
            raise UserError(f"--config has no field {message}") from error
        except (TypeError, ValueError) as error:
            raise UserError(str(error)) from error
        if len(rest) > 1:
            raise UserError(f"Unexpected argument {rest[1]!r}; options begin with --.")
        return rest


def _find_recipe(argument: str) -> str:
    """--config=configs/X.py also works from outside the package's folder."""
    name, equals, path = argument.partition("=")
    if name.lstrip("-") != "config" or not equals or os.path.exists(path.split(":")[0]):
        return argument
    inside = os.path.join(HERE, path)
    if not os.path.exists(inside.split(":")[0]):
        raise UserError(f"--config={path}: no such file; recipes lie in {HERE}/configs.")
    return f"{name}={inside}"


@contextlib.contextmanager
def one_line_errors(debug: bool | None = None) -> Iterator[None]:
    """Makes a UserError or OSError one line and exit status 1; with `debug` (None: as --debug says), raises it."""
    try:
        yield
    except (UserError, OSError) as error:  # an OSError is a full disk, a missing permission, a lost network
        if _DEBUG.value if debug is None else debug:
            raise
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("Interrupted; run the same command to go on.", file=sys.stderr)
        sys.exit(130)
