"""The stage of bench_gpu.py that asks whether what this project promises is true on the device.

Each check runs the project's own trainer or decoder, on random latents and weights.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import bench_encode
import bench_train
import harness

if TYPE_CHECKING:
    from gpu_stages import Stage

# Of images decoded in a reduced format: below it, something else than rounding is at work. With random weights bfloat16
# reaches 42.9 on a CPU; whether the images of a real VAE look the same is tried with each VAE (vae/decoder.py).
PSNR_DB = 35.0
LOSS_TOLERANCE = 1e-4  # of the first loss on the device against that on the CPU, without TF32
_TOO_LARGE_SCALE = 2.0**60  # of a loss: its gradients overflow float16
Check = tuple[bool | None, str]  # whether it passes, None where it cannot be asked on a CPU, and what was found


def truth(stage: "Stage") -> None:
    """Runs the trainer and the decoder, and says of each promise whether it is kept on this device."""
    import torch

    from gait_latents.common import hardware

    hardware.make_deterministic()  # before anything is computed; for the checks of bits alone
    for name, (check, is_exact) in CHECKS.items():
        stage.say(name)
        torch.use_deterministic_algorithms(is_exact)
        try:
            passed, found = check(stage)
        except Exception as error:  # whatever it is, it is what the row tells
            passed, found = False, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        verdict = "not on a CPU" if passed is None else "pass" if passed else "FAIL"
        stage.row(name, result=verdict, found=found)


def never_waits(stage: "Stage") -> Check:
    """Takes ten steps, over an update of the average, in which torch raises an error where the host waits."""
    import torch

    if stage.is_cpu:
        return None, ""
    trainer = stage.trainer()
    for _ in range(3):
        trainer.train_step()
    harness.wait_for_device()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(10):
            trainer.train_step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return True, f"10 steps in {trainer.dtype}"


def repeats_and_resumes(stage: "Stage") -> Check:
    """Compares four steps with the same four, and with two and two after a save."""
    import torch

    from gait_latents.training import optimizer_state

    def state_after(trainer: Any, steps: int) -> tuple[dict[str, Any], dict[str, Any]]:
        for _ in range(steps):
            trainer.train_step()
        tensors, values = optimizer_state.pack_training_state(
            trainer.diffusion, trainer.ema.model, trainer.optimizer, trainer.scaler
        )
        return {name: tensor.clone() for name, tensor in tensors.items()}, values

    first, second, resumed = stage.trainer(), stage.trainer(), stage.trainer()
    whole, _ = state_after(first, 4)
    half, values = state_after(second, 2)
    again, _ = state_after(second, 2)
    optimizer_state.unpack_training_state(
        half, values, resumed.diffusion, resumed.ema.model, resumed.optimizer, resumed.scaler
    )
    resumed.finished_steps = 2
    after, _ = state_after(resumed, 2)
    changed = [name for name in whole if not torch.equal(whole[name], again[name])]
    lost = [name for name in whole if not torch.equal(whole[name], after[name])]
    text = f"{len(whole)} tensors in {first.dtype}; {len(changed)} differ when repeated, {len(lost)} when resumed"
    return not changed and not lost and not first.losses[-1].isnan().item(), text


def overflow_is_skipped(stage: "Stage") -> Check:
    """Forces an overflow in float16: the step must change no weight, and halve the loss scale."""
    import torch

    trainer = stage.trainer(precision="float16")
    trainer.train_step()
    trainer.scaler.update(_TOO_LARGE_SCALE)
    before = [parameter.clone() for parameter in trainer.diffusion.parameters()]
    trainer.train_step()
    kept = all(map(torch.equal, before, trainer.diffusion.parameters()))
    scale = trainer.scaler.get_scale()
    trainer.check_finite()  # an overflow is no failure of the run
    return kept and scale == _TOO_LARGE_SCALE / 2, f"weights {'kept' if kept else 'CHANGED'}, scale {scale:g}"


def sick_step_is_named(stage: "Stage") -> Check:
    """Puts a NaN into a weight before the second step, which must then be named, and must change nothing more."""
    import torch

    from gait_latents.common.errors import Failed

    trainer = stage.trainer()
    trainer.train_step()
    parameters = list(trainer.diffusion.parameters())
    with torch.no_grad():
        parameters[0][0].fill_(torch.nan)
    before = [parameter.clone() for parameter in parameters[1:]]
    trainer.train_step()
    kept = all(map(torch.equal, before, parameters[1:]))
    try:
        trainer.check_finite()
    except Failed as error:
        return kept and "step 2 is not finite" in str(error), str(error)[:60]
    return False, "nothing was said"


def loss_is_that_of_the_cpu(stage: "Stage") -> Check:
    """Compares the loss of the first step in float32, without TF32, with that on the CPU."""
    import torch

    from gait_latents.common import hardware

    losses = []
    for device in (stage.device, torch.device("cpu")):
        trainer = stage.trainer(device, precision="float32")
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        try:
            trainer.train_step()
        finally:
            hardware.allow_tf32()
        losses.append(trainer.losses[0].item())
    difference = abs(losses[0] / losses[1] - 1)
    return (
        difference <= LOSS_TOLERANCE,
        f"{losses[0]:.6f} and {losses[1]:.6f}, a relative difference of {difference:.1e}",
    )


def decodes_alike(stage: "Stage") -> Check:
    """Compares images decoded in the reduced number formats with those in float32."""
    import torch

    from gait_latents.common import pictures

    shape = bench_train.latent_shape(stage.sizes)
    latents = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)).to(stage.device)
    bench_encode.save_vae(stage.folder / "vae.pt", stage.sizes)
    exact = stage.decoder("float32")(latents)
    found = {}
    for name in stage.formats[1:]:
        pairs = zip(exact, stage.decoder(name)(latents), strict=True)
        found[name] = min(min(99.0, pictures.psnr(*pair)) for pair in pairs)
    good = all(quality >= PSNR_DB for quality in found.values())
    return good, ", ".join(f"{name} {quality:.1f} dB" for name, quality in found.items())


CHECKS: dict[
    str, tuple[Callable[["Stage"], Check], bool]
] = {  # name -> check, and whether torch is to be deterministic
    "the host never waits in ten steps": (never_waits, False),
    "with --deterministic, repeated and resumed bit for bit": (repeats_and_resumes, True),
    "an overflow in float16 skips the step and halves the scale": (overflow_is_skipped, False),
    "a step that is not finite is named": (sick_step_is_named, False),
    "the first loss is that of the CPU": (loss_is_that_of_the_cpu, False),
    f"reduced formats decode as float32 does, to {PSNR_DB:g} dB": (decodes_alike, False),
}
