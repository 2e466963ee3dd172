import bz2
import gzip
import io
import json
import lzma
import os
import pickle
import zipfile

import pytest

from r2m_async.data.prompts import Preference, load_preferences
from r2m_async.data.records import load_records, read_file, read_records
from r2m_async.errors import DataError

PAIRS = [
    {"prompt": "Say hello.", "chosen": ' "Hello", she said,\nnice to see you! — å', "rejected": " no"},
    {"prompt": "Name a colour:", "chosen": " green", "rejected": " NA"},
]
EXPECTED = tuple(Preference(**pair) for pair in PAIRS)


def lines(records=PAIRS):
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def delimited(records=PAIRS, delimiter=","):
    import csv

    text = io.StringIO()
    writer = csv.DictWriter(text, records[0], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue().encode()


def twins():
    import pyarrow
    import pyarrow.parquet

    column, out = pyarrow.array(["a"]), io.BytesIO()
    table = pyarrow.Table.from_arrays([column] * 4, names=["prompt", "chosen", "rejected", "chosen"])
    pyarrow.parquet.write_table(table, out)
    return out.getvalue()


def columnar(kind):
    import pyarrow
    import pyarrow.parquet

    table, out = pyarrow.Table.from_pylist(PAIRS), io.BytesIO()
    if kind == "parquet":
        pyarrow.parquet.write_table(table, out)
    else:
        make = pyarrow.ipc.new_file if kind == "arrow" else pyarrow.ipc.new_stream
        with make(out, table.schema) as writer:
            writer.write_table(table)
    return out.getvalue()


READ = {
    "pairs.jsonl": lines,
    "lines.json": lines,
    "list.json": lambda: json.dumps(PAIRS, indent=2).encode(),
    "list.jsonl": lambda: json.dumps(PAIRS).encode(),
    "marked.json": lambda: b"\xef\xbb\xbf\n " + json.dumps(PAIRS).encode(),
    "pairs.csv": delimited,
    "marked.csv": lambda: b"\xef\xbb\xbf" + delimited(),
    "pairs.tsv": lambda: delimited(delimiter="\t"),
    "lines.csv": lines,
    "no_suffix": lines,
    "pairs.jsonl.gz": lambda: gzip.compress(lines()),
    "pairs.csv.bz2": lambda: bz2.compress(delimited()),
    "list.json.xz": lambda: lzma.compress(json.dumps(PAIRS).encode()),
    "pairs.parquet": lambda: columnar("parquet"),
    "parquet.jsonl": lambda: columnar("parquet"),
    "pairs.parquet.gz": lambda: gzip.compress(columnar("parquet")),
    "pairs.arrow": lambda: columnar("arrow"),
    "stream.arrow": lambda: columnar("stream"),
}


@pytest.mark.parametrize("name", READ)
def test_the_same_pairs_are_read_from_every_format_by_its_content(tmp_path, name):
    (tmp_path / name).write_bytes(READ[name]())
    assert load_preferences(tmp_path / name).pairs == EXPECTED
    (tmp_path / "with spaces").mkdir()
    assert len(list(read_file(tmp_path / name))) == 2


def sheet():
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("[Content_Types].xml", "<Types/>")
        archive.writestr("xl/workbook.xml", "<workbook/>")
    return out.getvalue()


def archive():
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as zipped:
        zipped.writestr("pairs.jsonl", lines())
    return out.getvalue()


def tar():
    import tarfile

    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as packed:
        packed.addfile(tarfile.TarInfo("pairs.jsonl"))
    return out.getvalue()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
FOREIGN = [
    ("pairs.csv", lambda: delimited().decode().encode("utf-16"), "UTF-16 text; convert"),
    ("pairs.jsonl", lambda: lines().decode().encode("utf-16-be"), "UTF-16 text; convert"),
    ("pairs.jsonl", lambda: LFS, "a pointer of Git LFS, not the data themselves; fetch them, `git lfs pull`"),
    ("pairs.parquet", lambda: LFS, "a pointer of Git LFS"),
    ("pairs.jsonl", lambda: b"<!DOCTYPE html>\n<html>", "HTML or XML, such as a page that came in place of a download"),
    ("pairs.csv", lambda: b"\n  <?xml version='1.0'?><Error/>", "HTML or XML"),
    ("pairs.pkl", lambda: pickle.dumps(PAIRS), "a Python pickle, which is never opened"),
    ("pairs.jsonl", lambda: pickle.dumps(PAIRS, protocol=2), "a Python pickle"),
    ("pairs.xlsx", sheet, "an Excel file; save the sheet as CSV"),
    ("pairs.xls", lambda: b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600), "an old Office file"),
    ("pairs.zip", archive, "a zip archive; unpack it"),
    ("pairs.tar.gz", lambda: gzip.compress(tar()), "a tar archive; unpack it"),
    ("pairs.jsonl.zst", lambda: b"\x28\xb5\x2f\xfd\x04\x00", "packed by zstd; unpack it, `zstd -d`"),
    ("pairs.db", lambda: b"SQLite format 3\x00" + bytes(90), "an SQLite database"),
    ("pairs.bin", lambda: bytes(range(256)), "a binary file"),
    ("pairs.json", lambda: json.dumps({"data": PAIRS}, indent=1).encode(), "a JSON object over several lines"),
    (
        "pairs.json",
        lambda: json.dumps({"data": PAIRS}, indent=1).encode(),
        "or the list in its 'data' alone, `jq .data`",
    ),
    ("pairs.jsonl", lambda: json.dumps(PAIRS[0], indent=1).encode() * 2, "a JSON object over several lines"),
    ("pairs.json", lambda: b"[" + json.dumps(PAIRS[0]).encode() + b",]", "and it begins as a list; correct it"),
    ("pairs.csv", lambda: delimited(delimiter=";"), "the file has another delimiter"),
    ("pairs.csv", lambda: delimited(delimiter="\t"), "the file has another delimiter"),
    ("pairs.tsv", delimited, "the file has another delimiter"),
    ("pairs.jsonl", delimited, "line 1 looks like the head of a CSV file; call it .csv"),
    ("prompts.txt", lambda: b"Say hello.\nName a colour:\n", "no line of it is an object, it begins 'Say hello.'"),
    ("pairs.yaml", lambda: b"- prompt: a\n  chosen: b\n", "no line of it is an object"),
    ("pairs.csv", lambda: b"prompt,chosen,prompt\na,b,c\n", "two columns are called 'prompt'"),
    ("pairs.csv", lambda: b"prompt, chosen,rejected\na,b,c\n", "column ' chosen' has white space at an end"),
    ("pairs.tsv", lambda: b"prompt\tchosen \trejected\na\tb\tc\n", "column 'chosen ' has white space at an end"),
    ("pairs.csv", lambda: b"\xef\xbb\xbf\xef\xbb\xbfprompt,chosen,rejected\na,b,c\n", "it is not the column 'prompt'"),
    (
        "pairs.csv",
        lambda: b"prompt,chosen,rejected\ra,b,c\r",
        "a line ends in CR alone); convert the ends of its lines",
    ),
    ("pairs.csv", lambda: b"prompt,chosen,rejected\na,b\rb,c\n", "line 2: not CSV (a line ends in CR alone)"),
    ("pairs.jsonl", lambda: lines().replace(b"\n", b"\r"), "its lines end in CR alone, so all of it is one line"),
    ("pairs.parquet", lambda: twins(), "two columns are called 'chosen'"),
    ("pairs.csv", lambda: b'prompt,chosen,rejected\na,b,"c\n', "line 2: not CSV (unexpected end of data)"),
    ("pairs.csv", lambda: b"prompt,chosen,rejected\na,b,c\na,caf\xe9,c\n", "line 3: not UTF-8 at byte 6 of the line"),
    ("pairs.jsonl.gz", lambda: gzip.compress(lines())[:-12], "cannot be read"),
    ("pairs.parquet", lambda: columnar("parquet")[:-9], "a Parquet file that is damaged"),
]


@pytest.mark.parametrize(("name", "content", "said"), FOREIGN, ids=[f"{i}-{one[0]}" for i, one in enumerate(FOREIGN)])
@pytest.mark.parametrize("on_bad_record", ["error", "skip"])
def test_a_format_that_is_not_read_is_named_and_not_taken_for_bad_records(tmp_path, name, content, said, on_bad_record):
    path = tmp_path / name
    path.write_bytes(content())
    with pytest.raises(DataError) as refusal:
        load_preferences(path, on_bad_record=on_bad_record)
    assert str(path) in str(refusal.value) and said in str(refusal.value)
    assert "no usable record" not in str(refusal.value)


def test_rows_of_a_csv_file_are_told_by_the_line_on_which_they_begin(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b'prompt,chosen,rejected\n"two\nlines",b,c\n\na,b\na,,c\na,b,c,d\n')
    assert [record.name for record in read_records(path)] == ["a.csv:2", "a.csv:5", "a.csv:6", "a.csv:7"]
    assert load_preferences(path, on_bad_record="skip").skipped == {"wrong_type": 2, "empty": 1}
    (tmp_path / "b.csv").write_bytes(b"prompt,chosen,rejected\na,b\n")
    with pytest.raises(DataError, match=r"line 2: row: 2 cells where the head has 3 names; quote cells"):
        load_preferences(tmp_path / "b.csv")


def test_numbers_and_flags_of_a_csv_file_are_read_where_they_are_asked_for(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b"score,finished,id\n0.5,False,007\nhigh,no,1\n")

    def parse(record):
        return record.number("score"), record.flag("finished", True), record.field("id"), record.flag("absent", True)

    assert load_records(path, "train", parse, "skip") == (((0.5, False, "007", True),), {"wrong_type": 1})
    with pytest.raises(DataError, match="line 3: score = 'high': not a finite number"):
        load_records(path, "train", parse)


def test_records_of_a_json_list_and_rows_of_parquet_are_told_by_their_number(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([PAIRS[0], 7]))
    with pytest.raises(DataError, match=r"a.json, record 2: a JSON int, not an object"):
        load_preferences(tmp_path / "a.json")
    assert load_preferences(tmp_path / "a.json", on_bad_record="skip").skipped == {"invalid_json": 1}
    (tmp_path / "a.parquet").write_bytes(columnar("parquet"))
    with pytest.raises(DataError, match=r"a.parquet, row 0: better: missing, the record has 'prompt'"):
        load_preferences(tmp_path / "a.parquet", columns={"chosen": "better"})


def test_an_object_that_holds_the_records_is_told(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"version": 1, "data": PAIRS}))
    with pytest.raises(
        DataError, match="'version', 'data'; add it, .* take the list in 'data' alone if it has the records"
    ):
        load_preferences(tmp_path / "a.json")


def test_a_key_that_stands_twice_in_an_object_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "prompt": "b", "chosen": "c", "rejected": "d"}\n')
    with pytest.raises(DataError, match="line 1: .*the key 'prompt' stands twice in one object"):
        load_preferences(tmp_path / "a.jsonl")


def test_a_folder_is_read_whole_or_refused(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "train.csv").write_bytes(delimited())
    (folder / "README.md").write_text("pairs")
    assert len(load_preferences(folder).pairs) == 2
    (folder / "more.jsonl").write_bytes(lines())
    with pytest.raises(DataError, match=r"several formats: JSON \(more.jsonl\), CSV \(train.csv\); name the files"):
        load_preferences(folder)
    (folder / "more.jsonl").unlink()
    (folder / "train.csv").write_bytes(LFS)
    with pytest.raises(DataError, match="train.csv: the file is a pointer of Git LFS"):
        load_preferences(folder)


@pytest.mark.parametrize("name", ["none.csv", "none.parquet", "none.jsonl.gz", "./none"])
def test_a_path_of_any_format_that_is_not_there_is_not_looked_up_on_the_hub(name):
    with pytest.raises(DataError, match="no such file or directory"):
        list(read_records(name))


def test_a_pipe_and_a_file_that_may_not_be_read_are_told(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="neither a file nor a folder"):
        list(read_records(tmp_path / "pipe"))
    with pytest.raises(DataError, match="No such file"):
        read_file(tmp_path / "answers")


# URLs


@pytest.fixture
def in_memory():
    """`put(name, data)`: the URL of a file in fsspec's own memory."""
    import fsspec

    storage = fsspec.filesystem("memory")

    def put(name, data):
        storage.pipe(f"/{name}", data)
        return f"memory://{name}"

    yield put
    storage.store.clear()


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("pairs.jsonl", lines()),
        ("pairs.csv", delimited()),
        ("deep/er/pairs.tsv.gz", gzip.compress(delimited(delimiter="\t"))),
    ],
)
def test_a_url_is_read_as_the_file_that_it_names(in_memory, tmp_path, name, data):
    assert load_preferences(in_memory(name, data)).pairs == EXPECTED
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    assert load_preferences(path.as_uri()).pairs == EXPECTED
    assert load_preferences(f"{path.as_uri()}, {path}").pairs == EXPECTED * 2


def test_of_a_url_that_cannot_be_fetched_the_reason_and_the_remedy_are_told(in_memory):
    with pytest.raises(DataError, match=r"^memory://none\.jsonl: there is no such file; correct the URL"):
        load_preferences("memory://none.jsonl")
    with pytest.raises(
        DataError, match=r"^nowhere://x\.jsonl: cannot be fetched \(ValueError: .*install what fsspec needs"
    ):
        load_preferences("nowhere://x.jsonl")
    with pytest.raises(DataError, match=r"^memory://bad\.jsonl, line 1: "):
        load_preferences(in_memory("bad.jsonl", b'{"prompt": "a"}\n'))


@pytest.mark.parametrize("url", ["s3://bucket/pairs.jsonl", "gs://bucket/pairs.jsonl"])
def test_s3_and_gcs_are_handed_to_fsspec_by_their_names(monkeypatch, url):
    import fsspec

    def no_package(asked, mode):
        assert (asked, mode) == (url, "rb")
        raise ImportError("Install the package of this storage")

    monkeypatch.setattr(fsspec, "open", no_package)
    with pytest.raises(DataError, match=r"ImportError: Install .*s3fs for s3://, gcsfs for gs://"):
        load_preferences(url)


def test_a_copy_of_a_url_is_gone_when_it_has_been_read(in_memory, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    load_preferences(in_memory("pairs.jsonl", lines()))
    assert list(tmp_path.iterdir()) == []
