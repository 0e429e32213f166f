"""GPT-1 against transformers: the same function, gradients, files and text, before and after fine-tuning."""

from __future__ import annotations

import os

import numpy as np
import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before the import below, which reads it
torch = pytest.importorskip("torch", reason="needs the extra: pip install -e '.[reference]'")
transformers = pytest.importorskip("transformers", reason="needs the extra: pip install -e '.[reference]'")

import tinyllm  # noqa: E402
from autograd import no_grad  # noqa: E402
from tinyllm.models import GPT1, GPT1Config  # noqa: E402
from tinyllm.models.gpt1 import SIZES, Classifier, MultipleChoice  # noqa: E402

CONFIGS = {
    "plain": {},
    "large epsilon": {"layer_norm_epsilon": 1e-2},
    "one head": {"n_head": 1, "n_layer": 1},
}


def configuration(**options):
    return transformers.OpenAIGPTConfig(
        **{
            "vocab_size": 61, "n_positions": 70, "n_embd": 24, "n_layer": 3, "n_head": 4,
            "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "summary_first_dropout": 0.0, **options,
        }
    )  # fmt: skip


def reference(kind=transformers.OpenAIGPTLMHeadModel, **options):
    """transformers' model with random weights that make mistakes visible: no bias near 0, no norm near 1."""
    torch.manual_seed(0)
    model = kind(configuration(**options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request, tmp_path_factory):
    """(transformers' model, ours read from its folder, the folder)."""
    theirs, folder = reference(**CONFIGS[request.param]), tmp_path_factory.mktemp("published")
    theirs.save_pretrained(folder)
    return theirs, tinyllm.from_pretrained(folder), folder


def random_ids(*shape):
    return np.random.default_rng(shape).integers(0, 61, shape)


def logits_of(theirs, ids):
    with torch.no_grad():
        return theirs(torch.from_numpy(ids)).logits.float().numpy()


def our_logits(ours, ids):
    with no_grad():
        return ours(ids).numpy()


@pytest.mark.parametrize("length", [1, 2, 65, 70])
def test_logits(pair, length):
    theirs, ours, _ = pair
    assert type(ours) is GPT1
    ids = random_ids(3, length)
    expected, found = logits_of(theirs, ids), our_logits(ours, ids)
    assert found.dtype == np.float32 and found.shape == expected.shape
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(found, expected, rtol=0, atol=5e-5)


def test_logits_and_hidden_states_in_float64(pair):
    """Where rounding hides nothing: another formula, or another epsilon, would show."""
    theirs, _, folder = pair
    ours, ids = GPT1.from_pretrained(folder, np.float64), random_ids(2, 70)
    with torch.no_grad():
        found = theirs.double()(torch.from_numpy(ids), output_hidden_states=True)
    theirs.float()
    with no_grad():
        hidden = ours.hidden_states(ids).numpy()
    np.testing.assert_allclose(hidden, found.hidden_states[-1].numpy(), rtol=0, atol=1e-11)
    np.testing.assert_allclose(our_logits(ours, ids), found.logits.numpy(), rtol=0, atol=1e-11)


def assert_same_gradients(ours, theirs, names, tolerance):
    """names: our parameter -> theirs. Errors are measured against the largest gradient of the tensor."""
    gradients = {name: parameter.grad.numpy() for name, parameter in theirs.named_parameters()}
    assert len(gradients) == len(ours.parameters()) == len(set(names.values()))
    for name, parameter in ours.named_parameters():
        g, found = gradients[names[name]], parameter.grad.numpy()
        # In the published layout the matrices of the blocks are stored (in, out).
        found = found.T if found.ndim == 2 and ".blocks." in f".{name}" else found
        np.testing.assert_allclose(found, g, rtol=0, atol=tolerance * np.abs(g).max(), err_msg=name)


# float32: a gradient here is a sum over 138 positions of terms of either sign, each rounded to 6e-8 of
# itself; so its error is measured against the largest of its tensor. A key's bias has the gradient 0.
@pytest.mark.parametrize("dtype, tolerance", [(np.float32, 1e-5), (np.float64, 1e-12)])
def test_loss_and_gradients(pair, dtype, tolerance):
    theirs, _, folder = pair
    ours, ids = GPT1.from_pretrained(folder, dtype), random_ids(2, 70)
    theirs.zero_grad()
    theirs.to(torch.float64 if dtype == np.float64 else torch.float32)
    labels = torch.from_numpy(ids).clone()
    labels[1, 5:9] = -100
    logits = theirs(torch.from_numpy(ids)).logits  # theirs(ids, labels=labels) rounds them to float32
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    expected.backward()
    loss = ours.loss(ids[:, :-1], labels.numpy()[:, 1:])
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    names = {name: ours.published_name(name) for name, _ in ours.named_parameters()}
    assert_same_gradients(ours, theirs, names, tolerance)
    theirs.float()


def test_transformers_reads_what_we_write(pair, tmp_path):
    theirs, ours, _ = pair
    ours.save_pretrained(tmp_path)
    again, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(again) is transformers.OpenAIGPTLMHeadModel and again.dtype == torch.float32
    assert {kind: list(names) for kind, names in report.items() if names} == {}
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    for option in ("n_head", "layer_norm_epsilon", "resid_pdrop", "n_positions", "afn"):
        assert getattr(again.config, option) == getattr(theirs.config, option)
    ids = random_ids(2, 70)
    # The same weights; but where an array happens to lie in memory, its sums may round otherwise.
    np.testing.assert_allclose(logits_of(again.eval(), ids), logits_of(theirs, ids), rtol=0, atol=1e-5)


def test_a_model_of_ours_is_one_of_theirs(tmp_path):
    """Not read from their files before: our configuration and initialization, written and read by them."""
    ours = GPT1(GPT1Config(61, 70, 24, 2, 3), seed=0).eval()
    ours.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = random_ids(2, 70)
    np.testing.assert_allclose(our_logits(ours, ids), logits_of(theirs, ids), rtol=0, atol=5e-5)
    assert GPT1.from_pretrained(tmp_path).config == ours.config


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_files(dtype, tmp_path):
    """A half is exact in float32, so the same weights give the same logits."""
    halves = reference().to(getattr(torch, dtype))
    halves.save_pretrained(tmp_path)
    ours, ids = tinyllm.from_pretrained(tmp_path), random_ids(2, 70)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(our_logits(ours, ids), logits_of(halves.float(), ids), rtol=0, atol=5e-5)


def test_shards(tmp_path):
    theirs = reference()
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    ids = random_ids(2, 70)
    np.testing.assert_allclose(
        our_logits(tinyllm.from_pretrained(tmp_path), ids), logits_of(theirs, ids), rtol=0, atol=5e-5
    )


def test_the_bare_model_without_a_head(tmp_path):
    """Written by OpenAIGPTModel: no tensor has the prefix, as in the published files."""
    theirs = reference()
    theirs.transformer.save_pretrained(tmp_path)
    ids = random_ids(2, 70)
    np.testing.assert_allclose(
        our_logits(tinyllm.from_pretrained(tmp_path), ids), logits_of(theirs, ids), rtol=0, atol=5e-5
    )


def test_greedy_text(pair):
    theirs, ours, _ = pair
    ids = random_ids(2, 6)
    with torch.no_grad():
        expected = theirs.generate(
            torch.from_numpy(ids),
            attention_mask=torch.ones(2, 6, dtype=torch.int64),
            max_new_tokens=64,
            do_sample=False,
            pad_token_id=0,
        )
    found = ours.generate(ids, 64, temperature=0)
    assert np.array_equal(found, expected.numpy()) and found.shape == (2, 70)


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
CONFIG = GPT1Config(61, 70, 24, 3, 4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)


def load(ours, theirs, head):
    """Give our fine-tuned model their weights; returns our parameters' names -> theirs."""
    names = {f"model.{name}": ours.model.published_name(name) for name, _ in ours.model.named_parameters()}
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
        vocab_size=61 + SPECIAL, num_labels=5, pad_token_id=PADDING, layer_norm_epsilon=1e-5,
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
    assert_same_gradients(ours, theirs, names, 1e-11)


def test_multiple_choice():
    """OpenAIGPTDoubleHeadsModel. Its scores have a bias, the same for all answers, which changes nothing."""
    ours = MultipleChoice(GPT1(CONFIG), auxiliary=0.5, dropout=0.0)
    theirs = reference(transformers.OpenAIGPTDoubleHeadsModel, vocab_size=61 + SPECIAL)
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
    assert_same_gradients(ours, theirs, names, 1e-11)
