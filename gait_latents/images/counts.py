"""How many images of each class to generate: as many as are asked for, or as fill the real ones up to a number."""

from collections.abc import Mapping, Sequence

from gait_latents.common.errors import UserError
from gait_latents.images.names import name_list

_MOST_GROUPS = 6  # of classes with the same number, in one line


def counts_as_asked(chosen: Sequence[str], named: Mapping[str, int], others: int) -> dict[str, int]:
    """Returns how many images to make of each class.

    Args:
        chosen: the classes to make images of, some of those that the model knows.
        named: the number of each class that has one of its own; all of them are chosen.
        others: that of all other classes.
    """
    return {name: named.get(name, others) for name in chosen}


def counts_to_fill(chosen: Sequence[str], goal: int, real: Mapping[str, int]) -> dict[str, int]:
    """Returns how many images of each class make `goal` together with its real ones: none where there are as many.

    Raises:
        UserError: when no class needs any.
    """
    counts = {name: max(0, goal - real[name]) for name in chosen}
    if not any(counts.values()):
        fewest = min(real[name] for name in chosen)
        raise UserError(
            f"--fill_up_to is {goal:,}, but each of these classes has {fewest:,} or more training images, so that "
            "there is nothing to make; give a larger number"
        )
    return counts


def describe_counts(counts: Mapping[str, int]) -> str:
    """Says how many images of which classes there are, such as "100 of ID_3, 50 of each of the other 29 classes"."""
    groups: dict[int, list[str]] = {}
    for name, count in counts.items():
        groups.setdefault(count, []).append(name)
    if len(groups) == 1:
        return f"{_number(next(iter(groups)))} of each class"
    commonest = max(groups, key=lambda count: len(groups[count]))
    rest = groups.pop(commonest) if len(groups[commonest]) > 1 else []
    parts = [f"{_number(count)} of {'each of ' * (len(n) > 1)}{name_list(n, limit=4)}" for count, n in groups.items()]
    left = [name for names in list(groups.values())[_MOST_GROUPS:] for name in names]
    if left:
        parts[_MOST_GROUPS:] = [f"{sum(counts[name] for name in left):,} of {len(left):,} more classes together"]
    if rest:
        parts.append(f"{_number(commonest)} of each of the other {len(rest):,} classes")
    return ", ".join(parts)


def _number(count: int) -> str:
    return f"{count:,}" if count else "none"
