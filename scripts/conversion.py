"""What a Linformer takes over from BERT and its kin: which weight becomes which, and what cannot be converted.

Shared by scripts/convert.py and its tests. A source is one of FAMILIES with one of HEADS; a class is both, as in
`DistilBertForMaskedLM`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from common import UserError
from hf_linformer import (
    LinformerConfig,
    LinformerForMaskedLM,
    LinformerForQuestionAnswering,
    LinformerForSequenceClassification,
    LinformerForTokenClassification,
    LinformerModel,
    LinformerPreTrainedModel,
)


@dataclass(frozen=True)
class Head:
    """A task: how its classes end in the library, and the Linformer for it."""

    suffixes: tuple[str, ...]
    model_class: type[LinformerPreTrainedModel]
    auto_class: str


HEADS = {
    "base": Head(("Model",), LinformerModel, "AutoModel"),
    # BERT's pretraining class has a masked-LM head beside the one for next sentences, which is left out.
    "masked_lm": Head(("ForMaskedLM", "ForPreTraining"), LinformerForMaskedLM, "AutoModelForMaskedLM"),
    "sequence_classification": Head(
        ("ForSequenceClassification",), LinformerForSequenceClassification, "AutoModelForSequenceClassification"
    ),
    "token_classification": Head(
        ("ForTokenClassification",), LinformerForTokenClassification, "AutoModelForTokenClassification"
    ),
    "question_answering": Head(
        ("ForQuestionAnswering",), LinformerForQuestionAnswering, "AutoModelForQuestionAnswering"
    ),
}

# Names of the encoder, with the prefix gone: BERT, RoBERTa, XLM-RoBERTa, CamemBERT and ELECTRA share them.
BERT_NAMES = (
    (r"embeddings\.LayerNorm\.", "embeddings.norm."),
    (r"embeddings_project\.", "embeddings.widen."),
    (r"encoder\.layer\.(\d+)\.attention\.self\.", r"layers.\1.attention."),
    (r"encoder\.layer\.(\d+)\.attention\.output\.dense\.", r"layers.\1.attention.output."),
    (r"encoder\.layer\.(\d+)\.attention\.output\.LayerNorm\.", r"layers.\1.attention_norm."),
    (r"encoder\.layer\.(\d+)\.intermediate\.dense\.", r"layers.\1.mlp.up."),
    (r"encoder\.layer\.(\d+)\.output\.dense\.", r"layers.\1.mlp.down."),
    (r"encoder\.layer\.(\d+)\.output\.LayerNorm\.", r"layers.\1.mlp_norm."),
)
DISTILBERT_NAMES = (
    (r"embeddings\.LayerNorm\.", "embeddings.norm."),
    (r"transformer\.layer\.(\d+)\.attention\.q_lin\.", r"layers.\1.attention.query."),
    (r"transformer\.layer\.(\d+)\.attention\.k_lin\.", r"layers.\1.attention.key."),
    (r"transformer\.layer\.(\d+)\.attention\.v_lin\.", r"layers.\1.attention.value."),
    (r"transformer\.layer\.(\d+)\.attention\.out_lin\.", r"layers.\1.attention.output."),
    (r"transformer\.layer\.(\d+)\.sa_layer_norm\.", r"layers.\1.attention_norm."),
    (r"transformer\.layer\.(\d+)\.ffn\.lin1\.", r"layers.\1.mlp.up."),
    (r"transformer\.layer\.(\d+)\.ffn\.lin2\.", r"layers.\1.mlp.down."),
    (r"transformer\.layer\.(\d+)\.output_layer_norm\.", r"layers.\1.mlp_norm."),
)
# Names of the heads. The linear layer of token classification and of question answering has one name everywhere.
ROBERTA_HEADS = {
    "masked_lm": (
        (r"lm_head\.dense\.", "lm_head.dense."),
        (r"lm_head\.layer_norm\.", "lm_head.norm."),
        (r"lm_head\.decoder\.", "lm_head.decoder."),
        (r"lm_head\.bias", "lm_head.decoder.bias"),
    ),
    "sequence_classification": (
        (r"classifier\.dense\.", "classifier.dense."),
        (r"classifier\.out_proj\.", "classifier.output."),
    ),
}
BERT_HEADS = {
    "masked_lm": (
        (r"cls\.predictions\.transform\.dense\.", "lm_head.dense."),
        (r"cls\.predictions\.transform\.LayerNorm\.", "lm_head.norm."),
        (r"cls\.predictions\.decoder\.", "lm_head.decoder."),
        (r"cls\.predictions\.bias", "lm_head.decoder.bias"),
    ),
    "sequence_classification": (
        (r"bert\.pooler\.dense\.", "classifier.dense."),
        (r"classifier\.", "classifier.output."),
    ),
}
ELECTRA_HEADS = {
    "masked_lm": (
        (r"generator_predictions\.dense\.", "lm_head.dense."),
        (r"generator_predictions\.LayerNorm\.", "lm_head.norm."),
        (r"generator_lm_head\.", "lm_head.decoder."),
    ),
    "sequence_classification": ROBERTA_HEADS["sequence_classification"],
}
DISTILBERT_HEADS = {
    "masked_lm": (
        (r"vocab_transform\.", "lm_head.dense."),
        (r"vocab_layer_norm\.", "lm_head.norm."),
        (r"vocab_projector\.", "lm_head.decoder."),
    ),
    "sequence_classification": (
        (r"pre_classifier\.", "classifier.dense."),
        (r"classifier\.", "classifier.output."),
    ),
}


@dataclass(frozen=True)
class Family:
    """How one kind of encoder writes what a Linformer has.

    class_prefix: of its classes in the library
    prefix: of the encoder's weights in a model with a head
    names, head_names: patterns at the beginning of a weight's name, and what a Linformer calls it
    classifier_activation: between the two layers of the sequence classifier
    lm_head_activation: that of the masked-LM head, or None where it is the configuration's
    counts_from_pad: whether position p stands in row p + pad_token_id + 1 of the table
    """

    class_prefix: str
    prefix: str
    names: tuple[tuple[str, str], ...]
    head_names: dict[str, tuple[tuple[str, str], ...]]
    classifier_activation: str = "tanh"
    lm_head_activation: str | None = None
    counts_from_pad: bool = False


def _like_roberta(class_prefix: str) -> Family:
    return Family(class_prefix, "roberta", BERT_NAMES, ROBERTA_HEADS, lm_head_activation="gelu", counts_from_pad=True)


FAMILIES = {
    "bert": Family("Bert", "bert", BERT_NAMES, BERT_HEADS),
    "roberta": _like_roberta("Roberta"),
    "xlm-roberta": _like_roberta("XLMRoberta"),
    "camembert": _like_roberta("Camembert"),
    "distilbert": Family("DistilBert", "distilbert", DISTILBERT_NAMES, DISTILBERT_HEADS, classifier_activation="relu"),
    "electra": Family(
        *("Electra", "electra", BERT_NAMES, ELECTRA_HEADS),
        classifier_activation="gelu",
        lm_head_activation="gelu",
    ),
}
# Of a pretrained discriminator the encoder is what others use.
DISCRIMINATORS = ("ElectraForPreTraining",)


def find_family(config: PreTrainedConfig) -> Family:
    """The family of a source. Raises `UserError`, with the reason, for what cannot be a Linformer."""
    if config.model_type == "linformer":
        raise UserError("the source is a Linformer already")
    if config.model_type not in FAMILIES:
        raise UserError(
            f"a {config.model_type} model cannot be converted: its weights do not fit a Linformer's layers (BERT's, "
            f"with learned absolute positions). Convertible: {', '.join(FAMILIES)}"
        )
    positions = getattr(config, "position_embedding_type", None) or "absolute"
    if positions != "absolute":
        raise UserError(
            f"the source has positions of type {positions!r}: those are added to the scores of pairs of tokens, and a "
            "slot is no token. Only 'absolute' positions can be converted"
        )
    for name in ("is_decoder", "add_cross_attention", "is_encoder_decoder"):
        if getattr(config, name, False):
            raise UserError(f"the source is a decoder (`{name}`): a slot mixes later tokens into earlier ones")
    return FAMILIES[config.model_type]


def longest_row(config: PreTrainedConfig) -> int:
    """The most tokens that a source can read. RoBERTa's table of positions begins with rows that no token uses."""
    unused = config.pad_token_id + 1 if find_family(config).counts_from_pad else 0
    return config.max_position_embeddings - unused


def find_head(config: PreTrainedConfig, family: Family, wanted: str = "auto") -> str:
    """The name of the head in HEADS, from the source's `architectures` or as wanted."""
    if wanted != "auto":
        return wanted
    architectures = config.architectures or [f"{family.class_prefix}Model"]
    name = architectures[0]
    if name in DISCRIMINATORS:
        return "base"
    for head, kind in HEADS.items():
        if name in [family.class_prefix + suffix for suffix in kind.suffixes]:
            return head
    raise UserError(
        f"the source is a {name}, which has no Linformer. Convertible heads: {', '.join(HEADS)}; --head base takes "
        "its encoder alone"
    )


def convert_config(source: PreTrainedConfig, family: Family, head: str, **changes: Any) -> LinformerConfig:
    """The configuration of the Linformer: what the source has, in BERT's names, and `changes`."""
    lm_head_activation = family.lm_head_activation
    if head == "masked_lm" and lm_head_activation and lm_head_activation != source.hidden_act:
        raise UserError(
            f"the masked-LM head of a {source.model_type} model uses {lm_head_activation} and its layers "
            f"{source.hidden_act}: a Linformer has one `hidden_act` for both. --head base takes the encoder"
        )
    same = ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "initializer_range"]
    same += ["pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings", "id2label", "label2id"]
    keys = {name: getattr(source, name) for name in same} | {
        "problem_type": getattr(source, "problem_type", None),
        "max_position_embeddings": longest_row(source),
        "classifier_activation": family.classifier_activation,
    }
    if source.model_type == "distilbert":
        keys |= {
            "intermediate_size": source.hidden_dim,
            "hidden_act": source.activation,
            "hidden_dropout_prob": source.dropout,
            "attention_probs_dropout_prob": source.attention_dropout,
            "layer_norm_eps": 1e-12,
            "type_vocab_size": 2,
            "classifier_dropout": source.seq_classif_dropout if head == "sequence_classification" else None,
        }
    else:
        same = ["intermediate_size", "hidden_act", "hidden_dropout_prob", "attention_probs_dropout_prob"]
        same += ["layer_norm_eps", "type_vocab_size", "classifier_dropout"]
        keys |= {name: getattr(source, name, None) for name in same}
    if getattr(source, "embedding_size", source.hidden_size) != source.hidden_size:
        keys["embedding_size"] = source.embedding_size
    # What scripts/finetune.py says that a model was trained on.
    if hasattr(source, "reads_pairs"):
        keys["reads_pairs"] = source.reads_pairs
    return LinformerConfig(**keys | changes)


def rename(name: str, names: Sequence[tuple[str, str]]) -> str | None:
    """The name by the first pattern that it begins with, or None."""
    for pattern, replacement in names:
        renamed, count = re.subn(f"^{pattern}", replacement, name)
        if count:
            return renamed
    return None


def new_name(name: str, family: Family, head: str) -> str | None:
    """What a weight of a source is called in a Linformer, or None for one that has no place in it."""
    if renamed := rename(name, family.head_names.get(head, ())):
        return renamed
    if head == "base":
        return rename(name, family.names) or name
    inner = name.removeprefix(f"{family.prefix}.")
    if inner != name:
        return f"linformer.{rename(inner, family.names) or inner}"
    return name if name.startswith(("classifier.", "qa_outputs.")) else None


def extend_positions(table: Tensor, n: int, keep: int, how: str) -> Tensor:
    """A table of positions (n_source, D) made longer, (n, D), its first `keep` rows as they are.

    `copy`: all rows of the source, then again from the second on, as often as needed (Longformer, section 5; the
    first is the row of [CLS], which stands in a text once). `interpolate`: rows keep ... n_source - 1 are stretched
    over keep ... n - 1, linearly.
    """
    source_n = len(table)
    if n == source_n:
        return table
    if how == "copy":
        again = 1 + (torch.arange(source_n, n) - 1) % (source_n - 1)
        return torch.cat([table, table[again]])
    keep = min(keep, source_n - 1)
    stretched = nn.functional.interpolate(
        table[keep:].float().T[None], size=n - keep, mode="linear", align_corners=True
    )
    return torch.cat([table[:keep], stretched[0].T.to(table.dtype)])


def exact_length(config: LinformerConfig) -> int:
    """Rows of up to so many tokens get the source's own attention."""
    k = min(min(config.slots_per_head(layer)) for layer in range(config.num_hidden_layers))
    if config.uses_pooling:
        return max(k, 2 * config.local_window)
    return k if config.exact_short_sequences else 0


def convert_model(
    source: PreTrainedModel,
    head: str,
    config: LinformerConfig,
    position_extension: str = "copy",
    missing: Sequence[str] = (),
    trained_length: int | None = None,
) -> tuple[LinformerPreTrainedModel, list[str], list[str]]:
    """The Linformer, the weights of the source that have no place in it, and those of its own that are new.

    missing: weights of the source that its checkpoint lacks, and that it drew at random
    trained_length: so many of its positions are taken as known, and the others made of them; None for all

    Raises `UserError` where the Linformer needs a weight that is missing.
    """
    family = find_family(source.config)
    weights = {name: weight for name, weight in source.state_dict().items() if name not in missing}
    new_names = {name: new_name(name, family, head) for name in weights}
    fitting = {new: weights[name] for name, new in new_names.items() if new is not None}
    encoder = "" if head == "base" else "linformer."
    if source.config.model_type == "distilbert":
        # It has no token types: nothing is added, whatever a tokenizer calls them.
        types = torch.zeros(config.type_vocab_size, config.hidden_size, dtype=source.dtype)
        fitting[f"{encoder}embeddings.token_type_embeddings.weight"] = types
    positions = f"{encoder}embeddings.position_embeddings.weight"
    if positions in fitting:
        table = fitting[positions][-longest_row(source.config) :][:trained_length]
        keep = min(exact_length(config), len(table))
        fitting[positions] = extend_positions(table, config.max_position_embeddings, keep, position_extension)
    if config.slot_projections:
        # They begin as what they stand in for.
        for name in [name for name in fitting if ".attention.key." in name or ".attention.value." in name]:
            fitting[name.replace(".attention.", ".attention.slot_")] = fitting[name].clone()

    options = {"add_pooling_layer": "pooler.dense.weight" in fitting} if head == "base" else {}
    model = HEADS[head].model_class._from_config(config, dtype=source.dtype, **options).eval()
    own = model.state_dict()
    new = [name for name in own if name not in fitting]
    if lacking := [name for name in new if not name.endswith((".E", ".F"))]:
        raise UserError(
            f"the source lacks {len(lacking)} weights that a Linformer needs, such as that of {lacking[0]}"
        )
    model.load_state_dict({name: weight for name, weight in fitting.items() if name in own}, strict=False)
    left_out = [name for name, renamed in new_names.items() if renamed not in own]
    return model, left_out, new
