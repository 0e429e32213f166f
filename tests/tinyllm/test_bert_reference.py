"""BERT against transformers: the same functions, gradients and files, with padding and segments."""

from __future__ import annotations

import numpy as np
import pytest

import tinyllm
from autograd import no_grad
from tinyllm.models import BERT, BERTConfig
from tinyllm.models.bert import SIZES
from tinyllm.models.bert_tasks import SequenceClassifier, SpanFinder, TokenTagger
from tinyllm.spans import best_spans

from .folders import edit, one_line
from .reference import (
    VOCABULARY,
    converted,
    gradients_of,
    published_names,
    scrambled,
    torch,
    transformers,
)

KINDS = {
    "BertModel": BERT,
    "BertForPreTraining": BERT,
    "BertForMaskedLM": BERT,
    "BertForNextSentencePrediction": BERT,
    "BertForSequenceClassification": SequenceClassifier,
    "BertForTokenClassification": TokenTagger,
    "BertForQuestionAnswering": SpanFinder,
}
CONFIGS = {
    "plain": {},
    "large epsilon, one head, three segments": {
        "layer_norm_eps": 1e-2,
        "num_attention_heads": 1,
        "type_vocab_size": 3,
    },
}


def reference(kind, **options):
    """transformers' model with random weights."""
    config = {
        "vocab_size": VOCABULARY, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3,
        "intermediate_size": 40, "max_position_embeddings": 70, "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0, "num_labels": 2 if kind == "BertForQuestionAnswering" else 5,
        **options,
    }  # fmt: skip
    return scrambled(getattr(transformers, kind), transformers.BertConfig(**config))


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module", params=CONFIGS)
def pair(kind, request, tmp_path_factory):
    """(transformers' model, ours read from its folder, the folder)."""
    theirs, folder = reference(kind, **CONFIGS[request.param]), tmp_path_factory.mktemp("published")
    theirs.save_pretrained(folder)
    return theirs, tinyllm.from_pretrained(folder), folder


def padded(B, T, segments=2):
    """(ids, mask, segments): rows of all lengths, T and 1 among them. The id 0 stands at padding only, for
    transformers keeps the gradient of its row at 0."""
    rng = np.random.default_rng((B, T))
    lengths = np.array([T, 1, *rng.integers(1, T + 1, B)])[:B]
    mask = (np.arange(T) < lengths[:, None]).astype(np.int64)
    ids = np.where(mask, rng.integers(1, VOCABULARY, (B, T)), 0)
    return ids, mask, rng.integers(0, segments, (B, T))


def call(theirs, inputs, **labels):
    ids, mask, segments = (None if a is None else torch.from_numpy(a) for a in inputs)
    labels = {name: torch.from_numpy(a) for name, a in labels.items()}
    return theirs(ids, attention_mask=mask, token_type_ids=segments, **labels)


def outputs(theirs, inputs):
    """What our Output holds, of theirs, as arrays; None for what they do not have."""
    with torch.no_grad():
        hidden = call(theirs.base_model, inputs)
        out = call(theirs, inputs)
    kind = type(theirs).__name__
    logits = out.get("logits")
    if kind == "BertForQuestionAnswering":
        logits = torch.stack([out.start_logits, out.end_logits], dim=-1)
    tokens = logits if kind == "BertForMaskedLM" else out.get("prediction_logits")
    follows = logits if kind == "BertForNextSentencePrediction" else out.get("seq_relationship_logits")
    logits = logits if KINDS[kind] is not BERT else None
    found = hidden.last_hidden_state, hidden.pooler_output, tokens, follows, logits
    return [None if a is None else a.numpy() for a in found]


def assert_same(theirs, ours, inputs, tolerance):
    """At all positions that are no padding."""
    with no_grad():
        found = ours(*inputs)
    for name, a, b in zip(found._fields, found, outputs(theirs, inputs)):
        assert (a is None) == (b is None), name
        if a is None:
            continue
        a = a.numpy()
        assert a.dtype == ours.dtype == b.dtype and a.shape == b.shape, name
        if a.ndim == 3 and inputs[1] is not None:
            a, b = a[inputs[1] == 1], b[inputs[1] == 1]
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("length", [1, 2, 65, 70])
def test_outputs(pair, kind, length):
    theirs, ours, _ = pair
    assert type(ours) is KINDS[kind] and ours.config.architecture == kind
    ids, mask, segments = padded(4, length, theirs.config.type_vocab_size)
    for inputs in ((ids, mask, segments), (ids, None, segments), (ids, mask, None), (ids, None, None)):
        assert_same(theirs, ours, inputs, 5e-5)


def test_outputs_in_float64(pair, kind):
    """Where rounding hides nothing: another formula, or another epsilon, would show."""
    theirs, _, folder = pair
    theirs, ours = converted(theirs, np.float64), tinyllm.from_pretrained(folder, np.float64)
    assert_same(theirs, ours, padded(5, 70), 1e-11)


def loss_of(theirs, inputs, kind):
    """(their loss, our targets)."""
    rng = np.random.default_rng(3)
    ids, mask, _ = inputs
    B, T = ids.shape
    tokens = np.where(
        (mask == 0) | (rng.random(ids.shape) < 0.7), -100, rng.integers(0, VOCABULARY, ids.shape)
    )
    tokens[0, 0], follows = 7, rng.integers(0, 2, B)
    classes, tags = rng.integers(0, 5, B), np.where(tokens == -100, -100, tokens % 5)
    if kind == "BertForPreTraining":
        return call(theirs, inputs, labels=tokens, next_sentence_label=follows).loss, (tokens, follows)
    if kind == "BertForMaskedLM":
        return call(theirs, inputs, labels=tokens).loss, tokens
    if kind == "BertForSequenceClassification":
        return call(theirs, inputs, labels=classes).loss, classes
    if kind == "BertForTokenClassification":
        return call(theirs, inputs, labels=tags).loss, tags
    places = rng.integers(0, mask.sum(axis=1)[:, None], (B, 2))
    out = call(theirs, inputs)  # its own loss lets padding take part
    loss = 0
    for logits, place in zip((out.start_logits, out.end_logits), places.T):
        logits = logits.masked_fill(torch.from_numpy(mask == 0), -torch.inf)
        loss = loss + torch.nn.functional.cross_entropy(logits, torch.from_numpy(place)) / 2
    return loss, places


@pytest.mark.parametrize("dtype, tolerance", [(np.float32, 1e-4), (np.float64, 1e-11)])
def test_losses_and_gradients(pair, kind, dtype, tolerance):
    if kind in ("BertModel", "BertForNextSentencePrediction"):
        pytest.skip("has no loss of its own here")
    theirs, _, folder = pair
    theirs, ours, inputs = converted(theirs, dtype), tinyllm.from_pretrained(folder, dtype), padded(5, 70)
    expected, targets = loss_of(theirs, inputs, kind)
    expected.backward()
    losses = ours.loss(inputs, targets)
    loss = losses[0] + losses[1] if isinstance(losses, tuple) else losses
    loss.backward()
    assert loss.dtype == dtype and loss.item() == pytest.approx(expected.item(), rel=tolerance)
    # What adds the same to all that a softmax compares has the gradient 0; in rounding both may differ.
    last = f"blocks.{ours.config.num_hidden_layers - 1}.norm_2.bias"
    zero = ("key.bias", "span.bias", last) if kind == "BertForQuestionAnswering" else ("key.bias",)
    parameters = dict(ours.named_parameters())
    for name, g in gradients_of(theirs, published_names(ours)).items():
        size, found = np.abs(g).max(), parameters[name].grad.numpy()
        assert (size < tolerance / 10) == name.endswith(zero), name
        size = 1 if name.endswith(zero) else size
        np.testing.assert_allclose(found, g, rtol=0, atol=tolerance * size, err_msg=name)


def test_the_loss_of_spans_without_padding(tmp_path):
    """Then theirs is ours."""
    theirs = reference("BertForQuestionAnswering")
    ours = SpanFinder(
        BERTConfig.from_published(theirs.config.to_dict() | {"architectures": [type(theirs).__name__]}), None
    )
    ours.load_state_dict({name: theirs.state_dict()[p].numpy() for name, p in published_names(ours).items()})
    ids, places = padded(4, 70)[0] % 60 + 1, np.array([[3, 8], [0, 0], [5, 5], [60, 69]])
    start, end = (torch.from_numpy(p.copy()) for p in places.T)
    expected = theirs(torch.from_numpy(ids), start_positions=start, end_positions=end).loss
    assert ours.loss(ids, places).item() == pytest.approx(expected.item(), rel=1e-6)


def read_back(theirs, ours, folder):
    """Their model as transformers reads it from the folder that ours writes, with every weight as it was."""
    ours.save_pretrained(folder)
    again, report = type(theirs).from_pretrained(folder, output_loading_info=True)
    assert {kind: list(names) for kind, names in report.items() if names} == {}
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    return again.eval()


def test_transformers_reads_what_we_write(pair, tmp_path):
    theirs, ours, _ = pair
    again = read_back(theirs, ours, tmp_path)
    for option in ("layer_norm_eps", "num_attention_heads", "type_vocab_size", "hidden_act", "id2label",
                   "num_labels", "classifier_dropout", "architectures"):  # fmt: skip
        if option not in ("id2label", "num_labels") or ours.config.labels:
            assert getattr(again.config, option) == getattr(theirs.config, option), option
    assert_same(again, ours, padded(4, 70), 5e-5)


@pytest.mark.parametrize("task", [None, SequenceClassifier, TokenTagger, SpanFinder])
def test_a_model_of_ours_is_one_of_theirs(task, tmp_path):
    """Not read from their files before: our configuration, initialization and labels, read by them."""
    ours = BERT(BERTConfig(VOCABULARY, 24, 2, 3, 40, max_position_embeddings=70), seed=0)
    ours = ours if task is None else task.on(ours, ("tall", "short", "odd") if task is not SpanFinder else ())
    ours.eval().save_pretrained(tmp_path)
    kind = getattr(transformers, ours.config.architecture)
    theirs, report = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert_same(theirs.eval(), ours, padded(3, 70), 5e-5)
    if ours.config.labels:
        assert theirs.config.id2label == {0: "tall", 1: "short", 2: "odd"}
    automatic = transformers.AutoModel.from_pretrained(tmp_path)  # the encoder of any of them
    assert type(automatic) is transformers.BertModel


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_files(kind, dtype, tmp_path):
    """A half is exact in float32, so the same weights give the same outputs."""
    halves = reference(kind).to(getattr(torch, dtype))
    halves.save_pretrained(tmp_path)
    assert_same(halves.float(), tinyllm.from_pretrained(tmp_path), padded(3, 70), 5e-5)


def test_shards(kind, tmp_path):
    theirs = reference(kind)
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert_same(theirs, tinyllm.from_pretrained(tmp_path), padded(3, 70), 5e-5)


def test_old_names(tmp_path):
    """The same reading of LayerNorm.gamma and beta and of stored position_ids as transformers has."""
    theirs = reference("BertForPreTraining")
    tensors = {}
    for name, tensor in theirs.state_dict().items():
        if "LayerNorm" in name:
            name = name.replace("weight", "gamma").replace("bias", "beta")
        tensors[name] = tensor.clone()
    tensors["bert.embeddings.position_ids"] = torch.arange(70)[None]
    theirs.save_pretrained(tmp_path)
    from safetensors.torch import save_file

    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    edit(tmp_path, tie_word_embeddings=..., architectures=["BertForMaskedLM"])
    ours = tinyllm.from_pretrained(tmp_path)
    assert_same(theirs, ours, padded(3, 70), 5e-5)
    again = transformers.BertForPreTraining.from_pretrained(tmp_path).eval()
    assert_same(again, ours, padded(3, 70), 5e-5)


def test_a_bare_model_without_a_pooler(tmp_path):
    theirs = reference("BertModel")
    theirs.pooler = None
    theirs.save_pretrained(tmp_path)
    assert_same(theirs, tinyllm.from_pretrained(tmp_path), padded(3, 70), 5e-5)


def test_a_head_on_the_model_that_transformers_trained(tmp_path):
    """The encoder and the pooler under our new head are theirs."""
    theirs = reference("BertForPreTraining")
    theirs.save_pretrained(tmp_path)
    model, inputs = SequenceClassifier.on(tinyllm.from_pretrained(tmp_path), ("a", "b")), padded(4, 70)
    pooled = outputs(theirs, inputs)[1]
    expected = pooled @ model.classifier.weight.numpy().T + model.classifier.bias.numpy()
    np.testing.assert_allclose(model.eval()(*inputs).logits.numpy(), expected, rtol=0, atol=5e-5)


def test_a_cross_encoder(tmp_path):
    """One label, a score: their logits; and their loss, which is regression, we do not have."""
    theirs = reference("BertForSequenceClassification", num_labels=1)
    theirs.config.sentence_transformers = {"activation_fn": "torch.nn.modules.linear.Identity"}
    theirs.save_pretrained(tmp_path)
    ours, inputs = tinyllm.from_pretrained(tmp_path), padded(4, 70)
    assert ours.config.labels == ("LABEL_0",)
    assert_same(theirs, ours, inputs, 5e-5)
    assert_same(read_back(theirs, ours, tmp_path / "again"), ours, inputs, 5e-5)
    assert "no loss" in one_line(pytest.raises(tinyllm.InputError, ours.loss, inputs, np.zeros(4, int)))
    call(theirs, inputs, labels=np.zeros(4, np.float32))
    assert theirs.config.problem_type == "regression"


@pytest.mark.parametrize(
    "option",
    [
        {"hidden_act": "relu"},
        {"problem_type": "regression"},
        {"problem_type": "multi_label_classification"},
        {"hidden_act": "gelu_new"},
        {"is_decoder": True},
        {"tie_word_embeddings": False},
    ],
    ids=str,
)
def test_what_we_do_not_implement_is_refused_as_transformers_writes_it(option, tmp_path):
    reference("BertForPreTraining", **option).save_pretrained(tmp_path)
    error = pytest.raises(tinyllm.InputError, tinyllm.from_pretrained, tmp_path)
    assert next(iter(option)) in one_line(error)


def test_another_task_is_refused(tmp_path):
    reference("BertForMultipleChoice").save_pretrained(tmp_path)
    error = pytest.raises(tinyllm.InputError, tinyllm.from_pretrained, tmp_path)
    assert "'BertForMultipleChoice'" in one_line(error)


@pytest.mark.parametrize("size, options", [
    ("bert-base-uncased", {}),
    ("bert-large-uncased", {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
                            "intermediate_size": 4096}),
])  # fmt: skip
def test_the_published_sizes(size, options):
    """transformers' default configuration is BASE; and its parameters are as many as ours."""
    config = transformers.BertConfig(**options)
    for name, value in vars(SIZES[size]).items():
        if name not in ("architecture", "heads", "labels"):
            assert getattr(config, name) == value, name
    with torch.device("meta"):
        model = transformers.BertForPreTraining(config)
    count = {"bert-base-uncased": 110_106_428, "bert-large-uncased": 336_226_108}[size]
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_answers():
    """The best span of their logits, found by trying all."""
    theirs, (ids, mask, segments) = reference("BertForQuestionAnswering"), padded(6, 40)
    logits = outputs(theirs, (ids, mask, segments))[-1]
    places, _ = best_spans(logits, mask, longest=7)
    for row, length, place in zip(logits, mask.sum(axis=1), places):
        spans = [(i, j) for i in range(length) for j in range(i, min(i + 7, length))]
        assert tuple(place) == max(spans, key=lambda span: row[span[0], 0] + row[span[1], 1])
