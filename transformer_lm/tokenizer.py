"""SentencePiece: train, load, encode, decode.

python -m transformer_lm.tokenizer --workdir=logs/my_model --inspect "吾輩は猫である。"
"""

import argparse
import hashlib
import heapq
import io
import os
import re
import shlex
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import rich
import rich.table
import rich.text
import sentencepiece
from absl import logging
from etils import epath
from sentencepiece import sentencepiece_model_pb2

from transformer_lm import console
from transformer_lm.errors import UserError
from transformer_lm.files import write_atomically

UNK_ID, BOS_ID, EOS_ID = 0, 1, 2  # SentencePiece's own defaults, on which the original's weights rest
START_ID = UNK_ID  # what the network reads before a text's first token, as the original's does
SAMPLE_CHARS = 1000  # texts are sampled for training in runs of at most this many characters
LOUD_CHARS = 20_000_000  # with more of them training takes minutes, and SentencePiece's own progress is shown
SCORE_STEP = 2**-8
ENCODE_CHARS = 1_000_000  # longer texts are encoded in parts: SentencePiece takes some hundred bytes a character


class Tokenizer:
    """A trained SentencePiece model."""

    def __init__(self, model: bytes, source: str = "SentencePiece model"):
        """`model` holds the bytes of the file `source`, which errors name. Raises UserError if it is no model."""
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise UserError(f"{source} is not a SentencePiece model; delete it to train a new one.") from error
        if not model:  # SentencePiece takes no bytes for an empty model
            raise UserError(f"{source} is empty; delete it to train a new one.")
        ids = (self._processor.unk_id(), self._processor.bos_id(), self._processor.eos_id())
        if ids != (UNK_ID, BOS_ID, EOS_ID):
            raise UserError(f"{source} has the ids (unk, bos, eos) = {ids}; {(UNK_ID, BOS_ID, EOS_ID)} are needed.")
        self.model, self.source = model, source
        self.fingerprint = hashlib.sha256(model).hexdigest()

    @classmethod
    def load(cls, path: os.PathLike | str) -> "Tokenizer":
        """Reads a model file, local or remote."""
        path = epath.Path(path)
        if not path.exists():
            raise UserError(f"No tokenizer at {path}.")
        return cls(path.read_bytes(), str(path))

    @classmethod
    def load_for(cls, path: os.PathLike | str, vocab_size: int) -> "Tokenizer":
        """Reads the tokenizer of a model with `vocab_size` ids; raises UserError if it has another number of pieces."""
        loaded = cls.load(path)
        if loaded.vocab_size != vocab_size:
            raise UserError(
                f"{path} has {loaded.vocab_size} pieces, but the model {vocab_size}: they do not belong together."
            )
        return loaded

    @property
    def vocab_size(self) -> int:
        """Number of pieces, V."""
        return self._processor.vocab_size()

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without BOS and EOS."""
        return self._processor.encode(text)

    def encode_texts(self, texts: list[str]) -> list[np.ndarray]:
        """Token ids of each text, closed by EOS: int32 arrays [n].

        A text of more than ENCODE_CHARS characters is encoded in parts that end with lines. Its ids are those of the
        whole, since pieces do not cross white space, unless a single line is that long and must be cut elsewhere.
        """
        if any(len(text) > ENCODE_CHARS for text in texts):
            return [self._encode_parts(text) for text in texts]
        return self._encode_batch(texts)

    def _encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        return self._processor.encode(texts, add_eos=True, return_type="numpy", num_threads=1)

    def _encode_parts(self, text: str) -> np.ndarray:
        ids = self._encode_batch(list(_parts(text, ENCODE_CHARS)))
        return np.concatenate([*(part[:-1] for part in ids[:-1]), *ids[-1:]])  # the last one's EOS closes the text

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; control ids such as EOS leave no trace."""
        return self._processor.decode([int(i) for i in ids])

    def pieces(self, text: str) -> list[str]:
        """The pieces that a text is cut into."""
        return self._processor.encode(text, out_type=str)


def train(
    mixture: Iterable[tuple[Iterable[str], float]], *, vocab_size: int, max_corpus_chars: int, options: str
) -> bytes:
    """Trains a unigram SentencePiece model on at most `max_corpus_chars` characters spread over a corpus.

    Args:
      mixture: (texts, weight) of each part of the corpus; each is read once, and gives its share of the characters.
      vocab_size: number of pieces.
      max_corpus_chars: how many characters to learn from.
      options: further options of SentencePiece's trainer, as on its command line: "--character_coverage=0.9995".
        They win over the ones above.

    Returns:
      the bytes of the model file.

    Raises:
      UserError: SentencePiece refuses an option, or the corpus cannot fill the vocabulary.
    """
    given = _parse_options(options)
    with console.progress("Reading texts for the tokenizer") as report:
        sample = [
            text for texts, weight in mixture for text in sample_texts(texts, int(max_corpus_chars * weight), report)
        ]
    chars = sum(map(len, sample))
    quiet = int(chars < LOUD_CHARS)
    arguments = {"vocab_size": vocab_size, "model_type": "unigram", "minloglevel": quiet} | given
    logging.info("Training a tokenizer of %s pieces on %d characters.", arguments["vocab_size"], chars)
    lines = (line for text in sample for line in text.split("\n") if line)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=lines, model_writer=model, **arguments)
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(_explain(str(error), arguments)) from error
    return _with_round_scores(model.getvalue())


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


def load_or_train(path: epath.Path, mixture: Iterable[tuple[Iterable[str], float]], **arguments) -> Tokenizer:
    """The tokenizer at `path`, which is trained (see `train`) and written there when it is missing."""
    if not path.exists():
        write_atomically(path, train(mixture, **arguments))
        logging.info("Wrote the tokenizer to %s.", path)
    return Tokenizer.load(path)


def sample_texts(texts: Iterable[str], max_chars: int, report: Callable[[int], None] | None = None) -> list[str]:
    """An even sample of at most `max_chars` characters of a corpus, in the corpus's order, in one pass.

    Every run of at most `SAMPLE_CHARS` characters gets a pseudo-random rank from its number, and the runs of highest
    rank that fit are kept, so that memory is bounded by `max_chars` and the same corpus always gives the same sample.
    `report` is told from time to time how many characters have been read.
    """
    heap: list[tuple[bytes, int, str]] = []  # (rank, number, run), the lowest rank on top
    total = 0
    read = 0
    runs = (run for text in texts for run in _parts(text, SAMPLE_CHARS) if run.strip("\n"))
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


def _parts(text: str, max_chars: int) -> Iterator[str]:
    """Cuts a text into parts of at most `max_chars` characters: after a line end, or anywhere in a longer line."""
    start = 0
    while start < len(text):
        end = min(start + max_chars, len(text))
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or end
        yield text[start:end]
        start = end


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


def inspect(path: epath.Path, text: str):
    """Prints how the tokenizer at `path` cuts a text."""
    spm = Tokenizer.load(path)
    ids, pieces = spm.encode(text), spm.pieces(text)
    table = rich.table.Table("piece", "id", title=f"{path}: {spm.vocab_size} pieces")
    for piece, token in zip(pieces, ids, strict=True):
        table.add_row(rich.text.Text(piece), str(token))
    rich.print(table)
    print(f"{len(text)} characters, {len(ids)} tokens: {len(text) / max(len(ids), 1):.2f} characters a token.")
    if (decoded := spm.decode(ids)) != text:
        print(f"Decoded again, it is another text: {decoded}")


if __name__ == "__main__":
    from transformer_lm import cli

    parser = argparse.ArgumentParser(description="Shows how a tokenizer cuts a text.")
    parser.add_argument(
        "--workdir", default="logs/demo", help="a workdir, or a SentencePiece model (default: the demo's)"
    )
    parser.add_argument("--inspect", required=True, metavar="TEXT", help="the text whose pieces and ids are shown")
    arguments = parser.parse_args()
    folder = epath.Path(arguments.workdir).expanduser()
    with cli.one_line_errors(debug=False):
        inspect(folder if folder.is_file() else folder / "sentencepiece_model", arguments.inspect)
