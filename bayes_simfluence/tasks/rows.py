"""Rows of JSON lines, CSV, Parquet or a Hugging Face dataset, and errors that name their line."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bayes_simfluence.checks import Misuse, shorten
from bayes_simfluence.data.tabular import read_csv, read_parquet, utf8_text
from bayes_simfluence.files import existing_file

Numbered = list[tuple[int, Mapping[str, Any]]]


@dataclass(frozen=True)
class Rows:
    """Rows of one file.

    Attributes:
        source: what messages call the file.
        unit: what messages call a row of it, "line" or "row".
        numbers: each row's number there, from 1.
        ids: stable ids, each once.
        fields: each row's values by name.
    """

    source: str
    unit: str
    numbers: Sequence[int]
    ids: Sequence[str]
    fields: Sequence[Mapping[str, Any]]

    def take(self, chosen: Sequence[int]) -> "Rows":
        """The rows at these positions."""
        return Rows(
            self.source,
            self.unit,
            [self.numbers[place] for place in chosen],
            [self.ids[place] for place in chosen],
            [self.fields[place] for place in chosen],
        )

    def where(self, at: int) -> str:
        """The row at a position, for messages: ``train.jsonl line 3``."""
        return f"{self.source} {self.unit} {self.numbers[at]}"

    @property
    def places(self) -> list[str]:
        """``where`` of every row."""
        return [self.where(at) for at in range(len(self.ids))]

    def column(self, field: str, option: str) -> list[str]:
        """A field of every row as text; ``option`` names the setting that chose the field.

        Raises:
            Misuse: a row without it, or with nothing in it.
        """
        values = [row.get(field) for row in self.fields]
        for at, value in enumerate(values):
            if value is None or not str(value).strip():
                raise self.lacks(at, field, option)
        return [str(value) for value in values]

    def lacks(self, at: int, field: str, option: str) -> Misuse:
        """The error that the row at ``at`` has no such field, or nothing in it."""
        return Misuse(
            self.where(at),
            got=f"no {field!r} among fields {shorten(self.fields[at], 8)}"
            if self.fields[at].get(field) is None
            else f"no {field!r} that is not blank",
            expected=f"a value for {field!r}",
            do=f"name the right field with --{option.replace('_', '-')}",
        )


def read_rows(source: Any, *, id_field: str = "id") -> Rows:
    """Read rows of a file, or of a ``datasets.Dataset``.

    Args:
        source: path of JSON lines, ``.csv`` with a header (RFC 4180) or ``.parquet`` (extra
            ``[parquet]``), or a dataset object.
        id_field: field of the ids; the row's number where a row has none.

    Raises:
        Misuse: no such file, no rows, a row that cannot be read, an id that occurs twice; the
            message names file and line.
    """
    if hasattr(source, "column_names"):
        split = getattr(source, "split", None)
        name = f"dataset {split}" if split else "dataset"
        return _rows(name, "row", _dataset(source), id_field)
    path = existing_file(source, expected="a file of JSON lines, CSV or Parquet")
    kind = path.suffix.lower()
    if kind == ".parquet":
        return _rows(str(path), "row", list(read_parquet(path).rows()), id_field)
    return _rows(str(path), "line", _csv(path) if kind == ".csv" else _json(path), id_field)


def _rows(source: str, unit: str, numbered: Numbered, id_field: str) -> Rows:
    if not numbered:
        raise Misuse(
            source, got="an empty file", expected=f"at least one {unit}", do="check the file"
        )
    numbers, fields = [number for number, _ in numbered], [row for _, row in numbered]
    ids = [
        str(number if row.get(id_field) is None else row[id_field])
        for number, row in zip(numbers, fields, strict=True)
    ]
    repeated = [name for name, count in Counter(ids).items() if count > 1]
    if repeated:
        where = shorten(
            number for name, number in zip(ids, numbers, strict=True) if name in repeated
        )
        raise Misuse(
            f"{source} field {id_field!r}",
            got=f"repeated ids {shorten(repeated)} ({unit}s {where})",
            expected="each id once",
            do="rename them, or name another field with --id-field",
        )
    return Rows(source, unit, numbers, ids, fields)


def _json(path: Path) -> Numbered:
    # Line feeds alone end a line: JSON allows Unicode's other ends of lines inside a text.
    lines = enumerate(utf8_text(path).split("\n"), 1)
    return [(number, _object(path, number, line)) for number, line in lines if line.strip()]


def _object(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        row = error
    if not isinstance(row, dict):
        raise Misuse(
            f"{path} line {number}",
            got=repr(line[:60]),
            expected="one JSON object",
            do="write one object a line",
        )
    return row


def _csv(path: Path) -> Numbered:
    table = read_csv(path)
    if not all(name.strip() for name in table.columns):
        raise Misuse(
            f"{path} line 1",
            got=f"the header {shorten(table.columns, 8)}",
            expected="a name for every column",
            do="write the names into the first line",
        )
    return list(table.rows())


def _dataset(source: Any) -> Numbered:
    if isinstance(source.column_names, dict):
        raise Misuse(
            "dataset",
            got=f"several splits {shorten(source.column_names)}",
            expected="a single split",
            do="pick one: dataset['train']",
        )
    return list(enumerate((dict(row) for row in source.with_format(None)), 1))
