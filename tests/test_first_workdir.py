"""A workdir that this project's own first version wrote: it is scored with, exported, and gone on with."""

import json
import tarfile

import numpy as np
import pytest
from conftest import ROOT, command, run

import transformer_lm
from transformer_lm import export_huggingface
from transformer_lm.generation.sampler import SamplingConfig

FIRST = ROOT / "tests" / "fixtures" / "first_workdir"


@pytest.fixture
def workdir(tmp_path):
    with tarfile.open(FIRST / "workdir.tar.xz") as archive:
        archive.extractall(tmp_path / "workdir", filter="data")
    return tmp_path / "workdir"


def assert_scores_of_then(model):
    expected = json.loads((FIRST / "scores.json").read_text(encoding="utf-8"))
    for text, found in zip(expected, model.score([text["text"] for text in expected]), strict=True):
        assert found.tokens == text["tokens"]
        np.testing.assert_allclose(found.token_log_probs, text["token_log_probs"], rtol=1e-5)


def test_it_has_the_scores_of_then_and_exports(workdir, tmp_path):
    model = transformer_lm.load(workdir)
    assert model.step == 40
    assert_scores_of_then(model)
    export_huggingface.export(str(workdir), tmp_path / "exported", SamplingConfig())
    assert_scores_of_then(transformer_lm.load(tmp_path / "exported"))


def test_it_goes_on(workdir):
    fields = {"num_layers": 2, "emb_dim": 8, "qkv_dim": 8, "mlp_dim": 16, "vocab_size": 500, "log_every_steps": 1}
    options = "--normalization_rule_name=identity --character_coverage=0.98"
    done = run(command("main", workdir, num_train_steps=41, spm_train_options=options, **fields))
    assert done.returncode == 0, done.stderr
    assert "Resuming at step 40 of 41" in done.stderr
    before, after = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines()[-2:])
    assert (before["step"], after["step"]) == (41, 41)
    assert after["eval_loss"] == pytest.approx(4.979, abs=0.05)  # as it was at step 40
