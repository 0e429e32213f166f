"""Tokenizers of published models: tokenizer.json, and BERT's vocab.txt.

A tokenizer.json describes steps that Hugging Face's library `tokenizers` (the extra of that name) runs: find
special tokens, normalize the text between them, cut it into words and each word into tokens (BPE, WordPiece
or Unigram), frame the whole with special tokens such as <s>. Not every tokenizer decodes token by token:
LLaMA's drops the blank at the start of a text, BERT's puts one between any two words.
"""

from __future__ import annotations

import json
import operator
import os
import re
import secrets
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from tinyllm.chat_templates import INSTALL, ChatTemplate, Messages, find_template, plain
from tinyllm.errors import InputError
from tinyllm.files import read_json, write_files

PIPELINE, WORDPIECE, SETTINGS = "tokenizer.json", "vocab.txt", "tokenizer_config.json"
TEMPLATE, GENERATION = "chat_template.jinja", "generation_config.json"
FILES = (PIPELINE, WORDPIECE, SETTINGS, "special_tokens_map.json", TEMPLATE, GENERATION)
BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # the name of a token for one byte, in a vocabulary of texts
BEGIN, END = "\ufdd0", "\ufdd1"  # around special tokens in what users say; Unicode keeps both for inner use


class PublishedTokenizer:
    """The tokenizer in a folder, run by the library `tokenizers`.

    All ids are below vocabulary_size; there may be gaps. special_tokens: {name: id}; end_of_text: the id of
    the eos_token in tokenizer_config.json; byte_tokens: ids of single bytes, whose text depends on their
    neighbours; chat: the ChatTemplate, or None.

    Raises InputError for what is missing or damaged, and where the library is not installed.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._files = {name: _read(self.folder / name) for name in FILES if (self.folder / name).is_file()}
        self._source = PIPELINE if PIPELINE in self._files else WORDPIECE
        settings = {}
        for name in ("special_tokens_map.json", SETTINGS):
            settings |= read_json(self.folder / name) if name in self._files else {}
        with self._guard("be read"), _quiet():
            build = _pipeline if self._source == PIPELINE else _wordpiece
            self._library = build(_import_tokenizers(), self._files[self._source], settings)
            self._ids = self._library.get_vocab(with_added_tokens=True)
            self._added = self._library.get_added_tokens_decoder()  # {id: AddedToken}
            if not self._ids:
                raise ValueError("it has no tokens")
            for frame in (False, True):  # what a damaged file does only later, it shall do now
                encoding = self._library.encode("Is it whole? Ö", add_special_tokens=frame)
                self._library.decode(encoding.ids[:1], skip_special_tokens=False)
        self.vocabulary_size = max(self._ids.values()) + 1
        self.special_tokens = {token.content: i for i, token in self._added.items() if token.special}
        self.byte_tokens = frozenset(i for name, i in self._ids.items() if BYTE.fullmatch(name))
        self._lock = threading.Lock()  # whether to find special tokens is a setting of the whole library
        roles = {role: _name(token) for role, token in settings.items() if role.endswith("_token")}
        self._names = {role: name for role, name in roles.items() if name is not None}
        eos = self._names.get("eos_token")
        if eos is not None and eos not in self._ids:
            raise InputError(
                f"{SETTINGS} in {self.folder} says eos_token = {eos!r}, which {self._source} does not have: "
                "they are not of one model"
            )
        self.end_of_text = self._ids.get(eos)
        template = find_template(self._files.get(TEMPLATE), settings, self.folder)
        self.chat = None if template is None else ChatTemplate(template, self._names, self.folder)

    def encode(self, text: str, allow_special: bool = False, frame: bool = True) -> list[int]:
        """Token ids. Text that looks like a special token is ordinary text unless allow_special.

        frame: with what the tokenizer puts around a text, such as <s> before it.
        """
        with self._guard("encode this text"), self._lock:
            self._library.encode_special_tokens = not allow_special
            encoding = self._library.encode(_unicode(text), add_special_tokens=False)
            if not allow_special:
                self._refuse_special(text, encoding.ids)
            return self._library.post_process(encoding, add_special_tokens=frame).ids

    def encode_pair(
        self, first: str, second: str, allow_special: bool = False
    ) -> tuple[list[int], list[int]]:
        """Token ids of two texts with what the tokenizer puts around and between them, and the segment, 0 or
        1, of each."""
        with self._guard("encode this pair"), self._lock:
            self._library.encode_special_tokens = not allow_special
            parts = [
                self._library.encode(_unicode(text), add_special_tokens=False) for text in (first, second)
            ]
            if not allow_special:
                for text, part in zip((first, second), parts):
                    self._refuse_special(text, part.ids)
            pair = self._library.post_process(*parts, add_special_tokens=True)
            return pair.ids, pair.type_ids

    def _refuse_special(self, text: str, ids: Iterable[int]) -> None:
        """A vocabulary of texts may hold the names of special tokens, and then know no other spelling."""
        unknown = self._names.get("unk_token"), getattr(self._library.model, "unk_token", None)
        named = {i: name for name, i in self.special_tokens.items() if name in text and name not in unknown}
        for i in named.keys() & set(ids):
            raise InputError(
                f"the text holds {named[i]!r}, which this tokenizer cannot tell from its special token: "
                "leave it out"
            )

    def decode(self, ids: Iterable[int]) -> str:
        """Text, special tokens by their names. InputError for an id outside the vocabulary."""
        ids = checked_ids(ids, self.vocabulary_size)
        with self._guard("decode these tokens"):
            return self._library.decode(ids, skip_special_tokens=False)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The text's UTF-8."""
        return self.decode(ids).encode()

    def save(self, folder: str | Path) -> None:
        """Write the files that it was read from, byte for byte."""
        write_files(folder, {name: _writer(content) for name, content in self._files.items()})

    def encode_chat(self, messages: Messages, add_generation_prompt: bool = True) -> list[int]:
        """The ids of a conversation as `chat.render` spells it.

        Special tokens are those that the template writes. Where a message holds the name of one it is text,
        so nobody can end their own message and go on as the system.
        """
        if self.chat is None:
            raise InputError(f"{self.folder} has no chat template: write the prompt as the model expects it")
        # Nobody else may use these two characters, else a message could look as if it were marked already.
        messages = _changed(plain(messages), lambda text: re.sub(f"[{BEGIN}{END}]", "", text))
        names = "|".join(map(re.escape, self._control)) or "(?!)"  # which matches nowhere
        marked = _changed(messages, lambda text: re.sub(names, f"{BEGIN}\\g<0>{END}", text))
        if marked == messages:
            text = self.chat.render(messages, add_generation_prompt)
            return self.encode(text, allow_special=True, frame=False)
        text = self.chat.render(marked, add_generation_prompt)
        library, secret, ids = self._disguised
        # One mark is enough: the template may have cut a message short.
        parts = re.compile(f"{BEGIN}({names}){END}?|({names}){END}|({names})|[{BEGIN}{END}]")
        text = parts.sub(lambda found: found[1] or found[2] or secret.get(found[3], ""), text)
        with self._guard("encode this chat"):
            return [ids.get(i, i) for i in library.encode(_unicode(text), add_special_tokens=False).ids]

    @cached_property
    def _control(self) -> list[str]:
        """What no message may write, the longest first: special tokens, and others that the template uses."""
        added = [(token.content, token.special) for token in self._added.values()]
        used = lambda name: name in self.chat.source and not name.isspace()
        return sorted((name for name, special in added if special or used(name)), key=len, reverse=True)

    @cached_property
    def _disguised(self) -> tuple[Any, dict[str, str], dict[int, int]]:
        """A copy that takes these names for text and has secret names for the tokens: (it, secrets, ids)."""
        tokenizers = _import_tokenizers()
        pipeline = json.loads(self._library.to_str())
        for token in pipeline["added_tokens"]:
            token["special"] = token["content"] in self._control
        library = tokenizers.Tokenizer.from_str(json.dumps(pipeline))
        library.encode_special_tokens = True  # as text
        key, secret, ids = secrets.token_hex(8), {}, {}
        for i, token in self._added.items():
            if token.content in self._control:
                secret[token.content] = name = f"{BEGIN}{key}.{i}{END}"
                sides = {"lstrip": token.lstrip, "rstrip": token.rstrip}
                library.add_tokens([tokenizers.AddedToken(name, normalized=False, **sides)])
                ids[library.token_to_id(name)] = i
        return library, secret, ids

    @contextmanager
    def _guard(self, what: str) -> Iterator[None]:
        """The library raises bare Exceptions, and where its Rust code panics something that is none."""
        try:
            yield
        except (InputError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            reason = " ".join(str(error).split())[:300]
            raise InputError(
                f"{self.folder / self._source} cannot {what} ({reason}): it is damaged, or needs a newer "
                "version of the library tokenizers; copy it again from where it came"
            ) from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Nothing comes out of stderr: Rust code that panics writes there, beside raising an error."""
    try:
        stderr = os.dup(2)
    except OSError:  # there is none
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)


def checked_ids(ids: Iterable[int], size: int) -> list[int]:
    """The ids as plain integers; InputError for one that is not 0 to size - 1."""
    ids = [operator.index(i) for i in ids]
    for i in ids:
        if not 0 <= i < size:
            raise InputError(
                f"token id {i} is outside the vocabulary of {size} tokens; "
                "use the tokenizer that the ids were made with"
            )
    return ids


def _import_tokenizers() -> Any:
    try:
        import tokenizers
    except ImportError:
        raise InputError(
            f"a published {PIPELINE} or {WORDPIECE} is read by the library tokenizers: {INSTALL}"
        ) from None
    return tokenizers


def _pipeline(tokenizers: Any, content: bytes, settings: dict[str, Any]) -> Any:
    model = json.loads(content.decode("utf-8"))["model"]
    if "merges" in model and model.get("continuing_subword_prefix"):
        # The library cuts that many bytes off, be it in the middle of a character, and kills the process.
        raise ValueError("BPE with a continuing_subword_prefix is not implemented")
    library = tokenizers.Tokenizer.from_buffer(content)
    library.no_padding()
    library.no_truncation()
    return library


def _wordpiece(tokenizers: Any, content: bytes, settings: dict[str, Any]) -> Any:
    """BERT's vocab.txt holds a token a line, in the order of their ids."""
    lines = content.decode("utf-8").removesuffix("\n").split("\n")
    ids = {line.removesuffix("\r"): i for i, line in enumerate(lines)}
    special = {role: _name(settings.get(f"{role}_token")) or f"[{role.upper()}]"
               for role in ("unk", "cls", "sep", "pad", "mask")}  # fmt: skip
    for role in ("unk", "cls", "sep"):
        if special[role] not in ids:
            raise ValueError(f"no line is {special[role]}")
    library = tokenizers.Tokenizer(tokenizers.models.WordPiece(ids, unk_token=special["unk"]))
    library.normalizer = tokenizers.normalizers.BertNormalizer(
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
        strip_accents=settings.get("strip_accents"),
        lowercase=settings.get("do_lower_case", True),
    )
    library.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    library.decoder = tokenizers.decoders.WordPiece()
    library.add_special_tokens([name for name in special.values() if name in ids])
    ends = [(special[role], ids[special[role]]) for role in ("sep", "cls")]
    library.post_processor = tokenizers.processors.BertProcessing(*ends)
    return library


def _name(token: Any) -> str | None:
    """A token in tokenizer_config.json: its name, or an object that has it as "content"."""
    name = token.get("content") if isinstance(token, dict) else token
    return name if isinstance(name, str) else None


def _unicode(text: str) -> str:
    """The text with U+FFFD for each half of a surrogate pair that is alone, which UTF-8 cannot spell."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _changed(value: Any, change: Callable[[str], str]) -> Any:
    """`value` with each of its texts changed, but for roles and types, which the template compares."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {k: v if k in ("role", "type") else _changed(v, change) for k, v in value.items()}
    if isinstance(value, list):
        return [_changed(entry, change) for entry in value]
    return value


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error


def _writer(content: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(content)


# Which reader a folder needs


def is_gpt2(folder: Path) -> bool:
    """Whether tokenizer.json says no more than GPT-2's vocab.json and merges.txt beside it."""
    pipeline, settings = read_json(folder / PIPELINE), _settings(folder)
    model, cut = pipeline.get("model"), pipeline.get("pre_tokenizer")
    after, added = pipeline.get("post_processor") or {}, pipeline.get("added_tokens") or []
    parts = [model, cut, after, *(added if isinstance(added, list) else [None])]
    if not all(isinstance(part, dict) for part in parts) or not isinstance(model.get("vocab"), dict):
        return False  # whoever reads all of it will say what is wrong
    options = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges")
    vocabulary = model["vocab"] | {str(token.get("content")): token.get("id") for token in added}
    return (
        model.get("type", "BPE") == "BPE"
        and not any(model.get(option) for option in options)
        and (cut.get("type"), cut.get("add_prefix_space"), cut.get("use_regex", True))
        == ("ByteLevel", False, True)
        and pipeline.get("normalizer") is None
        and after.get("type", "ByteLevel") == "ByteLevel"
        and not any(token.get(flag) for token in added for flag in ("lstrip", "rstrip", "single_word"))
        and not settings.get("chat_template")
        and not (folder / TEMPLATE).exists()
        and vocabulary == read_json(folder / "vocab.json")
    )


def check_class(folder: Path, name: str) -> None:
    """Refuse files, without a tokenizer.json, that mean more than the class `name` of transformers reads."""
    settings = _settings(folder)
    more = [file for file in (TEMPLATE, "added_tokens.json") if (folder / file).exists()]
    if settings.get("tokenizer_class") not in (None, name, f"{name}Fast"):
        raise unconverted(folder, f"the files of {settings['tokenizer_class']}")
    if more or settings.get("chat_template"):
        raise unconverted(folder, f"the files of {name}, {more[0] if more else 'a chat template'}")


def _settings(folder: Path) -> dict[str, Any]:
    return read_json(folder / SETTINGS) if (folder / SETTINGS).exists() else {}


def unconverted(folder: Path, found: str) -> InputError:
    """The error for files that only transformers reads, and the command that makes it write ours."""
    there = repr(folder.as_posix())
    return InputError(
        f"{folder} has {found} and no {PIPELINE}; let transformers write that: python -c "
        f'"from transformers import AutoTokenizer as T; T.from_pretrained({there}).save_pretrained({there})"'
    )
