"""Training state on disk: saved whole, found again, and trusted only after its checksum.

A checkpoint is one safetensors file. Its header holds a format number, `meta` as JSON, and the SHA-256 over meta and
all tensors. Reading one never executes anything from it.
"""

import errno
import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

import durable
from config import UserError

FORMAT = 1
_NUM_KEPT = 2  # full states that stay: the newest may be damaged by the disk later
_HEADER_BYTES = 4 << 20  # a larger header is refused unread
_FULL_NAME = re.compile(r"state-([0-9]{8,18})\.safetensors")
_EMA_NAME = re.compile(r"ema-([0-9]{8,18})\.safetensors")
_ANY_NAME = re.compile(r"(?:state|ema)-([0-9]{8,18})\.safetensors")
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class DamagedCheckpoint(Exception):
    """A file is no whole checkpoint; the text names it and says why."""


# --- one file ----------------------------------------------------------------------------------------------


def save(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Publishes tensors of any device, and `meta`, as one file.

    Args:
        path: where to; a file of that name is replaced once the new one is whole.
        tensors: {name: tensor}; no two may share memory.
        meta: plain values as JSON knows them; tuples come back as lists.

    Raises:
        OSError: when the file cannot be published; what was there is untouched.
        ValueError: for shared tensors or other number formats, and for NaN or infinity in `meta`.
        TypeError: for anything in `meta` that JSON does not know.
    """
    _check_storable(tensors)
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = _canonical(meta)
    facts = {"format": str(FORMAT), "meta": text, "sha256": _checksum(stored, text)}
    # Written from where the tensors lie: safetensors.torch.save would hold all of it twice more.
    order = sorted(stored, key=lambda name: (-stored[name].element_size(), name))  # keeps each tensor aligned
    header = _header({name: stored[name] for name in order}, facts)
    durable.publish(path, [header, *(_bytes(stored[name]) for name in order)])


def load(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads a file that `save` made; returns its tensors, on the CPU, and meta.

    Raises:
        DamagedCheckpoint: when it is not what `save` wrote.
        UserError: when it has another format number.
        OSError: when it cannot be read.
    """
    path = Path(path)
    tensors = {}
    try:
        data = _read(path)
        entries = safetensors.deserialize(data)
        while entries:  # frees one copy of a tensor as it makes the next
            name, entry = entries.pop()
            tensors[name] = _tensor(entry)
    except (safetensors.SafetensorError, _Unreadable) as error:
        raise DamagedCheckpoint(f"{path}: {str(error)[:100]}") from None
    except MemoryError:
        raise OSError(errno.ENOMEM, "it is larger than the memory that is free", str(path)) from None
    # Safe to parse: safetensors has found it well-formed, and flat.
    header = json.loads(data[8 : 8 + _header_length(data)])
    return tensors, _checked_meta(path, tensors, header.get("__metadata__") or {})


def _header(tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> bytes:
    """Builds the start of a safetensors file that holds the tensors one after the other."""
    table: dict[str, Any] = {"__metadata__": facts}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        table[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > _HEADER_BYTES:
        raise ValueError(f"names and meta need {len(text)} bytes, and {_HEADER_BYTES} can be read back")
    return len(text).to_bytes(8, "little") + text


def _bytes(tensor: Tensor) -> memoryview:
    """Views a contiguous CPU tensor as its bytes."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else memoryview(b"")


class _Unreadable(Exception):
    """The reason why a file is none that `save` wrote."""


def _read(path: Path) -> bytes:
    """Reads a file whose length is that of the tensors that it lists: a few bytes may claim to be terabytes."""
    if path.exists() and not (path.is_file() or path.is_dir()):  # a named pipe would wait; a folder is an OSError
        raise _Unreadable("it is not a file")
    with durable.naming(path), path.open("rb") as file:
        start = file.read(8)
        if len(start) < 8 or _header_length(start) > _HEADER_BYTES:
            raise _Unreadable("it does not begin like a checkpoint")
        if _listed_bytes(file.read(_header_length(start))) != path.stat().st_size - file.tell():
            raise _Unreadable("its length is not that of the tensors that it lists")
        file.seek(0)
        return file.read()


def _listed_bytes(header: bytes) -> int:
    """Returns how many bytes of tensors follow a header, -1 where it cannot be read."""
    try:
        ends = [entry["data_offsets"][1] for name, entry in json.loads(header).items() if name != "__metadata__"]
        return max(ends, default=0)
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        return -1


def _header_length(data: bytes) -> int:
    return int.from_bytes(data[:8], "little")


def _tensor(entry: Mapping[str, Any]) -> Tensor:
    dtype = _DTYPES.get(entry["dtype"])
    if dtype is None:
        raise _Unreadable(f"it holds a tensor of type {entry['dtype']}")
    if not entry["data"]:
        return _no_numbers(entry["shape"], dtype)
    # Cloned, so that the memory is aligned as torch aligns its own.
    return torch.frombuffer(entry["data"], dtype=dtype).reshape(entry["shape"]).clone()


def _no_numbers(shape: list[int], dtype: torch.dtype) -> Tensor:
    try:
        return torch.empty(shape, dtype=dtype)
    except (RuntimeError, TypeError):  # sides whose product is more than torch can count, beside a 0
        raise _Unreadable("it holds a tensor of an impossible shape") from None


def _checked_meta(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> dict[str, Any]:
    """Returns the meta of a file whose checksum holds; raises DamagedCheckpoint or UserError."""
    number, text = facts.get("format", ""), facts.get("meta", "")
    is_intact = _checksum(tensors, text) == facts.get("sha256")
    # Where our checksum holds and the number alone is another, the number is what was damaged.
    if number.isdecimal() and number != str(FORMAT) and not is_intact:
        raise UserError(
            f"{path} has format {number[:20]}, and this version reads {FORMAT}; use the version that wrote it, "
            "or another folder"
        )
    if not is_intact or number != str(FORMAT):
        raise DamagedCheckpoint(f"{path}: its content does not match its checksum")
    try:
        meta = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DamagedCheckpoint(f"{path}: its meta cannot be read: {str(error)[:100]}") from None
    if not isinstance(meta, dict):
        raise DamagedCheckpoint(f"{path}: its meta are not an object")
    return meta


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _checksum(tensors: Mapping[str, Tensor], meta_text: str) -> str:
    """Returns the SHA-256 over meta, then names, types and shapes, then the bytes of contiguous CPU tensors."""
    names = sorted(tensors)
    table = [[name, str(tensors[name].dtype), list(tensors[name].shape)] for name in names]
    whole = hashlib.sha256(_canonical([meta_text, table]).encode())
    for name in names:
        whole.update(_bytes(tensors[name]))
    return whole.hexdigest()


def _check_storable(tensors: Mapping[str, Tensor]) -> None:
    owners: dict[tuple[torch.device, int], str] = {}
    for name, tensor in tensors.items():
        if tensor.dtype not in _NAMES:
            raise ValueError(f"{name} is {tensor.dtype}, which a checkpoint does not hold")
        if tensor.numel():
            owner = owners.setdefault((tensor.device, tensor.untyped_storage().data_ptr()), name)
            if owner != name:
                raise ValueError(f"{owner} and {name} share memory; keep one of them")


# --- a folder of them --------------------------------------------------------------------------------------


def full_name(step: int) -> str:
    """Names the file of the full training state after `step` steps."""
    return f"state-{step:08d}.safetensors"


def ema_name(step: int) -> str:
    """Names the file of the EMA weights alone after `step` steps."""
    return f"ema-{step:08d}.safetensors"


Found = tuple[Path, dict[str, Tensor], dict[str, Any], list[str]]


def newest(folder: str | os.PathLike[str]) -> Found | None:
    """Finds the newest full state that is whole.

    Returns:
        (path, tensors, meta, a warning for each newer file that is not whole), or None when there is no full state.

    Raises:
        UserError: when there are full states and none is whole, or the newest whole one has another format number.
    """
    return _newest_whole(Path(folder), _FULL_NAME)


def newest_averages(folder: str | os.PathLike[str]) -> Found | None:
    """Finds the newest whole file that holds averaged weights (ema.*), be it a full state; as `newest` does."""
    return _newest_whole(Path(folder), _ANY_NAME)


def newest_stamp(folder: str | os.PathLike[str]) -> tuple[str, str] | None:
    """Returns the name of the newest full state, whole or not, and a digest that another save would not have.

    None when there is none or it cannot be read just now.
    """
    with suppress(OSError):
        for _, path in _saved(Path(folder), _FULL_NAME)[:1]:
            return path.name, stamp(path)
    return None


def stamp(path: Path) -> str:
    """Returns a digest that no other save has, of a file that need not be whole; raises OSError."""
    with path.open("rb") as file:
        start = file.read(8)
        start += file.read(min(_header_length(start), _HEADER_BYTES))  # holds the checksum of all the rest
    return hashlib.sha256(start).hexdigest()


def is_full(meta: Mapping[str, Any]) -> bool:
    """Says whether the file with this meta holds a full state."""
    return "training" in meta


def _newest_whole(folder: Path, pattern: re.Pattern[str]) -> Found | None:
    warnings: list[str] = []
    for _, path in _saved(folder, pattern):
        try:
            return path, *load(path), warnings
        except DamagedCheckpoint as error:
            warnings.append(f"{error}; taking the one before")
        except OSError as error:
            warnings.append(f"{path}: {error.strerror or error}; taking the one before")
    if warnings:
        raise UserError(
            f"no checkpoint in {folder} can be read ({warnings[0].rpartition(';')[0]}); remove them to start from the "
            "beginning, or use another results_folder"
        )
    return None


def prune(folder: str | os.PathLike[str], *, step: int) -> None:
    """Removes what is no longer needed once the state of `step` is published: older states, abandoned temporaries.

    That state and the one before it stay; so do states of later steps, which `newest` has found damaged.
    """
    durable.remove_stale_temporaries(folder)
    until_now = [path for saved_step, path in _saved(Path(folder), _FULL_NAME) if saved_step <= step]
    for path in until_now[_NUM_KEPT:]:
        with suppress(OSError):  # costs space only
            path.unlink()


def saved_averages(folder: str | os.PathLike[str]) -> dict[int, Path]:
    """Returns the files of averaged weights alone in a run folder, by their step."""
    return dict(_saved(Path(folder), _EMA_NAME))


def _saved(folder: Path, pattern: re.Pattern[str]) -> list[tuple[int, Path]]:
    """Returns (step, path) of the files in `folder` whose name fits, newest first; of one step, the averages first."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    steps = {name: int(match[1]) for name in names if (match := pattern.fullmatch(name))}
    newest_first = sorted(steps, key=lambda name: (-steps[name], name))
    return [(steps[name], folder / name) for name in newest_first]


# --- training state ----------------------------------------------------------------------------------------


def pack_training_state(
    model: nn.Module, ema_model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Flattens what a resume needs to tensors named model.*, ema.*, optimizer.<parameter>.*, and plain values.

    Returns:
        The tensors, which still share memory with the model, and the values, which belong into `meta` as "training".
    """
    state = optimizer.state_dict()
    flat = {f"{i}.{name}": value for i, values in state["state"].items() for name, value in values.items()}
    tensors = _prefixed("model", model.state_dict()) | _prefixed("ema", ema_model.state_dict())
    tensors |= _prefixed("optimizer", {name: value for name, value in flat.items() if isinstance(value, Tensor)})
    values = {name: value for name, value in flat.items() if not isinstance(value, Tensor)}
    return tensors, {
        "optimizer": {"param_groups": state["param_groups"], "values": values},
        "scaler": scaler.state_dict() if scaler is not None else {},
    }


def expected_bytes(model: nn.Module, ema_model: nn.Module) -> tuple[int, int]:
    """Returns about how large the files of the averaged weights alone and of a full state get, Adam's moments in it."""
    average = sum(tensor.nbytes for tensor in ema_model.state_dict().values())
    moments = 2 * sum(parameter.nbytes for parameter in model.parameters())
    return average, sum(tensor.nbytes for tensor in model.state_dict().values()) + average + moments


def bytes_for_saves(folder: str | os.PathLike[str], count: int, model: nn.Module, ema_model: nn.Module) -> int:
    """Returns about how much more a run folder takes after `count` saves, and the state that a save writes first."""
    average, full = expected_bytes(model, ema_model)
    num_there = min(len(_saved(Path(folder), _FULL_NAME)), _NUM_KEPT)
    return count * average + max(1, min(count, _NUM_KEPT) + 1 - num_there) * full


def unpack_training_state(
    tensors: Mapping[str, Tensor],
    training: Mapping[str, Any],
    model: nn.Module,
    ema_model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler | None,
) -> None:
    """Puts back what `pack_training_state` took.

    Args:
        tensors: what was saved, named model.*, ema.* and optimizer.*.
        training: the values that were saved with them.
        model, ema_model, optimizer, scaler: where it goes.

    Raises:
        UserError: when names, shapes or values are not those of this model; nothing is then changed.
    """
    try:
        _unpack(tensors, training, model, ema_model, optimizer, scaler)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(f"the checkpoint holds no state of this optimizer ({type(error).__name__}: {error})") from error


def _unpack(
    tensors: Mapping[str, Tensor],
    training: Mapping[str, Any],
    model: nn.Module,
    ema_model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler | None,
) -> None:
    parts: dict[str, dict[str, Tensor]] = {"model": {}, "ema": {}, "optimizer": {}}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        if part not in parts:
            raise UserError(f"the checkpoint holds {name}, which is no part of a training state")
        parts[part][rest] = tensor
    for part, module in (("model", model), ("ema", ema_model)):
        _check_same_shapes(part, parts[part], module.state_dict())
    optimizer.load_state_dict(_optimizer_state(optimizer, parts["optimizer"], training["optimizer"]))
    model.load_state_dict(parts["model"])
    ema_model.load_state_dict(parts["ema"])
    if not all(type(value) in (int, float) for value in training["scaler"].values()):
        raise ValueError("the loss scale is no number")
    if scaler is not None and scaler.is_enabled() and training["scaler"]:
        scaler.load_state_dict(training["scaler"])


def _prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def _check_same_shapes(part: str, stored: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    def shape(tensors: Mapping[str, Tensor], name: str) -> str:
        return str(list(tensors[name].shape)) if name in tensors else "absent"

    names: Iterable[str] = dict.fromkeys([*own, *stored])
    for name in names:
        if shape(stored, name) != shape(own, name):
            raise UserError(
                f"the checkpoint is of another network: {part}.{name} is {shape(stored, name)} in it, and "
                f"{shape(own, name)} with the present settings"
            )


def _optimizer_state(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], stored: Mapping[str, Any]
) -> dict[str, Any]:
    """Builds the state dict of `optimizer` from what was saved; raises UserError if it is of other parameters."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if [len(group["params"]) for group in optimizer.param_groups] != [
        len(group["params"]) for group in stored["param_groups"]
    ]:
        raise UserError("the checkpoint is of another network: its optimizer has other groups of parameters")
    state: dict[int, dict[str, Any]] = {}
    for name, value in (dict(tensors) | stored["values"]).items():
        number, _, rest = name.partition(".")
        # Also where it is a single number: fused Adam would write beyond it.
        if isinstance(value, Tensor) and rest != "step" and value.shape != parameters[int(number)].shape:
            raise UserError(f"the checkpoint is of another network: optimizer.{name} is {list(value.shape)} in it")
        if isinstance(value, Tensor) and rest != "step":
            # With the strides of the parameter: fused Adam walks through the memory of both side by side.
            value = torch.empty_like(parameters[int(number)]).copy_(value)
        state.setdefault(int(number), {})[rest] = value
    _check_moments(optimizer, state, len(parameters))
    pairs = zip(optimizer.state_dict()["param_groups"], stored["param_groups"], strict=True)
    return {"state": state, "param_groups": [_param_group(own, saved) for own, saved in pairs]}


_ADAM_STATE = {"step", "exp_avg", "exp_avg_sq"}


def _check_moments(optimizer: torch.optim.Optimizer, state: Mapping[int, Mapping[str, Any]], count: int) -> None:
    """Raises ValueError unless every parameter, or none, has its step and its moments."""
    for values in state.values():
        if isinstance(optimizer, torch.optim.Adam) and values.keys() != _ADAM_STATE:
            raise ValueError(f"of {', '.join(sorted(_ADAM_STATE))} there is {', '.join(sorted(values))!r:.100}")
        if not isinstance(step := values.get("step", 0), Tensor | float | int) or torch.as_tensor(step).numel() != 1:
            raise ValueError("a step is no number")
    if state and state.keys() != set(range(count)):
        raise ValueError(f"it is of {len(state)} of {count} parameters")


def _param_group(own: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the optimizer's own group with the numbers of a saved one: the rest says how this torch computes.

    Raises:
        ValueError: for other parameters or what are no numbers; moments of other shapes would be written beyond.
    """
    if saved["params"] != own["params"] or any(type(number) is not int for number in saved["params"]):
        raise ValueError("a group is of other parameters")
    numbers = {name: saved[name] for name in ("lr", "eps", "weight_decay") if name in saved}
    first, second = saved["betas"]
    for value in (*numbers.values(), first, second):
        if type(value) not in (int, float) or not 0 <= value < math.inf:
            raise ValueError(f"{value!r:.50} is no number of an optimizer")
    return {**own, **numbers, "betas": (first, second)}
