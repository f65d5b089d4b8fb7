"""Work done once: results, costs, failures, what is done again."""

import time

import numpy as np

from bayes_simfluence.study.jobs import outcome_of, run_job


def test_work_is_done_once_and_what_it_took_is_kept(tmp_path):
    path, done = tmp_path / "deep" / "one.nc", []

    def work():
        done.append(np.ones(20_000_000).sum())
        time.sleep(0.15)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")

    assert outcome_of(path) is None
    first = run_job(path, work)
    assert first.seconds >= 0.15 and not first.failed
    if first.peak_bytes is not None:
        assert first.peak_bytes >= first.start_bytes > 10_000_000
    assert run_job(path, work) == first == outcome_of(path) and len(done) == 1
    path.unlink()
    assert outcome_of(path) is None, "a result that was removed"
    run_job(path, work)
    assert len(done) == 2


def test_memory_is_seen_while_the_work_holds_it(tmp_path):
    path = tmp_path / "one.nc"

    def work():
        held = np.ones(25_000_000)
        time.sleep(0.2)
        path.write_text(str(held[0]))

    outcome = run_job(path, work)
    if outcome.peak_bytes is not None:
        assert outcome.peak_bytes - outcome.start_bytes > 150_000_000


def test_a_failure_is_kept_until_it_is_done_again(tmp_path):
    path, tried = tmp_path / "one.nc", []

    def work():
        tried.append(1)
        if len(tried) < 2:
            raise RuntimeError("out of memory\nmore")
        path.write_text("x")

    assert run_job(path, work).failed == "out of memory"
    assert run_job(path, work).failed == "out of memory" and len(tried) == 1
    assert run_job(path, work, retry=True).failed == "" and len(tried) == 2
    assert outcome_of(path).failed == ""
