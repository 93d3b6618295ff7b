# Copyright 2026 The Linformer founders.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Linformer configuration: every architectural choice, and the reason for every refusal."""

from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2CLS


# Written into every config.json, so that each Auto class finds its head in the repository's own code.
AUTO_MAP = {
    "AutoConfig": "configuration_linformer.LinformerConfig",
    "AutoModel": "modeling_linformer.LinformerModel",
    "AutoModelForPreTraining": "modeling_linformer.LinformerForMaskedLM",
    "AutoModelForMaskedLM": "modeling_linformer.LinformerForMaskedLM",
    "AutoModelForSequenceClassification": "modeling_linformer.LinformerForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_linformer.LinformerForTokenClassification",
    "AutoModelForQuestionAnswering": "modeling_linformer.LinformerForQuestionAnswering",
    "AutoModelForMultipleChoice": "modeling_linformer.LinformerForMultipleChoice",
}


@strict
class LinformerConfig(PreTrainedConfig):
    r"""
    Configuration of a [`LinformerModel`]: BERT's keys, and those of the sequence projection of
    [Linformer](https://arxiv.org/abs/2006.04768). The defaults give a model of the size of RoBERTa base with
    k = 128 slots for up to n = 512 tokens.

    Args:
        vocab_size (`int`, defaults to 32768): Entries of the vocabulary; those of the tokenizer in `tokenizer/`.
        hidden_size (`int`, defaults to 768): Width D of the hidden states.
        embedding_size (`int`, *optional*): Width of the embeddings where it is another, as in ELECTRA: a linear layer
            then makes D of it. `hidden_size` if not given.
        num_hidden_layers (`int`, defaults to 12): Number of layers.
        num_attention_heads (`int`, defaults to 12): Number of heads H; the head size is d = D / H.
        intermediate_size (`int`, defaults to 3072): Width of the feed-forward layer.
        hidden_act (`str`, defaults to `"gelu"`): Activation of the feed-forward layer and of the masked-LM head.
        hidden_dropout_prob (`float`, defaults to 0.1): Dropout of embeddings and of both residual branches.
        attention_probs_dropout_prob (`float`, defaults to 0.1): Dropout of the attention probabilities.
        max_position_embeddings (`int`, defaults to 512): The paper's n: the longest row, in real tokens.
        type_vocab_size (`int`, defaults to 2): Number of token types (segments).
        initializer_range (`float`, defaults to 0.02): Standard deviation of the initial weights.
        layer_norm_eps (`float`, defaults to 1e-12): Epsilon of the layer norms.
        pad_token_id (`int`, defaults to 1): Padding; its embedding starts at zero.
        bos_token_id (`int`, defaults to 0): First token, `<s>`.
        eos_token_id (`int`, defaults to 2): Last token, `</s>`.
        classifier_dropout (`float`, *optional*): Dropout of the task heads; `hidden_dropout_prob` if not given.
        classifier_pooling (`"cls"` or `"mean"`, defaults to `"cls"`): What a sequence is classified by: its first
            real token, or the mean of its real tokens.
        classifier_activation (`str`, defaults to `"tanh"`): Activation of the dense layer that a sequence is
            classified by. BERT and RoBERTa have tanh, DistilBERT relu, ELECTRA gelu.
        tie_word_embeddings (`bool`, defaults to `True`): Whether the masked-LM head reuses the word embeddings.
        projected_length (`int`, `list[int]` or `list[list[int]]`, defaults to 128): The paper's k, the number of slots
            that N tokens are projected to. A list gives one k a layer (section 4, non-uniform projected dimension), a
            list of lists one a layer and head; the latter needs `projection_sharing="none"`.
        projection_type (`str`, defaults to `"linear"`): How N rows become k.
            `"linear"`: learned E and F. `"random"`: fixed E and F with entries from N(0, 1/k), saved with the weights.
            `"convolution"`: a learned kernel whose length and stride are ceil(n / k). `"mean_pool"`, `"max_pool"`:
            no parameters and no limit to the length but the position table; the first real token keeps a slot of
            its own, the others are divided evenly, in order, over the other slots, so that rows of up to k tokens get
            exact softmax attention.
        projection_sharing (`str`, defaults to `"layerwise"`): Section 4 of the paper. `"none"`: E and F for every
            head. `"headwise"`: one E and one F a layer. `"key_value"`: E = F, one a layer. `"layerwise"`: one E for
            the model. Without effect on the pooling types.
        projection_init (`"normal"` or `"segment_mean"`, defaults to `"normal"`): Start of a learned E. `"normal"`: the
            authors', with standard deviation `initializer_range`. `"segment_mean"`: slot i averages its share of the
            n positions.
        exact_short_sequences (`bool`, defaults to `False`): Rows of at most k tokens attend exactly (identity
            projection), whatever batch they are in. For the types `linear`, `random` and `convolution`; the pooling
            types are exact on short rows by themselves.
        local_window (`int`, defaults to 0): w. A query also attends exactly to the tokens of its own block of w and
            of both neighbouring blocks, and to the first real token, in the same softmax as the k slots. With the
            pooling types rows of up to max(k, 2 w) tokens thus get full softmax attention. 0 is
            the paper's Linformer. Adds no parameters by itself: a checkpoint loads with any w, but for the bias below.
        local_position_bias (`bool`, defaults to `False`): Each layer learns, for every head, what a token of the
            neighbourhood, other than the first, gains by its distance from the query and its side. For training from
            scratch. Zero at first, so that `from_pretrained(..., local_position_bias=True)` changes no output of a
            checkpoint without it. One with it keeps its w.
        slot_projections (`bool`, defaults to `False`): Means of several tokens get keys and values by linear layers
            of their own, `slot_key` and `slot_value`. A text of up to k tokens has no such means, so that these can
            be trained on long texts while short ones stay as they are. For `mean_pool` with one k a layer.
        sparse_prediction (`bool`, defaults to `False`): Masked-LM logits only where labels are set.
        inference_chunk_size (`int`, *optional*): So many tokens go through a layer at a time where no gradient is
            needed, which bounds the memory and costs no time; the results are the same. 512 on CPUs and 16,384
            elsewhere if not given; 0 takes all at once. Forward hooks on what is inside a layer's attention, or on its
            feed-forward layers, then see one tile after the other; with one on the attention itself none are made.

    Raises:
        StrictDataclassError: On a value of the wrong type or outside its choices, and on combinations that cannot
            work, with the reason.

    Example:

    ```python
    >>> config = LinformerConfig(projected_length=64, projection_type="mean_pool", local_window=32)
    >>> model = LinformerModel(config)
    ```"""

    model_type = "linformer"

    vocab_size: int = 32768
    hidden_size: int = 768
    embedding_size: int | None = None
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.1
    attention_probs_dropout_prob: float | int = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 1
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 2
    classifier_dropout: float | int | None = None
    classifier_pooling: Literal["cls", "mean"] = "cls"
    classifier_activation: str = "tanh"
    tie_word_embeddings: bool = True
    projected_length: int | list[int] | list[list[int]] = 128
    projection_type: Literal["linear", "random", "mean_pool", "max_pool", "convolution"] = "linear"
    projection_sharing: Literal["none", "headwise", "key_value", "layerwise"] = "layerwise"
    projection_init: Literal["normal", "segment_mean"] = "normal"
    exact_short_sequences: bool = False
    local_window: int = 0
    local_position_bias: bool = False
    slot_projections: bool = False
    sparse_prediction: bool = False
    inference_chunk_size: int | None = None

    def __post_init__(self, **kwargs: Any):
        kwargs.setdefault("auto_map", dict(AUTO_MAP))
        super().__post_init__(**kwargs)

    @property
    def uses_pooling(self) -> bool:
        """Whether the slots are means or maxima of segments, and so have no parameters."""
        return self.projection_type in ("mean_pool", "max_pool")

    @property
    def embedding_width(self) -> int:
        """Width of the embeddings, before they are as wide as the hidden states."""
        return self.embedding_size or self.hidden_size

    @property
    def head_dropout_prob(self) -> float | int:
        """Dropout of the task heads."""
        return self.hidden_dropout_prob if self.classifier_dropout is None else self.classifier_dropout

    def slots_per_head(self, layer_idx: int) -> list[int]:
        """The k of a layer: one number if all its heads have the same, else one for each head."""
        layer = self.projected_length[layer_idx] if isinstance(self.projected_length, list) else self.projected_length
        if isinstance(layer, int):
            return [layer]
        return layer if len(set(layer)) > 1 else layer[:1]

    def validate_architecture(self):
        """Refuses what cannot work. Runs at construction and before saving."""
        self._validate_sizes()
        self._validate_projected_length()
        slots = [k for layer_idx in range(self.num_hidden_layers) for k in self.slots_per_head(layer_idx)]
        n = self.max_position_embeddings
        if min(slots) < 1 or max(slots) > n:
            raise ValueError(
                f"`projected_length` (k = {self.projected_length}) must lie between 1 and `max_position_embeddings` "
                f"(n = {n}): {n} tokens cannot fill more than {n} slots. Lower k or raise n."
            )
        if self.uses_pooling and min(slots) < 2:
            raise ValueError(
                f"`projection_type={self.projection_type!r}` needs `projected_length` >= 2 and got "
                f"{self.projected_length}: the first token keeps a slot of its own and the others need one more."
            )
        if self.uses_pooling and self.exact_short_sequences:
            raise ValueError(
                f"`exact_short_sequences=True` has nothing to add to `projection_type={self.projection_type!r}`, "
                "which is exact for rows of up to k tokens by itself. Leave it out."
            )
        if self.slot_projections and (
            self.projection_type != "mean_pool"
            or any(len(self.slots_per_head(layer_idx)) > 1 for layer_idx in range(self.num_hidden_layers))
        ):
            raise ValueError(
                f"`slot_projections=True` needs `projection_type='mean_pool'` (not {self.projection_type!r}) and the "
                f"same k for all heads of a layer (not {self.projected_length}): it tells means of several tokens "
                "from single ones."
            )
        if self.projection_type == "random" and self.projection_sharing == "layerwise" and len(set(slots)) > 1:
            raise ValueError(
                f"`projection_type='random'` with `projection_sharing='layerwise'` needs the same k in every layer, "
                f"not {self.projected_length}: entries are from N(0, 1 / k), so layers of different k cannot share "
                "them. Use another `projection_sharing`."
            )
        if self.projection_type == "convolution" and self.projection_sharing == "layerwise" and len(set(slots)) > 1:
            raise ValueError(
                f"`projection_type='convolution'` with `projection_sharing='layerwise'` needs the same k in every "
                f"layer and got {self.projected_length}: the kernel's length is ceil(n / k), so layers of different "
                "k cannot share one. Use another `projection_sharing`."
            )
        if (
            self.projection_init == "segment_mean"
            and self.projection_type == "linear"
            and self.projection_sharing == "layerwise"
            and len(set(slots)) > 1
        ):
            raise ValueError(
                f"`projection_init='segment_mean'` with `projection_sharing='layerwise'` needs the same k in every "
                f"layer and got {self.projected_length}: layers use the first k rows of one E, and the first averages "
                "of a larger k cover the beginning of the text only. Use another sharing or `projection_init`."
            )
        problem_types = (None, "regression", "single_label_classification", "multi_label_classification")
        if self.problem_type not in problem_types:
            raise ValueError(f"`problem_type` ({self.problem_type!r}) must be one of {problem_types}.")
        if not 0 <= self.local_window <= n:
            raise ValueError(
                f"`local_window` ({self.local_window}) must lie between 0 (off) and `max_position_embeddings` ({n})."
            )
        if self.local_position_bias and not self.local_window:
            raise ValueError(
                "`local_position_bias=True` needs a `local_window`: without one no single token is seen, and "
                "slots have no distance. Give a window, such as 32, or leave the bias out."
            )
        if self.inference_chunk_size is not None and self.inference_chunk_size < 0:
            raise ValueError(
                f"`inference_chunk_size` ({self.inference_chunk_size}) must be a number of tokens, 0 for all at once, "
                "or None for a size that suits the device."
            )
        if getattr(self, "is_decoder", False) or getattr(self, "add_cross_attention", False):
            raise ValueError(
                "Linformer cannot be a decoder or attend to another sequence (`is_decoder`, `add_cross_attention`): "
                "its sequence projection mixes all tokens, later ones included, into every slot."
            )

    def _validate_sizes(self):
        sizes = ("vocab_size", "hidden_size", "num_attention_heads", "intermediate_size", "max_position_embeddings")
        for name in (*sizes, "num_hidden_layers", "type_vocab_size", "embedding_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1 and is {getattr(self, name)}.")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"`hidden_size` ({self.hidden_size}) must be a multiple of `num_attention_heads` "
                f"({self.num_attention_heads})."
            )
        for name in ("hidden_act", "classifier_activation"):
            if getattr(self, name) not in ACT2CLS:
                raise ValueError(f"`{name}` ({getattr(self, name)!r}) must be one of {sorted(ACT2CLS)}.")
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"):
            if getattr(self, name) is not None and not 0 <= getattr(self, name) < 1:
                raise ValueError(f"`{name}` ({getattr(self, name)}) must be a probability below 1.")
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(f"`pad_token_id` ({self.pad_token_id}) must lie between 0 and {self.vocab_size - 1}.")

    def _validate_projected_length(self):
        if isinstance(self.projected_length, int):
            return
        if len(self.projected_length) != self.num_hidden_layers:
            raise ValueError(
                f"`projected_length` lists {len(self.projected_length)} layers, the model has "
                f"`num_hidden_layers={self.num_hidden_layers}`. Give one entry for every layer."
            )
        for layer in self.projected_length:
            if isinstance(layer, int):
                continue
            if self.projection_sharing != "none":
                raise ValueError(
                    f"A `projected_length` for every head ({self.projected_length}) needs "
                    f"`projection_sharing='none'`, not {self.projection_sharing!r}: heads that share E share its k."
                )
            if len(layer) != self.num_attention_heads:
                raise ValueError(
                    f"`projected_length` lists {len(layer)} heads ({layer}), the model has "
                    f"`num_attention_heads={self.num_attention_heads}`. Give one entry for every head."
                )


LinformerConfig.register_for_auto_class()

__all__ = ["LinformerConfig"]
