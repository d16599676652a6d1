"""The command that evaluates: what training recorded, and on other corpora what scores add up to."""

import json
import math
import os
import shutil
import sys

import pytest
from absl.testing import flagsaver
from conftest import run
from real_datasets import write_jsonl

import transformer_lm
from transformer_lm import cli, errors
from transformer_lm import evaluate as command
from transformer_lm.configs import base
from transformer_lm.data.corpora import mukashi
from transformer_lm.errors import UserError


@pytest.fixture(scope="module")
def workdir(trained):
    return trained


def evaluate(workdir, cache, *arguments) -> dict:
    command = [sys.executable, "-m", "transformer_lm.evaluate", f"--workdir={workdir}", *arguments]
    done = run(command, env=os.environ | {"TRANSFORMER_LM_CACHE": str(cache)})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_as_training_recorded_it(workdir, tmp_path):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    recorded = [line for line in lines if "eval_loss" in line][-1]
    assert evaluate(workdir, tmp_path) == pytest.approx(recorded, rel=1e-5)


def test_on_other_devices_than_it_was_trained_on(workdir, tmp_path):
    """Whatever mesh and step these had."""
    mesh = ["--config.mesh_fsdp=8", "--config.global_batch_size=48", "--config.gradient_accumulation_steps=5"]
    assert evaluate(workdir, tmp_path, *mesh) == pytest.approx(evaluate(workdir, tmp_path), rel=1e-6)


def test_any_corpus(workdir, tmp_path):
    """Bits a character are the scores' log-probabilities over the characters, where no text is cut by a row."""
    tales = [mukashi.tale(number)[:60] for number in range(9_000, 9_020)]
    write_jsonl(tmp_path / "tales.jsonl", tales)
    found = evaluate(
        workdir,
        tmp_path / "cache",
        f"--config.eval_dataset_name=jsonl:{tmp_path}/tales.jsonl",
        "--config.eval_split=train[10:]",
        "--config.max_eval_target_length=600",
        "--config.num_eval_steps=-1",
    )
    scores = transformer_lm.load(workdir).score(tales[10:], with_eos=True)
    nats = -sum(score.log_prob for score in scores)
    assert found["eval_loss"] == pytest.approx(nats / sum(len(score.tokens) for score in scores), rel=1e-4)
    characters = sum(map(len, tales[10:]))
    assert found["eval_bits_per_char"] == pytest.approx(nats / math.log(2) / characters, rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tasks="], "--tasks= names no task"),
        (["--limit=5"], "--limit=5 is about tasks: name some by --tasks"),
        (["--tasks=x", "--limit=0"], "--limit=0: 0 is not an integer in the range"),
        (["--tasks=x", "--limit=nan"], "--limit=nan"),
        (["--tasks=x", "--num_fewshot=-1"], "--num_fewshot=-1: -1 is not an integer in the range"),
        (["--tasks=x", "--tasks_data="], "--tasks_data=: no such folder"),
        (["--tasks=x", "--include_path=/no/such"], "--include_path=/no/such: no such folder"),
        (["--tasks=x", "--samples=/proc/no/such"], "while trying whether --samples=/proc/no/such can be written"),
        (["--tasks=x", "--samples=/"], "--samples=/ is a folder"),
    ],
)
def test_impossible_options(arguments, words, monkeypatch):
    """They are refused before anything is loaded: there is no such workdir. In this process, to be quick."""

    def start():
        cli._parse_flags(["evaluate", "--workdir=/no/such", *arguments])
        command.main(base.get_config(), "/no/such")

    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setattr(cli.console, "set_up", lambda debug: None)
    with flagsaver.flagsaver(), pytest.raises((UserError, OSError)) as error:
        start()
    assert words in errors.one_line(error.value)


def test_what_json_has_no_number_for():
    values = {"a": float("nan"), "b": {"c": float("inf"), "d": 1.5, "e": "N/A", "f": None}}
    assert command._without_nan(values) == {"a": None, "b": {"c": None, "d": 1.5, "e": "N/A", "f": None}}


def test_where_rows_are_made(workdir, tmp_path):
    """Where the command line says, or in the cache; what a workdir, which may be a stranger's, says is only read."""
    config = json.loads((workdir / "config.json").read_text())
    write_jsonl(tmp_path / "private.jsonl", [mukashi.tale(number) for number in range(9_000, 9_010)])
    config["recipe"] |= {
        "eval_dataset_name": f"jsonl:{tmp_path}/private.jsonl",
        "eval_split": "train",
        "prepared_dir": str(tmp_path / "said"),
    }
    theirs = tmp_path / "theirs"
    shutil.copytree(workdir, theirs)
    (theirs / "config.json").write_text(json.dumps(config))
    before = sorted(theirs.rglob("*"))
    found = evaluate(theirs, tmp_path / "cache")
    assert sorted(theirs.rglob("*")) == before
    assert not (tmp_path / "said").exists()
    assert [*(tmp_path / "cache" / "prepared").glob("*/manifest.json")]
    assert evaluate(theirs, tmp_path / "cache2", f"--config.prepared_dir={tmp_path}/said") == found
    assert [*(tmp_path / "said").glob("*/manifest.json")]
    assert evaluate(theirs, tmp_path / "cache2") == found
    assert not (tmp_path / "cache2" / "prepared").exists()
