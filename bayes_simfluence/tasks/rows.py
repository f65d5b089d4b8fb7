"""Rows of JSON lines, CSV, Parquet or a Hugging Face dataset: fields by name, errors by line."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bayes_simfluence.checks import Misuse, shorten
from bayes_simfluence.files import first_line

__all__ = ["Rows", "read_rows"]

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
            [self.numbers[one] for one in chosen],
            [self.ids[one] for one in chosen],
            [self.fields[one] for one in chosen],
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
        return _rows(_dataset_name(source), "row", _dataset(source), id_field)
    path = Path(source)
    if not path.is_file():
        raise Misuse(
            str(path),
            got="no such file",
            expected="a file of JSON lines, CSV or Parquet",
            do="check the path",
        )
    kind = path.suffix.lower()
    if kind == ".parquet":
        return _rows(str(path), "row", _parquet(path), id_field)
    return _rows(str(path), "line", _csv(path) if kind == ".csv" else _json(path), id_field)


def _rows(source: str, unit: str, found: Numbered, id_field: str) -> Rows:
    if not found:
        raise Misuse(
            source, got="an empty file", expected=f"at least one {unit}", do="check the file"
        )
    numbers, fields = [number for number, _ in found], [row for _, row in found]
    ids = [
        str(number if row.get(id_field) is None else row[id_field])
        for number, row in zip(numbers, fields, strict=True)
    ]
    places: dict[str, list[int]] = {}
    for one, number in zip(ids, numbers, strict=True):
        places.setdefault(one, []).append(number)
    repeated = {one: at for one, at in places.items() if len(at) > 1}
    if repeated:
        where = shorten(number for at in repeated.values() for number in at)
        raise Misuse(
            f"{source} field {id_field!r}",
            got=f"repeated ids {shorten(repeated)} ({unit}s {where})",
            expected="each id once",
            do="rename them, or name another field with --id-field",
        )
    return Rows(source, unit, numbers, ids, fields)


def _json(path: Path) -> Numbered:
    # Line feeds alone end a line: JSON allows Unicode's other ends of lines inside a text.
    lines = enumerate(_decoded(path).split("\n"), 1)
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
    reader = csv.reader(io.StringIO(_decoded(path).removeprefix("\ufeff"), newline=""), strict=True)
    found: list[tuple[int, list[str]]] = []
    first = 1
    try:
        for cells in reader:
            found += [(first, cells)] if cells else []
            first = reader.line_num + 1
    except csv.Error as error:
        raise Misuse(
            f"{path} line {first}",
            got=f"a row that cannot be read ({first_line(error)})",
            expected="comma-separated values",
            do="put texts with commas, quotes or line breaks in double quotes, and double a quote",
        ) from error
    if not found:
        return []
    header = found[0][1]
    if len(set(header)) < len(header) or not all(name.strip() for name in header):
        raise Misuse(
            f"{path} line {found[0][0]}",
            got=f"the header {shorten(header, 8)}",
            expected="a different name for every column",
            do="write the names into the first line",
        )
    for number, cells in found[1:]:
        if len(cells) != len(header):
            raise Misuse(
                f"{path} line {number}",
                got=f"{len(cells)} values",
                expected=f"{len(header)}, one for each of {shorten(header, 8)}",
                do="put texts with commas in double quotes",
            )
    return [(number, dict(zip(header, cells, strict=True))) for number, cells in found[1:]]


def _parquet(path: Path) -> Numbered:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise Misuse(
            str(path),
            got="no package pyarrow",
            expected="the extra [parquet]",
            do="pip install 'bayes-simfluence[parquet]'",
        ) from error
    try:
        table = parquet.read_table(path)
    except (ArrowException, OSError) as error:
        raise Misuse(
            str(path),
            got=f"a file that cannot be read ({first_line(error)})",
            expected="a Parquet file",
            do="write it again",
        ) from error
    return list(enumerate(table.to_pylist(), 1))


def _dataset_name(source: Any) -> str:
    split = getattr(source, "split", None)
    return f"dataset {split}" if split else "dataset"


def _dataset(source: Any) -> Numbered:
    if isinstance(source.column_names, dict):
        raise Misuse(
            "dataset",
            got=f"several splits {shorten(source.column_names)}",
            expected="one of them",
            do="pick one: dataset['train']",
        )
    return list(enumerate((dict(row) for row in source.with_format(None)), 1))


def _decoded(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise Misuse(
            str(path), got=first_line(error), expected="UTF-8 text", do="convert the file to UTF-8"
        ) from error
