"""Finds the sets of weights of a KL-VAE in what a file holds: raw and averaged ones, under keys and under prefixes.

A training checkpoint often has several sets. Which of them is taken is one rule for all layouts:

1. Averaged weights win over raw ones, where both are complete. In other respects the first of the keys `WEIGHT_KEYS`
   wins, then `first_stage_model.`, then the shortest prefix, then the alphabet.
2. Files of the first layout (LDM's names, `quant_conv`, attention in the middle alone) are read as the first versions
   read them, without the preference for averages, since caches and runs exist that were made so: the key `model` wins
   over `ema`, and in one table of names `ema.` wins over `model.`, because it is shorter.

The second part is not what one would choose today. It stays because another choice would be other latents under the
same path: a cache would be encoded again, and a run could not go on. What was taken and what was left out is said
whenever a script opens a VAE.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from gait_latents.vae.base import HALVES
from gait_latents.vae.tensor_names import LANDMARK, WRAPPERS, are_of_diffusers, to_ldm, unwrapped, with_dots
from gait_latents.vae.weight_files import printable

# Under these keys training checkpoints keep weights.
WEIGHT_KEYS = ("model_state_dict", "vae_state_dict", "state_dict", "vae", "model", "ema_state_dict", "ema")
# Words of keys and prefixes that stand for averages, such as `ema` in `ema_0.9999`, `modelEMA` and `emas`.
_AVERAGES = {"ema", "emas", "swa", "avg", "average", "averaged", "averages", "polyak", "shadow"}
_RAW = "online_model."  # beside `ema_model.` in what ema_pytorch keeps under the key `ema`
_DEEPEST = 5  # mappings around the weights, such as checkpoint/model/state_dict/vae
_MOST_SETS = 16  # a file with more VAEs in it is no training checkpoint
_SHADOW = "shadow_params"  # a list of averages in the order of the raw weights, as torch_ema and diffusers keep it


@dataclass(frozen=True)
class WeightSet:
    """One set of weights of a VAE in a file.

    Attributes:
        key: the keys that lead to its mapping, joined by "/"; empty for the file's own.
        prefix: what stands before the names of its tensors in the file.
        tensors: its tensors under the names of LDM, not yet checked.
        beside: {name without prefix: name in the mapping} of what has the same prefix and is no part of a VAE.
        members: the names of the tensors in the mapping, without the words of DDP and torch.compile.
        mapping: the mapping in the file that holds it.
        has_diffusers_names: whether its names were those of diffusers.
        is_average: whether these are averaged weights.
    """

    key: str
    prefix: str
    tensors: dict[str, Any]
    beside: dict[str, str]
    members: frozenset[str]
    mapping: Mapping[Any, Any]
    has_diffusers_names: bool
    is_average: bool

    @property
    def is_first_stage(self) -> bool:
        """Says whether it is one model of several, as in a full LDM or Stable Diffusion checkpoint."""
        return ".".join(word for word in self.prefix.split(".") if word not in WRAPPERS) == "first_stage_model."

    @property
    def place(self) -> str:
        """Says where in the file it is; empty for names without prefix in the file itself."""
        parts = [f"the key {self.key}" if self.key else "", f"the prefix {self.prefix}" if self.prefix else ""]
        return " and ".join(part for part in parts if part)


def mappings(
    tree: Mapping[Any, Any], key: str = "", depth: int = 2, seen: set[int] | None = None
) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    """Yields (key, mapping) of a mapping and the mappings in it, those under the usual names first, each once.

    Each once, because a small pickle can hold the same mapping a million times, which then holds another so often.
    """
    seen = set() if seen is None else seen
    seen.add(id(tree))
    yield key, tree
    by_rank = sorted(tree, key=lambda key: WEIGHT_KEYS.index(key) if key in WEIGHT_KEYS else len(WEIGHT_KEYS))
    for inner in by_rank if depth else ():
        if isinstance(tree[inner], Mapping) and id(tree[inner]) not in seen:
            yield from mappings(tree[inner], f"{key}/{printable(inner)}".lstrip("/"), depth - 1, seen)


def find_sets(tree: Any) -> list[WeightSet]:
    """Returns the sets of weights in what a file holds, in the order of the keys and prefixes (see the module)."""
    found = _find_sets(tree, depth=2)
    # Only then, because more sets would change which of them is the first.
    return found or _find_sets(tree, depth=_DEEPEST)


def _find_sets(tree: Any, depth: int) -> list[WeightSet]:
    trees = list(mappings(tree, depth=depth)) if isinstance(tree, Mapping) else []
    found: list[WeightSet] = []
    without_dots: list[WeightSet] = []
    for key, mapping in trees:
        state = unwrapped(mapping)
        found += _sets_of_names(key, state, mapping)
        without_dots += _averages_of_ldm(key, state, mapping)
        if len(found) >= _MOST_SETS:
            break
    # These come last: the first versions did not know them, and what those took must come first.
    return [*found, *without_dots, *_shadows(trees, found)][:_MOST_SETS]


def _sets_of_names(key: str, state: dict[str, tuple[str, Any]], mapping: Mapping[Any, Any]) -> Iterator[WeightSet]:
    """Yields the sets in one mapping {name: (name in the file, value)}."""
    prefixes = {n.removesuffix(LANDMARK) for n in state if n == LANDMARK or n.endswith("." + LANDMARK)}
    for prefix in sorted(prefixes, key=lambda prefix: (prefix != "first_stage_model.", len(prefix), prefix))[
        :_MOST_SETS
    ]:
        in_file = state[prefix + LANDMARK][0]
        inside = {name.removeprefix(prefix): name for name in state if name.startswith(prefix)}
        shown = in_file.removesuffix(LANDMARK) if in_file.endswith(LANDMARK) else prefix
        yield _set(key, shown, inside, state, mapping)


def _averages_of_ldm(key: str, state: dict[str, tuple[str, Any]], mapping: Mapping[Any, Any]) -> Iterator[WeightSet]:
    """Yields the averages that LDM keeps beside the weights, in whose names the dots are missing."""
    dotted = {with_dots(name.removeprefix("model_ema.")): name for name in state if name.startswith("model_ema.")}
    if LANDMARK in dotted:
        yield _set(key, "model_ema.", {name: there for name, there in dotted.items() if name}, state, mapping)


def _set(
    key: str, prefix: str, inside: Mapping[str, str], state: dict[str, tuple[str, Any]], mapping: Mapping[Any, Any]
) -> WeightSet:
    """Makes a set of the tensors of a VAE among `inside`, {name without prefix: name in `state`}."""
    own = {name: there for name, there in inside.items() if name.startswith(HALVES["encoder"] + HALVES["decoder"])}
    return WeightSet(
        key,
        prefix,
        to_ldm({name: state[there][1] for name, there in own.items()}),
        {name: there for name, there in inside.items() if name not in own},
        frozenset(own.values()),
        mapping,
        are_of_diffusers(own),
        is_average=_RAW not in prefix and (_names_averages(f"{key}/{prefix}") or "n_averaged" in mapping),
    )


def _names_averages(place: str) -> bool:
    """Says whether keys and a prefix have a word for averages in them, whichever way words are set apart."""
    return not _AVERAGES.isdisjoint(word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", place))


def _shadows(trees: Sequence[tuple[str, Mapping[Any, Any]]], found: Sequence[WeightSet]) -> Iterator[WeightSet]:
    """Yields averages that the file keeps as a list, named after the raw weights of the same number and shapes."""
    for key, mapping in trees:
        values = mapping.get(_SHADOW)
        if not isinstance(values, list | tuple):
            continue
        for raw in found[:1]:
            shapes = [getattr(value, "shape", None) for value in raw.tensors.values()]
            if shapes == [getattr(value, "shape", None) for value in values]:
                tensors = dict(zip(raw.tensors, values, strict=True))
                yield WeightSet(f"{key}/{_SHADOW}".lstrip("/"), "", tensors, {}, frozenset(), mapping, False, True)


def left_out(found: Sequence[WeightSet], taken: WeightSet) -> list[str]:
    """Says which other sets of weights, and how many tensors beside the set that was taken, are in the file."""
    kinds = {True: "averaged", False: "raw"}
    others = [other for other in found if other is not taken]
    told = [f"{kinds[other.is_average]} weights under {other.place or 'names without prefix'}" for other in others]
    members = frozenset[str]().union(*(other.members for other in found if other.mapping is taken.mapping))
    beside = {there: name for name, there in taken.beside.items()}
    words = Counter(
        beside.get(name, name).split(".")[0]
        for name, (_, value) in unwrapped(taken.mapping).items()
        if isinstance(value, Tensor) and name not in members
    )
    told += [f"{count:,} tensor{'s' * (count > 1)} of {word}" for word, count in words.most_common(3)]
    rest = sum(count for _, count in words.most_common()[3:])
    return [*told, f"{rest:,} other tensors"] if rest else told
