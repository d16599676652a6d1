"""Datasets of the Hugging Face hub: `huggingface:OWNER/NAME[/CONFIG][:SPLIT]`, through the library `datasets`.

Also `huggingface:FOLDER[:SPLIT]` for a folder in the hub's layout, and the original's name of cc100. Downloaded data
lie in HF_HOME; with HF_HUB_OFFLINE=1 nothing else is asked for.
"""

import contextlib
import itertools
import os
import re
import traceback
from collections.abc import Iterator
from typing import Any

import fsspec

from transformer_lm.data.corpora import conversations
from transformer_lm.data.corpora.base import Options, Source, library_errors
from transformer_lm.data.corpora.files import check_field, check_texts, read_file
from transformer_lm.data.corpora.listing import list_files
from transformer_lm.errors import UserError
from transformer_lm.extras import optional_import
from transformer_lm.files import is_remote

SHARD_DOCUMENTS = 100_000
READ_DOCUMENTS = 256
_PATTERN = re.compile("[*?[\r\n\ud800-\udfff]|::")  # in a folder's name
_JSON_LINES = re.compile(r".*\.(jsonl|ndjson|json)(\.(gz|bz2|xz|zst))?", re.IGNORECASE | re.DOTALL)

# Names that were loading scripts, which `datasets` no longer runs, and where the same texts lie today as Parquet.
MIRRORS = {"cc100/lang=ja": ("range3/cc100-ja", None), "wiki40b/ja": ("google/wiki40b", "ja")}


class HuggingFace(Source):
    """A dataset of the hub. With :SPLIT it is that split alone, which is then its `train`, too."""

    def __init__(self, address: str, options: Options = Options()):
        super().__init__()
        self._options, self.name = options, f"huggingface:{address}"
        datasets = optional_import("datasets", "hf", f"dataset_name={self.name!r}")
        path, config, self._only = parse_address(address)
        self._builder = self._open(datasets, path, config)
        self._contents: dict[str, Any] = {}
        names = self._builder.info.splits or self._builder.config.data_files or self._builder.as_streaming_dataset()
        self.splits = (self._only, "train") if self._only else tuple(map(str, names))

    def _open(self, datasets, path: str, config: str | None):
        try:
            return datasets.load_dataset_builder(path, config)
        except ConnectionError as error:
            if snapshot := _downloaded(path):  # not prepared by `datasets`, but maybe downloaded by `hf download`
                return datasets.load_dataset_builder(snapshot, config)
            raise UserError(f"{self.name}: {error}. Look at the network, or at HF_HUB_OFFLINE.") from error

    def __reduce__(self):  # opened again in another process
        return type(self), (self.name.partition(":")[2], self._options), {"_sizes": self._sizes}

    @property
    def fingerprint(self) -> str:
        """Name, configuration, version, and what `datasets` knows the content by (the hub's commit)."""
        builder = self._builder
        facts = (builder.dataset_name, builder.config_id, str(builder.info.version), builder.hash, self._only)
        return " ".join(map(str, (*facts, self._options.text_field)))

    def content(self, split: str) -> tuple:
        """See Source; `datasets` knows a folder's files by their real paths."""
        known = self._builder.hash or self._builder.dataset_name
        return known, self._builder.config_id, self._only or split

    def num_shards(self, split: str) -> int:
        """See Source."""
        content = self._content(split)
        if isinstance(content, list):
            return len(content)
        return content.num_shards if self._options.streaming else -(-len(content) // SHARD_DOCUMENTS)

    def shard_name(self, split: str, shard: int) -> str:
        """See Source."""
        return f"Dataset {self.name!r}, split {split!r}, shard {shard} (text_field={self._options.text_field})"

    def known_size(self, split: str, shard: int) -> int | None:
        """See Source."""
        content = self._content(split)
        if self._options.streaming or isinstance(content, list):
            return super().known_size(split, shard)
        return len(content.shard(self.num_shards(split), shard))

    def read_shard(self, split: str, shard: int, start: int = 0) -> Iterator[str]:
        """See Source."""
        content = self._content(split)
        if isinstance(content, list):
            path = content[shard]
            place = fsspec.core.url_to_fs(path) if is_remote(path) else (fsspec.filesystem("file"), path)
            texts = read_file("jsonl", *place, self._options)
        else:
            texts = self._texts(content.shard(self.num_shards(split), shard))
        return itertools.islice(texts, start, None)

    def _texts(self, dataset) -> Iterator[str]:
        field = self._options.text_field
        with _named_files(self.name):
            for batch in dataset.iter(READ_DOCUMENTS):
                if self._options.conversations:
                    records = (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))
                    yield from (conversations.document(record, field, self.name) for record in records)
                else:
                    yield from check_texts(batch[field], self.name, field)

    def _content(self, split: str):
        """The JSON files or the dataset of a split, downloaded when it is first asked for (unless it is streamed)."""
        split = self._only or split
        if split not in self._contents:
            self._contents[split] = self._json_files(split) or self._dataset(split)
        return self._contents[split]

    def _json_files(self, split: str) -> list[str]:
        """The files of a split where all are JSON lines; else none.

        These are read as `jsonl:` reads them. `datasets` wants the same fields in every line of every file, has no
        word on which line it cannot read, and dies of some (values nested very deep).
        """
        from datasets import DownloadManager
        from datasets.packaged_modules.json.json import Json

        if not isinstance(self._builder, Json) or self._builder.config.field is not None:
            return []
        files = list(self._builder.config.data_files[split])
        if not all(map(_JSON_LINES.fullmatch, files)):
            return []
        return files if self._options.streaming else DownloadManager().download(files)

    def _dataset(self, split: str):
        """The dataset of a split with the column of the texts alone, or those that may hold conversations."""
        if self._options.streaming:
            dataset = self._builder.as_streaming_dataset(split)
        else:
            with _named_files(self.name):
                self._builder.download_and_prepare()
            dataset = self._builder.as_dataset(split)
        names = dataset.column_names or list(next(iter(dataset.take(1)), {}))
        if self._options.conversations:
            return dataset.select_columns(conversations.columns(names, self._options.text_field))
        check_field(self._options.text_field, names, f"Dataset {self.name!r} has no column")
        return dataset.select_columns([self._options.text_field])


@contextlib.contextmanager
def _named_files(dataset: str) -> Iterator[None]:
    """An error of reading says which file cannot be read, which `datasets` knows only while it reads it."""
    try:
        yield
    except Exception as error:
        frames = [frame for frame, _ in traceback.walk_tb((error.__cause__ or error).__traceback__)]
        reading = [frame.f_locals.get("file") for frame in frames if "packaged_modules" in frame.f_code.co_filename]
        files = [file for file in reading if isinstance(file, str)]
        with library_errors(lambda: f"{dataset}: {files[-1]} cannot be read") if files else contextlib.nullcontext():
            raise


def _downloaded(repository: str) -> str | None:
    """The folder of a dataset in the hub's cache, None where it is not there."""
    hub = optional_import("huggingface_hub", "hf", f"huggingface:{repository}")
    try:
        return hub.snapshot_download(repository, repo_type="dataset", local_files_only=True)
    except (OSError, ValueError):
        return None


def _check_folder(folder: str):
    """Raises UserError where `datasets` would leave files out without a word, or find those of other folders."""
    advice = f"name the files: jsonl:, text: or parquet:{folder}/**"
    if _PATTERN.search(folder):
        raise UserError(f"huggingface:{folder}: `datasets` takes this name for a pattern; rename it, or {advice}.")
    for path in (info["name"] for info in list_files(os.path.join(folder, "**"))[1]):
        parent, name = os.path.split(path)
        if os.path.realpath(parent) != parent or re.search("[\r\n]|::", name):
            raise UserError(f"{path}: `datasets` finds no file so named or in a linked folder; rename it, or {advice}.")


def parse_address(address: str) -> tuple[str, str | None, str | None]:
    """ "OWNER/NAME/CONFIG:SPLIT" -> what `datasets` calls path and configuration, and the split."""
    folder, split = os.path.expanduser(address), None
    if not os.path.isdir(folder):
        address, split = re.fullmatch(r"(.*?)(?::([^:/]*))?", address, re.DOTALL).groups()
        folder, split = os.path.expanduser(address), split or None
    if address in MIRRORS:
        return (*MIRRORS[address], split)
    if os.path.isdir(folder):
        _check_folder(os.path.realpath(folder))
        return folder, None, split
    parts = address.split("/", 2)
    if len(parts) < 2 or not all(parts):
        raise UserError(
            f"dataset_name='huggingface:{address}' must be like huggingface:OWNER/NAME[/CONFIG][:SPLIT], a folder, "
            f"or one of {', '.join(f'huggingface:{name}' for name in MIRRORS)}."
        )
    return "/".join(parts[:2]), parts[2] if len(parts) == 3 else None, split
