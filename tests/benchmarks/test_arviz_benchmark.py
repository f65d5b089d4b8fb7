"""Time and memory of az.loo on 2400 transitions x 50 queries, in a process of its own."""

import json
import subprocess
import sys

import pytest

FITTED, GOAL_GIB = 25, 4.0

PROGRAM = """
import json, resource, sys, time, warnings
import jax
import arviz
import bayes_simfluence as bs

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

kind, draws, fitted = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
runs = bs.example_runs().isel(run=slice(0, fitted))
model = bs.Simfluence() if kind == "default" else getattr(bs.Simfluence, kind)()
posterior = bs.fit(runs, model=model, key=jax.random.key(0))
after_fit, began = peak(), time.perf_counter()
idata = posterior.to_arviz(draws=draws)
density = idata["log_likelihood"]["loss"]
made, container = time.perf_counter() - began, peak()
warnings.simplefilter("ignore")
began = time.perf_counter()
found = arviz.loo(idata)
sys.stdout.write(json.dumps({
    "container_seconds": made, "loo_seconds": time.perf_counter() - began,
    "peak_gib_of_fit": after_fit, "peak_gib_of_container": container, "peak_gib": peak(),
    "points": int(density.sizes["run"] * density.sizes["time"]), "queries": density.sizes["query"],
    "log_likelihood_gib": density.nbytes / 2**30, "version": arviz.__version__,
}))
"""


@pytest.mark.parametrize(("kind", "draws"), [("linear", 1000), ("default", 1000)])
def test_loo(benchmark, kind, draws):
    command = [sys.executable, "-c", PROGRAM, kind, str(draws), str(FITTED)]
    run = benchmark.pedantic(
        lambda: subprocess.run(command, capture_output=True, text=True), rounds=1
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    benchmark.extra_info.update(found)
    print(
        f"\naz.loo {found['version']} of {found['points']} losses x {found['queries']} queries x "
        f"{draws} draws, {kind}: peak {found['peak_gib']:.1f} GiB (goal <= {GOAL_GIB:.0f}; "
        f"{found['peak_gib_of_fit']:.1f} after the fit, {found['peak_gib_of_container']:.1f} after "
        f"to_arviz), log likelihood {found['log_likelihood_gib']:.2f} GiB, to_arviz "
        f"{found['container_seconds']:.0f} s, az.loo {found['loo_seconds']:.0f} s",
        end="",
    )
    assert found["peak_gib"] <= GOAL_GIB
