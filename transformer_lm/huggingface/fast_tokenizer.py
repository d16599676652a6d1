"""A SentencePiece model as a fast tokenizer of the library `tokenizers`, for the tools of the Hugging Face world.

The same ids for the same text; docs/huggingface.md counts where the two part. What makes them equal:

- SentencePiece's normalization tables are NFKC, and for "nmt_nfkc" some characters more that become nothing or spaces.
  `tokenizers` can read the tables (`Precompiled`), but looks up a whole grapheme at once and takes the first rule that
  fits: か + U+3099 stays in two, other marks are lost. So its own NFKC goes first, and leaves to the table only the
  characters that are younger than itself.
- No splitting into words: like SentencePiece's, the search for the best pieces runs over the whole text.
- The names of control and byte pieces (`<s>`, `<0x41>`) are ordinary text where they stand in a text.
"""

import re
from pathlib import Path
from types import ModuleType
from typing import Any

from sentencepiece import sentencepiece_model_pb2

from transformer_lm.errors import UserError
from transformer_lm.extras import optional_import
from transformer_lm.files import write_json
from transformer_lm.huggingface.tensor_tables import SPECIAL_TOKENS
from transformer_lm.tokenizer import START_ID, UNK_ID, Tokenizer

SPACE = "▁"  # U+2581, what SentencePiece writes a space as
NORMALIZATIONS = ("identity", "nfkc", "nmt_nfkc")
# What "nmt_nfkc" has that NFKC has not (SentencePiece's builder.cc), as classes of regular expressions.
NMT_NOTHING = r"[\x01-\x08\x0b\x0e-\x1f\x7f\x8f\x9f]"
NMT_SPACES = r"[\t\n\f\r\u061c\u1680\u200b\u200c\u200e\u200f\u2028\u2029\u2581\ufeff\ufffd]"
NMT_KEPT = "～"  # U+FF5E, which NFKC would make a tilde
STAND_IN = "\ufdd0"  # a code point that is no character, and stands in no text


def save(folder: Path, tokenizer: Tokenizer, max_length: int):
    """Writes tokenizer.json and tokenizer_config.json; `max_length` is what users are warned above."""
    fast = convert(tokenizer)
    fast.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{
            name.replace("_id", ""): fast.id_to_token(number)
            for name, number in (SPECIAL_TOKENS | {"unk_token_id": UNK_ID}).items()
        },
        "split_special_tokens": True,  # "</s>" in a text is text
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": max_length,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
    }
    write_json(folder / "tokenizer_config.json", settings)


def convert(tokenizer: Tokenizer) -> Any:
    """The `tokenizers.Tokenizer` that gives a text the ids which `tokenizer` gives it, with START_ID put in front.

    Raises:
      UserError: the SentencePiece model is of a kind that has no counterpart.
    """
    tokenizers = optional_import("tokenizers", "hf", "The export")
    proto = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.model)
    if proto.normalizer_spec.name not in NORMALIZATIONS:
        raise UserError(
            f"{tokenizer.source} normalizes by {proto.normalizer_spec.name!r}, which a fast tokenizer cannot follow; "
            f"one of {', '.join(NORMALIZATIONS)} can be exported."
        )
    if proto.trainer_spec.treat_whitespace_as_suffix:
        raise UserError(f"{tokenizer.source} treats white space as a suffix, which a fast tokenizer cannot follow.")
    fast = tokenizers.Tokenizer(_model(tokenizers, proto, tokenizer))
    fast.normalizer = _normalizer(tokenizers, proto.normalizer_spec)
    for symbol in _symbols(proto):  # which SentencePiece takes out of a text before it normalizes
        if fast.normalizer.normalize_str(f"。{symbol}").removeprefix(SPACE) != f"。{symbol}":
            raise UserError(f"{tokenizer.source}: normalization changes the user-defined symbol {symbol!r}.")
    fast.pre_tokenizer = _pre_tokenizer(tokenizers, proto)
    fast.decoder = _decoder(tokenizers, proto.normalizer_spec)
    start = proto.pieces[START_ID].piece
    fast.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{start} $A", pair=f"{start} $A $B", special_tokens=[(start, START_ID)]
    )
    fast.add_special_tokens([piece.piece for piece in proto.pieces if piece.type in (piece.CONTROL, piece.UNKNOWN)])
    return fast


def _model(tokenizers: ModuleType, proto: Any, tokenizer: Tokenizer) -> Any:
    """The vocabulary, and how the best pieces are found."""
    pieces, spec = proto.pieces, proto.trainer_spec
    if spec.model_type == spec.UNIGRAM:
        best = max((piece.score for piece in pieces if piece.type == piece.NORMAL), default=0.0)
        vocabulary = [(piece.piece, _score(piece, best)) for piece in pieces]
        return tokenizers.models.Unigram(vocabulary, unk_id=UNK_ID, byte_fallback=spec.byte_fallback)
    if spec.model_type == spec.BPE:
        return tokenizers.models.BPE(
            {piece.piece: number for number, piece in enumerate(pieces)},
            _merges(pieces),
            unk_token=pieces[UNK_ID].piece,
            fuse_unk=True,
            byte_fallback=spec.byte_fallback,
            ignore_merges=bool(_symbols(proto)),  # those are cut off as words, and no merges lead to them
        )
    kind = spec.ModelType.Name(spec.model_type).lower()
    raise UserError(f"{tokenizer.source} is of model_type={kind}; unigram and bpe can be exported.")


def _symbols(proto: Any) -> list[str]:
    """The user-defined symbols, longest first."""
    symbols = [piece.piece for piece in proto.pieces if piece.type == piece.USER_DEFINED]
    return sorted(symbols, key=len, reverse=True)


def _score(piece: Any, best: float) -> float:
    """What the search for the best pieces counts; SentencePiece prefers user-defined symbols by this formula."""
    return len(piece.piece.encode()) * best - 0.1 if piece.type == piece.USER_DEFINED else piece.score


def _merges(pieces: Any) -> list[tuple[str, str]]:
    """The merges of a BPE model, first ones first: every way to make a piece of two, by the piece's score."""
    ids = {piece.piece: number for number, piece in enumerate(pieces) if piece.type == piece.NORMAL}
    merges = []
    for text, number in ids.items():
        pairs = ((text[:cut], text[cut:]) for cut in range(1, len(text)))
        known = sorted((ids[left], ids[right]) for left, right in pairs if left in ids and right in ids)
        merges += [(-pieces[number].score, number, pieces[left].piece, pieces[right].piece) for left, right in known]
    return [(left, right) for *_, left, right in sorted(merges, key=lambda merge: merge[:2])]


def _normalizer(tokenizers: ModuleType, spec: Any) -> Any:
    """What SentencePiece does to a text before it looks for pieces."""
    n, regex = tokenizers.normalizers, tokenizers.Regex
    steps = []
    if spec.add_dummy_prefix and not spec.remove_extra_whitespaces:
        steps += [n.Prepend(" ")]  # before what may leave nothing to put it in front of
    if spec.name == "nfkc":
        steps += [n.NFKC()]
    if spec.name == "nmt_nfkc":
        steps += [n.Replace(NMT_KEPT, STAND_IN), n.NFKC(), n.Replace(STAND_IN, NMT_KEPT)]
        steps += [n.Replace(regex(NMT_NOTHING), ""), n.Replace(regex(NMT_SPACES), " ")]
    if spec.precompiled_charsmap:
        steps += [n.Precompiled(spec.precompiled_charsmap)]
    if spec.remove_extra_whitespaces:
        steps += [n.Replace(regex(r"\A +"), ""), n.Replace(regex(" {2,}"), " ")]
    if spec.escape_whitespaces:
        steps += [n.Replace(" ", SPACE)]
    if spec.remove_extra_whitespaces:
        steps += [n.Replace(regex(rf"{SPACE}+\z"), "")]
        if spec.add_dummy_prefix:
            steps += [n.Prepend(SPACE)]
    return n.Sequence(steps)


def _pre_tokenizer(tokenizers: ModuleType, proto: Any) -> Any:
    """Cuts user-defined symbols off, and what reads like the name of a control or byte piece, so that it is none."""
    names = [piece.piece for piece in proto.pieces if piece.type in (piece.CONTROL, piece.UNKNOWN)]
    patterns = [f"{re.escape(name[0])}(?={re.escape(name[1:])})" for name in names]
    if proto.trainer_spec.byte_fallback:
        patterns.append("<(?=0x[0-9A-F]{2}>)")
    split = tokenizers.pre_tokenizers.Split
    steps = [split(tokenizers.Regex("|".join(patterns)), behavior="merged_with_previous")]
    if symbols := _symbols(proto):
        steps += [split(tokenizers.Regex("|".join(map(re.escape, symbols))), behavior="isolated")]
    return tokenizers.pre_tokenizers.Sequence(steps)


def _decoder(tokenizers: ModuleType, spec: Any) -> Any:
    """Pieces to text: bytes to characters, U+2581 to spaces, without the space that was put in front."""
    d = tokenizers.decoders
    steps = [d.Replace(SPACE, " "), d.ByteFallback(), d.Fuse()]
    if spec.remove_extra_whitespaces:
        steps += [d.Strip(" ", 2**31 - 1, 0)]
    elif spec.add_dummy_prefix:
        steps += [d.Strip(" ", 1, 0)]
    return d.Sequence(steps)
