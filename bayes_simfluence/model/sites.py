"""Marks on the sample sites of the model in NumPyro, and how they are read from a trace.

A site carries its marks in NumPyro's own metadata (``site["infer"]``), so whoever defines one says
what it is, and nobody has to know its name.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpyro
from jaxtyping import Array
from numpyro import distributions as dist

INGREDIENT = "bayes_simfluence_ingredient"
COEFFICIENT = "bayes_simfluence_coefficient"

Site = Mapping[str, Any]
"""A site of a trace, as NumPyro has it."""


def latent(
    name: str,
    law: dist.Distribution,
    shape: tuple[int, ...],
    *,
    ingredient: bool = True,
    coefficient: bool = False,
) -> Array:
    """A site of independent draws from one law.

    Args:
        name: of the site, unique in the model.
        law: of one number.
        shape: of the draws.
        ingredient: only needed to make another site, so draws of it are not kept.
        coefficient: losses on the scale of the link are (nearly) linear in it.
    """
    marks = {INGREDIENT: ingredient, COEFFICIENT: coefficient}
    value: Array = numpyro.sample(name, law.expand(shape).to_event(len(shape)), infer=marks)
    return value


def is_sampled(site: Site) -> bool:
    """Whether a site is sampled: neither observed nor computed from others."""
    return site["type"] == "sample" and not site["is_observed"]


def is_coefficient(site: Site) -> bool:
    """Whether losses are (nearly) linear in a sampled site."""
    return is_sampled(site) and site["infer"].get(COEFFICIENT, False)


def kept(trace: Mapping[str, Site]) -> dict[str, Array]:
    """Values, in single precision, of the sites of a trace that are needed to simulate."""
    needed = {
        name: site["value"]
        for name, site in trace.items()
        if site["type"] == "deterministic"
        or (is_sampled(site) and not site["infer"].get(INGREDIENT, False))
    }
    return {name: value.astype(jnp.float32) for name, value in needed.items()}
