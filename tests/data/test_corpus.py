import json
import pickle
import shutil
from pathlib import Path

import pytest

from dsv3_jax.config import DataConfig
from dsv3_jax.data.corpus import Corpus, Documents, open_corpus
from dsv3_jax.data.errors import DataError


def names(documents: Documents) -> list[str]:
    return [document.name for document in documents]


def texts(corpus: Corpus) -> dict[str, str]:
    return {document.name: document.text for half in (corpus.train, corpus.validation) for document in half}


def write_numbered(folder: Path) -> None:
    folder.mkdir(parents=True)
    for number in range(20):
        (folder / f"{number}.txt").write_text(f"text {number}")


def refusal(path: Path | str, **fields: object) -> str:
    with pytest.raises(DataError) as caught:
        open_corpus(DataConfig(path=str(path), **fields))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_split_is_the_hash_of_the_relative_name(tmp_path: Path) -> None:
    # Chosen with coreutils: `printf NAME | sha256sum` begins below 0.30 * 2^16.
    write_numbered(tmp_path / "a" / "b")
    corpus = open_corpus(DataConfig(path=str(tmp_path / "a" / "b"), validation_share=0.30))
    assert set(names(corpus.validation)) == {"1.txt", "2.txt", "18.txt"}
    shutil.copytree(tmp_path / "a" / "b", tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "new.txt").write_text("another document moves no other")
    moved = open_corpus(DataConfig(path=str(tmp_path / "elsewhere"), validation_share=0.30))
    assert set(names(moved.validation)) - {"new.txt"} == {"1.txt", "2.txt", "18.txt"}


def test_halves_are_disjoint_complete_and_ordered(tmp_path: Path) -> None:
    write_numbered(tmp_path / "corpus")
    corpus = open_corpus(DataConfig(path=str(tmp_path / "corpus"), validation_share=0.5))
    train, validation = names(corpus.train), names(corpus.validation)
    assert sorted(train + validation) == sorted(f"{number}.txt" for number in range(20))
    assert train == sorted(train)
    assert validation == sorted(validation)
    smaller = open_corpus(DataConfig(path=str(tmp_path / "corpus"), validation_share=0.3))
    assert set(names(smaller.validation)) < set(validation)


def test_no_share_holds_nothing_out(tmp_path: Path) -> None:
    write_numbered(tmp_path / "corpus")
    corpus = open_corpus(DataConfig(path=str(tmp_path / "corpus"), validation_share=0.0))
    assert (len(corpus.train), len(corpus.validation)) == (20, 0)


def test_folder_is_read_recursively_without_hidden_and_unknown_files(tmp_path: Path) -> None:
    for name in ("a.txt", "sub/b.py", "sub/deep/c.MD", ".hidden/d.txt", ".e.txt", "f.bin", "empty.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"" if name == "empty.txt" else f"{name}\r\n".encode())
    corpus = open_corpus(DataConfig(path=str(tmp_path), validation_share=0.0))
    expected = {name: f"{name}\r\n" for name in ("a.txt", "sub/b.py", "sub/deep/c.MD")}
    assert texts(corpus) == expected


def test_glob_is_relative_to_its_fixed_part(tmp_path: Path) -> None:
    for name in ("x/one.txt", "y/two.txt", "y/three.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    corpus = open_corpus(DataConfig(path=f"{tmp_path}/**/*.txt", validation_share=0.0))
    assert texts(corpus) == {name: name for name in ("x/one.txt", "y/two.txt")}


def test_jsonl_is_found_by_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"id": number, "body": f"línea {number}\n"} for number in range(1, 13)]
    lines = [json.dumps(row, ensure_ascii=bool(row["id"] % 2)) for row in rows]
    path.write_text("\n".join(lines), encoding="utf-8")
    corpus = open_corpus(DataConfig(path=str(path), text_field="body", validation_share=0.3))
    assert texts(corpus) == {f"rows.jsonl:{row['id']}": row["body"] for row in rows}
    assert set(names(corpus.validation)) == {"rows.jsonl:7"}


def test_jsonl_blank_lines_and_half_surrogates(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n\n  \r\n{"text": "b\\ud83d!"}\r\n{"text": "\\ud83d\\ude00"}')
    corpus = open_corpus(DataConfig(path=str(path), validation_share=0.0))
    assert texts(corpus) == {"rows.jsonl:1": "a", "rows.jsonl:4": "b\ufffd!", "rows.jsonl:5": "\U0001f600"}


def test_later_jsonl_lines_are_read_on_access(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\nnot json\n{"body": 1, "id": 2}\n{"text": 5}\n[1]\n')
    train = open_corpus(DataConfig(path=str(path), validation_share=0.0)).train
    assert train[0].text == "a"
    for row, message in enumerate(
        (
            "rows.jsonl:2 is not JSON",
            "rows.jsonl:3 has no field 'text'.*body, id",
            "rows.jsonl:4 holds int",
            "holds a JSON list",
        ),
        start=1,
    ):
        with pytest.raises(DataError, match=message):
            train[row]


def test_parquet_is_found_by_row_across_row_groups(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    values = [f"row {number}" for number in range(7)] + [None]
    table = pyarrow.table({"content": values, "id": range(8)})
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet", row_group_size=3)
    train = open_corpus(DataConfig(path=str(tmp_path), text_field="content", validation_share=0.0)).train
    assert [train[row].text for row in (6, 0, 3, 2)] == [values[row] for row in (6, 0, 3, 2)]
    assert train[6].name == "t.parquet:6"
    with pytest.raises(DataError, match="t.parquet:7 holds NoneType"):
        train[7]


def test_source_pickles(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": ["p0", "p1"]}), tmp_path / "a.parquet")
    (tmp_path / "b.jsonl").write_text('{"text": "j0"}\n{"text": "j1"}\n')
    (tmp_path / "c.md").write_text("m")
    train = open_corpus(DataConfig(path=str(tmp_path), validation_share=0.0)).train
    train[0]
    assert list(pickle.loads(pickle.dumps(train))) == list(train)
    assert [document.text for document in train] == ["p0", "p1", "j0", "j1", "m"]


def test_single_text_is_cut_at_a_line(tmp_path: Path) -> None:
    lines = [f"line {number}\n" for number in range(100)]
    (tmp_path / "book.txt").write_text("".join(lines))
    corpus = open_corpus(DataConfig(path=str(tmp_path / "book.txt"), validation_share=0.1))
    (head,), (tail,) = corpus.train, corpus.validation
    assert head.text + tail.text == "".join(lines)
    assert tail.text.startswith("line 9")
    assert 0.09 <= len(tail.text) / len(head.text + tail.text) <= 0.12
    assert (head.name, tail.name) == ("book.txt (head)", "book.txt (tail)")


def test_single_text_of_one_line_is_cut_anyway(tmp_path: Path) -> None:
    (tmp_path / "line.txt").write_text("x" * 1000)
    corpus = open_corpus(DataConfig(path=str(tmp_path), validation_share=0.1))
    assert (len(corpus.train[0].text), len(corpus.validation[0].text)) == (900, 100)
    (tmp_path / "line.txt").write_text("x")
    assert "too short" in refusal(tmp_path)


def test_standard_library(tmp_path: Path) -> None:
    corpus = open_corpus(DataConfig())
    found = texts(corpus)
    assert {"os.py", "json/decoder.py", "asyncio/base_events.py"} <= set(found)
    assert not {"test", "tests", "idle_test", "site-packages"} & {part for name in found for part in name.split("/")}
    assert 8e6 < sum(len(text) for text in found.values()) < 30e6
    assert 0.02 < len(corpus.validation) / len(found) < 0.09


def test_refusals_name_the_file_and_the_way_out(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "missing")
    assert "matches no file" in refusal(f"{tmp_path}/*.txt")
    (tmp_path / "data.csv").write_text("a,b")
    for path in (tmp_path, tmp_path / "data.csv", f"{tmp_path}/*"):
        assert ".txt .py .md .jsonl .parquet" in refusal(path)

    binary = tmp_path / "binary"
    binary.mkdir()
    (binary / "good.txt").write_text("good")
    (binary / "bad.txt").write_bytes(b"ab\xff\xfe")
    assert "bad.txt is not UTF-8 text: byte 2 is 0xff" in refusal(binary)

    empty = tmp_path / "empty"
    empty.mkdir()
    assert "no file ending" in refusal(empty)
    (empty / "a.txt").write_text("")
    (empty / "b.jsonl").write_text("\n")
    assert "holds no text: 2 files" in refusal(empty)

    rows = tmp_path / "rows.jsonl"
    rows.write_text('\n{"body": "x", "id": 1}\n')
    assert "rows.jsonl:2 has no field 'text' (data.text_field); its fields: body, id" in refusal(rows)
    (tmp_path / "junk.parquet").write_bytes(b"not parquet at all")
    assert "junk.parquet is not a readable Parquet file" in refusal(tmp_path / "junk.parquet")


def test_refuses_a_parquet_without_the_column(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"], "id": [1]}), tmp_path / "t.parquet")
    assert "t.parquet has no column 'text' (data.text_field); its columns: body, id" in refusal(tmp_path)


def test_refuses_an_empty_half(tmp_path: Path) -> None:
    write_numbered(tmp_path / "corpus")
    assert "none of 20 documents for training" in refusal(tmp_path / "corpus", validation_share=1.0)
    message = refusal(tmp_path / "corpus", validation_share=1e-6)
    least = float(message.split("above ")[1].split(" ")[0])
    assert len(open_corpus(DataConfig(path=str(tmp_path / "corpus"), validation_share=least + 1e-4)).validation) == 1
