"""The device, the number format, and how much memory there is; each choice comes with its reason."""

import importlib.util
import os
import resource
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from gait_latents.common import cores, limits, process, shortage
from gait_latents.common.console import warn
from gait_latents.common.errors import Failed, Shortage, UserError


def warn_uncompiled(choice: str, obstacle: str) -> None:
    """Warns that the network trains without the compiler.

    Args:
        choice: the setting: auto or true.
        obstacle: what the compiler failed at.

    Raises:
        Failed: where a compiled network was asked for.
    """
    if choice == "true":
        raise Failed(f"the network cannot be compiled ({obstacle}); give --compile false")
    warn(f"the network cannot be compiled, and trains without ({obstacle})")


# Native bfloat16 arithmetic starts at the first of these CUDA compute capabilities, and at the second the tensor cores
# that make float16 fast.
_BFLOAT16_CAPABILITY, _FLOAT16_CAPABILITY = (8, 0), (7, 0)
_TRITON_CAPABILITY = (7, 0)  # the oldest GPUs that torch.compile generates code for
COMPILED_STEPS = 5000  # with fewer steps, compiling takes longer than it saves
NUMBER_FORMATS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def pick_device(name: str) -> torch.device:
    """Returns the device that `name` (auto, cpu, cuda, cuda:N) stands for, after one real computation on it.

    Raises:
        UserError: for a device that is absent, or a GPU that is full or that this torch build has no kernels for.
    """
    device = torch.device(_resolve_auto(name))
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise UserError(f"--device {name} is not supported; use auto, cpu, cuda or cuda:N")
    if not torch.cuda.is_available():
        raise UserError(f"--device {name} asks for a GPU, but torch {torch.__version__} sees none; use --device cpu")
    if device.index is not None and device.index >= torch.cuda.device_count():
        raise UserError(f"--device {name} does not exist; this machine has {torch.cuda.device_count()} GPU(s)")
    _try(device)
    return device


def _resolve_auto(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name} is not a device; use auto, cpu, cuda or cuda:N") from error
    return name


def _try(device: torch.device) -> None:
    """Computes a small convolution: a GPU may be listed and yet be full, or too old for this torch."""
    try:
        image = torch.ones(1, 3, 8, 8, device=device)
        torch.nn.functional.conv2d(image, torch.ones(1, 3, 3, 3, device=device)).sum().item()
    except RuntimeError as error:
        gpu = torch.cuda.get_device_name(device)
        if "out of memory" in str(error):  # a class of its own only where torch allocates, not where CUDA starts
            raise UserError(
                f"the GPU ({gpu}) has no memory left: end what else uses it, such as another notebook, or give "
                "--device cpu"
            ) from error
        raise UserError(no_kernels_message(gpu)) from error


@contextmanager
def plain_memory_error(*, remedy: str = "") -> Iterator[None]:
    """Turns too little memory, of the GPU or of the machine, into one sentence with a remedy.

    Args:
        remedy: what follows "the GPU has too little memory", or "this machine has"; without one, what helps any script.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        kind = shortage.kind_of(error)
        if kind not in (shortage.GPU, shortage.MEMORY):
            raise
        if not remedy:
            raise Shortage(kind) from error
        raise Failed(f"{shortage.who_lacks_memory(kind)} has too little memory {remedy}") from error


def no_kernels_message(gpu: str) -> str:
    """Says what to do about a GPU that is there but that this torch build cannot compute on."""
    return (
        f"torch {torch.__version__} cannot compute on this GPU ({gpu}); on Kaggle switch the accelerator to T4 x2, "
        "or install torch below 2.15 with its torchvision from the CUDA 12.6 package index"
    )


def describe(device: torch.device, num_threads: int | None = None) -> str:
    """Names the device for the log, a CPU with the number of threads that compute; None is as many as torch takes."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({num_threads or torch.get_num_threads()} threads)"


def pick_threads(device: torch.device, *, as_before: int | None) -> tuple[int | None, str]:
    """Chooses how many threads the steps of a run take on a CPU, by the cores that other programs leave free.

    Args:
        as_before: the number that the run which goes on began with, and whose bits it keeps; None for a new run.

    Returns:
        The number, None on a GPU, and what to say about it; an empty text where it is the number that torch takes.
    """
    if device.type != "cpu":
        return None, ""
    usual = torch.get_num_threads()
    if cores.threads_are_chosen():
        return usual, ""
    if as_before is not None:
        if as_before > usual:
            return usual, f"{usual} threads, not {as_before} as when it began: the same run within rounding"
        told = f"{as_before} of {usual} threads, as when it began; OMP_NUM_THREADS={usual} takes all"
        return as_before, told if as_before < usual else ""
    free = cores.num_free_cores()
    if free is None or free >= usual:
        return usual, ""
    return free, f"{free} of {usual} threads, as only so many cores are free; OMP_NUM_THREADS={usual} takes all"


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Computes with so many threads within the block; None leaves their number as it is."""
    before = torch.get_num_threads()
    if count in (None, before):
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def pick_precision(name: str, device: torch.device) -> tuple[torch.dtype, str]:
    """Returns the number format of the network and the reason for it."""
    if device.type != "cuda":
        return (torch.float32, "the default without a GPU") if name == "auto" else (NUMBER_FORMATS[name], "as asked")
    major, minor = torch.cuda.get_device_capability(device)
    if name == "bfloat16" and (major, minor) < _BFLOAT16_CAPABILITY:
        warn(
            f"--precision bfloat16 is slow on this GPU (compute capability {major}.{minor}); --precision auto is faster"
        )
    if name != "auto":
        return NUMBER_FORMATS[name], "as asked"
    if (major, minor) >= _BFLOAT16_CAPABILITY:
        return torch.bfloat16, f"compute capability {major}.{minor}"
    if (major, minor) >= _FLOAT16_CAPABILITY:
        return torch.float16, f"compute capability {major}.{minor} is below 8.0; with a loss scaler"
    return torch.float32, f"compute capability {major}.{minor} is below 7.0, where other formats are no faster"


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
    """Returns the context in which a network runs in a number format."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)


def pick_compile(choice: str, device: torch.device, *, num_steps: float, as_before: bool | None) -> tuple[bool, str]:
    """Returns whether to compile the network, and what to say of it.

    Args:
        choice: the setting: auto, true or false.
        num_steps: number of training steps in all.
        as_before: whether the run that is resumed was compiled, since a compiled network gives other bits; None for a
            new run.

    Raises:
        UserError: when compiling is asked for and impossible.
    """
    obstacle = why_not_compile(device)
    if choice == "true" and obstacle is not None:
        raise UserError(f"--compile true cannot be done: {obstacle}; give --compile auto")
    if choice == "false" or obstacle is not None:
        return False, f"not compiled ({obstacle or 'as asked'})"
    if choice == "auto" and as_before is False:
        return False, "not compiled, as when the run began"
    if choice == "auto" and as_before is None and num_steps < COMPILED_STEPS:
        return False, "not compiled, since so few steps would not repay the time"
    return True, "compiled, which takes a minute or two at the first step"


def why_not_compile(device: torch.device) -> str | None:
    """Returns why torch.compile cannot work on the device; None where it should."""
    if device.type == "cpu":
        found = any(shutil.which(name) for name in (os.environ.get("CXX"), "g++", "clang++", "c++") if name)
        return None if found else "there is no C++ compiler"
    capability = torch.cuda.get_device_capability(device)
    if capability < _TRITON_CAPABILITY:
        return f"compute capability {capability[0]}.{capability[1]} is below 7.0"
    return None if importlib.util.find_spec("triton") else "Triton is not installed"


def _is_compiler_error(error: BaseException) -> bool:
    """Says whether an error comes from torch.compile, and not from what it compiled."""
    # By name: importing the module of these classes takes a second.
    modules = {cls.__module__ for cls in type(error).__mro__}
    return any(module.startswith(("torch._dynamo", "torch._inductor", "triton")) for module in modules)


def compiler_obstacle(error: Exception) -> str:
    """Returns in one line what torch.compile failed at; raises the error again if what was compiled failed."""
    if not _is_compiler_error(error):
        raise error
    return " ".join(str(error).split())[:200]


def make_deterministic() -> None:
    """Asks torch for algorithms that give the same bits each time on one device.

    Call it before anything is computed: torch reads the environment variable at its first matrix product on a GPU, and
    if it was not set by then, refuses every later product.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # Filling memory costs a kernel for each tensor that is made, and nothing here reads what was not written.
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
    torch.backends.cudnn.benchmark = False


def allow_tf32() -> None:
    """Lets float32 convolutions and matrix products use TF32 where the GPU has it."""
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True


def free_memory_bytes(device: torch.device) -> int:
    """Returns how many bytes this process may still use on the device; processes on one host share its free memory."""
    if device.type == "cuda":  # each process has a GPU of its own
        return torch.cuda.mem_get_info(device)[0]
    num_processes = process.num_local_ranks()
    return min(_free_host_bytes() // num_processes, limits.free_bytes(num_processes))


def _free_host_bytes() -> int:
    return limits.free_on_machine()


def synchronize(device: torch.device) -> None:
    """Waits until the device has finished all work that was queued on it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device: torch.device) -> str:
    """Says the most memory that this process has held, on the host and on the GPU."""
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    text = f"{host / 1e9:.2f} GB host"
    if device.type == "cuda":
        text += f", {torch.cuda.max_memory_allocated(device) / 1e9:.2f} GB GPU"
    return text
