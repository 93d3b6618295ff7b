"""Losses and training through the real `Trainer`: gradient accumulation, resume, adapters.

python -m pytest tests/test_training.py
"""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.nn import functional
from transformers import Trainer, TrainingArguments

from hf_linformer import (
    LinformerForMaskedLM,
    LinformerForMultipleChoice,
    LinformerForQuestionAnswering,
    LinformerForSequenceClassification,
    LinformerForTokenClassification,
)
from tiny import TYPES, build


# Head, settings, and labels of eight rows; token heads have a different number of labels in every row.
UNEVEN = [[token if token <= row else -100 for token in range(9)] for row in range(8)]
TASKS = {
    "masked_lm": (LinformerForMaskedLM, {}, {"labels": UNEVEN}),
    "sparse_masked_lm": (LinformerForMaskedLM, {"sparse_prediction": True}, {"labels": UNEVEN}),
    "tokens": (LinformerForTokenClassification, {"num_labels": 9}, {"labels": UNEVEN}),
    "one_label": (LinformerForSequenceClassification, {"num_labels": 3}, {"labels": [0, 1, 2, 0, 1, 2, 2, 2]}),
    "regression": (LinformerForSequenceClassification, {"num_labels": 1}, {"labels": [0.5 * i for i in range(8)]}),
    "regression_to_two_targets": (
        LinformerForSequenceClassification,
        {"num_labels": 2, "problem_type": "regression"},
        {"labels": [[0.5 * i, -i / 3] for i in range(8)]},
    ),
    "several_labels": (
        LinformerForSequenceClassification,
        {"num_labels": 3, "problem_type": "multi_label_classification"},
        {"labels": [[float(i % 2), float(i % 3 == 0), float(i > 4)] for i in range(8)]},
    ),
    "question_answering": (
        LinformerForQuestionAnswering,
        {},
        # Outside the row (9 and more, or negative): an answer that was cut off.
        {"start_positions": [0, 1, 2, 3, 9, -1, 12, 7], "end_positions": [1, 1, 4, 9, 20, -1, 7, 8]},
    ),
    "multiple_choice": (LinformerForMultipleChoice, {}, {"labels": [0, 1, 2, 0, 1, 2, 2, 2]}),
}


def examples(task: str) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    shape = (8, 3, 9) if task == "multiple_choice" else (8, 9)
    input_ids = torch.randint(3, 53, shape, generator=generator).tolist()
    return Dataset.from_dict({"input_ids": input_ids, **TASKS[task][2]})


def step_of_sgd(task: str, folder, batch_size: int, accumulation: int) -> torch.Tensor:
    """What one optimizer step over all eight rows changes, as one vector."""
    model_class, changes, _ = TASKS[task]
    model = build(model_class, initializer_range=0.1, **changes)
    before = torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        max_steps=1,
        learning_rate=1.0,
        max_grad_norm=1e9,
        lr_scheduler_type="constant",
        optim="sgd",
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    Trainer(model=model, args=arguments, train_dataset=examples(task)).train()
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach() - before


@pytest.mark.parametrize("task", TASKS)
def test_accumulated_steps_equal_one_step(task, tmp_path):
    one = step_of_sgd(task, tmp_path, batch_size=8, accumulation=1)
    assert one.norm() > 1e-3
    for batch_size, accumulation in ((1, 8), (2, 4)):
        other = step_of_sgd(task, tmp_path, batch_size, accumulation)
        torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("task", TASKS)
def test_losses_are_the_textbook_ones(task):
    model_class, changes, _ = TASKS[task]
    model = build(model_class, **changes)
    batch = examples(task).with_format("torch")[:]
    output = model(**batch)
    labels = batch.get("labels")
    if task in ("masked_lm", "tokens"):
        expected = functional.cross_entropy(output.logits.flatten(0, 1), labels.flatten())
    elif task == "sparse_masked_lm":
        expected = functional.cross_entropy(output.logits, labels[labels != -100])
    elif task in ("one_label", "multiple_choice"):
        expected = functional.cross_entropy(output.logits, labels)
    elif task.startswith("regression"):
        expected = ((output.logits - labels.view(8, -1)) ** 2).mean()
    elif task == "several_labels":
        expected = functional.binary_cross_entropy_with_logits(output.logits, labels)
    else:
        expected = torch.tensor(0.0)
        for name in ("start", "end"):
            log_probabilities = functional.log_softmax(output[f"{name}_logits"], dim=-1)
            for row, position in zip(log_probabilities, batch[f"{name}_positions"].tolist()):
                expected = expected - (row[position] if 0 <= position < 9 else 0.0) / 16
    torch.testing.assert_close(output.loss, expected)


def test_problem_type_is_read_off_the_labels_and_kept_for_pipelines():
    input_ids, targets = torch.randint(3, 53, (2, 5)), torch.tensor([[1.0, 0.0, 1.0]] * 2)
    model = build(LinformerForSequenceClassification, num_labels=3)
    output = model(input_ids, labels=targets)
    torch.testing.assert_close(output.loss, functional.binary_cross_entropy_with_logits(output.logits, targets))
    assert model.config.problem_type == "multi_label_classification"

    model = build(LinformerForSequenceClassification, num_labels=3)
    output = model(input_ids, labels=torch.tensor([2, 0]))
    torch.testing.assert_close(output.loss, functional.cross_entropy(output.logits, torch.tensor([2, 0])))
    assert model.config.problem_type == "single_label_classification"

    model = build(LinformerForSequenceClassification, num_labels=1)
    model(input_ids, labels=torch.tensor([0.5, -1.0]))
    assert model.config.problem_type == "regression"


def test_a_batch_without_any_answer_has_no_loss_and_no_gradient():
    model = build(LinformerForQuestionAnswering)
    outside = torch.tensor([9, -1])
    loss = model(torch.randint(3, 53, (2, 9)), start_positions=outside, end_positions=outside).loss
    loss.backward()
    assert loss == 0 and all((p.grad == 0).all() for p in model.parameters() if p.grad is not None)


def train(folder, steps: int, resume: bool = False) -> dict[str, torch.Tensor]:
    model = build(LinformerForSequenceClassification, num_labels=3, hidden_dropout_prob=0.1)
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        max_steps=steps,
        save_steps=3,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        use_cpu=True,
        disable_tqdm=True,
        seed=7,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=examples("one_label"))
    trainer.train(resume_from_checkpoint=resume)
    return model.state_dict()


def test_trainer_resumes_where_it_stopped(tmp_path):
    whole = train(tmp_path / "whole", steps=6)
    train(tmp_path / "halves", steps=3)
    resumed = train(tmp_path / "halves", steps=6, resume=True)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("sharing", ["none", "layerwise"])
def test_lora_adapters_learn_and_reach_the_keys(kind, sharing):
    model = build(LinformerForSequenceClassification, num_labels=3, projection_type=kind, projection_sharing=sharing)
    input_ids, labels = torch.randint(3, 53, (2, 17)), torch.tensor([0, 2])
    before = model(input_ids).logits
    adapted = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "key", "value"]))
    torch.testing.assert_close(adapted(input_ids).logits, before)
    adapted(input_ids, labels=labels).loss.backward()
    # B starts at zero, so at first only its gradient is not.
    gradients = {name: p.grad.abs().max() for name, p in adapted.named_parameters() if "lora_B" in name}
    assert len(gradients) == 6 and all(gradient > 0 for gradient in gradients.values()), gradients
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    adapted.eval()
    merged_logits = adapted.merge_and_unload()(input_ids).logits
    assert not torch.allclose(merged_logits, before, atol=1e-2)
