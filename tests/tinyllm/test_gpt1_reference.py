"""GPT-1 against transformers: the same function, gradients, files and text, before and after fine-tuning."""

from __future__ import annotations

import numpy as np
import pytest

import tinyllm
from tinyllm.models import GPT1, GPT1Config
from tinyllm.models.gpt1 import SIZES, Classifier, MultipleChoice

from .reference import (
    VOCABULARY,
    assert_same_gradients,
    assert_same_hidden_states,
    assert_same_logits,
    assert_shards_are_read,
    blocks_transposed,
    converted,
    gradients_of,
    gradients_of_same_loss,
    greedy,
    logits_of,
    published_names,
    random_ids,
    read_back,
    scrambled,
    torch,
    transformers,
)

CONFIGS = {
    "plain": {},
    "large epsilon": {"layer_norm_epsilon": 1e-2},
    "one head": {"n_head": 1, "n_layer": 1},
}


def configuration(**options):
    return transformers.OpenAIGPTConfig(
        **{
            "vocab_size": VOCABULARY, "n_positions": 70, "n_embd": 24, "n_layer": 3, "n_head": 4,
            "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "summary_first_dropout": 0.0, **options,
        }
    )  # fmt: skip


def reference(kind=transformers.OpenAIGPTLMHeadModel, **options):
    """transformers' model with random weights."""
    return scrambled(kind, configuration(**options))


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request, tmp_path_factory):
    """(transformers' model, ours read from its folder, the folder)."""
    theirs, folder = reference(**CONFIGS[request.param]), tmp_path_factory.mktemp("published")
    theirs.save_pretrained(folder)
    return theirs, tinyllm.from_pretrained(folder), folder


@pytest.mark.parametrize("length", [1, 2, 65, 70])
def test_logits(pair, length):
    theirs, ours, _ = pair
    assert type(ours) is GPT1
    found = assert_same_logits(theirs, ours, random_ids(3, length))
    assert found.dtype == np.float32 and np.abs(found).max() > 1


def test_logits_and_hidden_states_in_float64(pair):
    """Where rounding hides nothing: another formula, or another epsilon, would show."""
    theirs, _, folder = pair
    theirs, ours = converted(theirs, np.float64), GPT1.from_pretrained(folder, np.float64)
    assert_same_hidden_states(theirs, ours, random_ids(2, 70), 1e-11)
    assert_same_logits(theirs, ours, random_ids(2, 70), 1e-11)


@pytest.mark.parametrize("dtype, tolerance", [(np.float32, 1e-5), (np.float64, 1e-12)])
def test_loss_and_gradients(pair, dtype, tolerance):
    theirs, _, folder = pair
    theirs, ours = converted(theirs, dtype), GPT1.from_pretrained(folder, dtype)
    gradients = gradients_of_same_loss(theirs, ours, random_ids(2, 70), tolerance)
    assert_same_gradients(ours, blocks_transposed(gradients), tolerance)


def test_transformers_reads_what_we_write(pair, tmp_path):
    theirs, ours, _ = pair
    again = read_back(theirs, ours, tmp_path)
    for option in ("n_head", "layer_norm_epsilon", "resid_pdrop", "n_positions", "afn"):
        assert getattr(again.config, option) == getattr(theirs.config, option)
    ids = random_ids(2, 70)
    np.testing.assert_allclose(logits_of(again, ids), logits_of(theirs, ids), rtol=0, atol=1e-5)


def test_a_model_of_ours_is_one_of_theirs(tmp_path):
    """Not read from their files before: our configuration and initialization, written and read by them."""
    ours = GPT1(GPT1Config(VOCABULARY, 70, 24, 2, 3), seed=0).eval()
    ours.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert_same_logits(theirs, ours, random_ids(2, 70))
    assert GPT1.from_pretrained(tmp_path).config == ours.config


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_files(dtype, tmp_path):
    """A half is exact in float32, so the same weights give the same logits."""
    halves = reference().to(getattr(torch, dtype))
    halves.save_pretrained(tmp_path)
    assert_same_logits(halves.float(), tinyllm.from_pretrained(tmp_path), random_ids(2, 70))


def test_shards(tmp_path):
    assert_shards_are_read(reference(), tmp_path, random_ids(2, 70))


def test_the_bare_model_without_a_head(tmp_path):
    """Written by OpenAIGPTModel: no tensor has the prefix, as in the published files."""
    theirs = reference()
    theirs.transformer.save_pretrained(tmp_path)
    assert_same_logits(theirs, tinyllm.from_pretrained(tmp_path), random_ids(2, 70))


def test_greedy_text(pair):
    theirs, ours, _ = pair
    ids = random_ids(2, 6)
    found = ours.generate(ids, 64, temperature=0)
    assert np.array_equal(found, greedy(theirs, ids, 64)) and found.shape == (2, 70)


@pytest.mark.parametrize(
    "option", [{"afn": "relu"}, {"afn": "silu"}, {"tie_word_embeddings": False}], ids=str
)
def test_what_we_do_not_implement_is_refused_as_transformers_writes_it(option, tmp_path):
    reference(**option).save_pretrained(tmp_path)
    with pytest.raises(tinyllm.InputError, match=next(iter(option))):
        tinyllm.from_pretrained(tmp_path)


def test_the_published_size():
    """transformers' default configuration is the published model's."""
    theirs = transformers.OpenAIGPTConfig()
    assert all(getattr(theirs, name) == value for name, value in vars(SIZES["openai-gpt"]).items())
    with torch.device("meta"):
        model = transformers.OpenAIGPTLMHeadModel(theirs)
    assert sum(parameter.numel() for parameter in model.parameters()) == 116_534_784


# Fine-tuning: their models with the same heads, on our batches

SPECIAL = 3  # ids 61, 62, 63
PADDING = 60  # stands in no text below, so that their classifier finds the ends
CONFIG = GPT1Config(VOCABULARY, 70, 24, 3, 4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)


def load(ours, theirs, head):
    """Give our fine-tuned model their weights; returns our parameters' names -> theirs."""
    names = {f"model.{name}": published for name, published in published_names(ours.model).items()}
    names["head.weight"] = head
    weights = theirs.state_dict()
    for name, parameter in ours.named_parameters():
        array = weights[names[name]].numpy().astype(np.float64)
        parameter.data = np.ascontiguousarray(array.T if ".blocks." in name and array.ndim == 2 else array)
    theirs.double()
    return names


def batch(ours, kind, seed=0):
    """A batch of four examples, their padding a word and not the extract token, and their targets."""
    rng = np.random.default_rng(seed)
    text = lambda longest: rng.integers(0, PADDING, rng.integers(1, longest)).tolist()
    make = {
        "classification": lambda: ours.special.classification(text(60)),
        "entailment": lambda: ours.special.entailment(text(30), text(30)),
        "multiple choice": lambda: ours.special.multiple_choice(text(40), [text(20) for _ in range(3)]),
    }[kind]
    ids = ours.special.batch([make() for _ in range(4)])
    padding = np.cumsum(ids == ours.special.extract, axis=-1) - (ids == ours.special.extract) > 0
    assert padding.any()
    return np.where(padding, PADDING, ids), np.array([2, 0, 1, 1])


def language_loss(logits, ids, extract):
    """L1 as finetune-transformer-lm has it: the mean over each sequence's tokens, then over all sequences."""
    losses = []
    for scores, row in zip(logits.flatten(0, -3), ids.reshape(-1, ids.shape[-1])):
        end = int(np.flatnonzero(row == extract)[0])
        losses.append(torch.nn.functional.cross_entropy(scores[:end], torch.from_numpy(row[1 : end + 1])))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("kind", ["classification", "entailment"])
def test_the_classifier(kind):
    """OpenAIGPTForSequenceClassification, with its language model's logits computed beside it for L1."""
    ours = Classifier(GPT1(CONFIG), classes=5, auxiliary=0.5, dropout=0.0)
    theirs = reference(
        transformers.OpenAIGPTForSequenceClassification,
        vocab_size=VOCABULARY + SPECIAL, num_labels=5, pad_token_id=PADDING, layer_norm_epsilon=1e-5,
    )  # fmt: skip
    names = load(ours, theirs, "score.weight")
    ids, targets = batch(ours, kind)
    expected = theirs(torch.from_numpy(ids[:, 0]), labels=torch.from_numpy(targets))
    hidden = theirs.transformer(torch.from_numpy(ids[:, 0])).last_hidden_state
    logits = hidden @ theirs.transformer.tokens_embed.weight.T
    total = expected.loss + 0.5 * language_loss(logits[:, None], ids, ours.special.extract)
    total.backward()
    loss = ours.loss(ids, targets)
    loss.backward()
    np.testing.assert_allclose(ours(ids).numpy(), expected.logits.detach().numpy(), rtol=0, atol=1e-11)
    assert loss.item() == pytest.approx(total.item(), rel=1e-12)
    assert_same_gradients(ours, blocks_transposed(gradients_of(theirs, names)), 1e-11)


def test_multiple_choice():
    """OpenAIGPTDoubleHeadsModel. Its scores have a bias, the same for all answers, which changes nothing."""
    ours = MultipleChoice(GPT1(CONFIG), auxiliary=0.5, dropout=0.0)
    theirs = reference(transformers.OpenAIGPTDoubleHeadsModel, vocab_size=VOCABULARY + SPECIAL)
    head = "multiple_choice_head.summary"
    names = load(ours, theirs, f"{head}.weight")
    bias = dict(theirs.named_parameters())[f"{head}.bias"].requires_grad_(False)
    ids, targets = batch(ours, "multiple choice")
    ends = (ids == ours.special.extract).argmax(-1)
    expected = theirs(
        torch.from_numpy(ids), mc_token_ids=torch.from_numpy(ends), mc_labels=torch.from_numpy(targets)
    )
    total = expected.mc_loss + 0.5 * language_loss(expected.logits, ids, ours.special.extract)
    total.backward()
    loss = ours.loss(ids, targets)
    loss.backward()
    scores = (expected.mc_logits - bias).detach().numpy()
    np.testing.assert_allclose(ours(ids).numpy(), scores, rtol=0, atol=1e-11)
    assert loss.item() == pytest.approx(total.item(), rel=1e-12)
    del theirs.multiple_choice_head.summary.bias
    assert_same_gradients(ours, blocks_transposed(gradients_of(theirs, names)), 1e-11)
