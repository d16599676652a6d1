"""An exported model in mlx-lm, Apple's tool for models of transformers: the same ids, logits and answers."""

import numpy as np
import pytest
from conftest import call

import transformer_lm
from transformer_lm import export_huggingface
from transformer_lm.generation.sampler import SamplingConfig
from transformer_lm.tokenizer import START_ID

mx = pytest.importorskip("mlx.core", reason="mlx is not installed: make test-interop")
mlx_lm = pytest.importorskip("mlx_lm", reason="mlx-lm is not installed: make test-interop")
from mlx_lm.sample_utils import make_sampler  # noqa: E402

ASKED = "猿が出てくる昔話をお願いします。"


@pytest.fixture(scope="module")
def ours(trained_chat):
    return transformer_lm.load(trained_chat)


@pytest.fixture(scope="module")
def theirs(trained_chat, tmp_path_factory):
    """Network and tokenizer as mlx-lm loads them."""
    output = tmp_path_factory.mktemp("exported") / "chat"
    export_huggingface.export(str(trained_chat), output, SamplingConfig(temperature=0.0))
    return mlx_lm.load(str(output))


def test_logits(ours, theirs):
    text = "昔々あるところにお爺さんがいました。 1976年、emoji 🐒も。"
    ids = theirs[1].encode(text)
    assert ids == [START_ID, *ours.tokenizer.encode(text)]
    row = np.array([ids], np.int32)
    batch = {"inputs": row, "positions": np.arange(len(ids), dtype=np.int32)[None], "segments": np.ones_like(row)}
    logits = np.array(theirs[0](mx.array([ids])).astype(mx.float32))
    np.testing.assert_allclose(logits, call(ours.network, ours.params, batch), atol=1e-4)


def test_answers(ours, theirs):
    """By the chat template; what ends the turn ends the answer."""
    messages = [{"role": "user", "content": ASKED}]
    prompt = theirs[1].apply_chat_template(messages, add_generation_prompt=True)
    assert prompt == [START_ID, *ours.turns.encode(messages, True)[0]]
    answer = mlx_lm.generate(*theirs, prompt=prompt, max_tokens=40, sampler=make_sampler(temp=0.0))
    assert answer == ours.chat(messages, temperature=0, max_length=len(prompt) - 1 + 40)
