"""The small files beside the weights that transformers wants of a tokenizer that was trained here."""

import json
from typing import Any

from dsv3_jax.data.tokenizer import special_tokens, tokenizer_from


def token_ids(tokenizer: str | None, vocabulary: int) -> dict[str, int]:
    """bos_token_id, eos_token_id and pad_token_id of the text of a tokenizer.json, those that it has.

    Raises:
        DataError: it has no end-of-text token, or is no tokenizer.
    """
    if tokenizer is None:
        return {}
    ids = special_tokens(tokenizer_from(tokenizer, "the tokenizer", vocabulary))
    named = {"bos_token_id": ids.beginning, "eos_token_id": ids.end, "pad_token_id": ids.padding}
    return {name: number for name, number in named.items() if number is not None}


def tokenizer_texts(tokenizer: str, config: dict[str, Any]) -> dict[str, str]:
    """tokenizer.json, and a tokenizer_config.json and generation_config.json that name its special tokens.

    Args:
        tokenizer: text of tokenizer.json.
        config: the config.json that goes with it.
    """
    ids = token_ids(tokenizer, config["vocab_size"])
    read = tokenizer_from(tokenizer, "the tokenizer", config["vocab_size"])
    of_tokenizer = {
        # AutoTokenizer's own class for DeepSeek rebuilds the pre-tokenizer wrongly; this one takes the file as it is.
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{name.removesuffix("_id"): read.id_to_token(number) for name, number in ids.items()},
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": config["max_position_embeddings"],
    }
    return {
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": json.dumps(of_tokenizer, indent=2, ensure_ascii=False) + "\n",
        "generation_config.json": json.dumps(ids, indent=2) + "\n",
    }
