"""Time and memory of simulating 32 curricula with 1000 draws, in a process of its own."""

import json
import subprocess
import sys

import pytest

DRAWS, CURRICULA, FITTED = 1000, 32, 25

PROGRAM = """
import json, resource, sys, time
import jax
import bayes_simfluence as bs

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

kind, draws, fitted = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
runs = bs.example_runs()
model = bs.Simfluence() if kind == "default" else getattr(bs.Simfluence, kind)()
posterior = bs.fit(runs.isel(run=slice(0, fitted)), model=model, key=jax.random.key(0))
after_fit, seconds = peak(), []
for _ in range(2):
    began = time.perf_counter()
    found = posterior.simulate(runs, key=jax.random.key(1), draws=draws)
    seconds.append(time.perf_counter() - began)
    size = found.nbytes / 2**30
    del found
sys.stdout.write(json.dumps({
    "cold_seconds": seconds[0], "warm_seconds": seconds[1], "result_gib": size,
    "peak_gib_of_fit": after_fit, "peak_gib": peak(),
}))
"""


@pytest.mark.parametrize("kind", ["default", "linear"])
def test_simulate(benchmark, kind):
    command = [sys.executable, "-c", PROGRAM, kind, str(DRAWS), str(FITTED)]
    run = benchmark.pedantic(
        lambda: subprocess.run(command, capture_output=True, text=True), rounds=1
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    rate = DRAWS / found["warm_seconds"]
    benchmark.extra_info.update(found, draws_per_second=rate)
    print(
        f"\nsimulate {DRAWS} draws x {CURRICULA} curricula, {kind}: ratio "
        f"{found['peak_gib'] / found['result_gib']:.1f} of peak memory to result (no goal), "
        f"{found['warm_seconds']:.1f} s warm ({found['cold_seconds']:.1f} s cold), "
        f"{rate:.0f} draws/s, peak {found['peak_gib']:.1f} GiB ({found['peak_gib_of_fit']:.1f} "
        f"after the fit), result {found['result_gib']:.1f} GiB",
        end="",
    )
