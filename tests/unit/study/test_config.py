"""Settings of a study: what is merged, what is refused."""

import pytest
import yaml

from bayes_simfluence.checks import Misuse
from bayes_simfluence.study.config import CellConfig, study_of

CELL = {"name": "a", "runs": "example:trec"}
RECORDED = {"name": "b", "record": {"train": "t.jsonl", "query": "q.jsonl"}}


def test_cells_share_what_is_common():
    study = study_of(
        {
            "common": {"learning_rate": "3e-5", "tuning": "lora"},
            "counts": [3, 5],
            "cells": [CELL, RECORDED, {"name": "c", "record": {"tuning": "ia3"}}],
        }
    )
    kept, made, other = study.cells
    assert kept == CellConfig("a", "example:trec") and kept.record is None
    assert (made.record.learning_rate, made.record.tuning) == (3e-5, "lora")
    assert other.record.tuning == "ia3" and study.needed == 12
    # What is saved is the study once more.
    assert study_of(yaml.safe_load(yaml.safe_dump(study.as_dict()))) == study


def test_defaults_are_the_protocol():
    study = study_of({"cells": [CELL]})
    assert study.counts == (5, 10, 15, 20, 25) and study.needed == 32
    assert study.protocol.checkpoints == 10 and study.methods is None
    assert study_of({"cells": [CELL], "checkpoints": "all", "methods": []}).methods == ()


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({}, "cells: got none; expected at least one"),
        ({"cells": [CELL, CELL]}, "cells: got a, a; expected at least one, none twice"),
        ({"cells": [CELL], "counts": []}, "counts: got none"),
        ({"cells": [CELL], "counts": [5, 5]}, "counts: got 5, 5"),
        ({"cells": [CELL], "counts": [0]}, "counts: got 0"),
        ({"cells": [CELL], "counts": ["five"]}, "counts: got 'five'; expected a list of int"),
        ({"cells": [CELL], "counts": 5}, "counts: type: got 'int'; expected one of list"),
        ({"cells": [CELL], "count": [5]}, "unknown names count; expected names among validate"),
        ({"cells": [CELL], "draws": "many"}, "draws: got 'many'; expected a whole number"),
        ({"cells": [CELL], "checkpoints": "few"}, "checkpoints: got 'few'"),
        ({"cells": ["a"]}, "cells: got 'a'; expected a list of dict"),
        ({"cells": [{"name": "a"}]}, "cell 'a': got neither runs nor record"),
        ({"cells": [{"name": "a/b", "runs": "r.nc"}]}, "cell 'a/b': got a name that no folder"),
        ({"cells": [{**CELL, "run": 1}]}, "cell 'a': got unknown names run; expected name, runs"),
        ({"cells": [{**CELL, "record": [1]}]}, "cell 'a': record: got"),
        ({"cells": [{**CELL, "record": {"rnus": 1}}]}, "unknown names rnus"),
        ({"cells": [{**RECORDED, "record": {"runs": 20}}]}, "cell 'b': runs: got 20; .* least 32"),
        ({"cells": [RECORDED], "pilot": 32}, r"pilot: got 32; expected a run among 0\.\.31"),
        ({"cells": [RECORDED], "checkpoints": 97}, "checkpoints: got 97; .* 96 steps"),
        ({"cells": [CELL], "common": "x"}, "common: got 'x'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, match):
    with pytest.raises(Misuse, match=match):
        study_of(settings)


def test_a_study_may_grow_but_not_change():
    study = study_of({"cells": [CELL], "counts": [5]})
    study_of({"cells": [CELL, RECORDED], "counts": [3, 5]}).continues(study, "here")
    with pytest.raises(Misuse, match="whose largest of counts differ"):
        study_of({"cells": [CELL], "counts": [5, 10]}).continues(study, "here")
    with pytest.raises(Misuse, match="here: got a study whose draws, seed differ"):
        study_of({"cells": [CELL], "seed": 1, "draws": 3, "counts": [5]}).continues(study, "here")
    made = study_of({"cells": [{**CELL, "record": {}}], "counts": [5]})
    made.continues(study, "here")
    with pytest.raises(Misuse, match="whose a differ;"):
        study.continues(made, "here")
    with pytest.raises(Misuse, match="whose a differ;"):
        changed = {"name": "a", "runs": "example:sst2"}
        study_of({"cells": [changed], "counts": [5]}).continues(study, "here")
