"""Writing translations: what encoder-decoder models have in common.

Given its source, a decoder is a causal model: the next token of the translation depends on those before it.
So it writes as all causal models do, by `generation`, with a cache that holds the source as well.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from autograd import Tensor, no_grad
from autograd.backend import Array, is_array, to_host
from tinyllm import generation
from tinyllm.attention import lengths_of
from tinyllm.datasets import padded
from tinyllm.errors import InputError
from tinyllm.generation import Beam, KeyValueCache
from tinyllm.model import PretrainedModel


class EncoderDecoder(PretrainedModel):
    """A model that reads a source and writes a translation.

    It has encode(input_ids (B, S), lengths (B,)) -> memory (B, S, C);
    decode(decoder_input_ids (B, T), memory, lengths, cache) -> (B, T, C); head(hidden (..., C)) -> (..., V),
    which reads the matrix head_weight (V, C); memory_keys_and_values(memory), for each decoder layer what its
    cross-attention reads; the `context` of both sides; and in its config eos_token_id, pad_token_id,
    decoder_start_token_id, target_vocabulary.
    """

    head_weight: Tensor

    @property
    def vocabulary_size(self) -> int:
        """How many tokens the encoder knows."""
        return self.config.vocab_size

    def generate(
        self,
        input_ids: Any,
        max_new_tokens: int,
        attention_mask: Any = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        use_cache: bool = True,
        stop: Collection[int] | None = None,
    ) -> np.ndarray:
        """Translations (B, n), n at most max_new_tokens, of sources (B, S) with their mask, or of B rows.

        A row ends with a token of `stop`, by default eos_token_id, which is its last; -1 fills up shorter
        rows. Temperature 0 is greedy; the other settings are those of `generation.stream`.

        Raises:
            InputError: an empty source, one longer than the context, unknown ids, a setting out of range.
        """
        rows = generation.checked_prompts(self, input_ids)
        if attention_mask is not None:
            if len({len(row) for row in rows}) > 1:
                raise InputError("an attention_mask is for sources of one length, padded; rows need none")
            lengths = source_lengths(attention_mask, (len(rows), len(rows[0])), rows[0])
            rows = rows if lengths is None else [row[:n] for row, n in zip(rows, lengths)]
        text = generation.generate(
            self._given(rows, max_new_tokens),
            [[self.config.decoder_start_token_id]] * len(rows),
            max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            use_cache=use_cache,
            stop=self._stop(stop),
        )
        return text[:, 1:]

    def beam_search(
        self,
        input_ids: Any,
        max_new_tokens: int,
        width: int = 4,
        alpha: float = 0.6,
        stop: Collection[int] | None = None,
        use_cache: bool = True,
    ) -> list[Beam]:
        """The likeliest translations of one source (S,), the best first; see `generation.beam_search`.

        The defaults are those of Vaswani et al. 2017, section 6.1.
        """
        given = self._given(generation.checked_prompts(self, [input_ids]), max_new_tokens)
        start = [self.config.decoder_start_token_id]
        return generation.beam_search(given, start, max_new_tokens, width, alpha, self._stop(stop), use_cache)

    def _stop(self, stop: Collection[int] | None) -> Collection[int]:
        return (self.config.eos_token_id,) if stop is None else stop

    def _given(self, rows: Sequence[np.ndarray], max_new_tokens: int) -> Given:
        """The decoder with the rows encoded, which evaluation mode does without dropout."""
        if max_new_tokens > self.context:
            raise InputError(
                f"max_new_tokens is {max_new_tokens}, but the decoder reads at most {self.context} tokens"
            )
        ids, lengths = padded(rows)
        lengths, was_training = source_lengths(lengths, ids.shape, self.parameters()[0].data), self.training
        self.eval()
        try:
            with no_grad():
                return Given(self, self.encode(ids, lengths), lengths)
        finally:
            self.train(was_training)


class DecoderCache(KeyValueCache):
    """The keys and values of the translation so far, and those of the source, which do not change.

    of_source: for each layer keys and values (B, H, S, d), of which the first lengths (B,) count.
    """

    def __init__(
        self, capacity: int, of_source: Sequence[tuple[Tensor, Tensor]], lengths: Array | None
    ) -> None:
        super().__init__(capacity)
        self.of_source, self.lengths = list(of_source), lengths

    def select(self, rows: Sequence[int]) -> None:
        super().select(rows)
        self.of_source = [tuple(Tensor(x.data[rows]) for x in pair) for pair in self.of_source]
        self.lengths = None if self.lengths is None else self.lengths[rows]

    @property
    def nbytes(self) -> int:
        """The memory that it holds."""
        return super().nbytes + sum(x.data.nbytes for pair in self.of_source for x in pair)


class Given:
    """The decoder, given sources: a causal model of their translations, row by row.

    memory (B, S, C), of which the first lengths (B,) count. A memory of one row is for any number of
    translations.
    """

    def __init__(self, model: EncoderDecoder, memory: Tensor, lengths: Array | None) -> None:
        self.model, self.memory, self.lengths = model, memory, lengths
        self.context, self.vocabulary_size = model.context, model.config.target_vocabulary

    @property
    def training(self) -> bool:
        return self.model.training

    def train(self, mode: bool = True) -> None:
        self.model.train(mode)

    def eval(self) -> None:
        self.model.eval()

    def new_cache(self, capacity: int) -> DecoderCache:
        with no_grad():
            return DecoderCache(capacity, self.model.memory_keys_and_values(self.memory), self.lengths)

    def hidden_states(self, ids: Any, cache: DecoderCache | None = None) -> Tensor:
        """ids (B, T) -> (B, T, C)."""
        memory = self.memory
        if cache is None and len(memory) == 1:
            memory = Tensor(memory.data.repeat(len(ids), axis=0))
        return self.model.decode(ids, memory, self.lengths, cache)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits (..., V); that of padding is -inf, for no translation holds any."""
        logits = self.model.head(hidden)
        logits.data[..., self.model.config.pad_token_id] = -math.inf
        return logits


def source_lengths(padding: Any, shape: tuple[int, int], like: Array) -> Array | None:
    """Where sources of the shape (B, S) are padded, told by a mask (B, S) or lengths (B,), as lengths (B,).

    The mask has ones, then zeros for padding. -> on like's device; None where nothing is padded.

    Raises:
        InputError: it is neither, or does not fit the sources.
    """
    if padding is None:
        return None
    padding = padding.data if isinstance(padding, Tensor) else padding
    given, (B, S) = to_host(padding) if is_array(padding) else np.asarray(padding), shape
    if given.shape == (B,) and given.dtype.kind in "iu" and given.min() >= 1 and given.max() <= S:
        given = np.arange(S) < given[:, None]
    if given.shape != (B, S):
        raise InputError(
            f"sources of the shape {(B, S)} have a mask of that shape, or lengths of the shape {(B,)} from 1 "
            f"to {S}, not {given.shape} of {given.dtype}"
        )
    return lengths_of(given, like)
