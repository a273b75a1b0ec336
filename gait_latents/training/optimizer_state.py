"""Turns network, average, Adam's moments and the loss scaler into named tensors and plain values, and back."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gait_latents.common.errors import UserError


def pack_training_state(
    model: nn.Module, ema_model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Flattens what a resume needs to tensors named model.*, ema.*, optimizer.<parameter>.*, and plain values.

    Returns:
        The tensors, which still share memory with the model, and the values, which belong into `meta` as "training".
    """
    state = optimizer.state_dict()
    flat = {f"{i}.{name}": value for i, values in state["state"].items() for name, value in values.items()}
    tensors = _add_prefix("model", model.state_dict()) | _add_prefix("ema", ema_model.state_dict())
    tensors |= _add_prefix("optimizer", {name: value for name, value in flat.items() if isinstance(value, Tensor)})
    values = {name: value for name, value in flat.items() if not isinstance(value, Tensor)}
    return tensors, {
        "optimizer": {"param_groups": state["param_groups"], "values": values},
        "scaler": scaler.state_dict() if scaler is not None else {},
    }


def expected_bytes(model: nn.Module, ema_model: nn.Module) -> tuple[int, int]:
    """Returns about how large the files of the averaged weights alone and of a full state get, Adam's moments in it."""
    average = sum(tensor.nbytes for tensor in ema_model.state_dict().values())
    moments = 2 * sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    return average, sum(tensor.nbytes for tensor in model.state_dict().values()) + average + moments


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


def _add_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
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
