"""The demo, on a network small enough for a test: what it leaves behind."""

import json

from transformer_lm import demo, recipe
from transformer_lm.configs import mukashi as config
from transformer_lm.data.corpora import mukashi


def test_summary(tmp_path, capsys, monkeypatch):
    workdir = tmp_path / "demo"
    workdir.mkdir()
    (workdir / "stale").touch()
    (workdir / "summary.json").touch()
    fields = config.get_config()
    fields.update(
        train_split="train[:200]", eval_split="validation[:10]", vocab_size=1600, num_layers=1, emb_dim=32, qkv_dim=32,
        num_heads=2, mlp_dim=64, num_train_steps=20, eval_every_steps=20, log_every_steps=10, prepare_processes=1,
        max_predict_length=48, per_device_batch_size=2, eval_per_device_batch_size=4,
    )  # fmt: skip
    demo.main(recipe.read(fields), workdir)
    assert not (workdir / "stale").exists()
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["source_bits_per_char"] == mukashi.bits_per_char()
    assert 1 < summary["eval_bits_per_char"] < 9
    assert summary["train_seconds"] > 0
    assert summary["params"] > 2 * 1600 * 32
    assert len(summary["samples"]) == 3
    printed = capsys.readouterr().out
    for sample in summary["samples"]:
        assert sample.startswith("昔々あるところに")
        assert sample in printed
    assert f"{summary['eval_bits_per_char']:.4f}" in printed

    (workdir / "summary.json").unlink()
    with monkeypatch.context() as patched:  # interrupted
        patched.setattr(demo.loop, "train_and_evaluate", lambda *_: False)
        assert not demo.main(recipe.read(fields), workdir)
    assert not (workdir / "summary.json").exists()
    (workdir / "kept").touch()
    lines = (workdir / "metrics.jsonl").read_text()
    demo.main(recipe.read(fields), workdir)
    assert (workdir / "kept").exists()
    assert (workdir / "metrics.jsonl").read_text() == lines
    assert json.loads((workdir / "summary.json").read_text())["samples"] == summary["samples"]
