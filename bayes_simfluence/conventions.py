"""Words, axes and units used everywhere; nothing in the package contradicts this page.

| word | meaning |
|---|---|
| ``run`` | one recorded fine-tuning run; all start from the same weights, unless ``start`` says |
| ``step`` 1..T | one update; ``batch[run, step, slot]`` holds indices into ``train``, -1 = empty |
| weight | ``weight[run, step, slot]`` >= 0 of the example in a slot; 1 where not recorded |
| train loss | ``train_loss[run, step, slot]`` of the example in a slot just before the update |
| residual | ``train_residual[run, step, slot]`` of that example, at the same weights |
| ``time`` 0..T | a point between updates; ``loss[run, time, query]``, time 0 = before any update |
| not recorded | NaN in ``loss`` of a complete run: not measured at that time; never at time 0 |
| kind | ``curriculum[run]``, how a design made the run's curriculum (random, sorted, ...) |
| start | ``start[run]``, which initial weights: 0 = the task's own, others drawn anew |
| twin | ``twin[run]``, the run that was trained once more, from weights off by rounding |
| metric | measured of a query beside its loss (accuracy, margin); NaN where not measured |
| ``train`` | a training example; its coordinate holds the examples' stable ids |
| ``query`` | an evaluation example (the paper's z_test); its coordinate holds stable ids |
| ``chain``, ``draw`` | posterior draws, in ArviZ order |

| quantity | unit and sign |
|---|---|
| loss | nats, mean over target tokens (classification: cross-entropy) |
| residual | share of the target's probability that is missing, mean over target tokens; in [0, 1] |
| alpha | multiplies the previous loss; unitless, 1 = nothing happens |
| beta | added to the loss; nats, 0 = nothing happens |
| effect on the loss | nats; **negative = helpful** |
| feature | coordinates of an example's loss gradient at the initial weights |
| step size | the optimizer's learning rate at that step |
| weight | of an example in its batch's mean loss, relative to the others; unitless |
| exposure | weight of an example in a batch / sum of weights in that batch (mean reduction) |

Inside kernels arrays are positional and written for one run and one query; at the boundary every
array is an ``xarray`` object whose dimensions carry the names above.
"""

from typing import Any, Final, TypeAlias

import numpy as np
from jaxtyping import Float, Int

KIND: Final = "curriculum"
"""Coordinate of runs that come from a design of several kinds of curricula."""

TWIN: Final = "twin"
"""Coordinate of recordings in which curricula were trained more than once (``data.twins``)."""

START: Final = "start"
"""Coordinate of recordings whose runs start from other weights (``data.starts``)."""

OF_RUNS: Final = (KIND, START, TWIN)
"""Coordinates of ``run`` that a recording may have beside its ids."""

SCHEMA_VERSION: Final = 1
"""Version of the run schema below; a store of another version is refused."""

EMPTY_SLOT: Final = -1
"""Index that marks a slot of a batch without an example."""

UNRECORDED: Final = 0
COMPLETE: Final = 1
DIVERGED: Final = 2
"""Values of ``status[run]``: not (fully) recorded yet, usable, non-finite loss while recording.

In a complete run a NaN loss means "not recorded at this time", and an infinite one is refused.
"""

EFFECT_SIGN: Final = "negative = helpful (lowers the query's loss)"

Curriculum: TypeAlias = Int[np.ndarray, "step slot"]
"""What one run trains on: indices into ``train``, ``EMPTY_SLOT`` where a batch has no example."""

Curricula: TypeAlias = Int[np.ndarray, "run step slot"]
"""Curricula of several runs of equal length."""

Weights: TypeAlias = Float[np.ndarray, "step slot"]
"""Weight of the example in each slot of a curriculum, >= 0; what empty slots carry is ignored."""

Trajectory: TypeAlias = Float[np.ndarray, "time query"]
"""Losses of one run, time 0 before any update."""

VARIABLES: Final[dict[str, tuple[tuple[str, ...], dict[str, Any]]]] = {
    "batch": (
        ("run", "step", "slot"),
        {"long_name": "training example in the batch", "empty_slot": EMPTY_SLOT},
    ),
    "loss": (("run", "time", "query"), {"long_name": "loss of the query", "units": "nat"}),
    "weight": (
        ("run", "step", "slot"),
        {"long_name": "weight of the example in its batch's mean loss", "units": "1"},
    ),
    "train_loss": (
        ("run", "step", "slot"),
        {"long_name": "loss of the example in the slot just before the update", "units": "nat"},
    ),
    "train_residual": (
        ("run", "step", "slot"),
        {
            "long_name": "share of the example's target probability missing just before the update",
            "units": "1",
        },
    ),
    "step_size": (
        ("run", "step"),
        {"long_name": "learning rate of the optimizer at the step", "units": "1"},
    ),
    "train_feature": (
        ("train", "feature"),
        {"long_name": "gradient features of the training examples, mean squared norm at most 1"},
    ),
    "query_feature": (
        ("query", "feature"),
        {"long_name": "gradient features of the queries, in the same coordinates"},
    ),
    "status": (
        ("run",),
        {
            "long_name": "how the recording of the run ended",
            "flag_values": [UNRECORDED, COMPLETE, DIVERGED],
            "flag_meanings": "unrecorded complete diverged",
        },
    ),
}
"""The run schema: variable -> (dimensions, attributes)."""

METRIC: Final = {"role": "metric"}
"""Attribute of a variable that is recorded beside the loss under a name of its own."""

METRIC_DIMS: Final = ("run", "time", "query")
"""Dimensions of every metric, a floating variable."""

OF_TRAINING: Final = ("train_loss", "train_residual")
"""What the training step computed of its own batch; NaN where not recorded and in empty slots."""

OPTIONAL: Final = ("weight", *OF_TRAINING, "step_size", "train_feature", "query_feature")
"""Variables that a recording may lack."""
