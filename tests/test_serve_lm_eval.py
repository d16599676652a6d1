"""lm-evaluation-harness through `local-completions`: the scores and texts that our own adapter gives."""

import dataclasses
import json

import numpy as np
import pytest
from conftest import init
from test_serve import NAME, Running, network, tokenizer  # noqa: F401

lm_eval = pytest.importorskip("lm_eval", reason="lm_eval is not installed")
pytest.importorskip("tenacity", reason="the extra dev's tenacity is not installed")
from lm_eval.models.openai_completions import LocalCompletionsAPI  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402
from test_harness import JCOMMONSENSEQA, JNLI, JSQUAD, MARC_JA, lines  # noqa: E402

from transformer_lm.evaluation import harness  # noqa: E402
from transformer_lm.generation.engine import Engine  # noqa: E402
from transformer_lm.generation.language_model import LanguageModel  # noqa: E402
from transformer_lm.generation.scheduler import Scheduler  # noqa: E402

CONTEXT = 640


@pytest.fixture(scope="module")
def model(network, tokenizer) -> LanguageModel:  # noqa: F811
    """It writes whole characters alone: of lone bytes the adapter makes the text that transformers makes."""
    network = dataclasses.replace(network, max_len=CONTEXT, positions="rope")
    is_byte = np.array([tokenizer.byte_of(token) is not None for token in range(tokenizer.vocab_size)])
    params = init(network)
    logits = params["logits"] | {"bias": params["logits"]["bias"] - 100.0 * is_byte}
    return LanguageModel(network, params | {"logits": logits}, tokenizer, step=0)


def test_scores_and_texts_are_the_adapters(model, tmp_path):
    """Of the project's own tasks: choices, which are scored behind prompts, and answers, which are written."""
    (tmp_path / "jcommonsenseqa-valid-v1.3.json").write_bytes(lines([JCOMMONSENSEQA]))
    (tmp_path / "jnli-valid-v1.3.json").write_bytes(lines(JNLI))
    (tmp_path / "marc_ja-valid-v1.1.json").write_bytes(lines(MARC_JA))
    (tmp_path / "jsquad-valid-v1.3.json").write_text(json.dumps(JSQUAD, ensure_ascii=False))
    manager = TaskManager(include_path=str(harness.TASKS), include_defaults=False, metadata={"data_dir": str(tmp_path)})
    running = Running(Scheduler(Engine(model.network, model.params, slots=2, context=CONTEXT), model.tokenizer))
    try:
        client = LocalCompletionsAPI(base_url=f"{running.url}/v1/completions", model=NAME, max_length=CONTEXT)
        assert client.tokenizer_backend == "remote"
        found = lm_eval.simple_evaluate(client, tasks=["jglue"], task_manager=manager, torch_random_seed=None)
    finally:
        running.stop()
    expected = harness.run_tasks(model, ["jglue"], data_dir=str(tmp_path))
    assert found["samples"].keys() == expected["samples"].keys()
    for task, samples in expected["samples"].items():
        theirs = {sample["doc_id"]: sample for sample in found["samples"][task]}
        assert len(theirs) == len(samples)
        for sample in samples:
            other = theirs[sample["doc_id"]]
            if task.startswith("jsquad"):
                assert other["resps"] == sample["resps"]
                continue
            for (one,), (two,) in zip(sample["resps"], other["resps"], strict=True):
                assert two[0] == pytest.approx(one[0], abs=1e-3)
                assert two[1] == one[1]
            assert (other["acc"], other["acc_norm"]) == (sample["acc"], sample["acc_norm"])
