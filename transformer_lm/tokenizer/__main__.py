"""Shows how a tokenizer cuts a text.

python -m transformer_lm.tokenizer --workdir=logs/my_model --inspect "吾輩は猫である。"
"""

import argparse

import rich
import rich.table
import rich.text
from etils import epath

from transformer_lm import cli
from transformer_lm.tokenizer import Tokenizer


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


def main():
    """The command."""
    parser = argparse.ArgumentParser(description="Shows how a tokenizer cuts a text.")
    parser.add_argument("--workdir", default="logs/demo", help="a workdir or SentencePiece model (default: the demo's)")
    parser.add_argument("--inspect", required=True, metavar="TEXT", help="the text whose pieces and ids are shown")
    parser.add_argument("--debug", action="store_true", help="show stack traces")
    arguments = parser.parse_args()
    folder = epath.Path(arguments.workdir).expanduser()
    inspect(folder if folder.is_file() else folder / "sentencepiece_model", arguments.inspect)


if __name__ == "__main__":
    cli.run_to_exit(main)
