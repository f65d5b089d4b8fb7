"""Errors of a run: covariances against recurrences entry by entry, densities against SciPy's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from bayes_simfluence.checks import Misuse
from bayes_simfluence.linalg import double_precision
from bayes_simfluence.model.noise import (
    AR1,
    ERRORS,
    JITTER,
    Gaussian,
    Smooth,
    StudentT,
    error_from_dict,
)

VALUES = {
    "growth": 0.8,
    "drift": 0.3,
    "wobble": 0.7,
    "wobble_length": 0.2,
    "wobble_trend": -0.9,
}


def covariance(progress, **changes):
    with double_precision():
        values = {name: jnp.asarray(float(value)) for name, value in {**VALUES, **changes}.items()}
        return np.asarray(Smooth().covariance(values, jnp.asarray(progress)))


def walk_by_recurrence(steps, dt, growth, drift):
    """Covariance of ``w_t = exp(growth dt) w_{t-1} + drift sqrt(dt) xi_t``, entry by entry."""
    walk = np.zeros((steps + 1, steps + 1))
    for t in range(1, steps + 1):
        for s in range(t):
            walk[t, s] = walk[s, t] = np.exp(growth * dt) * walk[t - 1, s]
        walk[t, t] = np.exp(2 * growth * dt) * walk[t - 1, t - 1] + drift**2 * dt
    return walk[1:, 1:]


def smooth_by_conditioning(progress, wobble, length, trend):
    """Matern-3/2 at time 0 and the steps, conditioned on zero at time 0."""
    at = np.concatenate([[0.0], progress])
    scaled = np.sqrt(3) * np.abs(at[:, None] - at[None]) / length
    joint = (1 + scaled) * np.exp(-scaled)
    after = joint[1:, 1:] - np.outer(joint[1:, 0], joint[0, 1:]) / joint[0, 0]
    sd = wobble * np.exp(trend * (progress - 0.5))
    return after * np.outer(sd, sd)


@pytest.mark.parametrize("growth", [0.0, 0.8, -0.5])
@pytest.mark.parametrize("steps", [10, 15])
def test_the_covariance_is_a_walk_plus_a_conditioned_curve(growth, steps):
    progress = np.arange(1, steps + 1) / 10
    expected = walk_by_recurrence(steps, 0.1, growth, VALUES["drift"]) + smooth_by_conditioning(
        progress, VALUES["wobble"], VALUES["wobble_length"], VALUES["wobble_trend"]
    )
    smooth = covariance(progress, growth=growth)
    np.testing.assert_allclose(smooth, expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(smooth, smooth.T, atol=1e-14)
    assert np.linalg.eigvalsh(smooth).min() > -1e-12


def test_a_run_starts_without_error():
    early = [np.diag(covariance(np.arange(1, 11) * dt))[0] for dt in (1e-2, 1e-4, 1e-6)]
    np.testing.assert_array_less(np.array(early), [0.1, 2e-5, 2e-7])
    assert (np.array(early) > 0).all()


def test_the_walk_has_its_sd_after_a_recorded_length():
    walk = covariance(np.arange(1, 51) / 50, wobble=0.0, growth=0.0)
    np.testing.assert_allclose(np.diag(walk)[-1], VALUES["drift"] ** 2, rtol=1e-10)


def test_longer_runs_begin_like_shorter_ones():
    short, long = covariance(np.arange(1, 11) / 10), covariance(np.arange(1, 16) / 10)
    np.testing.assert_allclose(long[:10, :10], short, rtol=1e-12)


WALK = {"error_correlation": 0.6, "observation": 0.7, "run_slope": 0.4}


def trajectory_covariance(error, steps=5, **values):
    with double_precision():
        known = {name: jnp.asarray(float(value)) for name, value in {**WALK, **values}.items()}
        return np.asarray(error.covariance(known, jnp.arange(1, steps + 1) / 5.0))


def summed(steps):
    """Covariance of a trajectory from that of its steps, entry by entry."""
    size = len(steps)
    total = np.zeros((size, size))
    for t in range(size):
        for s in range(size):
            total[t, s] = sum(steps[i, j] for i in range(t + 1) for j in range(s + 1))
    return total


@pytest.mark.parametrize("size", [5, 8])
def test_gaussian_errors_are_a_random_walk(size):
    np.testing.assert_allclose(
        trajectory_covariance(Gaussian(), size), summed(np.eye(size)), rtol=1e-12
    )


def test_noise_of_observation_does_not_stay():
    observed = trajectory_covariance(Gaussian(observation=True))
    np.testing.assert_allclose(observed, summed(np.eye(5)) + 0.7**2 * np.eye(5), rtol=1e-12)


@pytest.mark.parametrize("size", [5, 8])
def test_a_run_effect_is_a_slope_that_after_a_recorded_length_has_its_share(size):
    extra = trajectory_covariance(Gaussian(run_effect=True), size) - trajectory_covariance(
        Gaussian(), size
    )
    progress = np.arange(1, size + 1) / 5
    for t in range(size):
        for s in range(size):
            # The walk of a recorded length, 5 steps, has variance 5.
            expected = 0.4**2 * 5 * progress[t] * progress[s]
            np.testing.assert_allclose(extra[t, s], expected, rtol=1e-10)


@pytest.mark.parametrize("rho", [0.6, -0.4, 0.0])
def test_correlated_steps_are_those_of_the_recurrence(rho):
    # eps_t = rho eps_{t-1} + innovation of variance 1 - rho^2, stationary from the first step on.
    steps = np.zeros((6, 6))
    steps[0, 0] = 1.0
    for t in range(1, 6):
        for s in range(t):
            steps[t, s] = steps[s, t] = rho * steps[t - 1, s]
        steps[t, t] = rho**2 * steps[t - 1, t - 1] + 1 - rho**2
    correlated = trajectory_covariance(AR1(), 6, error_correlation=rho)
    np.testing.assert_allclose(correlated, summed(steps), rtol=1e-12, atol=1e-14)
    with_slope = trajectory_covariance(AR1(run_effect=True), 6, error_correlation=rho)
    slope = 0.4**2 * 5 * np.outer(np.arange(1, 7), np.arange(1, 7)) / 25
    np.testing.assert_allclose(with_slope, correlated + slope, rtol=1e-10)


@pytest.mark.parametrize("rho", [0.6, 0.0])
def test_the_derivative_by_the_correlation_is_that_of_differences(rho):
    def total(rho):
        return AR1().covariance({"error_correlation": rho}, jnp.arange(1, 5) / 4.0).sum()

    with double_precision():
        slope = float(jax.grad(total)(jnp.asarray(rho)))
        up, down = (float(total(jnp.asarray(rho + step))) for step in (1e-6, -1e-6))
    np.testing.assert_allclose(slope, (up - down) / 2e-6, rtol=1e-6)


@pytest.mark.parametrize("df", [2.5, 4.0, 30.0])
@pytest.mark.parametrize("inferred", [True, False])
def test_student_steps_have_scipys_density(rng, df, inferred):
    steps = 3.0 * rng.normal(size=(4, 2))
    error = StudentT() if inferred else StudentT(df=df)
    progress = jnp.arange(1, 5) / 4.0
    with double_precision():
        values = {"error_freedom": jnp.asarray(df - 2.0)} if inferred else {}
        trajectory = jnp.asarray(steps.cumsum(axis=0))
        density = error.log_density(values, trajectory, progress, np.arange(4))
        np.testing.assert_allclose(error.df_of(values), df, rtol=1e-12)
    np.testing.assert_allclose(density, stats.t.logpdf(steps, df), rtol=1e-10)


EVERY = {
    "gaussian": Gaussian(),
    "observation": Gaussian(observation=True),
    "run effect": Gaussian(run_effect=True),
    "ar1": AR1(),
    "smooth": Smooth(),
}


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("rows", [range(5), [1, 4]])
def test_the_density_is_that_of_the_covariance_one_step_after_the_other(rng, name, rows):
    rows, progress = np.array(rows), jnp.arange(1, 6) / 5.0
    error = rng.normal(size=(5, 2))
    with double_precision():
        values = {name: jnp.asarray(value) for name, value in {**VALUES, **WALK}.items()}
        density = EVERY[name].log_density(values, jnp.asarray(error), progress, rows)
        covariance = np.asarray(EVERY[name].covariance(values, progress)) + JITTER * np.eye(5)
    assert (np.delete(np.asarray(density), rows, axis=0) == 0).all()
    for query in range(2):
        before = 0.0
        for count, row in enumerate(rows, start=1):
            seen = rows[:count]
            law = stats.multivariate_normal(cov=covariance[np.ix_(seen, seen)])
            so_far = law.logpdf(error[seen, query])
            np.testing.assert_allclose(density[row, query], so_far - before, rtol=1e-6)
            before = so_far


@pytest.mark.parametrize("name", [*EVERY, "student-t"])
def test_trajectories_have_the_density_that_is_said_of_them(name):
    """By the cross-entropy of draws, which only the right density makes as small.

    Its sampling error is five sds at most; a size wrong by a fifth costs more.
    """
    error = {**EVERY, "student-t": StudentT(df=5.0)}[name]
    progress, draws = jnp.arange(1, 6) / 5.0, 20_000
    with double_precision():
        values = {name: jnp.asarray(value) for name, value in {**VALUES, **WALK}.items()}
        drawn = error.trajectory(values, progress, draws, key=jax.random.key(0))

        def density(scale):
            unit = error.log_density(values, drawn / scale, progress, np.arange(5)).sum(axis=0)
            return np.asarray(unit) - 5 * np.log(scale)

        right, wide, narrow = (density(scale) for scale in (1.0, 1.2, 1 / 1.2))
    if error.gaussian:
        with double_precision():
            covariance = error.covariance(values, progress) + JITTER * np.eye(5)
        expected = -stats.multivariate_normal(cov=np.asarray(covariance)).entropy()
    else:
        expected = -5 * stats.t(5.0).entropy()
    assert abs(right.mean() - expected) < 5 * right.std() / np.sqrt(draws)
    assert wide.mean() < right.mean() - 0.02 and narrow.mean() < right.mean() - 0.02


def test_observation_is_what_hides_the_state():
    with double_precision():
        values = {"observation": jnp.asarray(0.7)}
        assert float(Gaussian(observation=True).observation_sd(values)) == 0.7
        assert [float(error.observation_sd(values)) for error in (Gaussian(), AR1())] == [0.0, 0.0]
    hidden = Gaussian(0.0, run_effect=True, observation=True)
    assert hidden.hides_state and hidden.of_state == Gaussian(run_effect=True)
    assert not any(error.hides_state for error in (Gaussian(), AR1(), StudentT(), Smooth()))
    assert AR1().of_state == AR1()


@pytest.mark.parametrize(
    ("error", "independent", "walk", "follows"),
    [
        (Gaussian(), True, True, False),
        (Gaussian(0.5), True, False, True),
        (Gaussian(None), True, False, True),
        (Gaussian(run_effect=True), False, False, False),
        (Gaussian(observation=True), False, True, False),
        (AR1(), False, False, False),
        (AR1(loss_power=1.0), False, False, True),
        (StudentT(), True, False, False),
        (StudentT(loss_power=None), True, False, True),
        (Smooth(), False, False, False),
    ],
)
def test_an_error_says_what_it_is(error, independent, walk, follows):
    assert error.independent_steps == independent
    assert error.random_walk == walk
    assert error.follows_loss == follows
    assert error.gaussian == (type(error) is not StudentT)
    assert error.by_step == (type(error) is not Smooth)


def test_an_error_that_is_not_gaussian_has_no_covariance():
    with pytest.raises(TypeError, match="StudentT has no covariance"):
        StudentT().covariance({}, jnp.ones(3))


def test_settings_of_version_0_1_still_read():
    assert error_from_dict({"name": "student-t", "freedom": 3.0}) == StudentT(df=3.0)
    assert error_from_dict({"name": "student-t", "freedom": None, "loss_power": 0.5}) == StudentT(
        0.5
    )


@pytest.mark.parametrize("kind", [Gaussian, AR1, StudentT])
def test_sizes_are_powers_of_the_loss_before(kind):
    before = np.array([[2.0, 0.5], [0.0, -1.0]])
    floored = np.array([[2.0, 0.5], [1e-3, 1e-3]])
    with double_precision():
        assert kind().sizes({}, jnp.asarray(before)) is None
        fixed = kind(loss_power=0.7).sizes({"loss_power": jnp.asarray(9.0)}, jnp.asarray(before))
        np.testing.assert_allclose(fixed, floored**0.7, rtol=1e-12)
        values = {"loss_power": jnp.asarray(-0.3)}
        inferred = kind(loss_power=None).sizes(values, jnp.asarray(before))
        np.testing.assert_allclose(inferred, floored**-0.3, rtol=1e-12)
    assert Smooth().sizes({}, jnp.asarray(before)) is None


@pytest.mark.parametrize(
    ("error", "names"),
    [
        (Gaussian(), set()),
        (Gaussian(observation=True), {"observation"}),
        (Gaussian(None, run_effect=True), {"loss_power", "run_slope"}),
        (AR1(), {"error_correlation"}),
        (AR1(None, run_effect=True), {"error_correlation", "loss_power", "run_slope"}),
        (StudentT(), {"error_freedom"}),
        (StudentT(loss_power=None, df=3.0), {"loss_power"}),
        (Smooth(), {"drift", "wobble", "wobble_length", "wobble_trend"}),
    ],
    ids=lambda case: "-".join(sorted(case)) if isinstance(case, set) else repr(case),
)
def test_only_what_is_not_given_is_inferred(error, names):
    assert set(error.hypers()) == names
    assert error_from_dict(error.as_dict()) == error
    assert ERRORS[error.as_dict()["name"]] is type(error)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Gaussian(loss_power=float("nan")), r"Gaussian\(loss_power=.*got nan.*finite"),
        (lambda: AR1(loss_power=float("inf")), r"AR1\(loss_power=.*got inf.*None to infer"),
        (lambda: Gaussian(0.5, observation=True), r"observation=True\).*got loss_power=0.5"),
        (lambda: Gaussian(None, observation=True), r"observation=True\).*got loss_power=None"),
        (lambda: StudentT(run_effect=True), r"StudentT\(run_effect=True\).*AR1\(run_effect"),
        (lambda: StudentT(df=2.0), r"StudentT\(df=.*got 2.0.*above 2"),
        (lambda: StudentT(df=float("nan")), r"StudentT\(df=.*got nan"),
        (lambda: StudentT(df=float("inf")), r"StudentT\(df=.*got inf"),
    ],
)
def test_errors_that_make_no_sense_are_refused(make, match):
    with pytest.raises(Misuse, match=match):
        make()
