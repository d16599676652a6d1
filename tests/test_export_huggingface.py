"""The command that exports, and what becomes of its folders here: generation, evaluation, the hub, more training."""

import ast
import json
import os
import re
import shutil
import sys
import unittest.mock
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import FIXTURE, ROOT, command, one_line_error, run
from processes import run_fork
from real_datasets import make_hub_cache, write_jsonl

import transformer_lm
from transformer_lm import export_huggingface
from transformer_lm.checkpoints import loading
from transformer_lm.data.corpora import mukashi
from transformer_lm.errors import UserError
from transformer_lm.generation.sampler import SamplingConfig
from transformer_lm.huggingface import model_card

safetensors = pytest.importorskip("safetensors")
tokenizers = pytest.importorskip("tokenizers")

FILES = {
    "README.md", "config.json", "generation_config.json", "model.safetensors", "sentencepiece_model", "tokenizer.json",
    "tokenizer_config.json",
}  # fmt: skip


@pytest.fixture(scope="module")
def workdir(trained):
    return trained


def export(workdir, output, *arguments):
    command = [sys.executable, "-m", "transformer_lm.export_huggingface", f"--workdir={workdir}", f"--output={output}"]
    return run([*command, *arguments])


@pytest.fixture(scope="module")
def exported(workdir, tmp_path_factory):
    output = tmp_path_factory.mktemp("exported") / "mukashi-tiny"
    done = export(workdir, output)
    assert done.returncode == 0, done.stderr
    return output


def assert_same_params(one, other, atol=0.0):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=atol), one, other)


def test_files(workdir, exported):
    assert {path.name for path in exported.iterdir()} == FILES
    assert (exported / "sentencepiece_model").read_bytes() == (workdir / "sentencepiece_model").read_bytes()
    assert len({path.stat().st_mode for path in exported.iterdir()}) == 1
    settings = json.loads((exported / "generation_config.json").read_text())
    assert settings == {
        "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1, "do_sample": True, "temperature": 0.6, "top_k": 20,
        "top_p": 1.0, "max_length": 16,
    }  # fmt: skip
    text = "昔々あるところに"
    ids = transformer_lm.load(workdir).tokenizer.encode(text)
    assert tokenizers.Tokenizer.from_file(str(exported / "tokenizer.json")).encode(text).ids == [0, *ids]


def test_same_model(workdir, exported):
    trained, loaded = loading.load_model(workdir), loading.load_model(exported)
    assert (loaded.config, loaded.step) == (trained.config, 6)
    assert_same_params(loaded.params, trained.params)


def test_greedy_settings(workdir, tmp_path):
    assert export(workdir, tmp_path / "out", "--config.sampling_temperature=0").returncode == 0
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["do_sample"] is False


def test_the_originals_checkpoint(tmp_path):
    done = export(FIXTURE, tmp_path / "out", "--config=configs/japanese_0.1b_v1.py")
    assert done.returncode == 0, done.stderr
    original, loaded = loading.load_model(FIXTURE), loading.load_model(tmp_path / "out")
    assert (loaded.config, loaded.step) == (original.config, 499_999)
    assert_same_params(loaded.params, original.params)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "学習 499,999 ステップ" in card
    assert "learning_rate" not in card  # nobody knows


class TestModelCard:
    def test_says_what_the_workdir_knows(self, workdir, exported):
        card = (exported / "README.md").read_text()
        recorded = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        last = [line for line in recorded if "eval_loss" in line][-1]
        names = json.loads((workdir / "config.json").read_text())["rows"]  # others may lie there, too
        manifests = [json.loads((workdir / "prepared" / name / "manifest.json").read_text()) for name in names]
        assert len(manifests) == 2
        for words in ("## 使い方", "## How to use"):
            assert words in card
        for name in ("eval_loss", "eval_bits_per_char"):
            assert card.count(f"| {name} | {last[name]:.4g} |") == 2  # in both languages
        for manifest in manifests:
            counts = " | ".join(f"{manifest[name]:,}" for name in ("documents", "characters", "bytes", "tokens"))
            assert card.count(f"| mukashi | {manifest['split']} | {counts} |") == 2
        recipes = [json.loads(block) for block in re.findall(r"```json\n(.*?)```", card, re.DOTALL)]
        assert len(recipes) == 2
        assert recipes[0] == recipes[1]
        assert recipes[0]["num_layers"] == 2

    def test_front_matter(self, exported):
        yaml = pytest.importorskip("yaml")
        head = (exported / "README.md").read_text().split("---\n")[1]
        assert yaml.safe_load(head)["language"] == "ja"

    def test_tells_no_paths(self, tmp_path):
        """A corpus in somebody's home is named without its folder; bytes that are not UTF-8, as in JSON."""
        texts = [mukashi.tale(number) for number in range(60)]
        write_jsonl(tmp_path / "tales\udcff.jsonl", texts)
        corpus = f"jsonl:{tmp_path}/tales\udcff.jsonl"
        changes = {"prompts": "昔々\udce3"} | {
            "dataset_name": corpus,
            "eval_dataset_name": corpus,
            "train_split": "train",
            "eval_split": "train",
        }
        done = run(command("main", tmp_path / "run\udcff", num_train_steps=1, **changes))
        assert done.returncode == 0, done.stderr
        assert export(tmp_path / "run\udcff", tmp_path / "out").returncode == 0
        card = (tmp_path / "out" / "README.md").read_text()
        assert r"| jsonl:tales\udcff.jsonl | train | 60 |" in card
        assert card.count(r"昔々\udce3") == 4
        assert str(tmp_path) not in card


@pytest.mark.parametrize(
    ("dataset", "shown"),
    [
        ("huggingface:izumi-lab/wikipedia-ja", "huggingface:izumi-lab/wikipedia-ja"),
        ("huggingface:/home/me/clients/acme/corpus", "huggingface:corpus"),
        ("huggingface:~/clients/acme/corpus/", "huggingface:corpus"),
        ("huggingface:../acme/corpus", "huggingface:corpus"),
        ("huggingface:tests/fixtures:validation", "huggingface:fixtures:validation"),
        ("jsonl:/home/me/*.jsonl", "jsonl:*.jsonl"),
        ("wiki40b/ja", "wiki40b/ja"),
    ],
)
def test_names_of_corpora(dataset, shown, monkeypatch):
    """Those of the hub are whole; of folders here the last part is told."""
    monkeypatch.chdir(ROOT)
    assert model_card._public_name(dataset) == shown


@pytest.mark.parametrize(
    ("dataset", "language"), [("lm1b", "en"), ("lm1b:1.1.0", "en"), ("wiki40b/ja", "ja"), (None, "ja")]
)
def test_language_of_a_card(tiny, dataset, language):
    counts = {"split": "train", "documents": 1, "characters": 2, "bytes": 3, "tokens": 4}
    data = [{"dataset_name": dataset} | counts] if dataset else []
    card = model_card.write("a", tiny, 1, {"recipe": {}, "data": data, "scores": {}, "prompt": None})
    assert card.startswith(f"---\nlanguage: {language}\n")
    assert ("A Japanese language model" in card) == ("日本語言語モデル" in card) == (language == "ja")


def test_generates_the_same_text(workdir, exported):
    def texts(folder):
        arguments = ["--output=jsonl", "--num_generated_texts=2", "--config.max_predict_length=16"]
        done = run([sys.executable, "-m", "transformer_lm.generate_text", f"--workdir={folder}", *arguments,
                    "--config.prompts=昔々あるところに", "--config.use_bfloat16=False"])  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert texts(exported) == texts(workdir)


def test_by_its_address_on_the_hub(exported, tmp_path):
    """From the hub's cache, and nothing is fetched of a repository that is none of ours."""
    files = {path.name: path.read_bytes() for path in exported.iterdir()}
    make_hub_cache(tmp_path, "someone/mukashi-tiny", files, kind="models")
    make_hub_cache(tmp_path, "someone/llama", {"config.json": b"{}", "model.safetensors": b""}, kind="models")
    code = (
        "import sys, transformer_lm\n"
        "for address in sys.argv[1:]:\n"
        "    print(transformer_lm.load(address).score(['昔々'])[0].log_prob, flush=True)"
    )
    addresses = [str(exported), "hf://someone/mukashi-tiny", "hf://someone/llama"]
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = run_fork([sys.executable, "-c", code, *addresses], env=environment)
    folder, hub = done.stdout.split()
    assert folder == hub
    assert "hf://someone/llama is no model of this project: it has no sentencepiece_model" in done.stderr


class TestErrors:
    def test_output_is_not_empty(self, workdir, tmp_path):
        (tmp_path / "mine.txt").write_text("keep")
        assert "exists and is not an empty folder" in one_line_error(export(workdir, tmp_path))
        assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]

    @pytest.mark.parametrize("output", ["", "gs://bucket/folder"])
    def test_output_is_no_folder(self, workdir, output):
        assert "must name a local folder" in one_line_error(export(workdir, output))

    def test_no_model(self, tmp_path):
        assert "No model in" in one_line_error(export(tmp_path, tmp_path / "out"))
        assert not (tmp_path / "out").exists()

    def test_leaves_nothing_half_written(self, workdir, tmp_path):
        shutil.copytree(workdir, tmp_path / "run")
        model = (tmp_path / "run" / "sentencepiece_model").read_bytes()
        (tmp_path / "run" / "sentencepiece_model").write_bytes(model[:100])
        assert "is not a SentencePiece model" in one_line_error(export(tmp_path / "run", tmp_path / "out"))
        assert [path.name for path in tmp_path.iterdir()] == ["run"]


class TestOutput:
    """Names of folders, and what goes wrong; without a process of its own."""

    @pytest.mark.parametrize(
        "name",
        [
            "a b",
            "[1]",
            "{x,y}",
            "100%20",
            "a*?",
            "日本語 が",
            "a\nb",
            'q"\\',
            "-x",
            b"\xff\xe3".decode(errors="surrogateescape"),
        ],
    )
    def test_any_name(self, tmp_path, name):
        export_huggingface.export(str(FIXTURE), tmp_path / name, SamplingConfig())
        assert {path.name for path in (tmp_path / name).iterdir()} == FILES
        assert [path.name for path in tmp_path.iterdir()] == [name]
        assert loading.load_model(tmp_path / name).step == 499_999
        card = (tmp_path / name / "README.md").read_text(encoding="utf-8")
        code = re.search(r"^name = (.*?)  #", card, re.MULTILINE)[1]
        assert ast.literal_eval(code) == name

    def test_an_empty_folder_that_is_the_current_one(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        export_huggingface.export(str(FIXTURE), Path(".").absolute(), SamplingConfig())
        assert {path.name for path in Path(".").iterdir()} == FILES

    def test_a_link(self, tmp_path):
        (tmp_path / "real").mkdir()
        (tmp_path / "link").symlink_to("real")
        (tmp_path / "broken").symlink_to("elsewhere")
        for name, place in (("link", "real"), ("broken", "elsewhere")):
            export_huggingface.export(str(FIXTURE), tmp_path / name, SamplingConfig())
            assert (tmp_path / name).is_symlink()
            assert {path.name for path in (tmp_path / place).iterdir()} == FILES

    def test_below_a_file(self, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(UserError, match=r"cannot be written: .*where a folder must be"):
            export_huggingface.export(str(FIXTURE), tmp_path / "file" / "out", SamplingConfig())

    @pytest.mark.parametrize("existing", [True, False])
    @pytest.mark.parametrize(
        ("place", "error"),
        [
            (
                "safetensors.numpy.save_file",
                safetensors.SafetensorError("Error while serializing: I/O error: No space\nleft"),
            ),
            ("huggingface_hub.split_state_dict_into_shards_factory", ValueError("max_shard_size")),
            ("transformer_lm.huggingface.fast_tokenizer.convert", Exception("data did not match any variant")),
            ("transformer_lm.export_huggingface.files.sync", OSError(28, "No space left on device")),
        ],
    )
    def test_whatever_a_library_raises(self, tmp_path, place, error, existing):
        output = tmp_path / "out"
        if existing:
            output.mkdir()
        with unittest.mock.patch(place, side_effect=error), pytest.raises(UserError) as raised:
            export_huggingface.export(str(FIXTURE), output, SamplingConfig())
        assert f"--output={output} cannot be written: " in str(raised.value)
        assert "\n" not in str(raised.value)
        assert list(tmp_path.rglob("*")) == [output] * existing


class TestInitFrom:
    """Training that goes on from a model elsewhere."""

    @pytest.fixture(scope="class", params=["workdir", "exported"])
    def begun(self, request, tmp_path_factory):
        """The workdir of a run of one step, and the source of its parameters, a copy."""
        folder = tmp_path_factory.mktemp("begun")
        source = shutil.copytree(request.getfixturevalue(request.param), folder / "source")
        (folder / "run" / "checkpoints" / "1.orbax-checkpoint-tmp").mkdir(parents=True)  # killed in its first save
        done = self.start(folder / "run", source)
        assert done.returncode == 0, done.stderr
        return folder / "run", source

    def start(self, folder, source, **changes):
        return run(command("main", folder, num_train_steps=1, init_from=source, **changes))

    def test_begins_with_its_parameters(self, begun):
        """Also where it was killed in its first save."""
        run, source = begun
        found = loading.load_model(run)
        assert found.step == 1
        assert_same_params(found.params, loading.load_model(source).params)  # the first step's rate is 0
        assert (run / "sentencepiece_model").read_bytes() == (source / "sentencepiece_model").read_bytes()

    @pytest.mark.parametrize("begun", ["exported"], indirect=True)
    def test_goes_on_without_it(self, begun, tmp_path):
        shutil.copytree(begun[0], tmp_path / "run")
        done = run(command("main", tmp_path / "run", num_train_steps=2, init_from=tmp_path / "gone"))
        assert done.returncode == 0, done.stderr
        assert loading.load_model(tmp_path / "run").step == 2

    def test_the_originals_checkpoint(self, tmp_path):
        sizes = {"emb_dim": 32, "qkv_dim": 32, "mlp_dim": 64}
        done = self.start(tmp_path, FIXTURE, **sizes)
        assert done.returncode == 0, done.stderr
        assert_same_params(loading.load_model(tmp_path).params, loading.load_model(FIXTURE).params)

    def test_prepare_data_takes_its_tokenizer(self, exported, tmp_path):
        done = run(command("prepare_data", tmp_path, init_from=exported))
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "sentencepiece_model").read_bytes() == (exported / "sentencepiece_model").read_bytes()

    def test_another_network(self, exported, tmp_path):
        error = one_line_error(self.start(tmp_path, exported, num_layers=3))
        assert f"init_from={exported} holds a model with num_layers=2, but this run has num_layers=3" in error
        assert not (tmp_path / "prepared").exists()  # before any long work

    def test_another_tokenizer(self, exported, tmp_path):
        shutil.copy(FIXTURE / "sentencepiece_model", tmp_path)
        assert "is not that of init_from=" in one_line_error(self.start(tmp_path, exported))

    def test_nothing_there(self, tmp_path):
        assert "No model at" in one_line_error(self.start(tmp_path / "run", tmp_path / "nothing"))
