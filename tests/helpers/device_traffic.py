"""Counts what goes between host and device, on a machine without a GPU: torch's "meta" device plays the device.

Tensors there have shapes and no values, so that what is computed on them runs through all the same operators. Where the
program reads a value back, a GPU would make the host wait; here it is given ones.
"""

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = torch.device("meta")


class Traffic(TorchDispatchMode):
    """Within the block, counts copies to the device and waits of the host.

    Attributes:
        to_device: copies from the host's memory.
        waits: values that the host reads, one by one or as a copy.
    """

    def __init__(self) -> None:
        super().__init__()
        self.to_device: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        given = {t.device.type for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        if name in ("_local_scalar_dense", "item", "is_nonzero", "equal") and "meta" in given:
            self.waits[name] += 1
            return 1
        target = kwargs.get("device")
        if name in ("_to_copy", "to") and "meta" in given and target is not None and torch.device(target).type == "cpu":
            self.waits[name] += 1
            return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        result = func(*args, **kwargs)
        made = {t.device.type for t in pytree.tree_leaves(result) if isinstance(t, Tensor)}
        if "cpu" in given and "meta" in made and any(t.ndim for t in pytree.tree_leaves(args) if isinstance(t, Tensor)):
            self.to_device[name] += 1
        return result
