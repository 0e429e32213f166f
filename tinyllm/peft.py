"""The files of PEFT, Hugging Face's library of adapters: a folder with adapter_config.json, which says where
adapters stand and how large they are, and adapter_model.safetensors, which holds A and B of each.

Modules go by their published names, and are chosen by how these end: "c_attn" is h.0.attn.c_attn,
h.1.attn.c_attn and so on. Their tensors are base_model.model.NAME.lora_A.weight (r, n) and .lora_B.weight
(m, r).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from tinyllm.errors import InputError
from tinyllm.files import ArrayFile, array_writer, json_writer, listing, read_json, write_files
from tinyllm.pretrained import Weights, check_options, check_types

CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
BIASES = ("none", "all", "lora_only")
# A tensor that two modules hold is written twice: its second name -> its first. BERT's head has such a bias.
TWICE = {"cls.predictions.decoder.bias": "cls.predictions.bias"}
# What may stand in the names of tensors of modules_to_save; the last with the name of the adapter.
WRAPPERS = ("original_module", "modules_to_save", r"modules_to_save\.[^.]+")

# Options that say nothing about what an adapter computes, or only something beside one that is off.
HARMLESS = frozenset(
    ("auto_mapping", "revision", "inference_mode", "peft_version", "fan_in_fan_out", "megatron_core")
    + ("qalora_group_size",)
)
# init_lora_weights: the initializations that leave the base model as it is.
ONLY = {"peft_type": ("LORA",), "init_lora_weights": (True, False, "gaussian", "orthogonal")}
OFF = (None, False, "", [], {})  # values at which a later version's option asks for nothing


@dataclass(frozen=True)
class LoRAConfig:
    """The options of an adapter_config.json, by PEFT's names."""

    r: int
    lora_alpha: float
    target_modules: str | list[str]  # ends of published names of modules; or a pattern of whole names
    lora_dropout: float = 0.0  # of what A reads
    use_rslora: bool = False
    bias: str = "none"  # which biases of the model learn too: see BIASES
    modules_to_save: list[str] | None = None  # ends of names of modules that learn as a whole
    rank_pattern: dict[str, int] = field(default_factory=dict)  # pattern of ends of names -> r there
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    task_type: str | None = None  # PEFT's word for what the model is for
    base_model_name_or_path: str | None = None

    def __post_init__(self) -> None:
        check_options(
            self, whole="r", above_zero="lora_alpha", probabilities="lora_dropout", flags="use_rslora"
        )
        is_list = lambda value: isinstance(value, list) and value and all(type(v) is str and v for v in value)
        is_rank = lambda value: type(value) is int and value >= 1
        is_alpha = lambda value: type(value) in (int, float) and 0 < value < math.inf
        targets, whole = self.target_modules, self.modules_to_save
        checks = [
            ("bias", self.bias in BIASES, ", ".join(BIASES)),
            ("target_modules", is_list(targets) or type(targets) is str, "a list of names, or a pattern"),
            ("modules_to_save", whole is None or is_list(whole), "a list of names, or null"),
            ("rank_pattern", _all(self.rank_pattern, is_rank), "pattern: whole number of 1 or more, ..."),
            ("alpha_pattern", _all(self.alpha_pattern, is_alpha), "pattern: number above 0, ..."),
        ]
        for name, fits, words in checks:
            if not fits:
                raise InputError(f"{name} is {getattr(self, name)!r}, but must be {words}")
        for pattern in [
            *self.rank_pattern,
            *self.alpha_pattern,
            *([targets] if type(targets) is str else []),
        ]:
            try:
                re.compile(pattern)
            except re.error as error:
                raise InputError(f"{pattern!r} is no regular expression: {error}") from None

    @classmethod
    def from_published(cls, options: Mapping[str, Any]) -> LoRAConfig:
        """From the contents of an adapter_config.json.

        An option that we do not know passes only where it is off: null, false or empty.

        Raises:
            InputError: an option that we do not implement, that is missing, or that cannot be.
        """
        names = {each.name for each in fields(cls)}
        implemented = lambda name, value: (
            _is_one_of(value, ONLY[name])
            if name in ONLY
            else name in names or name in HARMLESS or _is_one_of(value, OFF)
        )
        if wrong := [f"{n} = {value!r}" for n, value in options.items() if not implemented(n, value)]:
            raise InputError(f"not implemented here: {', '.join(wrong[:4])}")
        if missing := {"peft_type", "r", "lora_alpha", "target_modules"} - options.keys():
            raise InputError(f"it lacks {', '.join(sorted(missing))}")
        given = {name: value for name, value in options.items() if name in names}
        for name in ("rank_pattern", "alpha_pattern"):
            given[name] = given.get(name) or {}
        check_types(given, cls)
        return cls(**given)

    def to_published(self, fan_in_fan_out: bool) -> dict[str, Any]:
        """The options for an adapter_config.json; fan_in_fan_out: the base's file has W as (n, m)."""
        fixed = {"peft_type": "LORA", "inference_mode": True, "init_lora_weights": True}
        return {**fixed, "fan_in_fan_out": fan_in_fan_out, **asdict(self)}

    def targets(self, module: str) -> bool:
        """Whether the map of that published name gets an adapter."""
        if self.saves(module):
            return False
        if isinstance(self.target_modules, str):
            return re.fullmatch(self.target_modules, module) is not None
        return any(ends(module, ending) for ending in self.target_modules)

    def saves(self, module: str) -> bool:
        """Whether the module of that published name, or one that holds it, learns as a whole."""
        return any(_within(module, ending) for ending in self.modules_to_save or ())

    def rank(self, module: str) -> int:
        """r of the map of that published name."""
        return _first(self.rank_pattern, module, self.r)

    def scale(self, module: str) -> float:
        """alpha / r of the map of that published name; alpha / sqrt(r) in rsLoRA."""
        r, alpha = self.rank(module), _first(self.alpha_pattern, module, self.lora_alpha)
        return alpha / math.sqrt(r) if self.use_rslora else alpha / r

    def check_used(self, adapted: list[str], maps: list[str], modules: list[str]) -> None:
        """Raise InputError for a name or pattern that fits nothing, a slip of whoever knows the model.

        The published names of the maps that get adapters, of all linear maps, and of all modules.
        """
        of_list = [] if isinstance(self.target_modules, str) else self.target_modules
        match = lambda module, pattern: _first({pattern: True}, module, False)
        for option, names, known, fits in (
            ("target_modules", of_list, maps, ends),
            ("modules_to_save", self.modules_to_save or [], modules, _within),
            ("rank_pattern", self.rank_pattern, adapted, match),
            ("alpha_pattern", self.alpha_pattern, adapted, match),
        ):
            for name in names:
                if not any(fits(one, name) for one in known):
                    raise InputError(f"{option}: {name!r} fits none of {last_words(known)}")


def ends(name: str, ending: str) -> bool:
    """h.0.attn.c_attn ends in c_attn and in attn.c_attn, but not in attn."""
    return f".{name}".endswith(f".{ending}")


def _within(module: str, ending: str) -> bool:
    """Whether the name of the module, or of one that holds it, has this end: h.0.ln_1 is within h.0, ln_1 and
    also _1, for here PEFT compares letters and not whole words."""
    return f"{ending}." in f"{module}."


def last_words(names: Iterable[str]) -> str:
    """The different last parts of names, for an error message."""
    return ", ".join(list(dict.fromkeys(name.rpartition(".")[2] for name in names))[:12])


def _is_one_of(value: Any, known: Iterable[Any]) -> bool:
    """By value and type: 0 is not False."""
    return any(value == one and type(value) is type(one) for one in known)


def _all(patterns: Any, fits: Callable[[Any], bool]) -> bool:
    return isinstance(patterns, dict) and all(type(p) is str and fits(v) for p, v in patterns.items())


def _first(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    """What stands beside the first pattern that an end of the name matches."""
    for pattern, value in patterns.items():
        if re.fullmatch(rf"(.*\.)?({pattern})", name):
            return value
    return default


def write(folder: str | Path, config: dict[str, Any], tensors: Mapping[str, np.ndarray]) -> None:
    """Write both files, whole or not at all."""
    again = {second: tensors[first] for second, first in TWICE.items() if first in tensors}
    arrays = {PREFIX + name: array for name, array in {**tensors, **again}.items()}
    write_files(folder, {WEIGHTS: array_writer(arrays, {"format": "pt"}), CONFIG: json_writer(config)})


def read_config(folder: Path) -> LoRAConfig:
    """The options in `folder`; InputError if a file is missing or damaged, or asks for what we have not."""
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise InputError(f"{folder} has no {name}, so there is no adapter to load: {listing(folder)}")
    options = read_json(folder / CONFIG)
    try:
        return LoRAConfig.from_published(options)
    except InputError as error:
        raise InputError(f"{folder / CONFIG} cannot be used: {error}") from None


def read_weights(folder: Path, dtype: Any, rename: Callable[[str], str]) -> Weights:
    """The tensors in `folder` under the names rename(name without the prefix), each once.

    With bias "all" PEFT writes the biases of modules_to_save again, as those of its wrappers.

    Raises:
        InputError: a file that is damaged, or that has two values for one tensor.
    """
    file = ArrayFile(folder / WEIGHTS)
    plain = lambda name: {re.sub(rf"\.{wrapper}\.", ".", name) for wrapper in WRAPPERS} - {name}
    places = {name: (file, name) for name in file if not any(other in file for other in plain(name))}
    for second, first in ((PREFIX + second, PREFIX + first) for second, first in TWICE.items()):
        if first in places and places.pop(second, None):
            if not np.array_equal(file[first], file[second]):
                raise InputError(
                    f"{file.path} has two values for one tensor of the model, {first} and {second}"
                )
    weights = Weights(folder, places, np.dtype(dtype))
    return weights.renamed(lambda name: rename(name.removeprefix(PREFIX)))


def check_fits(weights: Weights, shapes: Mapping[str, tuple[int, ...]], model: str, base: str | None) -> None:
    """Raise one InputError unless the tensors are those of `shapes`, all that the model needs of an adapter.

    base: the name of the model that it was made for, where it says so.
    """
    found = weights.shapes
    wrong = [f"{name!r} is missing" for name in shapes if name not in found]
    wrong += [f"{name!r} is left over" for name in found if name not in shapes]
    wrong += [
        f"{name!r} is {tuple(found[name])} where {tuple(shape)} fits"
        for name, shape in shapes.items()
        if tuple(found.get(name, shape)) != tuple(shape)
    ]
    if wrong:
        more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        made = f", it was made for {base!r}" if base else ""
        raise InputError(
            f"the adapter in {weights.folder} does not fit this {model}{made}: {'; '.join(wrong[:4])}{more}"
        )
