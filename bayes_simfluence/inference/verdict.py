"""What a fit says of itself: failure is a value, with a sentence a person can act on."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Verdict:
    """How a fit went.

    Attributes:
        ok: nothing asks for attention.
        sentence: what to do, or that nothing needs doing.
        notes: further findings, one sentence each (identifiability, recalibration, ...).
        numbers: what was measured, by name.
    """

    ok: bool
    sentence: str
    notes: tuple[str, ...] = ()
    numbers: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        return "\n".join([self.sentence, *(f"- {note}" for note in self.notes)])

    def as_dict(self) -> dict[str, Any]:
        """Plain values, to be saved."""
        return {
            "ok": self.ok,
            "sentence": self.sentence,
            "notes": list(self.notes),
            "numbers": dict(self.numbers),
        }

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> "Verdict":
        """From ``as_dict()``."""
        return cls(saved["ok"], saved["sentence"], tuple(saved["notes"]), saved["numbers"])
