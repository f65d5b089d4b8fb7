"""Bands around simulated losses, and the one that the posterior's own draws make.

A band has one shape per run and query, the draws' median with the distances to the edges of their
central interval, stretched by a factor. ``Credible`` takes the factor from the draws, ``Conformal``
(next module) from runs that the fit did not see.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np
import xarray as xr
from jaxtyping import Float

from bayes_simfluence.checks import Misuse

FLOOR = 1e-6
"""Smallest distance from the median to an edge, nats: a loss that never moves can be scored."""


@runtime_checkable
class Simulates(Protocol):
    """What bands need of a posterior."""

    @property
    def runs(self) -> xr.Dataset:
        """The runs fitted."""

    @property
    def left_out(self) -> xr.Dataset | None:
        """Fitted runs as predicted without them."""

    def simulate(self, runs: xr.Dataset, *, key: jax.Array, draws: int) -> xr.Dataset:
        """Draws of losses along any curricula."""


@runtime_checkable
class Band(Protocol):
    """What ``Posterior.simulate(band=...)`` takes."""

    def edges(
        self, simulated: xr.Dataset, posterior: Simulates, *, key: jax.Array, draws: int
    ) -> xr.Dataset:
        """``low`` and ``high`` of ``loss``, ``(run, time, query)`` in nats."""


class Shape(NamedTuple):
    """A band up to its factor: the median and positive distances to the edges, nats."""

    centre: Float[np.ndarray, "run time query"]
    below: Float[np.ndarray, "run time query"]
    above: Float[np.ndarray, "run time query"]

    def stretched(
        self, factor: Float[np.ndarray, "#run #time #query"]
    ) -> tuple[Float[np.ndarray, "run time query"], Float[np.ndarray, "run time query"]]:
        """Low and high edges at a factor."""
        return self.centre - factor * self.below, self.centre + factor * self.above


def stretch(
    shape: Shape, loss: Float[np.ndarray, "*draw run time query"]
) -> Float[np.ndarray, "*draw run time query"]:
    """The factor at which a loss is just within the band; 0 at the centre, 1 at an edge.

    >>> unit = np.ones((1, 1, 1))
    >>> stretch(Shape(unit, 0.25 * unit, 0.5 * unit), 0.5 * unit).item()
    2.0
    """
    error = loss - shape.centre
    return np.where(error > 0, error / shape.above, -error / shape.below)


@dataclass(frozen=True)
class Credible:
    """The posterior's own band: as likely as it says where the model is right.

    Attributes:
        probability: in (0, 1): of each time by itself, or of the whole trajectory.
        simultaneous: holds whole trajectories of a query: the central interval at every time,
            widened by the factor that the largest deviation over time asks for (sup-t band; Montiel
            Olea & Plagborg-Moller 2019).

    >>> import jax, bayes_simfluence as bs
    >>> runs = bs.example_runs().isel(query=slice(0, 2))
    >>> mean = bs.mean_trajectory(runs.isel(run=slice(0, 20)))
    >>> band = bs.Credible(0.8, simultaneous=True)
    >>> simulated = mean.simulate(runs.isel(run=[20]), key=jax.random.key(0), band=band)
    >>> simulated["low"].dims, simulated["low"].attrs["kind"]
    (('run', 'time', 'query'), 'credible')
    """

    probability: float = 0.90
    simultaneous: bool = False

    def __post_init__(self) -> None:
        open_unit_interval("Credible(probability=...)", self.probability)

    def edges(
        self, simulated: xr.Dataset, posterior: Simulates, *, key: jax.Array, draws: int
    ) -> xr.Dataset:
        """``low`` and ``high`` from the draws of ``loss``.

        Raises:
            Misuse: a point, which has no band.
        """
        loss = stacked(simulated["loss"])
        if len(loss) < 2:
            raise Misuse(
                "band=Credible(...)",
                got="one draw",
                expected="a posterior that draws",
                do="raise draws=..., or take Conformal(...), which gives a point a band too",
            )
        shape = shape_of(loss, self.probability)
        factor = np.ones((1, 1, 1))
        if self.simultaneous:
            largest = stretch(shape, loss)[:, :, 1:].max(axis=2)
            quantile = np.quantile(largest, self.probability, axis=0, method="weibull")
            factor = np.maximum(quantile, 1.0)[:, None]
        about = {"kind": "credible", "probability": self.probability}
        return banded(simulated, shape, factor, {**about, "simultaneous": int(self.simultaneous)})


def shape_of(loss: Float[np.ndarray, "draw run time query"], probability: float) -> Shape:
    """The draws\' median and central interval."""
    tails = [(1.0 - probability) / 2.0, 0.5, (1.0 + probability) / 2.0]
    low, centre, high = np.quantile(loss, tails, axis=0, method="weibull")
    return Shape(centre, np.maximum(centre - low, FLOOR), np.maximum(high - centre, FLOOR))


def unit_shape(simulated: xr.Dataset) -> Shape:
    """One nat either way of the mean trajectory, for posteriors without a band of their own."""
    centre = np.asarray(simulated["mean_loss"].mean(("chain", "draw")).values, float)
    return Shape(centre, np.ones_like(centre), np.ones_like(centre))


def stacked(loss: xr.DataArray) -> Float[np.ndarray, "draw run time query"]:
    """Draws of all chains as one axis."""
    return np.asarray(loss.values, float).reshape(-1, *loss.shape[2:])


def banded(
    simulated: xr.Dataset,
    shape: Shape,
    factor: Float[np.ndarray, "#run #time #query"],
    about: dict[str, Any],
) -> xr.Dataset:
    """``low`` and ``high`` at a factor, with attributes that say what they are."""
    initial = simulated["loss"].values[0, 0, :, 0]
    dims, made = ("run", "time", "query"), {}
    for name, edge in zip(("low", "high"), shape.stretched(factor), strict=True):
        # Time 0 is given, not predicted.
        edge[:, 0] = initial
        attrs = {"long_name": f"{name} edge of the band of the loss", "units": "nat", **about}
        made[name] = (dims, edge.astype(np.float32), attrs)
    return xr.Dataset(made, coords={name: simulated[name] for name in dims})


def open_unit_interval(what: str, value: float) -> None:
    """Raise unless ``value`` is in (0, 1)."""
    if not 0 < value < 1:
        raise Misuse(what, got=repr(value), expected="a number in (0, 1)", do="pass such as 0.9")
