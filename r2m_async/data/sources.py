"""Finds the rows of a data source, and names the format of a file that cannot be read.

    JSONL              an object a line
    JSON               a list of objects
    CSV, TSV           by the name `.csv` or `.tsv`; the first line has the names of the columns
    Parquet, Arrow     by the package pyarrow, which comes with `datasets`
    a folder           one that `datasets` wrote, or a folder of data files of one format
    a name             of a data set of the Hugging Face hub; `NAME:SUBSET` if it has several configurations
    a URL              of a file, which fsspec fetches: `s3://`, `gs://`, `file:///`, and whatever else it knows

The content of a file tells its format, but for CSV and TSV. Text may be packed by gzip, bzip2 or xz.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
import os
import re
import shutil
import sys
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeAlias

from r2m_async.errors import DataError

Source: TypeAlias = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
"""A path or a name; several with commas between them, or as a sequence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BrokenRow:
    """A row of a CSV file whose cells cannot be told apart."""

    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One record of a source, not yet checked."""

    place: str
    """File and line, or data set and row, for messages."""
    name: str
    """The same in short, for example `posts.jsonl:17`."""
    raw: Any
    """A line of JSON as bytes, a value that was JSON, a mapping, or a BrokenRow."""
    only_texts: bool = False
    """Whether every value is a text, also one that stands for a number. It is so in CSV."""


def rows(source: Source, split: str = "train") -> Iterator[Row]:
    """Yields every row of a source. Empty lines of a file are left out.

    split: the split of a data set, of a folder or the hub. Single files have none.

    Raises DataError, with the file, if the source is not there, cannot be read, or is of a format that is not read here.
    """
    names = Counter(Path(item).name for item in items_of(source))  # the short name must tell files of one name apart
    for item in items_of(source):
        path = Path(item).expanduser()
        if is_url(item):
            with _fetched(item) as copy:
                yield from _file_rows(item, copy, path.name if names[path.name] == 1 else item)
        elif path.is_file():
            yield from _file_rows(item, path, path.name if names[path.name] == 1 else item)
        else:
            for number, fields in enumerate(_data_set_rows(item, path, split)):
                yield Row(place=f"{item} ({split}), row {number}", name=f"{item}:{number}", raw=fields)


def items_of(source: Source) -> list[str]:
    """Returns the paths or names that a source consists of."""
    # An existing path comes first, because a comma may be part of a file's name.
    if isinstance(source, str) and "," in source and not Path(source).expanduser().exists():
        return [item.strip() for item in source.split(",") if item.strip()]
    return [os.fspath(source)] if isinstance(source, str | os.PathLike) else [os.fspath(item) for item in source]


def is_url(item: str) -> bool:
    """Whether an item of a source is a URL."""
    return re.match(r"[a-z][a-z0-9+.-]*://", item) is not None


def is_local(item: str) -> bool:
    """Whether an item of a source is a path, there or not, and neither a URL nor a name of the hub."""
    if is_url(item):
        return False
    path = Path(item).expanduser()
    return path.exists() or _suffix(path) in (*_KINDS, ".txt") or item.startswith(("/", ".", "~"))


# Files

_PACKED: Mapping[bytes, Callable[..., Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\x00": lzma.open,
}
"""How a packed file begins, and what opens it."""

_COLUMNAR = (b"PAR1", b"ARROW1", b"\xff\xff\xff\xff")
"""How Parquet files, Arrow files, and streams of Arrow begin."""

_FROM_CR = "convert the ends of its lines, `tr '\\r' '\\n'`"
_TO_JSONL = "write the records as JSONL, a JSON list, CSV or Parquet"
_FOREIGN: tuple[tuple[int, bytes, str, str], ...] = (
    (0, b"\xff\xfe", "UTF-16 text", "convert the file, `iconv -f UTF-16 -t UTF-8`"),
    (0, b"\xfe\xff", "UTF-16 text", "convert the file, `iconv -f UTF-16 -t UTF-8`"),
    (0, b"version https://git-lfs", "a pointer of Git LFS, not the data themselves", "fetch them, `git lfs pull`"),
    (0, b"\x28\xb5\x2f\xfd", "packed by zstd", "unpack it, `zstd -d`"),
    (0, b"\x04\x22\x4d\x18", "packed by lz4", "unpack it, `lz4 -d`"),
    (0, b"7z\xbc\xaf", "a 7z archive", "unpack it"),
    (257, b"ustar", "a tar archive", "unpack it and name its files"),
    (0, b"\xd0\xcf\x11\xe0", "an old Office file (Excel)", "save the sheet as CSV, in UTF-8"),
    (0, b"Obj\x01", "an Avro file", _TO_JSONL),
    (0, b"ORC", "an ORC file", _TO_JSONL),
    (0, b"SQLite format 3", "an SQLite database", _TO_JSONL),
    (0, b"\x89HDF", "an HDF5 file", _TO_JSONL),
    (0, b"\x93NUMPY", "a numpy file", _TO_JSONL),
    (0, b"%PDF", "a PDF file", _TO_JSONL),
)
"""(offset, bytes there, what such a file is, what the user can do). `_foreign` knows some more."""


@contextmanager
def _fetched(url: str) -> Iterator[Path]:
    """Copies the file at a URL to this machine for the time of the block. Raises DataError if it cannot be fetched.

    The copy has the name of the original, because the suffix tells CSV from other text.
    """
    import fsspec

    with tempfile.TemporaryDirectory(prefix="r2m-data-") as folder:
        copy = Path(folder) / (Path(url).name or "data")
        try:
            with fsspec.open(url, "rb") as source, copy.open("wb") as target:
                shutil.copyfileobj(source, target)
        except FileNotFoundError:
            raise DataError(f"{url}: there is no such file; correct the URL, which must name one file") from None
        # Every kind of storage has errors of its own.
        except Exception as error:
            raise DataError(
                f"{url}: cannot be fetched ({type(error).__name__}: {error}); check the URL and your rights, and install what "
                f"fsspec needs for it: s3fs for s3://, gcsfs for gs://"
            ) from None
        yield copy


def _file_rows(item: str, path: Path, short: str) -> Iterator[Row]:
    """Yields the rows of a file."""
    with _reading(item), _unpacked(path) as file:
        head = file.read(1024)
        file.seek(0)
        if head.startswith(_COLUMNAR):
            for number, fields in enumerate(_columnar_rows(item, file, head)):
                yield Row(place=f"{item}, row {number}", name=f"{short}:{number}", raw=fields)
            return
        _refuse_foreign(item, head)
        begins, suffix = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1], _suffix(path)
        if begins == b"[" and (listed := _json_list(item, file)) is not None:
            for number, value in enumerate(listed, start=1):
                yield Row(place=f"{item}, record {number}", name=f"{short}:{number}", raw=value)
        elif begins not in (b"{", b"[") and suffix in (".csv", ".tsv"):
            yield from _csv_rows(item, short, file, "\t" if suffix == ".tsv" else ",")
        else:
            _refuse_no_lines_of_json(item, file)
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield Row(place=f"{item}, line {number}", name=f"{short}:{number}", raw=line.rstrip(b"\r\n"))


def _unpacked(path: Path) -> IO[bytes]:
    """Opens a file, and unpacks it if it is packed. Raises OSError."""
    with path.open("rb") as file:
        start = file.read(8)
    unpack = next((unpack for magic, unpack in _PACKED.items() if start.startswith(magic)), open)
    opened: IO[bytes] = unpack(path, "rb")
    return opened


@contextmanager
def _reading(item: str) -> Iterator[None]:
    """Raises DataError for what the disk or a packed file raises."""
    try:
        yield
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{item}: cannot be read ({reason}); give it anew, or permit it to be read") from None


def _suffix(path: Path) -> str:
    """The suffix of a file without that of its packing: `.csv` for `pairs.csv.gz`."""
    suffixes = [one.lower() for one in path.suffixes]
    return next((one for one in reversed(suffixes) if one not in (".gz", ".bz2", ".xz")), "")


def _refuse_foreign(item: str, head: bytes) -> None:
    """Raises DataError for a file of another format. head: how it begins."""
    if found := _foreign(head):
        what, remedy = found
        raise DataError(f"{item}: the file is {what}; {remedy}")


def _foreign(head: bytes) -> tuple[str, str] | None:
    """(what a file of another format is, what the user can do), or None for text."""
    for offset, magic, what, remedy in _FOREIGN:
        if head[offset:].startswith(magic):
            return what, remedy
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        is_office = b"[Content_Types].xml" in head or b"xl/" in head
        return ("an Excel file", "save the sheet as CSV, in UTF-8") if is_office else ("a zip archive", "unpack it")
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "a Python pickle, which is never opened because it can run code", _TO_JSONL
    if head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"<":
        return "HTML or XML, such as a page that came in place of a download", "open it in a browser, download it again"
    # A later line with a zero is a bad record of a text.
    first = head.partition(b"\n")[0]
    if b"\0" in first:
        # ASCII in UTF-16 has a zero at every second byte.
        wide = max(first[0::2].count(0), first[1::2].count(0)) > len(first) // 4
        return ("UTF-16 text", _FOREIGN[0][3]) if wide else ("a binary file", _TO_JSONL)
    return None


def _json_list(item: str, file: IO[bytes]) -> list[Any] | None:
    """The values of a file that is a JSON list. None if it is lines of JSON of which the first is a list."""
    data = file.read()
    file.seek(0)
    try:
        values = decoded(data)
    except (ValueError, RecursionError) as error:
        with_lines = data.lstrip().splitlines()
        try:
            if len(with_lines) > 1 and isinstance(decoded(with_lines[0]), list):
                return None
        except (ValueError, RecursionError):
            pass
        raise DataError(
            f"{item}: not JSON ({error}), and it begins as a list; correct it, or write an object a line"
        ) from None
    return values


def _refuse_no_lines_of_json(item: str, file: IO[bytes]) -> None:
    """Raises DataError if a file is JSON over several lines, CSV under another name, or other text."""
    first = next((line for line in file if line.strip()), b"").removeprefix(b"\xef\xbb\xbf")
    begins = first.lstrip()[:1]
    if re.match(rb"[^\n]*?\}\s*\r(?!\n)\s*\{", first):
        raise DataError(f"{item}: its lines end in CR alone, so all of it is one line; {_FROM_CR}")
    if begins == b"{":
        _refuse_several_lines(item, first, file)
    elif re.fullmatch(rb'"?\w+"?([,;\t|]"?\w+"?)+\s*', first):
        raise DataError(f"{item}: not JSON, and line 1 looks like the head of a CSV file; call it .csv (or .tsv)")
    elif begins not in (b"", b"[") and not any(line.lstrip()[:1] == b"{" for line in file):
        shown = first.strip()[:40].decode("utf-8", "backslashreplace")
        raise DataError(f"{item}: not JSON, no line of it is an object, it begins {shown!r}; {_TO_JSONL}")
    file.seek(0)


def _refuse_several_lines(item: str, first: bytes, file: IO[bytes]) -> None:
    """Raises DataError if a file's first line, which has been read, begins an object that goes on in the next."""
    try:
        decoded(first)
    except (ValueError, RecursionError):
        rest = file.read()
    else:
        return
    try:
        text = (first + rest).decode().lstrip()
        value, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return  # then the first line is a bad record, and told as one
    if "\n" in text[:end]:
        held = [key for key, one in value.items() if isinstance(one, list) and one and isinstance(one[0], dict)]
        inner = f", or the list in its {held[0]!r} alone, `jq .{held[0]}`" if held else ""
        raise DataError(
            f"{item}: a JSON object over several lines, not one a line and no list; write one a line, `jq -c .`{inner}"
        )


def decoded(data: bytes) -> Any:
    """Returns the value of UTF-8 JSON. A byte-order mark is dropped.

    Raises ValueError for what is not UTF-8, not JSON, or has one key twice in one object; RecursionError if it is too
    deep.
    """
    return json.loads(data.decode("utf-8-sig"), object_pairs_hook=_without_twins)


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON. Raises ValueError if a key stands in it twice: which of the values counts is open."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twin = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {twin!r} stands twice in one object")
    return found


def bare(name: str) -> str:
    """Returns the name of a column without white space and marks of no width at its ends."""
    return name.strip(" \t\r\n\v\f\u00a0\u200b\u3000\ufeff")


def is_frayed(name: str) -> bool:
    """Returns whether the name of a column has something at an end that nobody sees."""
    return bare(name) != name


def _csv_rows(item: str, short: str, file: IO[bytes], delimiter: str) -> Iterator[Row]:
    """Yields the rows of a CSV file, whose first line has the names of the columns. Raises DataError."""
    csv.field_size_limit(sys.maxsize)  # the module's own limit is 128 KiB
    lines = (line.decode("utf-8-sig" if number == 0 else "utf-8") for number, line in enumerate(file))
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    names: list[str] | None = None
    begin = 1
    try:
        for cells in reader:
            begin, line = reader.line_num + 1, begin
            if not cells:
                continue
            if names is None:
                names = cells
                _check_head(item, names, delimiter)
                continue
            raw = dict(zip(names, cells, strict=False))
            shown = f"{len(cells)} cells where the head has {len(names)} names"
            yield Row(
                place=f"{item}, line {line}",
                name=f"{short}:{line}",
                raw=raw if len(cells) == len(names) else BrokenRow(why=shown),
                only_texts=True,
            )
    except UnicodeDecodeError as error:
        raise DataError(
            f"{item}, line {reader.line_num + 1}: not UTF-8 at byte {error.start + 1} of the line; convert the file to UTF-8"
        ) from None
    except csv.Error as error:
        remedy = "correct the quotes"
        if "new-line character" in str(error):
            error, remedy = csv.Error("a line ends in CR alone"), f"{_FROM_CR}, or quote the cell that has a CR in it"
        raise DataError(f"{item}, line {begin}: not CSV ({error}); {remedy}") from None


def _check_head(item: str, names: list[str], delimiter: str) -> None:
    """Raises DataError for the first line of a CSV file that has another delimiter, or has one name twice."""
    others = [sign for sign in ",;\t|" if sign != delimiter and sign in names[0]]
    if len(names) == 1 and others:
        raise DataError(
            f"{item}, line 1: {names[0]!r} has no {delimiter!r} and has {others[0]!r}: the file has another delimiter; write "
            f"a .csv with commas, or a .tsv with tabs"
        )
    if frayed := [name for name in names if is_frayed(name)]:
        raise DataError(
            f"{item}, line 1: the name of the column {frayed[0]!r} has white space at an end, so it is not the column "
            f"{bare(frayed[0])!r}; take it out, and the spaces after the other delimiters, too"
        )
    if twins := [name for name, count in Counter(names).items() if count > 1]:
        raise DataError(f"{item}, line 1: two columns are called {twins[0]!r}; rename one")


def _columnar_rows(item: str, file: IO[bytes], head: bytes) -> Iterator[Mapping[str, Any]]:
    """Yields the rows of a Parquet or Arrow file. head: how it begins. Raises DataError."""
    what = "Parquet" if head.startswith(b"PAR1") else "Arrow"
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(
            f"{item}: a {what} file, and the package `datasets` that reads it is not installed; `pip install datasets`, or "
            "write JSONL"
        ) from None
    try:
        if what == "Parquet":
            batches = pyarrow.parquet.ParquetFile(file).iter_batches()
        elif head.startswith(b"ARROW1"):
            opened = pyarrow.ipc.open_file(file)
            batches = map(opened.get_batch, range(opened.num_record_batches))
        else:
            batches = pyarrow.ipc.open_stream(file)
        for batch in batches:
            if twins := [name for name, count in Counter(batch.schema.names).items() if count > 1]:
                raise DataError(f"{item}: two columns are called {twins[0]!r}; rename one")
            yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{item}: a {what} file that is damaged ({reason}); fetch it again") from None


# Data sets

_KINDS = {".jsonl": "JSON", ".json": "JSON", ".csv": "CSV", ".tsv": "CSV", ".parquet": "Parquet", ".arrow": "Arrow"}
"""Formats of the files of a folder, by suffix."""


def _data_set_rows(item: str, path: Path, split: str) -> Iterator[Mapping[str, Any]]:
    """Yields the rows of a data set: a folder, or a name of the Hugging Face hub. Raises DataError."""
    # What looks like a path and does not exist is a wrong path. Looked up on the hub, it would give a puzzling message.
    if not path.exists() and is_local(item):
        raise DataError(f"data source {item!r}: no such file or directory; correct the path (now in {Path.cwd()})")
    if path.exists() and not path.is_dir():
        raise DataError(f"data source {item!r}: neither a file nor a folder; write the records to a file")
    # `save_to_disk` leaves these marks. Any other directory is a folder of data files.
    saved = path.is_dir() and any((path / mark).exists() for mark in ("state.json", "dataset_dict.json"))
    if path.is_dir() and not saved:
        _check_folder(item, path)
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"data source {item!r}: not a file, and the package `datasets` that would look for a data set of that "
            "name is not installed; correct the path or `pip install datasets`"
        ) from None
    try:
        if saved:
            loaded = datasets.load_from_disk(str(path))
            table = loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded
        elif path.is_dir():
            table = datasets.load_dataset(str(path), split=split)
        else:
            name, _, subset = item.partition(":")
            table = datasets.load_dataset(name, subset or None, split=split)
    except (OSError, ValueError, KeyError, RuntimeError, StopIteration, datasets.exceptions.DatasetsError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise DataError(
            f"data source {item!r}: neither a file nor a data set that can be read (split {split!r}, {reason}); "
            "correct the name or the split, or write the records to a JSONL file"
        ) from error
    yield from table


def _check_folder(item: str, path: Path) -> None:
    """Raises DataError for a folder with files of several formats, or with one that is not what its name says.

    `datasets` would read the files of the commonest format, and leave the others out without a word.
    """
    readme = path / "README.md"
    if readme.is_file() and "data_files:" in readme.read_text(encoding="utf-8", errors="replace"):
        return  # then the folder itself says which files are its data
    kinds: dict[str, Path] = {}
    for file in sorted(path.rglob("*")):
        hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
        if hidden or not file.is_file() or file.name in ("dataset_info.json", "dataset_infos.json"):
            continue
        if kind := _KINDS.get(_suffix(file)):
            kinds.setdefault(kind, file)
            with _reading(str(file)), _unpacked(file) as opened:
                head = opened.read(1024)
            if not head.startswith(_COLUMNAR):
                _refuse_foreign(str(file), head)
    if len(kinds) > 1:
        shown = ", ".join(f"{kind} ({file.relative_to(path)})" for kind, file in kinds.items())
        raise DataError(
            f"data source {item!r}: a folder with files of several formats: {shown}; name the files themselves"
        )
