"""On short rows, the adaptive slots are no approximation: the model equals BERT and RoBERTa on copied weights.

python -m pytest tests/test_exactness.py
"""

import pytest
import torch
from transformers import BertConfig, BertModel, RobertaConfig, RobertaModel

from hf_linformer import LinformerConfig, LinformerModel
from hf_linformer.modeling_linformer import LinformerSelfAttention


K, N = 8, 40
SIZES = {
    "vocab_size": 61,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 31,
    "initializer_range": 0.2,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-6,
}


def source_model(family: str) -> BertModel | RobertaModel:
    torch.manual_seed(0)
    if family == "bert":
        model = BertModel(BertConfig(**SIZES, max_position_embeddings=N, pad_token_id=1))
    else:
        # RoBERTa's table begins with pad_token_id + 1 rows that no token uses.
        model = RobertaModel(RobertaConfig(**SIZES, max_position_embeddings=N + 2, pad_token_id=1))
    return model.eval()


def with_weights_of(source: BertModel | RobertaModel, **changes) -> LinformerModel:
    model = LinformerModel(LinformerConfig(**SIZES, max_position_embeddings=N, projected_length=K, **changes)).eval()
    names = {
        "embeddings.LayerNorm": "embeddings.norm",
        "encoder.layer": "layers",
        "attention.self": "attention",
        "attention.output.dense": "attention.output",
        "attention.output.LayerNorm": "attention_norm",
        "intermediate.dense": "mlp.up",
        "output.dense": "mlp.down",
        "output.LayerNorm": "mlp_norm",
    }
    weights = {}
    for name, weight in source.state_dict().items():
        for old, new in names.items():
            name = name.replace(old, new)
        weights[name] = weight[-N:] if "position_embeddings" in name else weight
    own = {name: weight for name, weight in model.state_dict().items() if name.endswith((".E", ".F"))}
    model.load_state_dict(weights | own)
    return model


EXACT = [
    ({"projection_type": "mean_pool"}, K),
    ({"projection_type": "max_pool"}, K),
    ({"projection_type": "mean_pool", "local_window": 3}, K),
    ({"projection_type": "max_pool", "local_window": 3}, K),
    # With a window: max(k, 2 w)
    ({"projection_type": "mean_pool", "local_window": 7}, 14),
    ({"projection_type": "max_pool", "local_window": 7}, 14),
    *[
        ({"projection_type": kind, "projection_sharing": sharing, "local_window": w, "exact_short_sequences": True}, K)
        for kind in ("linear", "random", "convolution")
        for sharing in ("none", "layerwise")
        for w in (0, 3)
    ],
]


@pytest.mark.parametrize("family", ["bert", "roberta"])
@pytest.mark.parametrize(
    ("changes", "limit"),
    EXACT,
    ids=str,
)
def test_equals_its_source_up_to_k_tokens(family, changes, limit):
    source = source_model(family)
    model = with_weights_of(source, **changes)
    for length in range(1, limit + 1):
        input_ids = torch.randint(3, 61, (2, length))
        token_type_ids = torch.randint(0, 2, (2, length))
        with torch.no_grad():
            expected = source(input_ids, token_type_ids=token_type_ids)
            output = model(input_ids, token_type_ids=token_type_ids)
        torch.testing.assert_close(output.last_hidden_state, expected.last_hidden_state, rtol=0, atol=1e-5)
        torch.testing.assert_close(output.pooler_output, expected.pooler_output, rtol=0, atol=1e-5)

    # In a batch with a row that is too long for it, a short row stays exact.
    lengths = (limit, limit - 3, N)
    input_ids = torch.randint(3, 61, (3, N))
    mask = torch.arange(N) < torch.tensor(lengths)[:, None]
    input_ids = torch.where(mask, input_ids, 1)
    with torch.no_grad():
        expected = source(input_ids, attention_mask=mask.long()).last_hidden_state
        output = model(input_ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(output[:2][mask[:2]], expected[:2][mask[:2]], rtol=0, atol=1e-5)
    assert (output[2] - expected[2]).abs().max() > 0.01, "the long row is compressed, or this test shows nothing"


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_gradients_are_those_of_the_source(family):
    source = source_model(family)
    model = with_weights_of(source, projection_type="mean_pool", local_window=3)
    input_ids = torch.randint(3, 61, (2, K))
    # The sum of what a norm puts out, or of its squares, has next to no gradient.
    weights = torch.randn(2, K, SIZES["hidden_size"])
    for encoder in (source, model):
        (encoder(input_ids).last_hidden_state * weights).sum().backward()
    for layer, other in zip(model.layers, source.encoder.layer):
        for name in ("query", "key", "value"):
            ours, theirs = getattr(layer.attention, name).weight.grad, getattr(other.attention.self, name).weight.grad
            assert theirs.abs().max() > 0.1
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_one_row_more_than_k_is_no_longer_exact():
    source = source_model("bert")
    model = with_weights_of(source, projection_type="mean_pool")
    input_ids = torch.randint(3, 61, (1, K + 1))
    with torch.no_grad():
        difference = model(input_ids).last_hidden_state - source(input_ids).last_hidden_state
    assert difference.abs().max() > 0.01


@pytest.fixture
def blocks_of(monkeypatch):
    """For how many tokens blocks were made, a number for each layer and part of a batch."""
    seen: list[int] = []
    attend_nearby = LinformerSelfAttention.attend_nearby

    def noted(self, query, *others):
        seen.append(query.shape[2])
        return attend_nearby(self, query, *others)

    monkeypatch.setattr(LinformerSelfAttention, "attend_nearby", noted)
    return seen


def masks(N: int) -> torch.Tensor:
    """Rows of N tokens: whole, padded right, padded left, with holes, and pads alone."""
    mask = torch.ones(5, N, dtype=torch.bool)
    mask[1, N // 2 + 1 :] = False
    mask[2, : N // 3] = False
    mask[3, 1::3] = False
    mask[4] = False
    return mask


def outputs_and_gradients(model: LinformerModel, mask: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The states of the real tokens of drawn rows, and the gradients of all weights of a drawn sum of them."""
    generator = torch.Generator().manual_seed(mask.shape[1])
    input_ids = torch.randint(3, 61, mask.shape, generator=generator)
    model.zero_grad()
    states = model(input_ids, attention_mask=mask).last_hidden_state
    assert states.isfinite().all()
    (states[mask] * torch.randn(states[mask].shape, generator=generator)).sum().backward()
    gradients = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    return states[mask].detach(), gradients


@pytest.mark.parametrize("window", [3, 7])
@pytest.mark.parametrize(
    "changes",
    [{"projection_type": kind} for kind in ("mean_pool", "max_pool")]
    + [{"projection_type": "mean_pool", "slot_projections": True}],
    ids=str,
)
def test_blocks_are_left_out_where_all_tokens_see_all(blocks_of, changes, window):
    """The same outputs and gradients as with blocks, which returned attentions need."""
    torch.manual_seed(0)
    sizes = {**SIZES, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = LinformerModel(
        LinformerConfig(**sizes, max_position_embeddings=N, projected_length=K, local_window=window, **changes)
    )
    limit = max(K, 2 * window)
    for length in (1, 2, K, limit - 1, limit, limit + 1):
        mask = masks(length)
        model.set_attn_implementation("eager")
        expected, expected_gradients = outputs_and_gradients(model, mask)
        assert blocks_of
        blocks_of.clear()
        model.set_attn_implementation("sdpa")
        states, gradients = outputs_and_gradients(model, mask)
        assert bool(blocks_of) == (length > limit)
        torch.testing.assert_close(states, expected, rtol=0, atol=1e-5)
        assert gradients.keys() == expected_gradients.keys()
        for name, gradient in gradients.items():
            scale = expected_gradients[name].abs().max()
            assert (gradient - expected_gradients[name]).abs().max() <= 1e-4 * scale + 1e-5, name
        assert length == 1 or expected_gradients["layers.0.attention.key.weight"].abs().max() > 0.1


@pytest.mark.parametrize(
    "changes", [{"projection_type": "mean_pool", "local_position_bias": True}, {"projection_type": "linear"}], ids=str
)
def test_blocks_stay_where_offsets_or_slots_of_their_own_count(blocks_of, changes):
    model = LinformerModel(
        LinformerConfig(**SIZES, max_position_embeddings=N, projected_length=K, local_window=7, **changes)
    )
    model(torch.randint(3, 61, (1, 5)))
    assert blocks_of == [5] * SIZES["num_hidden_layers"]
