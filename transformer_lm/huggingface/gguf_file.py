"""A model as one GGUF file, for llama.cpp and what is built on it: today's network, which is llama.cpp's qwen3.

llama.cpp cuts texts by code of its own, so that tokenizers count whose ids it gives, and no others:

- BPE goes by the same rules as SentencePiece's ("llama"), but normalizes nothing, and writes what no piece holds in
  bytes.
- unigram ("t5") normalizes as SentencePiece does, but has no byte pieces: what no piece holds is unknown.
- Names of control pieces get an end that no text holds, as in `fast_tokenizer`: llama.cpp looks for them in prompts.
- A text begins with START_ID, which llama.cpp is told is its BOS.
"""

import itertools
import re
from types import ModuleType
from typing import Any

import numpy as np
from flax import traverse_util
from sentencepiece import sentencepiece_model_pb2

from transformer_lm import models
from transformer_lm.errors import UserError
from transformer_lm.extras import optional_import
from transformer_lm.huggingface import exported_model, fast_tokenizer, qwen3
from transformer_lm.huggingface.architectures import table_of
from transformer_lm.huggingface.tensor_tables import SPECIAL_TOKENS
from transformer_lm.tokenizer import UNK_ID, Tokenizer
from transformer_lm.tokenizer.turns import Turns
from transformer_lm.transformer_config import TransformerConfig

ARCHITECTURE = "qwen3"  # of llama.cpp
# What matrices are stored as: the library's name of the type, and of a file of such.
TYPES = {
    "float32": ("F32", "ALL_F32"),
    "bfloat16": ("BF16", "MOSTLY_BF16"),
    "q8_0": ("Q8_0", "MOSTLY_Q8_0"),
}
SAMPLERS = "temperature;top_k;top_p"  # in our sampler's order, and nothing else
# Pieces that llama.cpp takes for control pieces, whatever their type: by their names (llama-vocab.cpp).
CONTROL_NAMES = re.compile(
    r"[▁_]?<([|｜].+|.+[|｜]|EOT|PRE|SUF|MID|PAD|REPO|reponame|fim.*|end_of_.*|eos)>|\[(EOT|EOS|PAD)\]|\[e~\["
)
STRIPPING = re.compile("phi-?3", re.IGNORECASE)  # beside special pieces llama.cpp drops spaces in models of such names


def check(network: TransformerConfig, tokenizer: Tokenizer, name: str):
    """Raises UserError where llama.cpp does not compute a network, or cuts texts in another way than its tokenizer."""
    if table_of(network).architecture != qwen3.ARCHITECTURE:
        raise UserError(
            "llama.cpp does not compute the original's network (its GPT-2 has another activation), only that of the "
            "v2 recipes; export_huggingface.py exports both."
        )
    if STRIPPING.search(name):
        raise UserError(
            f"llama.cpp cuts texts in a way of its own for models with names like {name!r}; choose another."
        )
    proto = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.model)
    if reason := _obstacle(proto):
        raise UserError(f"{tokenizer.source} {reason}.")


def save(
    path: str,
    name: str,
    network: TransformerConfig,
    params: models.Params,
    tokenizer: Tokenizer,
    sampling: dict[str, float],
    kind: str,
    turns: Turns | None = None,
):
    """Writes the file, of a network and a tokenizer that `check` lets pass.

    Memory: that of the parameters, and of one tensor more.

    Args:
      path: the file.
      name: what tools show as the model's name.
      network: what it computes.
      params: its parameters: NumPy arrays, float32.
      tokenizer: what cuts texts for it.
      sampling: how tokens are chosen unless llama.cpp is told otherwise: temp, top_k, top_p.
      kind: one of TYPES. Vectors stay float32, and so do matrices whose rows do not divide into blocks of the type.
      turns: how it takes turns in a conversation; None where it takes none.
    """
    gguf = optional_import("gguf", "gguf", "The export")
    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType[TYPES[kind][1]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for setting, value in sampling.items():
        getattr(writer, f"add_sampling_{setting}")(value)
    writer.add_sampling_sequence(SAMPLERS)
    _describe_network(writer, network)
    _describe_tokenizer(writer, sentencepiece_model_pb2.ModelProto.FromString(tokenizer.model))
    if turns:
        writer.add_chat_template(turns.jinja(space_in_front=False))
        for token in turns.exported_end_ids[:1]:
            writer.add_eot_token_id(token)
    try:
        _write_tensors(gguf, writer, network, params, gguf.GGMLQuantizationType[TYPES[kind][0]])
    finally:
        writer.close()


def _describe_network(writer: Any, network: TransformerConfig):
    writer.add_context_length(network.context)
    writer.add_block_count(network.num_layers)
    writer.add_embedding_length(network.emb_dim)
    writer.add_feed_forward_length(network.mlp_dim)
    writer.add_head_count(network.num_heads)
    writer.add_head_count_kv(network.kv_heads)
    writer.add_key_length(network.head_size)
    writer.add_value_length(network.head_size)
    writer.add_rope_freq_base(network.rope_base)
    writer.add_layer_norm_rms_eps(models.NORM_EPSILON)
    writer.add_vocab_size(network.vocab_size)


def _describe_tokenizer(writer: Any, proto: Any):
    spec = proto.normalizer_spec
    writer.add_tokenizer_model("t5" if _is_unigram(proto) else "llama")
    writer.add_token_list(fast_tokenizer.names_of(proto))
    writer.add_token_scores([piece.score for piece in proto.pieces])
    writer.add_token_types([piece.type for piece in proto.pieces])  # GGUF has SentencePiece's numbers
    writer.add_bos_token_id(SPECIAL_TOKENS["bos_token_id"])
    writer.add_eos_token_id(SPECIAL_TOKENS["eos_token_id"])
    writer.add_pad_token_id(SPECIAL_TOKENS["pad_token_id"])
    writer.add_unk_token_id(UNK_ID)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(spec.add_dummy_prefix)
    writer.add_remove_extra_whitespaces(spec.remove_extra_whitespaces)
    if spec.precompiled_charsmap:
        writer.add_precompiled_charsmap(spec.precompiled_charsmap)


def _write_tensors(gguf: ModuleType, writer: Any, network: TransformerConfig, params: models.Params, wanted: Any):
    """Writes the head of the file, then tensor by tensor."""
    table = table_of(network)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, network.num_layers)
    types = []
    for name, row, _ in exported_model.layered(table):
        shape = row.shape(table.sizes)
        fits = len(shape) > 1 and shape[-1] % gguf.GGML_QUANT_SIZES[wanted][0] == 0
        types.append(wanted if fits else gguf.GGMLQuantizationType.F32)
        values, size = gguf.GGML_QUANT_SIZES[types[-1]]  # of a block
        theirs = names.get_name(name, try_suffixes=(".weight",))
        writer.add_tensor_info(theirs, shape, np.dtype(np.float32), int(np.prod(shape)) // values * size, types[-1])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    flat = traverse_util.flatten_dict(params, sep=".")
    for (_, row, layer), kind in zip(exported_model.layered(table), types, strict=True):
        tensor = row.export(table.sizes, *exported_model.parameters(flat, row, layer))
        writer.write_tensor_data(gguf.quantize(np.ascontiguousarray(tensor), kind))


def _is_unigram(proto: Any) -> bool:
    return proto.trainer_spec.model_type == proto.trainer_spec.UNIGRAM


def _obstacle(proto: Any) -> str:
    """Why llama.cpp would give other ids than a SentencePiece model; nothing where it gives the same."""
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    if trainer.model_type not in (trainer.UNIGRAM, trainer.BPE):
        return f"is of model_type={trainer.ModelType.Name(trainer.model_type).lower()}; llama.cpp has unigram and bpe"
    if trainer.treat_whitespace_as_suffix or not normalizer.escape_whitespaces:
        return "treats white space as a suffix or does not escape it, unlike llama.cpp"
    if odd := next((piece.piece for piece in proto.pieces if _is_odd(piece)), ""):
        return f"has the piece {odd!r}, which llama.cpp takes for a control piece or leaves unused"
    return (_obstacle_of_unigram if _is_unigram(proto) else _obstacle_of_bpe)(proto)


def _is_odd(piece: Any) -> bool:
    """Whether llama.cpp treats a piece otherwise than its type says."""
    is_text = piece.type in (piece.NORMAL, piece.USER_DEFINED)
    return piece.type == piece.UNUSED or (is_text and bool(CONTROL_NAMES.fullmatch(piece.piece)))


def _obstacle_of_unigram(proto: Any) -> str:
    spec = proto.normalizer_spec
    if proto.trainer_spec.byte_fallback:
        return (
            "is a unigram model with byte fallback, which llama.cpp does not have: what SentencePiece writes in bytes, "
            "it takes for unknown; --model_type=bpe can be exported"
        )
    if spec.name not in fast_tokenizer.NORMALIZATIONS:
        return f"normalizes by {spec.name!r}; one of {', '.join(fast_tokenizer.NORMALIZATIONS)} can be exported"
    if any(piece.type == piece.USER_DEFINED for piece in proto.pieces):
        return "is a unigram model with user-defined symbols, which count otherwise in llama.cpp"
    if (spec.remove_extra_whitespaces, spec.add_dummy_prefix) not in ((True, True), (False, False)):
        return (
            "is a unigram model with one of --remove_extra_whitespaces and --add_dummy_prefix and without the other; "
            "llama.cpp can have both or none"
        )
    return ""


def _obstacle_of_bpe(proto: Any) -> str:
    spec, pieces = proto.normalizer_spec, proto.pieces
    for option, found, needed in (
        ("byte_fallback", proto.trainer_spec.byte_fallback, True),
        ("remove_extra_whitespaces", spec.remove_extra_whitespaces, False),
        ("normalization_rule_name", spec.name, "identity"),
    ):
        if found != needed:
            given, wanted = str(found).lower(), str(needed).lower()
            return f"was trained with --{option}={given}; llama.cpp's BPE needs --{option}={wanted}"
    symbols = [piece.piece for piece in pieces if piece.type == piece.USER_DEFINED]
    if symbols and spec.add_dummy_prefix:
        return "has user-defined symbols and --add_dummy_prefix, which llama.cpp would do after each of them, too"
    if spaced := [symbol for symbol in symbols if {" ", fast_tokenizer.SPACE} & set(symbol)]:
        return f"has the user-defined symbol {spaced[0]!r} with a space, which llama.cpp looks for in another form"
    for one, other in itertools.permutations(symbols, 2):
        if any(one.endswith(other[:k]) for k in range(1, min(len(one), len(other)))):
            return (
                f"has the user-defined symbols {one!r} and {other!r}, which may overlap: llama.cpp finds the longer one"
            )
    texts = {piece.piece for piece in pieces if piece.type == piece.NORMAL}
    for name in (piece.piece for piece in pieces if piece.type == piece.BYTE):
        cuts = [(name[:k], name[k:]) for k in range(1, len(name))]
        if any(all(len(part) == 1 or part in texts for part in cut) for cut in cuts):
            return f"has pieces that make up {name}, which llama.cpp cannot tell from the byte's name"
    return ""
