"""Members of a coupled pool, on a recording whose examples act by their residuals."""

from dataclasses import replace

import jax
import numpy as np
import pytest

import bayes_simfluence as bs
from bayes_simfluence.model.coefficients import Varying
from bayes_simfluence.model.simfluence import hypers_of
from bayes_simfluence.posterior.arrays import planned_arrays

KEY = jax.random.key(0)


def test_of_a_coupled_model_the_last_member_has_constant_effects(recorded):
    """Held hyperparameters say the same as the settings of a model that has none of them."""
    fitted, other = recorded.isel(run=slice(0, 6)), recorded.isel(run=slice(6, 8))
    posterior = bs.fit(fitted, method=bs.Stack(times=4), key=KEY)
    marginal, joint, constant = posterior.simulator.members
    assert "Pooled fits: marginal" in str(posterior.verdict) and "constant" in str(
        posterior.verdict
    )
    assert marginal.model == joint.model == constant.model and marginal.values["growth"] != 0
    hypers = hypers_of(constant.model, constant.features)
    held = {name: one.constant for name, one in hypers.items() if one.constant is not None}
    assert {name: constant.values[name] for name in held} == pytest.approx(held)
    assert len(held) > 5
    model = bs.Simfluence(coefficients=Varying(knots=1), timescales="staying", time_effect="none")
    free = dict(zip(hypers, constant.free, strict=True))
    names = hypers_of(model, constant.features)
    plain = replace(constant, model=model, free=np.array([free[name] for name in names]))
    planned = planned_arrays(other, *(fitted[axis].values for axis in ("train", "query")))
    medians = [
        np.median(one.simulate(planned, key=KEY, draws=400).mean_loss[0], axis=0)
        for one in (constant, plain)
    ]
    np.testing.assert_allclose(*medians, atol=0.02)
    assert np.abs(medians[0] - medians[0][:, :1]).max() > 0.05
