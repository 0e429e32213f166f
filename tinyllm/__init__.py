"""Language models built from autograd."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tinyllm import models
from tinyllm.checkpoints import resolve
from tinyllm.errors import InputError
from tinyllm.pretrained import read_config

__all__ = ["InputError", "fetched", "from_pretrained", "models"]

_MODELS = {
    cls.model_type: cls
    for cls in (
        models.BERT,
        models.Bigram,
        models.GPT1,
        models.GPT2,
        models.GPT3,
        models.LLaMA,
        models.Mistral,
        models.RWKV,
        models.Transformer,
    )
}


def from_pretrained(folder_or_hub_name: str | Path, dtype: Any = np.float32) -> Any:
    """The model in a folder, of the class that its config.json names.

    The folder holds published weights or a training run. A name such as "openai-community/gpt2" that is no
    folder is fetched by huggingface_hub, the extra `hub`.

    Raises:
        InputError: saying what is missing, damaged or not implemented.
    """
    folder = resolve(fetched(folder_or_hub_name))
    model_type = read_config(folder).get("model_type")
    if model_type not in _MODELS:
        known = ", ".join(sorted(_MODELS))
        raise InputError(f"{folder} holds a model of type {model_type!r}, which is not one of ours: {known}")
    return _MODELS[model_type].from_pretrained(folder, dtype)


def fetched(name: str | Path) -> Path:
    """The folder of that name, or the files of that name from the hub."""
    is_hub_name = isinstance(name, str) and 0 < len(name.split("/")) <= 2 and not name.startswith((".", "/"))
    if Path(name).exists() or not is_hub_name:
        return Path(name)
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.utils import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError:
        raise InputError(
            f'there is no folder {name}; to fetch a model of that name: pip install -e ".[hub]"'
        ) from None
    try:
        files = ["config.json", "generation_config.json", "model*.safetensors*", "vocab.json", "merges.txt"]
        files += ["tokenizer*", "vocab.txt", "special_tokens_map.json", "added_tokens.json", "*.jinja"]
        files += ["modules.json", "*/config.json", "*sentence*.json"]  # of sentence-transformers
        return Path(snapshot_download(name, allow_patterns=files))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"there is no folder {name}, and the hub did not give it: {reason}") from None
