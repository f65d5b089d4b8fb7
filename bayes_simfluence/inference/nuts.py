"""No-U-turn sampling of the whole model by NumPyro: every prior, every error."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpyro import infer

from bayes_simfluence.checks import Misuse, choice_of, count_of, positive_integer
from bayes_simfluence.inference.diagnostics import SampleStats, sampler_verdict
from bayes_simfluence.inference.method import Fitted
from bayes_simfluence.inference.program import LIMIT, program_of
from bayes_simfluence.inference.recorded import Recorded
from bayes_simfluence.linalg import double_precision
from bayes_simfluence.model.bayesian import Simfluence
from bayes_simfluence.progress import Meter, Progress

__all__ = ["NUTS", "Sampled", "sample"]

Chains = Literal["vectorized", "parallel", "sequential"]
CHUNK = 25
"""Iterations between two reports of progress, and between two moves of draws to the host."""


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

    def default_model(self) -> Simfluence:
        """The published linear kind: the two-timescale model is quicker by ``Exact``."""
        return Simfluence(kind="linear")

    def as_dict(self) -> dict[str, Any]:
        """Name and settings."""
        return {"method": "NUTS", **asdict(self)}

    def fit(
        self,
        runs: Recorded,
        model: Simfluence,
        *,
        key: jax.Array,
        validation: Recorded | None,
        progress: Progress,
    ) -> Fitted:
        """Draws of ``model`` given ``runs``."""
        with double_precision():
            program = program_of(runs, model, "NUTS")
            thin = -(-self.draws * self.chains * program.bytes_of_a_draw() // LIMIT)
            found = sample(
                program(), (program.observed,), self, key=key, thin=thin, keep=program.keeps,
                progress=progress,
            )  # fmt: skip
        simulator = program.simulator(found.sites)
        return Fitted(
            simulator,
            sampler_verdict(found.sites, found.stats, thin),
            sample_stats=found.stats.dataset(),
        )


class Sampled(NamedTuple):
    """Draws of a program.

    Attributes:
        sites: constrained values by name, leading axes (chain, draw).
        stats: what the sampler says of each draw.
    """

    sites: dict[str, np.ndarray]
    stats: SampleStats


def sample(
    program: Callable[..., None],
    arguments: tuple[Any, ...],
    settings: NUTS,
    *,
    key: jax.Array,
    thin: int,
    keep: Callable[[str], bool],
    progress: Progress,
) -> Sampled:
    """NUTS of any NumPyro program, in chunks: progress is told, draws leave the device."""
    kernel = infer.NUTS(
        program,
        target_accept_prob=settings.target_accept,
        max_tree_depth=settings.max_tree_depth,
        init_strategy=infer.init_to_median(num_samples=5),
    )
    total = (settings.warmup + settings.draws) * (
        settings.chains if settings.chain_method == "sequential" else 1
    )
    keys = jax.random.split(key, settings.chains)
    with progress.work("NUTS", total) as meter:
        if settings.chain_method == "sequential":
            each = [
                _chains(kernel, arguments, settings, one[None], thin, keep, meter) for one in keys
            ]
            sites = {
                name: np.concatenate([one.sites[name] for one in each]) for name in each[0].sites
            }
            return Sampled(sites, SampleStats.joined([one.stats for one in each]))
        return _chains(kernel, arguments, settings, keys, thin, keep, meter)


def _chains(
    kernel: infer.NUTS,
    arguments: tuple[Any, ...],
    settings: NUTS,
    keys: jax.Array,
    thin: int,
    keep: Callable[[str], bool],
    meter: Meter,
) -> Sampled:
    state = kernel.init(keys, settings.warmup, None, arguments, {})
    advance = _advance(kernel, settings)
    for size in _sizes(settings.warmup):
        state, _ = advance(state, arguments, size)
        meter.advance(size, "warm-up")
    constrain = jax.jit(
        lambda z: jax.lax.map(
            lambda one: _kept(kernel.postprocess_fn(arguments, {})(one), keep), z, batch_size=8
        )
    )
    sites: list[dict[str, np.ndarray]] = []
    stats: list[SampleStats] = []
    done = diverged = 0
    for size in _sizes(settings.draws):
        state, (z, told) = advance(state, arguments, size)
        # Iterations that fall on a multiple of ``thin`` are kept.
        at = np.flatnonzero((done + np.arange(size)) % thin == 0)
        if len(at):
            flat = jax.tree.map(lambda x, at=at: x[at].reshape(-1, *x.shape[2:]), z)
            values = constrain(flat)
            sites.append({name: _leading(one, len(at)) for name, one in values.items()})
        stats.append(SampleStats(*(np.asarray(one).T for one in told)))
        diverged += int(stats[-1].diverging.sum())
        done += size
        meter.advance(size, f"{diverged} divergences")
    whole = {name: np.concatenate([one[name] for one in sites], axis=1) for name in sites[0]}
    return Sampled(whole, SampleStats.appended(stats).thinned(thin))


def _advance(kernel: infer.NUTS, settings: NUTS) -> Callable[..., Any]:
    """Some iterations of all chains: the last state, every position and what NUTS says of it."""

    def iterations(state: Any, arguments: tuple[Any, ...], size: int) -> Any:
        def one(state: Any, _: None) -> tuple[Any, Any]:
            state = kernel.sample(state, arguments, {})
            told = (
                state.diverging, state.accept_prob, state.num_steps, state.energy,
                state.adapt_state.step_size,
            )  # fmt: skip
            return state, (state.z, told)

        return jax.lax.scan(one, state, None, length=size)

    if settings.chain_method != "parallel":
        return jax.jit(iterations, static_argnums=2)
    mesh = jax.make_mesh((jax.local_device_count(),), ("chain",))
    spec: Callable[..., Any] = jax.sharding.PartitionSpec

    def spread(state: Any, arguments: tuple[Any, ...], size: int) -> Any:
        shard: Callable[..., Callable[..., Any]] = jax.shard_map
        own = shard(
            lambda state, arguments: iterations(state, arguments, size),
            mesh=mesh,
            in_specs=(spec("chain"), spec()),
            out_specs=(spec("chain"), spec(None, "chain")),
            check_vma=False,
        )
        return own(state, arguments)

    return jax.jit(spread, static_argnums=2)


def _sizes(total: int) -> list[int]:
    """Chunks of iterations, with at most one that is shorter."""
    whole, rest = divmod(total, CHUNK)
    return [CHUNK] * whole + ([rest] if rest else [])


def _kept(values: dict[str, jax.Array], keep: Callable[[str], bool]) -> dict[str, jax.Array]:
    return {name: one.astype(jnp.float32) for name, one in values.items() if keep(name)}


def _leading(values: jax.Array, draws: int) -> np.ndarray:
    """From (draw x chain, ...) to (chain, draw, ...)."""
    found = np.asarray(values)
    return np.moveaxis(found.reshape(draws, -1, *found.shape[1:]), 0, 1)
