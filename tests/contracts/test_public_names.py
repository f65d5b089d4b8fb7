"""The public names are the documented ones, load lazily, and agree with their lists."""

import ast
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import bayes_simfluence as bs
from bayes_simfluence import conventions

DOCUMENTED = [
    "Task",
    "designs",
    "record",
    "Evaluation",
    "Placement",
    "Recorder",
    "runs_from_arrays",
    "planned_runs",
    "open_runs",
    "save_runs",
    "append_runs",
    "export_netcdf",
    "import_runs",
    "export_runs",
    "example_runs",
    "fit",
    "Simfluence",
    "Exposure",
    "Varying",
    "priors",
    "noise",
    "Exact",
    "Stack",
    "NUTS",
    "SVI",
    "Ridge",
    "Posterior",
    "load_posterior",
    "Credible",
    "Conformal",
    "persistence",
    "mean_trajectory",
    "compare",
    "Misuse",
    "WorkFailed",
    "FitFailed",
    "FitWarning",
    "SupportWarning",
    "RunsWarning",
]


def type_checking_imports():
    """Home module -> names, as the TYPE_CHECKING block tells type checkers."""
    body = ast.parse(Path(bs.__file__).read_text("utf-8")).body
    (block,) = [one for one in body if isinstance(one, ast.If)]
    return {
        one.module.removeprefix("bayes_simfluence."): tuple(name.name for name in one.names)
        for one in block.body
        if isinstance(one, ast.ImportFrom)
    }


def axes_of(docstring):
    """Axis words of ``conventions``' table: the first column, at ``chain``, ``draw`` both."""
    table = docstring.split("| word | meaning |")[1].split("\n\n")[0]
    return set(re.findall(r"^\| (``.*?) +\|", table, flags=re.MULTILINE)), table


def test_public_names_are_the_documented_ones():
    assert bs.__all__ == DOCUMENTED


def test_lists_of_names_agree():
    told = type_checking_imports()
    rooms = {name: f"{row}.{name}" for row in ("data", "model") for name in told.pop(row)}
    assert told == bs._HOME
    assert rooms == bs._ROOMS
    homes = [name for names in bs._HOME.values() for name in names]
    assert sorted([*homes, *rooms]) == sorted(bs.__all__)
    assert len(set(homes)) == len(homes)


@pytest.mark.parametrize("name", bs._ROOMS)
def test_a_room_is_a_module_whose_names_are_there_and_documented(name):
    room = getattr(bs, name)
    assert room.__name__ == f"bayes_simfluence.{bs._ROOMS[name]}"
    assert inspect.getdoc(room)
    for one in room.__all__:
        found = getattr(room, one)
        assert not inspect.isclass(found) or inspect.getdoc(found), one


@pytest.mark.parametrize("name", [one for one in DOCUMENTED if one not in bs._ROOMS])
def test_a_public_name_is_there_and_documented(name):
    found = getattr(bs, name)
    assert name in dir(bs)
    assert found.__module__ == f"bayes_simfluence.{bs._MODULE_OF[name]}"
    assert inspect.getdoc(found)
    own = found.__doc__ or ""
    assert own.strip() and not own.startswith(f"{name}("), "a docstring of its own"


@pytest.mark.parametrize("home", bs._HOME)
def test_a_home_has_its_public_names(home):
    module = importlib.import_module(f"bayes_simfluence.{home}")
    assert set(bs._HOME[home]) <= set(vars(module))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'bayes_simfluence' has no attribute 'nonsense'"):
        bs.nonsense  # noqa: B018
    assert not hasattr(bs, "nonsense")


def test_importing_loads_neither_jax_nor_anything_else_that_is_slow():
    program = (
        "import sys, bayes_simfluence as bs\n"
        "assert dir(bs) and bs.__all__\n"
        "slow = ['jax', 'numpy', 'xarray', 'zarr', 'transformers', 'matplotlib', 'scipy']\n"
        "sys.exit(', '.join(one for one in slow if one in sys.modules) or 0)"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")


def test_axes_of_the_variables_are_the_words_of_the_table():
    rows, table = axes_of(conventions.__doc__)
    words = {word for row in rows for word in re.findall(r"``(\w+)``", row)}
    assert words == {"run", "step", "time", "train", "query", "chain", "draw"}
    used = {dim for dims, _ in conventions.VARIABLES.values() for dim in dims}
    assert used - words == {"slot", "feature"}
    for name, (dims, _) in conventions.VARIABLES.items():
        for said in re.findall(rf"``{name}\[(.*?)\]``", table):
            assert tuple(said.split(", ")) == dims
    assert "``batch[run, step, slot]``" in table and "``loss[run, time, query]``" in table


def test_schema_lists_agree():
    assert set(conventions.OPTIONAL) < set(conventions.VARIABLES)
    assert conventions.VARIABLES["batch"][1]["empty_slot"] == conventions.EMPTY_SLOT
    status = conventions.VARIABLES["status"][1]
    flags = dict(zip(status["flag_meanings"].split(), status["flag_values"], strict=True))
    assert flags == {
        "unrecorded": conventions.UNRECORDED,
        "complete": conventions.COMPLETE,
        "diverged": conventions.DIVERGED,
    }
    for name, (_, attrs) in conventions.VARIABLES.items():
        assert attrs["long_name"], name
