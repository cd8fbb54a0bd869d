"""What the engine keeps on the device, and what goes into and comes out of its compiled steps (engine_steps.py).

A slot is a row of every array in `Slots`.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from dsv3_jax.inference.decoding import Rows
from dsv3_jax.inference.penalties import History
from dsv3_jax.inference.sampling import Sampling, SamplingInputs
from dsv3_jax.inference.speculation import Drafts
from dsv3_jax.model.cache import Latents, PagedLatents, empty
from dsv3_jax.model.transformer import Cache
from dsv3_jax.model_config import ModelConfig


class Slots(NamedTuple):
    """What the device keeps between steps; the pools [pages, Z, C + R] of each layer, and a row a slot."""

    pools: list[list[Array]]
    draft_pool: Array | None
    tokens_B: Array
    """int32, the newest token, not in the cache yet."""
    positions_B: Array
    """int32, its position."""
    drafts: Drafts | None
    history: History
    inputs: SamplingInputs
    ends_BW: Array
    """bool, the ids that end the slot's request."""


class Piece(NamedTuple):
    """Some tokens of one prompt. numpy until a compiled step takes it: jnp.asarray costs more than the step's call."""

    slot: Any
    tokens_S: Any
    """int32, `length` of them and then anything."""
    following_S: Any
    """int32, the token after each; after the prompt's last one anything."""
    start: Any
    """int32, position of the first."""
    length: Any
    is_last: Any
    """bool: the prompt ends here."""
    table_G: Any
    inputs: SamplingInputs
    """Of one row."""
    prompt_W: Any
    """bool: the id is in the prompt."""
    ends_W: Any
    wants_logprobs: Any


class Logprobs(NamedTuple):
    """Of tokens [..]: their own log probability, and ids and log probabilities [.., K] of the most probable."""

    chosen: Array
    ids: Array
    top: Array


class Asked(NamedTuple):
    """What a call of `_decode` is asked for, as numpy like a piece."""

    left_B: Any
    """int32, tokens that each slot may still make; 0 where none is decoding."""
    table_BG: Any
    steps: Any
    """int32, passes at most."""
    until_one_ends: Any
    """bool: stop once a slot has ended, because somebody waits for it."""
    wants_logprobs: Any


class Decoded(NamedTuple):
    """What some passes over the slots add."""

    tokens_BC: Array
    """int32, the first `count_B` of each slot."""
    count_B: Array
    logprobs_BC: Logprobs
    experts_BCLK: Array
    """int32, the experts that made each token, in every MoE layer."""
    accepted_k: Array
    """int32, how often each draft stayed, over slots and passes."""
    passes: Array
    """int32, passes of the model over slots that were going, summed over the slots."""


def empty_slots(config: ModelConfig, slots: int, drafts: int, pages: int, page_size: int) -> Slots:
    def pool() -> Array:
        return empty(pages, page_size, config.cache_width, dtype=config.dtype)

    def numbers(*shape: int, dtype: type = jnp.int32) -> Array:
        return jnp.zeros((slots, *shape), dtype)

    counts = [count for count in (config.dense_layers, config.moe_layers) if count]
    words = config.vocabulary
    return Slots(
        [[pool() for _ in range(count)] for count in counts],
        pool() if drafts else None,
        numbers(),
        numbers(),
        Drafts(numbers(drafts), numbers(drafts, words, dtype=jnp.float32)) if drafts else None,
        History(numbers(words, dtype=jnp.bool_), numbers(words)),
        SamplingInputs.of([Sampling()] * slots),
        numbers(words, dtype=jnp.bool_),
    )


def only(inputs: SamplingInputs, active_B: Array) -> SamplingInputs:
    """Greedy and without penalties where no request is: what nobody asks for is not computed."""

    def where_active(column_B: Array, otherwise: float) -> Array:
        return jnp.where(active_B, column_B, otherwise)

    return inputs._replace(
        temperature_B=where_active(inputs.temperature_B, 0),
        top_k_B=where_active(inputs.top_k_B, 0),
        top_p_B=where_active(inputs.top_p_B, 1),
        min_p_B=where_active(inputs.min_p_B, 0),
        repetition_penalty_B=where_active(inputs.repetition_penalty_B, 1),
        presence_penalty_B=where_active(inputs.presence_penalty_B, 0),
        frequency_penalty_B=where_active(inputs.frequency_penalty_B, 0),
    )


def paged(slots: Slots, table_BG: Array) -> tuple[Cache, Latents | None]:
    """The caches of rows with these pages, of the model and of its MTP module."""
    draft_cache = None if slots.draft_pool is None else PagedLatents(slots.draft_pool, table_BG)
    cache: Cache = []
    for stack in slots.pools:
        cache.append([PagedLatents(pool, table_BG) for pool in stack])
    return cache, draft_cache


def with_rows(slots: Slots, rows: Rows) -> Slots:
    """The slots with the rows' pools."""

    def pool(cache: Latents) -> Array:
        assert isinstance(cache, PagedLatents)
        return cache.pages_YZX

    pools = [[pool(layer) for layer in stack] for stack in rows.cache]
    return slots._replace(pools=pools, draft_pool=None if rows.draft_cache is None else pool(rows.draft_cache))
