"""Tables in CSV and Parquet files: read once here, for long tables of runs and for texts."""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bayes_simfluence.checks import Misuse, shorten
from bayes_simfluence.files import first_line, readable


@dataclass(frozen=True)
class Table:
    """A table as it stands in a file.

    Attributes:
        path: the file.
        columns: name -> values of all rows; text in CSV.
        lines: each row's number in the file, from 1; in CSV that of its first line.
        unit: what messages call a row, "line" or "row".
    """

    path: Path
    columns: Mapping[str, Sequence[Any]]
    lines: Sequence[int]
    unit: str = "line"

    def at(self, row: int, column: str) -> str:
        """The place of a value, for an error."""
        return f"{self.path} {self.unit} {self.lines[row]}, column {column!r}"

    def rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Each row's number and its values by column."""
        for line, values in zip(self.lines, zip(*self.columns.values(), strict=True), strict=True):
            yield line, dict(zip(self.columns, values, strict=True))


def read_csv(path: Path) -> Table:
    """A CSV file with a header (RFC 4180, UTF-8, a byte order mark is allowed); skips blank lines.

    Raises:
        Misuse: not UTF-8, an empty file, a name twice, a row that cannot be read or is of another
            length than the header.
    """
    rows, lines = _csv_rows(path)
    header = rows[0]
    if len(set(header)) < len(header):
        raise Misuse(
            f"{path} line {lines[0]}",
            got=f"the header {shorten(header, 8)}",
            expected="a different name for every column",
            do="rename the columns in the first line",
        )
    for row, line in zip(rows, lines, strict=True):
        if len(row) != len(header):
            raise Misuse(
                f"{path} line {line}",
                got=f"{len(row)} values",
                expected=f"{len(header)}, one for each of {shorten(header, 8)}",
                do="put texts with commas in double quotes",
            )
    columns = zip(*rows, strict=True)
    return Table(path, {name: values for name, *values in columns}, lines[1:])


def _csv_rows(path: Path) -> tuple[list[list[str]], list[int]]:
    """The rows of a CSV file, header first, and the number of each row's first line."""
    text = utf8_text(path).removeprefix("\ufeff")
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: list[list[str]] = []
    lines: list[int] = []
    first = 1
    try:
        for row in reader:
            if row:
                rows.append(row)
                lines.append(first)
            first = reader.line_num + 1
    except csv.Error as error:
        raise Misuse(
            f"{path} line {first}",
            got=f"a row that cannot be read ({first_line(error)})",
            expected="comma-separated values",
            do="put texts with commas, quotes or line breaks in double quotes, and double a quote",
        ) from error
    if not rows:
        raise Misuse(
            str(path),
            got="an empty file",
            expected="a line with the names of the columns, and rows",
            do="check the file",
        )
    return rows, lines


def read_parquet(path: Path) -> Table:
    """A Parquet file, its values as they are.

    Raises:
        Misuse: a file that cannot be read, or pyarrow is not installed.
    """
    pyarrow = pyarrow_for(path)
    errors = (pyarrow.ArrowException, OSError)
    with readable(path, *errors, expected="a Parquet file", do="write it again"):
        table = pyarrow.parquet.read_table(path)
    return Table(path, table.to_pydict(), range(1, table.num_rows + 1), "row")


def pyarrow_for(path: Path) -> Any:
    """The package pyarrow with its submodule ``parquet``.

    Raises:
        Misuse: it is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise Misuse(
            str(path),
            got="a Parquet file, and no pyarrow to read or write it",
            expected="pyarrow",
            do="install the extra [parquet], or use CSV",
        ) from error
    return pyarrow


def utf8_text(path: Path) -> str:
    """The text of a file, its ends of lines as they are.

    Raises:
        Misuse: it is not UTF-8.
    """
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise Misuse(
            str(path), got=first_line(error), expected="UTF-8 text", do="convert the file to UTF-8"
        ) from error
