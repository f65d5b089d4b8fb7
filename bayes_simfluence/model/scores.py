"""A prior mean from attribution: what a score matrix says, as far as recorded runs bear it out."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import xarray as xr
from jaxtyping import Array, Float

from bayes_simfluence.checks import Misuse, named, positive_number
from bayes_simfluence.model.arrays import ExampleFeatures
from bayes_simfluence.model.effects import Prior, Shape
from bayes_simfluence.model.hyper import NEGLIGIBLE, Hyper, Values
from bayes_simfluence.model.normal import Normal

DIMS = ("train", "query")


@dataclass(frozen=True, eq=False, kw_only=True)
class Scores(Prior):
    """Effects whose mean is proportional to scores of attribution, with a scale that is learned.

    The effect of example ``i`` on query ``q`` is ``scale * s_iq`` plus what ``base`` says: runs
    update what the scores say. ``s`` are the scores divided by their root mean square over the
    recording's examples and queries, so ``scale`` is what a step on one example of typical score
    does to the loss, in units of the link (nats for large losses). It is learned for each part
    (``staying_scores``, ``fading_scores``), the same for all queries. Its prior is normal with mean
    ``believed`` and twice that as sd: scores are believed to point the right way (two to one), and
    a step that moves a loss by more than five times ``believed`` would surprise. Scores of noise
    end near 0, scores of the opposite sign below it. Where no run was fitted it is drawn from that
    prior.

    Examples and queries without scores cannot be simulated.

    Attributes:
        matrix: effects on the loss, ``(train, query)``, negative = helpful: a ``DataArray`` with
            ids, as ``attribution`` makes them and ``attribution.score_files.load_scores`` reads
            them, which may hold more ids than the recording, or an array in the recording's order.
            Of a saved model only a description is left, a text.
        base: the law of effects around that mean, with features and pooling of its own.
        believed: what a step on one example of typical score is believed to do to the loss before
            any run is seen, units of the link: by default a hundred steps on helpful examples
            lower it by two. Where steps are few, or batches large, say more.

    Raises:
        Misuse: scores that are not finite or all zero, or no matrix, a belief that is not above
            zero; when fitted, ids of the
            recording without scores.

    >>> import jax, bayes_simfluence as bs
    >>> from bayes_simfluence.attribution.scores import score_array
    >>> runs = bs.example_runs().isel(run=slice(0, 4), query=slice(0, 2))
    >>> guess = np.random.default_rng(0).normal(size=(200, 2))
    >>> ids = list(runs["train"].values), list(runs["query"].values)
    >>> scores = score_array(guess, *ids, method="guess", units="1")
    >>> model = bs.Simfluence(prior=bs.priors.Scores(scores, base=bs.priors.Normal()))
    >>> posterior = bs.fit(runs, model=model, method=bs.Exact(times=4), key=jax.random.key(0))
    >>> sorted(name for name in posterior.simulator.values if "scores" in name)
    ['fading_scores', 'staying_scores']
    """

    name: ClassVar[str] = "scores"
    stored: ClassVar[bool] = False
    extends: ClassVar[bool] = False
    # Arrays have no one truth value: two of these are equal when they are the same.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    matrix: Any = field(repr=False, kw_only=False)
    base: Prior = field(default_factory=Normal)
    believed: float = 0.02
    # Both are those of ``base``: its features are left out where they are resolved.
    features: bool = field(default=True, init=False, repr=False)
    pooled: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.base, Prior) or isinstance(self.base, Scores):
            raise Misuse(
                "Scores(base=...)",
                got=repr(self.base),
                expected="a prior such as priors.Normal(), not of scores itself",
                do="pass an instance; add up scores of several kinds before",
            )
        positive_number("Scores(believed=...)", self.believed)
        for shared in ("pooled", "gaussian", "scaled", "varying"):
            object.__setattr__(self, shared, getattr(self.base, shared))
        if isinstance(self.matrix, str):
            return
        values = _values(self.matrix)
        got = None
        if values.ndim != 2:
            got = f"shape {values.shape}"
        elif not np.isfinite(values).all():
            got = "values not finite"
        elif not values.any():
            got = "nothing but zeros"
        if got:
            raise Misuse(
                "Scores(matrix)",
                got=got,
                expected="finite numbers (train, query), not all zero",
                do="pass the scores of an attribution method",
            )

    def law(
        self, name: str, part: str, shape: Shape, values: Values
    ) -> Float[Array, "query train knot"]:
        """That of ``base``."""
        return self.base.law(name, part, shape, values)

    def hypers(self, part: str, features: ExampleFeatures) -> dict[str, Hyper]:
        """Those of ``base``, and the scale of the scores."""
        free = self.base.hypers(part, self.alike(features))
        if features.train.shape[1]:
            free[f"{part}_scores"] = Hyper(
                self.believed,
                2.0 * self.believed,
                "real",
                "loss change of a step on an example of typical score",
                constant=NEGLIGIBLE if part == "fading" else None,
            )
        return free

    def effects(
        self, part: str, shape: Shape, values: Values, features: ExampleFeatures
    ) -> Float[Array, "query train knot"]:
        """Those of ``base``."""
        return self.base.effects(part, shape, values, self.alike(features))

    def resolve(
        self, train_ids: np.ndarray, query_ids: np.ndarray, recorded: ExampleFeatures
    ) -> ExampleFeatures:
        """What ``base`` knows, with scores as further features of the training examples.

        In these coordinates a query is the unit vector that picks its own column, so the inner
        product of an example and a query is their score.

        Raises:
            Misuse: ids without scores.
        """
        known = self.base.resolve(train_ids, query_ids, recorded).where(self.base.features)
        scores = _aligned(self.matrix, {"train": train_ids, "query": query_ids})
        unit = np.sqrt(max(np.square(scores).mean(), np.finfo(float).tiny))
        pick = np.eye(len(query_ids))
        return ExampleFeatures(
            np.concatenate([np.asarray(known.train, float), scores / unit], axis=1),
            np.concatenate([np.asarray(known.query, float), pick], axis=1),
        )

    def alike(self, features: ExampleFeatures) -> ExampleFeatures:
        """The features without those that hold the scores: one for each query, the last ones."""
        queries = len(features.query)
        return ExampleFeatures(features.train[:, :-queries], features.query[:, :-queries])

    def columns(
        self,
        values: Values,
        part: str,
        exposure: Float[Array, "step train"],
        features: ExampleFeatures,
    ) -> Float[Array, "step source"]:
        """Those of ``base``."""
        return self.base.columns(values, part, exposure, self.alike(features))

    def mean(
        self,
        values: Values,
        part: str,
        exposure: Float[Array, "step train"],
        features: ExampleFeatures,
    ) -> Float[Array, "step query"]:
        """``scale * e . s`` and the mean of ``base``."""
        queries = len(features.query)
        scores = features.train[:, -queries:] @ features.query[:, -queries:].T
        own = values[f"{part}_scores"] * exposure @ scores
        return own + self.base.mean(values, part, exposure, self.alike(features))

    def _settings(self) -> dict[str, Any]:
        return {
            "matrix": _described(self.matrix),
            "base": self.base.as_dict(),
            "believed": self.believed,
        }


def _values(matrix: Any) -> Float[np.ndarray, "..."]:
    if isinstance(matrix, xr.DataArray):
        if set(matrix.dims) != set(DIMS) or set(DIMS) - set(matrix.coords):
            raise Misuse(
                "Scores(matrix)",
                got=f"dimensions {matrix.dims} with ids along {list(map(str, matrix.coords))}",
                expected=f"{DIMS} with ids along both",
                do="make it by attribution.scores.score_array",
            )
        matrix = matrix.transpose(*DIMS)
    return np.asarray(matrix, float)


def _aligned(matrix: Any, ids: dict[str, np.ndarray]) -> Float[np.ndarray, "train query"]:
    """The scores of a recording's examples and queries, in its order."""
    if isinstance(matrix, str):
        raise Misuse(
            "Scores(matrix)",
            got=f"the description {matrix!r} of a saved model",
            expected="scores (train, query)",
            do="make the model anew with prior=priors.Scores(...)",
        )
    values = _values(matrix)
    if isinstance(matrix, xr.DataArray):
        rows, columns = (
            named(f"Scores(matrix): {dim} ids of the recording", ids[dim], matrix[dim].values)
            for dim in DIMS
        )
        return values[np.ix_(rows, columns)]
    shape = tuple(len(ids[dim]) for dim in DIMS)
    if values.shape != shape:
        raise Misuse(
            "Scores(matrix)",
            got=f"shape {values.shape}",
            expected=f"{shape}, a score for each training example and query of the recording",
            do="pass a DataArray with their ids",
        )
    return values


def _described(matrix: Any) -> str:
    if isinstance(matrix, str):
        return matrix
    size = " x ".join(map(str, np.shape(matrix)))
    method = getattr(matrix, "attrs", {}).get("method")
    return f"{size} of {method}" if method else size
