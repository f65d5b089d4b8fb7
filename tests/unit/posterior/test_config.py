"""A fit in words: what the words make, what they refuse, and that resolved ones repeat it."""

from dataclasses import fields, replace

import numpy as np
import numpyro.distributions as dist
import pytest
import yaml

import bayes_simfluence as bs
from bayes_simfluence.checks import Misuse
from bayes_simfluence.gaussian.search import CRITERIA
from bayes_simfluence.inference.svi import GUIDES
from bayes_simfluence.model.noise import ERRORS
from bayes_simfluence.model.priors import PRIORS
from bayes_simfluence.model.simfluence import KINDS, LINKS, TIME_EFFECTS, TIMESCALES
from bayes_simfluence.posterior import config as words
from bayes_simfluence.posterior.config import FitConfig
from bayes_simfluence.settings import layered

CASES = {
    "nothing": ({}, bs.Simfluence(), bs.Stack()),
    "the paper's": ({"method": "ridge"}, bs.Simfluence.linear(), bs.Ridge(band=True)),
    "everything sampled": (
        {"method": "nuts", "chains": 2, "draws": 9, "warmup": 8, "target_accept": 0.9},
        bs.Simfluence.linear(),
        bs.NUTS(chains=2, draws=9, warmup=8, target_accept=0.9),
    ),
    "parts with numbers": (
        {"method": "svi", "kind": "additive", "prior": "student-t:5", "noise": "student-t:3",
         "exposure": "momentum:0.9", "guide": "low-rank", "steps": 7, "batch": 2},
        bs.Simfluence.additive(
            prior=bs.priors.StudentT(df=5.0, features=False),
            error=bs.noise.StudentT(df=3.0),
            exposure=bs.Exposure(momentum=0.9),
        ),
        bs.SVI(guide="low-rank", steps=7, batch=2),
    ),
    "parts without": (
        {"method": "svi", "kind": "two-timescale", "prior": "low-rank:3", "pooled": True,
         "features": False, "noise": "ar1", "loss_power": "inferred", "run_effect": True,
         "exposure": "order:3", "step_size_power": 1, "coefficients": 2, "time_effect": "linear",
         "timescales": "staying", "link": "log", "multiplicative": True},
        bs.Simfluence(
            prior=bs.priors.LowRank(rank=3, pooled=True, features=False),
            error=bs.noise.AR1(loss_power=None, run_effect=True),
            exposure=bs.Exposure(order=3, step_size_power=1.0),
            coefficients=bs.Varying(2), time_effect="linear", timescales="staying", link="log",
            terms="both",
        ),
        bs.SVI(),
    ),
    "hyperparameters sampled": (
        {"method": "exact", "hyperparameters": "nuts", "chains": 1, "times": 5,
         "exposure": "memoryless", "noise": "gaussian", "observation": True, "prior": "normal"},
        bs.Simfluence(
            exposure=bs.Exposure.memoryless(), error=bs.noise.Gaussian(observation=True)
        ),
        bs.Exact(hyperparameters="nuts", times=5, sampler=bs.NUTS(chains=1)),
    ),
    "horseshoe": (
        {"method": "nuts", "kind": "additive", "prior": "horseshoe:0.2", "seed": 3},
        bs.Simfluence.additive(prior=bs.priors.Horseshoe(share=0.2, features=False)),
        bs.NUTS(),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", sorted(CASES))
def test_words_make_model_and_method(case):
    settings, expected_model, expected_method = CASES[case]
    model, method = layered(FitConfig, settings).parts()
    assert model == expected_model
    assert method.as_dict() == expected_method.as_dict()


def replayed(config):
    """The same settings, written as YAML and read again."""
    return layered(FitConfig, yaml.safe_load(yaml.safe_dump(config.as_dict())))


@pytest.mark.parametrize("case", sorted(CASES))
def test_resolved_words_are_complete_and_repeat_the_fit(case):
    config = layered(FitConfig, CASES[case][0])
    resolved = config.resolved()
    again = replayed(resolved)
    assert again == resolved
    assert again.parts()[0] == config.parts()[0]
    assert again.parts()[1].as_dict() == config.parts()[1].as_dict()
    assert resolved.model == config.parts()[0].as_dict()
    assert not set(words.FORMS) & set(resolved.as_dict())
    # A later version's defaults change nothing of what was resolved.
    assert again.resolved() == resolved


PARTS = {
    "prior": [
        *(prior() for prior in PRIORS.values() if prior.stored),
        bs.priors.StudentT(df=7.0, pooled=True),
        bs.priors.Horseshoe(share=0.2, slab_scale=3.0, slab_df=5.0, features=False),
        bs.priors.LowRank(rank=5, pooled=True),
    ],
    "error": [
        *(error() for error in ERRORS.values()),
        bs.noise.Gaussian(loss_power=None, run_effect=True),
        bs.noise.Gaussian(observation=True),
        bs.noise.AR1(loss_power=0.5),
        bs.noise.StudentT(df=3.0),
    ],
    "exposure": [
        bs.Exposure(),
        bs.Exposure.memoryless(),
        bs.Exposure(momentum=0.9, step_size_power=1.0),
        bs.Exposure(order=3),
    ],
    "terms": ["additive", "both"],
    "scales": ["shared", "per-query"],
}


@pytest.mark.parametrize(
    ("part", "value"), [(part, value) for part, values in PARTS.items() for value in values]
)
def test_every_part_is_repeated_by_its_yaml(part, value):
    model = bs.Simfluence(**{part: value})
    assert replayed(FitConfig(method="nuts", model=model.as_dict())).parts()[0] == model


def test_what_only_python_has_is_described_and_cannot_be_made_again():
    embedded = bs.Simfluence(prior=bs.priors.Features(np.ones((3, 2)), query=np.ones((1, 2))))
    config = replayed(FitConfig(model=embedded.as_dict()))
    assert config.model["prior"]["train"] == "3 x 2"
    with pytest.raises(Misuse, match=r"model: prior: got .*'3 x 2'.*not saved; .*in Python"):
        config.parts()
    distribution = bs.Simfluence.additive(prior=dist.Laplace(0.0, 0.01))
    config = replayed(FitConfig(model=distribution.as_dict()))
    with pytest.raises(Misuse, match=r"got .*Laplace\(loc=0.0, scale=0.01\).*not saved"):
        config.parts()
    # Another prior can stand in for it.
    assert replace(config, prior="laplace").parts()[0] == bs.Simfluence.additive(
        prior=bs.priors.Laplace()
    )


def test_short_forms_overrule_the_model_part_by_part():
    model = bs.Simfluence.linear(prior=bs.priors.Laplace(), error=bs.noise.AR1(run_effect=True))
    config = FitConfig(model=model.as_dict(), loss_power=0.5, prior="student-t", pooled=True)
    assert config.parts()[0] == bs.Simfluence.linear(
        prior=bs.priors.StudentT(pooled=True), error=bs.noise.AR1(0.5, run_effect=True)
    )
    assert FitConfig(model=model.as_dict(), multiplicative=False).parts()[0] == replace(
        model, terms="additive"
    )
    assert FitConfig(model={"kind": "additive"}).parts()[0] == bs.Simfluence.additive()


def test_flat_settings_of_earlier_versions_are_read():
    before = yaml.safe_load(
        """
        method: nuts
        kind: linear
        link: identity
        timescales: staying
        prior: horseshoe:0.1
        pooled: false
        features: false
        noise: student-t:4.0
        loss_power: inferred
        run_effect: false
        exposure: momentum:0.9
        step_size_power: 0.0
        coefficients: 1
        time_effect: none
        multiplicative: true
        select: ''
        seed: 0
        """
    )
    assert layered(FitConfig, before).parts()[0] == bs.Simfluence.linear(
        prior=bs.priors.Horseshoe(share=0.1, features=False),
        error=bs.noise.StudentT(loss_power=None, df=4.0),
        exposure=bs.Exposure(momentum=0.9, step_size_power=0.0),
    )


def test_a_rate_makes_an_optimizer():
    _, method = FitConfig(method="svi", learning_rate=0.1).parts()
    assert method.optimizer is not None and FitConfig(method="svi").parts()[1].optimizer is None


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"methods": "nuts"}, "unknown names methods; expected names among method, model"),
        (
            {"method": "magic"},
            "method: got 'magic'; expected one of stack, exact, nuts, svi, ridge",
        ),
        ({"kind": "magic"}, "kind: got 'magic'"),
        ({"prior": "custom"}, r"prior: got 'custom'; expected one of normal.*in Python"),
        ({"prior": "normal:3"}, "prior: got 'normal:3'; expected normal without a number"),
        ({"prior": "low-rank:x"}, "rank: got 'x'; expected a whole number"),
        ({"prior": "horseshoe:2"}, r"Horseshoe\(share=...\): got 2.0"),
        ({"noise": "loud"}, "noise: got 'loud'; expected one of gaussian"),
        ({"noise": "ar1:3"}, "noise: got 'ar1:3'; expected ar1 without"),
        ({"run_effect": True}, "error smooth: got unknown names run_effect; expected no"),
        ({"noise": "ar1", "observation": True}, "error ar1: got unknown names observation"),
        ({"noise": "ar1", "loss_power": "some"}, "loss_power: got 'some'; expected a number"),
        ({"exposure": "order"}, "order: got ''; expected a whole number"),
        ({"exposure": "memoryless:2"}, "expected memoryless without a number"),
        ({"exposure": "momentum:2"}, r"Exposure\(momentum=...\): got 2.0"),
        ({"exposure": "momentum:high"}, "momentum: got 'high'; expected a number"),
        ({"kind": "linear", "model": {}}, "kind: got 'linear' beside a model.*expected one of"),
        ({"model": {"slope": 1}}, "setting of the model: got 'slope'; expected one of terms"),
        ({"coefficients": 0}, r"Varying\(knots=...\): got 0"),
        ({"chains": 2}, "chains: got 2 with method stack; expected method nuts or exact with"),
        ({"method": "nuts", "penalty": 1.0}, "penalty: got 1.0 with method nuts; expected method"),
        ({"validate": "0:2"}, "validate: got '0:2' with method stack"),
        ({"seed": -1}, "seed: got -1"),
    ],
)
def test_words_that_do_not_fit_are_refused(settings, match):
    with pytest.raises(Misuse, match=match):
        layered(FitConfig, settings).parts()


def test_yaml_types_are_checked():
    # 1:25 is a number of seconds to YAML.
    settings = yaml.safe_load("select: 1:25")
    with pytest.raises(Misuse, match="select: got 85; expected text"):
        layered(FitConfig, settings)
    assert layered(FitConfig, {"loss_power": "0.5"}).loss_power == 0.5
    with pytest.raises(Misuse, match="model: got 'linear'; expected settings by name"):
        layered(FitConfig, {"model": "linear"})
    assert layered(FitConfig, {"penalty": 1, "kind": None}) == FitConfig(penalty=1.0)


def test_choices_are_those_of_the_code():
    choices = {field.name: set(field.metadata["choices"]) for field in fields(FitConfig)}
    assert choices["kind"] == set(KINDS) and choices["link"] == set(LINKS)
    assert choices["timescales"] == set(TIMESCALES)
    assert choices["time_effect"] == set(TIME_EFFECTS)
    assert choices["hyperparameters"] == set(CRITERIA) and choices["guide"] == set(GUIDES)
    assert set(words.FORMS) <= set(FitConfig.names())
    # The rest are what only Python can pass.
    assert {name for name, prior in PRIORS.items() if not prior.stored} == {
        "features",
        "scores",
        "custom",
    }
    helps = {field.name: field.metadata["help"] for field in fields(FitConfig)}
    assert all(name in helps["prior"] for name, prior in PRIORS.items() if prior.stored)
    assert all(name in helps["noise"] for name in ERRORS)
    assert all(helps.values())
