"""Train a language model, preparing tokenizer and data first where they are missing.

python3 main.py --workdir=logs/japanese_0.1b_v1 --config=configs/japanese_0.1b_v1.py [--config.field=value ...]
"""

from absl import flags
from etils import epath
from ml_collections import ConfigDict

from transformer_lm import cli, recipe
from transformer_lm.checkpoints import loading
from transformer_lm.checkpoints import workdir as run_folder
from transformer_lm.data import preparation
from transformer_lm.errors import stage
from transformer_lm.training import distributed, loop
from transformer_lm.training.config import LESS_MEMORY, Recipe
from transformer_lm.training.profile import parse_span

_COORDINATOR = flags.DEFINE_string("coordinator_address", None, "HOST:PORT of the run's first process, if not found.")
_PROCESSES = flags.DEFINE_integer("num_processes", None, "Processes of the run, if not found.", lower_bound=1)
_PROFILE = flags.DEFINE_string("profile", None, "START:STOP: write a trace of these steps for TensorBoard's profiler.")
_PROCESS = flags.DEFINE_integer("process_id", None, "Number of this process, from 0, if not found.", lower_bound=0)


def main(config: ConfigDict, workdir: str):
    """Runs the recipe in the workdir."""
    chosen = recipe.read(config)
    profiled = parse_span(_PROFILE.value)
    distributed.start(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
    with distributed.losses_explained():
        distributed.share_compilations(workdir)
        loop.check_devices(chosen, workdir)
        data = _prepare(chosen, workdir)
        with stage("training", lower=LESS_MEMORY):
            loop.train_and_evaluate(chosen, data, workdir, profiled=profiled)
    distributed.leave()


def _prepare(chosen: Recipe, workdir: str) -> preparation.PreparedData:
    """Tokenizer and rows, which the first process of the run prepares."""
    initial = loading.find_initial(chosen.init_from, chosen.network, workdir)

    def prepare() -> preparation.PreparedData:
        kept = run_folder.remembered_rows(epath.Path(workdir), chosen.fields)
        source = initial and initial.tokenizer_path
        return preparation.prepare(chosen.data, workdir, tokenizer_source=source, kept=kept)

    def find(names: dict[str, list[str]]) -> preparation.PreparedData:
        return preparation.find_named(chosen.data, workdir, names)

    with stage("preparing data", lower="prepare_processes or max_corpus_chars"):
        folders = [workdir] + [chosen.data.prepared_dir] * bool(chosen.data.prepared_dir)
        return distributed.first_alone(prepare, preparation.rows_named, find, folders)


if __name__ == "__main__":
    cli.run(main)
