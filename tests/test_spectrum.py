"""scripts/spectrum.py, scripts/approximations.py and scripts/plot_spectrum.py, on tiny BERTs with random weights."""

import csv
import math
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    RobertaConfig,
    RobertaModel,
    RoFormerConfig,
    RoFormerModel,
)

import approximations
import plot_spectrum
import spectrum
from approximations import AttentionHeads, attend_to_slots, bound_epsilon, methods_with, relative_error
from common import UserError, append_results
from hf_linformer import LinformerConfig, LinformerModel


ROOT = Path(__file__).resolve().parent.parent
N = 32
SIZES = {
    "vocab_size": 32768,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 40,
    "initializer_range": 0.5,
    "attn_implementation": "eager",
}


def save(model, folder: Path) -> Path:
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(ROOT / "tokenizer").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    return save(BertModel(BertConfig(**SIZES)), tmp_path_factory.mktemp("spectrum") / "tiny")


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    """Twelve texts, of which ten have N tokens."""
    words = (ROOT / "README.md").read_text(encoding="utf-8").split()
    pieces = [" ".join(words[start : start + 40]) for start in range(0, 400, 40)] + ["too short", ""]
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    Dataset.from_dict({"text": pieces}).to_json(path)
    return path


@pytest.fixture
def heads() -> AttentionHeads:
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 3, N, 8)
    return AttentionHeads(query, key, value)


def run(saved: Path, texts: Path, *options: str) -> None:
    sizes = ["--num_windows", "2", "--num_train_windows", "3", "--max_train_steps", "3", "--local_window", "4"]
    where = ["--model_name_or_path", str(saved), "--train_file", str(texts)]
    spectrum.main([*where, "--max_length", str(N), *sizes, *options])


@pytest.fixture(scope="module")
def results(saved, texts, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("results") / "spectrum.csv"
    run(saved, texts, "--results_file", str(path), "--data_name", "readme")
    run(saved, texts, "--results_file", str(path), "--data_name", "readme", "--random_weights", "true")
    return path


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# Spectra


def test_ranks_of_known_spectra():
    equal, single = torch.ones(10), torch.tensor([3.0, 0, 0, 0])
    assert spectrum.effective_rank(torch.stack([equal, equal])).tolist() == pytest.approx([10, 10])
    assert spectrum.effective_rank(single).item() == pytest.approx(1)
    assert spectrum.cumulative(torch.tensor([4.0, 3, 2, 1])).tolist() == pytest.approx([0.4, 0.7, 0.9, 1])
    # Squares 81, 9, 6, 4: two values hold exactly 90 % of their sum, one holds 81 %.
    assert spectrum.energy_rank(torch.tensor([81.0, 9, 6, 4]).sqrt(), share=0.89).item() == 2
    assert spectrum.energy_rank(torch.tensor([81.0, 9, 6, 4]).sqrt(), share=0.91).item() == 3
    assert spectrum.energy_rank(single).item() == 1


def test_sum_rules_of_attention(heads):
    singular_values = torch.linalg.svdvals(heads.probabilities)
    # Rows sum to 1, so that P maps the vector of ones to itself.
    assert (singular_values[:, 0] >= 1).all()
    assert torch.allclose(singular_values.square().sum(-1), heads.probabilities.square().sum((-2, -1)))
    assert (spectrum.cumulative(singular_values)[:, -1] - 1).abs().max() < 1e-5


def test_shuffled_rows_hold_the_same_numbers(heads):
    shuffled = spectrum.shuffle_rows(heads.probabilities)
    assert torch.equal(shuffled.sort(-1).values, heads.probabilities.sort(-1).values)
    # Each row in an order of its own.
    orders = spectrum.shuffle_rows(torch.arange(float(N)).expand(N, N))
    assert len({tuple(order) for order in orders.tolist()}) == N


def test_curve_indices():
    assert spectrum.curve_indices(32) == [1, 2, 4, 8, 16, 24, 32]
    assert spectrum.curve_indices(24) == [1, 2, 4, 8, 16, 18, 24]


# Approximations


def test_best_attention_leaves_the_other_singular_values(heads):
    with_identity = AttentionHeads(heads.query, heads.key, torch.eye(N).expand(3, N, N))
    rest = torch.linalg.svdvals(heads.probabilities)[:, 5:].square().sum(-1).sqrt()
    error = (approximations.best_attention(with_identity, 5) - heads.probabilities).norm(dim=(-2, -1))
    assert torch.allclose(error, rest, rtol=1e-4)


def test_singular_vectors_where_the_svd_fails(heads, monkeypatch):
    expected = approximations.best_attention(heads, 5)

    def fail(*args, **kwargs):
        raise torch.linalg.LinAlgError("failed to converge")

    monkeypatch.setattr(torch.linalg, "svd", fail)
    again = AttentionHeads(heads.query, heads.key, heads.value)
    assert torch.allclose(approximations.best_attention(again, 5), expected, atol=1e-5)


def test_no_method_with_k_slots_beats_the_best_output(heads):
    for k in (2, 4):
        best = relative_error(approximations.best_output(heads, k), heads)
        assert (best > 0.01).all()
        for name, method in methods_with(4).items():
            if name not in ("best_output", "segment_means_window"):
                assert (relative_error(method(heads, k), heads) > best).all(), name
    # The output has rank d = 8.
    assert relative_error(approximations.best_output(heads, 8), heads).max() < 1e-5


def test_random_projection_is_right_in_the_mean_and_errs_as_the_formula_says(heads):
    k, draws = 8, 4000
    torch.manual_seed(1)
    drawn = torch.stack([approximations.theorem_1(heads, k) for _ in range(draws)])
    P, V = heads.probabilities, heads.value
    # For Gaussian R: E ||P R^T R V - P V||^2 = (||P||^2 ||V||^2 + ||P V||^2) / k.
    squares = [states.square().sum((-2, -1)) for states in (P, V, heads.output)]
    expected = (squares[0] * squares[1] + squares[2]) / k
    assert torch.allclose((drawn - heads.output).square().sum((-2, -1)).mean(0), expected, rtol=0.03)
    # The mean of so many draws errs by this much less.
    error_of_mean = (drawn.mean(0) - heads.output).square().sum((-2, -1))
    assert (error_of_mean < 1.5 * expected / draws).all()


@pytest.mark.parametrize("name", ["segment_means", "segment_means_log", "segment_means_window"])
def test_means_are_exact_with_a_slot_for_every_token(heads, name):
    method = methods_with(4)[name]
    assert relative_error(method(heads, N), heads).max() < 1e-5
    assert relative_error(method(heads, N // 2), heads).min() > 0.01


@pytest.mark.parametrize(["name", "local_window"], [("segment_means", 0), ("segment_means_window", 4)])
@pytest.mark.parametrize("length", [N, 27])
def test_means_are_what_the_model_computes(name, local_window, length):
    torch.manual_seed(0)
    sizes = {name: value for name, value in SIZES.items() if name != "attn_implementation"}
    config = LinformerConfig(**sizes, projection_type="mean_pool", projected_length=8, local_window=local_window)
    model = LinformerModel(config).eval()
    attention = next(module for module in model.modules() if type(module).__name__ == "LinformerSelfAttention")
    seen = {}
    attention.register_forward_pre_hook(lambda _, inputs: seen.update(states=inputs[0]))
    attention.output.register_forward_pre_hook(lambda _, inputs: seen.update(context=inputs[0]))
    with torch.no_grad():
        model(torch.randint(5, 1000, (1, length)))
        linears = (attention.query, attention.key, attention.value)
        query, key, value = (spectrum.split_heads(linear(seen["states"]), 2) for linear in linears)
        found = methods_with(local_window)[name](AttentionHeads(query / math.sqrt(8), key, value), 8)
    assert torch.allclose(found, spectrum.split_heads(seen["context"], 2), atol=1e-5)


def test_theorem_2_gives_every_query_nearly_the_same():
    torch.manual_seed(0)
    heads = AttentionHeads(*torch.randn(3, 1, 2048, 8))
    for method, same in ((approximations.theorem_2, True), (approximations.random_slots, False)):
        output = method(heads, 8)
        differences = output - output.mean(dim=-2, keepdim=True)
        assert (differences.norm() < 0.05 * output.norm()) == same


def test_theorem_2_as_its_proof_writes_it(heads):
    torch.manual_seed(3)
    found = approximations.theorem_2(heads, 4)
    torch.manual_seed(3)
    R = torch.randn(4, N) / 2
    E, F = R / N, math.exp(-1 / N) * R
    for head in range(3):
        weights = (heads.query[head] @ (E @ heads.key[head]).T).exp()
        expected = weights @ (F @ heads.value[head]) / weights.sum(-1, keepdim=True)
        assert torch.allclose(found[head], expected, atol=1e-5)


def test_log_of_the_size_lets_a_mean_stand_for_its_tokens(heads):
    E, start, end = approximations.mean_pool(5, N)
    slot = torch.repeat_interleave(torch.arange(5), end - start)
    # Full attention, every key and value replaced by the mean of its segment.
    expected = approximations.attend(heads.query, (E @ heads.key)[:, slot], (E @ heads.value)[:, slot])
    assert torch.allclose(approximations.pooled_log(heads, 5), expected, atol=1e-5)


def test_learning_lowers_the_error_of_segment_means(heads):
    start = approximations.mean_pool(8, N)[0]
    torch.manual_seed(0)
    learned = approximations.learn_projection([heads], 8, steps=50, learning_rate=5e-3)
    before, after = (relative_error(attend_to_slots(heads, E), heads).mean() for E in (start, learned))
    assert after < 0.9 * before
    assert not learned.requires_grad


def test_bound_of_theorem_1():
    epsilon = bound_epsilon(256, 512)
    assert epsilon is not None and 0 < epsilon < 2 / 3
    assert 5 * math.log(512) / (epsilon**2 - epsilon**3) == pytest.approx(256)
    # 5 * 27/4 * ln(512) = 210.5
    assert bound_epsilon(210, 512) is None and bound_epsilon(211, 512) == pytest.approx(2 / 3, abs=0.05)


def test_columns_in_bound(heads):
    output = heads.output.clone()
    output[:, :, :2] *= 1.5
    assert approximations.columns_in_bound(output, heads, 0.49).tolist() == [0.75] * 3
    assert approximations.columns_in_bound(output, heads, 0.51).tolist() == [1] * 3


def test_norm_error_is_relative_to_the_norms(heads):
    zero = torch.zeros_like(heads.output)
    assert relative_error(zero, heads).tolist() == pytest.approx([1] * 3)
    for head in range(3):
        norms = heads.probabilities[head].norm() * heads.value[head].norm()
        assert approximations.norm_error(zero, heads)[head] == pytest.approx(
            (heads.output[head].norm() / norms).item()
        )


# Models and texts


@pytest.mark.parametrize("kind", [(BertModel, BertConfig), (RobertaModel, RobertaConfig)])
def test_heads_reproduce_the_model(kind):
    torch.manual_seed(0)
    model = kind[0](kind[1](**SIZES)).eval()
    contexts = []
    for layer in model.encoder.layer:
        layer.attention.output.dense.register_forward_pre_hook(lambda _, inputs: contexts.append(inputs[0]))
    layers = spectrum.read_heads(model, torch.randint(5, 1000, (1, N)))
    assert len(layers) == len(contexts) == 2
    for heads, context in zip(layers, contexts):
        assert torch.allclose(heads.output, spectrum.split_heads(context, 2), atol=1e-5)
    # The library has hooks of its own, but none on a linear.
    assert not any(module._forward_hooks for module in model.modules() if isinstance(module, torch.nn.Linear))


def test_pieces_are_drawn_from_anywhere_and_from_the_start_of_a_word():
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tokenizer")
    dataset = Dataset.from_dict({"text": [" ".join(f"w{number:05}" for number in range(3000))] * 3 + ["short"]})
    pieces = spectrum.draw_pieces(dataset, "text", tokenizer, 16, 3, seed=1)
    assert all(piece[0] == "w" and piece[1:6].isdecimal() for piece in pieces) and len(set(pieces)) == 3
    assert pieces == spectrum.draw_pieces(dataset, "text", tokenizer, 16, 3, seed=1)
    assert pieces != spectrum.draw_pieces(dataset, "text", tokenizer, 16, 3, seed=2)
    with pytest.raises(UserError, match="3 of 4 texts have 16 tokens, and 4 are needed"):
        spectrum.draw_pieces(dataset, "text", tokenizer, 16, 4, seed=1)


def test_bad_input_is_refused(saved, texts, tmp_path):
    with pytest.raises(UserError, match=r"--measures has \['rank'\], must be of"):
        run(saved, texts, "--measures", "rank")
    with pytest.raises(UserError, match="--max_length is 20, must be a multiple of 8"):
        run(saved, texts, "--max_length", "20")
    with pytest.raises(UserError, match="--max_length is 48, but .* reads 40 tokens at most"):
        run(saved, texts, "--max_length", "48")
    with pytest.raises(UserError, match="--num_windows is 0, must be 1 or more"):
        run(saved, texts, "--num_windows", "0")
    with pytest.raises(UserError, match="10 of 12 texts have 32 tokens, and 23 are needed"):
        run(saved, texts, "--num_windows", "20")
    with pytest.raises(UserError, match="no column 'words'"):
        run(saved, texts, "--text_column", "words")
    with pytest.raises(UserError, match="either --train_file or --dataset_name, got both"):
        run(saved, texts, "--dataset_name", str(ROOT / "data" / "sotu"))
    with pytest.raises(UserError, match="cannot load the model .*nowhere"):
        run(tmp_path / "nowhere", texts)


def test_other_architectures_are_refused(texts, tmp_path):
    linformer = {name: SIZES[name] for name in SIZES if name != "attn_implementation"} | {"projected_length": 8}
    save(LinformerModel(LinformerConfig(**linformer)), tmp_path / "linformer")
    with pytest.raises(UserError, match="is a Linformer, whose attentions are N x k"):
        run(tmp_path / "linformer", texts)
    sizes = {"vocab_size": 32768, "dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 16}
    save(DistilBertModel(DistilBertConfig(**sizes)), tmp_path / "distilbert")
    with pytest.raises(UserError, match="DistilBertModel is no model of which `error` can be measured"):
        run(tmp_path / "distilbert", texts, "--measures", "error")
    # Has the linears, but turns queries and keys by their positions before they meet.
    save(RoFormerModel(RoFormerConfig(**SIZES)), tmp_path / "roformer")
    with pytest.raises(UserError, match="RoFormerModel is no model of which `error` can be measured"):
        run(tmp_path / "roformer", texts, "--measures", "error")


def test_spectra_of_other_architectures(texts, tmp_path):
    sizes = {"vocab_size": 32768, "dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 16}
    save(DistilBertModel(DistilBertConfig(**sizes)), tmp_path / "distilbert")
    run(tmp_path / "distilbert", texts, "--measures", "spectrum", "--results_file", str(tmp_path / "results.csv"))
    assert {row["layer"] for row in read(tmp_path / "results.csv")} == {"", "1"}


# Results and figures


def test_rows(results):
    rows = read(results)
    keys = [tuple(row[name] for name in ("weights", "measure", "n", "layer", "head", "method", "k")) for row in rows]
    assert len(set(keys)) == len(keys)
    assert {row["weights"] for row in rows} == {"trained", "random"}
    assert {(row["model"], row["data"], row["texts"]) for row in rows} == {("tiny", "readme", "2")}
    rows = [row for row in rows if row["weights"] == "trained"]

    def values(**wanted: str) -> list[float]:
        return [float(row["value"]) for row in plot_spectrum.select(rows, **wanted)]

    assert values(measure="cumulative", k=str(N)) == pytest.approx([1] * 4)
    of_heads = [row for row in rows if row["head"]]
    assert {(row["layer"], row["head"], row["k"]) for row in of_heads} == {
        (layer, head, "8") for layer in "12" for head in "12"
    }
    by_layer = values(measure="effective_rank", n=str(N), method="attention")
    assert by_layer[0] == pytest.approx(sum(by_layer[1:]) / 2, rel=1e-4) and 1 < by_layer[0] < N
    assert {row["n"] for row in rows if row["measure"] == "effective_rank"} == {"4", "8", "16", "32"}
    assert {row["k"] for row in rows if row["method"] == "segment_means"} == {"4", "8", "16", "32"}
    assert values(measure="relative_error", method="segment_means", k=str(N)) == pytest.approx([0], abs=1e-5)
    assert values(measure="relative_error", method="zero") == pytest.approx([1])
    assert all(row["value"] not in ("", "nan") for row in rows)


def test_e_is_learned_on_other_texts_than_it_is_judged_on(saved, texts, monkeypatch):
    seen = {}

    def measure(model, windows, train_windows, arguments):
        seen.update(judged={tuple(window[0].tolist()) for window in windows})
        seen.update(learned={tuple(window[0].tolist()) for window in train_windows})
        return [spectrum.summary(torch.zeros(1), measure="relative_error", layer="")]

    monkeypatch.setattr(spectrum, "measure_error", measure)
    run(saved, texts)
    assert len(seen["judged"]) == 2 and len(seen["learned"]) == 3 and not seen["judged"] & seen["learned"]
    assert all(len(window) == N for window in seen["judged"] | seen["learned"])


def test_the_same_seed_gives_the_same_rows(saved, texts, tmp_path):
    for name in ("first.csv", "second.csv"):
        run(saved, texts, "--results_file", str(tmp_path / name), "--measures", "error", "--seed", "3")
    first, second = (
        [(row["measure"], row["method"], row["k"], row["layer"], row["value"]) for row in read(tmp_path / name)]
        for name in ("first.csv", "second.csv")
    )
    assert first == second


def test_figures_and_table(results, tmp_path, capsys):
    options = ["--results_file", str(results), "--output_dir", str(tmp_path)]
    plot_spectrum.main(options)
    figures = sorted(tmp_path.iterdir())
    assert [path.name for path in figures] == [f"spectrum_tiny_{kind}.png" for kind in ("curves", "error", "rank")]
    assert all(path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000 for path in figures)
    with pytest.raises(UserError, match="spectrum_tiny_curves.png.*exist; give --overwrite_output_dir true"):
        plot_spectrum.main(options)
    plot_spectrum.main([*options, "--overwrite_output_dir", "true"])

    rows = plot_spectrum.read_rows(str(results))
    header, _, trained, untrained = plot_spectrum.spectrum_table(rows)
    assert trained.startswith("| tiny | readme, n = 32 |") and untrained.startswith("| tiny, random weights |")
    column = header.split(" | ").index("error: segment means")
    (row,) = plot_spectrum.select(
        rows, weights="trained", measure="relative_error", method="segment_means", k="8", layer=""
    )
    assert trained.split(" | ")[column] == f"{float(row['value']):.2f}"


def test_curves_average_runs():
    rows = [{"k": "8", "value": "1"}, {"k": "16", "value": "5"}, {"k": "8", "value": "2"}]
    assert plot_spectrum.curve(rows, "k") == ([8, 16], [1.5, 5])


def test_unusable_results_are_refused(tmp_path):
    other = tmp_path / "other.csv"
    other.write_text("model,value\nbert,1\n")
    with pytest.raises(UserError, match="has no columns .*'measure'"):
        plot_spectrum.main(["--results_file", str(other), "--output_dir", str(tmp_path)])
    with pytest.raises(UserError, match="cannot read --results_file .*nowhere.csv"):
        plot_spectrum.main(["--results_file", str(tmp_path / "nowhere.csv"), "--output_dir", str(tmp_path)])


def test_rows_are_appended_together(tmp_path):
    path = tmp_path / "results.csv"
    append_results(path, [{"k": 1, "value": 0.5}, {"k": 2, "method": "a"}], seed=7, argv=["--x", "1"])
    append_results(path, [], seed=7, argv=[])
    append_results(path, [{"k": 3, "layer": 4}], seed=8, argv=[])
    rows = read(path)
    assert [row["k"] for row in rows] == ["1", "2", "3"] and [row["seed"] for row in rows] == ["7", "7", "8"]
    assert list(rows[0])[-4:] == ["k", "value", "method", "layer"]
    assert rows[1]["method"] == "a" and rows[0]["method"] == "" and rows[0]["command"].endswith("--x 1")
