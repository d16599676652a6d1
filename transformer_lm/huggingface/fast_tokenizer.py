"""A SentencePiece model as a fast tokenizer of the library `tokenizers`, for the tools of the Hugging Face world.

The same ids for the same text; docs/huggingface.md counts where the two part. What makes them equal:

- SentencePiece's normalization tables are NFKC, and for "nmt_nfkc" some characters more that become nothing or spaces.
  `tokenizers` can read the tables (`Precompiled`), but looks up a whole grapheme at once and takes the first rule that
  fits: か + U+3099 stays in two, other marks are lost. So its own NFKC goes first, and leaves to the table only the
  characters that are younger than itself.
- No splitting into words: like SentencePiece's, the search for the best pieces runs over the whole text.
- SentencePiece finds user-defined symbols before it normalizes: stand-ins take their places meanwhile.
- The names of control pieces (`<s>`) are ordinary text where they stand in a text. `tokenizers` would look for them
  in it, so they get names that no text holds. Tokens that are added later are found under the names they are given.
"""

import itertools
import random
import re
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from sentencepiece import sentencepiece_model_pb2

from transformer_lm.errors import UserError
from transformer_lm.extras import optional_import
from transformer_lm.files import write_json
from transformer_lm.huggingface.tensor_tables import SPECIAL_TOKENS
from transformer_lm.tokenizer import NAME_MARK, SPACE, START_ID, UNK_ID, Tokenizer
from transformer_lm.tokenizer.turns import Turns

NORMALIZATIONS = ("identity", "nfkc", "nmt_nfkc")
# What "nmt_nfkc" has that NFKC has not (SentencePiece's builder.cc), as classes of regular expressions.
NMT_NOTHING = r"[\x01-\x08\x0b\x0e-\x1f\x7f\x8f\x9f]"
NMT_SPACES = r"[\t\n\f\r\u061c\u1680\u200b\u200c\u200e\u200f\u2028\u2029\u2581\ufeff\ufffd]"
NMT_KEPT = "～"  # U+FF5E, which NFKC would make a tilde
# Code points that Unicode keeps free for uses like these, so that no text holds them.
STAND_IN, SYMBOL_MARK, BEGIN = "\ufdd0", "\ufdd1", "\ufdd2"  # and NAME_MARK
# What is easily cut otherwise: compared before every export.
HARD_STRINGS = (
    "", " ", "  昔々  あるところに ", "<s>昔々</s>", "a<unk>b", "<0x41>", "ｶﾞ", "か\u3099", "Ａ①㌀", "\t昔\n", "▁昔▁",
    "\x01昔", "\u200b昔", "👨\u200d👩\u200d👧", "𠮷野家", "é e\u0301",
)  # fmt: skip
TIE = 1e-3  # sums of scores that differ by less are equal but for rounding
SYMBOL_SCORE = 0.1  # a byte after a user-defined symbol's first in a unigram model, as SentencePiece 0.2.3 counts


def save(folder: Path, tokenizer: Tokenizer, max_length: int, turns: Turns | None = None, texts: Sequence[str] = ()):
    """Writes tokenizer.json and tokenizer_config.json.

    Args:
      folder: where to.
      tokenizer: what cuts texts.
      max_length: what users are warned above.
      turns: how the model takes turns; their template is written.
      texts: what it has to cut as the tokenizer does, besides texts that are hard to; some of the corpus, say.

    Raises:
      UserError: the SentencePiece model has no counterpart, or one that gives other ids.
    """
    fast = convert(tokenizer)
    check_same_ids(tokenizer, fast, [*HARD_STRINGS, *_texts_of_pieces(tokenizer), *texts])
    (folder / "tokenizer.json").write_text(fast.to_str(pretty=True), encoding="utf-8")
    special = SPECIAL_TOKENS | {"unk_token_id": UNK_ID}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{name.removesuffix("_id"): fast.id_to_token(number) for name, number in special.items()},
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": max_length,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        **({"chat_template": turns.jinja()} if turns else {}),
    }
    write_json(folder / "tokenizer_config.json", settings)


def convert(tokenizer: Tokenizer) -> Any:
    """The `tokenizers.Tokenizer` that gives a text the ids which `tokenizer` gives it, with START_ID put in front.

    Raises:
      UserError: the SentencePiece model is of a kind that has no counterpart.
    """
    tokenizers = optional_import("tokenizers", "hf", "The export")
    proto = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.model)
    if reason := _obstacle(proto) or _changed_overlap(tokenizers, proto):
        raise UserError(f"{tokenizer.source} {reason}.")
    names = names_of(proto)
    fast = tokenizers.Tokenizer(_model(tokenizers, proto, names))
    fast.normalizer = _normalizer(tokenizers, proto.normalizer_spec, _symbols(proto))
    fast.pre_tokenizer = _pre_tokenizer(tokenizers, proto)
    fast.decoder = _decoder(tokenizers, proto.normalizer_spec)
    start = names[START_ID]
    fast.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{start} $A", pair=f"{start} $A $B", special_tokens=[(start, START_ID)]
    )
    fast.add_special_tokens([name for name in names if name.endswith(NAME_MARK)])
    return fast


def check_same_ids(tokenizer: Tokenizer, fast: Any, texts: list[str]):
    """Raises UserError where the two cut a text differently, unless both ways are equally good by the pieces' scores.

    SentencePiece adds scores up in float32: between ways that are equally good its rounding decides.
    """
    proto = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.model)
    scores = _scores(proto)
    for text, encoding in zip(texts, fast.encode_batch(texts, add_special_tokens=False), strict=True):
        ids = tokenizer.encode(text)
        same = encoding.ids == ids
        if not same and proto.trainer_spec.model_type == proto.trainer_spec.UNIGRAM:
            same = abs(sum(scores[i] for i in ids) - sum(scores[i] for i in encoding.ids)) < TIE
        if not same:
            raise UserError(
                f"{tokenizer.source} cannot be exported: a fast tokenizer cuts {text!r} into {encoding.tokens}, "
                f"SentencePiece into {tokenizer.pieces(text)}."
            )


def _texts_of_pieces(tokenizer: Tokenizer) -> list[str]:
    """Texts that hold every piece, in an order that is random but always the same."""
    ids = list(range(tokenizer.vocab_size))
    random.Random(0).shuffle(ids)
    return [tokenizer.decode(ids[start : start + 20]) for start in range(0, len(ids), 20)]


def _obstacle(proto: Any) -> str:
    """Why a SentencePiece model has no counterpart; nothing where it has one."""
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    if trainer.model_type not in (trainer.UNIGRAM, trainer.BPE):
        kind = trainer.ModelType.Name(trainer.model_type).lower()
        return f"is of model_type={kind}; unigram and bpe can be exported"
    if normalizer.name not in NORMALIZATIONS:
        return (
            f"normalizes by {normalizer.name!r}, which a fast tokenizer cannot follow; "
            f"one of {', '.join(NORMALIZATIONS)} can be exported"
        )
    if trainer.treat_whitespace_as_suffix or not normalizer.escape_whitespaces:
        return "treats white space as a suffix or does not escape it, which a fast tokenizer cannot follow"
    for symbol in _symbols(proto):
        if normalizer.remove_extra_whitespaces and (symbol != symbol.strip(" ") or "  " in symbol):
            return f"removes extra white space, but its user-defined symbol {symbol!r} has some"
    for piece in proto.pieces:
        if trainer.byte_fallback and re.search("<0x|<0$", piece.piece) and piece.type != piece.BYTE:
            return f"has the piece {piece.piece!r}, which a fast tokenizer cannot tell from the names of byte pieces"
    return ""


def _changed_overlap(tokenizers: ModuleType, proto: Any) -> str:
    """Why user-defined symbols cannot be protected from normalization, one after the other; nothing where they can."""
    symbols, plain = _symbols(proto), _normalizer(tokenizers, proto.normalizer_spec, [])
    changed = [text for text in symbols if plain.normalize_str(f"。{text}。") != f"。{text}。".replace(" ", SPACE)]
    for one, other in itertools.product(changed, symbols):
        ends = range(1, min(len(one), len(other)))
        if any(one.endswith(other[:k]) or other.endswith(one[:k]) for k in ends):
            return f"normalizes its user-defined symbol {one!r}, which may overlap with {other!r} in a text"
    return ""


def names_of(proto: Any) -> list[str]:
    """The pieces as they are called in the export."""
    marked = (sentencepiece_model_pb2.ModelProto.SentencePiece.CONTROL, proto.pieces[UNK_ID].type)
    return [piece.piece + NAME_MARK * (piece.type in marked) for piece in proto.pieces]


def _model(tokenizers: ModuleType, proto: Any, names: list[str]) -> Any:
    """The vocabulary, and how the best pieces are found."""
    pieces, spec = proto.pieces, proto.trainer_spec
    if spec.model_type == spec.UNIGRAM:
        return tokenizers.models.Unigram(
            list(zip(names, _scores(proto), strict=True)), unk_id=UNK_ID, byte_fallback=spec.byte_fallback
        )
    return tokenizers.models.BPE(
        {name: number for number, name in enumerate(names)}, _merges(pieces),
        unk_token=names[UNK_ID], fuse_unk=True, byte_fallback=spec.byte_fallback,
        ignore_merges=bool(_symbols(proto)),  # those are cut off as words, and no merges lead to them
    )  # fmt: skip


def _symbols(proto: Any) -> list[str]:
    """The user-defined symbols, longest first."""
    symbols = [piece.piece for piece in proto.pieces if piece.type == piece.USER_DEFINED]
    return sorted(symbols, key=len, reverse=True)


def _scores(proto: Any) -> list[float]:
    """What the search for the best pieces of a unigram model counts."""
    return [
        SYMBOL_SCORE * (len(piece.piece.encode()) - 1) if piece.type == piece.USER_DEFINED else piece.score
        for piece in proto.pieces
    ]


def _merges(pieces: Any) -> list[tuple[str, str]]:
    """The merges of a BPE model, first ones first: every way to make a piece of two, by the piece's score."""
    ids = {piece.piece: number for number, piece in enumerate(pieces) if piece.type == piece.NORMAL}
    merges = []
    for text, number in ids.items():
        pairs = ((text[:cut], text[cut:]) for cut in range(1, len(text)))
        known = sorted((ids[left], ids[right]) for left, right in pairs if left in ids and right in ids)
        merges += [(-pieces[number].score, number, pieces[left].piece, pieces[right].piece) for left, right in known]
    return [(left, right) for *_, left, right in sorted(merges, key=lambda merge: merge[:2])]


def _normalizer(tokenizers: ModuleType, spec: Any, symbols: list[str]) -> Any:
    """What SentencePiece does to a text before it looks for pieces, but for the space that it puts in front.

    In a text with added tokens `tokenizers` does this to each part between them.
    """
    n, regex = tokenizers.normalizers, tokenizers.Regex
    symbols = symbols if spec.name != "identity" else []
    stand_ins = [(text, _stand_in(i)) for i, text in enumerate(symbols)]
    steps = []
    if spec.add_dummy_prefix and spec.name != "identity":  # what `_pre_tokenizer` would not know for a beginning
        begins = "|".join([NMT_NOTHING, *map(re.escape, symbols)])
        steps += [n.Prepend(BEGIN), n.Replace(regex(rf"\A{BEGIN}(?!{begins})"), "")]
    steps += [n.Replace(text, stand_in) for text, stand_in in stand_ins]
    if spec.name == "nfkc":
        steps += [n.NFKC()]
    if spec.name == "nmt_nfkc":
        steps += [n.Replace(NMT_KEPT, STAND_IN), n.NFKC(), n.Replace(STAND_IN, NMT_KEPT)]
        steps += [n.Replace(regex(NMT_NOTHING), ""), n.Replace(regex(NMT_SPACES), " ")]
    if spec.precompiled_charsmap:
        steps += [n.Precompiled(spec.precompiled_charsmap)]
    if spec.remove_extra_whitespaces:
        steps += [n.Replace(regex(" {2,}"), " "), n.Replace(regex(rf"(?<=\A{BEGIN}) "), "")]
        steps += [] if spec.add_dummy_prefix else [n.Replace(regex(r"\A "), "")]
    steps += [n.Replace(stand_in, text) for text, stand_in in stand_ins]
    if spec.remove_extra_whitespaces:
        steps += [n.Replace(regex(rf"\A{BEGIN}?[ {SPACE}]*\z|[ {SPACE}]+\z"), "")]
    if spec.remove_extra_whitespaces and spec.add_dummy_prefix:
        steps += [n.Replace(regex(r"(?!\A) "), SPACE)]  # a space at the beginning becomes the one in front
    else:
        steps += [n.Replace(" ", SPACE)]
    return n.Sequence([*steps, n.Replace(BEGIN, BEGIN + SPACE)])


def _stand_in(number: int) -> str:
    """What stands in the place of a user-defined symbol: a mark, and a number written in other such code points."""
    return SYMBOL_MARK + "".join(chr(0xFDE0 + int(digit, 16)) for digit in f"{number:04x}")


def _pre_tokenizer(tokenizers: ModuleType, proto: Any) -> Any:
    """Puts a space in front of a text, and cuts off what is not to be merged."""
    p, spec = tokenizers.pre_tokenizers, proto.normalizer_spec
    steps = []
    if spec.add_dummy_prefix:  # of a text alone, not of what follows an added token in it
        steps += [p.Metaspace(" ", prepend_scheme="first", split=False), p.Metaspace(SPACE, "never", split=False)]
        steps += [p.Split(tokenizers.Regex(rf"\A({SPACE}{BEGIN}|{BEGIN}{SPACE})"), "removed")]
    if proto.trainer_spec.byte_fallback:  # "<0x41>" in a text is text
        steps += [p.Split(tokenizers.Regex("<(?=0x[0-9A-F]{2}>)"), "merged_with_previous")]
    if proto.trainer_spec.model_type == proto.trainer_spec.BPE and (symbols := _symbols(proto)):
        steps += [p.Split(tokenizers.Regex("|".join(map(re.escape, symbols))), "isolated")]
    return p.Sequence(steps)


def _decoder(tokenizers: ModuleType, spec: Any) -> Any:
    """Pieces to text: bytes to characters, U+2581 to spaces, without the space that was put in front."""
    d = tokenizers.decoders
    steps = [d.Replace(NAME_MARK, ""), d.ByteFallback(), d.Fuse(), d.Replace(SPACE, " ")]
    if spec.remove_extra_whitespaces:
        steps += [d.Strip(" ", 2**31 - 1, 0)]
    elif spec.add_dummy_prefix:
        steps += [d.Strip(" ", 1, 0)]
    return d.Sequence(steps)
