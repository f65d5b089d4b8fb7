"""Settings in one dataclass for Python, command line and YAML: layers, types, files.

A settings class is a frozen dataclass whose fields are made by ``say``; their annotations are
``str``, ``int``, ``float``, ``bool``, unions of these, and ``None`` for "not said".
"""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import field, fields
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from bayes_simfluence.checks import Misuse, choice_of, shorten
from bayes_simfluence.files import PathLike, atomically

__all__ = [
    "check_choices",
    "config_from_yaml",
    "config_path",
    "kinds_of",
    "layered",
    "save_config",
    "say",
]

Config = TypeVar("Config")
WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


def say(help: str, default: Any, choices: tuple[str, ...] = ()) -> Any:
    """A field of a settings class, with what its option says of it."""
    return field(default=default, metadata={"help": help, "choices": choices})


def kinds_of(config: type[Any]) -> dict[str, tuple[type, ...]]:
    """Types that each setting may have; ``NoneType`` among them when it may be left unsaid."""
    hints = get_type_hints(config)
    return {one.name: get_args(hints[one.name]) or (hints[one.name],) for one in fields(config)}


def layered(config: type[Config], *layers: Mapping[str, Any]) -> Config:
    """Settings from layers; the last one that names a setting decides.

    Raises:
        Misuse: names that are no settings, values of another type.
    """
    kinds = kinds_of(config)
    settings = {name: value for layer in layers for name, value in layer.items()}
    unknown = [name for name in settings if name not in kinds]
    if unknown:
        raise Misuse(
            "settings",
            got=f"unknown names {shorten(unknown)}",
            expected=f"names among {shorten(kinds, 50)}",
            do="correct them",
        )
    examples = {one.name: one.default for one in fields(config)}  # type: ignore[arg-type]
    return config(
        **{name: _typed(name, one, kinds[name], examples[name]) for name, one in settings.items()}
    )


def check_choices(config: Any) -> None:
    """Raise when a setting is none of its choices."""
    for one in fields(config):
        value = getattr(config, one.name)
        if one.metadata["choices"] and value is not None:
            choice_of(one.name, value, one.metadata["choices"])


def config_path(result: PathLike) -> Path:
    """Where the resolved settings behind a result lie: beside it."""
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

    if not Path(path).is_file():
        raise Misuse(str(path), got="no such file", expected="a YAML file", do="check --config")
    try:
        settings = yaml.safe_load(Path(path).read_text("utf-8")) or {}
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
    if type(value) not in kinds:
        expected = " or ".join(WORDS[one] for one in kinds if one in WORDS)
        shown = "" if example is None else f", as in {name}: {example!r}"
        raise Misuse(name, got=repr(value), expected=expected, do=f"correct it{shown}")
    return value
