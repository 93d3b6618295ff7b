"""What a teacher makes of a text, and how far a student is from it.

The hidden states of a source model, also for texts longer than it can read: scripts/convert.py compares with them, and
scripts/distill.py learns them. The answers of a fine-tuned classifier: scripts/finetune.py learns them beside labels.
"""

from typing import Any, NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import SequenceClassifierOutput

import hf_linformer  # noqa: F401  (registers Linformer with the Auto classes)
from common import UserError, longest_input, one_line


def encoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """The encoder of a model with or without a head."""
    return getattr(model, model.base_model_prefix, model)


def window_starts(length: int, size: int) -> list[int]:
    """Where windows of `size` tokens begin that overlap by half and cover `length` tokens, the last at the end."""
    if length <= size:
        return [0]
    return [*range(0, length - size, max(size // 2, 1)), length - size]


def states_of(encoder: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Embeddings and every layer's output, of rows that the encoder can read: (B, N) -> (B, layers + 1, N, D)"""
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    output = encoder(input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True)
    return torch.stack(output.hidden_states, dim=1)


def states_of_windows(encoder: PreTrainedModel, row: Tensor, n: int) -> Tensor:
    """States of one row of any length from windows of n tokens: (N,) -> (layers + 1, N, D)

    Each window is read between the row's first and last token, which are special ones. Windows overlap by half, and a
    token's states are those of the window that it stands nearest to the middle of.
    """
    N = len(row)
    if N <= n:
        return states_of(encoder, row[None])[0]
    inner, size = row[1:-1], n - 2
    starts = torch.tensor(window_starts(len(inner), size), device=row.device)
    windows = inner[starts[:, None] + torch.arange(size, device=row.device)]  # (W, n - 2)
    special = row[[0, -1]].expand(len(starts), 2)
    windows = torch.cat([special[:, :1], windows, special[:, 1:]], dim=1)
    states = torch.cat([states_of(encoder, window[None]) for window in windows])  # (W, layers + 1, n, D)

    token = torch.arange(len(inner), device=row.device)
    middle = starts + (size - 1) / 2
    nearest = (token[:, None] - middle).abs().argmin(dim=1)
    inner_states = states[nearest, :, token - starts[nearest] + 1]  # (N - 2, layers + 1, D)
    return torch.cat([states[:1, :, 0], inner_states, states[-1:, :, -1]]).transpose(0, 1)


def relative_errors(ours: Tensor, theirs: Tensor, mask: Tensor) -> Tensor:
    """Squared, of each layer, over the real tokens of a row; the mean over rows, so that a batch may be divided.

    (B, layers, N, D), (B, N) -> (layers,)
    """
    real = mask[:, None, :, None].float()
    difference = ((ours.float() - theirs.float()).square() * real).sum(dim=(2, 3))  # (B, layers)
    return (difference / (theirs.float().square() * real).sum(dim=(2, 3))).mean(dim=0)


def divergence(logits: Tensor, expected: Tensor, problem_type: str | None) -> Tensor:
    """Of outputs (rows, classes): Kullback-Leibler from the expected, or the square error where there is no class."""
    if problem_type == "regression" or logits.shape[-1] == 1:
        return nn.functional.mse_loss(logits, expected)
    if problem_type == "multi_label_classification":
        return nn.functional.binary_cross_entropy_with_logits(logits, expected.sigmoid())
    return nn.functional.kl_div(
        logits.log_softmax(dim=-1), expected.log_softmax(dim=-1), reduction="batchmean", log_target=True
    )


class ClassifierTeacher(NamedTuple):
    """A fine-tuned classifier that is imitated.

    label_order: its class for each class of the student, whose problem_type says what the classes are
    """

    model: PreTrainedModel
    label_order: list[int]
    problem_type: str
    logits_weight: float
    hidden_states_weight: float

    def disagreement(self, output: SequenceClassifierOutput, inputs: dict[str, Tensor]) -> Tensor:
        """The weighted distance of a student's output from what the teacher makes of the same inputs.

        It has `hidden_states` if they have a weight.
        """
        with torch.no_grad():
            expected = self.model(**inputs, output_hidden_states=self.hidden_states_weight > 0)
        assert output.logits is not None
        logits, targets = output.logits.float(), expected.logits.float()[:, self.label_order]
        distance = self.logits_weight * divergence(logits, targets, self.problem_type)
        if self.hidden_states_weight:
            assert output.hidden_states is not None
            both = (output.hidden_states, expected.hidden_states)
            ours, theirs = (torch.stack(states[1:], dim=1) for states in both)
            errors = relative_errors(ours, theirs, inputs["attention_mask"])
            distance = distance + self.hidden_states_weight * errors.mean()
        return distance


def load_classifier_teacher(
    name: str,
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    logits_weight: float,
    hidden_states_weight: float,
    trust_remote_code: bool,
) -> ClassifierTeacher:
    """A trained classifier of the student's labels and tokens. Raises `UserError` where the two do not fit.

    tokenizer: the student's. max_length: the longest row there will be, with its pads.
    """
    for option, weight in {"logits_weight": logits_weight, "hidden_states_weight": hidden_states_weight}.items():
        if weight < 0:
            raise UserError(f"--{option} must not be negative, and is {weight}")
    if not logits_weight and not hidden_states_weight:
        raise UserError("--logits_weight and --hidden_states_weight are 0: nothing is learned from the teacher")
    trust: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    options = trust | {"use_safetensors": True, "output_loading_info": True}
    try:
        model, report = AutoModelForSequenceClassification.from_pretrained(name, dtype=torch.float32, **options)
        its_tokenizer = AutoTokenizer.from_pretrained(name, **trust)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError, StrictDataclassError) as error:
        raise UserError(f"cannot load the teacher {name}: {one_line(error)}") from error
    if lost := sorted(report["missing_keys"]):
        raise UserError(
            f"the teacher {name} is no trained classifier: {len(lost)} weights are missing, such as {lost[0]}; "
            "scripts/finetune.py trains one"
        )
    # Their dictionaries of labels are typed as if they could be absent.
    ours: Any = student.config
    theirs: Any = model.config
    if set(ours.label2id) != set(theirs.label2id) or ours.problem_type != (theirs.problem_type or ours.problem_type):
        raise UserError(
            f"the teacher {name} knows the labels {sorted(theirs.label2id)} ({theirs.problem_type}), and the data "
            f"have {sorted(ours.label2id)} ({ours.problem_type}); give one that was trained for the same"
        )
    read, its_read = ((one.get_vocab(), one.model_input_names) for one in (tokenizer, its_tokenizer))
    if read != its_read or len(tokenizer) > theirs.vocab_size:
        raise UserError(f"the teacher {name} has another tokenizer than the model: they must read the same tokens")
    if (limit := longest_input(model)) is not None and limit < max_length:
        limits = f"{limit} tokens and the model {max_length}; give --max_length {limit}"
        raise UserError(f"the teacher {name} reads {limits}")
    sizes = ("num_hidden_layers", "hidden_size")
    if hidden_states_weight and any(getattr(ours, size) != getattr(theirs, size) for size in sizes):
        layers = f"{theirs.num_hidden_layers} of {theirs.hidden_size} numbers"
        raise UserError(
            f"--hidden_states_weight compares layer by layer, and the teacher {name} has {layers}, the model "
            f"{ours.num_hidden_layers} of {ours.hidden_size}; leave it at 0"
        )
    order = [theirs.label2id[ours.id2label[index]] for index in range(ours.num_labels)]
    weights = (logits_weight, hidden_states_weight)
    return ClassifierTeacher(model.eval().requires_grad_(False), order, ours.problem_type, *weights)
