"""The command ``bayes-simfluence``: a verb per job; JAX is imported when a job needs it.

Exit code 0 = done, 2 = misuse (a line names what was got, what is expected, what to do), 1 = the
work itself failed.
"""

import logging
import os
import sys
import warnings
from collections.abc import Callable
from typing import Annotated, Any

import typer

from bayes_simfluence.checks import Misuse, WorkFailed
from bayes_simfluence.commands.calibrate import calibrate
from bayes_simfluence.commands.compare import compare
from bayes_simfluence.commands.demo import demo
from bayes_simfluence.commands.diagnose import diagnose
from bayes_simfluence.commands.export_runs import export_runs
from bayes_simfluence.commands.fit import fit
from bayes_simfluence.commands.import_runs import import_runs
from bayes_simfluence.commands.record import record
from bayes_simfluence.commands.sbc import sbc
from bayes_simfluence.commands.simulate import simulate
from bayes_simfluence.commands.study import study
from bayes_simfluence.files import first_line

app = typer.Typer(
    name="bayes-simfluence",
    help="A posterior over simulated training runs: what would the loss have been, and how sure?",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
VERBS: dict[str, Callable[..., None]] = {
    "demo": demo,
    "record": record,
    "import": import_runs,
    "export": export_runs,
    "fit": fit,
    "diagnose": diagnose,
    "simulate": simulate,
    "compare": compare,
    "calibrate": calibrate,
    "sbc": sbc,
    "study": study,
}
for name, verb in VERBS.items():
    app.command(name)(verb)


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Options before the verb."""
    _State.debug = debug


class _State:
    debug = False


def main() -> None:
    """Run the command line; errors become one line and an exit code."""
    # Networks here are JAX: that PyTorch is absent is not news.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    warnings.showwarning = _one_line  # type: ignore[assignment]
    try:
        app()
    except (Misuse, WorkFailed) as error:
        if _State.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, Misuse) else 1)
    except Exception as error:
        if _State.debug:
            raise
        print(
            f"error: {type(error).__name__}: {first_line(error)} (--debug shows where)",
            file=sys.stderr,
        )
        sys.exit(1)


def _one_line(message: Any, category: type[Warning], *_: Any) -> None:
    print(f"{category.__name__}: {message}", file=sys.stderr)
