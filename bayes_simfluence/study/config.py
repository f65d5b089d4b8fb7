"""The settings of a study: cells (a data set and a tuning each), methods, numbers of runs."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from bayes_simfluence.checks import Misuse, choice_of, count_of, positive_integer, shorten
from bayes_simfluence.recording.config import RecordConfig
from bayes_simfluence.settings import layered, say

__all__ = ["ALL", "EXAMPLE", "CellConfig", "StudyConfig", "StudyProtocol", "study_of"]

EXAMPLE = "example:"
"""Before the name of a recording that ships with the package."""
ALL = "all"
"""As many checkpoints as there are steps."""
NESTED = ("cells", "counts", "methods", "simulators")


@dataclass(frozen=True)
class CellConfig:
    """One recording of a study.

    Attributes:
        name: of its folder.
        runs: a recording that exists: a path, or ``example:trec``; recorded when empty.
        record: settings of the recording; without them an existing one has no task, so that no
            method can attribute.
    """

    name: str
    runs: str = ""
    record: RecordConfig | None = None

    def continues(self, earlier: "CellConfig") -> bool:
        """Whether results of ``earlier`` are results of this one; settings may have joined."""
        known = earlier.record is None or earlier.record == self.record
        return known and earlier.runs == self.runs


@dataclass(frozen=True)
class StudyProtocol:
    """What all cells, methods and numbers of runs have in common."""

    validate: int = say("runs after the fitted ones that choose penalties (ridge)", 2)
    held_out: int = say("runs after those that everything is judged on", 5)
    pilot: int = say("number of the run whose weights methods see", 0)
    checkpoints: int | str = say("weights saved of the pilot run, or 'all' steps", 10)
    draws: int = say("simulated draws a run", 200)
    resamples: int = say("bootstrap resamples over runs", 1000)
    seed: int = say("decides fits, projections and draws", 0)


@dataclass(frozen=True)
class StudyConfig:
    """Everything that decides a study; saved in its folder.

    Attributes:
        cells: recordings.
        counts: numbers of runs that simulators are fitted to: the first ones of each recording.
        methods: attributions whose scores become simulators; all that there are when ``None``.
        simulators: what is fitted to runs without scores; all that there are when ``None``.
        protocol: the rest.
    """

    cells: tuple[CellConfig, ...]
    counts: tuple[int, ...] = (5, 10, 15, 20, 25)
    methods: tuple[str, ...] | None = None
    simulators: tuple[str, ...] | None = None
    protocol: StudyProtocol = StudyProtocol()

    def checked(self) -> "StudyConfig":
        """The settings themselves when each is possible.

        Raises:
            Misuse: the first one that is not.
        """
        protocol = self.protocol
        for name in ("held_out", "draws", "resamples"):
            positive_integer(name, getattr(protocol, name))
        for name in ("validate", "pilot", "seed"):
            count_of(name, getattr(protocol, name))
        if protocol.checkpoints != ALL:
            positive_integer(
                "checkpoints", protocol.checkpoints, do=f"pass a whole number or {ALL}"
            )
        for one in self.counts:
            positive_integer("counts", one)
        names = [one.name for one in self.cells]
        for what, values in (("counts", self.counts), ("cells", tuple(names))):
            if not values or len(set(values)) < len(values):
                raise Misuse(
                    what,
                    got=shorten(values) or "none",
                    expected="at least one, each once",
                    do=f"correct the list of {what}",
                )
        for cell in self.cells:
            self._check(cell)
        return self

    @property
    def needed(self) -> int:
        """Runs that a recording must have."""
        return max(self.counts) + self.protocol.validate + self.protocol.held_out

    def as_dict(self) -> dict[str, Any]:
        """The settings as plain values, for YAML."""
        listed = {name: getattr(self, name) for name in ("counts", "methods", "simulators")}
        return {
            **{name: None if one is None else list(one) for name, one in listed.items()},
            **asdict(self.protocol),
            "cells": [asdict(one) for one in self.cells],
        }

    def continues(self, earlier: "StudyConfig", where: str) -> None:
        """Raise when results of ``earlier`` would be mixed with results of other settings."""
        other = [
            one.name
            for one in fields(StudyProtocol)
            if getattr(self.protocol, one.name) != getattr(earlier.protocol, one.name)
        ]
        if max(self.counts) != max(earlier.counts):
            # Then other runs would be held out.
            other.append("largest of counts")
        before = {one.name: one for one in earlier.cells}
        other += [one.name for one in self.cells if not one.continues(before.get(one.name, one))]
        if other:
            raise Misuse(
                where,
                got=f"a study with other {shorten(other)}",
                expected="the settings that it was begun with; only cells, methods and smaller "
                "counts may join",
                do="restore them, or choose another folder",
            )

    def _check(self, cell: CellConfig) -> None:
        what = f"cell {cell.name!r}"
        if not cell.name or set(cell.name) & set("/\\:") or cell.name.startswith("."):
            raise Misuse(
                what, got="a name that is no folder's", expected="a word", do="rename the cell"
            )
        if not cell.runs and cell.record is None:
            raise Misuse(
                what,
                got="neither runs nor record",
                expected="a recording that exists, or settings to record with",
                do=f"give runs: FILE, runs: {EXAMPLE}trec, or record: {{...}}",
            )
        if cell.record is None:
            return
        said = self.protocol
        if cell.record.runs < self.needed:
            raise Misuse(
                f"{what}: runs",
                got=cell.record.runs,
                expected=f"at least {self.needed}: {max(self.counts)} fitted, "
                f"{said.validate} to validate, {said.held_out} held out",
                do="record more, or lower counts",
            )
        if said.pilot >= cell.record.runs:
            raise Misuse(
                "pilot",
                got=said.pilot,
                expected=f"a run among 0..{cell.record.runs - 1}",
                do="choose a fitted run",
            )
        if said.checkpoints != ALL and int(said.checkpoints) > cell.record.steps:
            raise Misuse(
                "checkpoints",
                got=said.checkpoints,
                expected=f"at most the {cell.record.steps} steps of a run of {what}",
                do=f"ask for fewer, or for {ALL}",
            )


def study_of(settings: Mapping[str, Any]) -> StudyConfig:
    """A study from plain values, as in its YAML file; checked.

    ``common`` holds settings of recording that all cells share; a cell's own ``record`` overrules
    them.

    >>> study = study_of({"counts": [5], "cells": [{"name": "a", "runs": "example:trec"}]})
    >>> study.cells[0].runs, study.needed
    ('example:trec', 12)

    Raises:
        Misuse: unknown names, values of another type, impossible settings.
    """
    common = _mapping("common", settings.get("common") or {})
    plain = {name: one for name, one in settings.items() if name not in (*NESTED, "common")}
    listed: dict[str, Any] = {
        name: tuple(_items(name, settings, kind))
        for name, kind in (("counts", int), ("methods", str), ("simulators", str))
        if settings.get(name) is not None
    }
    said = (_mapping("cells", one) for one in _items("cells", settings, dict))
    cells = tuple(_cell(one, common) for one in said)
    protocol = layered(StudyProtocol, plain)
    return StudyConfig(cells=cells, protocol=protocol, **listed).checked()


def _cell(said: Mapping[str, Any], common: Mapping[str, Any]) -> CellConfig:
    known = [one.name for one in fields(CellConfig)]
    unknown = [name for name in said if name not in known]
    name, runs = said.get("name", ""), said.get("runs") or ""
    if unknown or not isinstance(name, str) or not isinstance(runs, str):
        raise Misuse(
            f"cell {name!r}",
            got=f"unknown names {shorten(unknown)}" if unknown else f"name {name!r}, runs {runs!r}",
            expected=f"{', '.join(known)}: text, text and settings of a recording",
            do="correct the cell",
        )
    if said.get("record") is None and (runs or not common):
        return CellConfig(name, runs)
    own = _mapping(f"cell {name!r}: record", said.get("record") or {})
    return CellConfig(name, runs, layered(RecordConfig, common, own).validate())


def _mapping(what: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise Misuse(
            what, got=repr(value), expected="names with values", do="write 'name: value' lines"
        )
    return value


def _items(name: str, settings: Mapping[str, Any], kind: type) -> list[Any]:
    found = settings.get(name)
    found = [] if found is None else found
    choice_of(f"{name}: type", type(found).__name__, ("list", "tuple"))
    for one in found:
        if type(one) is not kind:
            raise Misuse(
                name, got=repr(one), expected=f"a list of {kind.__name__}", do="correct the list"
            )
    return list(found)
