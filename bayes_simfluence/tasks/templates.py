"""Texts from the fields of a row: plain templates, ``{premise} because {hypothesis}``."""

import re
from collections.abc import Sequence

from bayes_simfluence.checks import Misuse, shorten
from bayes_simfluence.tasks.rows import Rows

TOKEN = re.compile(r"\{\{|\}\}|\{(?P<field>[^{}]*)\}|[{}]|[^{}]+")


def fields_of(template: str, option: str) -> list[str]:
    """The fields that a template names; what stands between braces is a name, nothing else.

    >>> fields_of("{a}, {{so}} {b}", "prompt")
    ['a', 'b']
    """
    return [text for is_field, text in _parsed(template, option) if is_field]


def filled(rows: Rows, template: str, option: str) -> list[str]:
    """The template with every row's values in place of the names.

    Args:
        rows: what is filled in, as text; a value may be blank where others are not.
        template: text with fields in braces; a brace itself is written twice.
        option: the setting that holds the template, for messages.

    Raises:
        Misuse: a brace alone, a field that a row lacks, a row whose text is blank.

    >>> rows = Rows("file", "line", [1], ["1"], [{"a": 3, "b": "yes"}])
    >>> filled(rows, "{a}: {b} {{ok}}", "prompt")
    ['3: yes {ok}']
    """
    parts = _parsed(template, option)
    names = [text for is_field, text in parts if is_field]
    for at, row in enumerate(rows.fields):
        for name in names:
            if row.get(name) is None:
                raise rows.lacks(at, name, option)
    texts = [
        "".join(str(row[text]) if is_field else text for is_field, text in parts)
        for row in rows.fields
    ]
    for at, text in enumerate(texts):
        if not text.strip():
            raise _blank(rows, at, names, option)
    return texts


def _parsed(template: str, option: str) -> list[tuple[bool, str]]:
    """The template's parts in order: whether each is a field, and its name or the text itself."""
    parts = []
    for match in TOKEN.finditer(template):
        token, field = match.group(), match["field"]
        if token in ("{", "}") or field == "":
            raise Misuse(
                option,
                got=f"{token!r} in {template!r}",
                expected="field names in braces, as '{premise} {hypothesis}'",
                do="close the brace, or write a brace of the text twice",
            )
        literal = token[0] if token in ("{{", "}}") else token
        parts.append((field is not None, literal if field is None else field))
    return parts


def _blank(rows: Rows, at: int, names: Sequence[str], option: str) -> Misuse:
    if len(names) == 1:
        return rows.lacks(at, names[0], option)
    return Misuse(
        rows.where(at),
        got=f"a blank text of fields {shorten(names, 8)}",
        expected="some text",
        do=f"correct the row, or the template --{option.replace('_', '-')}",
    )
