"""scripts/demo_app.py: where attention looks, against loops over pairs of tokens; the page, in a real browser.

python -m pytest tests/test_demo_app.py

The page needs gradio and playwright in the environment that runs the test, and a Chromium:

    .cache/demo/bin/pip install --editable '.[demo]' pytest playwright && apt-get install chromium
    .cache/demo/bin/python -m pytest tests/test_demo_app.py

With LINFORMER_DEMO_SCREENSHOT=results/figures/demo.png, and demo/ from `make demo`, it takes the README's picture.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from datasets import load_dataset
from transformers import AutoTokenizer

import demo_app
from common import UserError
from demo_app import MEAN, load_demo
from hf_linformer import LinformerForSequenceClassification
from hf_linformer.modeling_linformer import segment_bounds
from tiny import save_classifier


ROOT = Path(__file__).resolve().parent.parent
LABELS = ["1790-1860", "1861-1912", "1913-1945"]
TEXT = "Our farmers – all of them – ask for canals to carry their corn 🌽 to market."
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def speech() -> str:
    """A passage of about 1,000 tokens."""
    return load_dataset("parquet", data_files=str(ROOT / "data/sotu/dev.parquet"), split="train")[3]["text"]


def saved(folder: Path, **changes) -> Path:
    """A Linformer with random weights that are large enough to tell texts apart, cut at 24 tokens."""
    return save_classifier(folder, LABELS, **{"classifier_pooling": "mean", "initializer_range": 0.5, **changes})


# What is computed


def literal_attention(demo, text: str, w: int) -> torch.Tensor:
    """What each token receives from each, a pair at a time, of segment means with a window: (H, N)"""
    inputs = demo.classifier.tokenizer(text, truncation=True, max_length=24, return_tensors="pt")
    with torch.no_grad():
        probabilities = demo.eager(**inputs, output_attentions=True).attentions[0][0]
    H, N, _ = probabilities.shape
    k = demo.config.projected_length
    start, end = (bound[0, 0].tolist() for bound in segment_bounds(torch.tensor([N]), torch.tensor([[k]]), k))
    received = torch.zeros(H, N)
    for query in range(N):
        for slot in range(k):
            for token in range(start[slot], end[slot]):
                received[:, token] += probabilities[:, query, slot] / (end[slot] - start[slot])
        if w:
            received[:, 0] += probabilities[:, query, k]
            for column in range(3 * w):
                token = (query // w - 1) * w + column
                if 0 <= token < N:
                    received[:, token] += probabilities[:, query, k + 1 + column]
    return received / N


@pytest.mark.parametrize("w", [0, 3, 5])
@pytest.mark.parametrize("text", [TEXT, "Canals."], ids=["long", "short"])
def test_attention_is_that_of_a_loop_over_pairs(w, text, tmp_path):
    demo = load_demo(str(saved(tmp_path, local_window=w)))
    _, _, _, reading = demo.read(text)
    assert torch.allclose(reading.received[0], literal_attention(demo, text, w), atol=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {"projection_type": "linear"},
        {"projection_type": "linear", "projection_sharing": "none", "local_window": 3},
        {"projection_type": "linear", "exact_short_sequences": True},
        {"projection_type": "convolution"},
        {"projection_type": "max_pool", "projection_sharing": "none", "projected_length": [[8, 5]]},
        {"slot_projections": True, "local_window": 3},
        {"local_position_bias": True, "local_window": 3},
    ],
    ids=str,
)
def test_no_attention_is_lost_whatever_the_projection(changes, tmp_path):
    demo = load_demo(str(saved(tmp_path, **changes)))
    for text in (TEXT, "Canals."):
        _, _, _, reading = demo.read(text)
        for values in (reading.received, reading.kinds):
            assert torch.allclose(values.sum(dim=-1), torch.ones(1, 2), atol=1e-5)


def test_the_twin_is_the_model_with_a_slot_for_every_token(tmp_path):
    demo = load_demo(str(saved(tmp_path, local_window=3)))
    own = LinformerForSequenceClassification.from_pretrained(
        tmp_path, projected_length=32, local_window=0, projection_type="mean_pool"
    )
    batch = AutoTokenizer.from_pretrained(tmp_path)(TEXT, truncation=True, return_tensors="pt")
    with torch.no_grad():
        expected, compressed = own.eval()(**batch).logits, demo.model(**batch).logits
        assert torch.allclose(demo.twin(**batch).logits, expected, atol=1e-6)
        assert not torch.allclose(compressed, expected, atol=1e-3)
    short = demo.classifier.tokenizer("Canals.", return_tensors="pt")
    with torch.no_grad():
        assert torch.allclose(demo.twin(**short).logits, demo.model(**short).logits, atol=1e-5)


def test_pieces_are_the_text_again_and_colours_are_on_the_scale_of_the_words(tmp_path):
    demo = load_demo(str(saved(tmp_path, max_position_embeddings=64)))
    demo.classifier = demo.classifier._replace(max_length=64)
    note, _, _, reading = demo.read(TEXT)
    assert "all of which are read" in note
    assert reading.pieces[0] == "<s>" and reading.pieces[-1] == "</s>"
    assert "".join(reading.pieces[1:-1]) == TEXT
    colours, _ = demo.colour(reading, MEAN, MEAN)
    assert [piece for piece, _ in colours] == reading.pieces
    strengths = [strength for _, strength in colours[1:-1]]
    assert min(strengths) == 0 and max(strengths) == 1
    by_head = [demo.colour(reading, 0, head)[0] for head in (0, 1)]
    assert by_head[0] != by_head[1]


def test_a_cut_text_and_an_empty_one_say_so(tmp_path):
    demo = load_demo(str(saved(tmp_path)))
    length = len(demo.classifier.tokenizer(TEXT * 4, verbose=False)["input_ids"])
    note, *_, reading = demo.read(TEXT * 4)
    assert f"{length} tokens, of which the model reads 24: {1 - 24 / length:.0%} of it is cut" in note
    assert len(reading.pieces) == 24
    note, answer, table, reading = demo.read(" \n ")
    assert "There is no text" in note and answer is None and reading is None
    assert demo.colour(reading, MEAN, MEAN) == ([], "")


def test_answers_of_other_kinds_of_models(tmp_path):
    torch.manual_seed(0)
    model = LinformerForSequenceClassification.from_pretrained(saved(tmp_path)).eval()
    for problem_type in ("multi_label_classification", "regression"):
        model.config.problem_type = problem_type
        model.save_pretrained(tmp_path)
        demo = load_demo(str(tmp_path))
        _, answer, _, _ = demo.read("Canals.")
        with torch.no_grad():
            logits = model(**demo.classifier.tokenizer("Canals.", return_tensors="pt")).logits[0]
        if problem_type == "regression":
            assert answer == ", ".join(f"{value:.3f}" for value in logits.tolist())
        else:
            assert answer == pytest.approx(dict(zip(LABELS, logits.sigmoid().tolist())), abs=1e-5)


def test_what_cannot_be_shown_is_refused(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="cannot load the model .*nowhere.*`make demo` trains one in demo/"):
        load_demo(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="--server_port must lie between 1 and 65535, not 0"):
        demo_app.main(["--server_port", "0"])
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(UserError, match="gradio.*pip install --editable"):
        demo_app.main(["--model_name_or_path", str(tmp_path)])


# The page


@contextlib.contextmanager
def served(model: Path) -> Iterator[str]:
    """The address of the page, in a process of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(ROOT / "scripts" / "demo_app.py"), "--model_name_or_path", str(model)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "GRADIO_ANALYTICS_ENABLED": "True"}
    app = subprocess.Popen(
        [*command, "--server_port", str(port)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 120
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            assert app.poll() is None, app.stderr.read()
            assert time.monotonic() < deadline, "the page was not served within two minutes"
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        app.terminate()
        app.wait(timeout=30)


@pytest.fixture(scope="module")
def browser():
    pytest.importorskip("gradio", reason="the page is drawn by gradio: pip install '.[demo]', in its own environment")
    driver = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser: pip install playwright")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium to open the page in: apt-get install chromium")
    with driver.sync_playwright() as playwright:
        # In a container the tests run as root, where Chromium has no sandbox.
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


COLOURS = "() => [...document.querySelectorAll('#attention .token')].map(token => token.style.backgroundColor)"


def ask(page, text: str) -> None:
    page.locator("#text textarea").fill(text)
    page.locator("#classify").click()


def test_the_page_in_a_browser(browser, tmp_path):
    folder = saved(tmp_path, hidden_size=64, initializer_range=0.1, max_position_embeddings=200, local_window=8)
    tokenizer = AutoTokenizer.from_pretrained(folder, model_max_length=200)
    tokenizer.save_pretrained(folder)
    text = speech()
    model = LinformerForSequenceClassification.from_pretrained(folder).eval()
    batch = tokenizer(text, truncation=True, return_tensors="pt")
    with torch.no_grad():
        expected = LABELS[int(model(**batch).logits.argmax())]
    pieces = load_demo(str(folder)).read(text)[3].pieces

    asked: list[str] = []
    with served(folder) as address:
        page = browser.new_page(viewport={"width": 1200, "height": 1200})
        page.set_default_timeout(60_000)
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)
        ask(page, text)
        page.locator("#attention .token").first.wait_for()
        assert expected in page.locator("#answer").inner_text()
        assert "of which the model reads 200" in page.locator("#note").inner_text()
        table = page.locator("#table").inner_text()
        assert "this Linformer" in table and "its softmax twin" in table and " ms" in table
        assert page.locator("#attention .token .text").all_text_contents() == pieces
        assert "to slots" in page.locator("#kinds").inner_text()

        of_all_heads = page.evaluate(COLOURS)
        assert len(set(of_all_heads)) > 10
        page.locator("#head input").click()
        page.get_by_role("option", name="head 2").click()
        page.wait_for_function(f"before => String(({COLOURS})()) !== String(before)", arg=of_all_heads)

        ask(page, "   ")
        page.get_by_text("There is no text").wait_for()
        assert expected not in page.locator("#answer").inner_text()
        page.close()
    elsewhere = [url for url in asked if not url.startswith((address, "data:", "blob:"))]
    assert not elsewhere, "the page asks nobody but its own server"


@pytest.mark.skipif("LINFORMER_DEMO_SCREENSHOT" not in os.environ, reason="LINFORMER_DEMO_SCREENSHOT names no file")
def test_takes_the_picture_of_the_readme(browser):
    with served(Path("demo")) as address:
        page = browser.new_page(viewport={"width": 1200, "height": 1000})
        page.set_default_timeout(120_000)
        page.goto(address)
        ask(page, speech())
        page.locator("#attention .token").first.wait_for()
        # The text is longer than the picture.
        page.screenshot(path=os.environ["LINFORMER_DEMO_SCREENSHOT"])
        page.close()
    assert Path(os.environ["LINFORMER_DEMO_SCREENSHOT"]).stat().st_size < 300_000
