"""GPT-1: its block, its files, and fine-tuning. What all causal models share is in test_family.py."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import save_file

import tinyllm
from autograd import nn, no_grad
from tinyllm.errors import InputError
from tinyllm.models import GPT1, GPT1Config
from tinyllm.models.gpt1 import SIZES, Classifier, MultipleChoice, SpecialTokens
from tinyllm.parallel import DataParallel
from tinyllm.training import Recipe, fit

from .folders import assert_identical, edit, one_line, stored
from .tiny import assert_dropout_in_training_only, assert_gradients_are_derivatives, scramble

# Longer than one block of 64 queries of the fused attention; three heads, so that H is not d.
TINY = GPT1Config(31, 80, 24, 2, 3, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
SHORT = replace(TINY, n_positions=8, n_embd=6, vocab_size=7)


def scrambled(config=TINY, seed=0, dtype=np.float32):
    return scramble(GPT1(config, seed), seed, dtype)


def texts(count, longest=20, seed=0, vocabulary=TINY.vocab_size):
    """Rows of tokens of different lengths, 1 and the longest among them."""
    rng = np.random.default_rng(seed)
    lengths = [1, longest, *rng.integers(2, longest, count)][:count]
    return [rng.integers(0, vocabulary, n).tolist() for n in lengths]


# The function that it computes


def in_numpy(model, ids):
    """The paper's section 3.1 in float64: each sum is normalized, and nothing comes after the last block."""
    w = {name: p.numpy().astype(np.float64) for name, p in model.named_parameters()}
    c, (B, T) = model.config, ids.shape

    def linear(x, name):
        return x @ w[name + ".weight"].T + w[name + ".bias"]

    def norm(x, name):
        centred = x - x.mean(-1, keepdims=True)
        y = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + c.layer_norm_epsilon)
        return y * w[name + ".weight"] + w[name + ".bias"]

    def attention(x, name):
        q, k, v = np.split(linear(x, name + ".query_key_value"), 3, axis=-1)
        q, k, v = (a.reshape(B, T, c.n_head, -1).swapaxes(1, 2) for a in (q, k, v))
        scores = q @ k.swapaxes(-1, -2) / np.sqrt(c.n_embd // c.n_head)
        scores[..., np.triu(np.ones((T, T), bool), 1)] = -np.inf
        p = np.exp(scores - scores.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        return linear((p @ v).swapaxes(1, 2).reshape(B, T, -1), name + ".projection")

    def mlp(x, name):
        x = linear(x, name + ".expand")
        x = x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
        return linear(x, name + ".projection")

    x = w["token_embedding.weight"][ids] + w["position_embedding.weight"][:T]
    for i in range(c.n_layer):
        block = f"blocks.{i}"
        x = norm(x + attention(x, block + ".attention"), block + ".norm_1")
        x = norm(x + mlp(x, block + ".mlp"), block + ".norm_2")
    return x @ w["token_embedding.weight"].T


@pytest.mark.parametrize("dtype, tolerance", [(np.float32, 5e-5), (np.float64, 1e-12)])
def test_the_formula(both, dtype, tolerance):
    model = scrambled(replace(TINY, layer_norm_epsilon=1e-2), dtype=dtype)
    ids = np.random.default_rng(0).integers(0, 31, (2, 80))
    expected, found = in_numpy(model, ids), model(ids).numpy()
    assert found.dtype == dtype and np.abs(expected).max() > 1
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    "kind, silent",
    [("embd_pdrop", ""), ("attn_pdrop", "mlp"), ("resid_pdrop", "mlp"), ("resid_pdrop", "attention")],
)
def test_dropout_is_on_in_training_and_off_in_evaluation(kind, silent):
    """Each alone: a sub-block that is silent adds nothing to its input, so its dropout changes nothing."""
    model, without = scrambled(replace(TINY, **{kind: 0.5})), scrambled()
    ids = np.random.default_rng(0).integers(0, 31, (2, 20))
    for name, parameter in [*model.named_parameters(), *without.named_parameters()]:
        if silent and f"{silent}.projection" in name:
            parameter.data = np.zeros_like(parameter.data)
    assert_dropout_in_training_only(model, without, ids)


def test_parameter_count():
    with nn.skeleton():
        assert GPT1(SIZES["openai-gpt"], seed=None).parameter_count() == 116_534_784


def test_first_weights():
    """Section 4.1: all matrices from N(0, 0.02), none smaller for standing before a residual sum."""
    model = GPT1(GPT1Config(400, 300, 64, 4, 4), seed=0)
    for name, parameter in model.named_parameters():
        values = parameter.numpy()
        assert values.dtype == np.float32
        if parameter.ndim == 1:
            assert (values == (1 if "norm" in name and name.endswith("weight") else 0)).all(), name
        else:
            assert values.std() == pytest.approx(0.02, rel=0.04), name
    assert not np.array_equal(GPT1(TINY, 1).state_dict()["token_embedding.weight"],
                              GPT1(TINY, 0).state_dict()["token_embedding.weight"])  # fmt: skip


# Published folders

# The options of the published config.json. Its weights are from before the prefix, with the masks as buffers.
PUBLISHED = {
    "afn": "gelu", "architectures": ["OpenAIGPTLMHeadModel"], "attn_pdrop": 0.1, "embd_pdrop": 0.1,
    "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "model_type": "openai-gpt", "n_ctx": 512,
    "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 512, "n_special": 0,
    "predict_special_tokens": True, "resid_pdrop": 0.1, "summary_activation": None,
    "summary_first_dropout": 0.1, "summary_proj_to_labels": True, "summary_type": "cls_index",
    "summary_use_proj": True, "vocab_size": 40478,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
}  # fmt: skip


@pytest.fixture
def saved(tmp_path):
    model = scrambled(replace(TINY, layer_norm_epsilon=1e-3))
    model.save_pretrained(tmp_path)
    return tmp_path, model


def test_the_published_config():
    assert GPT1Config.from_published(PUBLISHED) == SIZES["openai-gpt"]
    assert GPT1Config.from_published({"model_type": "openai-gpt"}) == SIZES["openai-gpt"]


def test_the_published_layout(saved):
    """Names and shapes as in the published files: matrices of blocks (in, out), the head only once."""
    folder, model = saved
    C = 24
    block = {
        "attn.c_attn.weight": (C, 3 * C), "attn.c_attn.bias": (3 * C,),
        "attn.c_proj.weight": (C, C), "attn.c_proj.bias": (C,), "ln_1.weight": (C,), "ln_1.bias": (C,),
        "mlp.c_fc.weight": (C, 4 * C), "mlp.c_fc.bias": (4 * C,),
        "mlp.c_proj.weight": (4 * C, C), "mlp.c_proj.bias": (C,), "ln_2.weight": (C,), "ln_2.bias": (C,),
    }  # fmt: skip
    expected = {"tokens_embed.weight": (31, C), "positions_embed.weight": (80, C)}
    expected |= {f"h.{i}.{name}": shape for i in range(2) for name, shape in block.items()}
    found = stored(folder)
    assert {name: array.shape for name, array in found.items()} == {
        f"transformer.{name}": shape for name, shape in expected.items()
    }
    square = found["transformer.h.1.attn.c_proj.weight"]  # whose shape does not tell the layout
    assert np.array_equal(square, model.blocks[1].attention.projection.weight.numpy().T)
    assert_identical(tinyllm.from_pretrained(folder), model)


@pytest.mark.parametrize("prefix", ["transformer.", ""])
@pytest.mark.parametrize("head", [False, True])
def test_old_files(saved, prefix, head):
    """Without the prefix, with each layer's mask and the positions' numbers, perhaps with the tied head."""
    folder, model = saved
    arrays = {name.replace("transformer.", prefix): array for name, array in stored(folder).items()}
    for i in range(2):
        arrays[f"{prefix}h.{i}.attn.bias"] = np.tril(np.ones((1, 1, 80, 80), np.float32))
    arrays[f"{prefix}position_ids"] = np.arange(80)
    if head:
        arrays["lm_head.weight"] = arrays[f"{prefix}tokens_embed.weight"]
    save_file(arrays, folder / "model.safetensors")
    edit(folder, n_ctx=80, dtype=..., n_special=0, predict_special_tokens=True, tie_word_embeddings=True)
    assert_identical(GPT1.from_pretrained(folder), model)


@pytest.mark.parametrize(
    "option, said",
    [
        ({"afn": "relu"}, "afn = 'relu'"),
        ({"afn": "gelu_new"}, "afn = 'gelu_new'"),  # transformers knows it under no such name
        ({"tie_word_embeddings": False}, "tie_word_embeddings = False"),
        ({"n_special": 3}, "n_special = 3"),
        ({"n_ctx": 64}, "n_ctx = 64"),
        ({"n_inner": 96}, "n_inner = 96 (unknown)"),
        ({"n_head": 5}, "5 heads do not divide the width 24"),
        ({"n_layer": 0}, "n_layer is 0"),
        ({"n_embd": True}, "n_embd"),
        ({"attn_pdrop": 1}, "attn_pdrop is 1"),
        ({"layer_norm_epsilon": 0}, "layer_norm_epsilon is 0"),
        ({"model_type": "gpt2"}, "'gpt2', not 'openai-gpt'"),
    ],
    ids=str,
)
def test_configs_that_are_refused(saved, option, said):
    folder, _ = saved
    edit(folder, **option)
    assert said in one_line(pytest.raises(InputError, GPT1.from_pretrained, folder))


# The input transformations of section 3.3

SPECIAL = SpecialTokens(start=100, delimiter=101, extract=102)


def test_the_sequences_of_each_task():
    a, b, c = [1, 2, 3], [4], [5, 6]
    assert SPECIAL.classification(a) == [[100, 1, 2, 3, 102]]
    assert SPECIAL.entailment(a, b) == [[100, 1, 2, 3, 101, 4, 102]]
    assert SPECIAL.similarity(a, b) == [[100, 1, 2, 3, 101, 4, 102], [100, 4, 101, 1, 2, 3, 102]]
    expected = [[100, 1, 2, 3, 101, 4, 102], [100, 1, 2, 3, 101, 5, 6, 102]]
    assert SPECIAL.multiple_choice(a, [b, c]) == expected
    assert SPECIAL.classification(np.array(a)) == SPECIAL.classification(a)


def test_batches_are_padded_on_the_right():
    ids = SPECIAL.batch([SPECIAL.similarity([1], [2]), SPECIAL.similarity([3, 4, 5], [6])])
    assert ids.shape == (2, 2, 7)
    assert ids[0, 1, :5].tolist() == [100, 2, 101, 1, 102] and ids[1, 1].tolist() == [
        100,
        6,
        101,
        3,
        4,
        5,
        102,
    ]


def test_batches_that_are_none():
    one, two = SPECIAL.classification([1]), SPECIAL.similarity([1], [2])
    for examples in ([], [one, two], [[]]):
        assert "equally many sequences" in one_line(pytest.raises(InputError, SPECIAL.batch, examples))


# Fine-tuning


def classifier(classes=4, dtype=np.float32, config=TINY, **options):
    """(a classifier with visible weights, a batch of six examples for it, their targets)."""
    model = scramble(Classifier(GPT1(config), classes, **{"dropout": 0.0, **options}), dtype=dtype)
    examples = [model.special.classification(text) for text in texts(6, config.n_positions - 2)]
    return model, model.special.batch(examples), np.array([3, 0, 1, 2, 3, 1]) % classes


def similarity(dtype=np.float32):
    model = scramble(Classifier(GPT1(TINY), 3, dropout=0.0), dtype=dtype)
    pairs = zip(texts(5), texts(5, seed=1))
    return (
        model,
        model.special.batch([model.special.similarity(*p) for p in pairs]),
        np.array([2, 0, 1, 1, 2]),
    )


def multiple_choice(dtype=np.float32):
    model = scramble(MultipleChoice(GPT1(TINY), dropout=0.0), dtype=dtype)
    answers = [texts(4, 9, seed=i) for i in range(5)]
    examples = [model.special.multiple_choice(t, a) for t, a in zip(texts(5), answers)]
    return model, model.special.batch(examples), np.array([2, 0, 3, 1, 3])


TASKS = {"classification": classifier, "similarity": similarity, "multiple choice": multiple_choice}


@pytest.fixture(params=TASKS)
def task(request):
    return TASKS[request.param]


def log_softmax(logits):
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def losses(model, ids, targets):
    """(L2, L1), of each example, one sequence at a time and without its padding, by the formulas."""
    L2, L1 = [], []
    for example, target in zip(ids, targets):
        read, nats = [], []
        for sequence in example:
            sequence = sequence[: np.flatnonzero(sequence == model.special.extract)[0] + 1]
            with no_grad():
                hidden = model.model.hidden_states(sequence[None]).numpy()[0]
                log_p = log_softmax(model.model(sequence[None]).numpy()[0])
            read.append(hidden[-1])
            nats.append(np.mean([-log_p[i, sequence[i + 1]] for i in range(len(sequence) - 1)]))
        W = model.head.weight.numpy()
        logits = W[0] @ np.transpose(read) if len(W) == 1 else W @ np.sum(read, axis=0)
        L2.append(-log_softmax(logits)[target])
        L1.append(np.mean(nats))
    return np.array(L2), np.array(L1)


def test_the_loss_is_L2_and_lambda_L1(both, task):
    model, ids, targets = task(dtype=np.float64)
    L2, L1 = losses(model, ids, targets)
    with no_grad():
        assert model(ids).shape == (
            len(ids),
            ids.shape[1] if task is multiple_choice else len(model.head.weight),
        )
        for weight in (0.5, 0.0, 2.0):
            model.auxiliary = weight
            expected = L2 + weight * L1
            np.testing.assert_allclose(model.loss(ids, targets).item(), expected.mean(), rtol=1e-12)
            np.testing.assert_allclose(
                model.loss(ids, targets, reduction="sum").item(), expected.sum(), rtol=1e-12
            )
            some = np.where(np.arange(len(ids)) % 2, targets, -100)
            np.testing.assert_allclose(model.loss(ids, some).item(), expected[1::2].mean(), rtol=1e-12)
        assert model.loss(ids, np.full(len(ids), -100)).item() == 0


def test_the_gradients_are_derivatives_of_the_loss(both, task):
    """With all dropout on, with respect to every parameter, the special tokens' embeddings among them."""
    config = replace(SHORT, resid_pdrop=0.2, embd_pdrop=0.2, attn_pdrop=0.2)
    kind = MultipleChoice if task is multiple_choice else Classifier
    options = {} if kind is MultipleChoice else {"classes": 3}
    model = scramble(kind(GPT1(config), dropout=0.3, **options), dtype=np.float64).train()
    short = [(t[:3], u[:2]) for t, u in zip(texts(3, vocabulary=7), texts(3, seed=1, vocabulary=7))]
    make = {
        classifier: lambda t, u: model.special.classification(t),
        similarity: model.special.similarity,
        multiple_choice: lambda t, u: model.special.multiple_choice(t, [u, t[:1]]),
    }[task]
    ids, targets = model.special.batch([make(*pair) for pair in short]), np.array([1, 0, -100])
    assert_gradients_are_derivatives(model, ids, targets, projections=2)


def gradients(model, ids, targets):
    """Its loss and the gradient of each parameter."""
    for parameter in model.parameters():
        parameter.grad = None
    loss = model.loss(ids, targets)
    loss.backward()
    return loss.item(), {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}


def test_padding_changes_nothing(both, task):
    """Whatever it is: any word, or another of the special tokens. Not one bit of the results; of gradients
    only the last, where the zeros from the padding stand elsewhere among the terms of a sum."""
    model, ids, targets = task(dtype=np.float64)
    padding = np.cumsum(ids == model.special.extract, axis=-1) - (ids == model.special.extract) > 0
    assert padding.any(axis=(1, 2)).sum() >= len(ids) - 1 and not padding.all(axis=-1).any()
    other = np.where(padding, np.random.default_rng(0).integers(0, 34, ids.shape), ids)
    assert (other != ids).any()
    with no_grad():
        assert np.array_equal(model(ids).numpy(), model(other).numpy())
    (loss, found), (other_loss, expected) = gradients(model, ids, targets), gradients(model, other, targets)
    assert loss == other_loss
    for name, g in expected.items():
        assert np.abs(g).max() > 1e-6, name
        np.testing.assert_allclose(found[name], g, rtol=0, atol=1e-14, err_msg=name)


def test_the_company_in_a_batch_changes_nothing(task):
    model, ids, targets = task()
    with no_grad():
        together = model(ids).numpy()
        for row, example in zip(together, ids):
            longest = max(int(np.flatnonzero(s == model.special.extract)[0]) for s in example) + 1
            np.testing.assert_allclose(model(example[None, :, :longest]).numpy()[0], row, rtol=0, atol=2e-5)


def test_similarity_knows_no_order():
    model, ids, _ = similarity()
    with no_grad():
        np.testing.assert_allclose(model(ids[:, ::-1]).numpy(), model(ids).numpy(), rtol=0, atol=1e-5)
        one = ids.copy()
        one[:, 1] = one[:, 0]  # but both orders count
        assert (np.abs(model(one).numpy() - model(ids).numpy()).max(axis=1)[2:] > 1e-3).all()


def test_each_answer_has_a_score_of_its_own():
    model, ids, _ = multiple_choice()
    order = [2, 0, 3, 1]
    with no_grad():
        scores = model(ids).numpy()
        np.testing.assert_allclose(model(ids[:, order]).numpy(), scores[:, order], rtol=0, atol=1e-5)
        np.testing.assert_allclose(model(ids[:, :2]).numpy(), scores[:, :2], rtol=0, atol=1e-5)
    assert (scores.std(axis=1) > 1e-2).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_only_the_head_and_three_embeddings_are_new(dtype):
    pretrained = scrambled(dtype=dtype)
    before = {name: array.copy() for name, array in pretrained.state_dict().items()}
    model = Classifier(pretrained, 5, seed=1)
    assert model.special == (31, 32, 33)
    assert model.parameter_count() == pretrained.parameter_count() + 3 * 24 + 5 * 24
    assert all(p.dtype == dtype for p in model.parameters())
    new = model.model.token_embedding.weight.numpy()[31:], model.head.weight.numpy()
    assert all(0.01 < array.std() < 0.03 for array in new)
    for name, array in before.items():
        assert np.array_equal(model.model.state_dict()[name][: len(array)], array), name
    again, other = Classifier(pretrained, 5, seed=1), Classifier(pretrained, 5, seed=2)
    for name in ("model.token_embedding.weight", "head.weight"):
        assert np.array_equal(again.state_dict()[name], model.state_dict()[name])
        assert not np.array_equal(other.state_dict()[name], model.state_dict()[name])
    # Fine-tuning works on a copy.
    for parameter in model.parameters():
        parameter.data += 1
    assert all(np.array_equal(array, before[name]) for name, array in pretrained.state_dict().items())


def test_dropout_before_the_head_is_on_in_training_only():
    model, ids, _ = classifier(dropout=0.5)
    plain = model(ids).numpy()
    assert np.array_equal(model(ids).numpy(), plain)
    assert not np.array_equal(model.train()(ids).numpy(), plain)
    assert np.array_equal(classifier(dropout=0.0)[0].train()(ids).numpy(), plain)


def test_shards_add_up(task):
    """Cut onto threads, a batch has the loss and the gradients that it has as a whole."""
    model, ids, targets = task(dtype=np.float64)
    targets[1] = -100
    expected_loss, expected = gradients(model, ids, targets)
    for parameter in model.parameters():
        parameter.grad = None
    with DataParallel(model, shards=3) as parallel:
        loss = parallel.gradients(ids, targets, seed=(0,))
    assert loss == pytest.approx(expected_loss, rel=1e-12)
    for name, parameter in model.named_parameters():
        np.testing.assert_allclose(parameter.grad.numpy(), expected[name], rtol=0, atol=1e-12, err_msg=name)


def test_a_batch_overfits(task):
    _, ids, targets = task()
    pretrained = GPT1(TINY, seed=0)
    model = MultipleChoice(pretrained) if task is multiple_choice else Classifier(pretrained, 4)
    progress = fit(model, lambda step: (ids, targets), Recipe(steps=60, lr=5e-3, warmup=10, weight_decay=0.0))
    assert progress.losses[-1] < progress.losses[0] / 2
    with no_grad():
        assert np.array_equal(model(ids).numpy().argmax(-1), targets)


def test_on_the_stand_in_for_a_gpu(both, strict_cupy, task):
    model, ids, targets = task()
    targets[1] = -100
    assert model.loss(ids, targets).dtype == np.float32
    expected_loss, expected = gradients(model, ids, targets)
    model.to("cuda")
    for parameter in model.parameters():
        parameter.grad = None
    with DataParallel(model) as parallel:
        loss = parallel.gradients(ids, targets, seed=(0,))
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    for name, parameter in model.named_parameters():
        assert type(parameter.grad.data) is strict_cupy.ndarray and parameter.grad.dtype == np.float32
        np.testing.assert_allclose(parameter.grad.numpy(), expected[name], rtol=0, atol=1e-5, err_msg=name)
    on_gpu = Classifier(GPT1(TINY).to("cuda"), 3)
    assert all(type(parameter.data) is strict_cupy.ndarray for parameter in on_gpu.parameters())


def test_examples_that_are_none():
    model, ids, targets = classifier()
    for call in (model, lambda ids: model.loss(ids, targets)):
        assert "(batch, sequences, length)" in one_line(pytest.raises(InputError, call, ids[:, 0]))
        without = np.where(ids == model.special.extract, 0, ids)
        without[:-1] = ids[:-1]
        assert "extract" in one_line(pytest.raises(InputError, call, without))
        assert "extract" in one_line(pytest.raises(InputError, call, ids[:, :, -1:]))
        long = model.special.batch([model.special.classification([1] * 79)] * 6)
        assert "81 tokens do not fit" in one_line(pytest.raises(InputError, call, long))
    with pytest.raises(IndexError, match="4"):
        model.loss(ids, np.full(6, 4))
