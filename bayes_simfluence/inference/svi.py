"""Stochastic variational inference of the whole model by NumPyro."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float
from numpyro import infer
from numpyro.infer import autoguide

from bayes_simfluence.checks import Misuse, positive_integer
from bayes_simfluence.inference.compiled import CompiledModel, Data
from bayes_simfluence.inference.dispersion import dispersion
from bayes_simfluence.inference.method import FitContext, Fitted
from bayes_simfluence.inference.numpyro_runs import LIMIT, in_numpyro
from bayes_simfluence.inference.verdict import Verdict
from bayes_simfluence.linalg import double_precision
from bayes_simfluence.model.arrays import RunArrays
from bayes_simfluence.model.simfluence import Simfluence
from bayes_simfluence.progress import Progress

GUIDES: dict[str, Callable[..., Any]] = {
    "normal": autoguide.AutoNormal,
    "low-rank": autoguide.AutoLowRankMultivariateNormal,
    "full-rank": autoguide.AutoMultivariateNormal,
    # Backward twice: the factorizations have no forward derivative.
    "laplace": partial(
        autoguide.AutoLaplaceApproximation,
        hessian_fn=lambda loss, at: jax.jacrev(jax.jacrev(loss))(at),
    ),
}
"""NumPyro's automatic guides by the names that settings and the command line use."""
ADAM = optax.adam(0.01)
"""When the caller brings no optimizer."""
WINDOW = 250
"""Steps over which the loss is averaged before it is called flat."""
NARROW = 0.7
"""A guide whose sds are below this share of the curvature's asks for attention."""


@dataclass(frozen=True, eq=False)
class SVI:
    """A guide fitted to the joint posterior by maximizing the evidence lower bound.

    Takes every model and large recordings. Mean-field guides (``normal``) are known to be too
    narrow where coefficients are correlated; the verdict says by how much.

    Attributes:
        guide: a name of ``GUIDES`` or a class of ``numpyro.infer.autoguide``.
        optimizer: an optax optimizer with its schedule; Adam at 0.01 when omitted.
        steps: at most; the search stops when the loss is flat.
        batch: size of a minibatch, with the likelihood scaled up accordingly: of transitions where
            a loss depends on the last one alone, else of runs; everything when omitted.
        draws: kept from the guide.
    """

    guide: Any = "normal"
    optimizer: optax.GradientTransformation | None = None
    steps: int = 10_000
    batch: int | None = None
    draws: int = 1000

    def __post_init__(self) -> None:
        known = isinstance(self.guide, type) and issubclass(self.guide, autoguide.AutoGuide)
        if not known and self.guide not in GUIDES:
            raise Misuse(
                "SVI(guide=...)",
                got=repr(self.guide),
                expected=f"one of {', '.join(GUIDES)}, or a class of numpyro.infer.autoguide",
                do="pick one of them",
            )
        positive_integer("SVI(steps=...)", self.steps)
        positive_integer("SVI(draws=...)", self.draws)
        if self.batch is not None:
            positive_integer("SVI(batch=...)", self.batch)
        if not isinstance(self.optimizer, optax.GradientTransformation | None):
            raise Misuse(
                "SVI(optimizer=...)",
                got=type(self.optimizer).__name__,
                expected="an optax optimizer",
                do="pass for example optax.adam(optax.cosine_decay_schedule(0.02, 5000))",
            )

    @property
    def has_prior(self) -> bool:
        """Priors say something where there is no run."""
        return True

    @property
    def couples(self) -> bool:
        """Examples may act by their residuals."""
        return True

    def default_model(self) -> Simfluence:
        """The published linear kind: the two-timescale model is quicker by ``Exact``."""
        return Simfluence.linear()

    def as_dict(self) -> dict[str, Any]:
        """Name and settings; an optimizer of the caller's is not spelled out."""
        guide = self.guide if isinstance(self.guide, str) else self.guide.__name__
        optimizer = "adam(0.01)" if self.optimizer is None else "the caller's"
        return {
            "method": "SVI",
            "guide": guide,
            "optimizer": optimizer,
            "steps": self.steps,
            "batch": self.batch,
            "draws": self.draws,
        }

    def fit(self, runs: RunArrays, model: Simfluence, context: FitContext) -> Fitted:
        """Draws of ``model`` given ``runs`` from the fitted guide."""
        fit_key, draw_key, check_key = jax.random.split(context.key, 3)
        with double_precision():
            whole = in_numpyro(runs, model, "SVI")
            fitted = whole if self.batch is None else whole.by_transition()
            batch = self.batch if self.batch is None else min(self.batch, len(fitted.runs.batch))
            optimizer = ADAM if self.optimizer is None else self.optimizer
            descent = _descent(CompiledModel.of(fitted, batch), self.guide, optimizer)
            state, losses, flat = self._descend(descent, fitted.data, fit_key, context.progress)
            draws = min(self.draws, max(LIMIT // whole.bytes_of_a_draw(), 1))
            drawn = descent.draw(state, fitted.data, draw_key, draws)
            everything = CompiledModel.of(whole)
            sites = everything.sites_of(whole.data, drawn)
            ratio = dispersion(everything, whole.data, drawn, key=check_key)
        simulator = whole.simulator({name: np.asarray(site)[None] for name, site in sites.items()})
        return Fitted(simulator, _verdict(losses, flat, ratio, batch), losses=losses)

    def _descend(
        self, descent: "_Descent", data: Data, key: jax.Array, progress: Progress
    ) -> tuple[Any, Float[np.ndarray, " step"], bool]:
        state = descent.start(key, data)
        losses: list[np.ndarray] = []
        flat, done = False, 0
        with progress.work("SVI", self.steps) as meter:
            while done < self.steps and not flat:
                size = min(WINDOW, self.steps - done)
                state, window = descent.advance(state, data, size)
                losses.append(np.asarray(window, float)[:size])
                flat, done = _is_flat(losses), done + size
                meter.advance(size, f"loss {losses[-1].mean():.6g}")
        return state, np.concatenate(losses), flat


class _Descent(NamedTuple):
    """The compiled parts of a search; all take the data as arguments.

    Attributes:
        start: (key, data) -> the state.
        advance: (state, data, steps) -> state, and ``WINDOW`` losses of which the first are filled.
        draw: (state, data, key, draws) -> draws of the guide by site.
    """

    start: Callable[..., Any]
    advance: Callable[..., Any]
    draw: Callable[..., dict[str, jax.Array]]


@lru_cache(maxsize=16)
def _descent(model: CompiledModel, guide: Any, optimizer: optax.GradientTransformation) -> _Descent:
    made = GUIDES[guide] if isinstance(guide, str) else guide

    def begin(key: jax.Array, data: Data) -> tuple[infer.SVI, Any, Any]:
        # A guide remembers the data that it first saw: each trace has its own.
        own = made(model, init_loc_fn=infer.init_to_median(num_samples=5))
        svi = infer.SVI(model, own, optimizer, infer.Trace_ELBO())
        return svi, own, svi.init(key, *data)

    def start(key: jax.Array, data: Data) -> Any:
        return begin(key, data)[2]

    def advance(state: Any, data: Data, size: Any) -> Any:
        svi, _, _ = begin(state.rng_key, data)

        def update(at: Any, carried: Any) -> Any:
            state, losses = carried
            state, loss = svi.stable_update(state, *data)
            return state, losses.at[at].set(loss)

        return jax.lax.fori_loop(0, size, update, (state, jnp.zeros(WINDOW)))

    def draw(state: Any, data: Data, key: jax.Array, draws: int) -> Any:
        svi, own, _ = begin(state.rng_key, data)
        params = svi.get_params(state)
        # One at a time inside a ``vmap``: batched by itself NumPyro promotes ranks.
        return jax.vmap(lambda own_key: own.sample_posterior(own_key, params, *data))(
            jax.random.split(key, draws)
        )

    return _Descent(jax.jit(start), jax.jit(advance), jax.jit(draw, static_argnums=3))


def _is_flat(windows: list[Float[np.ndarray, " _"]]) -> bool:
    """Whether the last two windows went down by less than twice what chance would do.

    Successive losses are nearly independent: each step draws its own noise.
    """
    if len(windows) < 3 or len(windows[-1]) < WINDOW:
        return False
    drops = []
    for before, after in zip(windows[-3:-1], windows[-2:], strict=True):
        chance = np.sqrt(np.var(before) / len(before) + np.var(after) / len(after))
        drops.append(np.mean(before) - np.mean(after) < 2.0 * chance)
    return bool(np.all(drops))


def _verdict(
    losses: Float[np.ndarray, " step"], flat: bool, ratio: float, batch: int | None
) -> Verdict:
    numbers = {
        "final_loss": float(losses[-WINDOW:].mean()),
        "steps": float(len(losses)),
        "dispersion": ratio,
    }
    notes = []
    if np.isfinite(ratio):
        notes.append(
            f"Sds of coefficients are x {ratio:.2f} of those that the curvature of the posterior "
            "at the guide's centre implies, hyperparameters fixed there."
        )
    if batch is not None:
        notes.append(f"Minibatches of {batch}; the loss is an estimate.")
    if not np.isfinite(losses[-WINDOW:]).all():
        sentence = "The loss is not finite: lower the optimizer's step size, or check the losses."
        return Verdict(False, sentence, tuple(notes), numbers)
    if not flat:
        sentence = f"The loss still falls after {len(losses)} steps: raise SVI(steps=...)."
        return Verdict(False, sentence, tuple(notes), numbers)
    if ratio < NARROW:
        sentence = (
            f"The guide is too narrow (sds x {ratio:.2f}): bands are not to be trusted; take "
            "SVI(guide='full-rank'), Exact() or NUTS()."
        )
        return Verdict(False, sentence, tuple(notes), numbers)
    return Verdict(True, f"The loss is flat after {len(losses)} steps.", tuple(notes), numbers)
