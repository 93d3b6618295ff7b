"""Padding is exact: a row gives the same result alone and in any batch, with any pads, for every variant and head.

python -m pytest tests/test_padding.py
"""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_linformer import (
    LinformerForMaskedLM,
    LinformerForMultipleChoice,
    LinformerForQuestionAnswering,
    LinformerForSequenceClassification,
    LinformerForTokenClassification,
    LinformerModel,
)
from tiny import TYPES, build, core_variants, variant_id, variants


HEADS = (
    LinformerForMaskedLM,
    LinformerForSequenceClassification,
    LinformerForTokenClassification,
    LinformerForQuestionAnswering,
    LinformerForMultipleChoice,
)
by_example = settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
masks = st.integers(1, 37).flatmap(
    lambda N: st.lists(st.lists(st.booleans(), min_size=N, max_size=N), min_size=1, max_size=4)
)
MODELS: dict[str, torch.nn.Module] = {}


def model_for(model_class, variant: dict, **changes):
    """Built once: hypothesis calls a test many times."""
    key = f"{model_class.__name__} {variant} {changes}"
    if key not in MODELS:
        MODELS[key] = build(model_class, dtype=torch.float64, **variant, **changes)
    return MODELS[key]


def rows_alone(model, input_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Hidden states of all real tokens, each row run by itself without pads and without a mask."""
    rows = [row[keep][None] for row, keep in zip(input_ids, mask) if keep.any()]
    states = [model(row).last_hidden_state[0] for row in rows]
    return torch.cat(states) if states else torch.zeros(0, model.config.hidden_size, dtype=model.dtype)


@pytest.mark.parametrize("variant", variants(), ids=variant_id)
@settings(by_example, max_examples=12)
@given(mask=masks, seed=st.integers(0, 2**31))
def test_real_tokens_never_notice_pads(variant, mask, seed):
    """Pads anywhere (left, right, holes, whole rows), any batch of lengths 0 to n."""
    model = model_for(LinformerModel, variant)
    mask = torch.tensor(mask)
    input_ids = torch.randint(0, 53, mask.shape, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        output = model(input_ids, attention_mask=mask).last_hidden_state
        assert torch.isfinite(output).all()
        torch.testing.assert_close(output[mask], rows_alone(model, input_ids, mask), rtol=0, atol=1e-9)


@pytest.mark.parametrize("variant", core_variants(), ids=variant_id)
def test_single_precision_is_exact_to_a_hundred_thousandth(variant):
    model = build(LinformerModel, initializer_range=0.2, **variant)
    mask = torch.tensor([[0] * 7 + [1] * 30, [1] * 30 + [0] * 7, [1, 0, 0, 1] * 9 + [0], [1] * 37])
    input_ids = torch.randint(0, 53, mask.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        output = model(input_ids, attention_mask=mask).last_hidden_state[mask.bool()]
        torch.testing.assert_close(output, rows_alone(model, input_ids, mask.bool()), rtol=0, atol=1e-5)


@pytest.mark.parametrize("variant", core_variants(), ids=variant_id)
@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), 1e30])
def test_what_a_pad_holds_leaks_neither_forward_nor_backward(variant, garbage):
    model = model_for(LinformerModel, variant)
    mask = torch.tensor([[1] * 11 + [0] * 8, [0, 1, 1, 0] * 4 + [1, 1, 1]], dtype=torch.bool)
    embeddings = torch.randn(2, 19, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gradients, outputs = [], []
    for filling in (0.0, garbage):
        inputs_embeds = torch.where(mask[..., None], embeddings, filling).requires_grad_()
        output = model(inputs_embeds=inputs_embeds, attention_mask=mask).last_hidden_state
        assert torch.isfinite(output).all()
        model.zero_grad()
        output[mask].square().sum().backward()
        assert (inputs_embeds.grad[~mask] == 0).all()
        gradients.append([inputs_embeds.grad] + [p.grad.clone() for p in model.parameters() if p.grad is not None])
        outputs.append(output[mask].detach())
    assert torch.equal(*outputs)
    assert all(torch.equal(clean, dirty) for clean, dirty in zip(*gradients))


@pytest.mark.parametrize("kind", TYPES)
def test_ids_at_pads_may_be_anything(kind):
    """-100 and the like, which are in no table."""
    model = model_for(LinformerModel, {"projection_type": kind})
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 0, 0, 0]])
    ids = torch.tensor([[5, 5, 7, 8, 9], [7, 8, 5, 5, 5]])
    wild = torch.where(mask.bool(), ids, -100)
    inputs = {"attention_mask": mask, "token_type_ids": torch.where(mask.bool(), 1, -100)}
    clean = model(ids, attention_mask=mask, token_type_ids=torch.ones_like(ids))
    assert torch.equal(model(wild, **inputs).last_hidden_state, clean.last_hidden_state)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.float32, torch.bfloat16])
def test_a_mask_of_any_dtype_means_non_zero_is_real(dtype):
    model = model_for(LinformerModel, {})
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]])
    input_ids = torch.randint(0, 53, mask.shape)
    expected = model(input_ids, attention_mask=mask).last_hidden_state
    scale = 1 if dtype == torch.bool else 3
    assert torch.equal(model(input_ids, attention_mask=(mask * scale).to(dtype)).last_hidden_state, expected)


@pytest.mark.parametrize("head", HEADS, ids=lambda head: head.__name__)
@pytest.mark.parametrize("variant", variants(), ids=variant_id)
@settings(by_example, max_examples=3)
@given(pads=st.lists(st.integers(0, 36), min_size=2, max_size=3), left=st.booleans(), seed=st.integers(0, 2**31))
def test_every_head_gives_a_row_the_same_answer_in_any_batch(head, variant, pads, left, seed):
    pooling = {"classifier_pooling": "mean" if seed % 2 else "cls"}
    model = model_for(head, variant, num_labels=3, **pooling)
    N = 37
    positions = torch.arange(N)
    mask = torch.stack([positions >= pad if left else positions < N - pad for pad in pads])
    input_ids = torch.randint(3, 53, mask.shape, generator=torch.Generator().manual_seed(seed))
    choices = (lambda states: states[:, None]) if head is LinformerForMultipleChoice else (lambda states: states)
    name = "start_logits" if head is LinformerForQuestionAnswering else "logits"
    with torch.no_grad():
        batched = getattr(model(choices(input_ids), attention_mask=choices(mask)), name)
        for row, keep, logits in zip(input_ids, mask, batched):
            alone = getattr(model(choices(row[keep][None])), name)[0]
            per_token = head not in (LinformerForSequenceClassification, LinformerForMultipleChoice)
            torch.testing.assert_close(logits[keep] if per_token else logits, alone, rtol=0, atol=1e-8)


@pytest.mark.parametrize("variant", core_variants(), ids=variant_id)
def test_the_traced_path_is_exact_too(variant):
    """Compiled code never looks at the mask's values, so it takes the general path for every mask."""
    torch._dynamo.reset()
    model = model_for(LinformerModel, variant)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    mask = torch.tensor(
        [[1] * 19, [0] * 7 + [1] * 12, [1] * 12 + [0] * 7, [1, 0] * 9 + [1], [0] * 19], dtype=torch.bool
    )
    input_ids = torch.randint(0, 53, mask.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        output = compiled(input_ids, attention_mask=mask).last_hidden_state
        assert torch.isfinite(output).all()
        torch.testing.assert_close(output[mask], rows_alone(model, input_ids, mask), rtol=0, atol=1e-9)
