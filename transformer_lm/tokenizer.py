"""SentencePiece: train, load, encode, decode."""

import hashlib
import heapq
import io
import os
import re
import shlex
from collections.abc import Iterable, Iterator

import numpy as np
import sentencepiece
from absl import logging
from etils import epath

from transformer_lm.errors import UserError
from transformer_lm.files import write_atomically

UNK_ID, BOS_ID, EOS_ID = 0, 1, 2  # SentencePiece's own defaults, on which the original's weights rest
SAMPLE_CHARS = 1000  # texts are sampled for training in runs of about this many characters


class Tokenizer:
    """A trained SentencePiece model."""

    def __init__(self, model: bytes, source: str = "SentencePiece model"):
        """`model` holds the bytes of a `.model` file; `source` names it in errors. Raises UserError if it is none."""
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise UserError(f"{source} is not a SentencePiece model; delete it to train a new one.") from error
        if not model:  # SentencePiece takes no bytes for an empty model
            raise UserError(f"{source} is empty; delete it to train a new one.")
        ids = (self._processor.unk_id(), self._processor.bos_id(), self._processor.eos_id())
        if ids != (UNK_ID, BOS_ID, EOS_ID):
            raise UserError(f"{source} has the ids (unk, bos, eos) = {ids}; {(UNK_ID, BOS_ID, EOS_ID)} are needed.")
        self.model = model
        self.fingerprint = hashlib.sha256(model).hexdigest()

    @classmethod
    def load(cls, path: os.PathLike | str) -> "Tokenizer":
        """Reads a model file, local or remote."""
        path = epath.Path(path)
        if not path.exists():
            raise UserError(f"No tokenizer at {path}.")
        return cls(path.read_bytes(), str(path))

    @property
    def vocab_size(self) -> int:
        """Number of pieces, V."""
        return self._processor.vocab_size()

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without BOS and EOS."""
        return self._processor.encode(text)

    def encode_texts(self, texts: list[str]) -> list[np.ndarray]:
        """Token ids of each text, closed by EOS: int32 arrays [n]."""
        return [np.asarray(ids, np.int32) for ids in self._processor.encode(texts, add_eos=True)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; control ids such as EOS leave no trace."""
        return self._processor.decode([int(i) for i in ids])

    def pieces(self, text: str) -> list[str]:
        """The pieces that a text is cut into."""
        return self._processor.encode(text, out_type=str)


def train(texts: Iterable[str], *, vocab_size: int, max_corpus_chars: int, options: str) -> bytes:
    """Trains a unigram SentencePiece model on at most `max_corpus_chars` characters spread over `texts`.

    Args:
      texts: the corpus; read once.
      vocab_size: number of pieces.
      max_corpus_chars: how many characters to learn from.
      options: further options of SentencePiece's trainer, as on its command line: "--character_coverage=0.9995".
        They win over the ones above.

    Returns:
      the bytes of the model file.

    Raises:
      UserError: SentencePiece refuses an option, or the corpus cannot fill the vocabulary.
    """
    arguments = {"vocab_size": vocab_size, "model_type": "unigram", "minloglevel": 1} | _parse_options(options)
    sample = sample_texts(texts, max_corpus_chars)
    logging.info("Training a tokenizer of %s pieces on %d characters.", arguments["vocab_size"], sum(map(len, sample)))
    lines = (line for text in sample for line in text.split("\n") if line)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=lines, model_writer=model, **arguments)
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(_explain(str(error), arguments)) from error
    return model.getvalue()


def load_or_train(path: epath.Path, texts: Iterable[str], **arguments) -> Tokenizer:
    """The tokenizer at `path`, which is trained from `texts` (see `train`) and written there when it is missing."""
    if not path.exists():
        write_atomically(path, train(texts, **arguments))
        logging.info("Wrote the tokenizer to %s.", path)
    return Tokenizer.load(path)


def sample_texts(texts: Iterable[str], max_chars: int) -> list[str]:
    """An even sample of at most `max_chars` characters of a corpus, in the corpus's order, in one pass.

    Every run of about `SAMPLE_CHARS` characters gets a pseudo-random rank from its number, and the runs of highest rank
    that fit are kept, so that memory is bounded by `max_chars` and the same corpus always gives
    the same sample.
    """
    heap: list[tuple[bytes, int, str]] = []  # (rank, number, run), the lowest rank on top
    total = 0
    for number, run in enumerate(_runs(texts)):
        rank = hashlib.blake2b(number.to_bytes(8, "little"), digest_size=8).digest()
        heapq.heappush(heap, (rank, number, run))
        total += len(run)
        while total > max_chars and len(heap) > 1:
            total -= len(heapq.heappop(heap)[2])
    return [run[:max_chars] for _, _, run in sorted(heap, key=lambda item: item[1])]


def _runs(texts: Iterable[str]) -> Iterator[str]:
    """Cuts texts at line ends into runs of about SAMPLE_CHARS characters; a line longer than that is cut anywhere."""
    for text in texts:
        run = ""
        for line in text.split("\n"):
            run = f"{run}\n{line}" if run else line
            while len(run) >= SAMPLE_CHARS:
                yield run[:SAMPLE_CHARS]
                run = run[SAMPLE_CHARS:]
        if run:
            yield run


def _parse_options(options: str) -> dict[str, str]:
    """ "--a=b --c=d" -> {"a": "b", "c": "d"}."""
    parsed = {}
    for option in shlex.split(options):
        match = re.fullmatch(r"--([a-z_]+)=(.*)", option)
        if match is None:
            raise UserError(f"spm_train_options: {option!r} is not of the form --name=value.")
        parsed[match[1]] = match[2]
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
    return f"SentencePiece cannot train with spm_train_options and vocab_size={size}: {' '.join(message.split())}"
