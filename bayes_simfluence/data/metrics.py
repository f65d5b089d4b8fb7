"""Metrics: what is recorded of a query beside its loss, under names of their own.

A metric is a floating variable with the dimensions of the loss and the attribute ``METRIC``:
accuracy, margin, BLEU. It is NaN where it was not recorded, also at time 0. Fits read the loss
alone.
"""

import re
from typing import Any

import numpy as np
import xarray as xr

from bayes_simfluence.checks import Misuse, of_shape
from bayes_simfluence.conventions import METRIC, METRIC_DIMS, OF_RUNS, VARIABLES

WORD = re.compile(r"[A-Za-z][\w.-]*")
COORDINATES = ("run", "step", "time", "train", "query", "slot", "feature", *OF_RUNS)


def metric_names(runs: xr.Dataset) -> list[str]:
    """Names of the metrics that ``runs`` hold, in alphabetical order."""
    return sorted(
        str(name)
        for name, variable in runs.data_vars.items()
        if METRIC.items() <= variable.attrs.items()
    )


def metric_variable(
    name: str, like: np.ndarray
) -> tuple[tuple[str, ...], np.ndarray, dict[str, Any]]:
    """A metric that is not recorded yet, of the shape of a loss ``(run, time, query)``."""
    return METRIC_DIMS, np.full(like.shape, np.nan, np.float32), {"long_name": name, **METRIC}


def with_metric(runs: xr.Dataset, name: str, values: Any) -> xr.Dataset:
    """``runs`` with a further metric; values ``(run, time, query)``, NaN where not recorded.

    >>> from bayes_simfluence.data.runs import runs_from_arrays
    >>> runs = runs_from_arrays(batch=[[[0, 1]]], loss=[[[0.7], [0.6]]])
    >>> metric_names(with_metric(runs, "accuracy", [[[0.0], [1.0]]]))
    ['accuracy']

    Raises:
        Misuse: a name that means something else, values of another shape.
    """
    array = of_shape(
        f"metric {name!r}",
        np.asarray(values, np.float32),
        runs["loss"].shape,
        f"as the loss {METRIC_DIMS}",
        do="fill what was not recorded with NaN",
    )
    dims, _, attrs = metric_variable(check_metric_name(name), array)
    return runs.assign({name: (dims, array, attrs)})


def check_metric_name(name: str) -> str:
    """``name`` when the schema does not use it for something else.

    Raises:
        Misuse: it does, or it is no text.
    """
    taken = (*VARIABLES, *COORDINATES)
    if not isinstance(name, str) or not WORD.fullmatch(name) or name in taken:
        raise Misuse(
            "name of a metric",
            got=repr(name),
            expected=f"a word other than {', '.join(taken)}",
            do="rename it",
        )
    return name


def validate_metrics(runs: xr.Dataset) -> None:
    """Raise unless every metric of ``runs`` is floating and has the dimensions of the loss."""
    for name in metric_names(runs):
        check_metric_name(name)
        metric = runs[name]
        if metric.dims != METRIC_DIMS or not np.issubdtype(metric.dtype, np.floating):
            raise Misuse(
                f"runs['{name}']",
                got=f"{metric.dtype} with dimensions {metric.dims}",
                expected=f"a floating metric with dimensions {METRIC_DIMS}",
                do="make it with data.metrics.with_metric(runs, name, values)",
            )
