"""From text to text."""

import numpy as np
from tokenizers import Tokenizer, models

from dsv3_jax.data.pipeline import training_tokens
from dsv3_jax.data.tokenizer import special_tokens
from dsv3_jax.inference.completion import complete, prompt_ids
from dsv3_jax.inference.generation import Generator
from dsv3_jax.inference.sampling import Sampling

PROMPTS = ["", "漢<｜end▁of▁sentence｜>"]


def test_a_prompt_begins_as_a_document_in_training(tokenizer):
    special = special_tokens(tokenizer)
    for text in PROMPTS:
        in_training = training_tokens(text, tokenizer, special, 0.0, np.random.default_rng(0)).tolist()
        assert [*prompt_ids(tokenizer, text), special.end] == in_training


def test_without_a_beginning_token_a_prompt_is_its_text_and_an_empty_one_the_end_before_it():
    plain = Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    plain.add_special_tokens(["<|endoftext|>"])
    assert prompt_ids(plain, "a") == [0]
    assert prompt_ids(plain, "") == [plain.token_to_id("<|endoftext|>")]


def test_completions_are_the_generated_ids_as_text(model, tokenizer):
    shown: dict[int, str] = {}

    def on_piece(row: int, text: str) -> None:
        assert text
        shown[row] = shown.get(row, "") + text

    sampling = Sampling(temperature=1.0, seed=4)
    completions = complete(model, tokenizer, PROMPTS, sampling, 40, on_piece)
    rows: list[list[int]] = [[] for _ in PROMPTS]
    for chunk in Generator(model, tokenizer).generate([prompt_ids(tokenizer, text) for text in PROMPTS], sampling, 40):
        for row, new_ids in zip(rows, chunk.token_ids, strict=True):
            row += new_ids
    end = special_tokens(tokenizer).end
    for index, (completion, prompt, ids) in enumerate(zip(completions, PROMPTS, rows, strict=True)):
        assert (completion.prompt, completion.token_ids) == (prompt, ids)
        assert completion.text == tokenizer.decode(ids, skip_special_tokens=True) == shown.get(index, "")
        assert completion.finish_reason == ("stop" if end in ids else "length")
        assert completion.tokens_per_second > 0


def test_one_token_has_no_speed(model, tokenizer):
    (completion,) = complete(model, tokenizer, ["x"], Sampling(temperature=0.0), 1)
    assert (len(completion.token_ids), completion.tokens_per_second) == (1, 0.0)
