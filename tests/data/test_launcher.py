"""Preparation by datatrove's tasks: the rows hold what the local way's hold, wherever the tasks ran."""

import contextlib
import dataclasses
import json
import os
import signal
import stat
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import command
from etils import epath
from test_preparation import data_config, rows_of

from transformer_lm.data import launcher, packing, preparation
from transformer_lm.data.corpora import mukashi
from transformer_lm.data.launcher import Launcher
from transformer_lm.errors import UserError
from transformer_lm.tokenizer import EOS_ID

pytest.importorskip("datatrove")
FILES, TALES_A_FILE = 7, 60


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tales")
    for i in range(FILES):
        tales = [mukashi.tale(number) for number in range(i * TALES_A_FILE, (i + 1) * TALES_A_FILE)]
        (folder / f"{i}.txt").write_text("\n\n".join(tales), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def config(corpus, tmp_path_factory):
    spm = tmp_path_factory.mktemp("spm") / "model"
    return data_config(
        dataset_name=f"text:{corpus}/*.txt", train_split="train[:90%]", eval_split="train[90%:]", vocab_path=str(spm)
    )


@pytest.fixture(scope="module")
def local_way(config, tmp_path_factory):
    return preparation.prepare(config, str(tmp_path_factory.mktemp("local")))


def texts_of(corpus) -> list[tuple[int, ...]]:
    """The token ids of a prepared corpus's whole texts (those that no row cuts), sorted, and of the rest the sum."""
    texts = []
    for row in rows_of(corpus):
        tokens = row[row != packing.padding_id(row.dtype)]
        texts += [tuple(text) for text in np.split(tokens, np.flatnonzero(tokens == EOS_ID) + 1)]
    return texts


def assert_same_documents(found, expected):
    for one, other in ((found.train, expected.train), (found.eval, expected.eval)):
        assert one.directory.name == other.directory.name
        for count in ("documents", "texts", "characters", "bytes", "tokens"):
            assert one.manifest[count] == other.manifest[count]
        tokens = [np.sort(np.concatenate([row[row != packing.padding_id(row.dtype)] for row in rows_of(corpus)]))
                  for corpus in (one, other)]  # fmt: skip
        np.testing.assert_array_equal(*tokens)
    # A long row cuts no tale, so that rows can be compared text by text.
    assert sorted(texts_of(found.eval)) == sorted(texts_of(expected.eval))


@pytest.mark.parametrize("launcher", [Launcher("local", tasks=3, workers=2), Launcher("local", tasks=12, workers=1)])
def test_local_tasks(config, local_way, launcher, tmp_path):
    data = preparation.prepare(config, str(tmp_path), launcher)
    assert_same_documents(data, local_way)
    assert {path.suffix for path in data.train.directory.iterdir()} == {".json", ".arrayrecord"}
    again = preparation.prepare(config, str(tmp_path), launcher)
    assert again.train.manifest == data.train.manifest


RAY = """
import glob, json, os, signal, sys, threading, time
import ray
from test_preparation import data_config
from transformer_lm.data import preparation
from transformer_lm.data.launcher import Launcher

def kill_a_worker():  # the first that works on a task, in the middle of it
    while True:
        for path in glob.glob("/proc/[0-9]*/cmdline"):
            try:
                if open(path, "rb").read().startswith(b"ray::RankWorker.run_for_rank"):
                    os.kill(int(path.split("/")[2]), signal.SIGKILL)
                    print("killed", flush=True)
                    return
            except OSError:
                pass
        time.sleep(0.005)

ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
threading.Thread(target=kill_a_worker, daemon=True).start()
config = data_config(**json.loads(sys.argv[1]))
preparation.prepare(config, sys.argv[2], Launcher("ray", tasks=4, workers=2, mem_per_task_gb=1))
"""


def test_ray(config, local_way, tmp_path):
    """Two workers of a Ray cluster on this machine; one is killed, and its task is done again."""
    pytest.importorskip("ray")
    fields = json.dumps(dataclasses.asdict(config))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
    arguments = [sys.executable, "-c", RAY, fields, str(tmp_path)]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    if os.path.exists("/proc"):
        assert done.stdout.splitlines().count("killed") == 1
    assert_same_documents(preparation.prepare(config, str(tmp_path)), local_way)


SLURM = {
    # A scheduler of one machine: runs the array's tasks one after the other, each as `sbatch` would start it.
    "sbatch": """#!/bin/sh
script=$(mktemp) && cat "$(eval echo \\${$#})" > "$script"
last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$script")
for i in $(seq 0 "${last:-0}"); do
    SLURM_ARRAY_TASK_ID=$i SLURM_NODELIST=localhost RUN_OFFSET=0 sh -c "bash $script" > /dev/null 2>&1
done
echo Submitted batch job 1
""",
    "srun": '#!/bin/sh\nwhile [ "${1#-}" != "$1" ]; do case "$1" in -n) shift 2;; *) shift;; esac; done\nexec "$@"\n',
    "scontrol": "#!/bin/sh\necho localhost\n",
    "squeue": "#!/bin/sh\n",
}


def test_slurm(config, local_way, tmp_path, monkeypatch):
    """With a stand-in for Slurm's commands; what they start is datatrove's own job, and our steps."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, script in SLURM.items():
        (folder / name).write_text(script)
        (folder / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    launcher = Launcher("slurm", tasks=2, slurm_partition="cpu")
    assert_same_documents(preparation.prepare(config, str(tmp_path / "run"), launcher), local_way)


class SlurmJob:
    """What is asked of datatrove's executor: a job that ends after some questions."""

    job_id, world_size = None, 3

    def __init__(self, asked: int):
        self.left = asked

    def run(self):
        assert self.job_id is None  # else datatrove lets the new job depend on that one, which Slurm may have forgotten
        self.job_id = "7"

    def get_incomplete_ranks(self, skip_completed):
        assert skip_completed
        self.left -= 1
        return [0] if self.left >= 0 else []


@pytest.fixture
def squeue(tmp_path, monkeypatch):
    """Puts a stand-in for squeue on the path, which answers with the lines of a script, one a call."""
    monkeypatch.setattr(launcher, "POLL_SECONDS", 0)

    def answer(*answers: str):
        calls = tmp_path / "calls"
        lines = "\n".join(f"{number}) {line};;" for number, line in enumerate(answers, 1))
        script = f"#!/bin/sh\necho >> {calls}\ncase $(wc -l < {calls}) in\n{lines}\n*) exit 99;;\nesac\n"
        (tmp_path / "squeue").write_text(script)
        (tmp_path / "squeue").chmod(stat.S_IRWXU)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        return lambda: len(calls.read_text().splitlines())

    return answer


RUNNING = "echo 7 cpu pack me R"
REFUSED = "echo 'slurm_load_jobs error: Unable to contact slurm controller (connect failure)' >&2; exit 1"
TIMED_OUT = "echo 'slurm_load_jobs error: Socket timed out on send/recv operation' >&2; exit 1"
UNKNOWN = "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"


@pytest.mark.parametrize("over", [UNKNOWN, "true"])
def test_slurm_that_does_not_answer_for_a_while(squeue, over):
    """The job is waited for until Slurm says that it is over."""
    calls = squeue(RUNNING, REFUSED, TIMED_OUT, RUNNING, "kill -9 $$", over)
    launcher._wait_for_slurm(SlurmJob(100), "7")
    assert calls() == 6


def test_slurm_that_answers_no_more(squeue, monkeypatch):
    """One line names the job that may still run, and nothing is started."""
    monkeypatch.setattr(launcher, "MAX_FAILURES", 3)
    calls = squeue(REFUSED, RUNNING, REFUSED, TIMED_OUT, REFUSED)
    with pytest.raises(UserError, match=r"squeue failed 3 times.*Unable to contact.*Job 7 may still run"):
        launcher._wait_for_slurm(SlurmJob(100), "7")
    assert calls() == 5
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(UserError, match=r"squeue failed 3 times.*squeue"):
        launcher._wait_for_slurm(SlurmJob(100), "7")


def test_slurm_tasks_that_are_finished(squeue):
    calls = squeue(REFUSED, RUNNING)
    launcher._wait_for_slurm(SlurmJob(2), "7")
    assert calls() == 2


def test_slurm_job_of_a_killed_command_is_waited_for(squeue, monkeypatch, tmp_path):
    """What a command has submitted, and has not seen the end of, the next one waits for before it submits anything."""
    monkeypatch.setattr(launcher, "MAX_FAILURES", 1)
    record = epath.Path(tmp_path / "slurm_job")
    calls = squeue(RUNNING, REFUSED, 'test "$*" = "-h -j 7" && echo R', RUNNING, UNKNOWN, 'test "$*" = "-h -j 7"')
    with pytest.raises(UserError, match=r"Job 7 may still run .*, started again, waits for it"):
        launcher._run_on_slurm(SlurmJob(100), record)
    job, submitted = SlurmJob(100), []
    run = job.run
    monkeypatch.setattr(job, "run", lambda: submitted.append(calls()) or run())
    launcher._run_on_slurm(job, record)
    assert (submitted, calls(), record.exists()) == ([5], 6, False)


def test_killed_tasks_are_done_again(corpus, config, local_way, tmp_path):
    """The command, killed with all its workers in the middle of its tasks, goes on when it is started again."""
    fields = {
        name: getattr(config, name)
        for name in (
            "dataset_name",
            "train_split",
            "eval_split",
            "vocab_path",
            "max_target_length",
            "max_eval_target_length",
        )
    }
    fields["eval_dataset_name"] = config.dataset_name
    arguments = command("prepare_data", tmp_path, "--executor=local", "--tasks=6", "--workers=1", **fields)
    killed = 0
    for finished in (1, 3):
        process = subprocess.Popen(arguments, start_new_session=True, stderr=subprocess.DEVNULL)
        while process.poll() is None and len(list(tmp_path.glob("prepared/*/logs-6/completions/*"))) < finished:
            time.sleep(0.005)
        killed += process.poll() is None
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert killed
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_same_documents(preparation.prepare(config, str(tmp_path)), local_way)


ENDLESS = """
import sys
from etils import epath
from transformer_lm.data.launcher import Launcher
def wait(data, rank, world_size, folder=sys.argv[1]):
    import time
    open(f"{folder}/task-{rank}", "w").close()
    time.sleep(600)
Launcher("local", tasks=2, workers=2).run("wait", [wait], epath.Path(sys.argv[1]))
"""


@pytest.mark.skipif(not os.path.exists("/proc"), reason="a process is looked for in /proc")
def test_tasks_end_with_a_killed_executor(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", ENDLESS, str(tmp_path)], start_new_session=True, stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(600):
            if len(list(tmp_path.glob("task-*"))) == 2:
                break
            time.sleep(0.1)
        assert len(list(tmp_path.glob("task-*"))) == 2
        process.kill()
        process.wait()
        for _ in range(150):
            if not (left := [pid for pid in os.listdir("/proc") if pid.isdigit() and group_of(pid) == process.pid]):
                break
            time.sleep(0.1)
        assert not left
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def group_of(pid: str) -> int | None:
    """The process group of a process that still runs."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            state, _, group = file.read().rpartition(")")[2].split()[:3]
    except OSError:
        return None
    return None if state == "Z" else int(group)


def test_failing_tasks_are_reported(corpus, config, tmp_path):
    """One line that names the cause; when that is mended, the same command succeeds."""
    for path in corpus.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "6.txt").write_bytes("日本".encode("shift_jis"))
    spoilt = dataclasses.replace(
        config, dataset_name=f"text:{tmp_path}/*.txt", train_split="train", eval_split="train[:3]"
    )
    launcher = Launcher("local", tasks=7, workers=2)
    with pytest.raises(UserError, match=r"6\.txt, line 1: not UTF-8"):
        preparation.prepare(spoilt, str(tmp_path / "run"), launcher)
    (tmp_path / "6.txt").write_text("日本", encoding="utf-8")
    assert (
        preparation.prepare(spoilt, str(tmp_path / "run"), launcher).train.manifest["documents"] == 6 * TALES_A_FILE + 1
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"executor": "slurm"}, "--slurm_partition"),
        ({"executor": "cloud"}, "must be one of local, slurm, ray"),
        ({"tasks": 0}, "--tasks=0"),
        ({"workers": 0}, "--workers=0"),
    ],
)
def test_impossible_launchers(arguments, words):
    with pytest.raises(UserError, match=words):
        Launcher(**arguments)
