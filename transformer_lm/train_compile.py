"""Compile a recipe's step of training for devices that need not be at hand, and say what it takes there.

python3 train_compile.py --config=configs/japanese_0.1b_v2.py --topology=v5e:2x4 [--config.field=value ...]

Whether a recipe fits, and which mesh is best, before a TPU is paid for: libtpu, TPUs' compiler (extra tpu), runs on any
Linux machine (x86-64). Topologies of TPUs are called as libtpu calls them: v3:2x2 (a v3-8), v5e:2x4 (eight chips),
v4:2x2x4. cpu:8 is eight CPU devices. Without --topology the devices at hand are compiled for. Nothing is run, and
neither data nor a workdir are read: a run that goes on elsewhere needs its --config.global_batch_size.
"""

from absl import flags
from ml_collections import ConfigDict

from transformer_lm import cli, recipe
from transformer_lm.errors import stage
from transformer_lm.training import ahead
from transformer_lm.training.config import LESS_MEMORY

_TOPOLOGY = flags.DEFINE_string("topology", "", "Devices to compile for, like v5e:2x4 or cpu:8; unset: those at hand.")


def main(config: ConfigDict, _: str):
    """Prints what a step needs."""
    chosen = recipe.read(config)
    devices = ahead.devices_of(_TOPOLOGY.value)
    with stage("compiling", lower=LESS_MEMORY):
        needs = ahead.compile_step(chosen, devices)
    needs.check()
    print(needs)


if __name__ == "__main__":
    cli.run(main, needs_workdir=False)
