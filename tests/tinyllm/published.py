"""Small tokenizers built as the published ones are. Importing this skips where the libraries are not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

tokenizers = pytest.importorskip("tokenizers", reason="the extra `tokenizers` is not installed")
pytest.importorskip("jinja2", reason="the extra `tokenizers` is not installed")
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors  # noqa: E402
from tokenizers.trainers import BpeTrainer, WordPieceTrainer  # noqa: E402

PROSE = ["The class statement's body is executed in a new execution frame, isn't it? 2024: naïve café."] * 20
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]

# Built as the published ones are. Each gives (library, names that tokenizer_config.json gives to roles).


def llama3() -> tuple[Tokenizer, dict]:
    """Byte-level BPE that prefers whole words, specials behind the others, one of them before a text."""
    library = Tokenizer(models.BPE(ignore_merges=True))
    words = tokenizers.Regex(
        r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+(?!\S)|\s+"
    )
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    library.train_from_iterator(
        PROSE, BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    )
    names = ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>"]
    library.add_special_tokens(names)
    library.add_tokens([AddedToken("<tool>", normalized=False)])  # no special one: always found
    first = (names[0], library.token_to_id(names[0]))
    library.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single=f"{names[0]} $A", special_tokens=[first]),
        ]
    )
    return library, {"bos_token": names[0], "eos_token": {"__type": "AddedToken", "content": names[1]}}


def llama2(new: bool = False) -> tuple[Tokenizer, dict]:
    """Blanks are ▁ and one is put before a text; what has no token is spelt in bytes."""
    library = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    if new:
        library.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    else:
        library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    library.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *BYTES]
    prose = [word for text in PROSE for word in text.split(" ")]
    library.train_from_iterator(
        prose, BpeTrainer(vocab_size=330, special_tokens=special, show_progress=False)
    )
    pipeline = json.loads(library.to_str())
    pipeline["added_tokens"] = pipeline["added_tokens"][:3]  # the bytes are no special tokens
    library = Tokenizer.from_str(json.dumps(pipeline))
    library.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return library, {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}


def bert() -> tuple[Tokenizer, dict]:
    library = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    library.normalizer = normalizers.BertNormalizer()
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    library.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    library.train_from_iterator(
        PROSE, WordPieceTrainer(vocab_size=90, special_tokens=special, show_progress=False)
    )
    library.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return library, {f"{role}_token": f"[{role.upper()}]" for role in ("pad", "unk", "cls", "sep", "mask")}


def gpt1() -> tuple[Tokenizer, dict]:
    """Lower case; a token that ends a word says so, and so there are no blanks."""
    library = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    library.normalizer = normalizers.BertNormalizer()
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    library.decoder = decoders.BPEDecoder("</w>")
    trainer = BpeTrainer(
        vocab_size=90, special_tokens=["<unk>"], end_of_word_suffix="</w>", show_progress=False
    )
    library.train_from_iterator(PROSE, trainer)
    return library, {"unk_token": "<unk>"}


def rwkv() -> tuple[Tokenizer, dict]:
    """GPT-NeoX's: GPT-2's words, NFC first, one special token at 0 and runs of blanks behind the others."""
    library = Tokenizer(models.BPE())
    library.normalizer = normalizers.NFC()
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(
        vocab_size=290, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    library.train_from_iterator(PROSE, trainer)
    library.add_tokens([AddedToken(" " * n, normalized=True) for n in (4, 3, 2)])
    return library, {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}


LIBRARIES = {
    "llama3": llama3(), "llama2": llama2(), "llama2 new": llama2(new=True), "bert": bert(), "gpt1": gpt1(),
    "rwkv": rwkv(),
}  # fmt: skip


def write(folder: Path, name: str, **settings: Any) -> Path:
    library, names = LIBRARIES[name]
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(library.to_str(), encoding="utf-8")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **names, **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def one_line(error: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(error.value) and len(str(error.value)) < 600
    return str(error.value)
