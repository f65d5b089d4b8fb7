"""A run is recorded by one process at a time; the claims of the dead are nobody's."""

import json
import os
import socket
import subprocess
import sys

import pytest

from bayes_simfluence.checks import Misuse, WorkFailed
from bayes_simfluence.data.claims import claimed


def claim_of(folder, **owner):
    folder.mkdir()
    (folder / "3").write_text(json.dumps(owner))


def test_claims_are_held_released_and_leave_nothing(tmp_path):
    with claimed(tmp_path, [1, 3]) as claims:
        assert sorted(file.name for file in (tmp_path / "claims").iterdir()) == ["1", "3"]
        claims.release(1)
        claims.release(1)
        assert [file.name for file in (tmp_path / "claims").iterdir()] == ["3"]
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_a_living_process_records_is_refused(tmp_path):
    message = rf"run 3: got recorded right now by process {os.getpid()} of .*only="
    with claimed(tmp_path, [3]) as claims:
        with pytest.raises(Misuse, match=message), claimed(tmp_path, [2, 3]):
            pass
        assert [file.name for file in (tmp_path / "claims").iterdir()] == ["3"], "none or all"
        claims.release(3)
        with claimed(tmp_path, [3]):
            pass


def test_the_claim_of_a_dead_process_is_taken_over(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    claim_of(tmp_path / "claims", host=socket.gethostname(), pid=gone.pid, born="1")
    with claimed(tmp_path, [3]):
        owner = json.loads((tmp_path / "claims" / "3").read_text())
        assert owner["pid"] == os.getpid()


def test_claims_of_the_dead_are_swept_by_whoever_comes_next(tmp_path):
    """A process killed between writing its last run and releasing it leaves a claim on it."""
    claim_of(tmp_path / "claims", host=socket.gethostname(), pid=os.getpid(), born="before")
    with claimed(tmp_path, []):
        assert (tmp_path / "claims" / "3").exists()
    assert list(tmp_path.iterdir()) == []
    claim_of(tmp_path / "claims", host="elsewhere", pid=1, born="1")
    with claimed(tmp_path, []):
        pass
    assert (tmp_path / "claims" / "3").exists(), "it may live"


def test_a_number_given_to_another_process_is_no_owner(tmp_path):
    claim_of(tmp_path / "claims", host=socket.gethostname(), pid=os.getpid(), born="before")
    with claimed(tmp_path, [3]):
        pass


def test_a_claim_whose_writer_was_killed_is_taken_over(tmp_path):
    (tmp_path / "claims").mkdir()
    (tmp_path / "claims" / "3").write_text("")
    with claimed(tmp_path, [3]):
        pass


def test_a_claim_of_another_host_stands(tmp_path):
    claim_of(tmp_path / "claims", host="elsewhere", pid=1, born="1")
    message = r"process 1 of elsewhere.*remove .*claims/3"
    with pytest.raises(Misuse, match=message), claimed(tmp_path, [3]):
        pass


def test_claims_that_cannot_be_written_are_work_that_failed(tmp_path):
    (tmp_path / "claims").write_text("a file")
    with pytest.raises(WorkFailed, match="could not be claimed"), claimed(tmp_path, [3]):
        pass


def test_many_processes_at_once_share_the_runs_out(tmp_path):
    """Each of eight processes tries each of 20 runs: every run has one owner."""
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from bayes_simfluence.checks import Misuse\n"
        "from bayes_simfluence.data.claims import Claims\n"
        "claims, got = Claims(Path(sys.argv[1]) / 'claims'), []\n"
        "sys.stdin.readline()\n"
        "for run in range(20):\n"
        "    try:\n"
        "        claims.take(run)\n"
        "        got.append(run)\n"
        "    except Misuse:\n"
        "        pass\n"
        "print(*got, flush=True)\n"
        "sys.stdin.readline()\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    workers = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(8)
    ]
    (tmp_path / "claims").mkdir()
    (tmp_path / "claims" / "7").write_text("")
    for worker in workers:
        worker.stdin.write("\n")
        worker.stdin.flush()
    got = [worker.stdout.readline().split() for worker in workers]
    for worker in workers:
        worker.communicate("\n")
    assert sorted(int(run) for some in got for run in some) == list(range(20))
