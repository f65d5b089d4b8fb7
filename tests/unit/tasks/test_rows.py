"""Rows of every kind of file, what is refused, and templates over them."""

import csv
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bayes_simfluence.checks import Misuse
from bayes_simfluence.tasks.rows import Rows, read_rows
from bayes_simfluence.tasks.templates import fields_of, filled

ROWS = [
    {"id": "x", "text": 'one, "two"\nthree', "label": 1},
    {"id": "y", "text": "four", "label": 0},
]


def written(folder, kind):
    """``ROWS`` in a file of this kind, or as a dataset."""
    path = folder / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text("".join(f"{json.dumps(row)}\n" for row in ROWS), "utf-8")
    elif kind == "csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(ROWS[0]))
            writer.writeheader()
            writer.writerows(ROWS)
    elif kind == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    else:
        return pytest.importorskip("datasets").Dataset.from_list(ROWS)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "dataset"])
def test_every_kind_of_file_holds_the_same_rows(tmp_path, kind):
    rows = read_rows(written(tmp_path, kind))
    assert rows.ids == ["x", "y"]
    assert rows.column("text", "text_field") == [row["text"] for row in ROWS]
    assert rows.column("label", "label_field") == ["1", "0"]
    assert rows.take([1]).ids == ["y"]
    last = {"jsonl": "line 2", "csv": "line 4", "parquet": "row 2", "dataset": "row 2"}[kind]
    assert rows.where(1).endswith(last)
    with pytest.raises(Misuse, match=r"got no 'gold' among .*text.*expected.*--label-field"):
        rows.column("gold", "label_field")
    assert read_rows(written(tmp_path, kind), id_field="label").ids == ["1", "0"]


def test_numbers_stand_in_for_ids(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(
        '{"text": "a b", "label": 1, "id": "x"}\r\n\n{"text": "c", "label": false, "other": 2}\n',
        "utf-8",
    )
    rows = read_rows(path)
    assert (rows.ids, rows.numbers) == (["x", "3"], [1, 3])
    assert rows.column("label", "label_field") == ["1", "False"]


def test_lines_end_at_line_feeds_only(tmp_path):
    """Unicode has more ends of lines, and JSON allows them inside a text."""
    text = "one\u2028two\u0085three"
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": text, "label": "a"}, ensure_ascii=False) + "\n", "utf-8")
    assert read_rows(path).column("text", "text_field") == [text]


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (None, r"rows\.jsonl: got no such file"),
        ("", "an empty file"),
        ("\n  \n", "an empty file"),
        (
            '{"text": "a", "label": 1}\n{"text": "b",\n',
            r"line 2: got .*\{\"text\": \"b\",.*one JSON",
        ),
        ('{"text": "a", "label": 1}\n\n[1, 2]\n', r"line 3: got '\[1, 2\]'.*one JSON object"),
        ('{"label": 1}', "line 1: got no 'text' among fields label"),
        ('{"text": "  ", "label": 1}', "line 1: got no 'text' that is not blank"),
        ('{"text": "a", "label": null}', r"line 1: got no 'label' .*--label-field"),
        ('{"text": "a", "label": 1, "id": 5}\n' * 2, r"'id': got repeated ids 5 \(lines 1, 2\)"),
        ('{"text": "a", "label": 1, "id": 2}\n{"text": "b", "label": 1}', "repeated ids 2"),
    ],
)
def test_json_lines_that_do_not_fit_are_refused(tmp_path, content, match):
    path = tmp_path / "rows.jsonl"
    if content is not None:
        path.write_text(content, "utf-8")
    with pytest.raises(Misuse, match=match):
        rows = read_rows(path)
        rows.column("text", "text_field")
        rows.column("label", "label_field")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("", "an empty file"),
        ("text,label\n", "an empty file"),
        (
            "text,label\na,1\n\nb,2,3\n",
            r"rows\.csv line 4: got 3 values; expected 2, .*text, label",
        ),
        ("text,label\na\n", "line 2: got 1 values"),
        ("text,text\na,1\n", "line 1: got the header text, text; .*different name"),
        ("text,\na,1\n", "line 1: got the header"),
        ('text,label\n"a"b,1\n', "line 2: got a row that cannot be read"),
        ('text,label\nc,0\n"a\n,1\n', "line 3: got a row that cannot be read"),
    ],
)
def test_csv_that_does_not_fit_is_refused(tmp_path, content, match):
    path = tmp_path / "rows.csv"
    path.write_text(content, "utf-8")
    with pytest.raises(Misuse, match=match):
        read_rows(path)


def test_csv_of_a_spreadsheet_begins_with_a_mark(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes("\ufefftext,label\r\na,1\r\n".encode())
    assert read_rows(path).column("text", "text_field") == ["a"]


def test_files_that_cannot_be_read_are_named(tmp_path):
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"no parquet")
    with pytest.raises(Misuse, match=r"rows\.parquet: got a file that cannot be read"):
        read_rows(path)
    path = tmp_path / "rows.csv"
    path.write_bytes(b"text\n\xff\n")
    with pytest.raises(Misuse, match="expected UTF-8 text"):
        read_rows(path)


def test_a_dataset_of_several_splits_is_refused(tmp_path):
    datasets = pytest.importorskip("datasets")
    both = datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)})
    with pytest.raises(Misuse, match=r"several splits train; .*dataset\['train'\]"):
        read_rows(both)


# Templates

TEXT = st.text(alphabet=st.characters(exclude_characters="{}"), max_size=6)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(TEXT, TEXT.filter(bool), TEXT), min_size=1, max_size=4))
def test_templates_are_filled_like_concatenation(parts):
    row = {name: value for _, name, value in parts}
    template = "x{{" + "".join(f"{text}{{{name}}}" for text, name, _ in parts) + "}}"
    rows = Rows("file", "line", [1], ["1"], [row])
    expected = "x{" + "".join(f"{text}{row[name]}" for text, name, _ in parts) + "}"
    assert filled(rows, template, "prompt") == [expected]
    assert fields_of(template, "prompt") == [name for _, name, _ in parts]


def test_a_blank_value_is_allowed_beside_others():
    rows = Rows("file", "line", [4], ["1"], [{"a": "", "b": "c", "d": None}])
    assert filled(rows, "{a}{b}", "prompt") == ["c"]
    with pytest.raises(Misuse, match=r"file line 4: got no 'a' that is not blank; .*--text-field"):
        filled(rows, "{a}", "text_field")
    with pytest.raises(Misuse, match=r"file line 4: got a blank text of fields a, a; .*--prompt"):
        filled(rows, "{a} {a}", "prompt")
    with pytest.raises(Misuse, match="file line 4: got no 'd' among fields a, b, d"):
        filled(rows, "{b} {d}", "prompt")


@pytest.mark.parametrize("template", ["{a", "a}", "{}", "{a}}", "{{a}"])
def test_templates_that_are_none_are_refused(template):
    with pytest.raises(Misuse, match=r"prompt: got .* expected field names in braces"):
        fields_of(template, "prompt")


def test_nothing_of_a_template_is_evaluated():
    rows = Rows("file", "line", [1], ["1"], [{"a": "b"}])
    for template in ("{a.__class__}", "{a[0]}", "{a!r}", "{a:>9}"):
        with pytest.raises(Misuse, match=r"got no 'a.+' among fields a"):
            filled(rows, template, "prompt")
