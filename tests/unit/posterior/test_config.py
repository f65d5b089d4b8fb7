"""A fit in words: what the words make, what they refuse, and that resolved ones repeat it."""

from dataclasses import fields

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

SAID = {
    "nothing": ({}, bs.Simfluence(), bs.Exact()),
    "the paper's": ({"method": "ridge"}, bs.Simfluence(kind="linear"), bs.Ridge(band=True)),
    "everything sampled": (
        {"method": "nuts", "chains": 2, "draws": 9, "warmup": 8, "target_accept": 0.9},
        bs.Simfluence(kind="linear"),
        bs.NUTS(chains=2, draws=9, warmup=8, target_accept=0.9),
    ),
    "parts with numbers": (
        {"method": "svi", "kind": "additive", "prior": "student-t:5", "noise": "student-t:3",
         "exposure": "momentum:0.9", "guide": "low-rank", "steps": 7, "batch": 2},
        bs.Simfluence(
            kind="additive",
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
            multiplicative=True,
        ),
        bs.SVI(),
    ),
    "hyperparameters sampled": (
        {"hyperparameters": "nuts", "chains": 1, "times": 5, "exposure": "memoryless",
         "noise": "gaussian", "observation": True, "prior": "normal"},
        bs.Simfluence(
            exposure=bs.Exposure.memoryless(), error=bs.noise.Gaussian(observation=True)
        ),
        bs.Exact(hyperparameters="nuts", times=5, sampler=bs.NUTS(chains=1)),
    ),
    "horseshoe": (
        {"method": "nuts", "kind": "additive", "prior": "horseshoe:0.2", "seed": 3},
        bs.Simfluence(kind="additive", prior=bs.priors.Horseshoe(share=0.2, features=False)),
        bs.NUTS(),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", sorted(SAID))
def test_words_make_model_and_method(case):
    said, model, method = SAID[case]
    found = layered(FitConfig, said).parts()
    assert found[0] == model
    assert found[1].as_dict() == method.as_dict()


@pytest.mark.parametrize("case", sorted(SAID))
def test_resolved_words_are_complete_and_repeat_the_fit(case, tmp_path):
    config = layered(FitConfig, SAID[case][0])
    resolved = config.resolved()
    saved = yaml.safe_load(yaml.safe_dump(resolved.as_dict()))
    again = layered(FitConfig, saved)
    assert again == resolved
    assert again.parts()[0] == config.parts()[0]
    assert again.parts()[1].as_dict() == config.parts()[1].as_dict()
    model = {"kind", "link", "timescales", "prior", "noise", "exposure", "coefficients"}
    assert model <= set(saved)
    # A later version's defaults change nothing of what was resolved.
    assert again.resolved() == resolved


def test_a_rate_makes_an_optimizer():
    _, method = FitConfig(method="svi", learning_rate=0.1).parts()
    assert method.optimizer is not None and FitConfig(method="svi").parts()[1].optimizer is None


@pytest.mark.parametrize(
    ("said", "match"),
    [
        ({"methods": "nuts"}, "unknown names methods; expected names among method, kind"),
        ({"method": "magic"}, "method: got 'magic'; expected one of exact, nuts, svi, ridge"),
        ({"kind": "magic"}, "kind: got 'magic'"),
        ({"prior": "custom"}, r"prior: got 'custom'; expected one of normal.*in Python"),
        ({"prior": "normal:3"}, "prior: got 'normal:3'; expected normal without a number"),
        ({"prior": "low-rank:x"}, "prior: got 'x'; expected a whole number"),
        ({"prior": "horseshoe:2"}, r"Horseshoe\(share=...\): got 2.0"),
        ({"noise": "loud"}, "noise: got 'loud'; expected one of gaussian"),
        ({"noise": "ar1:3"}, "noise: got 'ar1:3'; expected ar1 without"),
        ({"run_effect": True}, "run_effect: got True with noise smooth"),
        ({"noise": "ar1", "observation": True}, "observation: got True with noise ar1"),
        ({"noise": "ar1", "loss_power": "some"}, "loss_power: got 'some'; expected a number or"),
        ({"exposure": "order"}, "exposure: got no number; expected a whole number"),
        ({"exposure": "memoryless:2"}, "expected memoryless without a number"),
        ({"exposure": "momentum:2"}, r"Exposure\(momentum=...\): got 2.0"),
        ({"coefficients": 0}, r"Varying\(knots=...\): got 0"),
        ({"chains": 2}, "chains: got 2 with method exact; expected method nuts or exact with"),
        ({"method": "nuts", "penalty": 1.0}, "penalty: got 1.0 with method nuts; expected method"),
        ({"validate": "0:2"}, "validate: got '0:2' with method exact"),
        ({"seed": -1}, "seed: got -1"),
    ],
)
def test_words_that_do_not_fit_are_refused(said, match):
    with pytest.raises(Misuse, match=match):
        layered(FitConfig, said).parts()


def test_yaml_types_are_checked():
    # 1:25 is a number of seconds to YAML.
    said = yaml.safe_load("select: 1:25")
    with pytest.raises(Misuse, match="select: got 85; expected text"):
        layered(FitConfig, said)
    assert layered(FitConfig, {"loss_power": "0.5"}).loss_power == 0.5
    assert layered(FitConfig, {"penalty": 1, "kind": None}) == FitConfig(penalty=1.0)


def test_choices_are_those_of_the_code():
    choices = {one.name: set(one.metadata["choices"]) for one in fields(FitConfig)}
    assert choices["kind"] == set(KINDS) and choices["link"] == set(LINKS)
    assert choices["timescales"] == set(TIMESCALES)
    assert choices["time_effect"] == set(TIME_EFFECTS)
    assert choices["hyperparameters"] == set(CRITERIA) and choices["guide"] == set(GUIDES)
    assert set(words.ERRORS) == set(ERRORS)
    # The rest are what only Python can pass.
    assert set(PRIORS) - set(words.NUMBER_OF_PRIOR) == {"features", "custom"}
    assert all(one.metadata["help"] for one in fields(FitConfig))
