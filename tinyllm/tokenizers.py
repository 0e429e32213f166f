"""From text to token ids and back: byte-level byte-pair encoding (BPE), plain characters, and published ones.

BPE (Sennrich et al. 2016, section 3.2; on bytes: GPT-2, section 2.2) starts with the 256 bytes and again and
again joins the most frequent pair of neighbouring tokens into a new token. `train_bpe` learns the merges
here, in plain Python; tiktoken's compiled code applies them. Text is first cut into words by GPT-2's pattern,
and no merge crosses words.
"""

import heapq
import math
import re
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import regex
import tiktoken

from tinyllm.errors import InputError
from tinyllm.files import json_writer, listing, read_json, write_files
from tinyllm.published_tokenizers import (
    GENERATION,
    PIPELINE,
    WORDPIECE,
    PublishedTokenizer,
    check_class,
    checked_ids,
    is_gpt2,
    unconverted,
)

END_OF_TEXT = "<|endoftext|>"
# Contractions; letters, digits or other signs with at most one space before them; white space, whose last
# character is left to the word that follows.
PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
SPECIAL = re.compile(r"<.+>|\[.+\]")
PIECE = 500_000  # characters; tiktoken's regular expressions give up on a million blanks in a row

# How GPT-2's files spell bytes: printable Latin-1 characters stand for themselves, U+0100, U+0101, ... for
# the others in order. So no token holds a blank or a newline, which separate tokens there.
_PLAIN = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
_OTHER = [b for b in range(256) if b not in _PLAIN]
SPELLING = {b: chr(b) for b in _PLAIN} | {b: chr(256 + n) for n, b in enumerate(_OTHER)}


def train_bpe(text: str, vocabulary_size: int, progress: Callable = iter) -> "BytePairTokenizer":
    """Learn a vocabulary: the 256 bytes, then merges in the order found, then <|endoftext|>.

    Each round merges the pair that occurs most often; of pairs that occur equally often, the one of older
    tokens (smaller ids, the left one first). Ends with a smaller vocabulary when no pair occurs twice.

    A merge changes only the words that hold the pair, and makes only pairs with the new token: the count of
    every other pair can only fall. So a heap of counts, each as it was at some earlier time, finds the
    maximum: what comes out with an outdated count goes back with its present one.

    progress wraps the iteration over merges, as tqdm does. Raises InputError if vocabulary_size < 257.
    """
    if vocabulary_size < 257:
        raise InputError(
            f"a vocabulary of {vocabulary_size} is too small: 256 bytes and {END_OF_TEXT} need 257"
        )
    occurrences = Counter(regex.findall(PATTERN, text))
    words, times = [list(word.encode(errors="replace")) for word in occurrences], list(occurrences.values())
    count: Counter = Counter()  # of each pair of neighbours, in the whole text
    words_with = defaultdict(set)  # pair -> the words that hold it, or held it once
    for i, word in enumerate(words):
        for pair in pairwise(word):
            count[pair] += times[i]
            words_with[pair].add(i)
    heap = [(-n, pair) for pair, n in count.items()]
    heapq.heapify(heap)

    tokens = [bytes([b]) for b in range(256)]
    for new in progress(range(256, vocabulary_size - 1)):
        pair = _most_frequent(heap, count)
        if pair is None:
            break
        tokens.append(tokens[pair[0]] + tokens[pair[1]])
        made = set()
        for i in words_with.pop(pair):
            old, words[i] = words[i], _merge(words[i], pair, new)
            for p in pairwise(old):
                count[p] -= times[i]
            for p in pairwise(words[i]):
                count[p] += times[i]
                if new in p:
                    words_with[p].add(i)
                    made.add(p)
        for p in made:
            heapq.heappush(heap, (-count[p], p))
    return BytePairTokenizer({token: i for i, token in enumerate(tokens)}, {END_OF_TEXT: len(tokens)})


def _most_frequent(heap: list, count: Counter) -> tuple[int, int] | None:
    """The pair with the highest present count; None when that is below 2."""
    while heap:
        negative, pair = heapq.heappop(heap)
        if count[pair] > 1:
            if count[pair] == -negative:
                return pair
            heapq.heappush(heap, (-count[pair], pair))
    return None


def _merge(word: list[int], pair: tuple[int, int], new: int) -> list[int]:
    """Replace the pair by the new token, from left to right."""
    merged, i = [], 0
    while i < len(word):
        found = i + 1 < len(word) and (word[i], word[i + 1]) == pair
        merged.append(new if found else word[i])
        i += 2 if found else 1
    return merged


def text_pieces(text: str | Iterable[str]) -> Iterator[str]:
    """Cut a text, or a stream of its parts, into pieces of at most 500,000 characters to encode one by one.

    A cut lies before a blank or newline that follows a non-space: there PATTERN always ends a word, whatever
    comes before or after, so the pieces' tokens are those of the whole text. Only where half a million
    characters have no such place is the text cut blindly.
    """
    parts = [text[i : i + PIECE] for i in range(0, len(text), PIECE)] if isinstance(text, str) else text
    rest = ""
    for part in parts:
        rest += part
        while len(rest) > PIECE:
            last = re.compile(r".*\S(?=[ \n])", re.DOTALL).match(rest, 0, PIECE)
            cut = last.end() if last else PIECE
            yield rest[:cut]
            rest = rest[cut:]
    if rest:
        yield rest


class BytePairTokenizer:
    """Byte-level BPE run by tiktoken. Every text, and every string of bytes, survives encode and decode.

    ranks: {token's bytes: id}, among them all 256 single bytes; of two possible merges the one whose result
    has the smaller id is made first. special_tokens: {"<name>" or "[name]": id}, found in no ordinary text.
    The ids are 0, 1, ..., vocabulary_size - 1 in any order. Raises InputError otherwise.
    """

    byte_tokens = frozenset()  # none has a text that depends on its neighbours
    chat = None

    def __init__(self, ranks: dict[bytes, int], special_tokens: dict[str, int] | None = None) -> None:
        self.ranks, self.special_tokens = dict(ranks), dict(special_tokens or {})
        self.vocabulary_size = size = len(self.ranks) + len(self.special_tokens)
        if sorted([*self.ranks.values(), *self.special_tokens.values()]) != list(range(size)):
            raise InputError(f"the ids of {size} tokens must be 0 to {size - 1}, each once")
        for byte in range(256):
            if bytes([byte]) not in self.ranks:
                raise InputError(f"byte {byte} is no token; a byte-level vocabulary needs all 256")
        for name in self.special_tokens:
            if not SPECIAL.fullmatch(name) or name.encode() in self.ranks:
                raise InputError(f"special token {name!r} must be written <...> or [...], and new")
        self.end_of_text = self.special_tokens.get(END_OF_TEXT)
        self._encoding = tiktoken.Encoding(
            "tinyllm", pat_str=PATTERN, mergeable_ranks=self.ranks, special_tokens=self.special_tokens
        )

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """Token ids. Text that looks like a special token is ordinary text unless allow_special."""
        if allow_special:
            return self._encoding.encode(text, allowed_special="all")
        return [i for piece in text_pieces(text) for i in self._encoding.encode_ordinary(piece)]

    def encode_bytes(self, data: bytes) -> list[int]:
        """Token ids of any bytes: text where they are UTF-8, and each byte that is not as its own token."""
        ids = []
        for part in re.split("([\udc80-\udcff])", data.decode("utf-8", "surrogateescape")):
            raw = part.encode("utf-8", "surrogateescape")
            ids += [self.ranks[raw]] if len(raw) == 1 else self.encode(part)
        return ids

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Bytes; InputError for an id outside the vocabulary."""
        return self._encoding.decode_bytes(checked_ids(ids, self.vocabulary_size))

    def decode(self, ids: Iterable[int]) -> str:
        """Text; bytes that are no UTF-8 become U+FFFD. InputError for an id outside the vocabulary."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def save(self, folder: str | Path) -> None:
        """Write GPT-2's files: vocab.json, {token: id}, and merges.txt, a line "left right" for every merge.

        tokenizer_config.json tells transformers to read them so, whatever model lies beside them.
        """
        spell = lambda token: "".join(SPELLING[b] for b in token)
        vocabulary = {spell(token): i for token, i in self.ranks.items()} | self.special_tokens
        merged = sorted((token for token in self.ranks if len(token) > 1), key=self.ranks.get)
        lines = [" ".join(map(spell, _halves(token, self.ranks))) for token in merged]
        merges = "\n".join(["#version: 0.2", *lines, ""]).encode()
        write_files(
            folder,
            {
                "vocab.json": json_writer(vocabulary),
                "merges.txt": lambda path: path.write_bytes(merges),
                "tokenizer_config.json": json_writer({"tokenizer_class": "GPT2Tokenizer"}),
            },
        )


def _halves(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """The two tokens whose merge made this one: what the earlier merges leave of its bytes.

    They are unique: between two token boundaries the merges do not depend on what lies outside, so wherever
    these bytes stood as two tokens they were the same two.
    """
    parts = [bytes([b]) for b in token]
    while len(parts) > 2:
        made = [ranks.get(left + right, math.inf) for left, right in pairwise(parts)]
        i = made.index(min(made))
        if made[i] >= ranks[token]:
            raise InputError(f"token {token!r} is no merge of two tokens with smaller ids")
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


class CharacterTokenizer:
    """One token a character: the distinct characters of a text, sorted by code point. No special tokens."""

    end_of_text = chat = None
    byte_tokens = frozenset()

    def __init__(self, characters: Iterable[str]) -> None:
        self.characters = "".join(sorted(set(characters)))
        self.vocabulary_size = len(self.characters)
        self._ids = {character: i for i, character in enumerate(self.characters)}

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """Token ids; InputError for a character that is not in the vocabulary."""
        try:
            return [self._ids[character] for character in text]
        except KeyError as error:
            raise InputError(
                f"character {error.args[0]!r} is not among the {self.vocabulary_size} of this "
                "tokenizer; leave it out, or train on text that has it"
            ) from None

    def decode(self, ids: Iterable[int]) -> str:
        """Text; InputError for an id outside the vocabulary."""
        return "".join(self.characters[i] for i in checked_ids(ids, self.vocabulary_size))

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The text's UTF-8."""
        return self.decode(ids).encode()

    def save(self, folder: str | Path) -> None:
        """Write characters.json: {"characters": all of them in order, as one string}."""
        write_files(folder, {"characters.json": json_writer({"characters": self.characters})})


Tokenizer = BytePairTokenizer | CharacterTokenizer | PublishedTokenizer


def check_fit(model: Any, tokenizer: Tokenizer) -> None:
    """Raise InputError if the tokenizer has ids that the model, with its vocabulary_size, does not know.

    Special tokens behind all others are no matter: many a published tokenizer got a <pad> too much, and no
    text has it. Whoever uses it nonetheless hears of it from the model.
    """
    size = tokenizer.vocabulary_size
    if isinstance(tokenizer, PublishedTokenizer):
        surplus = set(tokenizer.special_tokens.values())
        while size - 1 in surplus:
            size -= 1
    if size > model.vocabulary_size:
        raise InputError(
            f"the tokenizer has {size} tokens, the model only "
            f"{model.vocabulary_size}: they are not of one model"
        )


def end_tokens(folder: str | Path, tokenizer: Tokenizer) -> frozenset[int]:
    """The tokens that end a text: the tokenizer's own, and each eos_token_id of config.json and
    generation_config.json in the folder: one, or a list such as the ends of a text and of an answer."""
    ends = {tokenizer.end_of_text}
    for path in (Path(folder) / "config.json", Path(folder) / GENERATION):
        found = read_json(path).get("eos_token_id") if path.exists() else None
        ids = found if isinstance(found, list) else [found]
        if not all(i is None or type(i) is int for i in ids):
            raise InputError(f"{path}: eos_token_id is {found!r}, but must be a token id or a list of them")
        ends |= {i for i in ids if i is None or i >= 0}
    return frozenset(ends - {None})


class StreamDecoder:
    """Text as tokens come, one by one: a character is given out once its last byte is there.

    How a token decodes may depend on the one before it, or on being the first. So the tokens since the last
    text was given out are decoded once more with those that follow, and what they add is the new text. All
    that it gives out is together what decoding at once gives. `prompt`: tokens that the text goes on from.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Iterable[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._tokens = list(prompt)
        self._given = len(self._tokens)  # of these tokens
        self._start = len(tokenizer.decode(self._tokens))  # characters that they make

    def push(self, token: int) -> str:
        tokens = [*self._tokens, token]
        text = self._tokenizer.decode(tokens)
        self._tokens = tokens
        if text.endswith("\ufffd") or token in self._tokenizer.byte_tokens:
            return ""  # more bytes may come
        new = text[self._start :]
        self._tokens = tokens[self._given :]
        self._given = len(self._tokens)
        self._start = len(self._tokenizer.decode(self._tokens))
        return new

    def finish(self) -> str:
        """What is left; a broken character is U+FFFD."""
        return self._tokenizer.decode(self._tokens)[self._start :]


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Read what `save` wrote, a published tokenizer.json or vocab.txt, or GPT-2's vocab.json and merges.txt.

    The library of the extra `tokenizers` reads tokenizer.json, but where that only says what GPT-2's own two
    files beside it say. Raises InputError naming the file that is missing or damaged.
    """
    folder = Path(folder)
    if (folder / "characters.json").exists():
        return _load_characters(folder / "characters.json")
    gpt2 = [(folder / name).exists() for name in ("vocab.json", "merges.txt")]
    if (folder / PIPELINE).exists() and not (all(gpt2) and is_gpt2(folder)):
        return PublishedTokenizer(folder)
    if any(gpt2):
        if not (folder / PIPELINE).exists():
            check_class(folder, "GPT2Tokenizer")
        return _load_bpe(folder / "vocab.json", folder / "merges.txt")
    if (folder / WORDPIECE).exists():
        check_class(folder, "BertTokenizer")
        return PublishedTokenizer(folder)
    for name in ("tokenizer.model", "tekken.json", "spiece.model", "source.spm"):
        if (folder / name).exists():
            raise unconverted(folder, name)
    raise InputError(
        f"no tokenizer in {folder}: it needs {PIPELINE}, or {WORDPIECE}, or vocab.json and merges.txt, or "
        f"characters.json; {listing(folder)}"
    )


def _load_characters(path: Path) -> CharacterTokenizer:
    characters = read_json(path).get("characters")
    if not isinstance(characters, str) or list(characters) != sorted(set(characters)):
        _damaged(path, '"characters" is no string of sorted, distinct characters')
    return CharacterTokenizer(characters)


def _load_bpe(vocabulary_path: Path, merges_path: Path) -> BytePairTokenizer:
    vocabulary = read_json(vocabulary_path)
    if not all(type(i) is int for i in vocabulary.values()):
        _damaged(vocabulary_path, "it is no table of tokens and their ids")
    if any(name.endswith("</w>") for name in vocabulary):
        raise unconverted(vocabulary_path.parent, "GPT-1's vocab.json and merges.txt")
    try:
        lines = merges_path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise InputError(f"cannot read {merges_path}: {error.strerror}; copy it beside vocab.json") from error
    except UnicodeDecodeError as error:
        _damaged(merges_path, f"byte {error.start} is not UTF-8")
    byte = {character: b for b, character in SPELLING.items()}
    known = {character: bytes([b]) for character, b in byte.items()}  # as spelt in the files -> bytes
    last = -1
    for number, line in enumerate(lines, 1):
        if not line or (number == 1 and line.startswith("#version")):
            continue
        halves = line.split(" ")
        name = "".join(halves)
        if len(halves) != 2 or not all(half in known for half in halves):
            _damaged(merges_path, f"line {number} is no pair of earlier tokens")
        if vocabulary.get(name, -1) <= last:
            _damaged(merges_path, f"line {number} makes {name!r}, not the token next in vocab.json")
        last = vocabulary[name]
        known[name] = bytes(byte[character] for character in name)
    special = {name: i for name, i in vocabulary.items() if name not in known}
    for name in special:
        if not SPECIAL.fullmatch(name):
            _damaged(merges_path, f"no line makes the token {name!r} of vocab.json")
    try:
        return BytePairTokenizer({known[name]: i for name, i in vocabulary.items() if name in known}, special)
    except InputError as error:
        _damaged(vocabulary_path, str(error))


def _damaged(path: Path, why: str) -> NoReturn:
    raise InputError(f"{path} is damaged: {why}; copy it again from where it came") from None


def gpt2_tokenizer(seconds: float = 30) -> BytePairTokenizer:
    """GPT-2's own encoding, out of tiktoken's cache or fetched; InputError if neither works in time."""
    result: list = [TimeoutError()]

    def fetch() -> None:
        try:
            result[0] = tiktoken.get_encoding("gpt2")
        except Exception as error:  # whatever the network's layers raise, the way out is the same
            result[0] = error

    # tiktoken downloads without a timeout: wait for it in a thread that can be left behind.
    thread = threading.Thread(target=fetch, daemon=True)
    thread.start()
    thread.join(seconds)
    encoding = result[0]
    if isinstance(encoding, Exception):
        raise InputError(
            f"cannot fetch GPT-2's tokenizer ({type(encoding).__name__}); get a network, or a "
            "folder with GPT-2's vocab.json and merges.txt for load_tokenizer"
        ) from encoding
    ranks = {encoding.decode_single_token_bytes(i): i for i in range(encoding.eot_token)}
    return BytePairTokenizer(ranks, {END_OF_TEXT: encoding.eot_token})
