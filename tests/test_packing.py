"""scripts/packing.py: blocks hold every token once, streams go on where they were, masks are their blocks' own."""

import json
import random
from collections import defaultdict
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset, Features, Value
from datasets.distributed import split_dataset_by_node
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from common import TextArguments, UserError, load_texts
from packing import (
    Blocks,
    BlockStream,
    Frame,
    MaskingCollator,
    PackedBlocks,
    StreamedBlocks,
    encode,
    tokenize_documents,
)
from tiny import WORDS, tiny_tokenizer


ROOT = Path(__file__).resolve().parent.parent
# Words of each document: none, a few, and more than many blocks; -1 is white space, None is no text at all.
WORD_COUNTS = [3, 0, 1, 50, None, 7, 1, 1, 12, -1, 140, 2, 9, 31]


@pytest.fixture(params=[0, 1], ids=["bert", "roberta"])
def tokenizer(request) -> PreTrainedTokenizerFast:
    return tiny_tokenizer(request.param)


def make_texts(counts: list[int | None], seed: int = 0) -> list[str | None]:
    generator = random.Random(seed)
    texts = {-1: " \n\t ", 0: "", None: None}
    return [texts[words] if words in texts else " ".join(generator.choices(WORDS, k=words)) for words in counts]


def literal_tokens(texts: list[str | None], tokenizer: PreTrainedTokenizerFast) -> list[tuple[int, int]]:
    """Each token with the number of its document, a separator after each document."""
    tokens = []
    for number, text in enumerate(texts):
        words = (text or "").split()
        ids = [tokenizer.convert_tokens_to_ids(word) for word in words] + [tokenizer.sep_token_id] * bool(words)
        tokens += [(token, number) for token in ids]
    return tokens


def literal_blocks(tokens: list[tuple[int, int]], tokenizer: PreTrainedTokenizerFast, length: int) -> list[tuple]:
    """The tokens of each block, and its first and last document; tokens that fill no block are left out."""
    first, _, last = tokenizer("the")["input_ids"]
    blocks = []
    while len(tokens) >= length - 2:
        inside, tokens = tokens[: length - 2], tokens[length - 2 :]
        blocks.append(([first, *(token for token, _ in inside), last], (inside[0][1], inside[-1][1])))
    return blocks


def data_set(texts: list[str | None]) -> Dataset:
    return Dataset.from_dict({"text": texts}, features=Features({"text": Value("string")}))


def pack(texts: list[str | None], tokenizer: PreTrainedTokenizerFast, length: int) -> PackedBlocks:
    documents = tokenize_documents(data_set(texts), tokenizer, None, "")
    return PackedBlocks(documents, length, Frame.of(tokenizer))


def plain(block: dict[str, Any]) -> tuple:
    """What is to be the same, as Python's own numbers."""
    return [int(token) for token in block["input_ids"]], tuple(block["documents"]), tuple(block["key"])


# Blocks of documents that are all at hand


@pytest.mark.parametrize("length", [8, 11, 32, 64])
def test_blocks_hold_every_token_once_and_in_order(length, tokenizer):
    texts = make_texts(WORD_COUNTS)
    tokens = literal_tokens(texts, tokenizer)
    # A document of 140 words is longer than what the tokenizer says a model takes.
    assert len(tokens) == sum(max(words or 0, 0) + 1 for words in WORD_COUNTS) - 3 > 10 * tokenizer.model_max_length
    blocks = pack(texts, tokenizer, length)
    expected = literal_blocks(tokens, tokenizer, length)
    assert [plain(blocks[index])[:2] for index in range(len(blocks))] == expected
    assert len(tokens) - (length - 2) < len(blocks) * (length - 2) <= len(tokens) == blocks.num_tokens


def test_a_last_block_that_is_just_full_is_kept(tokenizer):
    for words, number in [(4, 0), (5, 1), (6, 1), (10, 1), (11, 2)]:
        assert len(pack(make_texts([words]), tokenizer, 8)) == number


@pytest.mark.parametrize("counts", [[0], [None, None], [-1, 0]])
def test_documents_without_a_word_make_no_block(counts, tokenizer):
    blocks = pack(make_texts(counts), tokenizer, 8)
    assert (len(blocks), blocks.num_tokens) == (0, 0)


def test_rows_that_were_drawn_are_packed_as_drawn(tokenizer):
    """A data set that was divided or shuffled keeps its old table and an order beside it."""
    texts = make_texts(WORD_COUNTS)
    order = [10, 3, 5, 1, 0, 13]
    drawn = data_set(texts).select(order)
    blocks = PackedBlocks(tokenize_documents(drawn, tokenizer, None, ""), 16, Frame.of(tokenizer))
    expected = literal_blocks(literal_tokens([texts[row] for row in order], tokenizer), tokenizer, 16)
    assert [plain(blocks[index])[0] for index in range(len(blocks))] == [ids for ids, _ in expected]


def test_processes_that_tokenize_change_nothing(tokenizer):
    # More documents than are tokenized at once.
    texts = data_set(make_texts(WORD_COUNTS * 10))
    alone, together = (tokenize_documents(texts, tokenizer, workers, "")[:] for workers in (None, 2))
    assert alone == together
    assert alone["document"] == [row for row, words in enumerate(WORD_COUNTS * 10) if (words or 0) > 0]


def test_a_tokenizer_that_cuts_and_pads_is_not_let(tokenizer):
    tokenizer.backend_tokenizer.enable_truncation(6)
    tokenizer.backend_tokenizer.enable_padding(length=9, pad_id=tokenizer.pad_token_id)
    texts = ["the of and to in a that for be", "the"]
    assert encode(tokenizer, texts) == [[tokenizer.convert_tokens_to_ids(word) for word in t.split()] for t in texts]


def test_the_tokenizer_of_this_repository():
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tokenizer")
    texts = [
        "Fellow-Citizens of the Senate",
        "Among the vicissitudes incident to life\nno event",
        "né à Zürich",
    ] * 9
    blocks = pack(texts, tokenizer, 16)
    tokens = [id for text in texts for id in [*tokenizer(text)["input_ids"][1:-1], tokenizer.sep_token_id]]
    found = [blocks[index]["input_ids"] for index in range(len(blocks))]
    assert [id for ids in found for id in ids[1:-1]] == tokens[: len(blocks) * 14]
    assert {(ids[0], ids[-1]) for ids in found} == {(tokenizer.bos_token_id, tokenizer.eos_token_id)}


def test_keys_of_blocks_differ_and_say_the_epoch(tokenizer):
    blocks = pack(make_texts(WORD_COUNTS), tokenizer, 8)
    keys = []
    for blocks.epoch in range(3):
        keys += [blocks[index]["key"] for index in range(len(blocks))]
    assert len(set(keys)) == len(keys) == 3 * len(blocks)


# Special tokens


def special_tokenizer(**names: str) -> PreTrainedTokenizerFast:
    vocabulary = {token: index for index, token in enumerate([*names.values(), "unk", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="unk"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{f"{name}_token": t for name, t in names.items()})


def test_frames():
    names = {"bos": "<b>", "eos": "<e>", "cls": "<c>", "sep": "<s>", "mask": "<m>"}
    ids = {name: index for index, name in enumerate(names)}
    assert Frame.of(special_tokenizer(**names)) == (ids["cls"], ids["sep"])
    # A separator whose id is 0 is one all the same.
    assert Frame.of(special_tokenizer(sep="<s>", cls="<c>", mask="<m>")) == (1, 0)
    assert Frame.of(special_tokenizer(bos="<b>", eos="<e>", mask="<m>")) == (0, 1)


@pytest.mark.parametrize(
    "names", [{"cls": "<c>", "sep": "<s>"}, {"cls": "<c>", "mask": "<m>"}, {"eos": "<e>", "mask": "<m>"}, {}]
)
def test_a_tokenizer_without_the_special_tokens_is_refused(names):
    with pytest.raises(UserError, match="must have a mask token and special tokens around a text") as caught:
        Frame.of(special_tokenizer(**names))
    assert "\n" not in str(caught.value)


# Masks


def random_blocks(tokenizer: PreTrainedTokenizerFast, number: int, length: int, epoch: int = 0) -> list[dict]:
    """Words between special tokens, a few of which stand within too."""
    generator = torch.Generator().manual_seed(7)
    rows = torch.randint(5, 5 + len(WORDS), (number, length), generator=generator)
    rows[torch.rand(rows.shape, generator=generator) < 0.1] = tokenizer.sep_token_id
    rows[torch.rand(rows.shape, generator=generator) < 0.05] = tokenizer.unk_token_id
    rows[:, 0], rows[:, -1] = tokenizer.cls_token_id, tokenizer.sep_token_id
    return [
        {"input_ids": row.numpy().copy(), "documents": (index, index + 1), "key": (epoch, index)}
        for index, row in enumerate(rows)
    ]


def original(blocks: list[dict]) -> torch.Tensor:
    return torch.tensor([block["input_ids"].tolist() for block in blocks])


@pytest.mark.parametrize("rate", [0.15, 0.4])
def test_as_many_are_masked_as_is_asked_and_as_bert_does_it(rate, tokenizer):
    collate = MaskingCollator(tokenizer, rate, seed=3)
    before = original(random_blocks(tokenizer, 1500, 64))
    batch = collate(random_blocks(tokenizer, 1500, 64))
    is_word = ~torch.isin(before, torch.tensor(tokenizer.all_special_ids))
    chosen = batch["labels"] != -100
    # Some 80,000 words: of their shares the standard deviation is below 0.002.
    assert (chosen.sum() / is_word.sum()).item() == pytest.approx(rate, abs=0.008)
    assert not (chosen & ~is_word).any()
    assert torch.equal(batch["labels"][chosen], before[chosen])
    assert torch.equal(batch["input_ids"][~chosen], before[~chosen])

    # Any entry of the vocabulary may come in place of a word, the mask and the word itself too.
    by_chance = 0.1 / len(tokenizer)
    given = batch["input_ids"][chosen]
    is_mask, is_kept = given == tokenizer.mask_token_id, given == before[chosen]
    assert is_mask.float().mean().item() == pytest.approx(0.8 + by_chance, abs=0.02)
    assert is_kept.float().mean().item() == pytest.approx(0.1 + by_chance, abs=0.015)
    others = given[~is_mask & ~is_kept]
    assert len(others) / len(given) == pytest.approx(0.1 - 2 * by_chance, abs=0.015)
    assert len(others.unique()) == len(tokenizer) - 1


def test_special_tokens_are_never_asked_for(tokenizer):
    before = original(random_blocks(tokenizer, 50, 32))
    batch = MaskingCollator(tokenizer, 0.999, seed=0)(random_blocks(tokenizer, 50, 32))
    is_special = torch.isin(before, torch.tensor(tokenizer.all_special_ids))
    assert is_special[:, 1:-1].any()
    assert (batch["labels"][is_special] == -100).all()
    assert torch.equal(batch["input_ids"][is_special], before[is_special])
    assert (batch["labels"][~is_special] != -100).float().mean() > 0.98


def test_a_mask_is_of_the_block_the_epoch_and_the_seed_alone(tokenizer):
    def batch_of(rows: list[int], epoch: int = 0, seed: int = 0) -> dict[str, torch.Tensor]:
        blocks = random_blocks(tokenizer, 20, 32, epoch)
        return MaskingCollator(tokenizer, 0.3, seed)([blocks[row] for row in rows])

    whole = batch_of([*range(20)])
    for rows in ([7], [19, 7, 3], [3, 4, 5, 6, 7]):
        # What was drawn before, by others, is no matter.
        torch.rand(len(rows))
        batch = batch_of(rows)
        for name, values in batch.items():
            assert torch.equal(values, whole[name][rows]), name
    for other in (batch_of([*range(20)], epoch=1), batch_of([*range(20)], seed=1)):
        same_places = ((other["labels"] != -100) == (whole["labels"] != -100)).all(dim=-1)
        assert not same_places.any()
    # Not one mask laid over all blocks.
    places = {tuple(row) for row in (whole["labels"] != -100).tolist()}
    assert len(places) == 20


def test_what_else_a_batch_holds(tokenizer):
    blocks = random_blocks(tokenizer, 3, 10)
    before = original(blocks)
    batch = MaskingCollator(tokenizer, 0.5, seed=0)(blocks)
    assert set(batch) == {"input_ids", "attention_mask", "labels", "documents"}
    assert batch["attention_mask"].tolist() == [[1] * 10] * 3
    assert batch["documents"].tolist() == [[0, 1], [1, 2], [2, 3]]
    assert all(values.dtype == torch.int64 for values in batch.values())
    # The blocks that were given are as they were.
    assert torch.equal(original(blocks), before) and not torch.equal(batch["input_ids"], before)


# Blocks in batches


def rows_of(batches: Iterator[dict[str, torch.Tensor]]) -> list[tuple]:
    """Row by row, whatever batches they come in."""
    return [
        (ids, labels, tuple(documents))
        for batch in batches
        for ids, labels, documents in zip(*(batch[name].tolist() for name in ("input_ids", "labels", "documents")))
    ]


def in_batches(tokenizer: PreTrainedTokenizerFast, seed: int = 0, **options: int) -> Blocks:
    blocks = pack(make_texts(WORD_COUNTS), tokenizer, 12)
    return Blocks(Accelerator(cpu=True), blocks, MaskingCollator(tokenizer, 0.3, seed), **options)


def test_an_epoch_is_every_block_once_in_an_order_and_with_masks_of_its_own(tokenizer):
    data = in_batches(tokenizer, batch_size=4)
    blocks = pack(make_texts(WORD_COUNTS), tokenizer, 12)
    texts = [plain(blocks[index])[0] for index in range(len(blocks))]
    assert data.batches_per_epoch == -(-len(texts) // 4) and len(texts) % 4

    def unmasked(row: tuple) -> list[int]:
        return [label if label != -100 else id for id, label in zip(*row[:2])]

    epochs = [rows_of(data.batches(epoch, 0)) for epoch in (0, 1, 0)]
    assert epochs[0] == epochs[2]
    orders = [[texts.index(unmasked(row)) for row in epoch] for epoch in epochs]
    assert sorted(orders[0]) == sorted(orders[1]) == [*range(len(texts))]
    assert orders[0] != orders[1] and orders[0] != sorted(orders[0])
    masks = [{number: row[1] for number, row in zip(*both)} for both in zip(orders, epochs)]
    assert all(masks[0][number] != masks[1][number] for number in range(len(texts)))
    assert rows_of(in_batches(tokenizer, seed=1, batch_size=4).batches(0, 0)) != epochs[0]


@pytest.mark.parametrize("options", [{"batch_size": 7}, {"batch_size": 4, "num_workers": 2}], ids=["size", "workers"])
def test_rows_are_the_same_in_other_batches_and_of_other_processes(options, tokenizer):
    data, other = in_batches(tokenizer, batch_size=4), in_batches(tokenizer, **options)
    for epoch in (0, 2):
        assert rows_of(other.batches(epoch, 0)) == rows_of(data.batches(epoch, 0))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_goes_on_after_any_number_of_batches(workers, tokenizer):
    whole = [*in_batches(tokenizer, batch_size=4).batches(1, 0)]
    for skipped in range(len(whole)) if not workers else (1, len(whole) - 1):
        data = in_batches(tokenizer, batch_size=4, num_workers=workers)
        assert rows_of(data.batches(1, skipped)) == rows_of(whole[skipped:])


def test_names_of_documents(tokenizer):
    data = in_batches(tokenizer, batch_size=2)
    batch = {"documents": torch.tensor([[4, 4], [4, 9]])}
    assert data.names_of(batch) == ["document 4", "documents 4 to 9"]


# Streams


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("streams")


def write_files(folder: Path, counts: list[list[int | None]]) -> list[Path]:
    """A file for each list of numbers of words."""
    paths = []
    for number, words in enumerate(counts):
        name = "_".join(map(str, words))[:40]
        paths.append(folder / f"{number}_{name}.jsonl")
        texts = make_texts(words, seed=number)
        paths[-1].write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return paths


def texts_of(files: list[Path]) -> list[str | None]:
    return [json.loads(line)["text"] for path in files for line in path.open()]


def stream_of(
    files: list[Path],
    tokenizer: PreTrainedTokenizerFast,
    length: int = 12,
    seed: int = 0,
    window: int = 5,
    process: int = 0,
    processes: int = 1,
) -> BlockStream:
    documents = load_texts(TextArguments(train_file=[str(path) for path in files]), streaming=True)
    documents = split_dataset_by_node(documents, process, processes)
    return BlockStream(documents, tokenizer, length, seed, window, process)


def take(blocks: BlockStream, number: int) -> list[tuple]:
    return [plain(block) for block in islice(blocks, number)]


def through_json(state: dict) -> dict:
    return json.loads(json.dumps(state))


ONE_FILE = [WORD_COUNTS]
THREE_FILES = [WORD_COUNTS[:3], WORD_COUNTS[3:9], WORD_COUNTS[9:]]


@pytest.mark.parametrize("counts", [ONE_FILE, THREE_FILES], ids=["one_file", "three_files"])
@pytest.mark.parametrize("window", [1, 4, 100])
def test_windows_hold_the_text_again_and_again(window, counts, folder, tokenizer):
    files = write_files(folder, counts)
    texts = texts_of(files)
    number = 250 if window == 100 else 80
    taken = take(stream_of(files, tokenizer, window=window), number)

    windows = defaultdict(list)
    for ids, documents, key in taken:
        windows[key[:-1]].append((key[-1], ids, documents))
    # The last one may not have been given whole.
    windows.popitem()
    numbers = [[place for place, *_ in blocks] for blocks in windows.values()]
    assert all(sorted(places) == [*range(len(places))] for places in numbers)
    assert len(windows) > 1 and any(places != sorted(places) for places in numbers)

    # Read literally: whole documents until a window is full, what is left begins the next one.
    rest: list[tuple[int, int]] = []
    documents = cycle([literal_tokens([None] * row + [text], tokenizer) for row, text in enumerate(texts)])
    for blocks in windows.values():
        while len(rest) < window * 10:
            rest += next(documents)
        expected = literal_blocks(rest, tokenizer, 12)
        assert [(ids, spans) for _, ids, spans in sorted(blocks)] == expected
        rest = rest[10 * len(expected) :]
    # More than twice through.
    assert sum(map(len, windows.values())) * 10 > 2 * len(literal_tokens(texts, tokenizer))


def test_the_order_of_a_window_is_drawn_by_seed_window_and_process(folder):
    tokenizer = tiny_tokenizer(0)
    files = write_files(folder, [[200], [200]])

    def orders(**options: int) -> list[tuple]:
        """Of the first two windows, of 20 blocks each."""
        return [key[-1] for _, _, key in take(stream_of(files, tokenizer, window=20, **options), 40)]

    first = orders()
    assert first == orders() and sorted(first[:20]) == sorted(first[20:]) == [*range(20)]
    assert first[:20] != first[20:]
    assert first != orders(seed=1) and first != orders(process=1, processes=2)


@pytest.mark.parametrize("counts", [ONE_FILE, THREE_FILES], ids=["one_file", "three_files"])
@pytest.mark.parametrize("window", [1, 4, 30])
def test_a_stream_goes_on_after_any_block(window, counts, folder):
    """Stopped after every block, and after some more, also in the second and third pass."""
    tokenizer = tiny_tokenizer(0)
    files = write_files(folder, counts)
    # A pass has some 26 blocks.
    whole = take(stream_of(files, tokenizer, window=window), 64)
    assert whole[-1][-1][2] >= 1
    for step in (1, 23):
        found: list[tuple] = []
        state = None
        while len(found) < len(whole):
            stream = stream_of(files, tokenizer, window=window)
            if state is not None:
                stream.load_state_dict(state)
            found += take(stream, step)
            state = through_json(stream.state_dict())
        assert found[: len(whole)] == whole


def test_a_state_does_not_change_when_the_stream_goes_on(folder):
    stream = stream_of(write_files(folder, ONE_FILE), tiny_tokenizer(0))
    blocks = iter(stream)
    next(blocks)
    state = stream.state_dict()
    before = json.dumps(state)
    take(blocks, 30)
    assert json.dumps(state) == before != json.dumps(stream.state_dict())


FOUR_FILES = [[9, None, 30, 8], [50, 7, 11], [0, 12, 10, -1, 13], [6, 90]]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_goes_on_after_any_batch(workers, folder):
    tokenizer = tiny_tokenizer(1)
    files = write_files(folder, FOUR_FILES)

    def load() -> StreamedBlocks:
        collate = MaskingCollator(tokenizer, 0.3, seed=0)
        stream = stream_of(files, tokenizer, window=3)
        return StreamedBlocks(Accelerator(cpu=True), stream, collate, batch_size=3, num_workers=workers)

    # Several windows and passes of each of two workers.
    number = 24
    whole = [rows_of([batch]) for batch in islice(load().batches(0, 0), number)]
    assert len({json.dumps(rows) for rows in whole}) == number
    for step in (1, 5) if not workers else (5, 7):
        found: list[list[tuple]] = []
        state = None
        while len(found) < number:
            data = load()
            if state is not None:
                data.load_state_dict(state)
            found += [rows_of([batch]) for batch in islice(data.batches(0, len(found)), step)]
            state = through_json(data.state_dict())
        assert found[:number] == whole
    assert data.names_of({"documents": torch.tensor([[1, 2]])}) == ["documents 1 to 2"]


@pytest.mark.parametrize(
    "counts, processes, workers",
    [(ONE_FILE, 2, 0), (THREE_FILES, 2, 0), (FOUR_FILES, 2, 0), (FOUR_FILES, 1, 2), (FOUR_FILES, 2, 2)],
    ids=["rows_divided", "rows_of_files_divided", "files_divided", "workers", "processes_and_workers"],
)
def test_each_document_is_read_once_a_pass(counts, processes, workers, folder):
    tokenizer = tiny_tokenizer(0)
    files = write_files(folder, counts)
    expected = {tuple(text.split()) for text in texts_of(files) if text and text.strip()}
    # Those of one word may be the same; each other one is known by its words.
    of_one_word = sorted(words for words in expected if len(words) == 1)
    passes: list[list[tuple[str, ...]]] = []
    keys = []
    for process in range(processes):
        stream = stream_of(files, tokenizer, length=8, window=4, process=process, processes=processes)
        data = StreamedBlocks(Accelerator(cpu=True), stream, keep_blocks, batch_size=1, num_workers=workers)
        given = defaultdict(list)
        for block in islice(data.batches(0, 0), 400 if workers else 200):
            ids, _, key = plain(block)
            keys.append(key)
            given[key[:2]].append((key[2:], ids[1:-1]))
        assert len(given) == max(workers, 1)
        for blocks in given.values():
            whole_windows = [block for block in blocks if block[0][0] < blocks[-1][0][0]]
            text = " ".join(tokenizer.convert_ids_to_tokens([id for _, ids in sorted(whole_windows) for id in ids]))
            documents = [tuple(part.split()) for part in text.split("[SEP]")][:-1]
            # A pass has ended when its first document comes again.
            assert len(documents[0]) > 1
            size = documents.index(documents[0], 1)
            passes.append(documents[:size])
            assert len(documents) > 2 * size
            assert documents == [passes[-1][index % size] for index in range(len(documents))]
    found = sorted(words for documents in passes for words in documents)
    assert [words for words in found if len(words) > 1] == sorted(words for words in expected if len(words) > 1)
    assert {words for words in found if len(words) == 1} == set(of_one_word)
    assert len(found) == sum((words or 0) > 0 for file in counts for words in file)
    assert len(set(keys)) == len(keys)


def keep_blocks(blocks: list[dict]) -> dict:
    (block,) = blocks
    return block


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_without_text_is_refused(workers, folder):
    files = write_files(folder, [[0, -1, 0], [-1, None, 0]])
    data = StreamedBlocks(
        Accelerator(cpu=True), stream_of(files, tiny_tokenizer(0)), keep_blocks, batch_size=1, num_workers=workers
    )
    with pytest.raises(UserError, match="^there is no text in the stream of documents") as caught:
        next(data.batches(0, 0))
    assert "\n" not in str(caught.value)


def test_a_little_text_between_much_that_is_empty_is_found(folder):
    """Also where a stream goes on after its last text."""
    tokenizer = tiny_tokenizer(0)
    files = write_files(folder, [[0] * 50 + [30] + [0] * 50])
    whole = take(stream_of(files, tokenizer, window=1), 30)
    for given in (3, 4, 7):
        stream = stream_of(files, tokenizer, window=1)
        take(stream, given)
        other = stream_of(files, tokenizer, window=1)
        other.load_state_dict(through_json(stream.state_dict()))
        assert take(other, 30 - given) == whole[given:]


def test_a_stream_whose_text_is_gone_is_not_read_for_ever(folder):
    tokenizer = tiny_tokenizer(0)
    stream = stream_of(write_files(folder, [[40, 40]]), tokenizer, window=1)
    take(stream, 5)
    (blank,) = write_files(folder, [[0, 0]])
    other = stream_of([blank], tokenizer, window=1)
    other.load_state_dict(stream.state_dict())
    with pytest.raises(UserError, match="there is no text in the stream of documents"):
        take(other, 30)


def test_special_tokens_that_a_text_spells_are_text():
    tokenizer = tiny_tokenizer(0)
    (ids,) = encode(tokenizer, [f"the {tokenizer.mask_token} of {tokenizer.sep_token} it"])
    assert not {tokenizer.mask_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id} & set(ids)
