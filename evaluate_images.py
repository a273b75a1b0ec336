"""Says whether generated images are any good: close to real ones, not copies of them, and of help to a classifier.

    python evaluate_images.py --checkpoint results --synthetic_path synthetic
    python evaluate_images.py --checkpoint results --sweep 1 1.5 2 3

The first compares the images of a folder, the second samples at several guidance scales and compares those. Both
print a short table and keep evaluation/report.html and report.json. Running it again does only what is missing.
"""

import signal
import sys
from collections.abc import Sequence

import torch

from gait_latents.common import cli, files, hardware
from gait_latents.common.console import say
from gait_latents.common.distributed import joined
from gait_latents.common.errors import DONE, Failed
from gait_latents.common.layout import PAGE_NAME, REPORT_NAME
from gait_latents.evaluation import sweep
from gait_latents.evaluation.evaluator import evaluate
from gait_latents.evaluation.plan import make_plan
from gait_latents.images import selection
from gait_latents.settings import EvaluateSettings

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until `main` begins, Ctrl-C ends without a traceback


if __name__ == "__main__":
    cli.check_command_line(EvaluateSettings, __doc__)


@cli.command
def main(argv: Sequence[str] | None) -> int:
    """Runs the script; returns its exit code."""
    with joined() as ranks, ranks.together():
        ranks.must_be_alone("evaluate_images.py")
    try:
        plan = make_plan(argv)
        selection.refuse_to_be_a_class(plan.folder, plan.settings.data_path)
        files.check_writable(plan.folder, "output_folder")
        if plan.settings.sweep:
            sweep.sweep(plan, sweep.find_states(plan))
        else:
            evaluate(plan)
    except torch.OutOfMemoryError as error:
        raise Failed(hardware.TOO_LITTLE_MEMORY) from error
    say(f"see {plan.folder / PAGE_NAME}; all figures are in {plan.folder / REPORT_NAME}")
    return DONE


if __name__ == "__main__":
    sys.exit(main(None))
