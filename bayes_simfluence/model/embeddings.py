"""A prior from embeddings that the caller brings: alike examples have alike effects."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
import xarray as xr
from jaxtyping import Array, Float

from bayes_simfluence.checks import Misuse, named
from bayes_simfluence.model.arrays import ExampleFeatures
from bayes_simfluence.model.effects import Prior, Shape, standard
from bayes_simfluence.model.hyper import Values


@dataclass(frozen=True, eq=False)
class Features(Prior):
    """Normal effects whose mean and covariance come from embeddings that the caller brings.

    Embeddings take the place of the recording's gradient features (see ``Prior``): examples with
    alike embeddings have alike effects (a Gaussian process with linear kernel), and, when queries
    have embeddings of the same width, the mean is proportional to the inner product, with a sign
    and size that are inferred. An example that no run trained on thus has a mean that its relatives
    suggest, and the prior's spread around it.

    Attributes:
        train: ``(train, feature)``, an array in the order of the recording's examples or a
            ``DataArray`` with their ids; scaled to a mean squared norm of one. Of a saved model
            only a description is left, a text.
        query: the same for the queries; None = no inner product.
    """

    train: Any = field(default=None, repr=False)
    query: Any = field(default=None, repr=False)
    name: ClassVar[str] = "features"
    gaussian: ClassVar[bool] = True
    stored: ClassVar[bool] = False
    # Arrays have no one truth value: two of these are equal when they are the same.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __post_init__(self) -> None:
        for name in ("train", "query"):
            rows = getattr(self, name)
            if rows is None or isinstance(rows, str):
                continue
            if np.ndim(rows) != 2 or not np.isfinite(np.asarray(rows, float)).all():
                raise Misuse(
                    f"Features({name}=...)",
                    got=f"shape {np.shape(rows)}" if np.ndim(rows) != 2 else "values not finite",
                    expected=f"finite numbers, ({name}, feature)",
                    do="pass one row of numbers for each example",
                )

    def law(
        self, name: str, part: str, shape: Shape, values: Values
    ) -> Float[Array, "query train knot"]:
        """Standard normal."""
        return standard(f"{name}_own", shape)

    def resolve(
        self, train_ids: np.ndarray, query_ids: np.ndarray, recorded: ExampleFeatures
    ) -> ExampleFeatures:
        """The embeddings in the order of a recording, instead of its gradient features.

        Raises:
            Misuse: ids without an embedding, or widths of train and query that differ.
        """
        train = _rows("train", self.train, train_ids)
        unit = np.sqrt(max(np.square(train).sum(axis=1).mean(), np.finfo(float).tiny))
        if self.query is None:
            return ExampleFeatures(jnp.asarray(train / unit), jnp.zeros((len(query_ids), 0)))
        query = _rows("query", self.query, query_ids)
        if query.shape[1] != train.shape[1]:
            raise Misuse(
                "Features(query=...)",
                got=f"{query.shape[1]} numbers for each query",
                expected=f"{train.shape[1]}, as for the training examples",
                do="embed both by the same model, or leave query out",
            )
        return ExampleFeatures(jnp.asarray(train / unit), jnp.asarray(query / unit))

    def _settings(self) -> dict[str, Any]:
        described = {name: _described(getattr(self, name)) for name in ("train", "query")}
        return {"features": self.features, "pooled": self.pooled, **described}


def _described(rows: Any) -> str | None:
    if rows is None or isinstance(rows, str):
        return rows
    return " x ".join(map(str, np.shape(rows)))


def _rows(what: str, rows: Any, ids: np.ndarray) -> Float[np.ndarray, "row feature"]:
    if rows is None or isinstance(rows, str):
        raise Misuse(
            f"Features({what}=...)",
            got="nothing" if rows is None else f"the description {rows!r} of a saved model",
            expected="one row for each example",
            do="pass their embeddings",
        )
    if isinstance(rows, xr.DataArray):
        dim = str(rows.dims[0])
        return np.asarray(rows.values, float)[named(f"Features({what}=...)", ids, rows[dim].values)]
    if len(rows) != len(ids):
        raise Misuse(
            f"Features({what}=...)",
            got=f"{len(rows)} rows",
            expected=f"{len(ids)}, one for each id of the recording",
            do="pass a DataArray with ids as coordinate, or as many rows in their order",
        )
    return np.asarray(rows, float)
