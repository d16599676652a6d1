"""Training a SentencePiece model on a sample of a corpus."""

import hashlib
import heapq
import io
import os
import re
import shlex
from collections.abc import Callable, Iterable

import sentencepiece
from absl import logging
from sentencepiece import sentencepiece_model_pb2

from transformer_lm import console
from transformer_lm.errors import UserError
from transformer_lm.tokenizer import Tokenizer, split_text

SAMPLE_CHARS = 1000  # texts are sampled for training in runs of at most this many characters
LOUD_CHARS = 20_000_000  # with more of them training takes minutes, and SentencePiece's own progress is shown
SCORE_STEP = 2**-8
# Arguments that this project gives itself, and where a recipe says what they are.
OURS = dict.fromkeys(("input", "model_prefix", "sentence_iterator"), "the corpus is the recipe's") | {
    "vocab_size": "set the recipe's vocab_size",
    **dict.fromkeys(("model_writer", "logstream", "arg"), "it is no option of SentencePiece's trainer"),
}
# Options that the trial has of its own, and what they look like.
TIED_TO_CORPUS = {
    "seed_sentencepiece_size": r"[1-9]\d{0,8}",
    "num_threads": r"[1-9]\d{0,2}",
    "minloglevel": r"\d",
    "hard_vocab_limit": "1|t|true|y|yes|0|f|false|n|no",
}
TRIAL_TEXT = "昔々 ある ところに、 おじいさんと おばあさんが おりました。 A fox jumps over the lazy dog 0123456789."


def train(mixture: list[tuple[Iterable[str], float]], vocab_size: int, max_corpus_chars: int, options: str) -> bytes:
    """Trains a unigram SentencePiece model on at most `max_corpus_chars` characters spread over a corpus.

    Args:
      mixture: (texts, weight) of each part of the corpus; each is read once, and gives its share of the characters.
      vocab_size: number of pieces.
      max_corpus_chars: how many characters to learn from.
      options: further options of SentencePiece's trainer, as on its command line: "--character_coverage=0.9995".
        They win over what is chosen here, a unigram model.

    Returns:
      the bytes of the model file.

    Raises:
      UserError: SentencePiece refuses an option, or the corpus cannot fill the vocabulary.
    """
    given = _parse_options(options)
    with console.progress("Reading texts for the tokenizer") as report:
        shares = [(texts, int(max_corpus_chars * weight)) for texts, weight in mixture]
        sample = [run for texts, max_chars in shares for run in sample_texts(texts, max_chars, report)]
    chars = sum(map(len, sample))
    quiet = int(chars < LOUD_CHARS)
    arguments = {"vocab_size": vocab_size, "model_type": "unigram", "minloglevel": quiet} | given
    logging.info("Training a tokenizer of %s pieces on %d characters.", arguments["vocab_size"], chars)
    lines = (line for text in sample for line in text.split("\n") if line)
    return _with_round_scores(_train(lines, arguments, options))


def check_options(options: str, vocab_size: int):
    """Raises UserError where SentencePiece, or this project, refuses the options, without any corpus.

    Refused, too, is a vocabulary that the options' own pieces fill (control pieces, symbols, bytes): none is learned.
    """
    given = _parse_options(options)
    for name, pattern in TIED_TO_CORPUS.items():
        if not re.fullmatch(pattern, given.get(name, "1").lower()):
            raise UserError(f"spm_train_options: --{name}={given[name]} is not possible.")
    trial = {"vocab_size": 10_000, "hard_vocab_limit": "false", "minloglevel": 2, "num_threads": 1}
    given = {name: value for name, value in given.items() if name not in TIED_TO_CORPUS}
    pieces = sentencepiece_model_pb2.ModelProto.FromString(
        _train(TRIAL_TEXT.split() * 5, given | trial, options)
    ).pieces
    fixed = sum(piece.type != piece.NORMAL for piece in pieces)
    if vocab_size <= fixed:
        raise UserError(
            f"vocab_size={vocab_size} is too small: {fixed} pieces are taken before any is learned (<unk>, <s>, </s>, "
            "and those of spm_train_options); set more than that and the corpus's different characters."
        )


def _train(lines: Iterable[str], arguments: dict, options: str) -> bytes:
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=model, **arguments)
    except Exception as error:  # RuntimeError, OSError and more, by the option
        raise UserError(_explain(str(error), arguments)) from error
    Tokenizer(model.getvalue(), f"The tokenizer that spm_train_options={options!r} makes")  # refuses other ids
    return model.getvalue()


def _with_round_scores(model: bytes) -> bytes:
    """The model with its pieces' scores, log probabilities, rounded to multiples of SCORE_STEP.

    SentencePiece adds scores up in float32. With scores of 24 bits the sum's rounding depends on all the text before,
    and decides between ways to cut that are equally good ("……" + "…" or "…" + "……"). Sums of round scores are exact up
    to 2^16, some thousand tokens: the same words are cut alike wherever they stand, and by other programs too.
    """
    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    for piece in proto.pieces:
        piece.score = round(piece.score / SCORE_STEP) * SCORE_STEP
    return proto.SerializeToString()


def sample_texts(texts: Iterable[str], max_chars: int, report: Callable[[int], None] | None = None) -> list[str]:
    """An even sample of at most `max_chars` characters of a corpus, in the corpus's order, in one pass.

    Every run of at most `SAMPLE_CHARS` characters gets a pseudo-random rank from its number, and the runs of highest
    rank that fit are kept, so that memory is bounded by `max_chars` and the same corpus always gives the same sample.
    `report` is told from time to time how many characters have been read.
    """
    heap: list[tuple[bytes, int, str]] = []  # (rank, number, run), the lowest rank on top
    total = read = 0
    runs = (run for text in texts for run in split_text(text, SAMPLE_CHARS) if run.strip("\n"))
    for number, run in enumerate(runs):
        read += len(run)
        if report and number % 1000 == 0:
            report(read)
        rank = hashlib.blake2b(number.to_bytes(8, "little"), digest_size=8).digest()
        heapq.heappush(heap, (rank, number, run))
        total += len(run)
        while total > max_chars and len(heap) > 1:
            total -= len(heapq.heappop(heap)[2])
    return [run[:max_chars] for _, _, run in sorted(heap, key=lambda item: item[1])]


def _parse_options(options: str) -> dict[str, str]:
    """ "--a=b --c=d" -> {"a": "b", "c": "d"}."""
    parsed = {}
    try:
        words = shlex.split(options)
    except ValueError as error:
        raise UserError(f"spm_train_options={options!r} cannot be read: {error}.") from error
    for option in words:
        match = re.fullmatch(r"--([a-z_]+)(?:=(.*))?", option, re.DOTALL)
        if match is None:
            raise UserError(f"spm_train_options: {option!r} is not of the form --name=value.")
        if match[1] in OURS:
            raise UserError(f"spm_train_options: --{match[1]} is not yours to set: {OURS[match[1]]}.")
        if match[1].endswith(("_file", "_tsv")) and not os.path.isfile(match[2] or ""):  # SentencePiece says nothing
            raise UserError(f"spm_train_options: {option}: no such file.")
        parsed[match[1]] = "true" if match[2] is None else match[2]
    return parsed


def _explain(message: str, arguments: dict) -> str:
    """SentencePiece's error in a line of plain words."""
    size = arguments["vocab_size"]
    if match := re.search(r"Vocabulary size too high .* value <= (\d+)", message):
        return f"vocab_size={size} is more than this corpus can fill; set vocab_size to {match[1]} or less."
    if match := re.search(r"smaller than required_chars. (\d+) vs (\d+)", message):
        return f"vocab_size={size} is too small: this corpus has {match[2]} different characters; set more than that."
    if re.search(r"sentences_?\.empty\(\)|Input corpus is empty", message):
        return "The corpus holds no text to train a tokenizer on; look at dataset_name and train_split."
    options = {name: value for name, value in arguments.items() if name not in TIED_TO_CORPUS | OURS}
    given = " ".join(f"--{name}={value}" for name, value in options.items())
    return f"SentencePiece cannot train with spm_train_options {given!r}: {' '.join(message.split())}"
