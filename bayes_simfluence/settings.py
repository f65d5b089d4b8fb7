"""Settings of a dataclass, the same in Python, on the command line and in YAML.

A settings class is a frozen dataclass whose fields are made by ``say``; their annotations are
``str``, ``int``, ``float``, ``bool``, unions of these, and ``None`` for "left out".
"""

import dataclasses
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from bayes_simfluence.checks import Misuse, choice_of, shorten
from bayes_simfluence.files import PathLike, atomically, existing_file

Config = TypeVar("Config")
WORDS = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    dict: "settings by name",
}


def say(help: str, default: Any, choices: tuple[str, ...] = ()) -> Any:
    """A field of a settings class, with the help and the choices of its option."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


def kinds_of(config: type[Any]) -> dict[str, tuple[type, ...]]:
    """Types that each setting may have; ``NoneType`` among them when it may be left out."""
    hints = get_type_hints(config)
    types = {
        field.name: get_args(hints[field.name]) or (hints[field.name],)
        for field in dataclasses.fields(config)
    }
    return {name: tuple(get_origin(kind) or kind for kind in types[name]) for name in types}


def layered(config: type[Config], *layers: Mapping[str, Any], what: str = "settings") -> Config:
    """Settings from layers; the last one that names a setting decides.

    Raises:
        Misuse: names that are no settings, values of another type.
    """
    kinds = kinds_of(config)
    settings = {name: value for layer in layers for name, value in layer.items()}
    unknown = [name for name in settings if name not in kinds]
    if unknown:
        raise Misuse(
            what,
            got=f"unknown names {shorten(unknown)}",
            expected=f"names among {shorten(kinds, 50)}" if kinds else "no settings",
            do="correct them",
        )
    defaults = {field.name: field.default for field in dataclasses.fields(config)}  # type: ignore[arg-type]
    return config(
        **{
            name: _typed(name, value, kinds[name], defaults[name])
            for name, value in settings.items()
        }
    )


def check_choices(config: Any) -> None:
    """Raise when a setting is none of its choices."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.metadata["choices"] and value is not None:
            choice_of(field.name, value, field.metadata["choices"])


def config_path(result: PathLike) -> Path:
    """The file beside a result that holds its resolved settings."""
    return Path(result).with_suffix(".yaml")


def save_config(settings: Mapping[str, Any], path: PathLike) -> None:
    """Write settings as YAML, all or nothing."""
    import yaml

    with atomically(path) as partial:
        partial.write_text(yaml.safe_dump(dict(settings), sort_keys=False), "utf-8")


def config_from_yaml(path: PathLike) -> dict[str, Any]:
    """The settings that a YAML file names.

    Raises:
        Misuse: no such file, or no mapping in it.
    """
    import yaml

    path = existing_file(path, expected="a YAML file", do="check --config")
    try:
        settings = yaml.safe_load(path.read_text("utf-8")) or {}
    except yaml.YAMLError as error:
        settings = str(error).splitlines()[0]
    if not isinstance(settings, dict):
        raise Misuse(
            str(path),
            got=shorten([settings]),
            expected="YAML lines 'setting: value'",
            do="start from the file that is saved beside a recording or a posterior",
        )
    return settings


def _typed(name: str, value: Any, kinds: tuple[type, ...], example: Any) -> Any:
    """A setting of one of its types; YAML reads ``2e-5`` as text and 1 as an integer."""
    if float in kinds and isinstance(value, int | str) and not isinstance(value, bool):
        with suppress(ValueError):
            return float(value)
    if type(value) not in kinds and Any not in kinds:
        expected = " or ".join(WORDS[kind] for kind in kinds if kind in WORDS)
        shown = "" if example is None else f", as in {name}: {example!r}"
        raise Misuse(name, got=repr(value), expected=expected, do=f"correct it{shown}")
    return value
