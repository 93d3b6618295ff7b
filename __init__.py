"""Linformer for Transformers: `import hf_linformer` registers the model with every Auto class, without remote code."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForPreTraining,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .configuration_linformer import LinformerConfig
from .modeling_linformer import (
    LinformerForMaskedLM,
    LinformerForMultipleChoice,
    LinformerForQuestionAnswering,
    LinformerForSequenceClassification,
    LinformerForTokenClassification,
    LinformerModel,
    LinformerPreTrainedModel,
)


AutoConfig.register("linformer", LinformerConfig)
AutoModel.register(LinformerConfig, LinformerModel)
AutoModelForPreTraining.register(LinformerConfig, LinformerForMaskedLM)
AutoModelForMaskedLM.register(LinformerConfig, LinformerForMaskedLM)
AutoModelForSequenceClassification.register(LinformerConfig, LinformerForSequenceClassification)
AutoModelForTokenClassification.register(LinformerConfig, LinformerForTokenClassification)
AutoModelForQuestionAnswering.register(LinformerConfig, LinformerForQuestionAnswering)
AutoModelForMultipleChoice.register(LinformerConfig, LinformerForMultipleChoice)

__all__ = [
    "LinformerConfig",
    "LinformerForMaskedLM",
    "LinformerForMultipleChoice",
    "LinformerForQuestionAnswering",
    "LinformerForSequenceClassification",
    "LinformerForTokenClassification",
    "LinformerModel",
    "LinformerPreTrainedModel",
]
