"""What the tests of a model against transformers share. Importing this skips where the libraries are not.

`theirs` is a model of transformers, `ours` the same model of ours, `options` those of a call of theirs.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before the import below, which reads it
torch = pytest.importorskip("torch", reason="needs the extra: pip install -e '.[reference]'")
transformers = pytest.importorskip("transformers", reason="needs the extra: pip install -e '.[reference]'")

import tinyllm  # noqa: E402
from autograd import no_grad  # noqa: E402

VOCABULARY = 61


def scrambled(make: Callable[..., Any], config: Any, **options: Any) -> Any:
    """make(config) with random weights that make mistakes visible: no bias near 0, no norm near 1."""
    torch.manual_seed(0)
    theirs = make(config, **options).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return theirs


def converted(theirs: Any, dtype: Any) -> Any:
    """A copy that computes in another precision, without gradients."""
    return deepcopy(theirs).to(getattr(torch, np.dtype(dtype).name))


def in_float64(theirs: Any, ours: Any, modeling: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A copy of their LLaMA or Mistral that computes in float64 what it always rounds to float32, except for
    the angles of the positions, which are float32 in both, and here the same."""
    exact = SimpleNamespace(**{**vars(torch), "float32": torch.float64})
    monkeypatch.setattr(modeling, "torch", exact)
    theirs = converted(theirs, np.float64)

    def rotation(x: Any, position_ids: Any) -> tuple:
        tables = ours._rotation(int(position_ids[0, 0]), position_ids.shape[1])
        return tuple(torch.from_numpy(np.tile(table, 2))[None] for table in tables)  # each (1, T, d)

    theirs.model.rotary_emb.forward = rotation
    return theirs


def random_ids(*shape: int) -> np.ndarray:
    return np.random.default_rng(shape).integers(0, VOCABULARY, shape)


# The function that they compute


def logits_of(theirs: Any, ids: np.ndarray, **options: Any) -> np.ndarray:
    with torch.no_grad():
        return theirs(torch.from_numpy(ids), **options).logits.numpy()


def our_logits(ours: Any, ids: np.ndarray, cache: Any = None) -> np.ndarray:
    with no_grad():
        return ours(ids, cache).numpy()


def assert_same_logits(
    theirs: Any, ours: Any, ids: np.ndarray, tolerance: float = 5e-5, **options: Any
) -> np.ndarray:
    """In the same precision. Returns ours."""
    expected, found = logits_of(theirs, ids, **options), our_logits(ours, ids)
    assert found.dtype == ours.dtype == expected.dtype and found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)
    return found


def assert_same_hidden_states(
    theirs: Any, ours: Any, ids: np.ndarray, tolerance: float = 5e-5, **options: Any
) -> None:
    """What the head reads."""
    with torch.no_grad():
        expected = theirs.base_model(torch.from_numpy(ids), **options).last_hidden_state.numpy()
    with no_grad():
        found = ours.hidden_states(ids).numpy()
    assert found.dtype == expected.dtype
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)


def greedy(theirs: Any, ids: np.ndarray, new: int) -> np.ndarray:
    """The ids and `new` tokens more, each the likeliest."""
    with torch.no_grad():
        text = theirs.generate(
            torch.from_numpy(ids),
            attention_mask=torch.ones(ids.shape, dtype=torch.int64),
            max_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
        )
    return text.numpy()


def assert_same_text_of_prompts_of_different_lengths(theirs: Any, ours: Any, new: int) -> None:
    """Greedy. They fill short prompts up at the left, with zeros that are masked; ours never see any."""
    ids = random_ids(3, 9)
    lengths = [9, 2, 5]
    mask = torch.from_numpy(np.arange(9)[::-1] < np.array(lengths)[:, None]).long()
    options = {"attention_mask": mask, "max_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        expected = theirs.generate(torch.from_numpy(ids) * mask, **options).numpy()
    found = ours.generate([row[9 - n :] for row, n in zip(ids, lengths)], new, temperature=0)
    for row, n, text in zip(found, lengths, expected):
        assert np.array_equal(row[: n + new], text[9 - n :]) and (row[n + new :] == -1).all()


# Gradients


def published_names(ours: Any) -> dict[str, str]:
    """Our parameter's name -> theirs."""
    return {name: ours.published_name(name) for name, _ in ours.named_parameters()}


def gradients_of(theirs: Any, names: dict[str, str]) -> dict[str, np.ndarray]:
    """Our parameter's name -> their gradient of it, where `names` has each parameter of theirs once."""
    found = {name: parameter.grad.numpy() for name, parameter in theirs.named_parameters()}
    assert sorted(found) == sorted(names.values())
    return {ours: found[name] for ours, name in names.items()}


def gradients_of_same_loss(theirs: Any, ours: Any, ids: np.ndarray, tolerance: float, **options: Any) -> dict:
    """Assert that both have the same loss, where four of the targets do not count; returns their gradients
    by our names, and leaves ours in the parameters."""
    labels = torch.from_numpy(ids).clone()
    labels[1, 5:9] = -100
    # theirs(ids, labels=labels) would round the logits to float32.
    logits = theirs(torch.from_numpy(ids), **options).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    expected.backward()
    loss = ours.loss(ids[:, :-1], labels.numpy()[:, 1:])
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    return gradients_of(theirs, published_names(ours))


def assert_same_gradients(ours: Any, expected: dict[str, np.ndarray], tolerance: float) -> None:
    """A gradient is a sum over all positions of terms of either sign, in float32 each rounded to 6e-8 of
    itself, and a key's bias has the gradient 0; so errors are measured against the largest of a tensor."""
    parameters = dict(ours.named_parameters())
    assert expected.keys() == parameters.keys()
    for name, g in expected.items():
        found = parameters[name].grad.numpy()
        assert found.shape == g.shape, name
        np.testing.assert_allclose(found, g, rtol=0, atol=tolerance * np.abs(g).max(), err_msg=name)


def blocks_transposed(gradients: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """In the published layout of the GPTs the matrices of the blocks are stored (in, out); here (out, in)."""
    return {name: g.T if g.ndim == 2 and "blocks." in name else g for name, g in gradients.items()}


# Files


def read_back(theirs: Any, ours: Any, folder: Path, **options: Any) -> Any:
    """Their model as transformers reads it from the folder that ours writes, with every weight as it was.

    Its logits may differ by rounding: where an array happens to lie in memory, sums may round otherwise.
    """
    ours.save_pretrained(folder)
    again, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, **options
    )
    assert type(again) is type(theirs) and again.dtype == torch.float32
    assert {kind: list(names) for kind, names in report.items() if names} == {}
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    return again.eval()


def assert_shards_are_read(theirs: Any, folder: Path, ids: np.ndarray, **options: Any) -> None:
    theirs.save_pretrained(folder, max_shard_size="20KB")
    assert (folder / "model.safetensors.index.json").exists()
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    assert_same_logits(theirs, tinyllm.from_pretrained(folder), ids, **options)
