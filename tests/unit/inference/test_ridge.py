"""Ridge against scikit-learn on the literal design, and its choice of penalty by brute force."""

import jax
import numpy as np
import pytest
from sklearn.linear_model import Ridge as PeerRidge

import bayes_simfluence as bs
from bayes_simfluence.checks import FitFailed, FitWarning, Misuse
from bayes_simfluence.evaluation.synthetic import linear_runs
from bayes_simfluence.inference.ridge import PENALTIES

TRAIN, QUERY = 6, 2


def recording(seed=0, runs=7, noise=0.03):
    runs, _ = linear_runs(
        key=jax.random.key(seed),
        runs=runs,
        train=TRAIN,
        query=QUERY,
        per_run=4,
        batch_size=2,
        epochs=3,
        noise=noise,
    )
    # A batch with a repeated example, one with an empty slot, an empty one.
    runs["batch"].values[0, 0], runs["batch"].values[1, 2, 1] = 3, -1
    runs["batch"].values[2, 1] = -1
    return runs


def weights_of(batch, count):
    """Counts or shares, from the definition."""
    counts = np.stack([(batch == one).sum(axis=-1) for one in range(TRAIN)], axis=-1).astype(float)
    filled = np.maximum((batch >= 0).sum(axis=-1, keepdims=True), 1)
    return counts if count else counts / filled


def form_of(kind, objective):
    count, keep = objective == "paper", float(objective == "centred" or kind == "additive")
    return count, keep


def by_hand(runs, kind, objective, penalty, query):
    """Coefficients ``a`` and ``b`` of one query by scikit-learn."""
    count, keep = form_of(kind, objective)
    loss = runs["loss"].values[..., query].astype(float)
    weight = weights_of(runs["batch"].values, count).reshape(-1, TRAIN)
    before, after = loss[:, :-1].ravel(), loss[:, 1:].ravel()
    blocks = {
        "linear": [weight * before[:, None], weight],
        "additive": [weight],
        "multiplicative": [weight * before[:, None]],
    }[kind]
    peer = PeerRidge(alpha=penalty, fit_intercept=False, solver="cholesky")
    found = peer.fit(np.concatenate(blocks, axis=1), after - keep * before).coef_
    zero = np.zeros(TRAIN)
    return {
        "linear": (found[:TRAIN], found[TRAIN:]),
        "additive": (zero, found),
        "multiplicative": (found, zero),
    }[kind]


def rolled_out(fitted, runs, kind, objective, penalty):
    """Free-running losses of ``runs`` under the peer's coefficients."""
    count, keep = form_of(kind, objective)
    weight = weights_of(runs["batch"].values, count)
    found = np.zeros(runs["loss"].shape)
    for query in range(QUERY):
        a, b = by_hand(fitted, kind, objective, penalty, query)
        found[:, 0, query] = runs["loss"].values[:, 0, query]
        for step in range(weight.shape[1]):
            alpha, beta = keep + weight[:, step] @ a, weight[:, step] @ b
            found[:, step + 1, query] = alpha * found[:, step, query] + beta
    return found


@pytest.mark.parametrize("kind", ["linear", "additive", "multiplicative"])
@pytest.mark.parametrize("objective", ["paper", "centred"])
@pytest.mark.parametrize("penalty", [0.01, 3.0])
def test_coefficients_are_scikit_learns(key, kind, objective, penalty):
    runs = recording()
    method = bs.Ridge(objective=objective, penalty=penalty)
    posterior = bs.fit(runs, model=getattr(bs.Simfluence, kind)(), method=method, key=key)
    assert posterior.verdict.numbers["penalty"] == penalty and posterior.left_out is None
    for query in range(QUERY):
        a, b = by_hand(runs, kind, objective, penalty, query)
        np.testing.assert_allclose(posterior.simulator.a[query], a, rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(posterior.simulator.b[query], b, rtol=1e-6, atol=1e-9)
    found = posterior.simulate(runs, key=key)["mean_loss"][0, 0]
    expected = rolled_out(runs, runs, kind, objective, penalty)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def errors_of(simulated, runs):
    return np.square(simulated - runs["loss"].values).mean()


@pytest.mark.parametrize("objective", ["paper", "centred"])
def test_the_penalty_is_the_best_on_validation_runs(key, objective):
    whole = recording(seed=2, runs=9, noise=0.1)
    runs, validation = whole.isel(run=slice(0, 6)), whole.isel(run=[6, 7, 8])
    errors = [
        errors_of(rolled_out(runs, validation, "linear", objective, one), validation)
        for one in PENALTIES
    ]
    expected = PENALTIES[int(np.argmin(errors))]
    assert expected not in (PENALTIES[0], PENALTIES[-1])
    method = bs.Ridge(objective=objective)
    posterior = bs.fit(runs, method=method, validation=validation, key=key)
    assert posterior.verdict.numbers["penalty"] == expected
    a, _ = by_hand(runs, "linear", objective, expected, 0)
    np.testing.assert_allclose(posterior.simulator.a[0], a, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("folds", [3, 20])
def test_without_validation_the_penalty_is_the_best_on_left_out_runs(key, folds):
    runs = recording()
    count = min(folds, runs.sizes["run"])
    left_out = np.zeros((len(PENALTIES), *runs["loss"].shape))
    for fold in range(count):
        out = np.arange(fold, runs.sizes["run"], count)
        rest = np.setdiff1d(np.arange(runs.sizes["run"]), out)
        for at, penalty in enumerate(PENALTIES):
            left_out[at, out] = rolled_out(
                runs.isel(run=rest), runs.isel(run=out), "linear", "centred", penalty
            )
    best = int(np.argmin([errors_of(one, runs) for one in left_out]))
    assert 0 < best < len(PENALTIES) - 1
    posterior = bs.fit(runs, method=bs.Ridge(objective="centred", folds=folds), key=key)
    assert posterior.verdict.numbers["penalty"] == PENALTIES[best]
    found = posterior.left_out["predicted"].transpose("run", "time", "query")
    np.testing.assert_allclose(found, left_out[best], rtol=1e-4, atol=1e-5)
    assert set(posterior.left_out.data_vars) == {"predicted"}


def test_the_band_holds_residuals_of_left_out_runs(key):
    runs = recording()
    posterior = bs.fit(runs, method=bs.Ridge(penalty=0.1, band=True, folds=3), key=key)
    expected = runs["loss"].values - posterior.left_out["predicted"].values
    np.testing.assert_allclose(posterior.simulator.residual, expected, atol=1e-6)
    simulated = posterior.simulate(runs, key=key, draws=30)
    assert simulated.sizes["draw"] == 30
    added = (simulated["loss"] - simulated["mean_loss"]).values[0][:, :, None]
    assert np.abs(added - expected[None, None]).max(axis=(3, 4)).min(axis=2).max() < 1e-5


def test_the_largest_penalty_is_a_bad_sign(key):
    # Losses that no curriculum explains: the largest penalty wins.
    runs = recording()
    rng = np.random.default_rng(0)
    runs["loss"].values[:] = 1.0 + 0.1 * rng.normal(size=runs["loss"].shape)
    method = bs.Ridge(objective="centred")
    with pytest.warns(FitWarning, match="the largest tried"):
        bs.fit(runs, method=method, key=key)
    with pytest.raises(FitFailed, match="the largest tried"):
        bs.fit(runs, method=method, key=key, strict=True)


def test_what_ridge_cannot_take_is_refused(key):
    with pytest.raises(Misuse, match=r"no least-squares form.*method=Exact\(\)"):
        bs.fit(recording(), model=bs.Simfluence(), method=bs.Ridge(), key=key)
    one = recording().isel(run=[0])
    for method in (bs.Ridge(), bs.Ridge(penalty=1.0, band=True)):
        with pytest.raises(Misuse, match=r"got one run; expected at least two.*validation=..."):
            bs.fit(one, method=method, key=key)
    bs.fit(one, method=bs.Ridge(penalty=1.0), key=key)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"penalty": 0.0}, r"penalty=.*finite number > 0"),
        ({"penalty": float("inf")}, r"penalty=.*finite number > 0"),
        ({"folds": 0}, r"folds=.*integer >= 1"),
    ],
)
def test_settings_out_of_range_are_refused(settings, match):
    with pytest.raises(Misuse, match=match):
        bs.Ridge(**settings)


def test_validation_runs_may_list_their_examples_in_another_order(key):
    whole = recording(seed=2, runs=9, noise=0.1)
    runs, validation = whole.isel(run=slice(0, 6)), whole.isel(run=[6, 7, 8])
    order = np.arange(TRAIN)[::-1]
    other = validation.isel(train=order, query=[1, 0]).copy(deep=True)
    place = np.append(np.argsort(order), -1)
    other["batch"].values[:] = place[validation["batch"].values]
    method = bs.Ridge(objective="centred")
    one, two = (
        bs.fit(runs, method=method, validation=given, key=key) for given in (validation, other)
    )
    assert one.verdict.numbers == two.verdict.numbers


def test_validation_runs_of_another_recording_are_refused(key):
    runs = recording()
    renamed = runs.assign_coords(train=[f"t{one}" for one in range(TRAIN)])
    with pytest.raises(Misuse, match=r"validation\['train'\].*unknown ids t0"):
        bs.fit(runs, method=bs.Ridge(), validation=renamed, key=key)
    with pytest.raises(Misuse, match=r"validation\['query'\].*got 1 ids.*one recording"):
        bs.fit(runs, method=bs.Ridge(), validation=runs.isel(query=[0]), key=key)
