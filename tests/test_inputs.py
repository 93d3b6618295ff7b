"""Bad input gets one clear error that says what to do.

python -m pytest tests/test_inputs.py
"""

import pytest
import torch

from hf_linformer import (
    LinformerForMaskedLM,
    LinformerForMultipleChoice,
    LinformerForSequenceClassification,
    LinformerForTokenClassification,
    LinformerModel,
)
from tiny import build


IDS = torch.arange(10).view(2, 5)


@pytest.mark.parametrize(
    ("inputs", "reason"),
    [
        ({"input_ids": torch.zeros(1, 38, dtype=torch.long)}, "38 tokens.*n = 37.*truncation"),
        ({"inputs_embeds": torch.zeros(1, 38, 20)}, "38 tokens.*n = 37"),
        ({}, "either `input_ids` or `inputs_embeds`"),
        ({"input_ids": IDS, "inputs_embeds": torch.zeros(2, 5, 20)}, "either `input_ids` or `inputs_embeds`"),
        ({"input_ids": IDS[0]}, r"`input_ids` must have the shape \(batch, tokens\).*not \(5,\)"),
        ({"input_ids": IDS[:, :0]}, "at least one token"),
        ({"input_ids": IDS, "attention_mask": torch.ones(2, 1, 5, 5)}, r"\(2, 1, 5, 5\).*3-D, 4-D"),
        ({"input_ids": IDS, "attention_mask": torch.ones(2, 5, 5)}, r"\(2, 5, 5\)"),
        ({"input_ids": IDS, "attention_mask": torch.ones(2, 6)}, r"\(2, 5\).*\(2, 6\)"),
        ({"input_ids": IDS, "attention_mask": {"full_attention": None}}, "dict"),
        ({"input_ids": IDS, "position_ids": torch.tensor([[0, 1, 2, 3, 37]])}, "between 0 and 36.*37"),
        ({"input_ids": IDS, "position_ids": torch.tensor([[-1, 1, 2, 3, 4]])}, "between 0 and 36.*-1"),
        ({"input_ids": IDS, "position_ids": torch.arange(5)}, r"\(2, 5\) or \(1, 5\)"),
        ({"input_ids": IDS, "encoder_hidden_states": torch.zeros(2, 5, 20)}, "encoder_hidden_states"),
        ({"input_ids": IDS, "past_key_values": [1]}, "past_key_values"),
        ({"input_ids": IDS, "is_causal": True}, "is_causal"),
        ({"input_ids": IDS, "cu_seq_lens_q": torch.tensor([0, 5])}, "cu_seq_lens_q"),
    ],
)
def test_inputs(inputs, reason):
    with pytest.raises(ValueError, match=f"(?s){reason}"):
        build(LinformerModel)(**inputs)


def test_too_long_a_row_is_refused_before_anything_is_computed():
    model = build(LinformerModel)
    model.embeddings.register_forward_hook(lambda *args: pytest.fail("the embeddings were computed"))
    with pytest.raises(ValueError, match="38"):
        model(torch.zeros(1, 38, dtype=torch.long))


def test_positions_at_pads_may_be_anything():
    model = build(LinformerModel)
    mask = torch.tensor([[1, 1, 1, 0, 0]])
    output = model(IDS[:1], attention_mask=mask, position_ids=torch.tensor([[0, 1, 2, -1, 99]])).last_hidden_state
    expected = model(IDS[:1, :3]).last_hidden_state
    torch.testing.assert_close(output[:, :3], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("labels", [torch.tensor([0, 3]), torch.tensor([-1, 0])])
def test_labels_out_of_range(labels):
    with pytest.raises(ValueError, match="between 0 and 2"):
        build(LinformerForSequenceClassification, num_labels=3)(IDS, labels=labels)
    with pytest.raises(ValueError, match="between 0 and 2"):
        build(LinformerForMultipleChoice)(IDS[:, None].expand(2, 3, 5), labels=labels)
    with pytest.raises(ValueError, match="between 0 and 2"):
        build(LinformerForTokenClassification, num_labels=3)(IDS, labels=labels[:, None].expand(2, 5))


def test_masked_lm_labels_out_of_range():
    with pytest.raises(ValueError, match="between 0 and 52.*999"):
        build(LinformerForMaskedLM)(IDS, labels=torch.where(IDS == 3, 999, -100))


@pytest.mark.parametrize("labels", [torch.zeros(3, dtype=torch.long), torch.zeros(2, 3, dtype=torch.long)])
def test_classes_of_the_wrong_shape(labels):
    with pytest.raises(ValueError, match="one integer a row, 2 in all"):
        build(LinformerForSequenceClassification, num_labels=3)(IDS, labels=labels)


def test_multiple_choice_without_inputs():
    with pytest.raises(ValueError, match=r"\(batch, choices, tokens\)"):
        build(LinformerForMultipleChoice)()


def test_labels_of_the_wrong_shape():
    model = build(LinformerForSequenceClassification, num_labels=3, problem_type="multi_label_classification")
    with pytest.raises(ValueError, match="a label for each of the 3 outputs"):
        model(IDS, labels=torch.zeros(2))
