"""scripts/export_onnx.py: one graph gives PyTorch's results for every batch and length, head and projection."""

import contextlib
import csv
import io
import json

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

import export_onnx
from common import UserError
from export_onnx import Subject, compare, export, largest_difference, onnx_engine, torch_engine
from hf_linformer import (
    LinformerForMaskedLM,
    LinformerForMultipleChoice,
    LinformerForQuestionAnswering,
    LinformerForSequenceClassification,
    LinformerForTokenClassification,
    LinformerModel,
)
from onnx_table import onnx_table
from tiny import TYPES, build, save_classifier


for package in export_onnx.PACKAGES:
    pytest.importorskip(package, reason=f"the export needs {package}")

INPUTS = ["input_ids", "attention_mask"]
HEADS = {
    "feature-extraction": LinformerModel,
    "fill-mask": LinformerForMaskedLM,
    "text-classification": LinformerForSequenceClassification,
    "token-classification": LinformerForTokenClassification,
    "question-answering": LinformerForQuestionAnswering,
    "multiple-choice": LinformerForMultipleChoice,
}
SETTINGS = [{"projection_type": kind, "local_window": window} for kind in TYPES for window in (0, 3)]
SETTINGS += [{"projection_type": "mean_pool", "local_window": 3, "local_position_bias": True}]
SETTINGS += [{"projection_type": "linear", "exact_short_sequences": True, "local_window": 3}]
LABELS = ["canal", "rail", "space"]


def exported(subject: Subject, path):
    """PyTorch and the graph, and how far they are from each other at every length."""
    export(subject, path)
    engines = torch_engine(subject.model), onnx_engine(path)
    return *engines, compare(*engines, subject, seed=0)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_every_projection(settings, tmp_path):
    """In tokens that are padded left, right and in between, shorter and longer than k and w, up to n."""
    settings = settings | {"num_hidden_layers": 1, "projection_sharing": "headwise"}
    model = build(LinformerForTokenClassification, **settings)
    subject = Subject(model, "token-classification", INPUTS)
    expected, found, differences = exported(subject, tmp_path / "model.onnx")
    n, k = model.config.max_position_embeddings, model.config.projected_length
    assert {1, 2, k - 1, k, k + 1, n} <= differences.keys()
    assert max(differences.values()) < 1e-4
    # The comparison sees what it should: other weights are far off, as are pads taken for tokens.
    inputs = subject.inputs(torch.ones(2, 9, dtype=torch.bool), torch.Generator().manual_seed(1))
    unlike = inputs | {"attention_mask": torch.tensor([[1] * 5 + [0] * 4, [1] * 9])}
    assert largest_difference(expected(inputs), found(unlike), None) > 1e-2
    # A row without any token gives numbers.
    empty = inputs | {"attention_mask": torch.tensor([[0] * 9, [1] * 9])}
    assert np.isfinite(found(empty)["logits"]).all()
    with pytest.raises(Exception, match="(?i)out of (data )?bounds|indices"):
        found(subject.inputs(torch.ones(1, n + 1, dtype=torch.bool), torch.Generator()))


# Token classification is the head of the test above.
@pytest.mark.parametrize("task", [task for task in HEADS if task != "token-classification"])
def test_every_head(task, tmp_path):
    options = {"num_hidden_layers": 1, "projection_type": "mean_pool", "projected_length": [5], "num_labels": 4}
    model = build(HEADS[task], **options)
    # As the script loads the encoder: without the pooler, which belongs to no head.
    model.pooler = None
    subject = Subject(model, task, [*INPUTS, "token_type_ids"])
    _, found, differences = exported(subject, tmp_path / "model.onnx")
    assert max(differences.values()) < 1e-4
    shape = (3, 4, 11) if task == "multiple-choice" else (3, 11)
    inputs = subject.inputs(torch.ones(shape, dtype=torch.bool), torch.Generator().manual_seed(1))
    with torch.no_grad():
        outputs = model(**inputs)
    results = found(inputs)
    assert {name: values.shape for name, values in results.items()} == {
        name: tuple(values.shape) for name, values in outputs.items()
    }
    # Segments count.
    other = found(inputs | {"token_type_ids": 1 - inputs["token_type_ids"]})
    assert largest_difference(results, other, None) > 1e-3


def test_differences_are_seen():
    engine = {"logits": np.zeros((2, 3, 4))}
    moved = {"logits": np.zeros((2, 3, 4))}
    moved["logits"][1, 2, 0] = 0.5
    real = np.array([[True, True, True], [True, True, False]])
    assert largest_difference(engine, moved, None) == 0.5
    assert largest_difference(engine, moved, real) == 0
    assert largest_difference(engine, moved, ~real) == 0.5
    moved["logits"][0, 0, 0] = np.nan
    assert np.isnan(largest_difference(engine, moved, real))


@pytest.mark.parametrize("wrong", [2e-4, float("nan"), float("inf")])
def test_a_graph_that_differs_is_refused(wrong):
    export_onnx.refuse_difference({1: 1e-5, 7: 1e-4}, 1e-4)
    with pytest.raises(UserError, match=rf"more than 0.0001 at lengths \({wrong:.1e} at 7\)"):
        export_onnx.refuse_difference({1: 1e-5, 7: wrong}, 1e-4)


# The command line


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A classifier with random weights, its tokenizer cut at 24 tokens."""
    folder = tmp_path_factory.mktemp("export") / "model"
    # Matrices of up to 8192 numbers are transposed on export already, and would hide that larger ones are not.
    return save_classifier(folder, LABELS, hidden_size=96, local_window=4, initializer_range=0.1)


@pytest.fixture(scope="module")
def run(saved, tmp_path_factory):
    """The folder, the rows of results and what was printed, of one export with all that can be measured."""
    folder = tmp_path_factory.mktemp("run")
    texts = folder / "texts.csv"
    texts.write_text("text,label\nFarmers ask for canals.,canal\nOf silver,rail\nWe land on the moon.,canal\n")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        in_process(
            *(saved, folder / "onnx", "--quantize", "int8", "--validation_file", str(texts)),
            *("--timed_lengths", "5", "32", "33", "--num_repeats", "1", "--results_file", str(folder / "onnx.csv")),
        )
    with (folder / "onnx.csv").open() as file:
        return folder / "onnx", list(csv.DictReader(file)), printed.getvalue()


def in_process(saved, output_dir, *options: str) -> None:
    export_onnx.main(["--model_name_or_path", str(saved), "--output_dir", str(output_dir), *options])


def test_the_folder_is_enough_for_a_stranger(run, saved):
    folder, _, _ = run
    names = {path.name for path in folder.iterdir()}
    assert names >= {"model.onnx", "model_int8.onnx", "config.json", "tokenizer.json", "tokenizer_config.json"}
    assert not any(name.startswith(".") for name in [*names, *(path.name for path in folder.parent.iterdir())])
    assert json.loads((folder / "config.json").read_text())["id2label"] == {str(i): n for i, n in enumerate(LABELS)}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(["Farmers ask for canals. " * 9, "Of"], truncation=True, padding=True, return_tensors="pt")
    assert batch["input_ids"].shape == (2, 24)
    found = onnx_engine(folder / "model.onnx")(dict(batch))["logits"]
    model = LinformerForSequenceClassification.from_pretrained(saved).eval()
    with torch.no_grad():
        np.testing.assert_allclose(found, model(**batch).logits.numpy(), rtol=0, atol=1e-4)


def test_names_and_free_sizes_of_the_graph(run):
    import onnx

    graph = onnx.load(run[0] / "model.onnx").graph
    sizes = {
        value.name: [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
        for value in [*graph.input, *graph.output]
    }
    assert sizes == {"input_ids": ["batch", "length"], "attention_mask": ["batch", "length"], "logits": ["batch", 3]}


def test_every_linear_layer_has_8_bit_weights(run):
    import onnx

    graph = onnx.load(run[0] / "model_int8.onnx").graph
    floats = {t.name: np.prod(t.dims) for t in graph.initializer if t.data_type == onnx.TensorProto.FLOAT}
    # Biases, norms and scales only: the smallest matrix of the layer has 32 x 96 numbers.
    assert max(floats.values()) < 32 * 96, floats


def test_rows_of_results(run):
    _, rows, printed = run
    engines = ["PyTorch", "onnxruntime", "onnxruntime int8"]
    assert [row["engine"] for row in rows] == engines
    for row in rows:
        assert row["engine"] in printed and row["task"] == "text-classification" and row["onnxruntime"]
        assert float(row["milliseconds_5"]) > 0 and float(row["milliseconds_32"]) > 0
        assert "milliseconds_33" not in row
    pytorch, graph, int8 = rows
    assert float(pytorch["max_difference"]) == 0 < float(graph["max_difference"]) < 1e-4
    assert 1e-4 < float(int8["max_difference"]) < 1
    assert float(int8["megabytes"]) < 0.4 * float(graph["megabytes"])
    assert pytorch["eval_accuracy"] == graph["eval_accuracy"]


def test_nothing_is_overwritten_unasked_and_nothing_stale_is_left(run, saved, tmp_path, monkeypatch):
    graph = (run[0] / "model.onnx").read_bytes()
    monkeypatch.setattr(export_onnx, "export", lambda subject, path: path.write_bytes(graph))
    folder = tmp_path / "onnx"
    folder.mkdir()
    for name in ("model_int8.onnx", "notes.txt"):
        (folder / name).write_text("mine")
    with pytest.raises(UserError, match="is not empty; empty it, or give --overwrite_output_dir true"):
        in_process(saved, folder)
    assert {path.name for path in folder.iterdir()} == {"model_int8.onnx", "notes.txt"}
    in_process(saved, folder, "--overwrite_output_dir", "true", "--timed_lengths", "3", "--num_repeats", "1")
    assert (folder / "notes.txt").read_text() == "mine"
    assert (folder / "model.onnx").read_bytes() == graph
    assert not (folder / "model_int8.onnx").exists()


def test_bad_input_is_refused(saved, tmp_path, monkeypatch):
    output_dir = tmp_path / "onnx"
    refusals = [
        ((tmp_path / "nowhere", output_dir), "cannot load the model .*nowhere"),
        ((saved, output_dir, "--task", "fill-mask"), r"has no weights for fill-mask \(lm_head"),
        ((saved, output_dir, "--num_repeats", "0"), "--num_repeats must be more than 0, not 0"),
        ((saved, output_dir, "--timed_lengths", "0"), "--timed_lengths must be at least 1, not 0"),
        ((saved, saved / "config.json"), "is a file; name a folder"),
        ((saved, output_dir, "--task", "feature-extraction", "--validation_file", "x.csv"), "judges text-classific"),
    ]
    for (model, folder, *options), message in refusals:
        with pytest.raises(UserError, match=message):
            in_process(model, folder, *options)
    # A graph that is refused leaves nothing behind.
    monkeypatch.setattr(export_onnx, "export", lambda subject, path: path.write_text("no graph"))
    monkeypatch.setattr(export_onnx, "onnx_engine", lambda path: lambda inputs: {"logits": np.zeros((1, 3))})
    with pytest.raises(UserError, match="the graph is not kept: onnxruntime differs .* at 24|the graph is not kept"):
        in_process(saved, output_dir)
    assert list(tmp_path.iterdir()) == []


def test_missing_packages_are_named(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(export_onnx, "PACKAGES", ("onnx", "no_such_package"))
    with pytest.raises(UserError, match=r"^no_such_package must be installed: .*\[onnx\]"):
        in_process(saved, tmp_path / "onnx")


def test_table(run):
    lines = onnx_table(run[1])
    header = [cell.strip() for cell in lines[0].strip("|").split("|")]
    assert header == ["model", "runs in", "MB", "largest difference", "ms, 5 tokens", "ms, 32 tokens", "accuracy"]
    cells = [dict(zip(header, (cell.strip() for cell in line.strip("|").split("|")))) for line in lines[2:]]
    assert [row["runs in"] for row in cells] == ["PyTorch", "onnxruntime", "onnxruntime int8"]
    assert cells[0]["largest difference"] == "" and float(cells[1]["largest difference"]) < 1e-4
    assert float(cells[2]["MB"]) == round(float(run[1][2]["megabytes"]), 1)
    # An encoder has no accuracy, and a short model no time for long texts.
    encoder = [{name: value for name, value in row.items() if not name.startswith("eval")} for row in run[1]]
    assert onnx_table([*encoder, run[1][0] | {"milliseconds_32": ""}])[2].endswith("|  |")
