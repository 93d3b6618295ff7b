"""How near a converted model is to its source, by the length of the text: numbers, and a picture of them.

Shared by scripts/convert.py and scripts/distill.py.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_linformer import LinformerConfig, LinformerModel
from hf_linformer.modeling_linformer import LinformerLayer, layout_tokens
from teacher import encoder_of, states_of, states_of_windows


def keys_a_query(encoder: LinformerModel, length: int) -> float:
    """How many keys a query of a text of `length` tokens has in its softmax, on average over tokens and layers."""
    counts = []
    for layer in encoder.layers:
        assert isinstance(layer, LinformerLayer)
        attention = layer.attention
        layout = layout_tokens(None, None, length, encoder.device)
        projection = encoder.projection if attention.projection is None else attention.projection
        E, F = (None, None) if projection is None else projection()
        states = torch.zeros(1, length, encoder.config.hidden_size, device=encoder.device)
        slots = attention.build_slots(E, F, layout, states)
        if not encoder.config.local_window:
            counts.append(slots.fed.sum(dim=-1).float().mean())
            continue
        w = encoder.config.local_window
        biases = attention.neighbourhood_bias(slots, layout, length, torch.float32)
        of_slots, of_tokens = (bias.isfinite().sum(dim=-1).float().mean(dim=(0, 1)).flatten() for bias in biases)
        visible = of_slots + of_tokens
        queries = (length - w * torch.arange(len(visible))).clamp(max=w)
        counts.append((visible * queries).sum() / length)
    return float(torch.stack(counts).mean())


def length_buckets(source_n: int, n: int) -> list[int]:
    """Ends of the buckets: up to what the source can read, and twice that where the new model can."""
    buckets = [max(source_n // part, 4) for part in (16, 8, 4, 2, 1)]
    return sorted({*buckets, *([2 * source_n] if n >= 2 * source_n else [])})


def draw_rows(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, buckets: Sequence[int], count: int
) -> dict[int, list[Tensor]]:
    """Token ids for each bucket, up to `count` rows: texts longer than the one before, cut to its end."""
    rows: dict[int, list[Tensor]] = {bucket: [] for bucket in buckets}
    for text in texts:
        # So many characters have more tokens than the longest bucket.
        input_ids = tokenizer(text[: 20 * buckets[-1]], truncation=True, max_length=buckets[-1])["input_ids"]
        for shorter, bucket in zip([0, *buckets], buckets):
            if shorter < len(input_ids) and len(rows[bucket]) < count:
                # The last token is a special one, wherever a text is cut.
                cut = input_ids if len(input_ids) <= bucket else [*input_ids[: bucket - 1], input_ids[-1]]
                rows[bucket].append(torch.tensor(cut))
    return {bucket: kept for bucket, kept in rows.items() if kept}


def compare_states(ours: Tensor, theirs: Tensor) -> dict[str, Any]:
    """Of one text, (layers + 1, N, D) each: error of every layer, cosines of tokens and of their mean."""
    last, expected = ours[-1], theirs[-1]
    errors = (ours - theirs).flatten(1).norm(dim=1) / theirs.flatten(1).norm(dim=1)
    return {
        "layer_errors": errors[1:],
        "token_cosine": nn.functional.cosine_similarity(last, expected, dim=-1).mean(),
        "embedding_cosine": nn.functional.cosine_similarity(last.mean(dim=0), expected.mean(dim=0), dim=0),
    }


@torch.no_grad()
def measure_fidelity(
    source: PreTrainedModel, model: PreTrainedModel, rows: dict[int, list[Tensor]], source_n: int
) -> list[dict[str, Any]]:
    """One row of results for each bucket. Where the source cannot read a text whole, its windows are the target."""
    teacher, student = encoder_of(source).eval(), encoder_of(model).eval()
    assert isinstance(student, LinformerModel)
    results = []
    with tqdm(total=sum(map(len, rows.values())), desc="comparing texts") as progress:
        for bucket, texts in rows.items():
            compared = []
            for row in texts:
                row = row.to(student.device)
                ours = states_of(student, row[None])[0].float()
                compared.append(compare_states(ours, states_of_windows(teacher, row, source_n).float()))
                progress.update()
            means = {name: torch.stack([text[name] for text in compared]).mean(dim=0) for name in compared[0]}
            results.append(
                {
                    "length": bucket,
                    "texts": len(texts),
                    "target": "whole" if bucket <= source_n else "windows",
                    "keys_a_query": keys_a_query(student, round(sum(map(len, texts)) / len(texts))),
                    "token_cosine": float(means["token_cosine"]),
                    "embedding_cosine": float(means["embedding_cosine"]),
                    "layer_errors": [float(error) for error in means["layer_errors"]],
                }
            )
    return results


def describe(config: LinformerConfig) -> dict[str, Any]:
    """What rows of results say of a converted model."""
    names = ("projection_type", "projected_length", "local_window", "slot_projections", "max_position_embeddings")
    return {name: getattr(config, name) for name in names}


def result_rows(results: Iterable[dict[str, Any]], described: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows for a CSV, with what is the same for all; the errors of the layers stand in one column."""
    rows = []
    for result in results:
        errors = " ".join(f"{error:.4g}" for error in result["layer_errors"])
        rows.append(described | result | {"layer_errors": errors})
    return rows


def printable(results: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows for `format_table`: a column for the error of each layer."""
    rows = []
    for result in results:
        row = {name: value for name, value in result.items() if name != "layer_errors"}
        row["keys_a_query"] = round(row["keys_a_query"])
        rows.append(row | {f"error {layer}": error for layer, error in enumerate(result["layer_errors"], start=1)})
    return rows


def plot_fidelity(results: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Left the error of every layer, a line for each length; right the cosines against the length."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    colours = pyplot.colormaps["viridis"](torch.linspace(0, 0.9, len(results)).tolist())
    for result, colour in zip(results, colours):
        errors = result["layer_errors"]
        label = f"{result['length']:,} tokens" + (", source in windows" if result["target"] == "windows" else "")
        left.plot(range(1, len(errors) + 1), errors, marker="o", markersize=3, color=colour, label=label)
    left.set(xlabel="layer", ylabel="relative error of the hidden states", ylim=(0, None))
    left.legend(frameon=False, fontsize=8)
    lengths = [result["length"] for result in results]
    for name, label in (("token_cosine", "tokens"), ("embedding_cosine", "mean of tokens")):
        right.plot(lengths, [result[name] for result in results], marker="o", markersize=3, label=label)
    right.set(xlabel="tokens", ylabel="cosine to the source, last layer", xscale="log", xticks=lengths)
    right.set_xticks(lengths, [f"{length:,}" for length in lengths])
    right.minorticks_off()
    right.legend(frameon=False)
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
