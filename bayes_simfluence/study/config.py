"""The settings of a study: its cells, methods and numbers of runs.

A cell is one recording: a data set with a tuning.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from bayes_simfluence.checks import Misuse, at_most, choice_of, count_of, positive_integer, shorten
from bayes_simfluence.recording.config import RecordConfig
from bayes_simfluence.settings import layered, say

EXAMPLE = "example:"
"""Before the name of a recording that ships with the package."""
ALL = "all"
"""As many checkpoints as there are steps."""
NESTED = ("cells", "counts", "methods", "simulators")


@dataclass(frozen=True)
class CellConfig:
    """One cell of a study, which is one recording.

    Attributes:
        name: also that of its folder.
        runs: an existing recording: a path, or ``example:trec``; when empty, it is recorded.
        record: settings of the recording; without them an existing recording has no task, and
            attributions cannot be computed.
    """

    name: str
    runs: str = ""
    record: RecordConfig | None = None

    def continues(self, earlier: "CellConfig") -> bool:
        """Whether results of ``earlier`` remain valid; settings may have been added since."""
        known = earlier.record is None or earlier.record == self.record
        return known and earlier.runs == self.runs


@dataclass(frozen=True)
class StudyProtocol:
    """Settings that all cells, methods and numbers of runs share."""

    validate: int = say("runs after the fitted ones, to choose penalties (ridge)", 2)
    held_out: int = say("runs after those, on which all methods are tested", 5)
    pilot: int = say("number of the run whose weights attributions use", 0)
    checkpoints: int | str = say("checkpoints saved of the pilot run, or 'all' steps", 10)
    draws: int = say("simulated draws per run", 200)
    resamples: int = say("bootstrap resamples over runs", 1000)
    seed: int = say("decides fits, projections and draws", 0)


@dataclass(frozen=True)
class StudyConfig:
    """Everything that decides a study; saved in its folder.

    Attributes:
        cells: recordings.
        counts: numbers of runs that simulators are fitted to, the first runs of each recording.
        methods: attributions whose scores become simulators; all known ones when ``None``.
        simulators: simulators fitted to runs without scores; all known ones when ``None``.
        protocol: all other settings.
    """

    cells: tuple[CellConfig, ...]
    counts: tuple[int, ...] = (5, 10, 15, 20, 25)
    methods: tuple[str, ...] | None = None
    simulators: tuple[str, ...] | None = None
    protocol: StudyProtocol = StudyProtocol()

    def checked(self) -> "StudyConfig":
        """The settings themselves when all of them are valid.

        Raises:
            Misuse: the first setting that is not valid.
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
        for count in self.counts:
            positive_integer("counts", count)
        names = [cell.name for cell in self.cells]
        for what, values in (("counts", self.counts), ("cells", tuple(names))):
            if not values or len(set(values)) < len(values):
                raise Misuse(
                    what,
                    got=shorten(values) or "none",
                    expected="at least one, none twice",
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
            **{name: None if items is None else list(items) for name, items in listed.items()},
            **asdict(self.protocol),
            "cells": [asdict(cell) for cell in self.cells],
        }

    def continues(self, earlier: "StudyConfig", where: str) -> None:
        """Raise when results of ``earlier`` would be mixed with results of other settings."""
        other = [
            field.name
            for field in fields(StudyProtocol)
            if getattr(self.protocol, field.name) != getattr(earlier.protocol, field.name)
        ]
        if max(self.counts) != max(earlier.counts):
            # Other runs would be held out.
            other.append("largest of counts")
        before = {cell.name: cell for cell in earlier.cells}
        other += [
            cell.name for cell in self.cells if not cell.continues(before.get(cell.name, cell))
        ]
        if other:
            raise Misuse(
                where,
                got=f"a study whose {shorten(other)} differ",
                expected="the settings of its first call; only cells, methods and smaller counts "
                "may be added",
                do="restore them, or choose another folder",
            )

    def _check(self, cell: CellConfig) -> None:
        what = f"cell {cell.name!r}"
        if not cell.name or set(cell.name) & set("/\\:") or cell.name.startswith("."):
            raise Misuse(
                what, got="a name that no folder can have", expected="a word", do="rename the cell"
            )
        if not cell.runs and cell.record is None:
            raise Misuse(
                what,
                got="neither runs nor record",
                expected="an existing recording, or settings to record with",
                do=f"give runs: FILE, runs: {EXAMPLE}trec, or record: {{...}}",
            )
        if cell.record is None:
            return
        protocol = self.protocol
        if cell.record.runs < self.needed:
            raise Misuse(
                f"{what}: runs",
                got=cell.record.runs,
                expected=f"at least {self.needed}: {max(self.counts)} fitted, "
                f"{protocol.validate} to validate, {protocol.held_out} held out",
                do="record more, or lower counts",
            )
        if protocol.pilot >= cell.record.runs:
            raise Misuse(
                "pilot",
                got=protocol.pilot,
                expected=f"a run among 0..{cell.record.runs - 1}",
                do="choose a fitted run",
            )
        if protocol.checkpoints != ALL:
            items, do = f"steps of a run of {what}", f"ask for fewer, or for {ALL}"
            at_most("checkpoints", int(protocol.checkpoints), cell.record.steps, items, do=do)


def study_of(settings: Mapping[str, Any]) -> StudyConfig:
    """A study from plain values, as in its YAML file; checked.

    ``common`` holds settings of recording that all cells share; a cell's own ``record`` overrides
    them.

    >>> study = study_of({"counts": [5], "cells": [{"name": "a", "runs": "example:trec"}]})
    >>> study.cells[0].runs, study.needed
    ('example:trec', 12)

    Raises:
        Misuse: unknown names, values of another type, invalid settings.
    """
    common = _mapping("common", settings.get("common") or {})
    plain = {name: value for name, value in settings.items() if name not in (*NESTED, "common")}
    listed: dict[str, Any] = {
        name: tuple(_items(name, settings, kind))
        for name, kind in (("counts", int), ("methods", str), ("simulators", str))
        if settings.get(name) is not None
    }
    listed_cells = _items("cells", settings, dict)
    cells = tuple(_cell(_mapping("cells", cell), common) for cell in listed_cells)
    protocol = layered(StudyProtocol, plain)
    return StudyConfig(cells=cells, protocol=protocol, **listed).checked()


def _cell(settings: Mapping[str, Any], common: Mapping[str, Any]) -> CellConfig:
    known = [field.name for field in fields(CellConfig)]
    unknown = [name for name in settings if name not in known]
    name, runs = settings.get("name", ""), settings.get("runs") or ""
    if unknown or not isinstance(name, str) or not isinstance(runs, str):
        raise Misuse(
            f"cell {name!r}",
            got=f"unknown names {shorten(unknown)}" if unknown else f"name {name!r}, runs {runs!r}",
            expected=f"{', '.join(known)}: text, text and settings of a recording",
            do="correct the cell",
        )
    if settings.get("record") is None and (runs or not common):
        return CellConfig(name, runs)
    own = _mapping(f"cell {name!r}: record", settings.get("record") or {})
    return CellConfig(name, runs, layered(RecordConfig, common, own).validate())


def _mapping(what: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise Misuse(
            what, got=repr(value), expected="names with values", do="write 'name: value' lines"
        )
    return value


def _items(name: str, settings: Mapping[str, Any], kind: type) -> list[Any]:
    items = settings.get(name)
    items = [] if items is None else items
    choice_of(f"{name}: type", type(items).__name__, ("list", "tuple"))
    for item in items:
        if type(item) is not kind:
            raise Misuse(
                name, got=repr(item), expected=f"a list of {kind.__name__}", do="correct the list"
            )
    return list(items)
