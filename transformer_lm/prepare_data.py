"""Prepare tokenizer and packed rows, and nothing else: on a machine without an accelerator, say, or on many.

python3 prepare_data.py --workdir=logs/japanese_0.1b_v1 --config=configs/japanese_0.1b_v1.py [--config.field=value ...]

Without --executor, processes of this machine do the work. With it, datatrove's tasks do (extra prep): on
this machine, on a Slurm cluster, or on the Ray cluster at RAY_ADDRESS. The command waits for them; the same command
goes on after an interruption. Workdir and corpus must lie where all machines find them.
"""

from absl import flags
from ml_collections import ConfigDict

from transformer_lm import cli, recipe
from transformer_lm.data import preparation
from transformer_lm.data.launcher import EXECUTORS, Launcher
from transformer_lm.errors import stage

_EXECUTOR = flags.DEFINE_enum("executor", None, EXECUTORS, "Where datatrove's tasks run; unset for plain processes.")
_TASKS = flags.DEFINE_integer(
    "tasks", 100, "Tasks that the shards (files) of a corpus are shared out to.", lower_bound=1, upper_bound=100_000
)
_WORKERS = flags.DEFINE_integer(
    "workers", -1, "Tasks that run at once; -1 for all.", lower_bound=-1, upper_bound=100_000
)
_MEMORY = flags.DEFINE_integer(
    "mem_per_task_gb", 4, "GB of memory that Slurm or Ray reserves for a task.", lower_bound=1, upper_bound=100_000
)
_PARTITION = flags.DEFINE_string("slurm_partition", None, "Slurm's partition.")
_TIME = flags.DEFINE_string("slurm_time", "20:00:00", "Slurm's limit of time for a task.")


def main(config: ConfigDict, workdir: str):
    """Makes what main.py would make before its first step."""
    launcher = None
    if _EXECUTOR.value:
        launcher = Launcher(_EXECUTOR.value, _TASKS.value, _WORKERS.value, _MEMORY.value, _PARTITION.value, _TIME.value)
    initial = None
    if config.init_from:
        from transformer_lm.checkpoints import loading  # here, since it imports JAX

        initial = loading.find_initial(config.init_from, recipe.read(config).network, workdir)
    with stage("preparing data", lower="prepare_processes or max_corpus_chars"):
        preparation.prepare(recipe.read_data(config), workdir, launcher, initial and initial.tokenizer_path)


if __name__ == "__main__":
    cli.run(main)
