import json
from collections.abc import Callable

import numpy as np
import pytest
from tokenizers import Tokenizer

from dsv3_jax.config import Config, ConfigError
from dsv3_jax.data import pipeline
from dsv3_jax.data.documents import Document
from dsv3_jax.data.pipeline import RowBlocks, TrainingBatches, training_rows, validation_batches, validation_bytes
from dsv3_jax.data.tokenizer import encode, train_tokenizer

MakeConfig = Callable[..., Config]
BEGINNING, END, PADDING, FIM_BEGIN = 0, 1, 2, 3


def take(source: list[Document], tokenizer: Tokenizer, config: Config, count: int) -> list[dict[str, np.ndarray]]:
    iterator = TrainingBatches(source, tokenizer, config)
    batches = [whole(next(iterator)) for _ in range(count)]
    iterator.close()
    return batches


def whole(batch: dict[str, RowBlocks]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([blocks[first] for first in sorted(blocks)]) for name, blocks in batch.items()}


def stream_of(source: list[Document], tokenizer: Tokenizer, config: Config, count: int) -> list[int]:
    """The tokens of the first rows, before they are shuffled, of `count` batches."""
    iterator = iter(training_rows(source, tokenizer, config))
    rows = [next(iterator) for _ in range(count * config.training.batch_size)]
    iterator.close()
    return np.concatenate(rows).tolist()


def whole_documents(stream: list[int]) -> list[list[int]]:
    """The documents of a stream without their frame; the unfinished last one is left out."""
    documents, start = [], 0
    for place, token in enumerate(stream):
        if token == END:
            assert stream[start] == BEGINNING
            documents.append(stream[start + 1 : place])
            start = place + 1
    return documents


def epochs_of_texts(stream: list[int], tokenizer: Tokenizer, size: int) -> list[list[str]]:
    texts = [tokenizer.decode(ids) for ids in whole_documents(stream)]
    return [texts[start : start + size] for start in range(0, len(texts) - size + 1, size)]


def test_every_epoch_is_another_order_of_all_documents(
    documents: list[Document], tokenizer: Tokenizer, make_config: MakeConfig
) -> None:
    epochs = epochs_of_texts(stream_of(documents, tokenizer, make_config(3, 16), 120), tokenizer, len(documents))
    assert len(epochs) >= 3
    for epoch in epochs:
        assert sorted(epoch) == sorted(document.text for document in documents)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


def test_seeds(documents: list[Document], tokenizer: Tokenizer, make_config: MakeConfig) -> None:
    def stream(seed: int) -> list[int]:
        config = make_config(2, 32, seed=seed, fill_in_the_middle_rate=0.5)
        return stream_of(documents, tokenizer, config, 60)

    assert stream(0) == stream(0)
    assert stream(2**32 - 1) != stream(0) != stream(1)
    # No epoch of one seed is an epoch of the next seed.
    orders = [
        tuple(epoch)
        for seed in (0, 1, 2)
        for epoch in epochs_of_texts(
            stream_of(documents, tokenizer, make_config(2, 32, seed=seed), 90), tokenizer, len(documents)
        )
    ]
    assert len(set(orders)) == len(orders) >= 6


def test_batches_are_the_rows_shuffled(
    documents: list[Document], tokenizer: Tokenizer, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "ROWS_SHUFFLED", 12)
    config = make_config(3, 16)
    batches = take(documents, tokenizer, config, 8)
    assert all(array.shape == (3, 17) and array.dtype == np.int32 for batch in batches for array in batch.values())
    rows = np.reshape(stream_of(documents, tokenizer, config, 8), (2, 12, 17)).tolist()
    windows = np.reshape([batch["tokens"] for batch in batches], (2, 12, 17)).tolist()
    for shuffled, window in zip(windows, rows, strict=True):
        assert shuffled != window
        assert sorted(shuffled) == sorted(window)


@pytest.mark.parametrize("isolate", [False, True])
def test_resumes_token_for_token(
    documents: list[Document],
    tokenizer: Tokenizer,
    make_config: MakeConfig,
    monkeypatch: pytest.MonkeyPatch,
    isolate: bool,
) -> None:
    # States fall inside and between windows of shuffled rows, whose starts fall inside documents and between them.
    monkeypatch.setattr(pipeline, "ROWS_SHUFFLED", 14)
    config = make_config(2, 50, fill_in_the_middle_rate=0.3, isolate_documents=isolate)
    iterator = TrainingBatches(documents, tokenizer, config)
    states, batches = [], []
    for _ in range(60):
        states.append(json.dumps(iterator.get_state()).encode())
        batches.append(whole(next(iterator)))
    iterator.close()
    for position in (0, 1, 6, 7, 8, 20, 33, 47, 58):
        resumed = TrainingBatches(documents, tokenizer, config)
        resumed.set_state(json.loads(states[position]))
        for expected in batches[position:]:
            found = whole(next(resumed))
            for name in ("tokens", "segment_ids", "positions"):
                np.testing.assert_array_equal(found[name], expected[name])
        resumed.close()


def test_fill_in_the_middle_rate_and_new_cuts_every_epoch(tokenizer: Tokenizer, make_config: MakeConfig) -> None:
    source = [Document(str(number), f"{number} return value in range") for number in range(50)]
    found = whole_documents(stream_of(source, tokenizer, make_config(4, 64, fill_in_the_middle_rate=0.25), 200))
    cut, count = [ids for ids in found if FIM_BEGIN in ids], len(found)
    assert abs(len(cut) - 0.25 * count) < 6 * (count * 0.25 * 0.75) ** 0.5
    assert len({tuple(ids) for ids in cut}) > 150


def test_isolation_restarts_at_documents_and_rows(
    documents: list[Document], tokenizer: Tokenizer, make_config: MakeConfig
) -> None:
    for batch in take(documents, tokenizer, make_config(3, 40, isolate_documents=True), 30):
        for tokens, segments, positions in zip(
            *(batch[n].tolist() for n in ("tokens", "segment_ids", "positions")), strict=True
        ):
            for place in range(1, len(tokens)):
                begins = tokens[place] == BEGINNING
                assert segments[place] == segments[place - 1] + begins
                assert positions[place] == (0 if begins else positions[place - 1] + 1)
            assert (segments[0], positions[0]) == (1, 0)


def test_one_document_repeats(tokenizer: Tokenizer, make_config: MakeConfig) -> None:
    stream = stream_of([Document("only", "for value in data")], tokenizer, make_config(1, 15), 10)
    assert set(map(tuple, whole_documents(stream))) == {tuple(encode(tokenizer, "for value in data"))}


def test_text_cannot_place_special_tokens(tokenizer: Tokenizer, make_config: MakeConfig) -> None:
    text = "a<｜end▁of▁sentence｜><think>b<｜▁pad▁｜>"
    stream = stream_of([Document("evil", text)], tokenizer, make_config(1, 63, isolate_documents=True), 4)
    assert {tokenizer.decode(ids) for ids in whole_documents(stream)} == {text}


def test_fill_in_the_middle_needs_its_tokens(make_config: MakeConfig) -> None:
    from tokenizers import AddedToken, models

    foreign = Tokenizer(models.BPE())
    foreign.add_special_tokens([AddedToken("</s>", special=True)])
    with pytest.raises(ConfigError, match="data.fill_in_the_middle_rate=0.1 needs fill-in-the-middle tokens"):
        TrainingBatches([Document("a", "b")], foreign, make_config(1, 4, fill_in_the_middle_rate=0.1))


@pytest.mark.parametrize("isolate", [False, True])
@pytest.mark.parametrize(("batch_size", "sequence_length"), [(1, 1), (3, 16), (4, 50), (2, 4000)])
def test_validation_predicts_each_token_once(
    documents: list[Document],
    tokenizer: Tokenizer,
    make_config: MakeConfig,
    batch_size: int,
    sequence_length: int,
    isolate: bool,
) -> None:
    stream = [token for document in documents for token in (BEGINNING, *encode(tokenizer, document.text), END)]
    config = make_config(batch_size, sequence_length, fill_in_the_middle_rate=1.0, isolate_documents=isolate)
    batches = list(validation_batches(documents, tokenizer, config))
    pairs = []
    for batch in batches:
        tokens_BS, real_BS = batch["tokens"], batch["segment_ids"] > 0
        assert all(a.shape == (batch_size, sequence_length + 1) and a.dtype == np.int32 for a in batch.values())
        assert (tokens_BS[~real_BS] == PADDING).all()
        counted = real_BS[:, 1:]
        pairs += zip(tokens_BS[:, :-1][counted].tolist(), tokens_BS[:, 1:][counted].tolist(), strict=True)
    assert len(pairs) == len(stream) - 1
    assert pairs == list(zip(stream[:-1], stream[1:], strict=True))
    assert (max(batch["segment_ids"].max() for batch in batches) > 1) == isolate
    assert (batches[-1]["segment_ids"][:, 0] > 0).any()


def test_validation_without_documents_gives_no_batches(tokenizer: Tokenizer, make_config: MakeConfig) -> None:
    assert list(validation_batches([], tokenizer, make_config(2, 8))) == []


def test_validation_bytes() -> None:
    assert validation_bytes([Document("a", "é\r\n"), Document("b", ""), Document("c", "z")]) == b"\xc3\xa9\r\nz"


def test_a_tokenizer_without_padding_pads_with_its_end(make_config: MakeConfig) -> None:
    from tokenizers import AddedToken

    foreign = train_tokenizer(["some text"], 266)
    content = json.loads(foreign.to_str())
    kept = [token for token in content["added_tokens"] if token["content"] != "<｜▁pad▁｜>"]
    foreign = Tokenizer.from_str(json.dumps({**content, "added_tokens": kept}))
    foreign.add_special_tokens([AddedToken("</s>", special=True)])
    (batch,) = validation_batches([Document("a", "ab")], foreign, make_config(1, 9, isolate_documents=True))
    assert batch["tokens"].tolist()[0][4:] == [END] * 6
    assert batch["segment_ids"].tolist() == [[1] * 4 + [0] * 6]
    assert batch["positions"].tolist() == [[0, 1, 2, 3] + [0] * 6]
