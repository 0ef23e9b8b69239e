"""Rows of CSV, JSON and parquet files, with their places; broken ones by policy."""

import csv
import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest
from test_prompts import ByteTokenizer

from nested_reft_mcore.config.data import DataConfig, DataSource, FieldMapping
from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.data.prompts import load_prompts, load_training_prompts
from nested_reft_mcore.data.sources import find_format, read_rows

ROWS = [
    {"prompt": "1 + 1", "answer": "2", "meta": {"level": "Level 3"}, "turns": [{"content": "x"}]},
    {"prompt": 'say "hi",\nplease', "answer": "hi", "meta": {"level": "4"}, "turns": [{}]},
]
FLAT = [{"prompt": row["prompt"], "answer": row["answer"]} for row in ROWS]
TOKENIZER = ByteTokenizer()


def write_csv(path, rows, delimiter=","):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


def write(path, rows=FLAT):
    if path.suffix in (".csv", ".tsv"):
        write_csv(path, rows, "\t" if path.suffix == ".tsv" else ",")
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=2), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "places"),
    [
        ("a.jsonl", (":1", ":2")),
        ("a.csv", (":2", ":3")),
        ("a.tsv", (":2", ":3")),
        ("a.json", (":row 1", ":row 2")),
        ("a.parquet", (":row 1", ":row 2")),
    ],
)
def test_every_format_gives_the_same_prompts(tmp_path, name, places):
    path = write(tmp_path / name)
    prompts = load_prompts(path, DataConfig(), TOKENIZER)
    expected = [(row["prompt"], row["answer"]) for row in FLAT]
    assert [(prompt.text, prompt.answer) for prompt in prompts.prompts] == expected
    assert [p.source for p in prompts.prompts] == [f"{path}{place}" for place in places]
    assert {p.dataset for p in prompts.prompts} == {"a"}


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet"])
def test_keys_look_into_objects_and_lists(tmp_path, name):
    source = DataSource(
        path=str(write(tmp_path / name, ROWS)),
        name="mine",
        fields=FieldMapping(prompt="turns.0.content", answer="answer", level="meta.level"),
        limit=1,
    )
    (prompt,) = load_prompts(source, DataConfig(), TOKENIZER).prompts
    assert (prompt.text, prompt.dataset, prompt.labels) == ("x", "mine", (("level", "3"),))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            gzip.compress(b"{}", mtime=0),
            "is a gzip file; expected JSON lines, JSON or CSV: unpack it with",
        ),
        (b"PAR1....", "is a parquet file; .* say format: parquet"),
        ('{"prompt": 1}'.encode("utf-16"), "is UTF-16 text; .* save it as UTF-8"),
        (b"\x80\x04\x95\0\0", "is a binary file"),
    ],
)
def test_what_is_no_text_is_refused_as_a_whole(tmp_path, content, message):
    """Whatever becomes of broken rows: there would be one in every line."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"rows.jsonl: {message}"):
        load_prompts(path, DataConfig(broken_rows="skip"), TOKENIZER)


def test_a_json_file_may_be_json_lines_or_wrap_its_list(tmp_path):
    lines = tmp_path / "lines.json"
    lines.write_text('{"prompt": "a", "answer": 1}\n{"prompt": "b", "answer": 2}\n')
    assert find_format(lines) == "jsonl"
    assert len(load_prompts(lines, DataConfig(), TOKENIZER)) == 2
    wrapped = tmp_path / "wrapped.json"
    wrapped.write_text(json.dumps({"data": FLAT}))
    source = DataSource(path=str(wrapped), format="json")
    assert len(load_prompts(source, DataConfig(), TOKENIZER)) == 2


BROKEN = [
    ("a.csv", b"prompt,answer\na,1\nb\nc,3\n", r"a\.csv:3: 1 fields; expected 2"),
    ("a.csv", b"prompt,answer\na,1\n\xff,2\nc,3\n", r"a\.csv:3: not UTF-8"),
    ("a.csv", b"prompt,answer\na,1\nb,\nc,3\n", r"a\.csv:3: no field 'answer'"),
    (
        "a.json",
        b'[{"prompt": "a", "answer": 1}, 7, {"prompt": "c", "answer": 3}]',
        r":row 2: found 7",
    ),
    (
        "a.jsonl",
        b'{"prompt": "a", "answer": 1}\n{"prompt":\n{"prompt": "c", "answer": 3}',
        ":2: not",
    ),
]


@pytest.mark.parametrize(("name", "content", "message"), BROKEN)
def test_a_broken_row_ends_the_run_or_is_counted(tmp_path, name, content, message, caplog):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_prompts(path, DataConfig(), TOKENIZER)
    prompts = load_prompts(path, DataConfig(broken_rows="skip"), TOKENIZER)
    assert [p.text for p in prompts.prompts] == ["a", "c"]
    assert prompts.num_broken == prompts.metrics()["data/num_broken"] == 1
    assert "left out: " in caplog.text


def test_only_broken_rows_are_an_error_that_names_the_first(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    with pytest.raises(UserError, match=r"no usable row is left.*a\.jsonl:1: no field 'answer'"):
        load_prompts(path, DataConfig(broken_rows="skip"), TOKENIZER)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.parquet", b"PAR1 not really", "expected parquet"),
        ("a.json", b'{"a": 1, "b": 2}', "cannot|not JSON|no field|found"),
        ("a.json", b"[1, 2", r"a\.json:1: not JSON"),
        ("a.json", b"[]", "the data set is empty"),
        ("a.csv", b"", "the data set is empty"),
        ("a.csv", b"prompt,answer\n", "the data set is empty"),
    ],
)
def test_a_file_that_is_something_else_is_named(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    for policy in ("error", "skip"):
        with pytest.raises(UserError, match=message) as caught:
            load_prompts(path, DataConfig(broken_rows=policy), TOKENIZER)
        assert str(path) in str(caught.value)
    with pytest.raises(UserError, match="cannot be read"):
        list(read_rows(DataSource(path=str(tmp_path / f"gone{path.suffix}"))))


def test_a_limit_counts_usable_rows_of_each_source(tmp_path):
    first, second = write(tmp_path / "a.csv"), write(tmp_path / "b.parquet")
    config = DataConfig(
        train=(DataSource(path=str(first), limit=2), DataSource(path=str(second))), limit=1
    )
    prompts = load_training_prompts(config, TOKENIZER)
    assert [(part.name, part.size) for part in prompts.parts] == [("a", 2), ("b", 1)]
    assert [prompt.dataset for prompt in prompts.prompts] == ["a", "a", "b"]


def test_fingerprints_tell_data_apart(tmp_path):
    one = load_prompts(write(tmp_path / "a.csv"), DataConfig(), TOKENIZER)
    same = load_prompts(write(tmp_path / "b.parquet"), DataConfig(), TOKENIZER)
    other = load_prompts(write(tmp_path / "c.json", FLAT[::-1]), DataConfig(), TOKENIZER)
    assert one.fingerprint() == same.fingerprint() != other.fingerprint()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "prompt,answer,answer\nq,1,2\n", r"a\.csv:1: .*'answer' among them"),
        ("a.csv", "prompt;answer\nq;1\n", r"a\.csv:1: one column, 'prompt;answer', .*';'"),
        ("a.tsv", "prompt,answer\nq,1\n", r"a\.tsv:1: one column.*a tab"),
        ("a.json", '{\n "prompt": "q"\n}\n', r"no row can be read; the first .*a\.json:1: not J"),
    ],
)
def test_a_file_that_is_laid_out_otherwise_is_told_as_that(tmp_path, name, text, message):
    path = tmp_path / name
    path.write_text(text)
    skipping = DataConfig(broken_rows="skip")
    with pytest.raises(UserError, match=message):
        load_prompts(path, skipping, TOKENIZER)
