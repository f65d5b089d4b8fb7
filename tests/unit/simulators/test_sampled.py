"""Draws rolled out: against the recurrence as a loop, and errors against their covariance.

Statistical tests would fail for one seed in 1,000 if the errors were right.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro import distributions as dist
from scipy import stats

from bayes_simfluence.checks import Misuse
from bayes_simfluence.linalg import double_precision
from bayes_simfluence.model import noise
from bayes_simfluence.model.arrays import RunArrays, exposures, no_features
from bayes_simfluence.model.coefficients import Varying
from bayes_simfluence.model.exposure import FLOOR, Exposure
from bayes_simfluence.model.hyper import natural_values, start
from bayes_simfluence.model.numpyro_model import Units, coefficients_of
from bayes_simfluence.model.simfluence import Simfluence, hypers_of
from bayes_simfluence.simulators.sampled import SampledSimulator
from bayes_simfluence.simulators.unrolled import _scanned, _summed

FALSE_ALARMS = 1e-3
STEPS, TRAIN, QUERIES = 5, 3, 2
REFERENCE = np.array([1.5, 0.8])
KEY = jax.random.key(3)


def drawn(model, rng, draws=1, same=False, **fixed):
    """A simulator with draws around the hyperparameters' centre; ``same`` repeats the first."""
    hypers = hypers_of(model, no_features(TRAIN, QUERIES))
    knots, made = model.coefficients.count(1.0), 1 if same else draws
    sites = {}
    for name, one in natural_values(hypers, jnp.asarray(start(hypers), jnp.float32)).items():
        sites[name] = float(one) + 0.02 * rng.uniform(size=(1, made))
    sites["scale"] = rng.uniform(0.1, 0.3, (1, made, QUERIES))
    if model.per_query and model.error.by_step:
        sites["noise"] = rng.uniform(0.1, 0.3, (1, made, QUERIES))
    for part in model.parts if model.has_additive else ():
        sites[f"{part}_unit"] = rng.normal(size=(1, made, QUERIES, TRAIN, knots))
        if model.time_effect != "none":
            width = knots if model.time_effect == "smooth" else 1
            sites[f"{part}_time"] = rng.normal(size=(1, made, QUERIES, width))
    if model.has_multiplicative:
        sites["multiplicative_unit"] = rng.normal(size=(1, made, QUERIES, TRAIN, 1))
    for name, value in fixed.items():
        sites[name] = np.full_like(sites[name], value)
    if same:
        sites = {name: np.repeat(one, draws, axis=1) for name, one in sites.items()}
    with double_precision():
        units = Units(jnp.asarray(REFERENCE), jnp.asarray(1.0 if model.per_query else 3.0))
        features = no_features(TRAIN, QUERIES)
    return SampledSimulator(model, sites, units, features, STEPS, 0.1)


def planned(rng, runs=2, steps=STEPS):
    batch = rng.integers(-1, TRAIN, (runs, steps, 2))
    step_size = rng.uniform(0.01, 0.1, (runs, steps))
    initial = rng.uniform(0.8, 1.6, (runs, 1, QUERIES))
    weight = rng.uniform(0.5, 2.0, batch.shape)
    features = no_features(TRAIN, QUERIES)
    return RunArrays.of(batch, initial, weight=weight, step_size=step_size, features=features)


def shares_of(plan, run):
    """Weight of each example over the sum of weights in each batch."""
    with double_precision():
        batch, weight = jnp.asarray(plan.batch[run]), jnp.asarray(plan.weight[run])
        return np.asarray(exposures(batch, weight, TRAIN))


def to_link(model, loss):
    ways = {"identity": lambda x: x, "log": np.log, "log-odds": lambda x: np.log(np.expm1(x))}
    return ways[model.link](np.asarray(loss, float))


def to_loss(model, y):
    return {"identity": y, "log": np.exp(y), "log-odds": np.logaddexp(0.0, y)}[model.link]


def looped(simulator, plan, run, query):
    """One run's losses without errors, step by step; constant coefficients."""
    model = simulator.model
    value = {name: one[0, 0] for name, one in simulator.sites.items()}
    scale = value["scale"][query] / float(simulator.units.spread)
    y = [float(to_link(model, plan.initial[run, query]))]
    size = plan.step_size[run] / simulator.largest_step_size
    rates = {"staying": value.get("growth", 0.0), "fading": -1 / value.get("fade_length", 1.0)}
    ratio = {"staying": 1.0, "fading": value.get("fading_scale", 1.0)}
    rho = value.get("momentum", simulator.model.exposure.momentum)
    memory, total = dict.fromkeys(model.parts, 0.0), dict.fromkeys(model.parts, 0.0)
    for t, slots in enumerate(plan.batch[run]):
        weights = np.where(slots >= 0, plan.weight[run, t], 0.0)
        whole = weights.sum() or 1.0
        share = [weights[slots == i].sum() / whole for i in range(TRAIN)]
        for part in model.parts:
            moved = scale * ratio[part] * (share @ value[f"{part}_unit"][query, :, 0])
            if model.time_effect != "none":
                common = value[f"{part}_common"] * value[f"{part}_time"][query, 0]
                moved += scale * ratio[part] * common
            if model.has_multiplicative and part == model.parts[0]:
                of = 1 / REFERENCE[query] if model.per_query else value["multiplicative_scale"]
                moved += scale * of * (share @ value["multiplicative_unit"][query, :, 0]) * y[-1]
            memory[part] = rho * memory[part] + (1 - rho) * moved
            power = value.get("step_size_power", 0.0)
            factor = (size[t] + FLOOR) ** power if model.exposure.step_size_power is None else 1.0
            acts = factor * memory[part] / (1 - rho ** (t + 1))
            total[part] = np.exp(rates[part] / simulator.recorded) * total[part] + acts
        y.append(y[0] + sum(total.values()))
    return to_loss(model, np.array(y))


TWO = {"coefficients": Varying(1), "time_effect": "linear"}
ROLLED = {
    "linear": Simfluence.linear(),
    "additive": Simfluence.additive(link="log", error=noise.AR1()),
    "two timescales": Simfluence(error=noise.Gaussian(), coupling="none", **TWO),
    "multiplicative": Simfluence(terms="both", error=noise.StudentT(0.4), coupling="none", **TWO),
}


@pytest.mark.parametrize("name", ROLLED)
def test_without_noise_a_draw_is_the_recurrence(rng, name):
    simulator, plan = drawn(ROLLED[name], rng, noise=0.0), planned(rng)
    found = simulator.simulate(plan, key=KEY, draws=1)
    for run in range(2):
        for query in range(QUERIES):
            expected = looped(simulator, plan, run, query)
            np.testing.assert_allclose(
                found.mean_loss[0, 0, run, :, query], expected, rtol=1e-5, atol=1e-6
            )
    np.testing.assert_allclose(found.loss, found.mean_loss, rtol=1e-6)


def test_a_query_alone_and_a_run_alone_are_the_same(rng):
    simulator, plan = drawn(ROLLED["linear"], rng), planned(rng)
    whole = simulator.simulate(plan, key=KEY, draws=1)
    one = plan.of_queries(np.array([1]))
    alone = simulator.simulate(one, key=KEY, draws=1)
    np.testing.assert_allclose(alone.mean_loss, whole.mean_loss[..., 1:], rtol=1e-6)


DRAWS = 300
MULTIPLICATIVE = Simfluence.linear(error=noise.Gaussian(observation=True))
ERRORS = {
    "gaussian": Simfluence.additive(),
    "observation": Simfluence.additive(error=noise.Gaussian(observation=True)),
    "observation behind a recurrence": MULTIPLICATIVE,
    "run effect": Simfluence.additive(error=noise.Gaussian(run_effect=True)),
    "ar1": Simfluence.additive(error=noise.AR1(), link="log"),
    "smooth": Simfluence(coefficients=Varying(1)),
}


def trajectory_covariance(simulator, plan, query):
    """Covariance of one run's trajectory on the scale of the link, from that of its errors."""
    model, sites = simulator.model, simulator.sites
    value = {name: float(one[0, 0]) for name, one in sites.items() if one.ndim == 2}
    size = sites["scale"][0, 0, query]
    if model.error.by_step:
        size = sites["noise"][0, 0, query]
    step = np.arange(1, STEPS + 1.0)
    own = np.minimum(step[:, None], step)
    if getattr(model.error, "run_effect", False):
        own = own + value["run_slope"] ** 2 * np.outer(step, step) / STEPS
    if isinstance(model.error, noise.AR1):
        eps = value["error_correlation"] ** np.abs(step[:, None] - step)
        own = np.tril(np.ones((STEPS, STEPS))) @ eps @ np.triu(np.ones((STEPS, STEPS)))
    if isinstance(model.error, noise.Smooth):
        with double_precision():
            given = {name: jnp.asarray(one) for name, one in value.items()}
            own = np.asarray(model.error.covariance(given, jnp.asarray(step / STEPS)))
    if model.has_multiplicative:
        unit = sites["multiplicative_unit"][0, 0, query, :, 0]
        a = sites["scale"][0, 0, query] / REFERENCE[query] * unit
        alpha = 1 + shares_of(plan, 0) @ a
        response = np.array(
            [
                [np.prod(alpha[s + 1 : t + 1]) if s <= t else 0.0 for s in range(STEPS)]
                for t in range(STEPS)
            ]
        )
        own = response @ response.T
    if getattr(model.error, "observation", False):
        own = own + value["observation"] ** 2 * np.eye(STEPS)
    return size**2 * own


@pytest.mark.parametrize("name", ERRORS)
def test_errors_have_their_covariance(rng, name):
    simulator, plan = drawn(ERRORS[name], rng, DRAWS, same=True), planned(rng, runs=1)
    found = simulator.simulate(plan, key=KEY, draws=DRAWS)
    assert found.loss.shape == (1, DRAWS, 1, STEPS + 1, QUERIES)
    np.testing.assert_allclose(found.mean_loss, found.mean_loss[:, :1].repeat(DRAWS, 1))
    for query in range(QUERIES):
        linked = (to_link(simulator.model, one[0, :, 0, 1:, query]) for one in found[::-1])
        path = np.subtract(*linked)
        factor = np.linalg.cholesky(
            trajectory_covariance(simulator, plan, query) + 1e-10 * np.eye(STEPS)
        )
        white = np.linalg.solve(factor, path.T)
        assert stats.kstest(white.ravel(), stats.norm.cdf).pvalue > FALSE_ALARMS
        interval = stats.chi2(white.size).interval(1 - FALSE_ALARMS)
        assert interval[0] < (white**2).sum() < interval[1]
        # Twelve percent more or less would be seen, and any correlation that is left over.
        assert not interval[0] < (1.12 * white**2 * 1.12).sum() < interval[1]
        left = np.corrcoef(white)[np.triu_indices(STEPS, 1)] * np.sqrt(DRAWS)
        assert np.abs(left).max() < stats.norm.isf(FALSE_ALARMS / 2 / len(left))


@pytest.mark.parametrize(
    ("kind", "power"), [(noise.StudentT, 0.0), (noise.StudentT, 0.8), (noise.Gaussian, -0.8)]
)
def test_steps_have_their_law_and_follow_the_loss(rng, kind, power):
    error = kind(loss_power=power, **({"df": 3.0} if kind is noise.StudentT else {}))
    simulator = drawn(Simfluence.additive(error=error), rng, DRAWS, same=True, noise=0.05)
    plan = planned(rng, runs=1)
    found = simulator.simulate(plan, key=KEY, draws=DRAWS)
    loss, mean = (one[0, :, 0].astype(float) for one in (found.loss, found.mean_loss))
    step = np.diff(loss - mean, axis=1) / 0.05
    law = stats.t(3) if kind is noise.StudentT else stats.norm()
    unit = step / np.maximum(loss[:, :-1], 1e-3) ** power
    assert stats.kstest(unit.ravel(), law.cdf).pvalue > FALSE_ALARMS
    assert stats.kstest(1.2 * unit.ravel(), law.cdf).pvalue < FALSE_ALARMS


def test_draws_and_runs_have_errors_of_their_own(rng):
    simulator = drawn(ERRORS["gaussian"], rng, 2, same=True)
    plan = planned(rng, runs=1).take(np.array([0, 0]))
    loss = simulator.simulate(plan, key=KEY, draws=2).loss[0, :, :, 1:]
    flat = loss.reshape(4, -1)
    assert len(np.unique(flat[:, 0])) == 4
    assert len(np.unique(flat)) == flat.size


def test_longer_runs_begin_like_shorter_ones_and_go_on_at_random(rng):
    model = Simfluence(coefficients=Varying(3), time_effect="none")
    simulator, plan = drawn(model, rng, 8, same=True), planned(rng, steps=2 * STEPS)
    short = RunArrays.of(
        plan.batch[:, :STEPS],
        plan.initial[:, None],
        weight=plan.weight[:, :STEPS],
        step_size=plan.step_size[:, :STEPS],
        features=plan.features,
    )
    long_mean = simulator.simulate(plan, key=KEY, draws=8).mean_loss[0]
    short_mean = simulator.simulate(short, key=KEY, draws=8).mean_loss[0]
    assert long_mean.shape[2] == 2 * STEPS + 1
    np.testing.assert_allclose(long_mean[:, :, : STEPS + 1], short_mean, rtol=1e-5)
    assert (long_mean[:, :, : STEPS + 1].std(axis=0) < 1e-6).all()
    assert (long_mean[:, :, -1].std(axis=0) > 1e-3).all()


def test_constant_coefficients_and_a_callers_stay_the_same_in_longer_runs(rng):
    plan = planned(rng, steps=2 * STEPS)
    for settings in (
        {"coefficients": Varying(1)},
        {"coefficients": Varying(3), "prior": dist.Laplace(0.0, 0.1), "time_effect": "none"},
    ):
        simulator = drawn(Simfluence(**settings), rng, 4, same=True)
        if "prior" in settings:
            units = {f"{part}_unit" for part in simulator.model.parts}
            for name in units:
                simulator.sites[name][...] = simulator.sites[name][..., :1]
        mean = simulator.simulate(plan, key=KEY, draws=4).mean_loss[0]
        assert np.isfinite(mean).all()
        np.testing.assert_allclose(mean, mean[:1].repeat(4, 0), rtol=1e-6)
        assert np.ptp(mean[0, :, -4:], axis=1).min() > 0


def test_draws_are_spread_over_chains(rng):
    simulator = drawn(ROLLED["linear"], rng, 6)
    halves = {name: one.reshape(2, 3, *one.shape[2:]) for name, one in simulator.sites.items()}
    simulator = SampledSimulator(
        simulator.model, halves, simulator.units, simulator.features, STEPS, 0.1
    )
    assert simulator.draws == 6
    named = simulator.samples(key=KEY, draws=4)
    assert named["scale"][0] == ("chain", "draw", "query")
    np.testing.assert_allclose(named["scale"][1], halves["scale"][:, [0, 2]], rtol=1e-12)
    a = halves["scale"][..., None] / REFERENCE[:, None] * halves["multiplicative_unit"][..., 0]
    assert named["a"][0] == ("chain", "draw", "query", "train")
    np.testing.assert_allclose(named["a"][1], a[:, [0, 2]], rtol=1e-5)
    assert simulator.simulate(planned(rng), key=KEY, draws=100).loss.shape[:2] == (2, 3)


def test_a_simulator_survives_as_arrays_and_plain_settings(rng):
    simulator, plan = drawn(ROLLED["linear"], rng, 3), planned(rng)
    arrays = {name: value for name, (dims, value) in simulator.arrays().items()}
    for name, (dims, value) in simulator.arrays().items():
        assert len(dims) == value.ndim, name
        assert name not in dims, name
    again = SampledSimulator.restore(arrays, json.loads(json.dumps(simulator.settings())))
    for one in ("simulate", "samples"):
        given = {"key": KEY, "draws": 3}
        first, second = (
            getattr(each, one)(*((plan,) if one == "simulate" else ()), **given)
            for each in (simulator, again)
        )
        jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(first), jax.tree.leaves(second))
    assert again.settings() == simulator.settings()


def test_step_sizes_are_asked_for_where_the_fit_had_them(rng):
    with pytest.raises(Misuse, match=r"got no step_size.*pass step_size="):
        drawn(ROLLED["linear"], rng).simulate(
            planned(rng)._replace(step_size=None), key=KEY, draws=1
        )


def likelihood(simulator, plan, loss):
    return simulator.log_likelihood(plan._replace(loss=loss), key=KEY, draws=10)


@pytest.mark.parametrize("link", ["log", "log-odds"])
def test_the_density_is_per_nat(rng, link):
    """One more step's density integrates to one over losses in nats."""
    model = Simfluence.additive(link=link)
    simulator, plan = drawn(model, rng), planned(rng, runs=1)
    grid = np.linspace(1e-3, 6.0, 1500)
    loss = np.repeat(rng.uniform(0.7, 1.3, (1, STEPS + 1, QUERIES)), len(grid), axis=0)
    loss[:, -1, 0] = grid
    many = plan.take(np.zeros(len(grid), int))._replace(loss=loss)
    density = np.exp(likelihood(simulator, many, loss)[0, 0, :, -1, 0].astype(float))
    np.testing.assert_allclose(np.trapezoid(density, grid), 1.0, rtol=1e-3)


@pytest.mark.parametrize("name", ["linear", "multiplicative"])
def test_some_queries_have_the_density_that_they_have_among_all(rng, name):
    simulator, plan = drawn(ROLLED[name], rng, 3), planned(rng)
    loss = rng.uniform(0.5, 1.5, (2, STEPS + 1, QUERIES))
    whole = likelihood(simulator, plan, loss)
    assert whole.shape == (1, 3, 2, STEPS, QUERIES)
    assert np.isfinite(whole).all()
    plan = plan._replace(loss=loss)
    one = plan.of_queries(np.array([1]))
    np.testing.assert_allclose(likelihood(simulator, one, loss[..., 1:]), whole[..., 1:], rtol=1e-5)
    turned = plan.of_queries(np.array([1, 0]))
    found = likelihood(simulator, turned, loss[..., ::-1])
    np.testing.assert_allclose(found, whole[..., ::-1], rtol=1e-5)


def test_losses_that_were_not_recorded_take_the_values_of_their_draws(rng):
    simulator, plan = drawn(Simfluence.linear(error=noise.StudentT()), rng, 3), planned(rng)
    full = np.repeat(rng.uniform(0.5, 1.5, (1, 2, STEPS + 1, QUERIES)), 3, axis=0)
    lost = np.array([[0, 2, 0], [0, 2, 1], [1, 5, 1]])
    filled = rng.uniform(0.5, 1.5, (3, len(lost)))
    for draw in range(3):
        full[draw][tuple(lost.T)] = filled[draw]
    known = full[0].copy()
    known[tuple(lost.T)] = np.nan
    sites = {**simulator.sites, "missing": filled[None]}
    fitted = SampledSimulator(
        simulator.model, sites, simulator.units, simulator.features, STEPS, 0.1, lost
    )
    found = likelihood(fitted, plan, known)
    for draw in range(3):
        expected = likelihood(simulator, plan, full[draw])[0, draw]
        expected[~np.isfinite(known[:, 1:])] = np.nan
        np.testing.assert_allclose(found[0, draw], expected, rtol=1e-5)
    one = plan._replace(loss=known).of_queries(np.array([1]))
    np.testing.assert_allclose(likelihood(fitted, one, known[..., 1:]), found[..., 1:], rtol=1e-5)
    known[0, 3, 0] = np.nan
    with pytest.raises(Misuse, match="got 1 losses left out that the fit has no draws of"):
        likelihood(fitted, plan, known)
    with pytest.raises(Misuse, match="got 4 losses left out"):
        likelihood(simulator, plan, known)


@pytest.mark.parametrize("exposure", [Exposure(), Exposure(order=3, step_size_power=0.0)])
def test_the_scan_is_the_matrix(rng, exposure):
    """Without feedback of the loss both ways of rolling out are the same."""
    model = Simfluence(coefficients=Varying(3), exposure=exposure, error=noise.Gaussian())
    simulator, plan = drawn(model, rng), planned(rng, runs=1)
    with double_precision():
        sites = {name: jnp.asarray(one[0, 0]) for name, one in simulator.sites.items()}
        found = coefficients_of(model, sites, simulator.units, simulator.features)
        run = RunArrays(
            batch=jnp.asarray(plan.batch[0]),
            weight=jnp.asarray(plan.weight[0]),
            step_size=jnp.asarray(plan.step_size[0]),
            loss=jnp.asarray(plan.loss[0]),
            query=jnp.asarray(plan.query),
            features=plan.features,
            progress=jnp.asarray(plan.progress[0]),
        )
        rest = (run, jnp.asarray(plan.initial[0]), jnp.asarray(rng.normal(size=(STEPS, QUERIES))))
        first, second = (way(model, sites, found, *rest) for way in (_summed, _scanned))
        np.testing.assert_allclose(first, second, rtol=1e-8)
