"""The map of the package is true: who may import whom, and what no module does."""

import ast
from pathlib import Path

import pytest

import bayes_simfluence

ROOT = Path(bayes_simfluence.__file__).parent
PACKAGE = "bayes_simfluence"

ROWS = {
    "": [
        "conventions",
        "checks",
        "progress",
        "files",
        "linalg",
        "settings",
    ],
    "data": [
        "curriculum",
        "sides",
        "rearranged",
        "designs",
        "netcdf",
        "weights",
        "training",
        "starts",
        "twins",
        "identify",
        "claims",
        "tabular",
        "columns",
        "metrics",
        "validation",
        "runs",
        "subsets",
        "store",
        "longform",
        "gptdynamics",
        "tables",
        "importers",
    ],
    "networks": [
        "tensor_files",
        "requirements",
        "rotary",
        "layers",
        "network",
        "bert",
        "gpt2",
        "gpt_neox",
        "t5",
        "llama",
        "families",
        "checkpoint",
        "heads",
        "saving",
    ],
    "tuning": [
        "layers",
        "base",
        "lora",
        "ia3",
        "tunings",
        "peft_format",
    ],
    "tasks": [
        "task",
        "rows",
        "templates",
        "tokens",
        "completions",
        "likelihood",
        "measures",
        "generation",
        "tuned",
        "classification",
        "choice",
        "causal",
        "seq2seq",
    ],
    "recording": [
        "batches",
        "features",
        "starts",
        "checkpoints",
        "recorded_run",
        "recorder",
        "settings",
        "plan",
        "processes",
        "measure",
        "compiled",
        "step_sizes",
        "parallel",
        "stored",
        "train",
        "record",
        "config",
        "from_config",
        "session",
    ],
    "model": [
        "hyper",
        "sites",
        "exposure",
        "coefficients",
        "link",
        "kalman",
        "recurrence",
        "noise",
        "arrays",
        "coupling",
        "effects",
        "embeddings",
        "normal",
        "scores",
        "priors",
        "simfluence",
        "design",
        "mean_function",
        "numpyro_model",
    ],
    "gaussian": [
        "density",
        "linear_gaussian",
        "observed",
        "queries",
        "nested",
        "trust",
        "draws",
        "designs",
        "fitted",
        "examples",
        "rollout",
        "search",
        "dense",
    ],
    "simulators": [
        "unrolled",
        "base",
        "mean",
        "scenarios",
        "sampled",
        "prior",
        "gaussian",
        "pooled",
        "affine",
    ],
    "inference": [
        "verdict",
        "method",
        "diagnostics",
        "evidence",
        "regression",
        "ridge",
        "numpyro_runs",
        "unfitted",
        "compiled",
        "dispersion",
        "nuts",
        "svi",
        "collapsed",
        "exact",
        "stack",
    ],
    "posterior": [
        "bands",
        "conformal",
        "arviz",
        "arrays",
        "courses",
        "departures",
        "support",
        "widening",
        "observed",
        "unseen",
        "prior",
        "posterior",
        "fit",
        "config",
    ],
    "counterfactual": [
        "edits",
    ],
    "attribution": [
        "gradients.checkpoints",
        "simple",
        "scores",
        "score_files",
        "datamodel",
        "simulators",
        "gradients.per_example",
        "adam",
        "trak",
        "gradients.trace",
        "gradients.linear_layers",
        "gradients.factors",
        "gradients.layerwise",
        "tracin",
        "influence.curvature",
        "influence.gram",
        "influence.problem",
        "influence.solvers",
        "influence.gram_solver",
        "influence.ekfac",
        "influence.iterative",
        "influence.influence_functions",
    ],
    "evaluation": [
        "metrics",
        "ranks",
        "synthetic",
        "floor",
        "variance",
        "compare",
        "calibration",
        "lds",
        "mislabel",
        "leave_one_run_out",
    ],
    "report": [
        "tables",
        "plots",
        "diagnose",
        "attribution",
    ],
    "study": [
        "config",
        "jobs",
        "methods",
        "cell",
        "stages",
        "headline",
        "report",
        "run",
    ],
}
"""Folder -> its modules; a module imports only from rows above, or from before it in its row."""

DEMO = "demo"
"""A folder after all rows whose modules import one another freely."""
VERBS = [
    "record",
    "import_runs",
    "export_runs",
    "fit",
    "simulate",
    "compare",
    "diagnose",
    "calibrate",
    "sbc",
    "study",
    "demo",
]
LAST = ["commands.options", *(f"commands.{one}" for one in VERBS), "cli", "__main__"]
ROOT_MODULE = f"{PACKAGE}.__init__"
"""``import bayes_simfluence as bs``: stands after the rows, since it re-exports them lazily."""

FORBIDDEN_BETWEEN = {"model": ("networks", "tuning", "tasks", "recording")}
"""Folder -> folders above it that it must know nothing of."""

TALKERS = (DEMO, "commands", "cli", "__main__")
"""What may ``print``."""


def places():
    """Module -> (row, place in the row)."""
    rows = [[".".join(filter(None, (folder, one))) for one in row] for folder, row in ROWS.items()]
    demos = [name for name in modules() if name.split(".")[0] == DEMO]
    found = {one: (level, at) for level, row in enumerate(rows) for at, one in enumerate(row)}
    found["__init__"] = (len(rows), 0)
    found.update({one: (len(rows) + 1, 0) for one in demos})
    return {**found, **{one: (len(rows) + 2, at) for at, one in enumerate(LAST)}}


def modules():
    """Dotted name within the package -> source, of every module that is not a folder's init."""
    files = sorted(ROOT.rglob("*.py"))
    named = {".".join(one.relative_to(ROOT).with_suffix("").parts): one for one in files}
    return {name: one.read_text("utf-8") for name, one in named.items() if "__init__" not in name}


def imported(module, source, known):
    """Every module of the package that ``source`` imports, wherever the import stands."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [one.name for one in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = f"{PACKAGE}.{module}".split(".")[: -node.level]
                base = ".".join([*parents, *filter(None, [base])])
            deeper = [f"{base}.{one.name}" for one in node.names]
            found += [one if inside(one) in known else base for one in deeper]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            found += [one.value for one in node.args if isinstance(one, ast.Constant)]
    ours = [one for one in found if one == PACKAGE or one.startswith(f"{PACKAGE}.")]
    return sorted({inside(one) for one in ours})


def inside(name):
    return name.removeprefix(PACKAGE).removeprefix(".") or "__init__"


def wrong_imports(module, source):
    """One sentence for each import that the rows do not allow."""
    known = places()
    row, at = known[module]
    folder = module.split(".")[0]
    said = []
    for target in imported(module, source, known):
        if target not in known:
            said.append(f"{module} imports {target}, which is no module in the rows")
            continue
        target_row, target_at = known[target]
        free = folder == DEMO and target.split(".")[0] == DEMO
        if not free and not (target_row < row or (target_row == row and target_at < at)):
            said.append(f"{module} imports {target}, which does not stand before it in the rows")
        if target.split(".")[0] in FORBIDDEN_BETWEEN.get(folder, ()):
            said.append(f"{module} imports {target}, which {folder} must not know of")
    return said


def habits(module, source):
    """One sentence for each thing in ``source`` that no module of the package does."""
    said = []
    for node in ast.walk(ast.parse(source)):
        text = ast.unparse(node) if isinstance(node, ast.Attribute | ast.Call) else ""
        names = imported_names(node)
        found = {
            "asserts; raise Misuse for what a user gives": isinstance(node, ast.Assert),
            "imports pickle; files are data, never code": any(
                one.split(".")[0] in ("pickle", "cloudpickle", "dill") for one in names
            ),
            "touches jax.config, which is the user's": "jax.config" in (*names, text),
            "prints; log, or take a progress": text.startswith("print(")
            and module.split(".")[0] not in TALKERS,
        }
        if isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "allow_pickle"):
            found[f"sets {node.arg}; only False is allowed"] = ast.unparse(node.value) != "False"
        said += [f"{module}:{node.lineno} {what}" for what, is_so in found.items() if is_so]
    return said


def imported_names(node):
    """``a.b`` for each name that an import statement takes."""
    if isinstance(node, ast.Import):
        return [one.name for one in node.names]
    if isinstance(node, ast.ImportFrom):
        return [f"{node.module}.{one.name}" for one in node.names]
    return []


@pytest.mark.parametrize("module", modules())
def test_imports_point_upwards(module):
    if module not in places():
        pytest.fail(
            f"{module} stands in no row: add it to ROWS in {Path(__file__).name} after everything "
            "it imports and before everything that imports it, and to the map in the docs"
        )
    assert wrong_imports(module, modules()[module]) == []


@pytest.mark.parametrize("module", modules())
def test_habits_are_kept(module):
    assert habits(module, modules()[module]) == []


def test_every_module_of_the_rows_exists():
    gone = sorted(set(places()) - set(modules()) - {"__init__"})
    assert gone == [], f"remove them from ROWS in {Path(__file__).name}, or write them"


def test_folders_have_empty_inits():
    """Only the root re-exports; anything else would be an import that the rows do not see."""
    for path in sorted(ROOT.rglob("__init__.py")):
        if path.parent != ROOT:
            body = ast.parse(path.read_text("utf-8")).body
            assert all(isinstance(one, ast.Expr) for one in body), path


def test_the_root_imports_nothing_of_the_package_when_it_is_imported():
    body = ast.parse((ROOT / "__init__.py").read_text("utf-8")).body
    direct = [one for one in body if isinstance(one, ast.Import | ast.ImportFrom)]
    assert {getattr(one, "module", None) for one in direct} == {"importlib", "typing"}


@pytest.mark.parametrize(
    ("module", "source", "match"),
    [
        ("model.noise", "from bayes_simfluence.posterior.fit import fit", "stand before"),
        ("model.noise", "def f():\n    import bayes_simfluence.posterior.fit", "stand before"),
        ("model.noise", "from bayes_simfluence.posterior import fit", "posterior.fit"),
        ("model.noise", "from ..posterior.fit import fit", "posterior.fit"),
        ("model.noise", "from . import simfluence", "model.simfluence"),
        ("model.hyper", "from bayes_simfluence.model.noise import x", "stand before"),
        ("model.hyper", "from bayes_simfluence.networks import bert", "must not know"),
        ("model.hyper", "from bayes_simfluence.tasks.task import Task", "must not know"),
        ("model.hyper", "import bayes_simfluence as bs", "__init__"),
        ("model.hyper", "from bayes_simfluence import fit", "__init__"),
        ("model.hyper", "from bayes_simfluence.nowhere import x", "no module"),
        ("data.runs", "import_module('bayes_simfluence.cli')", "imports cli"),
        ("checks", "if TYPE_CHECKING:\n    from bayes_simfluence.files import x", "stand before"),
    ],
)
def test_a_planted_import_is_caught(module, source, match):
    said = wrong_imports(module, source)
    assert len(said) == 1
    assert match in said[0]


def test_allowed_imports_are_allowed():
    source = (
        "from bayes_simfluence.checks import Misuse\n"
        "from bayes_simfluence.model import priors\n"
        "from bayes_simfluence.model.hyper import Hyper\n"
        "import numpy as np, jax.numpy as jnp\n"
    )
    assert wrong_imports("model.simfluence", source) == []
    assert wrong_imports("cli", "import bayes_simfluence as bs") == []


@pytest.mark.parametrize(
    ("source", "match"),
    [
        ("print('x')", "prints"),
        ("def f(x):\n    assert x", "asserts"),
        ("import pickle", "pickle"),
        ("from pickle import loads", "pickle"),
        ("np.load(path, allow_pickle=True)", "allow_pickle"),
        ("load(x, trust_remote_code=True)", "trust_remote_code"),
        ("load(x, trust_remote_code=trusted)", "trust_remote_code"),
        ("import jax\njax.config.update('jax_enable_x64', True)", r"jax.config"),
        ("from jax import config", "jax.config"),
    ],
)
def test_a_planted_habit_is_caught(source, match):
    said = habits("data.runs", source)
    assert said
    assert all(match in one for one in said)


def test_allowed_habits_are_allowed():
    assert habits("cli", "print('x')") == []
    assert habits("commands.fit", "print('x')") == []
    assert habits("demo.show", "print('x')") == []
    assert habits("data.runs", "load(x, trust_remote_code=False)\nblueprint()") == []
