"""The scripts in launch/, with stand-ins for the commands of the clusters."""

import functools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

ODD = [
    "--config.dataset_name=[('a b', 1.0), (\"c\", 2)]",
    "--config.train_split=train[:98%]",
    "--config.prompts=昔 $HOME;*",
]
RUN = ["-m", "transformer_lm.main", "--workdir=gs://bucket/a b", "--config=configs/japanese_0.1b_v1.py", *ODD]
GCLOUD = """#!/bin/bash
last=${@: -1}
cd "$HOME" && exec env -u TFDS_DATA_DIR bash -c "${last#--command=}"
"""
TELL = f"#!/bin/sh\nexec {sys.executable} -c 'import json, os, sys; print(json.dumps(WHAT))' \"$@\"\n"
TELL_ARGUMENTS = TELL.replace("WHAT", "sys.argv[1:]")
TELL_DATA = TELL.replace("WHAT", '[os.environ.get("TFDS_DATA_DIR")]')
PYTHON = Path("transformer-lm-japanese/.venv/bin/python")  # in the home of a host


def program(path: Path, content: str):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    path.chmod(0o755)


def launch(script: str, *arguments: str, path: Path, **environment: str) -> list[str]:
    """What the program that a script comes down to is given."""
    environment = os.environ | {"PATH": f"{path}:{os.environ['PATH']}"} | environment
    line = [ROOT / "launch" / script, *arguments]
    return json.loads(subprocess.run(line, env=environment, capture_output=True, text=True, check=True).stdout)


def test_a_pod_gets_the_words_as_they_are(tmp_path):
    """Through gcloud's ssh, which hands the command to a shell in the home of each host."""
    program(tmp_path / "gcloud", GCLOUD)
    program(tmp_path / PYTHON, TELL_ARGUMENTS)
    arguments = ["pod", "zone", RUN[2].partition("=")[2], RUN[3].partition("=")[2], *ODD]
    assert launch("tpu_pod.sh", *arguments, path=tmp_path, HOME=str(tmp_path)) == RUN


@pytest.mark.parametrize("data", ["", "gs://bucket/data", "gs://bucket/a b'$HOME;*"])
def test_a_pod_reads_the_data_that_are_named_here(tmp_path, data):
    """TFDS_DATA_DIR goes with the command, since ssh takes no environment along."""
    program(tmp_path / "gcloud", GCLOUD)
    program(tmp_path / PYTHON, TELL_DATA)
    arguments = ["pod", "zone", "gs://bucket/run", "configs/japanese_0.1b_v1.py"]
    assert launch("tpu_pod.sh", *arguments, path=tmp_path, HOME=str(tmp_path), TFDS_DATA_DIR=data) == [data or None]


def test_slurm_gets_the_words_as_they_are(tmp_path):
    program(tmp_path / "srun", TELL_ARGUMENTS)
    arguments = [RUN[2].partition("=")[2], RUN[3].partition("=")[2], *ODD]
    told = launch("slurm.sh", *arguments, path=tmp_path, SLURM_CPUS_PER_TASK="8")
    assert told == ["--kill-on-bad-exit=1", "--cpus-per-task=8", "python3", *RUN]


SAVES = """
import time
from transformer_lm.training.signals import signals_caught
with signals_caught() as signals:
    print("ready", flush=True)
    while not signals.caught:
        time.sleep(0.01)
    time.sleep(0.3)
    print("saved", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("send", [os.killpg, os.kill], ids=["to all", "to the script"])
def test_a_run_that_is_begun_again_saves_and_ends(number, send):
    """Whether a signal comes to the script alone, or, as from a terminal or a service, to the run as well."""
    line = [ROOT / "launch" / "again.sh", sys.executable, "-c", SAVES]
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # which tests in the background ignore
    process = subprocess.Popen(
        line, stdout=subprocess.PIPE, text=True, start_new_session=True, cwd=ROOT, preexec_fn=heed
    )
    assert process.stdout.readline() == "ready\n"
    send(process.pid, number)
    output, _ = process.communicate(timeout=60)
    assert (process.returncode, output) == (0, "saved\n")


def test_a_run_that_fails_is_begun_again(tmp_path):
    program(tmp_path / "sleep", "#!/bin/sh\n")
    flaky = f"test -e {tmp_path}/failed && echo done || {{ touch {tmp_path}/failed; exit 3; }}"
    line = [ROOT / "launch" / "again.sh", "sh", "-c", flaky]
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("done\n", "exit status 3: again in 10 s\n")
