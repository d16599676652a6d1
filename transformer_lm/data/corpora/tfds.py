"""TensorFlow Datasets by their names (`lm1b`, `wiki40b/ja`, `name/config:version`), read without TensorFlow.

The data must lie prepared in TFDS_DATA_DIR (a folder or gs://bucket/folder; ~/tensorflow_datasets where it is not set),
as ArrayRecord, TFRecord or Parquet. What prepares them is TFDS itself, see docs/corpora.md.
"""

import hashlib
import itertools
import os
from collections.abc import Iterator
from typing import BinaryIO

from array_record.python.array_record_data_source import ArrayRecordDataSource
from etils import epath

from transformer_lm.data.corpora.base import Options, Source, library_errors
from transformer_lm.data.corpora.files import check_field, check_text_value, parquet_column
from transformer_lm.errors import UserError
from transformer_lm.extras import optional_import
from transformer_lm.files import is_remote, local_copy, read_json, utf8_name

READ_RECORDS = 256  # read at once from an ArrayRecord file
FEATURES = "features.json"
OWN_FEATURES = "tensorflow_datasets.core.features."  # where TFDS has its classes; others would be imported, and run


class Tfds(Source):
    """A prepared dataset; its shards are its files."""

    def __init__(self, name: str, options: Options = Options(), data_dir: str | None = None):
        """`data_dir` takes the place of TFDS_DATA_DIR."""
        super().__init__()
        tfds = optional_import("tensorflow_datasets", "tfds", f"dataset_name={name!r}, of TensorFlow Datasets,")
        self._options = options
        data_dir = data_dir or os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
        self._arguments = (name, options, data_dir)
        folder = data_dir if is_remote(data_dir) else utf8_name(os.path.expanduser(data_dir))
        try:
            parsed, arguments = tfds.core.naming.parse_builder_name_kwargs(name)
            _check_features(epath.Path(folder) / parsed.name)
            builder = tfds.core.read_only_builder.builder_from_files(str(parsed), data_dir=folder, **arguments)
        except (tfds.core.registered.DatasetNotFoundError, ValueError, FileNotFoundError) as error:
            raise UserError(
                f"dataset_name={name!r}: no prepared data in TFDS_DATA_DIR={data_dir}. Prepare it once, "
                "in an environment of its own: pip install tensorflow tensorflow-datasets apache-beam, then "
                f"TFDS_DATA_DIR={data_dir} tfds build {name} --file_format=array_record"
            ) from error
        self._builder, self._info = builder, builder.info
        self.splits = tuple(self._info.splits)
        check_field(options.text_field, self._info.features, f"Dataset {name!r} has no feature")
        self._paths = {split: list(info.filepaths) for split, info in self._info.splits.items()}

    def __reduce__(self):  # opened again in another process
        return type(self), self._arguments

    @property
    def fingerprint(self) -> str:
        """A hash of TFDS's own description, which counts examples and bytes."""
        files = [self._builder.data_path / name for name in ("dataset_info.json", FEATURES)]
        content = b"".join(file.read_bytes() for file in files)
        return hashlib.sha256(content + self._options.text_field.encode()).hexdigest()

    def num_shards(self, split: str) -> int:
        """See Source."""
        return len(self._paths[split])

    def known_size(self, split: str, shard: int) -> int:
        """See Source."""
        return self._info.splits[split].shard_lengths[shard]

    def shard_name(self, split: str, shard: int) -> str:
        """See Source."""
        return str(self._paths[split][shard])

    def read_shard(self, split: str, shard: int, start: int = 0) -> Iterator[str]:
        """See Source."""
        path, count, size = self._paths[split][shard], start, self.known_size(split, shard)
        for text in self._read_file(path, start):
            count += 1
            yield text
        if count != size:
            raise UserError(f"{path} holds {count} examples, but TFDS wrote {size}: the file is damaged.")

    def _read_file(self, path: epath.Path, start: int) -> Iterator[str]:
        kind = self._info.file_format.value
        if kind not in RECORD_READERS:
            raise UserError(
                f"{path}: files of the format {kind} cannot be read; convert them: tfds convert_format "
                f"--dataset_version_dir={path.parent} --out_file_format=array_record --out_dir=FOLDER"
            )
        field, records = self._options.text_field, RECORD_READERS[kind](path, start)
        with library_errors(lambda: f"{path} cannot be read, or is damaged"):
            for record in records:
                value = self._info.features.deserialize_example_np(record)[field]
                yield value.decode() if isinstance(value, bytes) else check_text_value(value, str(path), field)


def _array_records(path: epath.Path, start: int) -> Iterator[bytes]:
    with ArrayRecordDataSource([str(local_copy(path))]) as records:
        for first in range(start, len(records), READ_RECORDS):
            yield from records.__getitems__(range(first, min(first + READ_RECORDS, len(records))))


def _tf_records(path: epath.Path, start: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        yield from itertools.islice(read_tf_records(file), start, None)


def _parquet_records(path: epath.Path, start: int) -> Iterator[bytes]:
    with path.open("rb") as file:  # TFDS writes whole records into a column "data"
        yield from itertools.islice(parquet_column(file, str(path), "data"), start, None)


RECORD_READERS = {"array_record": _array_records, "tfrecord": _tf_records, "parquet": _parquet_records}


def read_tf_records(file: BinaryIO) -> Iterator[bytes]:
    """The records of a TFRecord file (https://www.tensorflow.org/tutorials/load_data/tfrecord#tfrecords_format_details).

    A record is its length (uint64), the length's masked CRC-32C, its bytes, and their masked CRC-32C.

    Raises:
      ValueError: the file is damaged.
    """
    crc32c = optional_import("google_crc32c", "tfds", "a TFRecord file").value

    def checked(content: bytes, length: int) -> bytes:
        checksum = file.read(4)
        if len(content) < length or len(checksum) < 4:
            raise ValueError("it ends inside a record")
        crc = crc32c(content)
        if int.from_bytes(checksum, "little") != (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF:
            raise ValueError("a record does not agree with its checksum")
        return content

    while size := file.read(8):
        length = int.from_bytes(checked(size, 8), "little")
        yield checked(file.read(length), length)


def _check_features(folder: epath.Path):
    """Raises UserError for a dataset (its versions, or those of its configurations) of somebody's own classes."""
    for path in (*folder.glob(f"*/{FEATURES}"), *folder.glob(f"*/*/{FEATURES}")):
        waiting = [read_json(path)]
        while waiting:
            value = waiting.pop()
            if isinstance(value, dict):
                for name in ("pythonClassName", "type"):
                    kind = value.get(name)
                    if isinstance(kind, str) and "." in kind and not kind.startswith(OWN_FEATURES):
                        raise UserError(
                            f"{path} names the class {kind[:80]!r}, which is none of TFDS's own: it is not run."
                        )
                waiting += value.values()
            elif isinstance(value, list):
                waiting += value
