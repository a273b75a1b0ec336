"""Shows in some minutes what a GPU gives: whether all is true on it, how fast it is, and what a whole job takes.

    python benchmarks/bench_gpu.py --minutes 9

It needs no data and no network: VAE, images and latents are random. Each stage (`gpu_stages.py`) is a process with its
share of the time. One that fails or takes too long leaves what it has measured and its last line, and the rest go on.
After each stage the report, gpu_report.md and gpu_report.json, is written anew.
"""

import argparse
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import date
from pathlib import Path
from typing import Any

import gpu_stages
from gpu_stages import COMPILED, DRAWS, EAGER, PEAK_GB, SPEED, STEP_MS, USERS_LOOP, USERS_SCRIPT

SECONDS = {  # what a stage takes on a T4; shares of the time are in proportion
    "facts": 15,
    "micro": 45,
    "truth": 60,
    "encode": 110,
    "train": 190,
    "generate": 50,
    "two GPUs": 60,
}
_SECONDS_TO_SAY_NO = 12  # that the stage on two GPUs takes where there is one
_RESERVE_SECONDS = 15.0  # for the starts and ends around the stages
_PATIENCE_SECONDS = 3.0  # within which what is told to end must
_NUM_WINDOWS = 5
JOB_IMAGES, JOB_CLASSES = 1550, 31
TFLOP_PER_IMAGE = 0.218  # of the encoder at 256x256 (RESULTS.md)
SMALL = "**Tiny sizes: this shows that it works and measures nothing.**"
Rows = dict[str, dict[str, Any]]  # a table: name of the row -> figures by head


def main() -> None:
    """Runs the stages and writes the report."""
    arguments = read_arguments()
    import torch

    if not arguments.small and not torch.cuda.is_available():
        raise SystemExit("error: torch sees no GPU; --small shows on a CPU that it works, and measures nothing")
    report = {"benchmark": "bench_gpu", "date": str(date.today()), "small": arguments.small, "stages": {}}
    arguments.output_folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, gpu_stages.__file__, *["--small"] * arguments.small]
    run_stages(report, arguments.only, command, 60 * arguments.minutes - _RESERVE_SECONDS, arguments.output_folder)
    print(verdict_text(report))
    print(f"written: {arguments.output_folder / 'gpu_report.md'} and gpu_report.json")


def read_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line, or these words."""
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="how long all stages may take together; 9 is enough")
    parser.add_argument("--output_folder", type=Path, default=Path(), help="where the report goes")
    parser.add_argument("--only", nargs="+", choices=SECONDS, default=list(SECONDS), help="the stages to run")
    parser.add_argument("--small", action="store_true", help="tiny sizes, on a CPU too: measures nothing")
    arguments = parser.parse_args(argv)
    if not 0.5 <= arguments.minutes < math.inf:
        parser.error("--minutes is at least 0.5")
    return arguments


# --- running -----------------------------------------------------------------------------------------------


def run_stages(
    report: dict[str, Any], names: Sequence[str], command: Sequence[str], seconds: float, folder: Path
) -> None:
    """Runs stages one after the other, and writes the report after each.

    Args:
        report: gets the results under "stages", and the "verdict".
        names: of the stages.
        command: starts a stage, when its name, --seconds and --folder are added.
        seconds: how long all may take.
        folder: where the report goes; what a stage writes besides is removed.
    """
    deadline = time.monotonic() + seconds
    for i, name in enumerate(names):
        share = share_of(name, names[i:], deadline - time.monotonic(), report)
        print(f"{name}: at most {share:.0f} s", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix="bench_gpu-", ignore_cleanup_errors=True) as scratch:
            words = [name, "--seconds", f"{share:.1f}", "--folder", str(Path(scratch).absolute())]
            # What a killed compiler leaves half written must not be where the next training looks.
            environment = {"TORCHINDUCTOR_CACHE_DIR": f"{scratch}/inductor", "TRITON_CACHE_DIR": f"{scratch}/triton"}
            report["stages"][name] = run_stage([*command, *words], share, environment)
        report["verdict"] = {"minutes": job_minutes(report), "targets": targets(report)}
        publish(report, folder)
        print(stage_text(name, report["stages"][name]), flush=True)


def share_of(name: str, left: Sequence[str], seconds: float, report: Mapping[str, Any]) -> float:
    """Returns the part of the seconds that are left which a stage may take; `left` are the stages still to run."""
    weights = dict(SECONDS)
    if figure(report, "facts", "GPUs", "value") == 1:
        weights["two GPUs"] = _SECONDS_TO_SAY_NO
    return max(1.0, seconds) * weights[name] / sum(weights[other] for other in left)


def run_stage(command: Sequence[str], seconds: float, environment: Mapping[str, str]) -> dict[str, Any]:
    """Runs a stage, and ends it with all its processes when the time is up.

    Args:
        command: what starts it.
        seconds: how long it may take.
        environment: variables that it gets besides those of this process.

    Returns:
        Its state ("done", "failed" or "out of time"), the seconds, the rows that it handed in, and where it is not done
        what it was doing and its last line.
    """
    with tempfile.TemporaryFile() as rows, tempfile.TemporaryFile() as said:
        started = time.monotonic()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=rows,
            stderr=said,
            env={**os.environ, **environment},
            start_new_session=True,  # a group of its own, which can be ended as a whole
        )
        try:
            state = "failed" if process.wait(seconds) else "done"
        except subprocess.TimeoutExpired:
            state = "out of time"
        finally:
            end_group(process)
        taken = round(time.monotonic() - started, 1)
        rows.seek(0)
        said.seek(0)
        last = {} if state == "done" else last_words(said.read().decode(errors="replace"))
        return {"state": state, "seconds": taken, **last, "rows": read_rows(rows.read().decode(errors="replace"))}


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Ends a process and those that it has started: asks first, so that torchrun can end its own."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + _PATIENCE_SECONDS
        with suppress(ProcessLookupError):  # all have ended
            os.killpg(process.pid, number)
            while time.monotonic() < deadline:
                process.poll()
                os.killpg(process.pid, 0)
                time.sleep(0.05)
            continue
        break
    process.wait()


def last_words(text: str) -> dict[str, str]:
    """Returns, of what a stage wrote to standard error, what it was doing at last and its last line."""
    lines = [line.strip()[:300] for line in text.splitlines() if line.strip()] or ["it said nothing"]
    doing = [line.removeprefix(gpu_stages.DOING) for line in lines if line.startswith(gpu_stages.DOING)]
    return {"doing": doing[-1] if doing else "starting", "last_line": lines[-1]}


def read_rows(text: str) -> Rows:
    """Reads the rows that a stage has handed in; other lines, and one that was cut off, are left out."""
    rows: Rows = {}
    for line in text.splitlines():
        with suppress(ValueError, KeyError, TypeError):
            row = json.loads(line)
            rows[row.pop("name")] = row
    return rows


def publish(report: Mapping[str, Any], folder: Path) -> None:
    """Writes both files of the report, each whole."""
    from gait_latents.common import files

    files.publish(folder / "gpu_report.json", (json.dumps(report, indent=1) + "\n").encode())
    files.publish(folder / "gpu_report.md", report_text(report).encode())


# --- verdict -----------------------------------------------------------------------------------------------


def figure(report: Mapping[str, Any], stage: str, row: str, head: str) -> Any:
    """Returns a figure of a stage, the median of several; None where it was not measured."""
    value = report["stages"].get(stage, {}).get("rows", {}).get(row, {}).get(head)
    return value["median"] if isinstance(value, dict) else value


def job_minutes(report: Mapping[str, Any]) -> Rows:
    """Extrapolates from the stages how many minutes a whole job takes, with the default settings and as users do it."""
    from gait_latents.settings import TrainSettings
    from gait_latents.training.plan import num_steps

    steps = num_steps(TrainSettings(), JOB_IMAGES)
    usual, reduced = (
        figure(report, "facts", name, "value") for name in (gpu_stages.NETWORK_FORMAT, gpu_stages.REDUCED_FORMAT)
    )

    def encoding(row: str) -> float | None:
        speed = figure(report, "encode", row, gpu_stages.IMAGES_PER_SECOND)
        return speed and JOB_IMAGES / speed / 60

    def training(row: str) -> float | None:
        step, first = (figure(report, "train", row, head) for head in (STEP_MS, gpu_stages.COMPILE_SECONDS))
        return step and (steps * step / 1e3 + (first or 0.0)) / 60

    def generating() -> float | None:
        from gait_latents.vae.decoder import AS_GOOD_DB

        quality = figure(report, "generate", f"{gpu_stages.DECODE}, {usual}", gpu_stages.PSNR)
        decoded = usual if quality is None or quality >= AS_GOOD_DB else "float32"  # as generate.py decides
        made = (f"{gpu_stages.SAMPLE}, {usual}", f"{gpu_stages.DECODE}, {decoded}")
        names = (*made, gpu_stages.JPEG, gpu_stages.PUBLISH)
        parts = [figure(report, "generate", name, gpu_stages.IMAGE_MS) for name in names]
        if None in parts:
            return None
        sample, decode, jpeg, write = parts
        return JOB_IMAGES * max(sample + decode, jpeg + write) / 60e3  # a thread writes while the next are made

    ours = [encoding("ours, float32"), training(COMPILED) or training(EAGER), generating()]
    measured = [minutes for minutes in ours if minutes is not None]
    whole = sum(measured) if len(measured) == len(ours) else None
    theirs = [encoding(USERS_SCRIPT), training(USERS_LOOP)]
    heads = ("minutes, ours", "minutes, users' way")
    return {
        f"encode {JOB_IMAGES:,} images": dict(zip(heads, (ours[0], theirs[0]), strict=True)),
        f"(encode with --encode_precision {reduced})": {heads[0]: encoding(f"ours, {reduced}")},
        f"train {steps:,} steps": dict(zip(heads, (ours[1], theirs[1]), strict=True)),
        f"generate {JOB_IMAGES:,} images": {heads[0]: ours[2]},
        "whole job": {heads[0]: whole},
    }


def targets(report: Mapping[str, Any]) -> Rows:
    """Says of each target whether it is met, missed or not measured."""
    card = str(figure(report, "facts", "gpu", "value"))
    reduced = figure(report, "facts", gpu_stages.REDUCED_FORMAT, "value")
    trained = COMPILED if figure(report, "train", COMPILED, STEP_MS) else EAGER
    step, whole = figure(report, "train", trained, STEP_MS), job_minutes(report)["whole job"]["minutes, ours"]

    def on(name: str, value: float | None) -> float | None:
        return value if re.search(rf"\b{name}\b", card) else None

    def of_roofline(name: str) -> float | None:
        rows = (f"{gpu_stages.CONVOLUTION}, {name} {layout}" for layout in ("NCHW", "NHWC"))
        rates = [rate for row in rows if (rate := figure(report, "micro", row, gpu_stages.RATE))]
        speed = figure(report, "encode", f"ours, {name}", gpu_stages.IMAGES_PER_SECOND)
        return speed * TFLOP_PER_IMAGE / max(rates) if rates and speed else None

    def at_least(limit: float, found: float | None) -> dict[str, Any]:
        holds = found is not None and found >= limit
        return {"asked": f"at least {limit:g}", "found": found, "result": judged(found, holds)}

    def below(limit: float, found: float | None) -> dict[str, Any]:
        holds = found is not None and found < limit
        return {"asked": f"below {limit:g}", "found": found, "result": judged(found, holds)}

    def judged(found: float | None, holds: bool) -> str:
        return "not measured" if found is None or report["small"] else "met" if holds else "missed"

    return {
        "training step, times the users' loop": at_least(10, figure(report, "train", trained, SPEED)),
        "training step on an H100, ms": below(2.5, on("H100", step)),
        "training step on a T4, ms": below(14, on("T4", step)),
        "encoding in float32, of the rate of a convolution": at_least(0.5, of_roofline("float32")),
        f"encoding in {reduced}, of the rate of a convolution": at_least(0.5, of_roofline(reduced)),
        "whole job on a T4, minutes": below(10, on("T4", whole)),
        "whole job on an H100, minutes": below(3, on("H100", whole)),
        "data and draws, share of a step": below(0.05, figure(report, "train", DRAWS, gpu_stages.SHARE)),
        "peak memory of encoding, GB": below(2, figure(report, "encode", "ours, float32", PEAK_GB)),
        "peak memory of training, GB": below(1, figure(report, "train", trained, PEAK_GB)),
    }


# --- text --------------------------------------------------------------------------------------------------


def report_text(report: Mapping[str, Any]) -> str:
    """Returns the whole report as markdown."""
    head = ["# What this GPU gives", f"{report['date']}, `python benchmarks/bench_gpu.py`"]
    if report["small"]:
        head.append(SMALL)
    stages = [stage_text(name, result) for name, result in report["stages"].items()]
    return "\n\n".join([*head, *stages, verdict_text(report), results_text(report)]) + "\n"


def stage_text(name: str, result: Mapping[str, Any]) -> str:
    """Returns the section of a stage."""
    parts = [f"## {name}", f"{result['state']} after {result['seconds']:g} s"]
    if "last_line" in result:
        quoted = result["last_line"].replace("`", "'")
        parts[-1] += f", while {result['doing']}; its last line: `{quoted}`"
    return "\n\n".join([*parts, *([table(result["rows"])] if result["rows"] else [])])


def verdict_text(report: Mapping[str, Any]) -> str:
    """Returns the section of the verdict."""
    told = (
        f"**Extrapolated** from the stages, not measured: {JOB_IMAGES:,} images in {JOB_CLASSES} classes, from images "
        "to 50 generated per class with the default settings, without the starts of the commands, saves and sample "
        "grids. The users' way has as many steps."
    )
    tables = [table(rows) for rows in report["verdict"].values()]
    return "\n\n".join(["## verdict", *[SMALL] * report["small"], told, *tables])


def results_text(report: Mapping[str, Any]) -> str:
    """Returns what may be put into benchmarks/RESULTS.md as it is."""
    facts = {name: row.get("value") for name, row in report["stages"].get("facts", {}).get("rows", {}).items()}
    head = f"## {report['date']}, {facts.get('gpu') or 'no GPU'}"
    names = ("cpu", "cpu_features", "driver_version", "CUDA", "cuDNN", "torch", "commit")
    told = "; ".join(f"{name} {facts[name]}" for name in names if facts.get(name))
    heads = (gpu_stages.IMAGES_PER_SECOND, STEP_MS, SPEED, PEAK_GB)
    rows = {
        f"{stage}: {name}": {head: row.get(head) for head in heads}
        for stage in ("encode", "train", "two GPUs")
        for name, row in report["stages"].get(stage, {}).get("rows", {}).items()
        if "note" not in row
    }
    note = [SMALL] if report["small"] else []
    body = "\n\n".join([head, *note, told, "    python benchmarks/bench_gpu.py", *([table(rows)] if rows else [])])
    return f"## For benchmarks/RESULTS.md\n\n~~~markdown\n{body}\n~~~"


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns rows as a table of markdown, with the heads that any of them has."""
    heads = list(dict.fromkeys(head for row in rows.values() for head, value in row.items() if value is not None))
    lines = [["", *heads], ["---"] * (1 + len(heads))]
    lines += [[name, *(cell(row.get(head), head) for head in heads)] for name, row in rows.items()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cell(value: Any, head: str) -> str:
    """Returns a figure as text: of several windows the median, the smallest and the largest."""
    if value is None:
        return ""
    times = "x" if head == SPEED else ""
    if isinstance(value, dict):
        few = f", {value['windows']} windows" if value["windows"] < _NUM_WINDOWS else ""
        return f"{value['median']:.4g}{times} ({value['min']:.4g} to {value['max']:.4g}{few})"
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/")


if __name__ == "__main__":
    main()
