"""The Transformer against transformers' MarianMTModel: the same function, gradients, files and texts."""

from __future__ import annotations

import numpy as np
import pytest

import tinyllm
from autograd import Tensor
from tinyllm.models import Transformer, TransformerConfig
from tinyllm.models.transformer import SIZES, positions

from .reference import assert_same_gradients, converted, published_names, torch, transformers

V, V_TARGET, C, CONTEXT, PAD = 61, 47, 24, 70, 46
CONFIGS = {
    "relu": {},
    "as published": {"activation_function": "swish", "scale_embedding": True},
    "apart": {"share_encoder_decoder_embeddings": False, "decoder_vocab_size": V_TARGET},
    "untied": {
        "share_encoder_decoder_embeddings": False, "decoder_vocab_size": V_TARGET,
        "tie_word_embeddings": False, "activation_function": "silu",
    },
}  # fmt: skip
LENGTHS = np.array([70, 1, 33, 5])  # of sources


def configuration(**options):
    """The sides differ in all that they can; the start is no padding, whose embedding torch never trains."""
    return transformers.MarianConfig(
        **{
            "vocab_size": V, "d_model": C, "max_position_embeddings": CONTEXT,
            "encoder_layers": 2, "encoder_ffn_dim": 40, "encoder_attention_heads": 3,
            "decoder_layers": 3, "decoder_ffn_dim": 36, "decoder_attention_heads": 4,
            "activation_function": "relu", "dropout": 0.0, "eos_token_id": 2, "pad_token_id": PAD,
            "decoder_start_token_id": 45, "forced_eos_token_id": None, **options,
        }
    )  # fmt: skip


def reference(**options):
    """MarianMTModel with random weights, its positions as they are and no bias near 0."""
    torch.manual_seed(0)
    theirs = transformers.MarianMTModel(configuration(**options)).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "embed_positions" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
        theirs.final_logits_bias.add_(torch.randn_like(theirs.final_logits_bias))
    return theirs


def in_float64(theirs):
    """A copy, with positions that no float32 has rounded."""
    theirs = converted(theirs, np.float64)
    for side in (theirs.model.encoder, theirs.model.decoder):
        t, i = np.arange(CONTEXT)[:, None], np.arange(C // 2)
        angles = t / 10000 ** (2 * i / C)
        table = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
        np.testing.assert_allclose(side.embed_positions.weight.numpy(force=True), table, rtol=0, atol=1e-7)
        side.embed_positions.weight.data = torch.from_numpy(table)
    return theirs


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request, tmp_path_factory):
    """(transformers' model, ours read from its folder, the folder)."""
    theirs, folder = reference(**CONFIGS[request.param]), tmp_path_factory.mktemp("published")
    theirs.save_pretrained(folder)
    return theirs, tinyllm.from_pretrained(folder), folder


def batch(S=70, T=70):
    """Sources with padding, their mask, decoder inputs and labels, some of which do not count."""
    rng = np.random.default_rng((S, T))
    lengths = np.minimum(LENGTHS, S)
    ids, decoder_ids = rng.integers(0, PAD, (4, S)), rng.integers(0, PAD, (4, T))
    mask = (np.arange(S) < lengths[:, None]).astype(np.int64)
    labels = rng.integers(0, PAD, (4, T))
    labels[1, T // 2 :] = labels[3, :2] = -100
    return np.where(mask, ids, PAD), mask, decoder_ids, labels


def theirs_on(theirs, ids, mask, decoder_ids, **options):
    ids, mask, decoder_ids = (torch.from_numpy(a) for a in (ids, mask, decoder_ids))
    return theirs(ids, attention_mask=mask, decoder_input_ids=decoder_ids, **options)


@pytest.mark.parametrize("lengths", [(1, 1), (2, 70), (70, 2), (70, 70)], ids=str)
def test_logits(pair, lengths):
    theirs, ours, _ = pair
    assert type(ours) is Transformer
    ids, mask, decoder_ids, _ = batch(*lengths)
    with torch.no_grad():
        expected = theirs_on(theirs, ids, mask, decoder_ids).logits.numpy()
    for padding in (mask, mask.sum(axis=1)):
        found = ours(ids, decoder_ids, padding).numpy()
        assert found.dtype == np.float32 and found.shape == expected.shape and np.abs(found).max() > 1
        np.testing.assert_allclose(found, expected, rtol=0, atol=5e-5)


def test_everything_in_float64(pair):
    """Logits, hidden states, memory where it is no padding, and the maps of cross-attention."""
    theirs, _, folder = pair
    theirs, ours = in_float64(theirs), Transformer.from_pretrained(folder, np.float64)
    theirs.set_attn_implementation("eager")
    ids, mask, decoder_ids, _ = batch()
    with torch.no_grad():
        expected = theirs_on(
            theirs, ids, mask, decoder_ids, output_hidden_states=True, output_attentions=True
        )
    found = {
        "logits": ours(ids, decoder_ids, mask),
        "hidden": ours.hidden_states(ids, decoder_ids, mask),
        "memory": ours.encode(ids, mask.sum(axis=1)) * mask[:, :, None].astype(np.float64),
    }
    wanted = {
        "logits": expected.logits,
        "hidden": expected.decoder_hidden_states[-1],
        "memory": expected.encoder_last_hidden_state * torch.from_numpy(mask)[:, :, None],
    }
    for i, weights in enumerate(ours.cross_attention_weights(ids, decoder_ids, mask)):
        found[f"map {i}"], wanted[f"map {i}"] = weights, expected.cross_attentions[i]
    for name, array in found.items():
        np.testing.assert_allclose(array.numpy(), wanted[name].numpy(), rtol=0, atol=1e-11, err_msg=name)
    assert len(found) == 6


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype, tolerance", [(np.float32, 1e-3), (np.float64, 1e-11)])
def test_loss_and_gradients(pair, dtype, tolerance, smoothing):
    """Of every parameter; of their final_logits_bias too, which they keep as it is.

    Where attention hardly chooses, the gradients of queries and keys are what large terms leave: in float32
    1e-3 of the largest is rounding.
    """
    theirs, _, folder = pair
    theirs = in_float64(theirs) if dtype == np.float64 else converted(theirs, dtype)
    ours = Transformer.from_pretrained(folder, dtype).train()
    ours.label_smoothing = smoothing
    bias = theirs.final_logits_bias.requires_grad_(True)
    ids, mask, decoder_ids, labels = batch()
    logits = theirs_on(theirs, ids, mask, decoder_ids).logits
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), torch.from_numpy(labels).flatten(), label_smoothing=smoothing
    )
    expected.backward()
    loss = ours.loss((ids, mask, decoder_ids), labels)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=min(tolerance, 1e-6))
    names = published_names(ours)
    found = {name: p.grad for name, p in theirs.named_parameters() if "embed_positions" not in name}
    assert sorted([*found, "final_logits_bias"]) == sorted(names.values())
    gradients = {n: (bias.grad[0] if p == "final_logits_bias" else found[p]) for n, p in names.items()}
    for name, parameter in ours.named_parameters():
        if name.endswith("key.bias"):  # 0, but for rounding
            both = gradients[name].abs().max(), np.abs(parameter.grad.numpy()).max()
            assert max(both) < (1e-6 if dtype == np.float32 else 1e-14)
            gradients[name], parameter.grad = torch.ones_like(gradients[name]), Tensor(np.ones(C, dtype))
    assert_same_gradients(ours, {name: g.numpy() for name, g in gradients.items()}, tolerance)


def test_transformers_reads_what_we_write(pair, tmp_path):
    theirs, ours, _ = pair
    ours.save_pretrained(tmp_path)
    again, report = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(again) is type(theirs) and again.dtype == torch.float32
    unused = {"model.encoder.embed_positions.weight", "model.decoder.embed_positions.weight"}
    for kind, names in report.items():
        assert not names or (kind == "missing_keys" and set(names) <= unused), kind
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    written, published = again.config.to_dict(), theirs.config.to_dict()
    for option in ours.config.to_published():
        if option not in ("architectures", "dtype"):
            assert written[option] == published[option], option
    ids, mask, decoder_ids, _ = batch()
    with torch.no_grad():
        found, expected = (
            theirs_on(m, ids, mask, decoder_ids).logits.numpy() for m in (again.eval(), theirs)
        )
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"activation_function": "swish", "scale_embedding": False}], ids=str)
def test_a_model_of_ours_is_one_of_theirs(tmp_path, options):
    """Not read from their files before: our configuration and initialization."""
    ours = Transformer(
        TransformerConfig(V, C, 2, 3, 3, 4, 40, 36, max_position_embeddings=CONTEXT, **options)
    ).eval()
    ours.logits_bias.data += 0.5
    ours.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
    ids, mask, decoder_ids, _ = batch()
    with torch.no_grad():
        expected = theirs_on(theirs, ids, mask, decoder_ids).logits.numpy()
    np.testing.assert_allclose(ours(ids, decoder_ids, mask).numpy(), expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_files(dtype, tmp_path):
    halves = reference().to(getattr(torch, dtype))
    halves.save_pretrained(tmp_path)
    theirs, (ids, mask, decoder_ids, _) = halves.float(), batch()
    for side in (theirs.model.encoder, theirs.model.decoder):  # which were rounded as well
        side.embed_positions.weight.data = torch.from_numpy(positions(0, CONTEXT, C, np.zeros(0, np.float32)))
    with torch.no_grad():
        expected = theirs_on(theirs, ids, mask, decoder_ids).logits.numpy()
    found = tinyllm.from_pretrained(tmp_path)(ids, decoder_ids, mask).numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=5e-5)


def test_shards(pair, tmp_path):
    theirs, ours, _ = pair
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    found = tinyllm.from_pretrained(tmp_path).state_dict()
    assert all(np.array_equal(found[name], array) for name, array in ours.state_dict().items())


# Translations

SOURCES = batch(20, 1)[:2]


def translated(theirs, **options):
    ids, mask = (torch.from_numpy(a) for a in SOURCES)
    with torch.no_grad():
        text = theirs.generate(
            ids, attention_mask=mask, max_new_tokens=30, do_sample=False, bad_words_ids=[[PAD]], **options
        ).numpy()
    return text[:, 1:]  # without the start


@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_translations(pair, use_cache):
    """Until the end of a sentence, made likely here; behind it they pad."""
    theirs, _, folder = pair
    ours = Transformer.from_pretrained(folder)
    for more in (0.0, 8.0):
        theirs.final_logits_bias[0, 2] += more
        ours.logits_bias.data[2] += more
        try:
            expected = translated(theirs, use_cache=use_cache)
        finally:
            theirs.final_logits_bias[0, 2] -= more
        found = ours.generate(*[SOURCES[0], 30, SOURCES[1]], temperature=0, use_cache=use_cache)
        assert np.array_equal(np.where(found == -1, PAD, found), expected)


@pytest.mark.parametrize("use_cache", [True, False])
def test_beams_of_four(pair, use_cache):
    """Without a length penalty, which transformers measures otherwise: all four beams of each source."""
    theirs, _, folder = pair
    ours = Transformer.from_pretrained(folder)
    ours.logits_bias.data[2] += 4
    theirs.final_logits_bias[0, 2] += 4
    try:
        expected = translated(
            theirs, use_cache=use_cache, num_beams=4, num_return_sequences=4, length_penalty=0.0
        )
    finally:
        theirs.final_logits_bias[0, 2] -= 4
    expected = expected.reshape(4, 4, -1).tolist()
    lengths = set()
    for ids, mask, texts in zip(*SOURCES, expected):
        beams = ours.beam_search(ids[: mask.sum()], 30, alpha=0.0, use_cache=use_cache)
        for beam, text in zip(beams, texts, strict=True):
            end = text.index(2) + 1 if 2 in text else len(text)
            assert beam.tokens == text[:end]
            lengths.add(end)
    assert len(lengths) > 1


# What is refused, and the sizes


@pytest.mark.parametrize(
    "option",
    [
        {"activation_function": "gelu"},
        {"encoder_layerdrop": 0.1},
        {"decoder_layerdrop": 0.1},
        {"tie_word_embeddings": False},  # of shared tables: theirs have four then
        {"eos_token_id": [2, 3]},
        {"normalize_before": True},
    ],
    ids=str,
)
def test_what_we_do_not_implement_is_refused_as_transformers_writes_it(option, tmp_path):
    reference(**option).save_pretrained(tmp_path)
    with pytest.raises(tinyllm.InputError, match=next(iter(option))):
        tinyllm.from_pretrained(tmp_path)


@pytest.mark.parametrize("name, count", [("opus-mt-en-de", 73_944_309), ("transformer-big", 214_282_376)])
def test_the_sizes(name, count):
    """Ours count what theirs hold: the parameters but the positions, and final_logits_bias."""
    options = SIZES[name].to_published()
    config = transformers.MarianConfig(**options)
    with torch.device("meta"):
        model = transformers.MarianMTModel(config)
    held = dict(model.named_parameters()) | dict(model.named_buffers())
    assert sum(p.numel() for n, p in held.items() if "embed_positions" not in n) == count
