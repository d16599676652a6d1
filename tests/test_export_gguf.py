"""The command that writes GGUF files; llama.cpp is in tests/interop."""

import sys
import unittest.mock

import pytest
from conftest import FIXTURE, init, one_line_error, run
from test_gguf_file import BPE, make_tokenizer, network_for

from transformer_lm import export_gguf
from transformer_lm.errors import UserError
from transformer_lm.generation.sampler import SamplingConfig
from transformer_lm.huggingface import exported_model

gguf = pytest.importorskip("gguf")
pytest.importorskip("safetensors")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a model."""
    folder = tmp_path_factory.mktemp("exported") / "tales"
    folder.mkdir()
    spm = make_tokenizer(BPE)
    network = network_for(spm)
    exported_model.save(folder, network, init(network), 5)
    (folder / "sentencepiece_model").write_bytes(spm.model)
    return folder


def command(address, output, *arguments):
    options = [f"--workdir={address}", f"--output={output}", *arguments]
    return run([sys.executable, "-m", "transformer_lm.export_gguf", *options])


def export(address, output, kind="float32"):
    export_gguf.export(str(address), output, kind, SamplingConfig(temperature=0.5, top_k=7))


def test_the_command(model, tmp_path):
    done = command(model, tmp_path / "new" / "tales.gguf", "--type=q8_0", "--config.sampling_top_k=9")
    assert done.returncode == 0, done.stderr
    assert "Exported the model of step 5" in done.stderr
    reader = gguf.GGUFReader(tmp_path / "new" / "tales.gguf")
    fields = {"general.name": "tales", "general.sampling.top_k": 9, "qwen3.context_length": 32}
    assert {name: reader.get_field(name).contents() for name in fields} == fields
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["tales.gguf"]


@pytest.mark.parametrize("name", ["日本語 が.gguf", "[1].gguf", "a\udcff.gguf", "a\nb.gguf"])
def test_names(model, tmp_path, name):
    export(model, tmp_path / name)
    found = gguf.GGUFReader(tmp_path / name).get_field("general.name").contents()
    assert found == name.removesuffix(".gguf").replace("\udcff", r"\udcff")


class TestErrors:
    @pytest.mark.parametrize("output", ["", "tales", "gs://bucket/tales.gguf"])
    def test_output_is_no_file(self, model, output):
        assert "must name a local file" in one_line_error(command(model, output))

    def test_output_exists(self, model, tmp_path):
        (tmp_path / "mine.gguf").write_text("keep")
        assert "mine.gguf exists; remove it" in one_line_error(command(model, tmp_path / "mine.gguf"))
        assert (tmp_path / "mine.gguf").read_text() == "keep"

    def test_type(self, model, tmp_path):
        error = one_line_error(command(model, tmp_path / "a.gguf", "--type=q4"))
        assert "value should be one of <float32|bfloat16|q8_0>" in error

    @pytest.mark.parametrize(
        ("address", "words"),
        [(FIXTURE, "does not compute the original's network"), ("nowhere", "No model at")],
    )
    def test_the_model(self, tmp_path, address, words):
        with pytest.raises(UserError, match=words):
            export(address, tmp_path / "a.gguf")
        assert list(tmp_path.iterdir()) == []

    def test_below_a_file(self, model, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(UserError, match=r"cannot be written: .*where a folder must be"):
            export(model, tmp_path / "file" / "a.gguf")

    @pytest.mark.parametrize(
        ("place", "error"),
        [
            ("gguf.GGUFWriter.write_tensor_data", OSError(28, "No space left on device")),
            ("gguf.GGUFWriter.write_header_to_file", ValueError("two\nlines")),
        ],
    )
    def test_whatever_goes_wrong(self, model, tmp_path, place, error):
        with unittest.mock.patch(place, side_effect=error), pytest.raises(UserError) as raised:
            export(model, tmp_path / "a.gguf")
        assert f"--output={tmp_path}/a.gguf cannot be written: " in str(raised.value)
        assert "\n" not in str(raised.value)
        assert list(tmp_path.iterdir()) == []

    def test_without_the_library(self, model, tmp_path):
        with unittest.mock.patch.dict("sys.modules", {"gguf": None}), pytest.raises(UserError) as raised:
            export(model, tmp_path / "a.gguf")
        words = "The export needs the package gguf: in the checkout, pip install -c constraints.txt -e '.[gguf]'"
        assert words in str(raised.value)
