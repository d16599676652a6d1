"""What a run reports, and that a step done again after a restart stands there once."""

import json
import math
import subprocess
import sys
import types

import pytest
from conftest import events_in
from tensorboardX.proto import plugin_hparams_pb2

from transformer_lm.errors import UserError
from transformer_lm.training import metrics
from transformer_lm.training.loss import perplexity


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def events(workdir):
    """The events of all TensorBoard files."""
    return [event for path in sorted(workdir.glob("events.out.tfevents.*")) for event in events_in(path.read_bytes())]


def test_the_board_takes_no_libraries_along():
    """That tensorboardX would import where they are installed, as google-cloud-storage is with gcsfs."""
    code = "import sys, transformer_lm.training.board; print(*sys.modules)"
    imported = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "boto3", "google.cloud.storage"} & set(imported)


def test_lines_scalars_texts_and_recipe(tmp_path):
    shown = []
    writer = metrics.MetricWriter(tmp_path, 0, lambda step, text: shown.append((step, text)))
    writer.write_recipe({"seed": 3})
    writer.write(10, {"train_loss": 2.5})
    writer.write_samples(10, ["昔々", "あるところに"])
    writer.show(10, "loss 2.5")
    writer.close()
    assert lines(tmp_path) == [{"step": 10, "train_loss": 2.5}]
    assert metrics.read_last(tmp_path, "train_loss") == 2.5
    with pytest.raises(UserError, match="no eval_loss yet"):
        metrics.read_last(tmp_path, "eval_loss")
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('5\n{"step": 40, "train_lo')  # the kill came here
    assert metrics.read_last(tmp_path, "train_loss") == 2.5
    assert shown == [(10, "loss 2.5")]
    values = {value.tag: (event.step, value) for event in events(tmp_path) for value in event.summary.value}
    assert values["train/loss"][0] == 10
    assert values["train/loss"][1].simple_value == 2.5
    [text] = [values[tag][1].tensor.string_val[0].decode() for tag in values if tag.startswith("samples")]
    assert text == "    昔々\n    \n    あるところに"  # indented, so that Markdown leaves marks alone
    [text] = [values[tag][1].tensor.string_val[0].decode() for tag in values if tag.startswith("recipe")]
    assert "seed = 3" in text


@pytest.mark.parametrize("text", ["昔\ud83d々", "\udc00", "\udce3\n\udfff"])
def test_half_a_surrogate_pair(tmp_path, text):
    """Which TensorBoard's UTF-8 cannot hold, is escaped, in samples as in the recipe."""
    writer = metrics.MetricWriter(tmp_path, 0, print)
    writer.write_samples(10, [text])
    writer.write_recipe({"prompts": text})
    writer.close()
    values = {value.tag.partition("/")[0]: value for event in events(tmp_path) for value in event.summary.value}
    escaped = text.encode(errors="backslashreplace").decode()
    assert values["samples"].tensor.string_val[0].decode() == "    " + escaped.replace("\n", "\n    ")


def test_an_object_store_is_written_to_seldom(tmp_path, monkeypatch):
    """Not at each line, but at each checkpoint, at the end, and once a minute."""
    monkeypatch.setattr(metrics, "is_remote", lambda _: True)
    clock = [0.0]
    monkeypatch.setattr(metrics, "time", types.SimpleNamespace(monotonic=lambda: clock[0]))
    writer = metrics.MetricWriter(tmp_path, 0, print)
    for step in range(1, 41):
        writer.write(step, {"train_loss": 1.0, "mfu": 0.5})
    assert lines(tmp_path) == []
    clock[0] = 61.0
    writer.write(41, {"train_loss": 1.0})
    assert len(lines(tmp_path)) == 41
    assert len(scalars(tmp_path)) == 81
    writer.write(42, {"train_loss": 1.0})
    assert len(lines(tmp_path)) == 41
    writer.sync()
    assert len(lines(tmp_path)) == 42
    writer.write(43, {"train_loss": 1.0})
    writer.close()
    assert len(lines(tmp_path)) == 43
    assert len(scalars(tmp_path)) == 83


def scalars(workdir) -> list[tuple[int, str]]:
    return [(event.step, value.tag) for event in events(workdir) for value in event.summary.value]


def test_resumed_run_drops_what_it_does_again(tmp_path):
    writer = metrics.MetricWriter(tmp_path, 0, print)
    for step in (10, 20, 30):
        writer.write(step, {"train_loss": float(step)})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "train_lo')  # the kill came here
    writer = metrics.MetricWriter(tmp_path, 20, print)
    writer.write(30, {"train_loss": 31.0})
    writer.close()
    assert [line["train_loss"] for line in lines(tmp_path)] == [10.0, 20.0, 31.0]


def test_hyperparameters_for_the_hparams_tab(tmp_path):
    writer = metrics.MetricWriter(tmp_path, 0, print)
    writer.write_recipe({"seed": 3, "use_bfloat16": True, "dataset_name": [("a", 0.5)], "vocab_path": None})
    writer.close()
    contents = [
        plugin_hparams_pb2.HParamsPluginData.FromString(value.metadata.plugin_data.content)
        for event in events(tmp_path)
        for value in event.summary.value
        if value.metadata.plugin_data.plugin_name == "hparams"
    ]
    [start] = [content.session_start_info for content in contents if content.HasField("session_start_info")]
    assert start.hparams["seed"].number_value == 3
    assert start.hparams["use_bfloat16"].bool_value is True
    assert start.hparams["dataset_name"].string_value == "[('a', 0.5)]"
    [experiment] = [content.experiment for content in contents if content.HasField("experiment")]
    assert "eval/loss" in [info.name.tag for info in experiment.metric_infos]


def test_a_full_disk_is_the_callers_error(tmp_path, monkeypatch):
    writer = metrics.MetricWriter(tmp_path, 0, print)
    with open("/dev/full", "wb", buffering=0) as full:
        monkeypatch.setattr(writer._board._writer._py_recordio_writer, "_writer", full)
        with pytest.raises(UserError, match=r"metrics could not be written .* No space left"):
            writer.write(10, {"train_loss": 2.5})


def test_json_has_no_infinity(tmp_path):
    writer = metrics.MetricWriter(tmp_path, 0, print)
    writer.write(10, {"train_loss": 2000.0, "train_perplexity": math.inf})
    writer.close()
    assert lines(tmp_path) == [{"step": 10, "train_loss": 2000.0, "train_perplexity": None}]


@pytest.mark.parametrize(("loss", "expected"), [(0.0, 1.0), (1.0, math.e), (1000.0, math.inf)])
def test_perplexity(loss, expected):
    assert perplexity(loss) == pytest.approx(expected)
