"""The demo of conversations, on a network small enough for a test: what it leaves behind."""

import json

import pytest

from transformer_lm import demo_chat, recipe
from transformer_lm.configs import mukashi, mukashi_chat
from transformer_lm.data.corpora import mukashi_chat as grammar

SMALL = {
    "num_layers": 1, "emb_dim": 32, "qkv_dim": 32, "num_heads": 2, "mlp_dim": 64, "vocab_size": 1600,
    "num_train_steps": 20, "eval_every_steps": 20, "log_every_steps": 10, "prepare_processes": 1,
    "max_predict_length": 48, "per_device_batch_size": 2, "eval_per_device_batch_size": 4,
}  # fmt: skip


def test_summary(tmp_path, capsys):
    base, chat = mukashi.get_config(), mukashi_chat.get_config()
    base.update(SMALL, train_split="train[:200]", eval_split="validation[:10]")
    chat.update(SMALL, train_split="train[:200]", eval_split="validation[:2]", init_from=str(tmp_path / "base"))
    demo_chat.main(recipe.read(chat), recipe.read(base), tmp_path / "chat")
    assert (tmp_path / "base" / "summary.json").exists()
    summary = json.loads((tmp_path / "chat" / "summary.json").read_text())
    assert 0 <= summary["instruction_accuracy"] <= 1
    assert summary["train_seconds"] > 0
    asked = [message["content"] for message in summary["conversation"][::2]]
    assert asked[0] in grammar.wordings("validation", grammar.REQUEST, word="猿")
    assert 1 <= len(asked) <= 4  # of a model that has learned next to nothing
    printed = capsys.readouterr().out
    assert all(message["content"] in printed for message in summary["conversation"])
    assert "Instructions never seen that it follows" in printed

    with pytest.MonkeyPatch.context() as patched:  # interrupted: it goes on, and one that came to its end begins afresh
        (tmp_path / "chat" / "mine").touch()
        patched.setattr(demo_chat.loop, "train_and_evaluate", lambda *_: False)
        demo_chat.main(recipe.read(chat), recipe.read(base), tmp_path / "chat")
        assert not (tmp_path / "chat" / "mine").exists()
        (tmp_path / "chat" / "mine").touch()
        demo_chat.main(recipe.read(chat), recipe.read(base), tmp_path / "chat")
        assert (tmp_path / "chat" / "mine").exists()
        assert not (tmp_path / "chat" / "summary.json").exists()
