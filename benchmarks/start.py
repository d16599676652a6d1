"""How much sooner commands are at work when what they compiled before is kept: main.py, generate_text.py, evaluate.py.

python benchmarks/start.py [--json=FILE] [--rounds=3] [--layers=12 --width=256]

Each round takes every command twice: with an empty folder for what is compiled, and with what the first time has left
in it. main.py begins the first time and goes on from its checkpoint the second; its rows are prepared beforehand.
Batches are of one row, so that what is computed takes no time. The table shows the medians of the rounds, of seconds by
the clock and of processor seconds, on which other work on the machine has little influence.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import rich.console
from absl import app, flags
from rich.table import Table

_JSON = flags.DEFINE_string("json", None, "File for the seconds of every round.")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Rounds.", lower_bound=1)
_LAYERS = flags.DEFINE_integer("layers", 12, "Layers of the network.", lower_bound=1)
_WIDTH = flags.DEFINE_integer("width", 256, "Width of the network; a multiple of 64.", lower_bound=64)

COMMANDS = {"main.py": "its first step", "generate_text.py": "its end", "evaluate.py": "its end"}  # measured to what
MEASURES = ("clock", "processor")


def command(name: str, workdir: Path, **fields) -> list[str]:
    """The command line of a command, with a small corpus and the recipe's fields changed."""
    width = _WIDTH.value
    fields = {
        "dataset_name": "mukashi", "eval_dataset_name": "mukashi", "train_split": "train[:3000]", "vocab_size": 1500,
        "eval_split": "validation[:200]", "max_target_length": 128, "max_eval_target_length": 128,
        "num_layers": _LAYERS.value, "emb_dim": width, "qkv_dim": width, "mlp_dim": 4 * width, "num_heads": width // 64,
        "per_device_batch_size": 1, "eval_per_device_batch_size": 1, "num_eval_steps": 1, "log_every_steps": 1,
        "prompts": "昔々あるところに", "max_predict_length": 32,
    } | fields  # fmt: skip
    overrides = [f"--config.{field}={value}" for field, value in fields.items()]
    module = f"transformer_lm.{name.removesuffix('.py')}"
    return [sys.executable, "-m", module, f"--workdir={workdir}", "--config=configs/japanese_0.1b_v1.py", *overrides]


def run(arguments: list[str], cache: Path, until: str | None = None) -> dict[str, float]:
    """Seconds, by each of MEASURES, from a process's start to a line on standard error with `until`, or to its end."""
    environment = os.environ | {"TRANSFORMER_LM_CACHE": str(cache)}
    start, found, lines = time.perf_counter(), None, []
    process = psutil.Popen(arguments, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    for line in process.stderr:
        lines.append(line)
        if until and until in line and not found:
            times = process.cpu_times()
            found = {"clock": time.perf_counter() - start, "processor": times.user + times.system}
    _, status, usage = os.wait4(process.pid, 0)
    if status or (until and not found):
        raise SystemExit("".join(lines))
    return found or {"clock": time.perf_counter() - start, "processor": usage.ru_utime + usage.ru_stime}


def measure(folder: Path, prepared: Path) -> dict[str, list[dict[str, float]]]:
    """{command: seconds with nothing kept, and with what was}, from a workdir with tokenizer and rows alone."""
    workdir, cache = folder / "workdir", folder / "cache"
    shutil.copytree(prepared, workdir)
    found = {
        "main.py": [
            run(command("main.py", workdir, num_train_steps=steps), cache, until=f"step {steps - 1}: ")
            for steps in (2, 4)
        ]
    }
    for name in ("generate_text.py", "evaluate.py"):
        shutil.rmtree(cache)
        found[name] = [run(command(name, workdir), cache) for _ in range(2)]
    return found


def main(argv):
    """Prints the table."""
    del argv
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        run(command("prepare_data.py", folder / "prepared"), folder / "cache")
        rounds = [measure(folder / str(number), folder / "prepared") for number in range(_ROUNDS.value)]
    table = Table("command", "seconds to", "by the", "nothing kept", "kept", "ratio")
    for name, end in COMMANDS.items():
        for measured in MEASURES:
            pairs = [[seconds[measured] for seconds in found[name]] for found in rounds]
            first, second = (statistics.median(column) for column in zip(*pairs, strict=True))
            ratio = statistics.median(kept / empty for empty, kept in pairs)
            table.add_row(name, end, measured, f"{first:.1f}", f"{second:.1f}", f"{ratio:.2f}")
    rich.console.Console(width=120).print(table)
    if _JSON.value:
        Path(_JSON.value).write_text(json.dumps(rounds, indent=1) + "\n")


if __name__ == "__main__":
    app.run(main)
