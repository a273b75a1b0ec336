"""Says whether generated images are any good: close to real ones, not copies of them, and of help to a classifier.

    python evaluate_images.py --checkpoint results --synthetic_path synthetic
    python evaluate_images.py --checkpoint results --sweep 1 1.5 2 3
    python evaluate_images.py --combine evaluation evaluation_2

The first compares the images of a folder, the second samples at several guidance scales and compares those. Both
print a short table and keep evaluation/report.html and report.json. Running it again does only what is missing.
The third prints one table of the classifiers of several evaluations.
"""

import signal
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until `main` begins, Ctrl-C ends without a traceback
sys.path.append(str(Path(__file__).resolve().parent))  # which python -I and PYTHONSAFEPATH=1 leave out

from gait_latents.common.script import imports, run_script
from gait_latents.settings import EvaluateSettings


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit code."""
    return run_script(EvaluateSettings, argv, __doc__, evaluate)


def evaluate(argv: Sequence[str] | None) -> int:
    """Settings, images, figures, report: the whole way of an evaluation."""
    with imports():
        from gait_latents.common import cli
        from gait_latents.common.console import say
        from gait_latents.common.distributed import join_ranks
        from gait_latents.common.errors import DONE, UserError
        from gait_latents.common.hardware import plain_memory_error
        from gait_latents.common.layout import PAGE_NAME, REPORT_NAME
        from gait_latents.evaluation import combined, evaluator, sweep
        from gait_latents.evaluation.plan import make_plan

    with join_ranks() as ranks, ranks.together():
        ranks.must_be_alone("evaluate_images.py")
    layers = cli.Layers(EvaluateSettings, argv, description=__doc__)
    if layers.gives("combine"):
        if layers.settings.sweep or not layers.settings.combine:
            raise UserError("--combine needs folders of earlier evaluations, and no --sweep beside it")
        say(combined.combine(layers.settings.combine))
        return DONE
    with plain_memory_error():
        # Settings: flags, --config, the run, defaults. Images: those of the run's split, by their latents.
        plan = make_plan(argv, __doc__)

        # Figures: distances, copies, classifiers; each part is kept in the report as soon as it is there.
        if plan.settings.sweep:
            sweep.sweep(plan, sweep.find_states(plan))
        else:
            evaluator.evaluate(plan)
    say(f"see {plan.folder / PAGE_NAME}; all figures are in {plan.folder / REPORT_NAME}")
    return DONE


if __name__ == "__main__":
    sys.exit(main())
