"""Our adapter against lm_eval's own model `hf`, which runs the exported folder in PyTorch, example by example."""

import json

import numpy as np
import pytest
from conftest import FIXTURE, command, run
from test_harness import JCOMMONSENSEQA, JNLI, JSQUAD, MARC_JA, lines

import transformer_lm
from transformer_lm import export_huggingface
from transformer_lm.data.corpora import mukashi
from transformer_lm.generation.sampler import SamplingConfig

WHY = "PyTorch, transformers and accelerate are not installed: make test-interop"
for package in ("torch", "transformers", "accelerate"):
    pytest.importorskip(package, reason=WHY)
lm_eval = pytest.importorskip("lm_eval", reason=WHY)
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from transformer_lm.evaluation import harness  # noqa: E402


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model that has learnt enough to write whole characters."""
    folder = tmp_path_factory.mktemp("run")
    done = run(command("main", folder, num_train_steps=60, emb_dim=32, qkv_dim=32, mlp_dim=64, learning_rate=0.01))
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module", params=["trained", "the original's"])
def both(request, tmp_path_factory):
    """(ours, lm_eval's)."""
    folder = request.getfixturevalue("trained") if request.param == "trained" else FIXTURE
    output = tmp_path_factory.mktemp("exported") / "model"
    export_huggingface.export(str(folder), output, SamplingConfig())
    return transformer_lm.load(folder), HFLM(pretrained=str(output), device="cpu", batch_size=8), output


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("jglue")
    (folder / "jcommonsenseqa-valid-v1.3.json").write_bytes(lines([JCOMMONSENSEQA]))
    (folder / "jnli-valid-v1.3.json").write_bytes(lines(JNLI))
    (folder / "marc_ja-valid-v1.1.json").write_bytes(lines(MARC_JA))
    (folder / "jsquad-valid-v1.3.json").write_text(json.dumps(JSQUAD, ensure_ascii=False))
    return folder


def compare(both, tasks, folder, limit):
    """Both on the same tasks: log probabilities within 1e-3, texts and scores equal."""
    model, theirs, _ = both
    manager = TaskManager(include_path=str(harness.TASKS), include_defaults=False, metadata={"data_dir": str(folder)})
    expected = lm_eval.simple_evaluate(theirs, tasks=tasks, task_manager=manager, limit=limit)
    found = harness.run_tasks(model, tasks, data_dir=str(folder), limit=limit)
    assert found["samples"].keys() == expected["samples"].keys()
    for task, samples in expected["samples"].items():
        ours = {sample["doc_id"]: sample for sample in found["samples"][task]}
        assert len(ours) == len(samples)
        for sample in samples:
            mine = ours[sample["doc_id"]]
            assert mine["arguments"] == sample["arguments"]
            if task.startswith("jsquad"):
                assert mine["resps"] == sample["resps"]
                assert (mine["exact_match"], mine["f1"]) == (sample["exact_match"], sample["f1"])
            else:
                for (one,), (other,) in zip(mine["resps"], sample["resps"], strict=True):
                    assert one[0] == pytest.approx(other[0], abs=1e-3)
                    assert one[1] == other[1]
                assert (mine["acc"], mine["acc_norm"]) == (sample["acc"], sample["acc_norm"])


def test_the_four_tasks(both, made):
    compare(both, ["jglue", "marc_ja-1.1-0.3"], made, limit=None)


def test_jglue_itself(both, literature):
    compare(both, ["jglue"], literature / "jglue", limit=60)


def test_rolling_log_likelihoods(both):
    """`hf` with add_bos_token off: with it on, lm_eval counts the first token itself, too."""
    model, _, output = both
    theirs = HFLM(pretrained=str(output), device="cpu", batch_size=4, add_bos_token=False)
    texts = [mukashi.tale(number) for number in range(5)]
    requests = [Instance("loglikelihood_rolling", {}, (text,), number) for number, text in enumerate(texts)]
    found = harness.HarnessModel(model).loglikelihood_rolling(requests, disable_tqdm=True)
    np.testing.assert_allclose(found, theirs.loglikelihood_rolling(requests, disable_tqdm=True), rtol=1e-4)


def test_generation_until(both):
    """Several lengths in a batch, and stop strings."""
    model, theirs, _ = both
    prompts = ["昔々", "昔々あるところに", mukashi.tale(3)[:60], "むかし"]
    settings = {"until": ["。"], "max_gen_toks": 48, "do_sample": False}
    requests = [
        Instance("generate_until", {}, (prompt, dict(settings)), number) for number, prompt in enumerate(prompts)
    ]
    found = harness.HarnessModel(model).generate_until(requests, disable_tqdm=True)
    expected = theirs.generate_until(requests, disable_tqdm=True)
    assert found == expected
