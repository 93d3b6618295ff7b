"""A page to try a saved classifier on: the class of a long text, what it costs, and where attention looks.

    make demo                                                             # trains a model in demo/
    python3 -m venv .cache/demo && .cache/demo/bin/pip install --editable '.[demo]'
    .cache/demo/bin/python scripts/demo_app.py --model_name_or_path demo  # then open the address that it prints

gradio, which draws the page, wants an older pillow than constraints.txt has, hence an environment of its own. The page
is served to this machine alone, and nothing is sent anywhere.

Time and memory stand beside those of the softmax twin: the same weights with a slot for every token, which is full
attention, fused. Time is that of the fastest of seven passes. Memory is how far a pass raises what the process holds
(Linux), as in scripts/benchmark.py.

The colours show how much of the attention each token receives, as a mean over all tokens that look. What a slot
receives is divided over the tokens that it stands for: evenly where it is their mean or maximum, and by the size of
their weights in a learned E.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional
from transformers import BatchEncoding, PreTrainedTokenizerBase
from transformers.utils import logging

from benchmark_worker import peak_memory, seconds_of
from common import UserError, one_line, parse_arguments, run_main
from conversion import exact_length
from hf_linformer import LinformerForSequenceClassification
from hf_linformer.modeling_linformer import LinformerSelfAttention, layout_tokens, segment_means
from predict import Classifier, load_classifier


@dataclass
class Arguments:
    """Which model, and where the page is."""

    model_name_or_path: str = field(
        default="demo", metadata={"help": "A Linformer that scripts/finetune.py saved, or one of the Hub."}
    )
    server_name: str = field(
        default="127.0.0.1", metadata={"help": "The address to serve at. 0.0.0.0 lets the whole network in."}
    )
    server_port: int | None = field(
        default=None, metadata={"help": "Its port. Default: the first that is free from 7860 on."}
    )


TIMED_PASSES = 7
MEAN = -1


class Reading(NamedTuple):
    """A text as the model saw it."""

    pieces: list[str]  # what stands in the text for each token, N
    is_special: list[bool]
    received: Tensor  # (layers, H, N), the attention that each token receives; each row adds up to 1
    kinds: Tensor  # (layers, H, 3), what of it the slots, the first token and the window got


# The model


def same_weights(
    model: LinformerForSequenceClassification, attention: str, **changes: Any
) -> LinformerForSequenceClassification:
    """A model on the same weights, not copied, with another attention or configuration."""
    config = type(model.config)(**model.config.to_dict() | changes)
    other = type(model)._from_config(config, attn_implementation=attention)
    missing, _ = other.load_state_dict(model.state_dict(), strict=False, assign=True)
    assert not missing, f"{missing} are not among the weights"
    return other.eval()


def softmax_twin(model: LinformerForSequenceClassification) -> LinformerForSequenceClassification:
    """The same weights with a slot for every token. A learned E, and linear layers for means, have no part in it.

    A window then changes nothing, and costs; but it is where a position bias acts.
    """
    return same_weights(
        model,
        "sdpa",
        projection_type="mean_pool",
        projected_length=model.config.max_position_embeddings,
        local_window=model.config.local_window if model.config.local_position_bias else 0,
        slot_projections=False,
        exact_short_sequences=False,
    )


def encode(text: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> tuple[BatchEncoding, int]:
    """The first max_length tokens of a text, with what is needed to find them in it, and how many it has in all."""
    length = len(tokenizer(text, verbose=False)["input_ids"])
    details = {"return_offsets_mapping": True, "return_special_tokens_mask": True}
    return tokenizer(text, truncation=True, max_length=max_length, return_tensors="pt", **details), length


def pieces_of(text: str, encoded: BatchEncoding) -> tuple[list[str], list[bool]]:
    """What stands in the text for each token, nothing left out between them, and whether a token is a special one.

    Tokens that share a character leave nothing to all but the first of them.
    """
    offsets, is_special = (encoded[name][0].tolist() for name in ("offset_mapping", "special_tokens_mask"))
    end = next((start for (start, _), special in zip(offsets, is_special) if not special), 0)
    pieces = []
    for token, (_, stop), special in zip(encoded.tokens(), offsets, is_special):
        pieces.append(token if special else text[end:stop])
        end = end if special else max(end, stop)
    return pieces, [bool(special) for special in is_special]


def answer_of(logits: Tensor, classifier: Classifier) -> dict[str, float] | str:
    """The probability of each class, or the number that a regression predicts."""
    if classifier.problem_type == "regression":
        return ", ".join(f"{value:.3f}" for value in logits.tolist())
    several = classifier.problem_type == "multi_label_classification"
    probabilities = logits.sigmoid() if several else logits.softmax(-1)
    return dict(zip(classifier.names, probabilities.tolist()))


# Where attention looks


def slot_shares(model: LinformerForSequenceClassification, layer_idx: int, N: int) -> Tensor:
    """How what a slot receives is divided over the tokens of a text: (1 | H, k, N), rows add up to 1 or are empty."""
    attention = cast(LinformerSelfAttention, model.linformer.layers[layer_idx].attention)
    projection = attention.projection or model.linformer.projection
    E, F = (None, None) if projection is None else projection()
    states = torch.zeros(1, N, 1, device=model.device)
    slots = attention.build_slots(E, F, layout_tokens(None, None, N, model.device), states)
    if slots.E is None:
        assert slots.start is not None and slots.end is not None
        return segment_means(slots.start, slots.end, N, states.dtype)[0]
    weights = slots.E[0].abs()
    return weights / weights.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)


def received_attention(probabilities: Tensor, shares: Tensor, w: int) -> tuple[Tensor, Tensor]:
    """What each token receives of the attention of all, and what slots, first token and window do.

    probabilities (H, N, k), or (H, N, k + 1 + 3 w) with a window; shares (1 | H, slots in use, N)
    -> (H, N) and (H, 3), whose rows add up to 1
    """
    H, N, keys = probabilities.shape
    k = keys - (1 + 3 * w if w else 0)
    of_slots, of_first, of_window = probabilities.split([k, min(w, 1), 3 * w], dim=-1)
    received = torch.matmul(of_slots.mean(dim=1)[:, None, : shares.shape[1]], shares)[:, 0]
    kinds = torch.stack([part.sum(dim=-1).mean(dim=-1) for part in (of_slots, of_first, of_window)], dim=-1)
    if w:
        received[:, :1] += of_first.mean(dim=1)
        M = -(-N // w)
        blocks = functional.pad(of_window, (0, 0, 0, M * w - N)).reshape(H, M, w, 3 * w).sum(dim=2) / N
        # The queries of block m see the ranks from (m - 1) w to (m + 2) w - 1; the table begins w ranks early.
        place = (torch.arange(M)[:, None] * w + torch.arange(3 * w)).flatten().to(blocks.device)
        table = received.new_zeros(H, (M + 2) * w).index_add_(1, place, blocks.flatten(1))
        received += table[:, w : w + N]
    return received, kinds


@torch.inference_mode()
def look(model: LinformerForSequenceClassification, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """`received_attention` of every layer of a model with eager attention: (layers, H, N) and (layers, H, 3)"""
    N = inputs["input_ids"].shape[1]
    attentions = model(**inputs, output_attentions=True).attentions
    layers = [
        received_attention(probabilities[0], slot_shares(model, layer_idx, N), model.config.local_window)
        for layer_idx, probabilities in enumerate(attentions)
    ]
    received, kinds = zip(*layers)
    return torch.stack(received).cpu(), torch.stack(kinds).cpu()


def chosen(values: Tensor, layer: int, head: int) -> Tensor:
    """One layer and head of (layers, H, ...), or the mean over those that are `MEAN`."""
    values = values.mean(dim=0) if layer == MEAN else values[layer]
    return values.mean(dim=0) if head == MEAN else values[head]


# What the page says


class Demo:
    """The model in its three forms, and what the page says of a text."""

    def __init__(self, classifier: Classifier, model: LinformerForSequenceClassification):
        self.classifier = classifier
        self.config = model.config
        self.model = model
        self.twin = softmax_twin(model)
        self.eager = same_weights(model, "eager")

    def title(self) -> str:
        config = self.config
        slots = sorted({k for layer in range(config.num_hidden_layers) for k in config.slots_per_head(layer)})
        k = f"{slots[0]}" if len(slots) == 1 else f"{slots[0]} to {slots[-1]}"
        window = f", and exactly to a window of 3 x {config.local_window}" if config.local_window else ""
        return (
            f"# Linformer on your text\n{config.name_or_path}: {self.model.num_parameters() / 1e6:.1f} M "
            f"parameters, layers: {config.num_hidden_layers}. It reads up to {self.classifier.max_length:,} tokens; "
            f"each attends to {k} slots, `{config.projection_type}` of all tokens{window}."
        )

    def note(self, length: int) -> str:
        limit = self.classifier.max_length
        if length > limit:
            return (
                f"**The text has {length:,} tokens, of which the model reads {limit:,}: "
                f"{1 - limit / length:.0%} of it is cut.**"
            )
        if length <= exact_length(self.config):
            return f"The text has {length:,} tokens, few enough to be attended to exactly: slots mix no tokens here."
        return f"The text has {length:,} tokens, all of which are read."

    @torch.inference_mode()
    def compare(self, inputs: dict[str, Tensor]) -> tuple[dict[str, float] | str, str]:
        """The answer, and a table of what it and that of the softmax twin cost."""
        device = self.model.device.type
        steps = {"this Linformer": partial(self.model, **inputs), "its softmax twin": partial(self.twin, **inputs)}
        answers = [answer_of(step().logits[0].float(), self.classifier) for step in steps.values()]
        sizes = [peak_memory(step, device)[0] for step in steps.values()]
        # By turns, and the fastest counts: what else the machine does disturbs single passes.
        turns = [[seconds_of(step, device) for step in steps.values()] for _ in range(TIMED_PASSES)]
        lines = ["| | time | memory | answer |", "| --- | --- | --- | --- |"]
        for name, answer, size, seconds in zip(steps, answers, sizes, map(min, zip(*turns))):
            memory = f"{size / 2**20:.1f} MiB" if size is not None else "not measured: that takes Linux"
            said = answer if isinstance(answer, str) else "{} {:.3f}".format(*max(answer.items(), key=itemgetter(1)))
            lines.append(f"| {name} | {1000 * seconds:.1f} ms | {memory} | {said} |")
        return answers[0], "\n".join(lines)

    def read(self, text: str) -> tuple[str, dict[str, float] | str | None, str, Reading | None]:
        """A note, the answer, the table, and what is needed to colour the text."""
        if not text.strip():
            return "**There is no text: type or paste one.**", None, "", None
        encoded, length = encode(text, self.classifier.tokenizer, self.classifier.max_length)
        pieces, is_special = pieces_of(text, encoded)
        names = self.classifier.tokenizer.model_input_names
        inputs = {name: encoded[name].to(self.model.device) for name in names if name in encoded}
        answer, table = self.compare(inputs)
        return self.note(length), answer, table, Reading(pieces, is_special, *look(self.eager, inputs))

    def colour(self, reading: Reading | None, layer: int, head: int) -> tuple[list[tuple[str, float]], str]:
        """The text in pieces, each with its attention on a scale from 0 to 1, and what that scale is."""
        if reading is None:
            return [], ""
        received = chosen(reading.received, layer, head)
        # Special tokens may take most of the attention; the scale is that of the words.
        is_special = torch.tensor(reading.is_special)
        least, most = received[~is_special].aminmax() if not is_special.all() else received.aminmax()
        strength = ((received - least) / (most - least).clamp(min=1e-9)).clamp(0, 1)
        equal = 1 / len(received)
        scale = f"From white, {least / equal:.2f} times an equal share, to {most / equal:.2f} times. "
        slots, first, window = chosen(reading.kinds, layer, head).tolist()
        kinds = f"{slots:.0%} goes to slots, {first:.0%} to the first token, {window:.0%} to the window."
        return list(zip(reading.pieces, strength.tolist())), scale + (kinds if self.config.local_window else "")


def load_demo(name: str) -> Demo:
    """The demo of a saved Linformer. Raises `UserError` for anything else, and says how to come by one."""
    try:
        classifier = load_classifier(name, "float32", None, trust_remote_code=False)
    except UserError as error:
        raise UserError(
            f"{error}; `make demo` trains one in demo/, and scripts/finetune.py one on texts of yours"
        ) from error
    classifier.check_pairs(False, cure="the page reads one text; scripts/predict.py answers pairs")
    if classifier.model.config.model_type != "linformer":
        raise UserError(
            f"{name} is a {classifier.model.config.model_type} model, which has no slots to show; "
            "scripts/convert.py makes a Linformer of BERT and its kin"
        )
    return Demo(classifier, cast(LinformerForSequenceClassification, classifier.model))


# The page


def import_gradio() -> Any:
    # Read as gradio is imported: it would tell its makers of every start.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio
    except ImportError as error:
        raise UserError(
            f"{one_line(error)}: the page is drawn by gradio, which needs an environment of its own beside the pinned "
            "one: python3 -m venv .cache/demo && .cache/demo/bin/pip install --editable '.[demo]'"
        ) from error
    return gradio


def build_page(gradio: Any, demo: Demo) -> Any:
    config = demo.config
    with gradio.Blocks(title="Linformer", analytics_enabled=False) as page:
        reading = gradio.State()
        gradio.Markdown(demo.title())
        with gradio.Row():
            with gradio.Column(scale=3):
                text = gradio.Textbox(label="Text", lines=9, max_lines=9, elem_id="text")
                button = gradio.Button("Classify", variant="primary", elem_id="classify")
            with gradio.Column(scale=2):
                answer = gradio.Label(label="Class", num_top_classes=5, elem_id="answer")
        note = gradio.Markdown(elem_id="note")
        table = gradio.Markdown(elem_id="table")
        with gradio.Row():
            layers = [("mean of all layers", MEAN), *((f"layer {i + 1}", i) for i in range(config.num_hidden_layers))]
            heads = [("mean of all heads", MEAN), *((f"head {i + 1}", i) for i in range(config.num_attention_heads))]
            layer = gradio.Dropdown(layers, value=MEAN, label="Layer", elem_id="layer")
            head = gradio.Dropdown(heads, value=MEAN, label="Head", elem_id="head")
        colours = gradio.HighlightedText(
            label="Where attention looks: the darker a token, the more of it falls there",
            show_inline_category=False,
            elem_id="attention",
        )
        kinds = gradio.Markdown(elem_id="kinds")
        colouring = {"fn": demo.colour, "inputs": [reading, layer, head], "outputs": [colours, kinds]}
        for trigger in (button.click, text.submit):
            # One at a time: what another pass does would be measured too.
            alone = {"concurrency_id": "read", "concurrency_limit": 1}
            trigger(demo.read, text, [note, answer, table, reading], **alone).then(**colouring)
        for choice in (layer, head):
            choice.change(**colouring)
    return page


def main(argv: Sequence[str] | None = None) -> None:
    (arguments,) = parse_arguments((Arguments,), argv, description=__doc__)
    if arguments.server_port is not None and not 0 < arguments.server_port < 65536:
        raise UserError(f"--server_port must lie between 1 and 65535, not {arguments.server_port}")
    gradio = import_gradio()
    logging.disable_progress_bar()
    page = build_page(gradio, load_demo(arguments.model_name_or_path))
    try:
        page.launch(
            server_name=arguments.server_name,
            server_port=arguments.server_port,
            share=False,
            ssr_mode=False,
            run_history=False,
            footer_links=[],
        )
    except OSError as error:
        raise UserError(
            f"cannot serve at {arguments.server_name}, port {arguments.server_port}: {one_line(error)}; "
            "choose another with --server_name and --server_port"
        ) from error


if __name__ == "__main__":
    run_main(main)
