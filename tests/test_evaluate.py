"""The command that evaluates: what training recorded, and on other corpora what scores add up to."""

import json
import math
import os
import sys

import pytest
from conftest import run
from real_datasets import write_jsonl

import transformer_lm
from transformer_lm.data.corpora import mukashi


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
