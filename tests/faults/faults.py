"""Real faults, on real processes: what a run survives. Prints a table and exits with 1 where something was lost.

python tests/faults/faults.py [--only=NAME,...] [--times=20] [--seed=0]

After each fault the same command is run again, and must end with the bytes of a run that was never disturbed, or the
fault must have ended in one line of error with nothing lost. Full disks and read-only folders need Linux and root (they
mount file systems in a namespace of their own); they are left out where that cannot be had.
"""

import argparse
import contextlib
import hashlib
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))
importlib.import_module("processes")  # commands compile quickly, as in the tests
SPEEDS = importlib.import_module("transformer_lm.training.reporter").SPEEDS

# Of what a killed process has left half written the next would read nothing.
os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)

RUN = {
    "dataset_name": "mukashi",
    "eval_dataset_name": "mukashi",
    "train_split": "train[:600]",
    "eval_split": "validation[:20]",
    "vocab_size": 900,
    "max_corpus_chars": 100_000,
    "max_target_length": 32,
    "max_eval_target_length": 64,
    "per_device_batch_size": 2,
    "eval_per_device_batch_size": 8,
    "num_eval_steps": 2,
    "num_layers": 1,
    "emb_dim": 16,
    "qkv_dim": 16,
    "mlp_dim": 32,
    "num_heads": 2,
    "use_bfloat16": False,
    "prompts": "昔々",
    "max_predict_length": 12,
    "prepare_processes": 2,
    "num_train_steps": 60,
    "log_every_steps": 5,
    "eval_every_steps": 30,
    "checkpoint_every_steps": 5,
    "checkpoint_every_minutes": 0,
}
# Small blocks, so that a preparation has many moments to be killed in. While it imports, Ctrl-C ends it without a word,
# as it ends a command that is not begun from here.
COMMAND = (
    "import sys, runpy, signal\n"
    "signal.signal(signal.SIGINT, signal.SIG_DFL)\n"
    "from transformer_lm.data import rows\n"
    "rows.BLOCK_CHARS = 20_000\n"
    "{before}\n"
    "sys.argv[0] = '{module}.py'\n"
    "runpy.run_module('transformer_lm.{module}', run_name='__main__')\n"
)
LIMIT = 240  # seconds that a command may take at the most
LAST_SECONDS = 10  # in which workers must be gone, and a refused command must have ended


class Lost(Exception):  # noqa: N818
    """A fault was not survived; the text says how."""


def command(workdir: Path | str, module: str = "main", before: str = "", **fields) -> list[str]:
    """The command line of a small run."""
    overrides = [f"--config.{name}={value}" for name, value in (RUN | fields).items()]
    code = COMMAND.format(module=module, before=before)
    return [sys.executable, "-c", code, f"--workdir={workdir}", "--config=configs/lm1b_default.py", *overrides]


def run(arguments: list[str], wrapper: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    """Runs a command to its end."""
    return subprocess.run([*wrapper, *arguments], capture_output=True, text=True, errors="replace", timeout=LIMIT)


def finish(arguments: list[str]):
    """Runs a command that must end well."""
    done = run(arguments)
    if done.returncode != 0:
        raise Lost(f"the command ends with {done.returncode}: {tail(done)}")


def tail(done: subprocess.CompletedProcess) -> str:
    """The last line of a command's standard error."""
    return (done.stderr.strip().splitlines() or ["nothing said"])[-1][:300]


def check_one_line(done: subprocess.CompletedProcess):
    """Raises Lost unless a command failed with one line of error."""
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    if done.returncode != 1 or len(errors) != 1 or "Traceback" in done.stderr:
        raise Lost(f"exit status {done.returncode}, {len(errors)} lines of error: {tail(done)}")


def digest(workdir: Path) -> dict[str, str]:
    """What must be the same however a run came to its end: rows, tokenizer, metrics, the last checkpoint's arrays."""
    found = {}
    for path in sorted((workdir / "prepared").rglob("*")):
        if path.is_file() and path.name != "lock":
            found[str(path.relative_to(workdir))] = hashlib.sha256(path.read_bytes()).hexdigest()
    found["sentencepiece_model"] = hashlib.sha256((workdir / "sentencepiece_model").read_bytes()).hexdigest()
    if (workdir / "metrics.jsonl").exists():
        lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
        kept = [{name: line[name] for name in line if name not in SPEEDS} for line in lines]
        found["metrics.jsonl"] = json.dumps(kept)
        found["parameters"] = parameters(workdir)
    return found


def parameters(workdir: Path) -> str:
    """A hash of all arrays of the newest checkpoint."""
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    folder = max((workdir / "checkpoints").iterdir(), key=lambda path: int(path.name) if path.name.isdigit() else -1)
    trees = [ocp.StandardCheckpointer().restore(folder / item) for item in ("params", "opt_state", "progress")]
    content = b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(trees))
    return f"{folder.name} {hashlib.sha256(content).hexdigest()}"


def check_same(workdir: Path, expected: dict[str, str]):
    """Raises Lost where a workdir is not what an undisturbed run left."""
    found = digest(workdir)
    for name in sorted(expected.keys() | found.keys()):
        if found.get(name) != expected.get(name):
            raise Lost(f"{name} is not that of an undisturbed run")


def children_of(process: int) -> list[int]:
    """The processes that a process has started, and theirs."""
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process)], capture_output=True, text=True).stdout
    own = [int(number) for number in listed.split()]
    return own + [grandchild for child in own for grandchild in children_of(child)]


def check_gone(processes: list[int]):
    """Raises Lost where processes outlive the one that was killed."""
    deadline = time.monotonic() + LAST_SECONDS
    alive = processes
    while alive and time.monotonic() < deadline:
        time.sleep(0.1)
        alive = [
            number
            for number in alive
            if Path(f"/proc/{number}/cmdline").exists() and Path(f"/proc/{number}/cmdline").read_bytes()
        ]
    if alive:
        raise Lost(f"{len(alive)} worker processes outlive the command")


class Laboratory:
    """A folder to work in, and what undisturbed runs left there."""

    def __init__(self, folder: Path, times: int, seed: int):
        self.folder, self.times = folder, times
        self.random = random.Random(seed)
        self._count = 0
        self.whole = folder / "undisturbed"
        start = time.monotonic()
        finish(command(self.whole, "prepare_data"))
        self.preparing_seconds = time.monotonic() - start
        self.prepared = folder / "prepared_only"
        shutil.copytree(self.whole, self.prepared)
        finish(command(self.whole))
        self.expected = digest(self.whole)
        self.expected_rows = digest(self.prepared)

    def place(self, source: Path | None = None) -> Path:
        """A new workdir, empty or a copy."""
        self._count += 1
        place = self.folder / f"run{self._count}"
        if source:
            shutil.copytree(source, place)
        return place


def killed_preparing(lab: Laboratory) -> Iterator[None]:
    """SIGKILL while tokenizer or rows are made"""
    for _ in range(lab.times):
        workdir = lab.place()
        process = subprocess.Popen(command(workdir, "prepare_data"), stderr=subprocess.DEVNULL)
        time.sleep(lab.random.uniform(0.5, max(lab.preparing_seconds, 1)))
        workers = children_of(process.pid)
        process.kill()
        process.wait()
        check_gone(workers)
        finish(command(workdir, "prepare_data"))
        check_same(workdir, lab.expected_rows)
        shutil.rmtree(workdir)
        yield


def killed_training(lab: Laboratory) -> Iterator[None]:
    """SIGKILL while it trains, every second time inside a save"""
    workdir = lab.place(lab.prepared)
    kills = 0
    while kills < lab.times:
        process = subprocess.Popen(command(workdir), stderr=subprocess.DEVNULL)
        moment = time.monotonic() + lab.random.uniform(4, 9)
        saves = workdir / "checkpoints"
        while process.poll() is None and (
            not list(saves.glob("*orbax-checkpoint-tmp*")) if kills % 2 else time.monotonic() < moment
        ):
            time.sleep(0.001)
        process.kill()
        if process.wait() != -signal.SIGKILL:  # it had ended before
            check_same(workdir, lab.expected)
            shutil.rmtree(workdir)
            workdir = lab.place(lab.prepared)
            continue
        kills += 1
        yield
    finish(command(workdir))
    check_same(workdir, lab.expected)


def told_to_stop(lab: Laboratory) -> Iterator[None]:
    """SIGTERM or Ctrl-C at any moment"""
    workdir = lab.place(lab.prepared)
    for attempt in range(lab.times // 4):
        process = subprocess.Popen(command(workdir), stderr=subprocess.PIPE, text=True)
        time.sleep(lab.random.uniform(1, 10))
        start = time.monotonic()
        process.send_signal((signal.SIGTERM, signal.SIGINT)[attempt % 2])
        errors = process.communicate(timeout=LIMIT)[1]
        if time.monotonic() - start > 15 or "Traceback" in errors:
            raise Lost(f"ended after {time.monotonic() - start:.0f} s: {errors.strip().splitlines()[-1:]}")
        yield
    finish(command(workdir))
    check_same(workdir, lab.expected)


def full_disk(lab: Laboratory) -> Iterator[None]:
    """A disk that fills up, at as many sizes"""
    if not can_mount():
        return
    used = sum(path.stat().st_size for path in lab.prepared.rglob("*") if path.is_file()) >> 10
    whole = sum(path.stat().st_size for path in lab.whole.rglob("*") if path.is_file()) >> 10
    for attempt in range(lab.times):
        size = 64 + (used + 4 * whole) * attempt // lab.times  # KiB
        mount = lab.folder / "disk"
        mount.mkdir(exist_ok=True)
        script = (
            'mount -t tmpfs -o size=$1k none "$0" && shift && ("$@"; echo $? >"$0/../status") '
            '&& mount -o remount,size=1g "$0" && rm -rf "$0/../left" && cp -a "$0" "$0/../left"'
        )
        start = time.monotonic()
        done = run(command(mount / "run"), ("unshare", "-m", "bash", "-c", script, str(mount), str(size)))
        done.returncode = int((lab.folder / "status").read_text())
        if done.returncode != 0:
            check_one_line(done)
        if time.monotonic() - start > LIMIT / 2:
            raise Lost(f"at {size} KiB the command ended after {time.monotonic() - start:.0f} s")
        left = lab.folder / "left" / "run"
        finish(command(left))
        check_same(left, lab.expected)
        yield


def can_mount() -> bool:
    """Whether this process may mount file systems in a namespace of its own."""
    return shutil.which("unshare") is not None and subprocess.run(["unshare", "-m", "true"]).returncode == 0


def files_by_kind(workdir: Path) -> dict[str, Path]:
    """One file of each kind that a workdir has, by what it is."""
    found = {}
    for path in sorted(workdir.rglob("*")):
        parts = path.relative_to(workdir).parts
        if path.is_file() and parts[0] == "checkpoints":
            if parts[1] == str(RUN["num_train_steps"]):  # of three items with the same files, the first
                found.setdefault(
                    "newest checkpoint: " + "/".join(kind_of(part) for part in parts[3:] or parts[2:]), path
                )
        elif path.is_file():
            found.setdefault(kind_of(path.name), path)
    return found


def kind_of(name: str) -> str:
    """A name without what is different in each run."""
    if name.startswith("events.out"):
        return "TensorBoard's events"
    if len(name) == 32 or name.startswith("rows-"):
        return f"*{Path(name).suffix}" if "." in name else "data"
    return name


def corrupt(path: Path):
    """Other bytes in the middle of a file."""
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 16] = bytes(byte ^ 0x5A for byte in content[middle : middle + 16])
    path.write_bytes(content)


def cut(path: Path):
    """The first half of a file."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def damaged_files(lab: Laboratory) -> Iterator[None]:
    """A file of each kind corrupt, cut or missing"""
    for kind in files_by_kind(lab.whole):
        for damage in (corrupt, cut, Path.unlink):
            workdir = lab.place(lab.whole)
            damage(files_by_kind(workdir)[kind])
            steps = {path.name for path in (lab.whole / "checkpoints").iterdir()}
            done = run(command(workdir, num_train_steps=RUN["num_train_steps"] + 2))
            if done.returncode != 0:
                check_one_line(done)
            kept = {path.name for folder in ("checkpoints", "damaged_checkpoints") if (workdir / folder).exists()
                    for path in (workdir / folder).iterdir()}  # fmt: skip
            if done.returncode != 0 and not steps <= kept:
                raise Lost(f"{kind}, {damage.__name__}: checkpoints {sorted(steps - kept)} are gone")
            if "Starting at step 0" in done.stderr:
                raise Lost(f"{kind}, {damage.__name__}: the run began anew")
            shutil.rmtree(workdir)
            yield


def two_at_once(lab: Laboratory) -> Iterator[None]:
    """The same command twice at once"""
    for attempt in range(max(lab.times // 5, 2)):
        workdir = lab.place(lab.prepared if attempt % 2 else None)
        processes = [subprocess.Popen(command(workdir), stderr=subprocess.PIPE, text=True) for _ in range(2)]
        errors = [process.communicate(timeout=LIMIT)[1] for process in processes]
        ended = sorted(process.returncode for process in processes)
        if any("Traceback" in text for text in errors) or ended not in ([0, 1], [0, 0]):
            raise Lost(f"they ended with {ended}: {[text.strip().splitlines()[-1] for text in errors]}")
        if ended == [0, 1] and not any("is in use by process" in text for text in errors):
            raise Lost("the second was not told who uses the workdir")
        check_same(workdir, lab.expected)
        shutil.rmtree(workdir)
        yield


CLOCK = (
    "import random, time\ntrue_time = time.time\ntime.time = lambda: true_time() + random.choice([-1e6, 0, 3600, 1e7])"
)


def jumping_clock(lab: Laboratory) -> Iterator[None]:
    """A clock that jumps by hours and weeks, back and forth"""
    workdir = lab.place()
    for steps in (20, RUN["num_train_steps"]):
        done = run(command(workdir, before=CLOCK, num_train_steps=steps))
        if done.returncode:  # Orbax takes a jump for a save that lasts too long
            check_one_line(done)
            finish(command(workdir, num_train_steps=steps))
        yield
    expected = lab.expected | {"metrics.jsonl": "", "parameters": lab.expected["parameters"]}
    found = digest(workdir) | {"metrics.jsonl": ""}
    if found != expected:
        raise Lost("the run is not that of a steady clock")


def read_only(lab: Laboratory) -> Iterator[None]:
    """A workdir that may only be read: trained on, and generated from"""
    if not can_mount():
        return
    script = 'mount -o bind "$0" "$0" && mount -o remount,bind,ro "$0" && exec "$@"'
    before = digest(lab.whole)
    wrapper = ("unshare", "-m", "bash", "-c", script, str(lab.whole))
    check_one_line(run(command(lab.whole, num_train_steps=RUN["num_train_steps"] + 2), wrapper))
    yield
    done = run([*command(lab.whole, "generate_text"), "--num_generated_texts=1", "--output=jsonl"], wrapper)
    if done.returncode != 0 or json.loads(done.stdout)["prompt"] != RUN["prompts"]:
        raise Lost(f"generate_text: {tail(done)}")
    check_same(lab.whole, before)
    yield


FAULTS: tuple[Callable[[Laboratory], Iterator[None]], ...] = (
    killed_preparing, killed_training, told_to_stop, full_disk, damaged_files, two_at_once, jumping_clock, read_only,
)  # fmt: skip


def main():
    """Tries the faults and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="names of faults, separated by commas: " + ", ".join(f.__name__ for f in FAULTS))
    parser.add_argument(
        "--times", type=int, default=20, help="how often each fault that has a moment or a size is tried"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    arguments = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    chosen = [fault for fault in FAULTS if not arguments.only or fault.__name__ in arguments.only.split(",")]
    lost = False
    with tempfile.TemporaryDirectory(prefix="faults_") as folder:
        lab = Laboratory(Path(folder), arguments.times, arguments.seed)
        print("| fault | tries | survived |\n|:-|-:|-:|", flush=True)
        for fault in chosen:
            survived, why = 0, ""
            with contextlib.suppress(StopIteration):
                try:
                    for _ in fault(lab):
                        survived += 1
                except (Lost, subprocess.TimeoutExpired) as error:
                    lost, why = True, f" ({error})"
            print(f"| {fault.__doc__} | {survived + bool(why)} | {survived}{why} |", flush=True)
    sys.exit(lost)


if __name__ == "__main__":
    main()
