"""A posterior over simulated training runs: what would the loss have been, and how sure are you?

``import bayes_simfluence as bs``; everything public is re-exported here, and loaded when first
used, so that the command line answers ``--help`` without JAX.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bayes_simfluence.attribution.simple import mean_trajectory, persistence
    from bayes_simfluence.checks import (
        FitFailed,
        FitWarning,
        Misuse,
        RunsWarning,
        SupportWarning,
        WorkFailed,
    )
    from bayes_simfluence.data import designs
    from bayes_simfluence.data.importers import export_runs, import_runs
    from bayes_simfluence.data.runs import planned_runs, runs_from_arrays
    from bayes_simfluence.data.store import (
        append_runs,
        example_runs,
        export_netcdf,
        open_runs,
        save_runs,
    )
    from bayes_simfluence.evaluation.compare import compare
    from bayes_simfluence.inference.exact import Exact
    from bayes_simfluence.inference.nuts import NUTS
    from bayes_simfluence.inference.ridge import Ridge
    from bayes_simfluence.inference.stack import Stack
    from bayes_simfluence.inference.svi import SVI
    from bayes_simfluence.model import noise, priors
    from bayes_simfluence.model.coefficients import Varying
    from bayes_simfluence.model.exposure import Exposure
    from bayes_simfluence.model.simfluence import Simfluence
    from bayes_simfluence.posterior.bands import Credible
    from bayes_simfluence.posterior.conformal import Conformal
    from bayes_simfluence.posterior.fit import fit
    from bayes_simfluence.posterior.posterior import Posterior, load_posterior
    from bayes_simfluence.recording.record import record
    from bayes_simfluence.recording.recorder import Recorder
    from bayes_simfluence.recording.settings import Evaluation, Placement
    from bayes_simfluence.tasks.task import Task

_HOME = {
    "attribution.simple": ("mean_trajectory", "persistence"),
    "checks": (
        "FitFailed",
        "FitWarning",
        "Misuse",
        "RunsWarning",
        "SupportWarning",
        "WorkFailed",
    ),
    "posterior.bands": ("Credible",),
    "posterior.conformal": ("Conformal",),
    "data.importers": ("export_runs", "import_runs"),
    "data.runs": ("planned_runs", "runs_from_arrays"),
    "data.store": ("append_runs", "example_runs", "export_netcdf", "open_runs", "save_runs"),
    "evaluation.compare": ("compare",),
    "inference.exact": ("Exact",),
    "inference.stack": ("Stack",),
    "posterior.fit": ("fit",),
    "inference.nuts": ("NUTS",),
    "posterior.posterior": ("Posterior", "load_posterior"),
    "inference.ridge": ("Ridge",),
    "inference.svi": ("SVI",),
    "model.simfluence": ("Simfluence",),
    "model.coefficients": ("Varying",),
    "model.exposure": ("Exposure",),
    "recording.record": ("record",),
    "recording.recorder": ("Recorder",),
    "recording.settings": ("Evaluation", "Placement"),
    "tasks.task": ("Task",),
}
_ROOMS = {"designs": "data.designs", "noise": "model.noise", "priors": "model.priors"}
"""Modules that are public as namespaces."""
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [  # noqa: RUF022 - in the order of use
    "Task",
    "designs",
    "record",
    "Evaluation",
    "Placement",
    "Recorder",
    "runs_from_arrays",
    "planned_runs",
    "open_runs",
    "save_runs",
    "append_runs",
    "export_netcdf",
    "import_runs",
    "export_runs",
    "example_runs",
    "fit",
    "Simfluence",
    "Exposure",
    "Varying",
    "priors",
    "noise",
    "Exact",
    "Stack",
    "NUTS",
    "SVI",
    "Ridge",
    "Posterior",
    "load_posterior",
    "Credible",
    "Conformal",
    "persistence",
    "mean_trajectory",
    "compare",
    "Misuse",
    "WorkFailed",
    "FitFailed",
    "FitWarning",
    "SupportWarning",
    "RunsWarning",
]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return import_module(f"bayes_simfluence.{_ROOMS[name]}")
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'bayes_simfluence' has no attribute {name!r}")
    return getattr(import_module(f"bayes_simfluence.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
