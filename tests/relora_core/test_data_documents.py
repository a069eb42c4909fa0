"""Which documents a path holds, in the files that people have; and what is said of the others."""

from __future__ import annotations

import codecs
import gzip
import json
import os
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from data_files import write_bpe

from relora_core.config import ConfigError, DataConfig
from relora_core.data import DataError, documents, inspect, prepare, text
from relora_core.data.base import DataInfo


def texts(path: Path | str, *, text_field: str = "text") -> list[str]:
    return [
        "".join(documents.pieces(document))
        for _, file in documents.find_files(str(path))
        for document in documents.read(file, text_field=text_field)
    ]


def notes(path: Path | str) -> str:
    return "\n".join(documents.find(str(path)).notes)


def refused(path: Path | str, **options) -> str:
    with pytest.raises((ConfigError, DataError)) as caught:
        texts(path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def fingerprint(path: Path) -> str:
    return documents.fingerprint(
        documents.find_files(str(path)), text_field="text", tokenizer_digest="t"
    )


def jsonl(*texts: str | None, key: str = "text") -> bytes:
    return "".join(json.dumps({key: t}) + "\n" for t in texts).encode()


def write(file: Path, content: bytes) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    return file


# which files --------------------------------------------------------------------------------------
def test_links_to_folders_are_followed_and_circles_are_said(tmp_path):
    data, other = tmp_path / "data", tmp_path / "other"
    write(data / "a.jsonl", jsonl("own"))
    write(other / "b.jsonl", jsonl("linked"))
    write(other / "deep" / "c.jsonl", jsonl("deeper"))
    (data / "link").symlink_to(other)
    assert texts(data) == ["own", "linked", "deeper"]
    assert notes(data) == ""
    (other / "up").symlink_to(data)
    (data / "again").symlink_to(other)
    (data / "all").symlink_to(tmp_path)
    (data / "lost.jsonl").symlink_to(tmp_path / "nowhere")
    assert sorted(texts(data)) == ["deeper", "linked", "own"]
    listed = notes(data)
    assert "not followed: again/up, all, link" in listed  # the first way by name is taken
    assert "links that lead nowhere: lost.jsonl" in listed


def test_a_folder_goes_by_its_own_name_where_a_link_leads_to_it_too(tmp_path):
    """So the names, and with them the fingerprint, are those of a folder without links."""
    write(tmp_path / "data" / "z" / "a.jsonl", jsonl("one"))
    before = fingerprint(tmp_path / "data")
    (tmp_path / "data" / "a").symlink_to(tmp_path / "data" / "z")
    assert fingerprint(tmp_path / "data") == before
    assert "read already, or that hold this one, not followed: a" in notes(tmp_path / "data")


def test_a_glob_takes_each_file_by_one_way(tmp_path):
    data = tmp_path / "data"
    write(data / "z" / "a.jsonl", jsonl("one"))
    before = fingerprint(Path(f"{data}/**/*.jsonl"))
    (data / "b").symlink_to(data / "z")
    (data / "z" / "up").symlink_to(data)
    assert [name for name, _ in documents.find_files(f"{data}/**/*.jsonl")] == ["z/a.jsonl"]
    assert fingerprint(Path(f"{data}/**/*.jsonl")) == before
    assert "not followed: b, z/up" in notes(f"{data}/**/*.jsonl")
    assert [name for name, _ in documents.find_files(f"{data}/*/*.jsonl")] == ["z/a.jsonl"]
    assert "reached by a second way, read once: b/a.jsonl" in notes(f"{data}/*/*.jsonl")
    assert texts(f"{data}/b*/*.jsonl") == ["one"]


def test_a_file_beside_its_own_packed_copy_is_read_once_and_said(tmp_path):
    write(tmp_path / "a.jsonl", jsonl("one"))
    before = fingerprint(tmp_path)
    write(tmp_path / "a.jsonl.gz", gzip.compress(jsonl("one")))
    write(tmp_path / "a.jsonl.zst", zstandard.compress(jsonl("one")))
    assert texts(tmp_path) == ["one"]
    assert fingerprint(tmp_path) == before
    assert "lies unpacked or packed beside: a.jsonl.gz, a.jsonl.zst" in notes(tmp_path)


def test_packed_and_unpacked_files_that_differ_are_both_read_and_said(tmp_path):
    write(tmp_path / "a.jsonl", jsonl("one"))
    write(tmp_path / "a.jsonl.gz", gzip.compress(jsonl("two")))
    assert texts(tmp_path) == ["one", "two"]
    assert "of one name that differ, both read: a.jsonl" in notes(tmp_path)


def test_one_file_under_two_names_is_read_twice_and_said(tmp_path):
    write(tmp_path / "a.jsonl", jsonl("one"))
    (tmp_path / "b.jsonl").symlink_to("a.jsonl")
    os.link(tmp_path / "a.jsonl", tmp_path / "c.jsonl")
    assert texts(tmp_path) == ["one"] * 3
    assert "one and the same file, read once for each: a.jsonl = b.jsonl" in notes(tmp_path)


def test_hidden_files_and_other_kinds_are_left_out_and_said(tmp_path):
    write(tmp_path / "a.jsonl", jsonl("one"))
    before = fingerprint(tmp_path)
    write(tmp_path / "._a.jsonl", b"\0\5\x16\7")
    write(tmp_path / ".ipynb_checkpoints" / "a-checkpoint.jsonl", jsonl("old"))
    write(tmp_path / "b.json.gz", gzip.compress(jsonl("two")))
    write(tmp_path / "c.jsonl.bz2", b"BZh9")
    write(tmp_path / "README.md", b"no data")
    assert texts(tmp_path) == ["one"]
    assert fingerprint(tmp_path) == before
    assert "hidden files, not read: ._a.jsonl" in notes(tmp_path)
    assert "not read beside jsonl: b.json.gz, c.jsonl.bz2 (a glob" in notes(tmp_path)
    assert texts(f"{tmp_path}/*.json.gz") == ["two"]


def test_a_folder_that_may_not_be_read_is_said(tmp_path, monkeypatch):
    write(tmp_path / "a.jsonl", jsonl("one"))
    write(tmp_path / "locked" / "b.jsonl", jsonl("two"))
    scandir = os.scandir

    def deny(path):
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", deny)
    assert texts(tmp_path) == ["one"]
    assert "not readable (Permission denied): locked" in notes(tmp_path)


def test_a_file_that_may_not_be_read_is_one_line(tmp_path, monkeypatch):
    file = write(tmp_path / "a.jsonl", jsonl("one"))

    def deny(*args, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", deny)
    monkeypatch.setattr(documents, "open", deny, raising=False)
    with pytest.raises(DataError, match=r"a\.jsonl is damaged or unreadable: .*Permission denied"):
        list(documents.read(file, text_field="text"))


# txt ----------------------------------------------------------------------------------------------
def test_separators_make_many_documents_of_a_txt(tmp_path):
    content = (
        b"one\n<|endoftext|>\ntwo\n\ntwo\n<|endoftext|> three<|endoftext|>\n \n<|endoftext|>\n"
    )
    assert texts(write(tmp_path / "a.txt", content)) == ["one", "two\n\ntwo", " three"]
    assert texts(write(tmp_path / "b.txt", b"as it lies \r\n")) == ["as it lies \r\n"]
    assert texts(write(tmp_path / "c.txt", b" \n")) == [" \n"]
    assert "holds no document" in refused(write(tmp_path / "d.txt", b"<|endoftext|>\n"))
    windows = write(tmp_path / "e.txt.gz", gzip.compress(b"one\r\n<|endoftext|>\r\ntwo\r\n"))
    assert texts(windows) == ["one", "two\r\n"]


@pytest.mark.parametrize("long", [40, 64, 1000])
def test_pieces_of_any_size_are_the_same_documents(tmp_path, monkeypatch, long):
    parts = ["first " * 9, "x" * 70, "a\n\nb " * 30, "Grüße 世界 " * 12, "e"]
    file = write(tmp_path / "a.txt", "\n<|endoftext|>\n".join(parts).encode())
    monkeypatch.setattr(documents, "LONG", 2 * long)
    assert texts(file) == parts
    path = write(tmp_path / "b.txt", "".join(parts).encode())
    pieces = [d if isinstance(d, str) else list(d) for d in documents.read(path, text_field="")]
    assert "".join(pieces[0]) == "".join(parts)
    if long < 1000:
        assert max(map(len, pieces[0])) <= 2 * long
    untaken = [isinstance(d, str) for d in documents.read(file, text_field="")]
    assert len(untaken) == len(parts)


def test_a_byte_order_mark_is_no_text_and_gives_another_fingerprint(tmp_path):
    plain = write(tmp_path / "one" / "a.txt", b"the cat")
    marked = write(tmp_path / "two" / "a.txt", codecs.BOM_UTF8 + b"the cat")
    assert texts(plain) == texts(marked) == ["the cat"]
    line = codecs.BOM_UTF8 + jsonl("the cat")
    assert texts(write(tmp_path / "three" / "a.jsonl", line)) == ["the cat"]


def test_only_what_is_read_in_another_way_than_before_changes_its_fingerprint(tmp_path):
    """The digests are those of earlier versions, but for marks and separators in txt."""

    def of(name: str, content: bytes) -> str:
        shutil.rmtree(tmp_path / "x", ignore_errors=True)
        write(tmp_path / "x" / name, content)
        return fingerprint(tmp_path / "x")[:16]

    assert of("a.txt", b"the cat") == "5ed15d891716f575"
    assert of("a.jsonl", codecs.BOM_UTF8 + jsonl("<|endoftext|>")) == "98a3ed8fccefb55a"
    assert of("a.txt", codecs.BOM_UTF8 + b"the cat") != "392b20cb86aa275a"
    assert of("a.txt", b"the<|endoftext|>cat") != "9188365856644863"
    packed = gzip.compress(b"the<|endoftext|>cat", mtime=0)
    assert of("a.txt.gz", packed) != "9c4c860b19ac06e0"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_utf_16_is_named(tmp_path, name, encoding):
    mark = codecs.BOM_UTF16_BE if encoding == "utf-16-be" else b""
    file = write(tmp_path / name, mark + '{"text": "the cat"}\n'.encode(encoding))
    assert f"{file} is UTF-16 or UTF-32" in refused(file)


def test_latin_1_is_named_by_line(tmp_path):
    line = "one\n" * 70_000 + "Gr"
    file = write(tmp_path / "a.txt", line.encode() + b"\xfc\xdfe\n")
    assert f"{file} line 70001: byte 0xfc is not UTF-8" in refused(file)
    file = write(tmp_path / "b.txt", b"ends within a letter \xc3")
    assert "line 1: byte 0xc3 is not UTF-8 (unexpected end" in refused(file)


# packed -------------------------------------------------------------------------------------------
def test_zstd_with_a_long_window_and_in_several_frames(tmp_path):
    many = [f"document {i} " * 9 for i in range(99)]
    options = zstandard.ZstdCompressionParameters(window_log=30, enable_ldm=True)
    packer = zstandard.ZstdCompressor(compression_params=options).compressobj()
    long = packer.compress(jsonl(*many)) + packer.flush()
    assert texts(write(tmp_path / "a.jsonl.zst", long)) == many
    skippable = b"\x50\x2a\x4d\x18\x04\0\0\0note"
    frames = skippable + b"".join(zstandard.compress(jsonl(t)) for t in many)
    assert texts(write(tmp_path / "b.jsonl.zst", frames)) == many
    for broken in (long[:-30], frames[:-3], b"not zstandard"):
        assert "is damaged or unreadable" in refused(write(tmp_path / "c.jsonl.zst", broken))


def test_a_gzip_with_rubbish_after_it_is_named(tmp_path):
    good = gzip.compress(jsonl("one"))
    assert texts(write(tmp_path / "a.jsonl.gz", good + gzip.compress(jsonl("two")))) == [
        "one",
        "two",
    ]
    for broken in (good[:-4], good + b"rubbish", good[:-8] + bytes(8)):
        line = refused(write(tmp_path / "b.jsonl.gz", broken))
        assert "b.jsonl.gz is damaged or unreadable" in line


def test_a_line_without_end_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "LONGEST_LINE", 2**20)
    file = write(tmp_path / "a.jsonl.gz", gzip.compress(bytes(2**24)))
    assert f"{file} line 1: more than 1 MiB in one line" in refused(file)


# jsonl --------------------------------------------------------------------------------------------
def test_c4s_and_dolmas_ending_is_read(tmp_path):
    write(tmp_path / "en" / "c4-train.00000.json.gz", gzip.compress(jsonl("one", "two")))
    write(tmp_path / "dataset_info.json", b"{}")
    assert texts(tmp_path) == ["one", "two"]
    plain = write(tmp_path / "c4.json", jsonl("three"))
    assert texts(plain) == ["three"]
    assert texts(f"{tmp_path}/c4*.json") == ["three"]


def test_nested_fields_and_a_key_with_a_dot(tmp_path):
    nested = write(tmp_path / "a.jsonl", b'{"doc": {"text": "one"}}\n{"doc": null}\n')
    assert texts(nested, text_field="doc.text") == ["one"]
    literal = write(tmp_path / "b.jsonl", b'{"doc.text": "two", "doc": {"text": "one"}}\n')
    assert texts(literal, text_field="doc.text") == ["two"]
    line = refused(nested, text_field="doc.txt")
    assert line.endswith("no key 'doc.txt' (data.text_field), got keys text. Did you mean 'text'?")
    assert "got keys doc" in refused(nested, text_field="text")


def test_null_texts_are_left_out_and_counted(tmp_path):
    tokenizer = write_bpe(tmp_path / "tokenizer")
    write(tmp_path / "data" / "a.jsonl", jsonl("the cat", None, "sat", None))
    data = DataConfig(kind="text", path=str(tmp_path / "data"), seq_len=4)
    data.tokenizer = str(tokenizer)
    note = "2 records without a text (null) are left out"
    assert note in inspect(data).notes
    prepare(data, cache_dir=tmp_path / "cache")
    assert note in inspect(data, cache_dir=tmp_path / "cache").notes
    info: DataInfo = inspect(data)
    assert info.fingerprint
    tokens = text.Tokens(text.cache_folder(tmp_path / "cache", info.fingerprint))
    assert tokens.meta.documents == 2


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_file_of_null_texts_alone_is_passed_over_unless_there_is_no_other(tmp_path, kind):
    nulls = tmp_path / "data" / f"a.{kind}"
    write_texts(nulls, [None] * 3) if kind == "parquet" else write(nulls, jsonl(*[None] * 3))
    tokenizer = str(write_bpe(tmp_path / "tokenizer"))
    data = DataConfig(kind="text", path=str(nulls.parent), tokenizer=tokenizer, seq_len=4)
    with pytest.raises(ConfigError, match=r"holds no document: 3 null texts under 'text' .data"):
        inspect(data)
    other = nulls.with_name(f"b.{kind}")
    write_texts(other, ["the cat sat"]) if kind == "parquet" else write(other, jsonl("the cat sat"))
    assert inspect(data).notes == ["3 records without a text (null) are left out"]
    assert texts(nulls.parent) == ["the cat sat"]


def test_splits_side_by_side_are_said_as_all_are_read(tmp_path):
    """C4 lies so; to refuse it would end runs that were begun."""
    for split in ("train.00000-of-01024", "validation.00000-of-00008"):
        write(tmp_path / "en" / f"c4-{split}.json.gz", gzip.compress(jsonl(split)))
    assert notes(tmp_path / "en").startswith("train and validation by their names, all read")
    assert notes(f"{tmp_path}/en/c4-train*") == ""
    write(tmp_path / "x" / "contest" / "training.txt", b"no split")
    write(tmp_path / "x" / "test.txt", b"no training set beside it")
    assert notes(tmp_path / "x") == ""


# parquet ------------------------------------------------------------------------------------------
def write_texts(
    file: Path, values: list, *, kind: pa.DataType | None = None, column="text"
) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"id": range(len(values)), column: pa.array(values, kind)}), file)
    return file


@pytest.mark.parametrize(
    "kind",
    [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())],
)
def test_a_text_column_of_parquet(tmp_path, kind):
    file = write_texts(tmp_path / "a.parquet", ["one", None, "Grüße"], kind=kind)
    skipped: Counter[str] = Counter()
    assert list(documents.read(file, text_field="text", skipped=skipped)) == ["one", "Grüße"]
    assert skipped["null"] == 1


def test_parquet_with_another_column_a_field_or_ids(tmp_path):
    file = write_texts(tmp_path / "a.parquet", ["one"], column="content")
    assert texts(file, text_field="content") == ["one"]
    assert "no column 'text' (data.text_field), got columns id, content" in refused(file)
    file = write_texts(tmp_path / "b.parquet", [{"text": "two", "n": 3}], column="doc")
    assert texts(file, text_field="doc.text") == ["two"]
    file = write_texts(tmp_path / "c.parquet", [[1, 2]], column="input_ids")
    assert "Rows of ids are data=pretokenized" in refused(file)
    file = write_texts(tmp_path / "d.parquet", [1], column="text")
    assert "row 0: 'text' must be a string, got int" in refused(file)
    file = write_texts(tmp_path / "e.parquet", ["three"], column="doc.text")
    assert texts(file, text_field="doc.text") == ["three"]


def test_empty_shards_of_parquet_are_passed_over(tmp_path):
    write_texts(tmp_path / "a.parquet", [], kind=pa.null())
    write_texts(tmp_path / "b.parquet", ["one"])
    assert texts(tmp_path) == ["one"]


@pytest.mark.parametrize(
    "names",
    [
        ["default/train/0000.parquet", "default/train/0001.parquet"],
        ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"],
        ["dump=a/0.parquet", "dump=b/0.parquet"],
        ["data/CC-MAIN-2013-20/000_00000.parquet", "data/CC-MAIN-2013-48/000_00000.parquet"],
    ],
)
def test_hub_layouts_are_read_and_two_splits_refused(tmp_path, names):
    for name in names:
        write_texts(tmp_path / name, [name])
    assert texts(tmp_path) == names
    other = names[0].replace("train", "test").replace("dump=a", "split=test")
    if other.startswith("split"):
        shutil.move(tmp_path / "dump=b", tmp_path / "split=train")
    if other != names[0]:
        write_texts(tmp_path / other, ["not to be trained on"])
        assert "must name one split" in refused(tmp_path)
        assert "with test, train" in refused(tmp_path)


def test_many_small_files_take_no_time_to_find(tmp_path):
    for i in range(3000):
        write(tmp_path / f"{i % 50}" / f"{i}.txt", b"x")
    listing = documents.find(str(tmp_path))
    assert len(listing.files) == 3000
    assert listing.notes == []


@pytest.mark.skipif(shutil.which("zstd") is None, reason="no zstd command")
def test_the_zstd_commands_own_long_windows(tmp_path):
    file = write(tmp_path / "a.jsonl", jsonl("one", "two"))
    subprocess.run(["zstd", "-q", "--long=31", "--rm", str(file)], check=True)
    assert texts(tmp_path) == ["one", "two"]
