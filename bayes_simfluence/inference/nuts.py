"""No-U-turn sampling of the whole model by NumPyro: every prior, every error."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpyro import distributions as dist
from numpyro import handlers, infer
from numpyro.infer import hmc
from numpyro.infer.util import potential_energy

from bayes_simfluence.checks import Misuse, choice_of, count_of, positive_integer
from bayes_simfluence.inference.compiled import CompiledModel
from bayes_simfluence.inference.diagnostics import SampleStats, sampler_verdict
from bayes_simfluence.inference.method import FitContext, Fitted
from bayes_simfluence.inference.numpyro_runs import LIMIT, in_numpyro
from bayes_simfluence.linalg import double_precision
from bayes_simfluence.model.arrays import RunArrays
from bayes_simfluence.model.simfluence import Simfluence
from bayes_simfluence.model.sites import kept
from bayes_simfluence.progress import Meter, Progress

Chains = Literal["vectorized", "parallel", "sequential"]
CHUNK = 25
"""Iterations between two reports of progress, and between two moves of draws to the host."""
WARMUP_DEPTH = 5
"""Doublings of a trajectory at most while a full mass matrix is adapted."""


@dataclass(frozen=True)
class NUTS:
    """The joint posterior of coefficients and hyperparameters of all queries, sampled.

    Takes every model; the reference that the closed forms of ``Exact`` are tested against. Draws
    beyond 1 GiB are thinned while they are made.

    Attributes:
        warmup, draws, chains: iterations of each chain, and how many chains.
        target_accept: acceptance that the step size is adapted to; nearer to one = smaller steps.
        max_tree_depth: doublings of a trajectory at most.
        chain_method: ``vectorized`` in one program, ``parallel`` over as many devices as divide
            the chains, or ``sequential``, one after another in the least memory.

    Source: Hoffman & Gelman 2014; the iterative form of Phan, Pradhan & Jankowiak 2019
    (arXiv 1912.11554).
    """

    warmup: int = 500
    draws: int = 500
    chains: int = 4
    target_accept: float = 0.8
    max_tree_depth: int = 10
    chain_method: Chains = "vectorized"

    def __post_init__(self) -> None:
        count_of("NUTS(warmup=...)", self.warmup)
        positive_integer("NUTS(draws=...)", self.draws)
        positive_integer("NUTS(chains=...)", self.chains)
        positive_integer("NUTS(max_tree_depth=...)", self.max_tree_depth)
        choice_of(
            "NUTS(chain_method=...)", self.chain_method, ("vectorized", "parallel", "sequential")
        )
        if not 0 < self.target_accept < 1:
            raise Misuse(
                "NUTS(target_accept=...)",
                got=repr(self.target_accept),
                expected="a number between 0 and 1",
                do="pass 0.8, or 0.95 after divergences",
            )
        if self.chain_method == "parallel" and self.chains % jax.local_device_count():
            raise Misuse(
                "NUTS(chain_method='parallel')",
                got=f"{self.chains} chains on {jax.local_device_count()} devices",
                expected="a multiple of the devices",
                do="change chains, or use chain_method='vectorized'",
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
        """Name and settings."""
        return {"method": "NUTS", **asdict(self)}

    def fit(self, runs: RunArrays, model: Simfluence, context: FitContext) -> Fitted:
        """Draws of ``model`` given ``runs``."""
        with double_precision():
            fitted = in_numpyro(runs, model, "NUTS")
            thin = -(-self.draws * self.chains * fitted.bytes_of_a_draw() // LIMIT)
            sites, stats = sample(
                CompiledModel.of(fitted), fitted.data, self,
                key=context.key, thin=thin, progress=context.progress,
            )  # fmt: skip
        verdict = sampler_verdict(sites, stats, thin)
        return Fitted(fitted.simulator(sites), verdict, sample_stats=stats.dataset())


class Sampled(NamedTuple):
    """Draws of a NumPyro model.

    Attributes:
        sites: constrained values by name, leading axes (chain, draw).
        stats: what the sampler says of each draw.
    """

    sites: dict[str, np.ndarray]
    stats: SampleStats


def sample(
    model: Callable[..., None],
    arguments: tuple[Any, ...],
    settings: NUTS,
    *,
    key: jax.Array,
    thin: int,
    progress: Progress,
    dense: bool = False,
) -> Sampled:
    """NUTS of any NumPyro model, in chunks: after each, draws leave the device.

    Args:
        model: takes all data as arguments. It is compared by value: what was compiled for an
            equal one is used again for other data of the same shapes.
        arguments: the data.
        settings, key, thin, progress: as the methods have them.
        dense: adapt a full mass matrix, for few dimensions.
    """
    compiled = _compiled(model, _settings_of_a_chain(settings), dense)
    together = settings.chain_method != "sequential"
    total = (settings.warmup + settings.draws) * (1 if together else settings.chains)
    keys = jax.random.split(key, settings.chains)
    with progress.work("NUTS", total) as meter:
        each = [
            _chains(compiled, arguments, settings, some, thin, meter)
            for some in ([keys] if together else [chain[None] for chain in keys])
        ]
    sites = {
        name: np.concatenate([chains.sites[name] for chains in each]) for name in each[0].sites
    }
    return Sampled(sites, SampleStats.joined([chains.stats for chains in each]))


def _chains(
    compiled: "_Compiled",
    arguments: tuple[Any, ...],
    settings: NUTS,
    keys: jax.Array,
    thin: int,
    meter: Meter,
) -> Sampled:
    state = compiled.start(keys, arguments)
    if not np.isfinite(np.asarray(state.potential_energy)).all():
        raise Misuse(
            "runs['loss']",
            got="losses at which the model has no finite density",
            expected="losses of a size that the model's priors know",
            do="look for values far from the rest, or for queries whose loss never changes",
        )
    for size in _sizes(settings.warmup):
        state, _, _ = compiled.advance(state, arguments, size)
        meter.advance(size, "warm-up")
    sites: list[dict[str, np.ndarray]] = []
    stats: list[SampleStats] = []
    done = diverged = 0
    for size in _sizes(settings.draws):
        state, z, statistics = compiled.advance(state, arguments, size)
        # Iterations that fall on a multiple of ``thin`` are kept.
        at = np.flatnonzero((done + np.arange(size)) % thin == 0)
        if len(at):
            # As many as ever, so that nothing is compiled for the rest.
            padded = np.resize(at, -(-CHUNK // thin))
            values = compiled.constrain(z, jnp.asarray(padded), arguments)
            sites.append({name: np.asarray(site)[:, : len(at)] for name, site in values.items()})
        stats.append(SampleStats(*(np.asarray(statistic)[:size].T for statistic in statistics)))
        diverged += int(stats[-1].diverging.sum())
        done += size
        meter.advance(size, f"{diverged} divergences")
    whole = {name: np.concatenate([chunk[name] for chunk in sites], axis=1) for name in sites[0]}
    return Sampled(whole, SampleStats.appended(stats).thinned(thin))


class _Compiled(NamedTuple):
    """The compiled parts of a sampler; all take the data as arguments.

    Attributes:
        start: (keys, data) -> the state of all chains.
        advance: (state, data, iterations) -> state, and of each of ``CHUNK`` iterations, of which
            only the first are filled, all positions and what NUTS says of them.
        constrain: (positions, which, data) -> values of sites, leading axes (chain, draw).
    """

    start: Callable[..., Any]
    advance: Callable[..., Any]
    constrain: Callable[..., dict[str, jax.Array]]


@lru_cache(maxsize=16)
def _compiled(model: Callable[..., None], settings: NUTS, dense: bool) -> _Compiled:
    def potential(*arguments: Any) -> Callable[[Any], Any]:
        return partial(potential_energy, model, arguments, {})

    kernel = _Kernel(model, settings, dense, *hmc.hmc(potential_fn_gen=potential, algo="NUTS"))
    parallel = settings.chain_method == "parallel"
    advance = _over_devices(kernel.advance) if parallel else kernel.advance
    return _Compiled(jax.jit(kernel.start), jax.jit(advance), jax.jit(kernel.constrain))


class _Kernel(NamedTuple):
    """NumPyro's NUTS of a model: ``init`` and ``iterate`` are of one chain."""

    model: Callable[..., None]
    settings: NUTS
    dense: bool
    init: Callable[..., Any]
    iterate: Callable[..., Any]

    def start(self, keys: jax.Array, arguments: tuple[Any, ...]) -> Any:
        """The state of all chains."""

        def of_chain(key: jax.Array) -> Any:
            place_key, chain_key = jax.random.split(key)
            place = infer.util.initialize_model(
                place_key,
                self.model,
                init_strategy=infer.init_to_median(num_samples=5),
                dynamic_args=True,
                model_args=arguments,
            )
            return self._initialized(chain_key, place.param_info, arguments)

        return jax.vmap(of_chain)(keys)

    def advance(self, state: Any, arguments: tuple[Any, ...], size: Any) -> Any:
        """The state after ``size`` iterations; positions and statistics of each of them."""
        # NumPyro's kernel remembers its schedule from the last start, which must be of this trace.
        first = jax.tree.map(lambda x: x[0], state)
        self._initialized(first.rng_key, first.z, arguments)

        def iteration(at: Any, carried: Any) -> Any:
            state, filled = carried
            state = jax.vmap(lambda chain: self.iterate(chain, arguments, {}))(state)
            row = _recorded(state)
            filled = jax.tree.map(lambda rows, new: rows.at[at].set(new), filled, row)
            return state, filled

        empty = jax.tree.map(
            lambda x: jnp.zeros((CHUNK, *jnp.shape(x)), jnp.result_type(x)), _recorded(state)
        )
        state, (z, statistics) = jax.lax.fori_loop(0, size, iteration, (state, empty))
        return state, z, statistics

    def constrain(
        self, z: dict[str, jax.Array], at: jax.Array, arguments: tuple[Any, ...]
    ) -> dict[str, jax.Array]:
        """Values of the sites that are needed to simulate, from unconstrained positions."""

        def of_draw(z: dict[str, jax.Array]) -> dict[str, jax.Array]:
            def value(site: Any) -> Any:
                if site["name"] in z:
                    return dist.biject_to(site["fn"].support)(z[site["name"]])

            constrained = handlers.substitute(self.model, substitute_fn=value)
            return kept(handlers.trace(constrained).get_trace(*arguments))

        flat = jax.tree.map(lambda x: jnp.moveaxis(x[at], 1, 0).reshape(-1, *x.shape[2:]), z)
        values = jax.lax.map(of_draw, flat, batch_size=8)
        return {name: site.reshape(-1, len(at), *site.shape[1:]) for name, site in values.items()}

    def _initialized(self, key: jax.Array, place: Any, arguments: tuple[Any, ...]) -> Any:
        settings = self.settings
        # Until it is adapted, a small step from a bad start would make the longest trajectories.
        deepest = WARMUP_DEPTH if self.dense else settings.max_tree_depth
        position = place.z if isinstance(place, infer.util.ParamInfo) else place
        return self.init(
            place,
            settings.warmup,
            target_accept_prob=settings.target_accept,
            max_tree_depth=(min(deepest, settings.max_tree_depth), settings.max_tree_depth),
            trajectory_length=None,
            dense_mass=[tuple(sorted(position))] if self.dense else False,
            model_args=arguments,
            rng_key=key,
        )


def _settings_of_a_chain(settings: NUTS) -> NUTS:
    """The settings that decide what is compiled; the others as they are when left out."""
    parallel = settings.chain_method == "parallel"
    return replace(
        settings,
        draws=1,
        chains=settings.chains if parallel else 1,
        chain_method="parallel" if parallel else "vectorized",
    )


def _recorded(state: Any) -> Any:
    """Positions, and NUTS's statistics of them in the order of ``SampleStats``."""
    step_size = state.adapt_state.step_size
    return state.z, (state.diverging, state.accept_prob, state.num_steps, state.energy, step_size)


def _over_devices(advance: Callable[..., Any]) -> Callable[..., Any]:
    """The same with chains spread over all devices."""
    made: Callable[..., Any] = jax.make_mesh
    axis: Any = jax.sharding.AxisType.Auto
    mesh = made((jax.local_device_count(),), ("chain",), axis_types=(axis,))
    spec: Callable[..., Any] = jax.sharding.PartitionSpec
    shard: Callable[..., Callable[..., Any]] = jax.shard_map
    return shard(
        advance,
        mesh=mesh,
        in_specs=(spec("chain"), spec(), spec()),
        out_specs=(spec("chain"), spec(None, "chain"), spec(None, "chain")),
        check_vma=False,
    )


def _sizes(total: int) -> list[int]:
    """Chunks of iterations, with at most one that is shorter."""
    whole, rest = divmod(total, CHUNK)
    return [CHUNK] * whole + ([rest] if rest else [])
