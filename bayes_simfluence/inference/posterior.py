"""The one result of every fit: simulate, analyse with ArviZ, save."""

import json
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
import xarray as xr

from bayes_simfluence.checks import Misuse, keyed, positive_integer
from bayes_simfluence.conventions import EFFECT_SIGN
from bayes_simfluence.counterfactual.bands import Band
from bayes_simfluence.counterfactual.mean import MeanSimulator
from bayes_simfluence.counterfactual.paths import PathSimulator
from bayes_simfluence.counterfactual.rollout import AffineSimulator, Simulator
from bayes_simfluence.counterfactual.sampled import SampledSimulator
from bayes_simfluence.data.netcdf import read_group, write_groups
from bayes_simfluence.data.runs import validate_runs
from bayes_simfluence.files import PathLike, atomically, first_line, new_path
from bayes_simfluence.inference.recorded import planned_from
from bayes_simfluence.inference.verdict import Verdict

__all__ = ["Posterior", "load_posterior"]

VERSION = 1
"""Of the file format."""

SIMULATORS: dict[str, type[Simulator]] = {
    one.name: one for one in (AffineSimulator, MeanSimulator, PathSimulator, SampledSimulator)
}
"""The simulators that a saved posterior may hold."""


@dataclass(frozen=True)
class Posterior:
    """What was learned from recorded runs, whatever the method.

    Attributes:
        simulator: everything needed to simulate a run.
        verdict: how the fit went; print it.
        runs: the runs fitted.
        settings: model and method, as plain values.
        left_out: fitted runs as predicted without them (``predicted``, ``low``, ``high``, nats,
            90% band), where the method made such predictions.
    """

    simulator: Simulator
    verdict: Verdict
    runs: xr.Dataset
    settings: dict[str, Any]
    left_out: xr.Dataset | None = None

    def simulate(
        self, runs: xr.Dataset, *, key: jax.Array, draws: int = 200, band: Band | None = None
    ) -> xr.Dataset:
        """Losses along any curricula, from the losses before the first update.

        Args:
            runs: recorded or planned (``planned_runs``); of their losses only time 0 is used.
            key: decides the draws; the same key means the same coefficients for all curricula.
            draws: number of draws; a point without a band gives one.
            band: ``Credible(...)`` or ``Conformal(...)``; no band when omitted.

        Returns:
            ``mean_loss`` and ``loss``, both ``(chain, draw, run, time, query)`` in nats: without
            and with the noise of a single run. With ``band``, also the edges ``low`` and ``high``
            of ``loss``, ``(run, time, query)``, whose attributes say what they are.

        Raises:
            Misuse: examples or queries that the fitted runs do not know, initial losses that are
                not finite, a band that cannot be made.
        """
        keyed(key)
        positive_integer("draws", draws)
        if band is not None and (isinstance(band, type) or not isinstance(band, Band)):
            raise Misuse(
                "band",
                got=getattr(band, "__name__", repr(band)),
                expected="Credible(...) or Conformal(...)",
                do="pass an instance",
            )
        planned = planned_from(
            validate_runs(runs), self.runs["train"].values, self.runs["query"].values
        )
        if not np.isfinite(planned.initial).all():
            raise Misuse(
                "runs['loss'] at time 0",
                got="losses that are not finite",
                expected="every query's loss before the first update",
                do="measure them, or make the runs with planned_runs(like=recorded, ...)",
            )
        found = self.simulator.simulate(planned, key=key, draws=draws)
        dims = ("chain", "draw", "run", "time", "query")
        simulated = xr.Dataset(
            {
                "mean_loss": (dims, found.mean_loss, _nats("loss without the noise of a run")),
                "loss": (dims, found.loss, _nats("predicted loss, noise included")),
            },
            coords={
                **_counted(found.loss),
                **{name: runs[name] for name in ("run", "time", "query")},
            },
            attrs={"settings": json.dumps(self.settings)},
        )
        if band is None:
            return simulated
        return simulated.assign(band.edges(simulated, self, key=key, draws=draws))

    def samples(self, *, key: jax.Array, draws: int = 200) -> xr.Dataset:
        """Draws of coefficients and hyperparameters, ``(chain, draw, ...)``."""
        keyed(key)
        found = self.simulator.samples(key=key, draws=positive_integer("draws", draws))
        first = next(iter(found.values()))[1]
        return xr.Dataset(
            {name: (dims, value) for name, (dims, value) in found.items()},
            coords={
                **_counted(first),
                **{name: self.runs[name].values for name in ("query", "train")},
            },
            attrs={"effects": EFFECT_SIGN},
        )

    def to_arviz(self, *, key: jax.Array | None = None, draws: int = 200) -> Any:
        """ArviZ's container (``InferenceData`` before ArviZ 1.0, ``DataTree`` from then on).

        Groups ``posterior``, ``observed_data`` and ``constant_data``, with named dimensions and
        the recording's ids as coordinates.

        Args:
            key: decides the draws; ``jax.random.key(0)`` when omitted, so that the container of a
                posterior is one thing.
            draws: number of draws.
        """
        key = jax.random.key(0) if key is None else key
        constant = [name for name in ("batch", "step_size") if name in self.runs]
        return _container(
            {
                "posterior": self.samples(key=key, draws=draws),
                "observed_data": self.runs[["loss"]],
                "constant_data": self.runs[constant],
            }
        )

    def save(self, path: PathLike, *, overwrite: bool = False) -> Path:
        """Write everything to one netCDF file; ``load_posterior`` reads it back.

        Raises:
            Misuse: a file that exists and ``overwrite`` is not set.
        """
        path = new_path(path, overwrite=overwrite)
        about = {
            "posterior_version": VERSION,
            "has_left_out": int(self.left_out is not None),
            "simulator": self.simulator.name,
            "simulator_settings": self.simulator.settings(),
            "verdict": self.verdict.as_dict(),
            "settings": self.settings,
        }
        groups = {
            "/": xr.Dataset(attrs=about),
            "simulator": xr.Dataset(dict(self.simulator.arrays())),
        }
        groups["runs"] = self.runs
        if self.left_out is not None:
            groups["left_out"] = self.left_out
        with atomically(path) as partial:
            write_groups(partial, groups)
        return path


def load_posterior(path: PathLike) -> Posterior:
    """A posterior written by ``Posterior.save``.

    Raises:
        Misuse: no such file, or one that is no posterior of this version.
    """
    path = Path(path)
    if not path.is_file():
        raise Misuse(
            str(path), got="no such file", expected="a saved posterior", do="check the path"
        )
    try:
        about = read_group(path).attrs
        arrays = {str(name): one.values for name, one in read_group(path, "simulator").items()}
        runs = read_group(path, "runs")
        if about["posterior_version"] != VERSION:
            raise ValueError(f"version {about['posterior_version']}")
        left_out = read_group(path, "left_out") if about["has_left_out"] else None
        simulator = SIMULATORS[about["simulator"]].restore(arrays, about["simulator_settings"])
    except Exception as error:
        raise Misuse(
            str(path),
            got=f"a file that cannot be read ({first_line(error)})",
            expected=f"a posterior saved by version {VERSION} of the format",
            do="fit again, or restore the file from a copy",
        ) from error
    return Posterior(
        simulator=simulator,
        verdict=Verdict.from_dict(about["verdict"]),
        runs=validate_runs(runs),
        settings=about["settings"],
        left_out=left_out,
    )


def _nats(name: str) -> dict[str, str]:
    return {"long_name": name, "units": "nat"}


def _counted(draws: np.ndarray) -> dict[str, np.ndarray]:
    return {"chain": np.arange(draws.shape[0]), "draw": np.arange(draws.shape[1])}


def _container(groups: dict[str, xr.Dataset]) -> Any:
    """The one place that knows the difference between ArviZ's versions."""
    if int(version("arviz").split(".")[0]) >= 1:
        return xr.DataTree.from_dict(groups)
    from arviz import InferenceData

    return InferenceData(**groups)
