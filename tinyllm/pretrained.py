"""Published weights: a folder with config.json and model.safetensors, as Hugging Face transformers writes it.

Large models are cut into shards, model-00001-of-00002.safetensors and so on, and
model.safetensors.index.json says which shard holds which tensor: {"weight_map": {name: shard}}.
"""

import math
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from tinyllm.errors import InputError
from tinyllm.files import ArrayFile, array_writer, disk_errors, json_writer, listing, read_json, write_files

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
FLOATS = {np.dtype(dtype) for dtype in (np.float16, ml_dtypes.bfloat16, np.float32, np.float64)}
PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}

# Options of any model that say nothing about what it computes: where it comes from, its labels, its special
# tokens, how transformers runs it, and the defaults of generation that old versions kept in config.json.
HARMLESS = frozenset(
    """
    architectures transformers_version _name_or_path dtype torch_dtype task_specific_params finetuning_task
    id2label label2id num_labels _num_labels problem_type tokenizer_class
    bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id decoder_start_token_id
    use_cache output_past output_attentions output_hidden_states return_dict chunk_size_feed_forward
    torchscript use_bfloat16 tf_legacy_loss gradient_checkpointing
    attn_implementation _attn_implementation _attn_implementation_autoset
    summary_activation summary_first_dropout summary_proj_to_labels summary_type summary_use_proj
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature
    top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size
    bad_words_ids num_return_sequences output_scores return_dict_in_generate forced_bos_token_id
    forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens
    begin_suppress_tokens prefix
""".split()
)
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "unk_token_id")
# Options that any config may carry and that change nothing at these values; a model may allow others.
HARMLESS_AT: dict[str, Collection[Any]] = {
    "is_decoder": (False,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "tie_encoder_decoder": (False,),
    "pruned_heads": ({}, None),
    "quantization_config": (None,),
}


def read_config(folder: str | Path) -> dict[str, Any]:
    """The options in `folder`/config.json; InputError if the file is missing or damaged."""
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise _missing(folder, CONFIG)
    config = read_json(folder / CONFIG)
    if not isinstance(config.get("model_type"), (str, type(None))):
        raise InputError(f"{folder / CONFIG} has the model_type {config['model_type']!r}, which is no name")
    return config


def refuse_unknown(
    config: Mapping[str, Any], read: Collection[str] = (), only: Mapping[str, Collection[Any]] | None = None
) -> None:
    """Refuse every option of `config` that the model would otherwise silently ignore.

    `read`: options that the model follows, whatever their value. `only`: option -> the values the model
    implements. Beside these pass HARMLESS options and HARMLESS_AT values. An option left out is no matter.

    Raises InputError naming all options that are unknown or at a value not implemented.
    """
    allowed = {**HARMLESS_AT, **(only or {})}
    wrong = []
    for option, value in config.items():
        if option in read:
            continue
        if option in allowed:
            # 1 is no True here, though Python's 1 == True.
            if not any(
                value == good and isinstance(value, bool) == isinstance(good, bool)
                for good in allowed[option]
            ):
                values = " or ".join(map(repr, allowed[option]))
                wrong.append(f"{option} = {value!r} (implemented: {values})")
        elif option not in HARMLESS:
            wrong.append(f"{option} = {value!r} (unknown)")
    if wrong:
        raise InputError(f"config.json asks for what this model does not implement: {_some(wrong)}")


def check_types(config: Mapping[str, Any], config_class: Any) -> None:
    """Check that each number of `config` is of the type that config_class, a dataclass, gives to that option.

    A whole number is no boolean, has no fraction and fits 64 bits; a real number is finite.
    Raises InputError.
    """
    for field in fields(config_class):
        if field.name not in config:
            continue
        value, names = config[field.name], str(field.type).split(" | ")
        kinds = [_KINDS[name] for name in names if name in _KINDS]
        if len(kinds) == len(names) and not any(fits(value) for _, fits in kinds):
            words = " or ".join(word for word, _ in kinds)
            raise InputError(f"{field.name} is {value!r}, but must be {words}")


_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "int": ("a whole number", lambda value: type(value) is int and abs(value) < 2**63),
    "float": ("a finite number", lambda value: type(value) in (int, float) and abs(value) <= _LARGEST),
    "bool": ("true or false", lambda value: type(value) is bool),
    "str": ("a text", lambda value: type(value) is str),
    "None": ("null", lambda value: value is None),
}
_LARGEST = sys.float_info.max


def check_options(
    config: Any, whole: str = "", above_zero: str = "", probabilities: str = "", flags: str = ""
) -> None:
    """Check these options of a config, a dataclass; each argument is names with blanks between them.

    Null passes where an option's type says `| None`.

    Raises InputError for the first that is something else.
    """
    is_real = lambda value: type(value) in (int, float)
    kinds = [
        (whole, "a whole number of 1 or more", lambda value: type(value) is int and value >= 1),
        (above_zero, "a number above 0", lambda value: is_real(value) and 0 < value < math.inf),
        (probabilities, "a probability below 1", lambda value: is_real(value) and 0 <= value < 1),
        (flags, "true or false", lambda value: type(value) is bool),
    ]
    types = {field.name: str(field.type) for field in fields(config)}
    for names, words, fits in kinds:
        for name in names.split():
            value, optional = getattr(config, name), types[name].endswith("| None")
            if not (fits(value) or (optional and value is None)):
                raise InputError(f"{name} is {value!r}, but must be {words}{', or null' * optional}")


class Weights(Mapping[str, np.ndarray]):
    """Published name -> array, read from the disk when asked for; floating point arrays come as `dtype`.

    `shapes` tells name -> shape without reading. Nothing is kept here: asked twice, it reads twice.
    """

    def __init__(self, folder: Path, places: Mapping[str, tuple[ArrayFile, str]], dtype: np.dtype) -> None:
        self.folder, self.dtype, self._places = folder, dtype, dict(places)
        self.shapes = {name: file.shapes[stored] for name, (file, stored) in self._places.items()}

    def renamed(self, rename: Callable[[str], str]) -> "Weights":
        """The same arrays under the names rename(name), for files that use older names."""
        places = {rename(name): place for name, place in self._places.items()}
        if len(places) < len(self):
            raise InputError(f"weights in {self.folder} hold the same tensor under an old and a new name")
        return Weights(self.folder, places, self.dtype)

    def __getitem__(self, name: str) -> np.ndarray:
        file, stored = self._places[name]
        return file.read(stored, self.dtype if file.dtypes[stored] in FLOATS else None)

    def read(self, name: str, out: np.ndarray) -> np.ndarray:
        """The real numbers of that name written into `out`, of their shape; InputError if they are others."""
        file, stored = self._places[name]
        if file.dtypes[stored] not in FLOATS:
            raise InputError(f"{name} in {self.folder} holds {file.dtypes[stored]}, not real numbers")
        return file.read(stored, out=out)

    def holds(self, name: str, array: np.ndarray) -> bool:
        """Whether the tensor of that name is the array, in the array's precision; reads no copy of it."""
        file, stored = self._places[name]
        return file.shapes[stored] == array.shape and file.holds(stored, array)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def read_weights(folder: str | Path, dtype: Any = np.float32) -> Weights:
    """The arrays in `folder`: from model.safetensors or, without it, from the shards that the index names.

    Raises InputError for missing or damaged files, and for folders that hold only pickled weights.
    """
    folder = Path(folder)
    if (folder / WEIGHTS).is_file():
        file = ArrayFile(folder / WEIGHTS)
        places = {name: (file, name) for name in file}
    elif (folder / INDEX).is_file():
        places = _shards(folder)
    else:
        raise _missing(folder, f"{WEIGHTS} or {INDEX}")
    return Weights(folder, places, np.dtype(dtype))


def write_weights(
    folder: str | Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write a folder that transformers reads: config.json, and the tensors in one file or in shards.

    All files are on the disk before the first takes the place of an older one.
    """
    shards: list[list[str]] = [[]]
    filled = 0
    for name, tensor in tensors.items():
        if shards[-1] and filled + tensor.nbytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += tensor.nbytes
    names = (
        [WEIGHTS]
        if len(shards) == 1
        else [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    )
    writers = {
        name: array_writer({key: tensors[key] for key in keys}, {"format": "pt"})
        for name, keys in zip(names, shards)
    }
    if len(shards) > 1:
        total = sum(tensor.nbytes for tensor in tensors.values())
        weight_map = {key: name for name, keys in zip(names, shards) for key in keys}
        writers[INDEX] = json_writer({"metadata": {"total_size": total}, "weight_map": weight_map})
    write_files(folder, writers | {CONFIG: json_writer(config)})
    with disk_errors(Path(folder)):  # what an earlier save of another size left would be read instead
        for old in Path(folder).iterdir():
            ours = re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?", old.name)
            if ours and old.name not in writers:
                old.unlink()


def match(weights: Weights, shapes: Mapping[str, tuple[int, ...]], ignore: str = "") -> None:
    """Check that `weights` has exactly the tensors of `shapes` (published name -> shape).

    `ignore`: a regular expression; tensors left over whose whole name it matches are no error.
    Raises one InputError that names what is missing, left over or misshapen.
    """
    missing = [name for name in shapes if name not in weights.shapes]
    left_over = [
        name for name in weights if name not in shapes and not (ignore and re.fullmatch(ignore, name))
    ]
    misshapen = [
        f"{name} found {weights.shapes[name]} expected {tuple(shape)}"
        for name, shape in shapes.items()
        if weights.shapes.get(name, tuple(shape)) != tuple(shape)
    ]
    found = {"missing": missing, "left over": left_over, "misshapen": misshapen}
    wrong = "; ".join(f"{len(names)} {what} ({_some(names)})" for what, names in found.items() if names)
    if wrong:
        raise InputError(f"the weights in {weights.folder} do not fit the model in its config.json: {wrong}")


def _shards(folder: Path) -> dict[str, tuple[ArrayFile, str]]:
    """name -> (shard, name) for all that the shards hold; whatever the index names must be there."""
    index = read_json(folder / INDEX).get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(shard, str) for shard in index.values()):
        raise InputError(f"{folder / INDEX} is damaged, it has no weight_map from tensors to files")
    files = {}
    for shard in sorted(set(index.values())):
        if Path(shard).name != shard or not (folder / shard).is_file():
            raise InputError(f"{folder} lacks {shard!r}, which {INDEX} names: {listing(folder)}")
        files[shard] = ArrayFile(folder / shard)
    lost = [f"{name} in {shard}" for name, shard in index.items() if name not in files[shard].shapes]
    if lost:
        raise InputError(f"{folder / INDEX} names tensors that its shards do not hold: {_some(lost)}")
    held = {name: (file, name) for file in files.values() for name in file}
    return held | {name: (files[shard], name) for name, shard in index.items()}


def _missing(folder: Path, wanted: str) -> InputError:
    message = f"{folder} has no {wanted}: {listing(folder)}"
    if folder.is_dir() and any(path.suffix in PICKLES for path in folder.iterdir()):
        message += (
            "; pickled weights are refused, for they can run any code: load them with transformers "
            "and write them again with model.save_pretrained(folder, safe_serialization=True)"
        )
    return InputError(message)


def _some(names: list[str]) -> str:
    """The first few of `names`, on one line whatever is in them; the last word says if there are more."""
    shown = [name[:200] if name.isprintable() else repr(name[:200]) for name in names[:4]]
    return ", ".join(shown) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
