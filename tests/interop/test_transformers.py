"""Exported models in Hugging Face's transformers, which knows nothing of us: the same ids, logits and texts."""

import json
import os
import random
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import FIXTURE, command, run
from hypothesis import given, settings
from hypothesis import strategies as st
from test_fast_tokenizer import PARTS
from test_tensor_tables import SHAPES, config_of, random_params

import transformer_lm
from transformer_lm import export_huggingface, models
from transformer_lm.checkpoints import loading
from transformer_lm.data.corpora import mukashi
from transformer_lm.generation import sampler
from transformer_lm.generation.sampler import SamplingConfig
from transformer_lm.huggingface import exported_model
from transformer_lm.tokenizer import EOS_ID, START_ID

WHY = "PyTorch and transformers are not installed: make test-interop"
torch = pytest.importorskip("torch", reason=WHY)
transformers = pytest.importorskip("transformers", reason=WHY)


def load(folder):
    """By the names that everybody uses, and with no leave to run anything from the folder."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    assert type(model) in (transformers.GPT2LMHeadModel, transformers.Qwen3ForCausalLM)
    return model.eval()


def logits_of(model, ids: np.ndarray, **arguments) -> np.ndarray:
    with torch.no_grad():
        return model(
            torch.tensor(ids), attention_mask=torch.ones(ids.shape, dtype=torch.long), **arguments
        ).logits.numpy()


def our_logits(config, params, ids: np.ndarray) -> np.ndarray:
    positions = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    return np.asarray(models.bind(config, params)(ids, positions, np.ones_like(ids)))


def save_random(folder, shape: str):
    """A folder with a network of random parameters; its config and those."""
    config = config_of(shape)
    params = random_params(config)
    folder.mkdir()
    exported_model.save(folder, config, params, 1)
    return config, params


def random_ids(rows: int, length: int, vocab_size: int) -> np.ndarray:
    ids = np.random.default_rng(1).integers(EOS_ID + 1, vocab_size, (rows, length))
    ids[:, 0] = START_ID
    return ids


def assert_close(found, expected):
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("shape", SHAPES)
class TestRandomNetworks:
    @pytest.fixture
    def both(self, shape, tmp_path):
        """(our config, our parameters, theirs)."""
        config = config_of(shape)
        params = random_params(config)
        exported_model.save(tmp_path, config, params, 1)
        return config, params, load(tmp_path)

    def test_logits(self, both):
        config, params, model = both
        ids = random_ids(3, 30, 50)
        assert_close(logits_of(model, ids), our_logits(config, params, ids))

    @pytest.mark.parametrize("cached", [True, False])
    def test_greedy_texts_of_prompts_of_several_lengths(self, both, cached):
        """Padded on the left, as a tokenizer with padding_side left does, by whatever id."""
        config, params, model = both
        rng = random.Random(0)
        prompts = [[rng.randrange(3, 50) for _ in range(length)] for length in (1, 4, 9, 20)]
        sampling = SamplingConfig(temperature=0.0, max_length=44)
        expected = sampler.generate(config, params, prompts, num_samples=1, sampling=sampling, seed=0)
        width = max(map(len, prompts)) + 1
        rows = [[START_ID, *prompt] for prompt in prompts]
        ids = torch.tensor([[1] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        found = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=24, use_cache=cached)
        for row, [text] in zip(found.tolist(), expected, strict=True):
            written = row[width:]
            if EOS_ID in written:
                written = written[: written.index(EOS_ID)]
            assert written == text.tokens[:24]

    def test_without_an_attention_mask(self, both):
        """The id that begins a text is not taken for padding."""
        config, params, model = both
        prompt = [5, 6, 7]
        sampling = SamplingConfig(temperature=0.0, max_length=12)
        [[text]] = sampler.generate(config, params, [prompt], num_samples=1, sampling=sampling, seed=0)
        found = model.generate(torch.tensor([[START_ID, *prompt]]), do_sample=False, max_new_tokens=9).tolist()[0][4:]
        assert found[: len(text.tokens)] == text.tokens


def test_the_published_shape(tmp_path):
    """12 x 768 with 30,000 pieces."""
    config = models.TransformerConfig(30_000, emb_dim=768, num_heads=12, num_layers=12, qkv_dim=768, mlp_dim=3072)
    params = jax.tree.map(np.asarray, jax.jit(models.init, static_argnums=0)(config, jax.random.key(0)))
    exported_model.save(tmp_path, config, params, 1)
    ids = random_ids(2, 64, 30_000)
    assert_close(logits_of(load(tmp_path), ids), our_logits(config, params, ids))


@pytest.fixture(scope="module", params=["fixture", "whole"])
def original(request, tmp_path_factory):
    """(the original's files, their export)."""
    from conftest import SHARED, Original

    path = FIXTURE if request.param == "fixture" else SHARED / "original" / "tiny_checkpoint"
    if not path.exists():
        pytest.skip("the original's whole files are not on this machine; the copy in tests/fixtures is tested")
    output = tmp_path_factory.mktemp("exported") / request.param
    export_huggingface.export(str(path), output, SamplingConfig())
    return Original(path), output


class TestTheOriginal:
    """What the original's own code computed, from an exported folder."""

    def test_logits(self, original):
        files, folder = original
        model = load(folder)
        for tokens, expected in zip(files.reference["tokens"], files.reference["logits"], strict=True):
            tokens = tokens[tokens > 0]
            ids = np.array([[START_ID, *tokens[:-1]]])
            found = logits_of(model, ids)[0, :, :: files.every]
            np.testing.assert_allclose(found, expected[: len(tokens)], atol=1e-4, rtol=0)

    def test_greedy_texts(self, original):
        files, folder = original
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        inputs = tokenizer(files.about["texts"], return_tensors="pt", padding=True)
        found = load(folder).generate(**inputs, do_sample=False, max_new_tokens=32)
        for row, mask, expected in zip(
            found.tolist(), inputs["attention_mask"], files.reference["greedy"], strict=True
        ):
            written = row[len(mask) - int(mask.sum()) + 1 :]
            assert written[: len(expected)] == expected.tolist()


class TestTokenizer:
    @pytest.fixture(scope="class")
    def both(self, tmp_path_factory):
        output = tmp_path_factory.mktemp("exported") / "original"
        export_huggingface.export(str(FIXTURE), output, SamplingConfig())
        return transformer_lm.load(output).tokenizer, transformers.AutoTokenizer.from_pretrained(output)

    @settings(max_examples=300, deadline=None)
    @given(
        parts=st.lists(
            st.sampled_from([part for part in PARTS if "……" not in part]) | st.text("あいう昔々 abc", max_size=4),
            max_size=8,
        )
    )
    def test_same_ids(self, both, parts):
        """But for runs of "…", which the original's model cuts alike but in an order that rounding decides."""
        ours, theirs = both
        text = "".join(parts)
        assert theirs(text).input_ids == [START_ID, *ours.encode(text)]

    def test_same_text_back(self, both):
        ours, theirs = both
        for text in [*PARTS, *(mukashi.tale(number) for number in range(30))]:
            ids = [token for token in ours.encode(text) if token]
            assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids)

    def test_names_of_control_pieces_are_text(self, both):
        ours, theirs = both
        text = "終わり</s>と<s>書く<unk>。<0x41>"
        assert theirs(text).input_ids == [START_ID, *ours.encode(text)]
        assert EOS_ID not in theirs(text).input_ids

    def test_settings(self, both):
        _, theirs = both
        assert theirs.is_fast
        assert theirs.padding_side == "left"
        assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (0, 2, 1)
        assert theirs.model_max_length == 2048


@pytest.mark.parametrize("kind", ["the original", *(shape for shape in SHAPES if "modern" in shape)])
def test_saved_again_by_transformers(tmp_path, kind):
    """And even then it comes back here."""
    if kind == "the original":
        export_huggingface.export(str(FIXTURE), tmp_path / "ours", SamplingConfig())
    else:
        save_random(tmp_path / "ours", kind)
    load(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    found, expected = (loading.load_model(tmp_path / name) for name in ("theirs", "ours"))
    assert found.config == expected.config
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=3e-7), found.params, expected.params)


def test_trained_on_by_transformers(tmp_path):
    """A step of theirs moves the ghosts: not our network any more, and we say so."""
    export_huggingface.export(str(FIXTURE), tmp_path / "ours", SamplingConfig())
    model = load(tmp_path / "ours")
    ids = torch.tensor(random_ids(1, 10, 50))
    model(ids, labels=ids).loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.01 * parameter.grad
    model.save_pretrained(tmp_path / "theirs")
    with pytest.raises(transformer_lm.errors.UserError, match="trained or changed elsewhere"):
        loading.load_model(tmp_path / "theirs")


@pytest.mark.parametrize("shape", ["modern", "modern, grouped, wide"])
def test_todays_network_trained_on_by_transformers(tmp_path, shape):
    """All its tensors are ours: what transformers makes of them is read back, and computes the same."""
    config, before = save_random(tmp_path / "ours", shape)
    model = load(tmp_path / "ours")
    ids = random_ids(2, 20, 50)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.tensor(ids), labels=torch.tensor(ids)).loss.backward()
        optimizer.step()
    model.save_pretrained(tmp_path / "theirs")
    found = loading.load_model(tmp_path / "theirs")
    assert found.config == config
    jax.tree.map(lambda a, b: np.testing.assert_array_less(0, np.abs(a - b).max()), found.params, before)
    assert_close(our_logits(config, found.params, ids), logits_of(model, ids))


def test_the_whole_circle(tmp_path):
    """Train, export, load in transformers: the same logits, the same text; import again, bit by bit; train on."""
    done = run(command("main", tmp_path / "run", num_train_steps=30, emb_dim=32, qkv_dim=32, mlp_dim=64))
    assert done.returncode == 0, done.stderr
    export = ["-m", "transformer_lm.export_huggingface", f"--workdir={tmp_path}/run", f"--output={tmp_path}/exported"]
    done = run([sys.executable, *export])
    assert done.returncode == 0, done.stderr

    trained, model = transformer_lm.load(tmp_path / "run"), load(tmp_path / "exported")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "exported")
    prompts = ["昔々あるところに", "おじいさんが", "むかし、", mukashi.tale(5)[:40]]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    for prompt, ids, mask in zip(prompts, inputs["input_ids"], inputs["attention_mask"], strict=True):
        assert ids[mask > 0].tolist() == [START_ID, *trained.tokenizer.encode(prompt)]
        row = ids[mask > 0].numpy()[None]
        assert_close(logits_of(model, row), our_logits(trained.network, trained.params, row))
    length = inputs["input_ids"].shape[1] + 20
    theirs = tokenizer.batch_decode(
        model.generate(**inputs, do_sample=False, max_length=length), skip_special_tokens=True
    )
    for prompt, text in zip(prompts, theirs, strict=True):
        [ours] = trained.generate(prompt, temperature=0, max_length=length)
        assert ours["text"].startswith(text)  # which the longest prompt leaves less room

    loaded = loading.load_model(tmp_path / "exported")
    before = loading.load_model(tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, loaded.params, before.params)
    assert loaded.config == before.config

    again = command("main", tmp_path / "more", num_train_steps=2, emb_dim=32, qkv_dim=32, mlp_dim=64,
                    init_from=tmp_path / "exported")  # fmt: skip
    done = run(again)
    assert done.returncode == 0, done.stderr


def test_the_model_cards_code_runs(tmp_path):
    """Both pieces, as a reader pastes them, where the folder lies."""
    export_huggingface.export(str(FIXTURE), tmp_path / "card", SamplingConfig(max_length=20))
    pieces = re.findall(r"```python\n(.*?)```", (tmp_path / "card" / "README.md").read_text(), re.DOTALL)
    assert len(pieces) == 4  # two, in two languages
    for piece in pieces[:2]:
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            [sys.executable, "-c", piece], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("夏目漱石は、")


def test_config_is_a_gpt2s_own(tmp_path):
    """Nothing in it but what transformers knows, and ours under one key."""
    export_huggingface.export(str(FIXTURE), tmp_path / "out", SamplingConfig())
    content = json.loads((tmp_path / "out" / "config.json").read_text())
    known = transformers.GPT2Config().to_dict()
    assert {name for name in content if name not in known} <= {"transformer_lm"}
    assert "auto_map" not in content
