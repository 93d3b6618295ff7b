"""Transformers' own common tests, unmodified, over every kind of Linformer: `pytest tests/test_transformers_suite.py`.

`transformers_suite.py` fetches the suite of the installed version. Without a network and without a cached copy this
file is skipped; in CI (`CI` is set) that is a failure, unless `LINFORMER_OFFLINE=1` says that there is no network on
purpose.

The suite wants a tester, which makes tiny configurations and inputs (`LinformerModelTester`), and a test case that
mixes its tests in (`LinformerSuite`). `VARIANTS` lists the configurations: one test case is made of each.
"""

import os
import unittest
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import set_seed
from transformers.models.auto import modeling_auto

import transformers_suite
from hf_linformer import (
    LinformerConfig,
    LinformerForMaskedLM,
    LinformerForMultipleChoice,
    LinformerForQuestionAnswering,
    LinformerForSequenceClassification,
    LinformerForTokenClassification,
    LinformerModel,
)


try:
    with warnings.catch_warnings():
        # The suite marks its tests with markers that only Transformers' own pytest configuration knows.
        warnings.simplefilter("ignore", pytest.PytestUnknownMarkWarning)
        modeling = transformers_suite.import_suite_module("test_modeling_common")
        configuration = transformers_suite.import_suite_module("test_configuration_common")
        training = transformers_suite.import_suite_module("test_training_mixin")
except transformers_suite.SuiteUnavailable as error:
    if os.environ.get("CI") and os.environ.get("LINFORMER_OFFLINE") != "1":
        raise pytest.fail.Exception(str(error), pytrace=False) from None
    pytest.skip(str(error), allow_module_level=True)


# Name of the test case -> what it changes in the default configuration (`linear`, `layerwise`).
VARIANTS: dict[str, dict[str, Any]] = {
    "Linear": {},
    "LinearPerHead": {"projection_sharing": "none"},
    "LinearHeadwise": {"projection_sharing": "headwise"},
    "LinearKeyValue": {"projection_sharing": "key_value"},
    "LinearLengthPerLayer": {"projected_length": [8, 4]},
    "LinearLengthPerHead": {"projected_length": [[8, 4, 6, 8], [8, 8, 8, 8]], "projection_sharing": "none"},
    "LinearExactShort": {"exact_short_sequences": True},
    "LinearWindow": {"local_window": 4},
    "Random": {"projection_type": "random"},
    "Convolution": {"projection_type": "convolution"},
    "ConvolutionPerHead": {"projection_type": "convolution", "projection_sharing": "none"},
    "MeanPool": {"projection_type": "mean_pool"},
    "MeanPoolWindow": {"projection_type": "mean_pool", "local_window": 4, "local_position_bias": True},
    "MaxPool": {"projection_type": "max_pool"},
}


class LinformerModelTester:
    """Tiny configurations and inputs, and the sizes that the suite compares shapes with."""

    batch_size = 4
    # Three times the projected length and six local windows: neither is ever the whole row.
    seq_length = 24
    vocab_size = 64
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 4
    num_choices = 2
    is_training = True

    def __init__(self, **variant: Any) -> None:
        self.config_kwargs = {
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "intermediate_size": 48,
            # The length of the rows that the suite's training test makes.
            "max_position_embeddings": 64,
            "projected_length": 8,
            **variant,
        }
        # A query attends to the slots and, with a window, to the first token and three blocks.
        config = self.get_config()
        k, w = max(config.slots_per_head(layer_idx=0)), config.local_window
        self.key_length = k + 1 + 3 * w if w else k

    def get_config(self) -> LinformerConfig:
        return LinformerConfig(**self.config_kwargs)

    def prepare_config_and_inputs_for_common(self) -> tuple[LinformerConfig, dict[str, torch.Tensor]]:
        shape = (self.batch_size, self.seq_length)
        # Holes everywhere, and one row that is shorter than the projected length.
        attention_mask = modeling.random_attention_mask(shape)
        attention_mask[1, 6:] = 0
        inputs = {
            "input_ids": modeling.ids_tensor(shape, self.vocab_size),
            "token_type_ids": modeling.ids_tensor(shape, 2),
            "attention_mask": attention_mask,
        }
        return self.get_config(), inputs


# Names of their own, because a type checker cannot look into modules that are made at run time.
ModelTesterMixin: Any = modeling.ModelTesterMixin
TrainingTesterMixin: Any = training.TrainingTesterMixin


class LinformerSuite(ModelTesterMixin, TrainingTesterMixin):
    """The suite over one variant. A test case of its own is made of it below, for each variant."""

    variant: dict[str, Any]
    model_tester: LinformerModelTester
    all_model_classes = (
        LinformerModel,
        LinformerForMaskedLM,
        LinformerForSequenceClassification,
        LinformerForTokenClassification,
        LinformerForQuestionAnswering,
        LinformerForMultipleChoice,
    )
    # By default the suite exempts files without a copyright year from its check of `_init_weights`.
    test_can_init_all_missing_weights_before_2023 = True

    def setUp(self) -> None:
        set_seed(0)
        modeling.global_rng.seed(0)
        self.model_tester = LinformerModelTester(**self.variant)

    def test_config(self) -> None:
        tester = configuration.ConfigTester(self, LinformerConfig, **self.model_tester.config_kwargs)
        tester.run_common_tests()

    def test_init_weights_can_init_buffers(self) -> None:
        if self.variant.get("projection_type") == "random":
            self.skipTest("Two draws of a random E differ; test_can_init_all_missing_weights compares seeded ones.")
        super().test_init_weights_can_init_buffers()

    def test_retain_grad_hidden_states_attentions(self) -> None:
        # With a window the probabilities are put together from blocks for the caller: no gradient passes the copy.
        self.has_attentions = not self.variant.get("local_window")
        super().test_retain_grad_hidden_states_attentions()

    def _get_trainable_model_class(self) -> type[LinformerForMaskedLM]:
        """The overfitting test labels every token."""
        return LinformerForMaskedLM


for name, variant in VARIANTS.items():
    test_case = f"Test{name}"
    body = {"variant": variant, "__module__": __name__}
    globals()[test_case] = type(test_case, (LinformerSuite, unittest.TestCase), body)


@pytest.fixture(scope="module", autouse=True)
def classes_known_by_task() -> Iterator[None]:
    """The suite finds out which labels a head takes by looking its class up by name, in the library's own tables."""
    classes = {
        "MODEL_MAPPING_NAMES": LinformerModel,
        "MODEL_FOR_MASKED_LM_MAPPING_NAMES": LinformerForMaskedLM,
        "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": LinformerForSequenceClassification,
        "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES": LinformerForTokenClassification,
        "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES": LinformerForQuestionAnswering,
        "MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES": LinformerForMultipleChoice,
    }
    with pytest.MonkeyPatch.context() as patch:
        for table, model_class in classes.items():
            patch.setitem(getattr(modeling_auto, table), LinformerConfig.model_type, model_class.__name__)
        yield
