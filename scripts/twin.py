"""The softmax twin of a Linformer: RoBERTa of the same sizes, whose masked-LM head can be sparse too."""

import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig, RobertaConfig
from transformers.modeling_outputs import MaskedLMOutput

from common import UserError


SAME: tuple[str, ...] = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
SAME += ("hidden_act", "hidden_dropout_prob", "attention_probs_dropout_prob", "type_vocab_size", "initializer_range")
SAME += ("layer_norm_eps", "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings")


class RobertaForMaskedLM(transformers.RobertaForMaskedLM):
    """The library's, which with `config.sparse_prediction` computes logits only where labels are set.

    It has the library's name, since that is what is written into the configuration of a saved model.
    """

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: object,
    ) -> MaskedLMOutput:
        """As `LinformerForMaskedLM`: `logits` (B, N, V), or (number of labels, V) if sparse and with labels."""
        if labels is None or not self.config.sparse_prediction:
            return super().forward(input_ids, attention_mask, labels=labels, **kwargs)
        hidden_states = self.roberta(input_ids, attention_mask, **kwargs).last_hidden_state
        is_predicted = labels != -100
        logits = self.lm_head(hidden_states[is_predicted])
        loss = nn.functional.cross_entropy(logits.float(), labels[is_predicted])
        return MaskedLMOutput(loss=loss, logits=logits)


def twin_config(config: PreTrainedConfig) -> RobertaConfig:
    """RoBERTa's configuration of the same sizes and special tokens as a Linformer's.

    Raises `UserError` where RoBERTa cannot be that.
    """
    if config.embedding_size not in (None, config.hidden_size):
        raise UserError(f"RoBERTa has no embedding_size, so there is no twin of a model with {config.embedding_size}")
    if config.local_position_bias:
        raise UserError(
            "RoBERTa has no local_position_bias; the softmax twin of a model that has one is the same Linformer with "
            f"--config_overrides projection_type=mean_pool,projected_length={config.max_position_embeddings}"
        )
    twin = RobertaConfig(**{name: getattr(config, name) for name in SAME})
    # RoBERTa counts positions from pad_token_id + 1.
    twin.max_position_embeddings = config.max_position_embeddings + config.pad_token_id + 1
    twin.sparse_prediction = config.sparse_prediction
    return twin


def make_twin(config: PreTrainedConfig) -> RobertaForMaskedLM:
    """With new weights."""
    return RobertaForMaskedLM(twin_config(config))
