"""LoRA against PEFT: the same function, gradients and files, in both directions."""

from __future__ import annotations

import json
import re
import warnings
from copy import deepcopy

import numpy as np
import pytest
from safetensors.numpy import load_file

import tinyllm
from tinyllm import lora
from tinyllm.errors import InputError
from tinyllm.models import LLaMA

from .folders import one_line
from .reference import (
    VOCABULARY,
    assert_same_hidden_states,
    assert_same_logits,
    converted,
    in_float64,
    logits_of,
    random_ids,
    scrambled,
    torch,
    transformers,
)

peft = pytest.importorskip("peft", reason="needs the extra: pip install -e '.[reference]'")

IDS = random_ids(2, 12)
NO_TOKENS = {"vocab_size": VOCABULARY, "bos_token_id": None, "eos_token_id": None}
BASES = {
    "gpt2": lambda: scrambled(
        transformers.GPT2LMHeadModel,
        transformers.GPT2Config(
            n_positions=20, n_embd=12, n_layer=3, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
            **NO_TOKENS,
        ),
    ),
    "llama": lambda: scrambled(
        transformers.LlamaForCausalLM,
        transformers.LlamaConfig(
            hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=6, max_position_embeddings=20, attention_bias=True, **NO_TOKENS,
        ),
    ),
    "rwkv": lambda: scrambled(  # never halved: PEFT's adapters do not know of it
        transformers.RwkvForCausalLM,
        transformers.RwkvConfig(hidden_size=12, num_hidden_layers=2, rescale_every=0, **NO_TOKENS),
    ),
}  # fmt: skip
# name -> base, and the options of PEFT's LoraConfig
ADAPTERS = {
    "gpt2": ("gpt2", {"target_modules": ["c_attn"], "lora_alpha": 5, "lora_dropout": 0.3}),
    "gpt2, all that there is": (
        "gpt2",
        {
            "target_modules": ["c_attn", "mlp.c_proj"],
            # The first that fits counts. In this order, for PEFT's file has them sorted.
            "rank_pattern": {"2.mlp.c_proj": 1, "c_proj": 5, "h.1.attn.c_attn": 2},
            "alpha_pattern": {r"h\.[02]\.mlp\.c_proj": 7, "c_att": 99},  # no whole name ends in c_att
            "use_rslora": True,
            "bias": "lora_only",
            "modules_to_save": ["ln_f", "h.2.attn"],  # with a square matrix that they store transposed
        },
    ),
    "gpt2, a module of modules, all biases": (
        "gpt2",
        {"target_modules": ["c_attn"], "bias": "all", "modules_to_save": ["1.mlp"]},
    ),
    "gpt2, a pattern, all biases": ("gpt2", {"target_modules": r".*\.[01]\.attn\.c_proj", "bias": "all"}),
    "llama": ("llama", {"target_modules": ["q_proj", "v_proj"], "bias": "lora_only"}),
    "llama, all-linear, head and embedding": (
        "llama",
        {
            "target_modules": "all-linear", "use_rslora": True, "task_type": "CAUSAL_LM",
            "modules_to_save": ["lm_head", "embed_tokens"],
        },
    ),
    "llama, all norms by the end of their names": (
        "llama",
        {"target_modules": ["down_proj"], "modules_to_save": ["norm"], "bias": "all"},
    ),
    "rwkv": (
        "rwkv",
        {"target_modules": ["key", "value", "receptance", "output"], "modules_to_save": ["0.ln1"]},
    ),
}  # fmt: skip


def adapted(base, seed=0, **options):
    """PEFT's model over a copy of the base, with all that is learned moved at random."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it sets fan_in_fan_out right by itself, and says so
        theirs = peft.get_peft_model(deepcopy(base), peft.LoraConfig(**{"r": 3, "lora_alpha": 4, **options}))
    torch.manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return theirs.eval()


def saved(theirs, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=ADAPTERS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def folders(name, tmp_path_factory):
    """(PEFT's model, the folder of its base, the folder of its adapter)."""
    kind, options = ADAPTERS[name]
    base, folder = BASES[kind](), tmp_path_factory.mktemp("peft")
    base.save_pretrained(folder / "base")
    theirs = adapted(base, **options)
    return theirs, folder / "base", saved(theirs, folder / "adapter")


def ours_of(base, adapter, dtype=np.float32):
    return lora.load(tinyllm.from_pretrained(base, dtype), adapter)


def written(folder):
    return load_file(folder / "adapter_model.safetensors")


def without_copies(arrays):
    """But for the biases that PEFT writes once more, under the names of its wrappers."""
    return {
        name: a for name, a in arrays.items() if not re.search(r"\.(modules_to_save|original_module)\.", name)
    }


def moved(ours):
    """All that learns, at random."""
    rng = np.random.default_rng(0)
    for parameter in ours.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data + rng.normal(0, 0.3, parameter.shape).astype(np.float32)


def in_precision(theirs, ours, dtype, monkeypatch):
    theirs = converted(theirs, dtype)
    if dtype == np.float64 and type(ours) is LLaMA:
        modeling = transformers.models.llama.modeling_llama
        theirs.base_model.model = in_float64(theirs.base_model.model, ours, modeling, monkeypatch)
    if dtype == np.float64:
        monkeypatch.setattr(torch.Tensor, "float", lambda self: self)  # RWKV's keys
    return theirs


def published(name):
    """A tensor's published name, from the name that it has inside PEFT's model."""
    for part in ("base_model.model.", ".default", ".modules_to_save", ".base_layer"):
        name = name.replace(part, "")
    return name


@pytest.mark.parametrize("dtype, tolerance", [(np.float32, 2e-5), (np.float64, 1e-11)])
def test_logits_loss_and_gradients(folders, dtype, tolerance, monkeypatch):
    """Of every number that learns, in the published layout, and of no other."""
    theirs, base, adapter = folders
    ours = ours_of(base, adapter, dtype)
    theirs = in_precision(theirs, ours, dtype, monkeypatch)
    unadapted = tinyllm.from_pretrained(base, dtype)(IDS).numpy()
    options = {"use_cache": False}
    found = assert_same_logits(theirs, ours, IDS, tolerance, **options)
    assert np.abs(found - unadapted).max() > 0.1
    logits = theirs(torch.from_numpy(IDS), **options).logits
    targets = torch.from_numpy(IDS[:, 1:]).flatten()
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets)
    expected.backward()
    loss = ours.loss(IDS[:, :-1], IDS[:, 1:])
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    gradients = {}
    for name, parameter in ours.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        if parameter.requires_grad:
            key = ours.published_name(name) + ".weight" * name.endswith(("lora_A", "lora_B"))
            gradients[key] = ours.as_published(name, parameter.grad.numpy())
    theirs = {published(n): p.grad.numpy() for n, p in theirs.named_parameters() if p.requires_grad}
    assert gradients.keys() == theirs.keys()
    for key, g in theirs.items():
        assert gradients[key].dtype == g.dtype
        np.testing.assert_allclose(
            gradients[key], g, rtol=0, atol=tolerance * max(np.abs(g).max(), 1e-3), err_msg=key
        )


def test_peft_reads_what_we_write(folders, tmp_path):
    """The same tensors to the bit, the same options, and no warning of a missing key or a wrong option."""
    theirs, base, adapter = folders
    ours = ours_of(base, adapter)
    lora.save(ours, tmp_path, base=str(base))
    found, expected = written(tmp_path), without_copies(written(adapter))
    assert found.keys() == expected.keys()
    for key, array in expected.items():
        assert found[key].dtype == array.dtype and np.array_equal(found[key], array), key
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        plain = transformers.AutoModelForCausalLM.from_pretrained(base)
        again = peft.PeftModel.from_pretrained(plain, tmp_path).eval()
    said = [str(warning.message) for warning in said]
    assert not [text for text in said if "adapter keys" in text or "fan_in_fan_out" in text], said
    np.testing.assert_allclose(
        logits_of(again, IDS, use_cache=False), logits_of(theirs, IDS, use_cache=False), rtol=0, atol=1e-5
    )
    config, expected = again.peft_config["default"], theirs.peft_config["default"]
    for option in (
        "r", "lora_alpha", "target_modules", "lora_dropout", "use_rslora", "bias", "modules_to_save",
        "rank_pattern", "alpha_pattern", "task_type", "fan_in_fan_out", "peft_type",
    ):  # fmt: skip
        assert getattr(config, option) == getattr(expected, option), option
    assert config.base_model_name_or_path == str(base)


@pytest.mark.parametrize("kind", BASES)
def test_peft_reads_an_adapter_that_began_here(kind, tmp_path):
    """With targets by our names, and what PEFT must be told besides; then merged by each."""
    BASES[kind]().save_pretrained(tmp_path / "base")
    ours = tinyllm.from_pretrained(tmp_path / "base")
    target = {"gpt2": "query_key_value", "llama": "query", "rwkv": "time_mix.output"}[kind]
    pattern = {"gpt2": r"0\.attn\.c_attn", "llama": r"0\..*q_proj", "rwkv": r"0.attention.output"}[kind]
    lora.apply(ours, 3, 5, [target], rslora=True, bias="all", rank_pattern={pattern: 2}, dropout=0.2)
    moved(ours)
    lora.save(ours, tmp_path / "adapter")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    assert {ours.published_name(f"{p}.weight").removesuffix(".weight") for p in paths(ours)} == {
        name for name, module in theirs.base_model.model.named_modules() if hasattr(module, "lora_A")
    }
    expected = assert_same_logits(theirs, ours, IDS, 2e-5, use_cache=False)
    lora.merge(ours)
    np.testing.assert_allclose(ours(IDS).numpy(), expected, rtol=0, atol=2e-5)
    assert_same_logits(theirs.merge_and_unload(), ours, IDS, 2e-5, use_cache=False)
    ours.save_pretrained(tmp_path / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert_same_logits(merged, ours, IDS, 2e-5, use_cache=False)


def paths(ours):
    return [name.removesuffix(".lora_A") for name, _ in ours.named_parameters() if name.endswith("lora_A")]


SMALL = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 20}


@pytest.mark.parametrize(
    "kind, config",
    [
        (
            transformers.OpenAIGPTLMHeadModel,
            transformers.OpenAIGPTConfig(
                vocab_size=VOCABULARY, n_positions=20, n_embd=12, n_layer=2, n_head=2, resid_pdrop=0.0,
                embd_pdrop=0.0, attn_pdrop=0.0,
            ),
        ),
        (
            transformers.MistralForCausalLM,
            transformers.MistralConfig(
                num_key_value_heads=2, max_position_embeddings=20, sliding_window=5, **SMALL, **NO_TOKENS
            ),
        ),
        (
            transformers.LlamaForCausalLM,
            transformers.LlamaConfig(
                max_position_embeddings=20, tie_word_embeddings=True, mlp_bias=True, **SMALL, **NO_TOKENS
            ),
        ),
    ],
    ids=["gpt1", "mistral", "llama with a tied head"],
)  # fmt: skip
def test_the_rest_of_the_family(kind, config, tmp_path):
    """Read from PEFT and by PEFT again, to the bit."""
    base = scrambled(kind, config)
    base.save_pretrained(tmp_path / "base")
    options = {"target_modules": "all-linear", "bias": "all", "modules_to_save": ["1.mlp"]}
    theirs = adapted(base, use_rslora=True, **options)
    ours = ours_of(tmp_path / "base", saved(theirs, tmp_path / "adapter"))
    expected = assert_same_logits(theirs, ours, IDS, 2e-5)
    lora.save(ours, tmp_path / "again")
    again = logits_of(read_by_peft(kind, tmp_path), IDS)
    np.testing.assert_allclose(again, expected, rtol=0, atol=2e-5)
    assert np.array_equal(again, logits_of(theirs, IDS))


def test_an_adapter_of_the_bare_model(tmp_path):
    """Made with GPT2Model, the part without the head: no tensor has the prefix "transformer."."""
    base = BASES["gpt2"]()
    base.save_pretrained(tmp_path / "base")
    theirs = adapted(base.transformer, target_modules=["c_fc"], bias="lora_only", modules_to_save=["ln_f"])
    ours = ours_of(tmp_path / "base", saved(theirs, tmp_path / "adapter"))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(IDS)).last_hidden_state.numpy()
    np.testing.assert_allclose(ours.hidden_states(IDS).numpy(), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_adapters_in_half_precision(dtype, tmp_path):
    """A half is exact in float32."""
    base = BASES["gpt2"]()
    base.save_pretrained(tmp_path / "base")
    theirs = adapted(base, target_modules=["c_attn"])
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(getattr(torch, dtype))
    ours = ours_of(tmp_path / "base", saved(theirs, tmp_path / "adapter"))
    assert_same_logits(theirs.float(), ours, IDS, 2e-5)


@pytest.mark.parametrize(
    "options", [{"init_lora_weights": False}, {"init_lora_weights": "gaussian"}], ids=str
)
def test_initializations_that_leave_the_base_alone(options, tmp_path):
    base = BASES["gpt2"]()
    base.save_pretrained(tmp_path / "base")
    theirs = adapted(base, target_modules=["c_attn"], **options)
    ours = ours_of(tmp_path / "base", saved(theirs, tmp_path / "adapter"))
    assert_same_logits(theirs, ours, IDS, 2e-5)
    assert_same_hidden_states(theirs.base_model.model, ours, IDS, 2e-5)


@pytest.mark.parametrize(
    "kind, options, said",
    [
        ("gpt2", {"use_dora": True}, "use_dora = True"),
        ("gpt2", {"lora_bias": True}, "lora_bias = True"),
        ("gpt2", {"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa'"),
        ("gpt2", {"layers_to_transform": [1]}, "layers_to_transform"),
        ("gpt2", {"exclude_modules": ["h.0.attn.c_attn"]}, "exclude_modules"),
        ("gpt2", {"modules_to_save": ["wte"]}, "transformer.wte"),
        ("gpt2", {"modules_to_save": ["lm_head"]}, "'lm_head.weight' is left over"),
        ("gpt2", {"target_modules": ["c_attn", "wte"]}, "wte"),
        ("llama", {"target_modules": ["q_proj", "lm_head"]}, "lm_head is the output head"),
        ("llama", {"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens"),
    ],
)
def test_what_we_do_not_implement_is_refused_as_peft_writes_it(kind, options, said, tmp_path):
    base = BASES[kind]()
    base.save_pretrained(tmp_path / "base")
    theirs = adapted(base, **{"target_modules": ["c_attn"], **options})
    saved(theirs, tmp_path / "adapter")
    ours = tinyllm.from_pretrained(tmp_path / "base")
    before = ours(IDS).numpy()
    error = pytest.raises(InputError, lora.load, ours, tmp_path / "adapter")
    assert said in one_line(error) and str(tmp_path / "adapter") in one_line(error)
    assert np.array_equal(ours(IDS).numpy(), before) and all(p.requires_grad for p in ours.parameters())


def test_another_kind_of_adapter_is_refused(tmp_path):
    base = BASES["gpt2"]()
    base.save_pretrained(tmp_path / "base")
    theirs = peft.get_peft_model(base, peft.IA3Config(target_modules=["c_attn"], feedforward_modules=[]))
    saved(theirs, tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["peft_type"] == "IA3"
    ours = tinyllm.from_pretrained(tmp_path / "base")
    assert "IA3" in one_line(pytest.raises(InputError, lora.load, ours, tmp_path / "adapter"))


# Encoders and translators


def bert_config(**options):
    return transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=12, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=20, max_position_embeddings=20, **options,
    )  # fmt: skip


def masked_bert():
    return scrambled(transformers.BertForMaskedLM, bert_config())


def marian():
    config = transformers.MarianConfig(
        vocab_size=VOCABULARY, d_model=12, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=20, decoder_ffn_dim=20, max_position_embeddings=20,
        scale_embedding=True, activation_function="relu", pad_token_id=1, eos_token_id=0,
        decoder_start_token_id=1, forced_eos_token_id=None, dropout=0.0,
    )  # fmt: skip
    return scrambled(transformers.MarianMTModel, config)


def read_by_peft(kind, folder):
    """PEFT's model of the base and the adapter in `folder`, which is asked to say if it misses anything."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        theirs = peft.PeftModel.from_pretrained(kind.from_pretrained(folder / "base"), folder / "again")
    assert not [str(warning.message) for warning in said if "adapter keys" in str(warning.message)]
    return theirs.eval()


def test_an_encoder_with_a_head_that_learns_as_a_whole(tmp_path):
    """For classification PEFT adds the names of heads by itself, also of one that BERT has not."""
    base = scrambled(transformers.BertForSequenceClassification, bert_config(num_labels=3))
    base.save_pretrained(tmp_path / "base")
    theirs = adapted(base, target_modules=["query", "value"], task_type="SEQ_CLS", bias="all")
    ours = ours_of(tmp_path / "base", saved(theirs, tmp_path / "adapter")).eval()
    assert ours.adapter_config.modules_to_save == ["classifier", "score"]
    expected = logits_of(theirs, IDS)
    np.testing.assert_allclose(ours(IDS).logits.numpy(), expected, rtol=0, atol=2e-5)
    lora.save(ours, tmp_path / "again")
    files = [written(tmp_path / name) for name in ("adapter", "again")]
    extra = {f"base_model.model.classifier.{part}.bias" for part in ("modules_to_save", "original_module")}
    assert files[0].keys() == files[1].keys() | extra  # copies
    assert all(np.array_equal(files[0][key], array) for key, array in files[1].items())
    again = read_by_peft(transformers.BertForSequenceClassification, tmp_path)
    np.testing.assert_allclose(logits_of(again, IDS), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("whole", [None, ["transform"]], ids=str)
def test_the_bias_of_a_masked_language_model(tmp_path, whole):
    """It is a bias of two modules, and learns as one: PEFT writes it under both names."""
    base = masked_bert()
    base.save_pretrained(tmp_path / "base")
    theirs = adapted(base, target_modules=["query", "dense"], bias="all", modules_to_save=whole)
    ours = ours_of(tmp_path / "base", saved(theirs, tmp_path / "adapter"))
    expected = logits_of(theirs, IDS)
    np.testing.assert_allclose(ours(IDS).prediction_logits.numpy(), expected, rtol=0, atol=5e-5)
    head = theirs.base_model.model.cls.predictions
    assert head.bias is head.decoder.bias and head.bias.requires_grad
    assert np.array_equal(ours.masked_lm.bias.numpy(), head.bias.detach().numpy())
    assert not np.array_equal(ours.masked_lm.bias.numpy(), base.cls.predictions.bias.detach().numpy())
    lora.save(ours, tmp_path / "again")
    found, files = written(tmp_path / "again"), written(tmp_path / "adapter")
    assert found.keys() == without_copies(files).keys()
    assert (len(found) < len(files)) == (whole is not None)
    assert all(np.array_equal(files[key], array) for key, array in found.items())
    again = read_by_peft(transformers.BertForMaskedLM, tmp_path)
    np.testing.assert_allclose(logits_of(again, IDS), expected, rtol=0, atol=1e-6)


def test_peft_reads_a_bert_that_was_adapted_here(tmp_path):
    """All linear maps, all biases, and as a whole what of the head it shares with nothing."""
    masked_bert().save_pretrained(tmp_path / "base")
    ours = tinyllm.from_pretrained(tmp_path / "base")
    lora.apply(ours, 2, 3, rslora=True, bias="all", modules_to_save=["transform"])
    moved(ours)
    lora.save(ours, tmp_path / "again")
    again = read_by_peft(transformers.BertForMaskedLM, tmp_path)
    np.testing.assert_allclose(logits_of(again, IDS), ours(IDS).prediction_logits.numpy(), rtol=0, atol=5e-5)


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_a_translator(tmp_path, bias):
    """final_logits_bias is no parameter for PEFT, so it stays the base's, whatever `bias` says."""
    marian().save_pretrained(tmp_path / "base")
    base = transformers.MarianMTModel.from_pretrained(tmp_path / "base")  # its positions as they were
    theirs = adapted(base, target_modules=["q_proj", "v_proj", "fc1"], task_type="SEQ_2_SEQ_LM", bias=bias)
    ours = ours_of(tmp_path / "base", saved(theirs, tmp_path / "adapter")).eval()
    source, target = (np.random.default_rng(seed).integers(2, VOCABULARY, (2, 9)) for seed in (0, 1))
    options = {"decoder_input_ids": torch.from_numpy(target)}
    expected = logits_of(theirs, source, **options)
    np.testing.assert_allclose(ours(source, target).numpy(), expected, rtol=0, atol=2e-5)
    assert not ours.logits_bias.requires_grad
    lora.save(ours, tmp_path / "again")
    files = [written(tmp_path / name) for name in ("adapter", "again")]
    assert files[0].keys() == files[1].keys()
    assert all(np.array_equal(files[0][key], array) for key, array in files[1].items())
    again = read_by_peft(transformers.MarianMTModel, tmp_path)
    np.testing.assert_allclose(logits_of(again, source, **options), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "kind, target, table", [("marian", "q_proj", "shared"), ("bert", "query", "word_embeddings")]
)
def test_a_table_that_the_head_reads_too_is_refused_as_peft_writes_it(kind, target, table, tmp_path):
    """PEFT trains a copy for the embedding alone, and writes only that."""
    base = marian() if kind == "marian" else masked_bert()
    base.save_pretrained(tmp_path / "base")
    saved(adapted(base, target_modules=[target], modules_to_save=[table]), tmp_path / "adapter")
    error = pytest.raises(
        InputError, lora.load, tinyllm.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
    )
    assert f"{table}, whose table another module has too" in one_line(error)
