"""Command lines: text to settings and back, the layers of settings, and --help.

A script's settings are one frozen dataclass whose fields `setting` makes. A value is looked up in this order, and
`Resolved.sources` remembers where it was found: flag > --config file > what was stored earlier (the run that goes on,
the manifest of the cache, the run that a new one begins with) > default. Flags and files go through the same text
parser, so `1e-4` means the same in both. Nothing here imports torch: --help is instant.

A flag is --name and its words, or --name=word and more words. Behind a flag that takes names of classes a word such as
-rf is a name, too; one that begins like a flag, such as --help or -seed, is given as --name=word.
"""

import argparse
import difflib
import glob
import math
import os
import re
import sys
import textwrap
from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gait_latents.common import files, mounts
from gait_latents.common.console import harmless, say, shell_word
from gait_latents.common.errors import UserError, missing_package

if TYPE_CHECKING:
    import yaml


# --- what a setting is --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spec:
    """The facts about one setting besides its name and default."""

    kind: type  # int, float, bool or str
    help: str
    group: str
    words: tuple[str, ...] = ()  # texts accepted besides the kind, such as "all"; "none" becomes None
    choices: tuple[str, ...] = ()
    low: float | None = None  # smallest value allowed
    high: float | None = None  # largest value allowed
    unit: str = ""  # what a number counts, such as "steps"
    many: bool = False  # a list, as separate words on the command line
    needed: bool = True  # where it is a list: it must not be empty
    pair: bool = False  # it is a list of two numbers, the first no larger than the second
    by_name: bool = False  # numbers as words NAME=NUMBER; a number alone, at most one, is for all other names
    path: bool = False  # it names a file or folder
    free: bool = False  # it may change when a run is resumed
    about_cache: bool = False  # the manifest of the cache supplies the default of scripts that read that cache
    stored: bool = True  # runs, caches and reports keep it; where it is trust in something, nobody else may give it

    @property
    def takes_names(self) -> bool:
        """Says whether the words of this setting are names of classes, which may be any text."""
        return self.many and not self.path and (self.by_name or (self.kind is str and not self.choices))


def setting(default: Any, kind: type, group: str, help: str, **facts: Any) -> Any:
    """Makes a field of a dataclass of settings; `facts` are further fields of its `Spec`."""
    return field(default=default, metadata={"spec": Spec(kind=kind, help=help, group=group, **facts)})


def specs(cls: type) -> dict[str, Spec]:
    """Returns the facts about each setting of one script, in order."""
    return {f.name: f.metadata["spec"] for f in fields(cls)}


def defaults(cls: type) -> dict[str, Any]:
    """Returns the default of each setting of one script."""
    return {f.name: f.default for f in fields(cls) if f.default is not MISSING}


@dataclass
class Catalogue:
    """What the parser must know about the settings of all scripts; gait_latents.settings fills it in when imported.

    Attributes:
        scripts: file name of a script -> the class of its settings.
        groups: the order in which --help shows the groups of settings.
        other_names: a name that people type -> the setting that they mean.
        gone: a setting of earlier versions -> what a file says where nobody used it, and what takes its place.
    """

    scripts: dict[str, type] = field(default_factory=dict)
    groups: tuple[str, ...] = ()
    other_names: dict[str, str] = field(default_factory=dict)
    gone: dict[str, tuple[str, str]] = field(default_factory=dict)


CATALOGUE = Catalogue()


# --- text to value and back ---------------------------------------------------------------------------------

_SWITCH = {
    "true": True,
    "yes": True,
    "on": True,
    "1": True,
    "false": False,
    "no": False,
    "off": False,
    "0": False,
}
_THOUSANDS = re.compile(r"[0-9]{1,3}(,[0-9]{3})+")
_KIND_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


def parse(name: str, texts: Sequence[str], spec: Spec, where: str) -> Any:
    """Turns the words given for one setting into its value; raises UserError naming the setting and `where`."""
    if spec.many:
        texts = [item for text in texts for item in _split_list(text, spec)]
        if not texts and spec.needed:
            raise UserError(f"{name} in {where} needs at least one value")
        if spec.by_name:
            return _parse_by_name(name, texts, spec, where)
        values = tuple(_parse_word(name, text, spec, where) for text in texts)
        if spec.pair and (len(values) != 2 or values[0] > values[1]):
            raise UserError(f"{name} is {' '.join(texts)} in {where}; it takes two numbers, the smaller one first")
        return values
    if len(texts) != 1:
        raise UserError(f"{name} takes one value, not {len(texts)} ({' '.join(texts)}), in {where}")
    return _parse_word(name, texts[0], spec, where)


def _split_list(text: str, spec: Spec) -> list[str]:
    """Splits a word such as 1,2,4 of a list of numbers or choices; a text may hold commas of its own."""
    if spec.by_name and "=" in text:  # a name may hold commas, too
        pieces = text.split(",")
        is_list = all(re.fullmatch(r"(.+=)?[0-9]+", piece.strip()) for piece in pieces)
        return pieces if is_list and not _THOUSANDS.fullmatch(text.rpartition("=")[2].strip()) else [text]
    is_number = spec.kind is not str and not _THOUSANDS.fullmatch(text.strip())
    return text.split(",") if is_number or spec.choices else [text]


def _parse_by_name(name: str, texts: Sequence[str], spec: Spec, where: str) -> Any:
    """Reads words such as ID_3=100 and 50: to ("ID_3=100", 50), or to 50 where that is all."""
    values: list[Any] = []
    owners: Counter[str] = Counter()
    for text in texts:
        owner, equals, word = (part.strip() for part in text.rpartition("="))
        if equals and not owner:
            raise UserError(f"{name} is {text!r} in {where}; a name stands before the =")
        value = _parse_word(f"{name} of {owner}" if owner else name, word, spec, where)
        owners[owner] += 1
        values.append(f"{owner}={value}" if owner else value)
    if owners[""] > 1:
        raise UserError(f"{name} is {' '.join(texts)} in {where}; one number alone is for all other names")
    twice = [owner for owner, count in owners.items() if count > 1]
    if twice:
        raise UserError(f"{name} in {where} names {twice[0]} {owners[twice[0]]} times")
    return values[0] if len(values) == owners[""] else tuple(values)


def counts_by_name(value: int | tuple[int | str, ...]) -> tuple[dict[str, int], int | None]:
    """Takes the value of a setting of whole numbers apart that may differ by name.

    Returns:
        The number of each name that has one of its own, and that of all other names; None where none was given.
    """
    items = value if isinstance(value, tuple) else (value,)
    pairs = (item.rpartition("=") for item in items if isinstance(item, str))
    others = [item for item in items if isinstance(item, int)]
    return {name: int(number) for name, _, number in pairs}, others[0] if others else None


def _parse_word(name: str, text: str, spec: Spec, where: str) -> Any:
    word = text.strip()
    if "none" in spec.words and word.lower() in ("none", "null", "~", ""):
        return None
    if word in spec.words:
        return word
    if "true" in spec.choices and word.lower() in _SWITCH:  # a switch with a third position
        return str(_SWITCH[word.lower()]).lower()
    value = _convert(word, spec.kind)
    if value is None or (spec.kind is str and not word):
        wanted = " or ".join([_KIND_NAMES[spec.kind], *spec.words])
        if spec.many:
            wanted += ", or words of the form NAME=NUMBER" if spec.by_name else ", or several as separate words"
        raise UserError(f"{name} is {text!r} in {where}; it takes {wanted}")
    if spec.choices and value not in spec.choices:
        raise UserError(f"{name} is {text!r} in {where}; it is one of {', '.join(spec.choices)}")
    if spec.low is not None and value < spec.low:
        raise UserError(f"{name} is {text} in {where}; the smallest allowed is {spec.low:g}")
    high = _LARGEST_INT if spec.high is None and spec.kind is int else spec.high
    if high is not None and value > high:
        raise UserError(f"{name} is {text} in {where}; the largest allowed is {high:g}")
    if spec.path and not _can_be_path(value):
        raise UserError(f"{name} is {text!r} in {where}; that can be no path")
    return _with_home(name, value, where) if spec.path else value


def _with_home(name: str, path: str, where: str) -> str:
    """Returns a path with the folder of the user in place of a ~ at its beginning."""
    if not path.startswith("~"):
        return path
    try:
        return str(Path(path).expanduser())
    except RuntimeError as error:  # a user that the system does not know
        user = path.partition("/")[0]
        raise UserError(
            f"{name} is {path} in {where}, and the home folder of {'this user' if user == '~' else user[1:]} is not "
            f"known; write the whole path, or ./{path} for a folder called {user}"
        ) from error


_LARGEST_INT = 2**63 - 1  # what torch can count


def _can_be_path(text: str) -> bool:
    """Says whether the system can be asked about this name; an escape in YAML or JSON may stand for anything."""
    try:
        name = os.fsencode(text)
    except UnicodeEncodeError:
        return False
    return b"\0" not in name and len(name) < 4096 and all(len(part) < 256 for part in name.split(b"/"))


def _convert(word: str, kind: type) -> Any:
    if kind is bool:
        return _SWITCH.get(word.lower())
    if kind is int and _THOUSANDS.fullmatch(word):  # but 1,2,4 is no number
        word = word.replace(",", "")
    try:
        value = kind(word)
    except ValueError:
        return None
    return None if kind is float and not math.isfinite(value) else value


def to_words(value: Any) -> list[str]:
    """Turns a value back into the words that `parse` reads; the inverse of `parse`."""
    if isinstance(value, list | tuple):
        return [word for item in value for word in to_words(item)]
    if isinstance(value, bool):
        return [str(value).lower()]
    return ["none" if value is None else str(value)]


def show(value: Any) -> str:
    """Returns a value as it would be typed on the command line; of several words, one with a blank is quoted."""
    words = to_words(value)
    if isinstance(value, list | tuple):
        words = [
            shell_word(word) if not word or not re.fullmatch(r"[^\s'\"]+", harmless(word)) else word for word in words
        ]
    return " ".join(words) or "(nothing)"


def typed(name: str, words: Sequence[str]) -> str:
    """Returns a flag and its words as they can be typed into a shell: --classes ID_1 ID_2, or --classes=-rf ID_1."""
    first, *others = sorted(words, key=lambda word: not word.startswith("-"))  # the word behind the = may be any text
    others = [f"[-]{glob.escape(word[1:])}" if word.startswith("-") else word for word in others]  # as a pattern
    return f"--{name}{'=' if first.startswith('-') else ' '}{' '.join(map(shell_word, [first, *others]))}"


# --- layers -------------------------------------------------------------------------------------------------


_FLAG = "flag"  # the source of what was typed


@dataclass(frozen=True)
class Layer:
    """The values that one source (flags, a file, an earlier run) gives for some settings."""

    source: str
    values: dict[str, Any]
    place: str = ""  # of a file, where it was found elsewhere than where it was asked for: the line that says so


@dataclass(frozen=True)
class Resolved:
    """The settings of one script.

    Attributes:
        settings: the settings, each path where it is in this session of Kaggle.
        sources: for each the place that its value comes from.
        asked: the settings as they were given.
    """

    settings: Any
    sources: dict[str, str]
    asked: Any

    def changes(self) -> list[str]:
        """Lists the settings that differ from their defaults, as lines "from the flags: dim 8, seed 3"."""
        standard, found = defaults(type(self.asked)), {}
        for name, source in self.sources.items():
            if getattr(self.asked, name) != standard[name]:
                found.setdefault(source, []).append(f"{name} {show(getattr(self.asked, name))}")
        return [
            line for source, texts in found.items() for line in _wrap(f"from {_PLACES.get(source, source)}: ", texts)
        ]

    def places(self) -> list[str]:
        """Lists the inputs of Kaggle that were found elsewhere than where they were asked for, one a line."""
        pairs = [
            (name, *pair)
            for name in self.sources
            for pair in zip(*(_items(getattr(some, name)) for some in (self.asked, self.settings)), strict=True)
        ]
        return [
            _place_line(name, asked, found) for name, asked, found in pairs if asked != found and Path(found).exists()
        ]


def _place_line(name: str, asked: str, found: str) -> str:
    return f"--{name}: {asked} is at {found}"


_PLACES = {_FLAG: "the flags"}  # how a line names a source that is called otherwise in `Resolved.sources`


def _wrap(start: str, texts: list[str]) -> list[str]:
    """Joins texts by commas into lines of about 100 characters, breaking none of them."""
    glued = ", ".join(text.replace(" ", "\0") for text in texts)
    lines = textwrap.wrap(start + glued, 100, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)
    return [line.replace("\0", " ") for line in lines]


def resolve(cls: type, layers: Iterable[Layer]) -> Resolved:
    """Puts layers together, the first one that has a value winning, and the defaults last.

    A path of an input of Kaggle is looked for in all layouts that Kaggle has.
    """
    values, sources = {}, {}
    layers = [*layers, Layer("default", defaults(cls))]
    for name in specs(cls):
        layer = next(layer for layer in layers if name in layer.values)
        values[name], sources[name] = layer.values[name], layer.source
    here = {name: _locate(value) if specs(cls)[name].path else value for name, value in values.items()}
    return Resolved(cls(**here), sources, cls(**values))


def _locate(value: Any) -> Any:
    """Returns where the paths of a setting are."""
    if isinstance(value, tuple):
        return tuple(mounts.locate(item) for item in value)
    return None if value is None else mounts.locate(value)


def stored_layer(cls: type, source: str, values: Mapping[str, Any], *, only_about_cache: bool = False) -> Layer:
    """Makes a layer of values stored earlier (settings of a run, manifest), read by the same text parser.

    Names that this version does not know are left out: an older or newer file still gives what it can.
    """
    known = {name: spec for name, spec in specs(cls).items() if spec.stored}
    known = {name: spec for name, spec in known.items() if spec.about_cache or not only_about_cache}
    found = {name: values[name] for name in known if name in values}
    for name, value in found.items():
        if not all(item is None or isinstance(item, str | int | float) for item in _items(value)):
            raise UserError(f"{name} in {source} is neither a value nor a list of values")
    return Layer(source, {name: parse(name, to_words(value), known[name], source) for name, value in found.items()})


def _items(value: Any) -> Iterable[Any]:
    return value if isinstance(value, list | tuple) else [value]


def read_command_line(cls: type, argv: Sequence[str] | None, *, description: str | None) -> list[Layer]:
    """Parses the flags of one script and the file that --config names: the two highest layers.

    `--data-path` is taken for `--data_path`. `--help` prints the settings that people change, `--help all` every one,
    and ends the program.

    Raises:
        UserError: for an unknown flag or key (the nearest known one is named) or a value of the wrong type.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if asks_for_help(words):
        wants_all = any(first in _HELP and word == "all" for first, word in pairwise(words)) or _HELP_ALL & {*words}
        _help_parser(cls, description, all_settings=bool(wants_all)).print_help()
        sys.exit(0)
    texts = _read_words(words, specs(cls))
    config_file = texts.pop("config", [None])[0]
    values = {name: parse(name, own, specs(cls)[name], f"--{name}") for name, own in texts.items()}
    layers = [Layer(_FLAG, values)]
    return layers if config_file is None else [*layers, read_file(cls, config_file)]


_HELP, _HELP_ALL = ("-h", "-help", "--help"), {"-hall", "-h=all", "--help=all"}


def asks_for_help(words: Sequence[str]) -> bool:
    """Says whether a command line asks for --help, which goes before everything else in it."""
    return any(word.partition("=")[0] in _HELP or word in _HELP_ALL for word in words)


_CONFIG = Spec(str, "YAML file of settings; flags win over it", "", path=True)


def _read_words(words: Sequence[str], known: Mapping[str, Spec]) -> dict[str, list[str]]:
    """Takes a command line apart: name of each flag -> its words; of a flag that comes twice, the last counts.

    Raises:
        UserError: for a word that is no flag and belongs to none, and for a flag that lacks its word.
    """
    flags = {**known, "config": _CONFIG}
    found: dict[str, list[str]] = {}
    rest, names = list(words), ""  # names: the flag before, where it takes names
    while rest:
        flag, equals, value = rest.pop(0).partition("=")
        name = flag[2:].replace("-", "_")
        if not flag.startswith("--") or name not in flags:
            also = f"; a name is given as {typed(names, [flag + equals + value])}" if names and flag[:1] == "-" else ""
            raise UserError(_unknown_message(f"--{name}" if flag[:2] == "--" else flag, known, prefix="--") + also)
        spec = flags[name]
        own = [value] if equals else []
        most = len(rest) if spec.many else 1 - len(own)
        while rest and len(own) - bool(equals) < most and _is_value(rest[0], spec, flags):
            own.append(rest.pop(0))
        if not own and spec.kind is bool:  # a bare flag is true
            own = ["true"]
        if not own and not spec.many:
            raise UserError(f"argument --{name}: expected one argument; --help lists the settings")
        found[name], names = own, name if spec.takes_names else ""
    return found


_NEGATIVE = re.compile(r"-\d+|-\d*\.\d+")


def _is_value(word: str, spec: Spec, flags: Iterable[str]) -> bool:
    """Says whether a word behind a flag belongs to it, although it may begin with a dash."""
    if not word.startswith("-") or word == "-" or _NEGATIVE.fullmatch(word):
        return True
    name = word.partition("=")[0].lstrip("-").replace("-", "_")
    if word.startswith("--"):
        return " " in word and name not in flags
    return " " in word or (spec.takes_names and not any(flag.startswith(name) for flag in (*flags, "help")))


class Layers:
    """The places that the settings of a script come from, in order, as far as they are known.

    Args:
        argv: the flags; None takes those of this process.
        description: what --help says first.
    """

    def __init__(self, cls: type, argv: Sequence[str] | None, *, description: str | None) -> None:
        self._class = cls
        self._layers = read_command_line(cls, argv, description=description)

    @property
    def settings(self) -> Any:
        """The settings as they are by now; what is stored is often found by one of them."""
        return resolve(self._class, self._layers).settings

    def gives(self, name: str) -> bool:
        """Says whether one of the places that are known by now gives this setting."""
        return any(name in layer.values for layer in self._layers)

    def add(self, source: str, values: Mapping[str, Any], *, only_about_cache: bool = False) -> None:
        """Adds values that were stored earlier, below all that were added before; see `stored_layer`."""
        self._layers.append(stored_layer(self._class, source, values, only_about_cache=only_about_cache))

    def resolve(self) -> Resolved:
        """Puts the layers together, and prints which settings differ from their defaults and where they come from."""
        found = resolve(self._class, self._layers)
        places = [layer.place for layer in self._layers if layer.place]
        for line in [*found.changes(), *places, *found.places()]:
            say(line)
        return found


def read_file(cls: type, path: str) -> Layer:
    """Reads the settings of one script from a YAML file.

    One file may serve several scripts: a key of another script is checked and then left alone.
    """
    known = {name: spec for other in CATALOGUE.scripts.values() for name, spec in specs(other).items()}
    values = {}
    named = {name for name, spec in known.items() if spec.by_name}
    asked = _with_home("--config", path, "the command")
    path = mounts.locate(asked)
    place = "" if path == asked else _place_line("config", asked, path)
    for name, texts in _read_pairs(path, named):
        if name in CATALOGUE.gone and texts == [CATALOGUE.gone[name][0]]:
            continue
        if name not in known:
            raise UserError(f"{_unknown_message(name, known)}, in {path}")
        value = parse(name, texts, specs(cls).get(name, known[name]), path)
        if name in specs(cls):
            values[name] = value
    return Layer(f"--config {path}", values, place)


_LARGEST_CONFIG_BYTES = 1 << 20


def _read_pairs(path: str, named: Container[str]) -> list[tuple[str, list[str]]]:
    """Returns (name, words) of each line; the settings in `named` may hold mappings, which give words NAME=NUMBER."""
    yaml = _yaml()
    try:
        text = files.read_whole(path, at_most=_LARGEST_CONFIG_BYTES, follow_link=True).decode()
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        reason = mounts.why_missing("config", path) or getattr(error, "strerror", None) or error
        raise UserError(f"--config {path} cannot be read: {reason}") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"--config {path} is not valid YAML: {' '.join(str(error).split())}") from error
    if root is None:
        return []
    if not isinstance(root, yaml.MappingNode) or not all(isinstance(key, yaml.ScalarNode) for key, _ in root.value):
        raise UserError(f"--config {path} must hold lines of the form 'name: value'")
    pairs = [(key.value, _node_words(key.value, node, path, key.value in named)) for key, node in root.value]
    for name, count in Counter(name for name, _ in pairs).items():
        if count > 1:
            raise UserError(f"{name} stands {count} times in {path}")
    return pairs


def _yaml() -> Any:
    """Imports PyYAML when it is needed; raises UserError, with the command that installs it, when it is missing."""
    try:
        import yaml
    except ImportError as error:
        raise missing_package(error) from error
    return yaml


def _node_words(name: str, node: "yaml.Node", path: str, may_map: bool) -> list[str]:
    yaml = _yaml()
    words = []
    for item in node.value if isinstance(node, yaml.SequenceNode) else [node]:
        pairs = item.value if may_map and isinstance(item, yaml.MappingNode) else [(item,)]
        if not all(isinstance(part, yaml.ScalarNode) for pair in pairs for part in pair):
            form = (
                "a value, a list of values or lines of the form 'name: value'"
                if may_map
                else "a value or a list of values"
            )
            raise UserError(f"{name} in {path} (line {node.start_mark.line + 1}) must be {form}")
        words += ["=".join(part.value for part in pair) for pair in pairs]
    return words


def _unknown_message(name: str, known: Iterable[str], prefix: str = "") -> str:
    plain, known = name.lstrip("-").replace("-", "_"), list(known)
    if plain in CATALOGUE.gone:
        return f"there is no setting {name} any more; {CATALOGUE.gone[plain][1]}"
    near = [other for other in (CATALOGUE.other_names.get(plain),) if other in known]
    near += difflib.get_close_matches(plain, known, n=1, cutoff=0.8)
    near += [other for other in known if f"_{plain}_" in f"_{other}_"]  # a part of a name, in whole words
    near += difflib.get_close_matches(plain, known, n=1)
    elsewhere = [script for script, cls in CATALOGUE.scripts.items() if plain in specs(cls)]
    if near:
        hint = f"did you mean {prefix}{near[0]}?"
    elif elsewhere:
        hint = f"it is one of {' and '.join(elsewhere)}"
    else:
        hint = "--help lists the settings"
    return f"there is no setting {name}; {hint}"


class _HelpPrinter(argparse.ArgumentParser):
    def _print_message(self, message: str, file: Any = None) -> None:
        with suppress(OSError):  # a pipe that nobody reads, of which Python 3.11.2 makes an error
            super()._print_message(harmless(message), file)


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=110)


def _help_parser(cls: type, description: str | None, *, all_settings: bool = True) -> argparse.ArgumentParser:
    known = specs(cls)
    if not all_settings:
        known = {name: known[name] for name in getattr(cls, "EVERYDAY", known)}
    notes = ["* may change when a run goes on."] if can_resume(cls) else []
    notes += ["--help all lists the other settings."] if len(known) < len(specs(cls)) else []
    parser = _HelpPrinter(
        description=description,
        add_help=False,
        formatter_class=_HelpFormatter,
        usage="%(prog)s [--config FILE] [--SETTING VALUE ...]",
        epilog=" ".join([*notes, "docs/settings.md says more of each."]),
    )
    parser.add_argument("-h", "--help", nargs="?", metavar="all", help="show the settings that people change, or all")
    parser.add_argument("--config", metavar="FILE", help=_CONFIG.help)
    order = dict.fromkeys(known[name].group for name in by_group(cls) if name in known)
    groups = {group: parser.add_argument_group(group) for group in order}
    for name, spec in known.items():
        group = groups[spec.group]
        words: dict[str, Any] = {"nargs": "*"} if spec.many else {}
        if spec.kind is bool:  # a bare flag is true
            words = {"nargs": "?", "const": "true"}
        group.add_argument(f"--{name}", metavar=metavar(spec), help=_help(cls, name, spec), **words)
    return parser


def by_group(cls: type) -> list[str]:
    """Lists the settings of one script in the order of their groups; groups of its own come last."""
    known = specs(cls)
    order = list(dict.fromkeys([*CATALOGUE.groups, *(spec.group for spec in known.values())]))
    return sorted(known, key=lambda name: order.index(known[name].group))


def can_resume(cls: type) -> bool:
    """Says whether a script goes on with a run, which keeps its settings but for the free ones."""
    return "resume_from" in specs(cls)


def metavar(spec: Spec) -> str:
    """Names what a setting takes, such as STEPS|auto or cosine|linear."""
    kind = spec.unit.upper() or ("PATH" if spec.path else _METAVARS[spec.kind])
    named = (f"NAME={kind}",) if spec.by_name else ()
    return "|".join(spec.choices or (kind, *named, *spec.words))


_METAVARS = {int: "INT", float: "NUMBER", bool: "true|false", str: "TEXT"}


def _help(cls: type, name: str, spec: Spec) -> str:
    mark = " *" if spec.free and can_resume(cls) else ""
    return f"{spec.help} (default: {show(defaults(cls)[name])}){mark}".replace("%", "%%")


def to_dict(settings: Any) -> dict[str, Any]:
    """Returns the settings that are stored as plain values for JSON or YAML, paths made absolute."""
    plain = {}
    for name, spec in specs(type(settings)).items():
        if not spec.stored:
            continue
        value = getattr(settings, name)
        if isinstance(value, tuple):
            plain[name] = [absolute_path(item) for item in value] if spec.path else list(value)
        else:
            plain[name] = absolute_path(value) if spec.path and value is not None else value
    return plain


def absolute_path(text: str) -> str:
    """Makes a path absolute, leaving alone what looks like a hub id (`owner/name`, not on disk)."""
    path = Path(text).expanduser()
    return str(path.absolute()) if path.exists() or path.is_absolute() or text.startswith(".") else text


def same_path(one: Any, other: Any) -> bool:
    """Says whether two paths lead to one file or folder, which each layout of Kaggle has at a place of its own.

    What a damaged file holds in the place of a path leads nowhere, and is the same as nothing but itself.
    """
    try:
        first, second = (os.path.realpath(absolute_path(mounts.locate(path))) for path in (one, other))
    except (TypeError, ValueError, RuntimeError, OSError):
        return one == other
    return first == second


def to_yaml(settings: Any) -> str:
    """Returns the settings as a YAML text that is itself a valid --config file."""
    plain = to_dict(settings)
    text = _as_yaml(plain, allow_unicode=True)
    return text if harmless(text) == text else _as_yaml(plain, allow_unicode=False)


def _as_yaml(plain: Mapping[str, Any], *, allow_unicode: bool) -> str:
    return _yaml().safe_dump(plain, sort_keys=False, default_flow_style=None, allow_unicode=allow_unicode)


def is_flag(sources: Mapping[str, str], name: str) -> bool:
    """Says whether the user typed this setting, rather than gave it in a file."""
    return sources[name] == _FLAG


def is_explicit(sources: Mapping[str, str], name: str) -> bool:
    """Says whether the user gave this setting in a flag or a --config file."""
    return sources[name].startswith((_FLAG, "--config "))
