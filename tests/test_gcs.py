"""Data folder and workdir on gs://, against an emulator of Google Cloud Storage on this machine."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request

import pytest
from conftest import command, events_in, run
from real_datasets import make_tfds, wiki40b_document

from transformer_lm.data.corpora import mukashi

pytest.importorskip("gcsfs")
pytest.importorskip("gcp_storage_emulator")
pytest.importorskip("tensorflow_datasets")

EMULATOR = """
import sys
from gcp_storage_emulator.handlers import objects
from gcp_storage_emulator.server import create_server

download = objects.download

def download_with_generation(request, response, storage, *args, **kwargs):  # a header that the real service sends
    try:
        file = storage.get_file_obj(request.params["bucket_name"], request.params["object_id"])
        response["x-goog-generation"] = file["generation"]
    except Exception:
        pass  # the handler answers
    return download(request, response, storage, *args, **kwargs)

objects.download = download_with_generation
create_server("127.0.0.1", int(sys.argv[1]), in_memory=True, default_bucket="bucket").run()
"""


@pytest.fixture(scope="module")
def gcs(tmp_path_factory):
    """Environment of commands that talk to the emulator, which holds a bucket with wiki40b/ja under gs://bucket/tfds."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("emulator") / "log"
    with log.open("wb") as output:
        emulator = subprocess.Popen([sys.executable, "-c", EMULATOR, str(port)], stdout=output, stderr=output)
    url = f"http://127.0.0.1:{port}"
    for _ in range(200):
        try:
            urllib.request.urlopen(f"{url}/storage/v1/b/bucket", timeout=5)
            break
        except OSError:
            time.sleep(0.1)
    environment = os.environ | {
        "STORAGE_EMULATOR_HOST": url,
        "TENSORSTORE_GCS_HTTP_URL": url,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
        "GOOGLE_CLOUD_PROJECT": "test",
        "FSSPEC_GS_TOKEN": "anon",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        "TFDS_DATA_DIR": "gs://bucket/tfds",
        "TRANSFORMER_LM_CACHE": str(tmp_path_factory.mktemp("cache")),
    }
    folder = tmp_path_factory.mktemp("tfds")
    articles = [wiki40b_document("昔話", mukashi.tale(number)) for number in range(300)]
    make_tfds(folder, "wiki40b/ja", {"train": articles, "validation": articles[:20]})
    for path in folder.rglob("*"):
        if path.is_file():
            name = urllib.parse.quote(f"tfds/{path.relative_to(folder)}", safe="")
            ask(f"{url}/upload/storage/v1/b/bucket/o?uploadType=media&name={name}", path.read_bytes())
    yield environment
    emulator.send_signal(signal.SIGKILL)
    emulator.wait()


def ask(url: str, content: bytes | None = None) -> bytes:
    """What the emulator answers, asked as the service is, without a library that the commands use."""
    with urllib.request.urlopen(url, content, timeout=60) as answer:
        return answer.read()


def test_from_data_to_generation(gcs):
    """Prepare, train, stop, resume and generate: all on gs://."""
    fields = {
        "dataset_name": "wiki40b/ja", "eval_dataset_name": "wiki40b/ja", "train_split": "train",
        "eval_split": "validation", "num_train_steps": 2, "eval_every_steps": 2, "checkpoint_every_steps": 2,
        "log_every_steps": 1,
    }  # fmt: skip
    workdir = "gs://bucket/run"
    first = run(command("main", workdir, **fields), env=gcs)
    assert first.returncode == 0, first.stderr[-3000:]
    again = run(command("main", workdir, **fields | {"num_train_steps": 4}), env=gcs)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "Resuming at step 2" in again.stderr
    objects = f"{gcs['STORAGE_EMULATOR_HOST']}/storage/v1/b/bucket/o"
    names = [item["name"] for item in json.loads(ask(f"{objects}?prefix=run/"))["items"]]
    lines = [json.loads(line) for line in ask(f"{objects}/run%2Fmetrics.jsonl?alt=media").splitlines() if line]
    assert [line["step"] for line in lines if "train_loss" in line] == [1, 2, 3, 4]
    assert [line["step"] for line in lines if "eval_loss" in line] == [2, 4]
    for name in ("run/config.json", "run/sentencepiece_model", "run/checkpoints/4/", "manifest.json"):
        assert any(name in path for path in names)
    boards = [ask(f"{objects}/{urllib.parse.quote(name, safe='')}?alt=media") for name in names if "tfevents" in name]
    found = [(event.step, value.tag) for board in boards for event in events_in(board) for value in event.summary.value]
    assert {(step, "train/loss") for step in (1, 2, 3, 4)} | {(4, "eval/loss")} <= set(found)
    written = run(
        [sys.executable, "-m", "transformer_lm.generate_text", f"--workdir={workdir}", "--num_generated_texts=2",
         "--output=jsonl"], env=gcs,
    )  # fmt: skip
    assert written.returncode == 0, written.stderr[-3000:]
    assert len([json.loads(line) for line in written.stdout.splitlines()]) == 2


def test_tasks_that_were_broken_off(gcs, tmp_path):
    """What is made is counted by name: a listing that a client keeps does not have what others have written."""
    url = f"{gcs['STORAGE_EMULATOR_HOST']}/storage/v1/b/bucket/o"
    for file in range(3):
        tales = [mukashi.tale(60 * file + number) for number in range(60)]
        (tmp_path / f"{file}.txt").write_text("\n\n".join(tales), encoding="utf-8")
    fields = {"dataset_name": f"text:{tmp_path}/*.txt", "eval_dataset_name": "mukashi", "train_split": "train"}
    prepare = command("prepare_data", "gs://bucket/tasks", "--executor=local", "--tasks=3", **fields)

    def rows() -> dict[str, str]:
        names = [item["name"] for item in json.loads(ask(f"{url}?prefix=tasks/prepared/"))["items"]]
        return {name: f"{url}/{urllib.parse.quote(name, safe='')}" for name in names if "/logs" not in name}

    def manifests() -> dict[str, dict]:
        found = {name: json.loads(ask(f"{at}?alt=media")) for name, at in rows().items() if "manifest" in name}
        return {name: manifest for name, manifest in found.items() if manifest["split"] == "train"}

    first = run(prepare, env=gcs)
    assert first.returncode == 0, first.stderr[-3000:]
    [(name, manifest)] = before = list(manifests().items())
    assert len(manifest["files"]) == 3
    for path, at in rows().items():
        if path == name or path.startswith(name.replace("manifest.json", "rows-00003-00001")):
            urllib.request.urlopen(urllib.request.Request(at, method="DELETE"), timeout=60)
    again = run(prepare, env=gcs)
    assert again.returncode == 0, again.stderr[-3000:]
    assert list(manifests().items()) == before


def test_a_first_save_that_was_broken_off(gcs):
    """As Orbax leaves it in a bucket: under its final name, without its mark. The run begins as it began before."""
    url = gcs["STORAGE_EMULATOR_HOST"]
    for path in ("broken/checkpoints/2/params/manifest.ocdbt", "whole/checkpoints/2/commit_success.txt"):
        name = urllib.parse.quote(path, safe="")
        ask(f"{url}/upload/storage/v1/b/bucket/o?uploadType=media&name={name}", b"content")
    code = (
        "from etils import epath\n"
        "from transformer_lm.checkpoints import workdir\n"
        "print([workdir.has_checkpoints(epath.Path('gs://bucket') / name) for name in ('broken', 'whole')])"
    )
    done = run([sys.executable, "-c", code], env=gcs)
    assert done.stdout == "[False, True]\n", done.stderr
