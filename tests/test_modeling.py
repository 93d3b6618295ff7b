"""The model against the paper's equations, and what it promises beside them.

python -m pytest tests/test_modeling.py
"""

import copy

import pytest
import torch
from accelerate import cpu_offload
from transformers import BertConfig, BertModel

import reference
from hf_linformer import (
    LinformerForMaskedLM,
    LinformerForSequenceClassification,
    LinformerModel,
)
from tiny import LEARNED, TYPES, build, core_variants, tiny_config, variant_id, variants


def padded_batch(lengths: tuple[int, ...], N: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random ids, and a mask with the pads of each row in random places."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(3, 53, (len(lengths), N), generator=generator)
    mask = torch.zeros(len(lengths), N, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, torch.randperm(N, generator=generator)[:length]] = 1
    return input_ids, mask


@pytest.mark.parametrize("settings", variants(), ids=variant_id)
def test_equals_the_equations_in_output_and_gradient(settings):
    model = build(LinformerModel, dtype=torch.float64, **settings)
    model.pooler = None
    # One row alone takes the path without a mask; the other two have their pads in different places.
    batches = [padded_batch((11,), 11, seed=1), padded_batch((13, 5), 15, seed=2)]
    for input_ids, mask in batches:
        targets = torch.randn(*input_ids.shape, model.config.hidden_size, dtype=torch.float64)
        output = model(input_ids, attention_mask=mask).last_hidden_state
        real = mask.bool()
        (output * targets)[real].sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        model.zero_grad(set_to_none=True)

        weights = dict(model.named_parameters()) | dict(model.named_buffers())
        rows = [reference.encode(model.config, weights, row[keep].tolist()) for row, keep in zip(input_ids, real)]
        torch.testing.assert_close(output[real], torch.cat(rows), rtol=0, atol=1e-9)
        sum((row * target[keep]).sum() for row, target, keep in zip(rows, targets, real)).backward()
        for name, parameter in model.named_parameters():
            expected = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
            got = gradients[name] if gradients[name] is not None else torch.zeros_like(parameter)
            torch.testing.assert_close(
                got, expected, rtol=1e-8, atol=1e-8, msg=lambda text, name=name: f"{name}: {text}"
            )
        model.zero_grad(set_to_none=True)


@pytest.mark.parametrize("settings", variants(windows=(0, 4)), ids=variant_id)
def test_equals_the_equations_in_single_precision(settings):
    model = build(LinformerModel, **settings)
    input_ids, mask = padded_batch((24, 3, 1), 27, seed=3)
    with torch.no_grad():
        output = model(input_ids, attention_mask=mask).last_hidden_state
        for row, keep, states in zip(input_ids, mask.bool(), output):
            expected = reference.encode(model.config, model.state_dict(), row[keep].tolist())
            torch.testing.assert_close(states[keep], expected, rtol=0, atol=1e-4)


# Two blocks of which hold every row of the test, so that there are none.
WIDE = [{"projection_type": kind, "local_window": 14} for kind in ("mean_pool", "max_pool")]


@pytest.mark.parametrize("settings", [*variants(), *WIDE], ids=variant_id)
@pytest.mark.parametrize("size", [5, 30])
def test_tiles_change_nothing(settings, size):
    """Parts of a row and several rows at a time; pads right, left and in between, a row of pads alone."""
    model = build(LinformerModel, dtype=torch.float64, **settings)
    tokens_in_layer: list[int] = []
    handle = model.layers[0].mlp.register_forward_hook(
        lambda module, args, output: tokens_in_layer.append(args[0].shape[0] * args[0].shape[1])
    )
    input_ids, holes = padded_batch((24, 3, 12, 0), 27, seed=3)
    right = torch.arange(27) < torch.tensor([24, 3, 12, 0])[:, None]
    for mask in (None, holes, right, right.flip(1)):
        with torch.no_grad():
            model.config.inference_chunk_size = 0
            whole = model(input_ids, attention_mask=mask).last_hidden_state
            model.config.inference_chunk_size = size
            tokens_in_layer.clear()
            tiles = model(input_ids, attention_mask=mask).last_hidden_state
        real = torch.ones(4, 27, dtype=torch.bool) if mask is None else mask.bool()
        torch.testing.assert_close(tiles[real], whole[real], rtol=0, atol=1e-12)
        assert tiles.isfinite().all()
        # Tiles begin where blocks of the window do.
        assert len(tokens_in_layer) > 1 and max(tokens_in_layer) <= max(size + 2, settings["local_window"])
    assert sum(tokens_in_layer) <= 3 * 27, "the row of pads alone should cost nothing"
    handle.remove()


def test_means_of_long_segments_do_not_overflow_in_half_precision():
    from hf_linformer.modeling_linformer import mean_of_segments

    for dtype in (torch.float16, torch.bfloat16):
        segments = torch.full((1, 2, 512, 3), 1000.0, dtype=dtype)
        torch.testing.assert_close(mean_of_segments(segments), torch.full((1, 2, 3), 1000.0, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("pool", ["mean_of_segments", "maximum_of_segments"])
def test_segments_as_views_are_the_segments_of_the_bounds(pool, dtype):
    from hf_linformer import modeling_linformer

    pool = getattr(modeling_linformer, pool)
    states = torch.randn(1, 23, 5, dtype=dtype)
    for k in (2, 3, 7, 22, 23):
        for length in range(1, 24):
            pooled = modeling_linformer.pool_segments(states, length, k, pool)[0]
            start, end = modeling_linformer.segment_bounds(torch.tensor([length]), torch.tensor([[k]]), k)
            for slot, (first, last) in enumerate(zip(start[0, 0], end[0, 0])):
                if first == last:
                    expected = torch.zeros(5, dtype=dtype)
                else:
                    expected = pool(states[:, None, first:last])[0, 0]
                torch.testing.assert_close(pooled[slot], expected)


def test_tiles_are_for_inference_without_attentions():
    model, eager = (
        build(LinformerModel, inference_chunk_size=5),
        build(LinformerModel, attention="eager", inference_chunk_size=5),
    )
    model.requires_grad_(False).train()
    input_ids, _ = padded_batch((24,), 24)
    calls: list[int] = []
    for each in (model, eager):
        each.layers[0].mlp.register_forward_hook(lambda module, args, output: calls.append(args[0].shape[1]))
    model(input_ids)
    with torch.no_grad():
        eager(input_ids)
    assert calls == [24, 24]
    with torch.no_grad():
        model(input_ids)
    assert len(calls) > 3


def test_hooks_on_attention_see_all_tokens():
    model, input_ids = build(LinformerModel, inference_chunk_size=5), padded_batch((24,), 24)[0]
    seen: list[tuple[int, ...]] = []
    handles = [
        model.layers[0].attention.register_forward_hook(lambda module, args, output: seen.append(output[0].shape)),
        model.layers[1].attention.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape)),
    ]
    with torch.no_grad():
        watched = model(input_ids).last_hidden_state
        assert seen == [(1, 24, 20)] * 2
        for handle in handles:
            handle.remove()
            model(input_ids)
            # The other hook alone is enough, and without any there are tiles again.
            assert len(seen) == 3
        torch.testing.assert_close(model(input_ids).last_hidden_state, watched, rtol=0, atol=1e-5)


def test_tiles_keep_the_precision_of_autocast(monkeypatch):
    """As on GPUs, where norms are in single precision and the linear layer that widens embeddings is not."""
    from torch.nn import functional

    layer_norm = functional.layer_norm

    def in_single_precision(states, *args):
        with torch.autocast("cpu", enabled=False):
            return layer_norm(states.float(), *args)

    monkeypatch.setattr(functional, "layer_norm", in_single_precision)
    model = build(LinformerModel, embedding_size=12, projection_type="mean_pool", local_window=3)
    input_ids, mask = padded_batch((24, 7), 24)
    states = []
    for size in (0, 5):
        model.config.inference_chunk_size = size
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            states.append(model(input_ids, attention_mask=mask).last_hidden_state[mask.bool()])
    assert states[0].dtype == states[1].dtype == torch.float32
    torch.testing.assert_close(states[1], states[0], rtol=0, atol=0.1)


@pytest.mark.parametrize("kind", LEARNED)
@pytest.mark.parametrize("exact", [False, True])
def test_positions_given_by_the_caller_choose_the_columns_of_E(kind, exact):
    model = build(LinformerModel, dtype=torch.float64, projection_type=kind, exact_short_sequences=exact)
    input_ids, mask = padded_batch((8, 5), 9, seed=4)
    position_ids = torch.stack([torch.randperm(37)[:9], torch.randperm(37)[:9]])
    output = model(input_ids, attention_mask=mask, position_ids=position_ids).last_hidden_state
    for row, keep, positions, states in zip(input_ids, mask.bool(), position_ids, output):
        expected = reference.encode(model.config, model.state_dict(), row[keep].tolist(), positions[keep].tolist())
        torch.testing.assert_close(states[keep], expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("settings", variants(), ids=variant_id)
def test_default_positions_given_explicitly_change_nothing(settings):
    model = build(LinformerModel, **settings)
    input_ids, _ = padded_batch((17,), 17)
    with torch.no_grad():
        default = model(input_ids).last_hidden_state
        explicit = model(input_ids, position_ids=torch.arange(17)[None]).last_hidden_state
    torch.testing.assert_close(explicit, default, rtol=0, atol=1e-5)


def test_projecting_before_or_after_the_linears_gives_the_same_numbers():
    """E (X W) + b == (E X) W + b: a per-head E that is the same for all heads takes the other order."""
    shared = build(LinformerModel, dtype=torch.float64, projection_sharing="headwise")
    separate = build(LinformerModel, dtype=torch.float64, projection_sharing="none")
    state = shared.state_dict()
    for name in list(state):
        if name.endswith(("projection.E", "projection.F")):
            state[name] = state[name].expand(4, -1, -1).clone()
    separate.load_state_dict(state)
    input_ids, mask = padded_batch((17, 9), 17)
    calls = []
    for model in (shared, separate):
        key = model.layers[0].attention.key
        rows: list[int] = []
        handle = key.register_forward_hook(lambda module, args, output, rows=rows: rows.append(args[0].shape[1]))
        calls += [model(input_ids, attention_mask=mask).last_hidden_state, max(rows)]
        handle.remove()
    output_shared, rows_shared, output_separate, rows_separate = calls
    assert (rows_shared, rows_separate) == (6, 17), "shared E: the key linear should run on k rows, else on N"
    real = mask.bool()
    torch.testing.assert_close(output_shared[real], output_separate[real], rtol=0, atol=1e-10)


@pytest.mark.parametrize("settings", variants(), ids=variant_id)
def test_eager_and_sdpa_agree_and_eager_returns_attentions(settings):
    eager, sdpa = build(LinformerModel, attention="eager", **settings), build(LinformerModel, **settings)
    input_ids, mask = padded_batch((17, 4), 19)
    window, k = settings["local_window"], settings.get("projected_length", 6)
    for given_mask in (mask, None):
        with torch.no_grad():
            expected = eager(input_ids, attention_mask=given_mask, output_attentions=True, output_hidden_states=True)
            output = sdpa(input_ids, attention_mask=given_mask)
        real = torch.ones_like(mask).bool() if given_mask is None else mask.bool()
        torch.testing.assert_close(output.last_hidden_state[real], expected.last_hidden_state[real], rtol=0, atol=5e-5)
        assert len(expected.hidden_states) == 3
        for layer, probabilities in enumerate(expected.attentions):
            layer_k = k[layer] if isinstance(k, list) else k
            layer_k = max(layer_k) if isinstance(layer_k, list) else layer_k
            assert probabilities.shape == (2, 4, 19, layer_k + (1 + 3 * window if window else 0))
            sums = probabilities.sum(dim=-1).transpose(1, 2)[real]
            torch.testing.assert_close(sums, torch.ones_like(sums), rtol=0, atol=1e-5)


def test_attentions_tell_where_a_query_looks():
    """With a window the columns are the slots, the first token, and three blocks in order."""
    model = build(LinformerModel, attention="eager", projection_type="mean_pool", local_window=3, num_hidden_layers=1)
    input_ids, _ = padded_batch((17,), 17)
    probabilities = model(input_ids, output_attentions=True).attentions[0][0]  # (H, 17, 6 + 1 + 9)
    assert (probabilities[..., 0] == 0).all(), "slot 0 is the first token, which has a column of its own"
    assert (probabilities[..., 6] > 0).all()
    # Query 1 stands in block 0: no block to its left; of its own block the first token is counted in column 6.
    assert (probabilities[:, 1, 7:11] == 0).all() and (probabilities[:, 1, 11:] > 0).all()
    # Query 16 stands in block 5, the last one, with tokens 15 and 16; block 4 is whole.
    assert (probabilities[:, 16, 7:12] > 0).all() and (probabilities[:, 16, 12:] == 0).all()


@pytest.mark.parametrize(("kind", "window"), [*((kind, 0) for kind in TYPES), ("mean_pool", 19), ("max_pool", 19)])
def test_without_pads_attention_gets_no_mask(kind, window, monkeypatch):
    """So that fused kernels apply. A mask of all ones counts as no pads; shorter or longer than k makes no odds.

    Nor does a window that shows every token to all.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    masks = []
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def spy(module, query, key, value, attention_mask, **kwargs):
        masks.append(attention_mask)
        return sdpa(module, query, key, value, attention_mask, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", spy)
    model = build(LinformerModel, projection_type=kind, local_window=window)
    for N in (3, 6, 17, 37):
        input_ids, mask = padded_batch((N, N), N)
        model(input_ids)
        model(input_ids, attention_mask=mask)
        model(input_ids, attention_mask=mask.double())
    assert len(masks) == 4 * 3 * 2 and all(mask is None for mask in masks)


def test_a_position_bias_begins_as_nothing_and_learns(tmp_path):
    """A checkpoint made without one, converted or trained, loads with one and gives the same numbers."""
    model = build(LinformerForMaskedLM, projection_type="mean_pool", local_window=3)
    model.save_pretrained(tmp_path)
    with_bias, report = LinformerForMaskedLM.from_pretrained(
        tmp_path, local_position_bias=True, output_loading_info=True
    )
    names = {f"linformer.layers.{layer}.attention.position_bias.weight" for layer in range(2)}
    assert report["missing_keys"] == names
    input_ids, mask = padded_batch((17, 4), 19)
    outputs = with_bias.eval()(input_ids, attention_mask=mask, labels=input_ids)
    assert torch.equal(outputs.logits, model(input_ids, attention_mask=mask).logits)

    outputs.loss.backward()
    for layer in with_bias.linformer.layers:
        # 17 tokens make 6 blocks, in which all 11 offsets are seen, from 5 before to 5 behind.
        gradient = layer.attention.position_bias.weight.grad
        assert gradient.shape == (4, 11) and (gradient != 0).all()


# To compile takes half a minute; below, every way through the code is exported, which traces it as well.
COMPILED = [
    settings
    for settings in core_variants()
    if (settings["projection_type"], settings["local_window"]) in (("linear", 0), ("convolution", 0))
    or settings.get("local_position_bias")
    or (settings["projection_type"] == "mean_pool" and "projected_length" in settings)
]


@pytest.mark.parametrize("settings", COMPILED, ids=variant_id)
def test_compiles_without_graph_breaks(settings):
    torch._dynamo.reset()
    model = build(LinformerForMaskedLM, dtype=torch.float64, **settings)
    # A graph break shows in Dynamo, where "eager" stops; what comes after it takes as long again: one goes through it.
    backend = "aot_eager" if settings.get("local_position_bias") else "eager"
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for lengths, N in (((17, 4), 19), ((5, 2, 1), 5), ((37, 30), 37)):
        input_ids, mask = padded_batch(lengths, N)
        for given_mask in (mask, None):
            with torch.no_grad():
                expected = model(input_ids, attention_mask=given_mask)
                got = compiled(input_ids, attention_mask=given_mask)
            real = torch.ones_like(mask).bool() if given_mask is None else mask.bool()
            torch.testing.assert_close(got.logits[real], expected.logits[real], rtol=0, atol=1e-9)


def test_compiles_under_a_default_device():
    """And a row that two blocks of the window hold, so that there are none."""
    torch._dynamo.reset()
    model = build(LinformerModel, projection_type="mean_pool", local_window=9)
    input_ids, _ = padded_batch((17,), 17)
    expected = model(input_ids).last_hidden_state
    with torch.device("cpu"):
        got = torch.compile(model, fullgraph=True, backend="eager")(input_ids).last_hidden_state
    torch.testing.assert_close(got, expected)


def test_compiled_training_step_equals_eager():
    torch._dynamo.reset()
    settings = {"projection_type": "mean_pool", "local_window": 3}
    model = build(LinformerForSequenceClassification, num_labels=3, **settings)
    twin = copy.deepcopy(model)
    input_ids, mask = padded_batch((17, 4), 19)
    labels = torch.tensor([2, 0])
    model(input_ids, attention_mask=mask, labels=labels).loss.backward()
    torch.compile(twin, fullgraph=True, backend="aot_eager")(
        input_ids, attention_mask=mask, labels=labels
    ).loss.backward()
    for (name, parameter), other in zip(model.named_parameters(), twin.parameters()):
        torch.testing.assert_close(
            other.grad, parameter.grad, rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("with_mask", [True, False])
@pytest.mark.parametrize("settings", core_variants(), ids=variant_id)
def test_exports_for_every_length(settings, with_mask):
    """One exported graph gives the model's results for rows shorter and longer than k and w, up to n."""
    model = build(LinformerForMaskedLM, dtype=torch.float64, **settings)
    dynamic = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    inputs = dict(zip(("input_ids", "attention_mask"), padded_batch((17, 4), 19)[: 1 + with_mask]))
    program = torch.export.export(
        model, (), inputs, dynamic_shapes=dict.fromkeys(inputs, dynamic), strict=False
    ).module()
    for N in (2, 3, 6, 7, 36, 37):
        input_ids, mask = padded_batch((N, N // 2 + 1, 1), N)
        batch = {"input_ids": input_ids} | ({"attention_mask": mask} if with_mask else {})
        real = mask.bool() if with_mask else torch.ones_like(mask).bool()
        with torch.no_grad():
            torch.testing.assert_close(program(**batch).logits[real], model(**batch).logits[real], rtol=0, atol=1e-9)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("settings", core_variants(), ids=variant_id)
def test_gradient_checkpointing_changes_no_gradient(settings, reentrant):
    model = build(LinformerForMaskedLM, **settings).train()
    input_ids, mask = padded_batch((17, 4), 19)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.zero_grad()
        model(input_ids, attention_mask=mask, labels=input_ids).loss.backward()
        gradients.append([p.grad.clone() if p.grad is not None else None for p in model.parameters()])
    for (name, _), plain, checkpointed in zip(model.named_parameters(), *gradients):
        torch.testing.assert_close(
            checkpointed, plain, rtol=0, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


def error_of_half_precision(model, dtype, *inputs) -> float:
    """Root mean square over the hidden states of real tokens, which have unit scale."""
    real = inputs[1].bool()
    with torch.no_grad():
        expected = model(inputs[0], attention_mask=inputs[1]).last_hidden_state[real]
        got = model.to(dtype)(inputs[0], attention_mask=inputs[1]).last_hidden_state[real]
    assert got.dtype == dtype
    return (got.float() - expected).square().mean().sqrt().item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("settings", variants(), ids=variant_id)
def test_half_precision_costs_no_more_than_in_bert(settings, dtype):
    inputs = padded_batch((17, 4), 19)
    model = build(LinformerModel, initializer_range=0.1, **settings)
    torch.manual_seed(0)
    sizes = {"vocab_size": 53, "hidden_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 27, "max_position_embeddings": 37}
    bert = BertModel(BertConfig(**sizes, initializer_range=0.1)).eval()
    assert error_of_half_precision(model, dtype, *inputs) < 2 * error_of_half_precision(bert, dtype, *inputs)


@pytest.mark.parametrize("settings", core_variants() + [{"projection_sharing": "none"}], ids=variant_id)
def test_autocast_trains(settings):
    model = build(LinformerForMaskedLM, **settings).train()
    input_ids, mask = padded_batch((17, 4), 19)
    expected = model(input_ids, attention_mask=mask, labels=input_ids).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids, attention_mask=mask, labels=input_ids).loss
    loss.backward()
    assert abs(loss - expected) < 0.05 * expected
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("settings", core_variants() + [{"projection_sharing": "none"}], ids=variant_id)
def test_offloaded_weights_change_nothing(settings):
    """Weights that rest elsewhere come only when a module is called, so none may be read past its module."""
    model = build(LinformerModel, initializer_range=0.2, **settings)
    input_ids, mask = padded_batch((17, 4), 19)
    with torch.no_grad():
        expected = model(input_ids, attention_mask=mask).last_hidden_state
        cpu_offload(model, execution_device=torch.device("cpu"))
        output = model(input_ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(output[mask.bool()], expected[mask.bool()], rtol=0, atol=1e-5)


def test_feed_forward_in_chunks_changes_nothing():
    whole, chunked = build(LinformerModel), build(LinformerModel, chunk_size_feed_forward=5)
    input_ids, _ = padded_batch((17, 17), 17)
    torch.testing.assert_close(
        chunked(input_ids).last_hidden_state, whole(input_ids).last_hidden_state, rtol=0, atol=1e-5
    )


def test_sparse_prediction_gives_the_same_loss_and_gradient():
    dense, sparse = build(LinformerForMaskedLM), build(LinformerForMaskedLM, sparse_prediction=True)
    input_ids, mask = padded_batch((17, 4), 19)
    labels = torch.where(torch.rand(input_ids.shape) < 0.3, input_ids, -100)
    outputs = [model(input_ids, attention_mask=mask, labels=labels) for model in (dense, sparse)]
    assert outputs[1].logits.shape == ((labels != -100).sum(), 53)
    torch.testing.assert_close(outputs[1].logits, outputs[0].logits[labels != -100])
    torch.testing.assert_close(outputs[1].loss, outputs[0].loss)
    for output in outputs:
        output.loss.backward()
    for other, parameter in zip(sparse.parameters(), dense.parameters()):
        torch.testing.assert_close(other.grad, parameter.grad, rtol=0, atol=1e-6)
    assert sparse(input_ids, attention_mask=mask).logits.shape == (2, 19, 53), (
        "without labels all tokens are predicted"
    )


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_classification_pools_real_tokens_only(pooling):
    model = build(LinformerForSequenceClassification, num_labels=3, classifier_pooling=pooling)
    input_ids, mask = padded_batch((9,), 14, seed=7)
    assert mask[0, 0] == 0, "the row should start with a pad"
    hidden_states = model.linformer(input_ids, attention_mask=mask).last_hidden_state[0][mask[0].bool()]
    pooled = hidden_states[0] if pooling == "cls" else hidden_states.mean(dim=0)
    head = model.classifier
    expected = head.output(torch.tanh(head.dense(pooled)))
    torch.testing.assert_close(model(input_ids, attention_mask=mask).logits[0], expected, rtol=0, atol=1e-5)


def test_pooler_reads_the_first_real_token():
    model = build(LinformerModel)
    input_ids, mask = padded_batch((9,), 14, seed=7)
    output = model(input_ids, attention_mask=mask)
    first = output.last_hidden_state[0][mask[0].bool()][0]
    torch.testing.assert_close(output.pooler_output[0], torch.tanh(model.pooler.dense(first)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", LEARNED)
def test_initialisation(kind):
    torch.manual_seed(0)
    sizes = {"max_position_embeddings": 512, "projected_length": 64, "initializer_range": 0.02}
    normal = LinformerModel(tiny_config(projection_type=kind, projection_sharing="headwise", **sizes))
    E = normal.layers[0].attention.projection.E
    std = {"linear": 0.02, "random": 64**-0.5, "convolution": 0.02}[kind]
    # A kernel has only 8 entries, so its spread is known less well.
    assert abs(E.std() / std - 1) < (0.9 if kind == "convolution" else 0.05)
    assert not torch.equal(E, normal.layers[0].attention.projection.F)
    assert E.requires_grad == (kind != "random")


@pytest.mark.parametrize("kind", ["linear", "convolution"])
@pytest.mark.parametrize("k", [6, [[5, 3, 7, 4], [6, 6, 6, 6]]])
def test_segment_mean_starts_with_averages_of_all_positions(kind, k):
    settings = {
        "projection_type": kind,
        "projection_sharing": "none",
        "projected_length": k,
        "projection_init": "segment_mean",
    }
    model = LinformerModel(tiny_config(**settings))
    E, F = model.layers[0].attention.projection()
    assert torch.equal(E, F)
    per_head = [6] * 4 if k == 6 else k[0]
    for matrix, slots in zip(E, per_head):
        assert (matrix[slots:] == 0).all()
        members = (matrix[:slots] > 0).int()
        assert (members.sum(dim=0) == 1).all(), "each position feeds one slot"
        assert torch.equal(members.argmax(dim=0).sort().values, members.argmax(dim=0)), "in order"
        if kind == "linear":
            torch.testing.assert_close(matrix[:slots].sum(dim=1), torch.ones(slots))
            assert members.sum(dim=1).max() - members.sum(dim=1).min() <= 1, "even shares"


def test_layers_share_the_first_rows_of_one_E():
    model = build(LinformerModel, projected_length=[7, 4])
    assert [name for name, _ in model.named_parameters() if name.endswith((".E", ".F"))] == ["projection.E"]
    assert model.projection.E.shape == (1, 7, 37)
    input_ids, _ = padded_batch((17,), 17)
    outputs = model(input_ids, output_hidden_states=True).hidden_states
    with torch.no_grad():
        model.projection.E[:, 4:] += 1.0
    changed = model(input_ids, output_hidden_states=True).hidden_states
    assert not torch.allclose(outputs[1], changed[1]), "layer 0 reads all 7 rows"
    layer_1 = model.layers[1]
    from hf_linformer.modeling_linformer import layout_tokens

    layout = layout_tokens(None, None, 17, input_ids.device)
    before = layer_1(outputs[1], layout, model.projection.E)
    with torch.no_grad():
        model.projection.E[:, 4:] += 1.0
    assert torch.equal(layer_1(outputs[1], layout, model.projection.E), before), "layer 1 reads the first 4"


def test_parameter_names_are_those_of_published_checkpoints():
    changes = {
        "projection_sharing": "headwise",
        "num_hidden_layers": 1,
        "local_window": 3,
        "local_position_bias": True,
    }
    names = set(build(LinformerForMaskedLM, **changes).state_dict())
    linears = [f"attention.{name}" for name in ("query", "key", "value", "output")] + ["mlp.up", "mlp.down"]
    layer = [f"{name}.{kind}" for name in (*linears, "attention_norm", "mlp_norm") for kind in ("weight", "bias")]
    layer += ["attention.projection.E", "attention.projection.F", "attention.position_bias.weight"]
    embeddings = [f"{name}_embeddings.weight" for name in ("word", "position", "token_type")]
    expected = {f"linformer.embeddings.{name}" for name in (*embeddings, "norm.weight", "norm.bias")}
    expected |= {f"linformer.layers.0.{name}" for name in layer}
    expected |= {f"lm_head.{name}.{kind}" for name in ("dense", "norm", "decoder") for kind in ("weight", "bias")}
    assert names == expected


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("window", [0, 16])
def test_memory_is_linear_at_16384_tokens(kind, window):
    """No tensor of the forward pass is larger than a few times N (k + 3 w), where N x N would be 256 times that."""
    from torch.utils._python_dispatch import TorchDispatchMode

    N, k, H = 16384, 16, 2
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            output = func(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(output):
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.untyped_storage().nbytes() // tensor.element_size())
            return output

    sizes = {"hidden_size": 8, "num_attention_heads": H, "intermediate_size": 16, "num_hidden_layers": 1}
    model = build(
        LinformerModel,
        attention="eager",
        max_position_embeddings=N,
        projected_length=k,
        projection_type=kind,
        local_window=window,
        **sizes,
    )
    input_ids, mask = torch.randint(3, 53, (1, N)), torch.ones(1, N)
    mask[0, 1000:1100] = 0
    with torch.no_grad(), Watch():
        output = model(input_ids, attention_mask=mask).last_hidden_state
    assert torch.isfinite(output).all()
    assert N * k * H <= largest <= 3 * H * N * (k + 1 + 3 * window), f"largest tensor: {largest / N:.0f} N"
