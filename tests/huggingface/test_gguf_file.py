"""GGUF files as GGUF's own library reads them, and which tokenizers they cannot have; llama.cpp is in tests/interop."""

import dataclasses
import io
from collections.abc import Sequence

import numpy as np
import pytest
import sentencepiece
from conftest import FIXTURE
from sentencepiece import sentencepiece_model_pb2
from test_tensor_tables import config_of, random_params, theirs

from transformer_lm import models, tokenizer
from transformer_lm.data import tokenizer_training
from transformer_lm.data.corpora import mukashi
from transformer_lm.errors import UserError
from transformer_lm.huggingface import gguf_file

gguf = pytest.importorskip("gguf")

KEEP_ALL = "--normalization_rule_name=identity --remove_extra_whitespaces=false"
BPE = f"--model_type=bpe --byte_fallback=true {KEEP_ALL}"
CONTROLS = [f"<|reserved_{number}|>" for number in range(16)]
SAMPLING = {"temp": 0.6, "top_k": 20, "top_p": 0.9}


def make_tokenizer(options: str, vocab_size: int = 1200, more: Sequence[str] = ()) -> tokenizer.Tokenizer:
    """Of tales, with some other characters and texts."""
    texts = [*(mukashi.tale(number) for number in range(200)), "Ａ①ｶﾞ é \n<s>abc 123", *more]
    options = f"--character_coverage=1.0 {options}"
    return tokenizer.Tokenizer(
        tokenizer_training.train([(texts, 1.0)], vocab_size=vocab_size, max_corpus_chars=100_000, options=options)
    )


def network_for(spm: tokenizer.Tokenizer, shape: str = "modern") -> models.TransformerConfig:
    return dataclasses.replace(config_of(shape), vocab_size=spm.vocab_size)


def write(path, network, params, spm, kind="float32"):
    gguf_file.check(network, spm, "tales")
    gguf_file.save(str(path), "tales", network, params, spm, SAMPLING, kind)


@pytest.fixture(scope="module")
def bpe() -> tokenizer.Tokenizer:
    return make_tokenizer(f"{BPE} --add_dummy_prefix=false --control_symbols={','.join(CONTROLS)}")


@pytest.fixture(scope="module")
def reader(bpe, tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "grouped.gguf"
    network = dataclasses.replace(network_for(bpe, "modern, grouped, wide"), max_len=77)
    write(path, network, random_params(network), bpe)
    return gguf.GGUFReader(path)


class TestFields:
    def test_of_the_network(self, reader):
        expected = {
            "general.architecture": "qwen3", "general.name": "tales", "qwen3.context_length": 77,
            "qwen3.block_count": 1, "qwen3.embedding_length": 16, "qwen3.feed_forward_length": 40,
            "qwen3.attention.head_count": 4, "qwen3.attention.head_count_kv": 2, "qwen3.attention.key_length": 8,
            "qwen3.attention.value_length": 8, "qwen3.rope.freq_base": 500.0, "qwen3.vocab_size": 1200,
        }  # fmt: skip
        assert {name: reader.get_field(name).contents() for name in expected} == expected
        assert reader.get_field("qwen3.attention.layer_norm_rms_epsilon").contents() == np.float32(1e-6)

    def test_of_the_tokenizer(self, reader, bpe):
        proto = sentencepiece_model_pb2.ModelProto.FromString(bpe.model)
        expected = {
            "model": "llama", "bos_token_id": 0, "eos_token_id": 2, "unknown_token_id": 0, "padding_token_id": 1,
            "add_bos_token": True, "add_eos_token": False, "add_space_prefix": False,
            "token_type": [2, 3, 3] + [3] * 16 + [6] * 256 + [1] * (1200 - 275),
            "scores": [piece.score for piece in proto.pieces],
        }  # fmt: skip
        found = {name: reader.get_field(f"tokenizer.ggml.{name}").contents() for name in expected}
        assert found == expected

    def test_names_of_control_pieces_are_in_no_text(self, reader):
        names = reader.get_field("tokenizer.ggml.tokens").contents()
        assert names[:4] == ["<unk>\ufdd3", "<s>\ufdd3", "</s>\ufdd3", "<|reserved_0|>\ufdd3"]
        assert names[19:21] == ["<0x00>", "<0x01>"]

    def test_of_sampling(self, reader):
        found = {name: reader.get_field(f"general.sampling.{name}").contents() for name in SAMPLING}
        assert found == pytest.approx(SAMPLING)
        assert reader.get_field("general.sampling.sequence").contents() == "temperature;top_k;top_p"

    def test_of_a_unigram_tokenizer(self, tmp_path):
        spm = make_tokenizer("")
        network = network_for(spm)
        write(tmp_path / "unigram.gguf", network, random_params(network), spm)
        reader = gguf.GGUFReader(tmp_path / "unigram.gguf")
        proto = sentencepiece_model_pb2.ModelProto.FromString(spm.model)
        assert reader.get_field("tokenizer.ggml.model").contents() == "t5"
        found = reader.get_field("tokenizer.ggml.precompiled_charsmap").contents()
        assert bytes(found) == proto.normalizer_spec.precompiled_charsmap


def from_gguf(reader) -> dict[str, np.ndarray]:
    """Tensors by name, as float32 again."""
    return {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}


NAMES = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm", "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip


@pytest.mark.parametrize(("kind", "error"), [("float32", 0), ("bfloat16", 2**-8), ("q8_0", 2**-7)])
def test_tensors(bpe, tmp_path, kind, error):
    """The Qwen3's, under GGUF's names; rounding is relative to a value, or to the greatest of its 32."""
    network = dataclasses.replace(network_for(bpe), emb_dim=32, qkv_dim=32, mlp_dim=48)  # 48 is no multiple of 32
    params = random_params(network)
    write(tmp_path / "model.gguf", network, params, bpe, kind)
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    found, expected = from_gguf(reader), theirs(network, params)
    assert len(found) == len(expected)
    for name, values in found.items():
        *layer, short, _ = name.split(".")
        original = expected[(f"model.layers.{layer[1]}." if layer else "") + f"{NAMES[short]}.weight"]
        assert values.shape == original.shape
        assert np.abs(values - original).max() <= (error * np.abs(original).max() if values.ndim > 1 else 0)
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    names = {"float32": "F32", "bfloat16": "BF16", "q8_0": "Q8_0"}
    assert types["blk.0.ffn_up.weight"] == names[kind]
    assert types["blk.1.ffn_down.weight"] == ("F32" if kind == "q8_0" else names[kind])
    assert types["output_norm.weight"] == "F32"


def test_the_originals_network_is_refused(bpe):
    spm = tokenizer.Tokenizer.load(FIXTURE / "sentencepiece_model")
    with pytest.raises(UserError, match="does not compute the original's network"):
        gguf_file.check(network_for(spm, "square"), spm, "original")


@pytest.mark.parametrize("name", ["phi3-tales", "my-Phi-3"])
def test_names_by_which_llama_cpp_goes(bpe, name):
    with pytest.raises(UserError, match="models with names like"):
        gguf_file.check(network_for(bpe), bpe, name)


ALL = {
    "model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False, "add_dummy_prefix": False,
}  # fmt: skip


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (ALL, ""),
        (ALL | {"add_dummy_prefix": True}, ""),
        (ALL | {"user_defined_symbols": "お爺さん,お爺,<sep>"}, ""),
        ({}, ""),
        ({"add_dummy_prefix": False, "remove_extra_whitespaces": False, "normalization_rule_name": "nfkc"}, ""),
        ({"model_type": "char"}, "model_type=char"),
        (ALL | {"treat_whitespace_as_suffix": True}, "white space as a suffix"),
        (
            ALL | {"user_defined_symbols": "<|im_end|>"},
            r"the piece '<\|im_end\|>', which llama.cpp takes for a control",
        ),
        (ALL | {"byte_fallback": False}, "--byte_fallback=false; llama.cpp's BPE needs --byte_fallback=true"),
        (ALL | {"remove_extra_whitespaces": True}, "BPE needs --remove_extra_whitespaces=false"),
        (ALL | {"normalization_rule_name": "nfkc"}, "BPE needs --normalization_rule_name=identity"),
        (ALL | {"add_dummy_prefix": True, "user_defined_symbols": "、"}, "user-defined symbols and --add_dummy_prefix"),
        (ALL | {"user_defined_symbols": ["a b"]}, "'a b' with a space"),
        (ALL | {"user_defined_symbols": ["▁"]}, "'▁' with a space"),
        (ALL | {"user_defined_symbols": "昔々,々あ"}, "'昔々' and '々あ', which may overlap"),
        (ALL | {"user_defined_symbols": "0x41>"}, ""),  # which no merge leads to
        ({"byte_fallback": True}, "a unigram model with byte fallback"),
        ({"normalization_rule_name": "nfkc_cf"}, "normalizes by 'nfkc_cf'"),
        ({"user_defined_symbols": "、"}, "user-defined symbols, which count otherwise"),
        ({"add_dummy_prefix": False}, "can have both or none"),
        ({"remove_extra_whitespaces": False}, "can have both or none"),
    ],
)
def test_tokenizers(options, words):
    """Those that llama.cpp has, and those that it has not."""
    model = io.BytesIO()
    texts = iter([mukashi.tale(number).replace("、", " ") for number in range(100)])
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=texts, model_writer=model, vocab_size=1200, hard_vocab_limit=False, minloglevel=2, **options
    )
    spm = tokenizer.Tokenizer(model.getvalue(), "this/sentencepiece_model")
    if not words:
        gguf_file.check(network_for(spm), spm, "tales")
        return
    with pytest.raises(UserError, match=words) as raised:
        gguf_file.check(network_for(spm), spm, "tales")
    assert str(raised.value).startswith("this/sentencepiece_model ")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("pieces", "refused"), [(["<0x", "41>"], True), (["0x41>"], True), (["<0x4"], False)])
def test_pieces_that_make_up_a_bytes_name(bpe, pieces, refused):
    proto = sentencepiece_model_pb2.ModelProto.FromString(bpe.model)
    for number, piece in enumerate(pieces):
        proto.pieces[-1 - number].piece = piece
    spm = tokenizer.Tokenizer(proto.SerializeToString())
    if not refused:
        gguf_file.check(network_for(spm), spm, "tales")
        return
    with pytest.raises(UserError, match="pieces that make up <0x41>"):
        gguf_file.check(network_for(spm), spm, "tales")
