"""LoRA on every model that has linear maps: what learns and what does not, merging, files, bad input."""

from __future__ import annotations

import json
import math
from copy import deepcopy
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import autograd.functional as F
import tinyllm
from autograd import Tensor, backend, gradcheck, nn, no_grad, optim
from tinyllm import lora
from tinyllm.errors import InputError
from tinyllm.lora import LoRALinear
from tinyllm.lora_targets import places
from tinyllm.model import PretrainedModel
from tinyllm.models import BERT, BERTConfig, Transformer, TransformerConfig
from tinyllm.models.bert_tasks import SequenceClassifier, SpanFinder
from tinyllm.models.gpt1 import Classifier, MultipleChoice
from tinyllm.parallel import DataParallel
from tinyllm.training import Recipe, fit

from .folders import assert_identical, one_line
from .tiny import TINY, scramble, tokens

MODELS = [name for name in TINY if name != "bigram"]


@pytest.fixture(params=MODELS)
def name(request):
    return request.param


@pytest.fixture
def model(name):
    return TINY[name](0)


def translator(**options):
    return scramble(
        Transformer(
            TransformerConfig(
                31, 24, 2, 2, 3, 3, 40, 40, dropout=0.0, pad_token_id=30, decoder_vocab_size=31, **options
            )
        )
    )


UNTIED = {"share_encoder_decoder_embeddings": False, "tie_word_embeddings": False}
# The embeddings of both sides are two, or one.
TRANSLATORS = [UNTIED, UNTIED | {"tie_word_embeddings": True}, {}]


def bert(**options):
    return scramble(BERT(BERTConfig(31, 24, 2, 3, 40, 0.0, 0.0, max_position_embeddings=80, **options)))


def targets_of(name):
    """Two kinds of maps, in two spellings."""
    if name.startswith("gpt"):
        return ["c_attn", "mlp.c_proj"]
    return ["attention.key", "output"] if name == "rwkv" else ["q_proj", "mlp.up_proj"]


def adapted(model, seed=0, **options):
    """The model with adapters that have learned something: all that learns is moved at random."""
    lora.apply(model, **{"rank": 2, "alpha": 3, **options})
    rng = np.random.default_rng(seed)
    for parameter in learned(model).values():
        parameter.data = parameter.data + rng.normal(0, 0.1, parameter.shape).astype(parameter.dtype)
    return model


def learned(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def bits(model):
    return {name: array.copy() for name, array in model.state_dict().items()}


def same_bits(found, expected):
    return found.keys() == expected.keys() and all(np.array_equal(found[n], a) for n, a in expected.items())


def refused(function, *arguments, **options):
    return one_line(pytest.raises(InputError, function, *arguments, **options))


# The map itself


def linear(n=5, m=4, bias=True, dtype=np.float64):
    rng = np.random.default_rng(0)
    made = nn.Linear(n, m, bias)
    for parameter in made.parameters():
        parameter.data = rng.normal(size=parameter.shape).astype(dtype)
    return made


def adapter(dropout=0.0, scale=1.7, **options):
    rng = np.random.default_rng(1)
    base = linear(**options)
    m, n = base.weight.shape
    A, B = (rng.normal(size=shape).astype(base.weight.dtype) for shape in ((2, n), (m, 2)))
    return LoRALinear(base, A, B, scale, dropout)


@pytest.mark.parametrize("bias", [True, False])
def test_the_formula(both, bias):
    module, x = adapter(bias=bias), np.random.default_rng(2).normal(size=(2, 3, 5))
    W, A, B = (p.numpy() for p in (module.weight, module.lora_A, module.lora_B))
    expected = x @ W.T + 1.7 * x @ A.T @ B.T + (module.bias.numpy() if bias else 0)
    np.testing.assert_allclose(module(Tensor(x)).numpy(), expected, rtol=0, atol=1e-13)
    module.merge()
    np.testing.assert_allclose(module(Tensor(x)).numpy(), expected, rtol=0, atol=1e-13)
    np.testing.assert_allclose(module.weight.numpy(), W + 1.7 * B @ A, rtol=0, atol=1e-15)


@pytest.mark.parametrize("frozen", [True, False])
def test_gradients_are_derivatives(both, frozen):
    """Of first and second order, with the base frozen and with it learning too."""
    module, x = adapter(), Tensor(np.random.default_rng(2).normal(size=(3, 5)), requires_grad=True)
    names = ["lora_A", "lora_B"] if frozen else ["weight", "bias", "lora_A", "lora_B"]
    module.weight.requires_grad = module.bias.requires_grad = not frozen
    assert list(learned(module)) == names

    def function(x, *values):
        for name, value in zip(names, values):
            setattr(module, name, value)
        return module(x)

    inputs = [x, *learned(module).values()]
    assert gradcheck(function, inputs)
    assert gradcheck(function, inputs, order=2, projections=3)


def test_dropout_is_of_what_the_adapter_reads_and_in_training_only(both):
    module, x = adapter(dropout=0.4), Tensor(np.random.default_rng(2).normal(size=(50, 5)))
    without = adapter()(x).numpy()
    assert np.array_equal(module.eval()(x).numpy(), without)
    module.train()
    F.manual_seed(1)
    found = module(x).numpy()
    F.manual_seed(1)
    dropped = F.dropout(x, 0.4, True).numpy()
    W, A, B = (p.numpy() for p in (module.weight, module.lora_A, module.lora_B))
    expected = x.numpy() @ W.T + module.bias.numpy() + 1.7 * dropped @ A.T @ B.T
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-13)
    assert np.abs(found - without).max() > 0.1
    module.merge()
    assert np.allclose(module(x).numpy(), without)  # no dropout is left


def test_unmerge_is_exact_but_for_rounding():
    """Within a unit in the last place of the larger of a weight and its merged value; A and B to the bit."""
    for dtype in (np.float32, np.float64):
        module = adapter(n=40, m=50, dtype=dtype)
        before, A = module.weight.numpy(), module.lora_A
        factors = [p.numpy().copy() for p in (module.lora_A, module.lora_B)]
        held, copy = module.weight.data, before.copy()
        module.merge()
        merged = module.weight.numpy()
        assert np.array_equal(held, copy)  # whoever holds the old array keeps the old values
        module.unmerge()
        after = module.weight.numpy()
        assert after.dtype == dtype and np.abs(merged - before).min() > 0
        assert (np.abs(after - before) <= np.spacing(np.maximum(np.abs(before), np.abs(merged)))).all()
        assert module.lora_A is A
        assert all(np.array_equal(p.numpy(), f) for p, f in zip((module.lora_A, module.lora_B), factors))


# On a model


def test_new_adapters_change_nothing_to_the_bit(both, model):
    ids = tokens(model, 2, 20)
    before, weights = model(ids).numpy(), bits(model)
    assert lora.apply(model, rank=3, alpha=7) is model
    assert np.array_equal(model(ids).numpy(), before)
    assert same_bits({name: a for name, a in bits(model).items() if "lora_" not in name}, weights)
    assert not any(module.training for module in model.modules())
    lora.remove(model)
    assert same_bits(bits(model), weights) and np.array_equal(model(ids).numpy(), before)
    assert not any(isinstance(module, LoRALinear) for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_first_weights():
    """U(-1/sqrt(n), 1/sqrt(n)) for A, whose variance is 1 / (3 n); zero for B."""
    draws = []
    for seed in (0, 0, 1):
        model = lora.apply(TINY["gpt2"](0), 4, 8, seed=seed)
        parameters = learned(model)
        for name, parameter in parameters.items():
            if name.endswith("lora_A"):
                limit = 1 / math.sqrt(parameter.shape[1])
                assert 0.9 * limit < np.abs(parameter.numpy()).max() < limit
                assert parameter.numpy().std() == pytest.approx(limit / math.sqrt(3), rel=0.2)
            else:
                assert not parameter.numpy().any()
            assert parameter.dtype == np.float32
        draws.append(parameters)
    first, again, other = draws
    assert all(np.array_equal(p.numpy(), again[name].numpy()) for name, p in first.items())
    names = [name for name in first if name.endswith("lora_A")]
    assert not any(np.array_equal(first[name].numpy(), other[name].numpy()) for name in names)
    a, b = (first[f"blocks.{i}.attention.query_key_value.lora_A"].numpy() for i in (0, 1))
    assert not np.array_equal(a, b)


def test_only_adapters_learn(name, model):
    """Gradients, optimizer state and steps are theirs alone; the rest stays to the bit."""
    targets = targets_of(name)
    lora.apply(model, rank=2, alpha=4, targets=targets)
    paths = {key.removesuffix(".weight") for key in bits(model) if key.endswith(".weight")}
    chosen = [
        path
        for path in paths
        if any(f".{model.published_name(f'{path}.weight')}".endswith(f".{t}.weight") for t in targets)
    ]
    parameters = learned(model)
    assert set(parameters) == {f"{path}.{factor}" for path in chosen for factor in ("lora_A", "lora_B")}
    count = sum(2 * sum(dict(model.named_parameters())[f"{path}.weight"].shape) for path in chosen)
    assert sum(parameter.size for parameter in parameters.values()) == count
    ids, before = tokens(model, 4, 21), bits(model)
    optimizer = optim.AdamW(optim.decay_groups(model, 0.1), lr=1e-2)
    losses = []
    with DataParallel(model.train(), 2) as parallel:
        assert sum(a.size for a in optimizer.state_dict().values()) == 2 * count + 1
        for step in range(3):
            optimizer.zero_grad()
            losses.append(parallel.gradients(ids[:, :-1], ids[:, 1:], (0, step)))
            norm = optim.clip_grad_norm(parallel.parameters, 1.0)
            optimizer.step(parallel.map)
    assert losses[2] < losses[0] and norm > 0
    for key, parameter in model.named_parameters():
        assert (parameter.grad is None) == (key not in parameters)
        changed = not np.array_equal(parameter.numpy(), before[key])
        assert changed == (key in parameters), key


def test_gradients_from_before_are_forgotten(name, model):
    """They would keep the memory of a full model, and an optimizer from before would step by them: now it
    finds none."""
    ids = tokens(model, 2, 9)
    optimizer = optim.AdamW(optim.decay_groups(model, 0.1), lr=1e-2)
    model.loss(ids, ids).backward()
    lora.apply(model, 2, 4)
    before = bits(model)
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(RuntimeError, match="no gradient"):
        optimizer.step()
    assert same_bits(bits(model), before)


def test_a_copy_learns_by_itself(model):
    """A and B of a deep copy are its own, in and out of its weights; the other stays to the bit."""
    adapted(model, bias="all")
    ids, before = tokens(model, 2, 9), bits(model)
    other = deepcopy(model)
    expected = model(ids).numpy()
    assert np.array_equal(other(ids).numpy(), expected)
    lora.merge(other)
    lora.unmerge(other)
    optimizer = optim.SGD(list(learned(other).values()), lr=0.1)
    other.loss(ids, ids).backward()
    optimizer.step()
    assert np.abs(other(ids).numpy() - expected).max() > 1e-3
    assert same_bits(bits(model), before) and all(p.grad is None for p in model.parameters())


def test_adapters_alone_learn_a_batch():
    model = TINY["llama"](0)
    ids = tokens(model, 4, 17)
    ids[:, 0] = np.arange(4)
    lora.apply(model, rank=8, alpha=16)
    recipe = Recipe(steps=60, lr=3e-2, warmup=5, weight_decay=0.0)
    progress = fit(
        model, lambda step: (ids[:, :-1], ids[:, 1:]), recipe, validation=lambda: [(ids[:, :-1], ids[:, 1:])]
    )
    assert progress.validation[-1][1] < 0.1 < progress.validation[0][1]


def test_scales_and_patterns():
    """alpha / r, alpha / sqrt(r), and the first pattern that an end of the whole name matches."""
    model = TINY["gpt2"](0)
    patterns = {
        "rank_pattern": {r"1\.attn\.c_attn": 9, "attn.c_attn": 4},
        "alpha_pattern": {r"h\.\d+\.mlp.*": 5},
    }
    for rslora, root in ((False, 1.0), (True, 0.5)):
        lora.apply(model, 2, 3, ["c_attn", "c_fc"], rslora=rslora, **patterns)
        found = [
            (
                place.published.removeprefix("transformer."),
                len(place.linear.lora_A.numpy()),
                place.linear.scale,
            )
            for place in places(model)
            if isinstance(place.linear, LoRALinear)
        ]
        expected = [
            ("h.0.attn.c_attn", 4, 3 / 4**root), ("h.0.mlp.c_fc", 2, 5 / 2**root),
            ("h.1.attn.c_attn", 9, 3 / 9**root), ("h.1.mlp.c_fc", 2, 5 / 2**root),
        ]  # fmt: skip
        assert found == [(key, r, pytest.approx(scale)) for key, r, scale in expected]
        lora.remove(model)


def test_names_of_targets():
    """Published ends, ours, a pattern of whole names, and all; the head never."""
    every = {"c_attn", "c_proj", "c_fc"}
    for targets, expected, written in (
        (["c_attn"], 2, ["c_attn"]),
        (("c_proj",), 4, ["c_proj"]),
        (["attn.c_proj"], 2, ["attn.c_proj"]),
        (["h.1.mlp.c_proj"], 1, ["h.1.mlp.c_proj"]),
        (["query_key_value"], 2, ["transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_attn"]),
        (["blocks.1.mlp.expand", "c_attn"], 3, ["transformer.h.1.mlp.c_fc", "c_attn"]),
        (r".*1\.(attn|mlp)\.c_.*", 4, r".*1\.(attn|mlp)\.c_.*"),
        ("all-linear", 8, None),
    ):
        model = lora.apply(TINY["gpt2"](0), 1, 1, targets)
        assert len(learned(model)) == 2 * expected
        if written is not None:
            assert model.adapter_config.target_modules == written
    assert {name.rpartition(".")[2] for name in model.adapter_config.target_modules} == every
    # In RWKV our head is called output, and so is a published map, which goes first.
    model = lora.apply(TINY["rwkv"](0), 1, 1, ["output"])
    assert model.adapter_config.target_modules == ["output"]
    assert set(learned(model)) == {f"blocks.{i}.time_mix.output.lora_{f}" for i in (0, 1) for f in "AB"}


def test_biases_and_whole_modules():
    model = adapted(TINY["gpt2"](0), targets=["c_attn"], bias="lora_only", modules_to_save=["ln_f", "1.mlp"])
    names = {n for n in learned(model) if "lora_" not in n}
    mlp = {f"blocks.1.mlp.{m}.{kind}" for m in ("expand", "projection") for kind in ("weight", "bias")}
    biases = {f"blocks.{i}.attention.query_key_value.bias" for i in (0, 1)}
    assert names == biases | mlp | {"norm.weight", "norm.bias"}
    model = adapted(TINY["gpt2"](0), targets="all-linear", bias="all", modules_to_save=["1.mlp.c_fc"])
    adapters = {n for n in learned(model) if "lora_" in n}
    assert not any("1.mlp.expand" in n for n in adapters) and len(adapters) == 2 * 7
    biases = {n for n, _ in model.named_parameters() if n.endswith("bias")}
    assert set(learned(model)) == adapters | biases | {"blocks.1.mlp.expand.weight"}


@pytest.mark.parametrize("dtype, tolerance", [(np.float32, 1e-5), (np.float64, 1e-12)])
def test_merged_is_adapted(both, name, dtype, tolerance):
    """Measured against the largest logit. Unmerged it goes on learning, by the optimizer it had."""
    model = adapted(TINY[name](0).to(dtype=dtype), rslora=True)
    ids, parameters, names = tokens(model, 2, 20), learned(model), list(model.state_dict())
    expected = model(ids).numpy()
    base = TINY[name](0).to(dtype=dtype)(ids).numpy()
    assert np.abs(expected - base).max() > 100 * tolerance
    optimizer = optim.SGD(list(parameters.values()), lr=0.01)
    before = bits(model)
    lora.merge(model)
    atol = tolerance * np.abs(expected).max()
    np.testing.assert_allclose(model(ids).numpy(), expected, rtol=0, atol=atol)
    assert list(model.state_dict()) == list(TINY[name](0).state_dict()) and not learned(model)
    with DataParallel(model, 1) as parallel:  # it can be measured
        (nats,), _ = parallel.loss(ids, ids)
    assert nats == pytest.approx(model.loss(ids, ids, reduction="sum").item())
    lora.unmerge(model)
    assert list(model.state_dict()) == names
    assert all(found is parameters[n] for n, found in learned(model).items()) and len(learned(model)) > 0
    np.testing.assert_allclose(model(ids).numpy(), expected, rtol=0, atol=atol)
    for key, parameter in parameters.items():
        assert np.array_equal(parameter.numpy(), before[key])
    model.loss(ids, ids).backward()
    optimizer.step()
    assert not any(np.array_equal(parameter.numpy(), before[key]) for key, parameter in parameters.items())


def test_unmerge_follows_a_model_that_moved():
    model = adapted(TINY["gpt2"](0))
    expected = model(tokens(model, 1, 9)).numpy()
    lora.merge(model)
    model.to(dtype=np.float64)
    lora.unmerge(model)
    assert {parameter.dtype for parameter in model.parameters()} == {np.dtype(np.float64)}
    np.testing.assert_allclose(model(tokens(model, 1, 9)).numpy(), expected, rtol=0, atol=1e-4)


def test_to_float64_and_back(model):
    """A and B go with the weights they stand beside."""
    adapted(model)
    ids, before = tokens(model, 1, 9), bits(model)
    expected = model(ids).numpy()
    model.to(dtype=np.float64)
    found = model(ids).numpy()
    assert found.dtype == np.float64 and {p.dtype for p in model.parameters()} == {np.dtype(np.float64)}
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert np.array_equal(model.to(dtype=np.float32)(ids).numpy(), expected)
    assert same_bits(bits(model), before)


def test_a_state_of_the_merged_model_fits_the_merged_model(name, model):
    """Merged, it has the names of a plain one; an adapted state does not fit, and changes nothing."""
    state = bits(adapted(model))
    lora.merge(model)
    merged = bits(model)
    with pytest.raises(ValueError, match="lora_A is unknown"):
        model.load_state_dict(state)
    assert same_bits(bits(model), merged)
    plain = TINY[name](0)
    plain.load_state_dict(merged)
    model.load_state_dict(merged)
    ids = tokens(model, 2, 9)
    assert np.array_equal(plain(ids).numpy(), model(ids).numpy())
    lora.unmerge(model)
    model.load_state_dict(state)
    assert same_bits(bits(model), state)


def test_the_merged_model_is_saved_and_the_adapted_is_not(tmp_path, name, model):
    adapted(model, modules_to_save=["norm" if name[0] in "lm" else "ln_out" if name == "rwkv" else "0.mlp"])
    said = refused(model.save_pretrained, tmp_path)
    assert "lora.merge" in said and "lora.save" in said and not list(tmp_path.iterdir())
    lora.merge(model)
    model.save_pretrained(tmp_path)
    assert_identical(tinyllm.from_pretrained(tmp_path), model)
    lora.remove(model)
    assert_identical(tinyllm.from_pretrained(tmp_path), model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_generation_with_and_without_a_cache(model):
    adapted(model)
    prompts = [tokens(model, n, seed=n).tolist() for n in (3, 7)]
    cached = model.generate(prompts, 12, temperature=0)
    assert np.array_equal(cached, model.generate(prompts, 12, temperature=0, use_cache=False))
    beam = model.beam_search(prompts[0], 5, width=1)[0].tokens
    assert beam == cached[0, 3:8].tolist()


def test_the_mode_is_the_maps():
    """A model in evaluation gets and loses its adapters in evaluation; in training, in training."""
    for training in (True, False):
        model = lora.apply(TINY["gpt2"](0).train(training), 1, 1, dropout=0.5)
        assert {module.training for module in model.modules()} == {training}
        lora.remove(model)
        assert {module.training for module in model.modules()} == {training}


class Held(PretrainedModel):
    """Maps in a list, in a dict and as an attribute."""

    published_names = {"maps.{}": "layers.{}", "named.a": "a", "named.b": "b", "last": "last"}

    def __init__(self):
        self.maps = [nn.Linear(3, 3), nn.Linear(3, 3)]
        self.named = {"a": nn.Linear(3, 3), "b": nn.Linear(3, 3, bias=False)}
        self.last = nn.Linear(3, 2)

    def published_name(self, name):
        return name.replace("maps", "layers").replace("named.", "")


def test_maps_in_lists_and_dicts():
    model = scramble(Held())
    lora.apply(model, 1, 1)
    held = lambda: [*model.maps, *model.named.values(), model.last]
    assert all(type(module) is LoRALinear for module in held()) and len(learned(model)) == 10
    assert model.adapter_config.task_type is None
    lora.remove(model)
    assert all(type(module) is nn.Linear for module in held())
    lora.apply(model, 1, 1, ["layers.1", "b"])
    assert [type(module) is LoRALinear for module in held()] == [False, True, False, True, False]


# Encoders and translators


@pytest.fixture(params=[bert, translator])
def make(request):
    """function() -> a BERT with all that pre-training needs, or a translator."""
    return request.param


def batch(model, rows=4):
    """Inputs and targets of its loss, with padding, and for BERT with segments and both losses."""
    rng, ids = np.random.default_rng(0), tokens(model, rows, 9)
    lengths = rng.integers(4, 10, rows)
    seen = (np.arange(9) < lengths[:, None]).astype(np.int64)
    if isinstance(model, BERT):
        targets = np.where((rng.random(ids.shape) < 0.5) & (seen == 1), ids, -100)
        return (ids, seen, rng.integers(0, 2, ids.shape)), (targets, np.arange(rows) % 2)
    return (ids, lengths, tokens(model, rows, 7, seed=1)), tokens(model, rows, 7, seed=2)


def outputs(model):
    """All that it computes of a batch."""
    (ids, second, third), _ = batch(model)
    if isinstance(model, BERT):
        return [out.numpy() for out in model(ids, second, third) if out is not None] + [
            weights.numpy() for weights in model.attention_weights(ids, second, third)
        ]
    return [
        model(ids, third, second).numpy(),
        *(weights.numpy() for weights in model.cross_attention_weights(ids, third)),
        model.generate(ids, 9, temperature=0),
        np.array(model.beam_search(ids[0].tolist(), 9)[0].score),
    ]


def train(model, inputs, targets):
    """Four steps on two threads, on one batch, whose loss falls."""
    optimizer = optim.AdamW(optim.decay_groups(model, 0.1), lr=1e-2)
    losses = []
    with DataParallel(model.train(), 2) as parallel:
        for step in range(4):
            optimizer.zero_grad()
            losses.append(parallel.gradients(inputs, targets, (0, step)))
            optimizer.step(parallel.map)
    assert losses[-1] < losses[0]


def test_every_map_but_the_head_of_an_encoder_is_adapted(make):
    """By the default; on two threads all of them learn, and nothing else moves."""
    model = lora.apply(make(), 2, 4)
    adapted_ = {place.path for place in places(model) if isinstance(place.linear, LoRALinear)}
    assert adapted_ == {place.path for place in places(model)} and len(adapted_) >= 2 * 6
    parameters, before, (inputs, targets) = learned(model), bits(model), batch(model)
    train(model, inputs, targets)
    for key, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (key in parameters) == parameter.requires_grad
        assert np.array_equal(parameter.numpy(), before[key]) == (key not in parameters), key


def test_an_encoder_merged_is_the_adapted(make):
    model = adapted(make(), bias="all")
    expected, plain, before = outputs(model), outputs(make()), bits(model)
    lora.merge(model)
    for found, wanted, base in zip(outputs(model), expected, plain, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())
        assert found.dtype == np.int64 or np.abs(wanted - base).max() > 1e-3
    lora.unmerge(model)
    assert bits(model).keys() == before.keys()
    for found, wanted in zip(outputs(model), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())


def test_adapters_of_an_encoder_are_saved_and_loaded(make, tmp_path):
    pattern = {"fc1" if make is translator else "query": 3}
    model = adapted(make(), bias="all", rslora=True, rank_pattern=pattern, dropout=0.1)
    lora.save(model, tmp_path)
    again = lora.load(make(), tmp_path)
    assert same_bits(bits(again), bits(model)) and learned(again).keys() == learned(model).keys()
    assert all(np.array_equal(a, b) for a, b in zip(outputs(again), outputs(model), strict=True))
    lora.merge(again)
    again.save_pretrained(tmp_path / "merged")
    assert_identical(tinyllm.from_pretrained(tmp_path / "merged"), again)


# Files


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_saving_and_loading_is_the_identity(tmp_path, name, dtype):
    model = adapted(
        TINY[name](0).to(dtype=dtype), targets=targets_of(name), dropout=0.1, rslora=True, bias="all"
    )
    lora.save(model, str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    again = TINY[name](0).to(dtype=dtype)
    assert lora.load(again, str(tmp_path)) is again
    assert same_bits(bits(again), bits(model)) and set(learned(again)) == set(learned(model))
    assert again.adapter_config == model.adapter_config
    adapters = [[m for m in each.modules() if isinstance(m, LoRALinear)] for each in (model, again)]
    assert [m.scale for m in adapters[0]] == [m.scale for m in adapters[1]]
    assert {m.dropout.p for m in adapters[1]} == {0.1}
    ids = tokens(model, 2, 9)
    assert np.array_equal(again(ids).numpy(), model(ids).numpy())
    assert again.dtype == dtype and again(ids).dtype == dtype
    for array in (p.data for p in again.parameters()):
        assert array.flags.c_contiguous and array.flags.writeable


def test_what_is_written(tmp_path):
    """PEFT's names and options; the base that was named, and after loading still is."""
    model = adapted(TINY["gpt2"](0), targets=["c_attn"], bias="lora_only")
    lora.save(model, tmp_path, base="somebody/gpt2")
    config = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    assert config == {
        "peft_type": "LORA", "inference_mode": True, "init_lora_weights": True, "fan_in_fan_out": True,
        "r": 2, "lora_alpha": 3, "target_modules": ["c_attn"], "lora_dropout": 0.0, "use_rslora": False,
        "bias": "lora_only", "modules_to_save": None, "rank_pattern": {}, "alpha_pattern": {},
        "task_type": "CAUSAL_LM", "base_model_name_or_path": "somebody/gpt2",
    }  # fmt: skip
    shapes = {name: array.shape for name, array in load_file(tmp_path / "adapter_model.safetensors").items()}
    prefix = "base_model.model.transformer.h.{}.attn.c_attn"
    assert shapes == {
        f"{prefix.format(i)}.{kind}": shape
        for i in (0, 1)
        for kind, shape in {
            "lora_A.weight": (2, 24), "lora_B.weight": (72, 2), "base_layer.bias": (72,),
        }.items()
    }  # fmt: skip
    again = lora.load(TINY["gpt2"](0), tmp_path)
    lora.save(again, tmp_path / "copy")
    assert json.loads((tmp_path / "copy" / "adapter_config.json").read_text(encoding="utf-8")) == config
    model = adapted(TINY["gpt2"](0), targets=["c_attn"], modules_to_save=["0.attn.c_proj"])
    lora.save(model, tmp_path / "square")
    square = load_file(tmp_path / "square" / "adapter_model.safetensors")
    found = square["base_model.model.transformer.h.0.attn.c_proj.weight"]
    assert np.array_equal(found, model.blocks[0].attention.projection.weight.numpy().T)
    again = lora.load(TINY["gpt2"](0), tmp_path / "square")
    assert same_bits(bits(again), bits(model))
    llama = adapted(TINY["llama"](0))
    lora.save(llama, tmp_path / "llama")
    written = json.loads((tmp_path / "llama" / "adapter_config.json").read_text(encoding="utf-8"))
    assert written["fan_in_fan_out"] is False


def test_a_full_disk_leaves_the_old_adapter(tmp_path, monkeypatch):
    lora.save(adapted(TINY["gpt2"](0)), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tinyllm.files.sync", full)
    said = refused(lora.save, adapted(TINY["gpt2"](0), seed=1), tmp_path)
    assert "No space left" in said and str(tmp_path) in said
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_several_adapters_of_one_base(tmp_path):
    """Merge, remove and load again, as section 4.1 has it for several tasks."""
    base, ids = TINY["llama"](0), None
    found = []
    for seed in (1, 2):
        model = adapted(TINY["llama"](0), seed)
        ids = tokens(model, 2, 9)
        lora.save(model, tmp_path / str(seed))
        found.append(model(ids).numpy())
    for seed, expected in zip((1, 2), found):
        lora.load(base, tmp_path / str(seed))
        assert np.array_equal(base(ids).numpy(), expected)
        lora.remove(base)
    assert np.array_equal(base(ids).numpy(), TINY["llama"](0)(ids).numpy())


# Bad input


def test_merging_twice_and_the_like(tmp_path):
    model = TINY["gpt2"](0)
    for function in (lora.merge, lora.unmerge, lora.remove):
        assert "no adapters" in refused(function, model)
    assert "no adapters" in refused(lora.save, model, tmp_path / "none")
    adapted(model)
    lora.save(model, tmp_path / "some")
    assert "already" in refused(lora.apply, model, 1, 1)
    assert "already" in refused(lora.load, model, tmp_path / "some")
    assert "not merged" in refused(lora.unmerge, model)
    lora.merge(model)
    before = bits(model)
    assert "merged already" in refused(lora.merge, model)
    assert "merged already" in refused(lora.save, model, tmp_path / "none")
    for function, arguments in ((lora.apply, (1, 1)), (lora.load, (tmp_path / "some",))):
        said = refused(function, model, *arguments)
        assert "already, merged" in said and "lora.remove" in said and "lora.merge" not in said
    assert same_bits(bits(model), before) and not (tmp_path / "none").exists()
    lora.unmerge(model)
    assert "not merged" in refused(lora.unmerge, model)


def test_one_map_is_not_merged_twice():
    """Whoever merges some maps by themselves: each once, and no other is touched by a call that fails."""
    model = adapted(TINY["gpt2"](0))
    first, second, *_ = (module for module in model.modules() if isinstance(module, LoRALinear))
    second.merge()
    before = bits(model)
    assert "merged already" in refused(second.merge)
    assert "not merged" in refused(first.unmerge)
    assert "merged already" in refused(lora.merge, model)
    assert "not merged" in refused(lora.unmerge, model)
    assert same_bits(bits(model), before)


@pytest.mark.parametrize(
    "options, said",
    [
        ({"rank": 0}, "r is 0"),
        ({"rank": 2.0}, "r is 2.0"),
        ({"alpha": 0}, "lora_alpha is 0"),
        ({"alpha": math.inf}, "lora_alpha is inf"),
        ({"dropout": 1.0}, "lora_dropout is 1.0"),
        ({"rslora": 1}, "use_rslora is 1"),
        ({"bias": "some"}, "bias is 'some'"),
        ({"targets": []}, "target_modules is []"),
        ({"targets": ["q_proj"]}, "no linear map 'q_proj'; it has c_attn, c_proj, c_fc"),
        ({"targets": ["attn"]}, "no linear map 'attn'"),
        ({"targets": ["_attn"]}, "no linear map '_attn'"),
        ({"targets": "c_attn"}, "give a list"),
        ({"targets": "(c_attn"}, "no regular expression"),
        ({"targets": ["c_attn", "wte"]}, "target_modules: 'wte' fits none of c_attn, c_proj, c_fc"),
        ({"rank_pattern": {"c_fc": 3}, "targets": ["c_attn"]}, "rank_pattern: 'c_fc' fits none of c_attn"),
        ({"rank_pattern": {"_attn": 3}}, "rank_pattern: '_attn' fits none"),
        ({"rank_pattern": {"c_fc": 0}}, "rank_pattern"),
        ({"alpha_pattern": {"c_fc": -1}}, "alpha_pattern"),
        ({"alpha_pattern": {"c_gc": 1}}, "alpha_pattern: 'c_gc' fits none"),
        ({"rank_pattern": {"[": 1}}, "'[' is no regular expression"),
        ({"modules_to_save": ["ln_g"]}, "modules_to_save: 'ln_g' fits none of wte, wpe"),
        ({"modules_to_save": "ln_f"}, "modules_to_save is 'ln_f', but must be a list"),
        ({"modules_to_save": ["wte"]}, "transformer.wte, whose table another module has too"),
        ({"modules_to_save": ["attn", "mlp"]}, "no linear map"),
    ],
    ids=str,
)
def test_options_that_cannot_be(options, said):
    model = TINY["gpt2"](0)
    before = bits(model)
    assert said in refused(lora.apply, model, **{"rank": 2, "alpha": 4, **options})
    assert same_bits(bits(model), before) and all(p.requires_grad for p in model.parameters())
    assert not any(isinstance(module, LoRALinear) for module in model.modules())
    lora.apply(model, 2, 4)  # nothing stands in the way


def test_what_cannot_be_adapted():
    assert "Bigram has no linear maps" in refused(lora.apply, TINY["bigram"](0), 1, 1)
    for name, head in (("llama", "lm_head"), ("rwkv", "head"), ("mistral", "lm_head")):
        model = TINY[name](0)
        assert f"{head} is the output head" in refused(lora.apply, model, 1, 1, [head])
        assert "output head" in refused(lora.apply, model, 1, 1, ".*")
        lora.apply(model, 1, 1, modules_to_save=[head])
        assert "output.weight" in learned(model)
    tied = scramble(
        type(model)(model.config.__class__(**{**vars(model.config), "tie_word_embeddings": True}))
    )
    assert "another module has" in refused(lora.apply, tied, 1, 1, modules_to_save=["embed_tokens"])
    assert not any("output" in name for name in learned(lora.apply(tied, 1, 1)))


def test_the_head_of_a_translator_gets_no_adapter():
    """head() reads its matrix without calling the map, so an adapter there would be left out."""
    model = adapted(translator(**UNTIED))
    assert not any("output" in name for name in learned(model)) and type(model.output) is nn.Linear
    source, target = tokens(model, 2, 9), tokens(model, 2, 7, seed=1)
    expected = model(source, target).numpy()
    assert np.abs(expected - translator(**UNTIED)(source, target).numpy()).max() > 0.1
    lora.merge(model)
    atol = 1e-5 * np.abs(expected).max()
    np.testing.assert_allclose(model(source, target).numpy(), expected, rtol=0, atol=atol)
    for targets in (["lm_head"], ["q_proj", "lm_head"], ".*"):
        assert "lm_head is the output head" in refused(lora.apply, translator(**UNTIED), 1, 1, targets)
    whole = lora.apply(translator(**UNTIED), 1, 1, ["q_proj"], modules_to_save=["lm_head"])
    assert "output.weight" in learned(whole)


@pytest.mark.parametrize("options", TRANSLATORS, ids=str)
def test_all_biases_of_a_translator(tmp_path, options):
    """But that of its head, which is of no module: PEFT leaves it out."""
    model = adapted(translator(**options), bias="all")
    lora.save(model, tmp_path)
    written = load_file(tmp_path / "adapter_model.safetensors")
    assert not any(".." in name or "final_logits_bias" in name for name in written)
    biases = {name for name, _ in model.named_parameters() if name.endswith("bias")}
    assert {name for name in learned(model) if "lora_" not in name} == biases - {"logits_bias"}
    assert same_bits(bits(lora.load(translator(**options), tmp_path)), bits(model))


@pytest.mark.parametrize(
    "make, target, whole, said",
    [
        (translator, "q_proj", "shared", "model.shared"),
        (
            lambda: translator(**TRANSLATORS[1]),
            "q_proj",
            "decoder.embed_tokens",
            "model.decoder.embed_tokens",
        ),
        (bert, "query", "word_embeddings", "bert.embeddings.word_embeddings"),
        (bert, "query", "embeddings", "bert.embeddings.word_embeddings"),
        (bert, "query", "predictions", "cls.predictions"),
    ],
)
def test_tables_with_a_second_use_do_not_learn_as_a_whole(tmp_path, make, target, whole, said):
    """PEFT would make a copy for one of the uses, so its adapter would be another function here."""
    model = make()
    before = bits(model)
    said = f"modules_to_save names {said}, whose table another module has too"
    assert said in refused(lora.apply, model, 1, 1, [target], modules_to_save=[whole])
    lora.save(adapted(make(), targets=[target]), tmp_path)
    edit(tmp_path, modules_to_save=[whole])
    assert said in refused(lora.load, model, tmp_path)
    assert same_bits(bits(model), before) and all(p.requires_grad for p in model.parameters())


def test_a_name_of_whole_modules_is_an_end_by_letters():
    """As in PEFT, which unlike with targets does not ask for whole words."""
    for make_, ending, expected in (
        (lambda: TINY["llama"](0), "norm", ["norm", "blocks.0.norm_1", "blocks.1.norm_2"]),
        (lambda: TINY["gpt2"](0), "_f", ["norm"]),
        (lambda: TINY["gpt2"](0), "1.mlp", ["blocks.1.mlp.expand", "blocks.1.mlp.projection"]),
    ):
        model = lora.apply(make_(), 1, 1, modules_to_save=[ending])
        whole = {name.rpartition(".")[0] for name in learned(model) if "lora_" not in name}
        assert whole >= set(expected) and len(whole) == {"norm": 5, "_f": 1, "1.mlp": 2}[ending]


def test_the_bias_that_bert_holds_twice(tmp_path):
    """PEFT writes it under both names; where the two differ, neither is taken."""
    first, second = (f"base_model.model.cls.predictions.{name}" for name in ("bias", "decoder.bias"))
    model = adapted(bert(), targets=["query"], bias="all")
    lora.save(model, tmp_path)
    written = load_file(tmp_path / "adapter_model.safetensors")
    assert np.array_equal(written[first], written[second]) and written[first].any()
    assert np.array_equal(written[first], model.masked_lm.bias.numpy())
    spoil(tmp_path, lambda arrays: arrays.pop(second))  # once is enough
    assert same_bits(bits(lora.load(bert(), tmp_path)), bits(model))
    for wrong in (written[first] + np.eye(1, 31, 30, dtype=np.float32)[0], written[first][:-1]):
        spoil(tmp_path, lambda arrays, wrong=wrong: arrays.update({second: wrong}))
        base = bert()
        said = refused(lora.load, base, tmp_path)
        assert first in said and second in said and str(tmp_path) in said
        assert same_bits(bits(base), bits(bert())) and not hasattr(base, "adapter_config")
    lora.save(adapted(bert(), targets=["query"], bias="lora_only"), tmp_path)
    assert not any("predictions" in name for name in load_file(tmp_path / "adapter_model.safetensors"))


@pytest.mark.parametrize("part", ["original_module", "modules_to_save", "modules_to_save.another"])
def test_what_peft_writes_again_for_its_wrappers_is_passed_over(tmp_path, part):
    """With the values that it had, or that it has; but only where the tensor itself is there."""
    model = adapted(TINY["gpt2"](0), targets=["c_attn"], bias="all", modules_to_save=["1.mlp"])
    lora.save(model, tmp_path)
    name = "base_model.model.transformer.h.1.mlp.c_fc.bias"
    copy = name.replace(".c_fc", f".{part}.c_fc")
    spoil(tmp_path, lambda arrays: arrays.update({copy: np.zeros(96, np.float32)}))
    assert same_bits(bits(lora.load(TINY["gpt2"](0), tmp_path)), bits(model))
    spoil(tmp_path, lambda arrays: arrays.pop(name))
    assert "c_fc.bias' is missing" in refused_and_unchanged(tmp_path)


def test_tables_with_one_use_learn_as_a_whole():
    for make, target, whole, name in (
        (lambda: translator(**UNTIED), "q_proj", "decoder.embed_tokens", "target_embedding.weight"),
        (lambda: translator(**TRANSLATORS[1]), "q_proj", "encoder.embed_tokens", "source_embedding.weight"),
        (lambda: bert(architecture="BertModel"), "query", "word_embeddings", "token_embedding.weight"),
        (bert, "query", "position_embeddings", "position_embedding.weight"),
        (bert, "query", "predictions.transform", "masked_lm.transform.weight"),
    ):
        assert name in learned(lora.apply(make(), 1, 1, [target], modules_to_save=[whole]))


@pytest.mark.parametrize(
    "make, start",
    [
        (bert, lambda model: SequenceClassifier.on(model, ["a", "b"])),
        (bert, SpanFinder.on),
        (lambda: TINY["gpt1"](0), lambda model: Classifier(model, 2)),
        (lambda: TINY["gpt1"](0), MultipleChoice),
    ],
)
def test_a_task_starts_from_a_model_without_adapters(make, start):
    """Its copy has no place for them; merged, they are in the weights."""
    model = adapted(make())
    assert "merge and remove the adapters first" in refused(start, model)
    lora.merge(model)
    lora.remove(model)
    state, copied = model.state_dict(), bits(start(model))
    name = next(name for name in state if name.endswith("mlp.expand.weight"))
    assert np.array_equal(copied.get(name, copied.get(f"model.{name}")), state[name])


def test_a_task_on_an_adapted_model(tmp_path):
    """Of GPT-1's classifier it is the model that is adapted; the new head learns as a whole beside it."""
    classifier = Classifier(TINY["gpt1"](0), 3, dropout=0.0)
    lora.apply(classifier.model, 2, 4)
    special, targets, before = classifier.special, np.array([0, 2]), bits(classifier)
    ids = special.batch([special.entailment([1, 2], [3]), special.entailment([4], [5, 6])])
    train(classifier, ids, targets)
    moved = {name for name, array in bits(classifier).items() if not np.array_equal(array, before[name])}
    assert moved == set(learned(classifier)) == {n for n in before if "lora_" in n} | {"head.weight"}
    lora.save(classifier.model, tmp_path)
    with no_grad():
        expected = classifier.eval()(ids).numpy()
        lora.merge(classifier.model)
        np.testing.assert_allclose(classifier(ids).numpy(), expected, rtol=0, atol=1e-5)


@pytest.fixture
def folder(tmp_path):
    lora.save(adapted(TINY["gpt2"](0), targets=["c_attn"]), tmp_path, base="somebody/gpt2")
    return tmp_path


def edit(folder, **options):
    """Change options of adapter_config.json; `...` takes one out."""
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | options
    config = {name: value for name, value in config.items() if value is not ...}
    path.write_text(json.dumps(config), encoding="utf-8")


def spoil(folder, change):
    path = folder / "adapter_model.safetensors"
    arrays = load_file(path)
    change(arrays)
    save_file(arrays, path)


FIRST = "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"


def refused_and_unchanged(folder, name="gpt2", **sizes):
    model = TINY[name](0)
    if sizes:
        model = scramble(type(model)(type(model.config)(**{**vars(model.config), **sizes})))
    before = bits(model)
    said = refused(lora.load, model, folder)
    assert same_bits(bits(model), before) and all(p.requires_grad for p in model.parameters())
    assert not any(isinstance(module, LoRALinear) for module in model.modules())
    assert str(folder) in said
    return said


def test_adapters_of_another_base(folder):
    """Other maps, other sizes, fewer or more layers: what does not fit is named, and for whom it was made."""
    said = refused_and_unchanged(folder, "llama")
    assert "'c_attn'" in said and "q_proj" in said and "somebody/gpt2" in said
    said = refused_and_unchanged(folder, n_embd=36)
    assert "h.0.attn.c_attn.lora_A.weight' is (2, 24) where (2, 36) fits" in said and "somebody/gpt2" in said
    said = refused_and_unchanged(folder, n_layer=1)
    assert "h.1.attn.c_attn.lora_A.weight' is left over" in said
    said = refused_and_unchanged(folder, n_layer=4)
    assert "h.2.attn.c_attn.lora_A.weight' is missing" in said
    said = refused_and_unchanged(folder, n_layer=9)
    assert "and 10 more" in said


def test_tensors_that_do_not_fit(folder):
    spoil(folder, lambda arrays: arrays.update({FIRST: arrays[FIRST][:1]}))
    assert "lora_A.weight' is (1, 24) where (2, 24) fits" in refused_and_unchanged(folder)
    spoil(folder, lambda arrays: arrays.pop(FIRST))
    assert "h.0.attn.c_attn.lora_A.weight' is missing" in refused_and_unchanged(folder)
    spoil(folder, lambda arrays: arrays.update({FIRST: np.zeros((2, 24), np.int32)}))
    assert "not real numbers" in refused_and_unchanged(folder)
    spoil(folder, lambda arrays: arrays.update({FIRST: np.zeros((2, 24)), "a\nb": np.zeros(1)}))
    assert "left over" in refused_and_unchanged(folder)


@pytest.mark.parametrize(
    "options, said",
    [
        ({"peft_type": "IA3"}, "peft_type = 'IA3'"),
        ({"peft_type": ...}, "lacks peft_type"),
        ({"use_dora": True}, "use_dora = True"),
        ({"an_option_to_come": 1}, "an_option_to_come = 1"),
        ({"an_option_to_come": 0}, "an_option_to_come = 0"),
        ({"an_option_to_come": 0.0}, "an_option_to_come = 0.0"),
        ({"init_lora_weights": "olora"}, "init_lora_weights = 'olora'"),
        ({"init_lora_weights": 1}, "init_lora_weights = 1"),
        ({"layers_to_transform": [0]}, "layers_to_transform = [0]"),
        ({"r": ...}, "lacks r"),
        ({"r": "2"}, "r is '2'"),
        ({"r": True}, "r is True"),
        ({"lora_alpha": None}, "lora_alpha is None"),
        ({"lora_alpha": -1}, "lora_alpha is -1"),
        ({"target_modules": None}, "target_modules is None"),
        ({"target_modules": ["c_attn", 3]}, "target_modules"),
        ({"target_modules": "*"}, "no regular expression"),
        ({"rank_pattern": {"c_attn": "3"}}, "rank_pattern"),
        ({"rank_pattern": [1]}, "rank_pattern"),
        ({"rank_pattern": {"c_attn": 3}}, "where (3, 24) fits"),
        ({"bias": "all"}, "ln_1.bias' is missing"),
        ({"bias": "b"}, "bias is 'b'"),
        ({"modules_to_save": ["ln_f"]}, "ln_f.weight' is missing"),
        ({"modules_to_save": "ln_f"}, "modules_to_save is 'ln_f'"),
        ({"target_modules": ["c_fc"]}, "h.0.mlp.c_fc.lora_A.weight' is missing"),
        ({"use_rslora": "yes"}, "use_rslora is 'yes'"),
        ({"lora_dropout": 2.0}, "lora_dropout is 2.0"),
    ],
    ids=str,
)
def test_configs_that_cannot_be_used(folder, options, said):
    edit(folder, **options)
    assert said in refused_and_unchanged(folder)


def test_options_that_ask_for_nothing(folder):
    """Absent, off, or only about where it came from; and a name too many, as long as all tensors fit."""
    expected = lora.load(TINY["gpt2"](0), folder)
    edit(
        folder, use_dora=False, an_option_to_come=None, loftq_config={}, layers_pattern=[], peft_version="9",
        revision="main", fan_in_fan_out=False, inference_mode=False, rank_pattern=None, use_rslora=...,
        target_modules=["c_attn", "q_proj"], alpha_pattern=..., bias=..., init_lora_weights=...,
    )  # fmt: skip
    assert same_bits(bits(lora.load(TINY["gpt2"](0), folder)), bits(expected))


def test_files_that_are_missing_or_damaged(folder):
    assert "there is no such folder" in refused_and_unchanged(folder / "absent")
    whole = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(whole[:-9])
    assert "adapter_model.safetensors is damaged" in refused_and_unchanged(folder)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    said = refused_and_unchanged(folder)
    assert "no adapter_model.safetensors" in said and "adapter_model.bin" in said
    (folder / "adapter_model.bin").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{", encoding="utf-8")
    assert "adapter_config.json is damaged" in refused_and_unchanged(folder)


# On a device


@pytest.mark.parametrize("name", MODELS)
def test_on_the_stand_in_for_a_gpu(strict_cupy, tmp_path, name):
    found = {}
    for device in ("cpu", "cuda"):
        xp, model = backend.device_module(device), TINY[name](0).to(device)
        lora.apply(model, 2, 3, bias="lora_only")
        ids = tokens(model, 4, 12)
        optimizer = optim.AdamW(optim.decay_groups(model, 0.1), lr=1e-2)
        with DataParallel(model.train(), 1) as parallel:
            for step in range(2):
                optimizer.zero_grad()
                loss = parallel.gradients(ids[:, :-1], ids[:, 1:], (0, step))
                optimizer.step()
        lora.save(model.eval(), tmp_path / device)
        again = lora.load(TINY[name](0).to(device), tmp_path / device)
        assert all(type(p.data) is xp.ndarray and p.dtype == np.float32 for p in again.parameters())
        with no_grad():
            logits = again(ids).numpy()
            assert np.array_equal(model(ids).numpy(), logits)
            lora.merge(again)
            merged = again(ids).numpy()
            again.to("cpu")
            lora.unmerge(again)
            assert {parameter.device for parameter in again.parameters()} == {"cpu"}
        found[device] = SimpleNamespace(loss=loss, logits=logits, merged=merged)
    for field in ("loss", "logits", "merged"):
        on_cpu, on_gpu = (getattr(found[device], field) for device in ("cpu", "cuda"))
        np.testing.assert_allclose(on_gpu, on_cpu, rtol=1e-4, atol=1e-4)
