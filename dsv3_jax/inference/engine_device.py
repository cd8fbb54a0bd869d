"""The engine's device: requests and their pages in, tokens out; in between arrays of few shapes."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding
from tokenizers import Tokenizer

from dsv3_jax.inference.decoding import LONGEST_CHUNK, Vocabulary
from dsv3_jax.inference.engine_slots import Asked, Decoded, Logprobs, Piece, Slots, empty_slots
from dsv3_jax.inference.engine_steps import compiled_steps
from dsv3_jax.inference.placement import mesh_of, row_parts
from dsv3_jax.inference.requests import Event, Finish, Request, RoutedExperts, Ticket, TokenLogprobs
from dsv3_jax.inference.sampling import SamplingInputs
from dsv3_jax.inference.weights import ready_to_decode
from dsv3_jax.kernels.long_attention import LONGEST_WHOLE
from dsv3_jax.model.transformer import Transformer
from sharding.mesh import row_spec

LEAST_TABLE = 4
SHORTEST_PIECE = 16


class New(NamedTuple):
    """The new tokens of a request, and what it asked to know about them."""

    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None
    routed_experts: RoutedExperts | None

    def event(self, finish: Finish | None, message: str | None = None) -> Event:
        return Event(self.token_ids, self.logprobs, finish, message, self.routed_experts)


NOTHING = New([], None, None)


class Device:
    """The slots of one engine. A failed step leaves them unusable.

    On a mesh they are in parts, one after the other, as many as the mesh divides rows into; each part has pages of its
    own, which lie with its slots. Page numbers are those within a part.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        *,
        slots: int,
        drafts: int,
        pages: int,
        page_size: int,
        prefill_chunk: int,
    ):
        """`pages`: of each part."""
        config, self._mesh = model.model, mesh_of(model)
        # As leaves, because flattening modules at every call is slow.
        self._leaves, structure = jax.tree.flatten(ready_to_decode(model))
        self._prefill, self._decode = compiled_steps(structure, drafts, self._mesh)
        self._vocabulary = Vocabulary.of(tokenizer, config.vocabulary)
        self.end = int(self._vocabulary.end)
        self.parts = row_parts(model)
        self._slots_of_part = slots // self.parts
        self._slots = _empty_slots(self._mesh, config, slots, drafts, pages * self.parts, page_size)
        self._inputs: list[tuple[SamplingInputs, np.ndarray, np.ndarray] | None] = [None] * slots
        self._words, self._drafts, self._pages, self._page_size = config.vocabulary, drafts, pages, page_size
        self._longest_table = min(-(-config.maximum_positions // page_size), pages)
        self._piece_lengths = [prefill_chunk]
        while self._piece_lengths[0] // 4 >= SHORTEST_PIECE:
            self._piece_lengths.insert(0, self._piece_lengths[0] // 4)

    def ends(self, request: Request) -> frozenset[int]:
        return request.stop_ids | {self.end}

    def admit(self, ticket: Ticket) -> None:
        """The ticket has its slot."""
        request = ticket.request
        prompt_W, ends_W = np.zeros((2, self._words), bool)
        prompt_W[request.token_ids] = True
        ends_W[[token for token in self.ends(request) if 0 <= token < self._words]] = True
        inputs = SamplingInputs.of([request.sampling], [request.sample_index])
        self._inputs[ticket.row] = inputs, prompt_W, ends_W

    def prefill(self, tickets: list[Ticket], meanwhile: Callable[[], None]) -> list[New]:
        """The next piece of each ticket's prompt into its pages; after the last piece the first new token.

        `meanwhile` is called while the device works. At most one ticket of each part of the slots: what is computed for
        it is computed on its part's devices.
        """
        counts = [min(len(ticket.request.token_ids) - ticket.prefilled, self._piece_lengths[-1]) for ticket in tickets]
        stops = [ticket.prefilled + count for ticket, count in zip(tickets, counts, strict=True)]
        length = next(length for length in self._piece_lengths if length >= max(counts))
        tables = self._table(tickets, max(stops) + self._drafts)
        parts = [ticket.row // self._slots_of_part for ticket in tickets]
        pieces = {
            part: self._piece(ticket, stop, length, table)
            for part, ticket, stop, table in zip(parts, tickets, stops, tables, strict=True)
        }
        made = self._prefill(self._leaves, self._slots, self._together(pieces), self._vocabulary)
        self._slots, *about_tokens = made
        meanwhile()
        if self._mesh is None:
            about_tokens = jax.tree.map(lambda array: array[None], about_tokens)
        new = []
        for ticket, part, stop in zip(tickets, parts, stops, strict=True):
            ticket.prefilled = stop
            # Within a prompt nobody waits for the device.
            of_part = jax.tree.map(lambda array, part=part: array[part], about_tokens) if ticket.is_decoding else None
            new.append(_first_token(ticket.request, *of_part) if of_part else NOTHING)
        return new

    def _piece(self, ticket: Ticket, stop: int, length: int, table_G: np.ndarray) -> Piece:
        """The ticket's prompt up to `stop`, in an array of `length`."""
        of_slot = self._inputs[ticket.row]
        assert of_slot is not None
        tokens, start = ticket.request.token_ids, ticket.prefilled
        piece_s = np.zeros(length + 1, np.int32)  # and the token that follows
        known = tokens[start : stop + 1]
        piece_s[: len(known)] = known
        is_last = stop == len(tokens)
        return Piece(
            np.int32(ticket.row % self._slots_of_part),
            piece_s[:-1],
            piece_s[1:],
            np.int32(start),
            np.int32(stop - start),
            np.bool_(is_last),
            table_G,
            *of_slot,
            np.bool_(is_last and ticket.request.logprobs is not None),
        )

    def _together(self, pieces: dict[int, Piece]) -> Piece:
        """The pieces of all parts as one with a leading dim; the one piece itself where there is one part."""
        some = next(iter(pieces.values()))
        if self._mesh is None:
            return some
        # Of a slot and pages that do not exist nothing is written anywhere.
        none = some._replace(
            slot=np.int32(self._slots_of_part),
            length=np.int32(0),
            is_last=np.bool_(False),
            table_G=np.full_like(some.table_G, self._pages),
        )
        each = [pieces.get(part, none) for part in range(self.parts)]
        return jax.tree.map(lambda *parts: jnp.stack(parts), *each)

    def decode(
        self, tickets: list[Ticket], steps: int, until_one_ends: bool, meanwhile: Callable[[], None]
    ) -> tuple[list[New], Decoded]:
        """At most `steps` passes over these tickets' slots. Returns the new tokens of each, and all the numbers.

        `meanwhile` is called while the device works.
        """
        slots = [ticket.row for ticket in tickets]
        left_B = np.zeros(len(self._inputs), np.int32)
        left_B[slots] = [ticket.left for ticket in tickets]
        steps = min(steps, LONGEST_CHUNK, int(left_B.max()))
        # Drafts go beyond the newest token.
        newest = max(len(ticket.request.token_ids) + len(ticket.generated) for ticket in tickets)
        table_BG = self._table(tickets, newest + steps * (self._drafts + 1) + self._drafts)
        by_slot_BG = np.full((len(left_B), table_BG.shape[1]), self._pages, np.int32)
        by_slot_BG[slots] = table_BG
        wants_logprobs = any(ticket.request.logprobs is not None for ticket in tickets)
        asked = Asked(left_B, by_slot_BG, np.int32(steps), np.bool_(until_one_ends), np.bool_(wants_logprobs))
        self._slots, decoded = self._decode(self._leaves, self._slots, asked, self._vocabulary)
        meanwhile()
        if not any(ticket.request.routed_experts for ticket in tickets):
            decoded = decoded._replace(experts_BCLK=None)  # they stay where they are
        decoded = jax.device_get(decoded)
        new: list[New] = []
        for ticket, slot in zip(tickets, slots, strict=True):
            request, count = ticket.request, int(decoded.count_B[slot])
            of_slot = jax.tree.map(lambda array, slot=slot: array[slot], decoded.logprobs_BC)
            routed_experts = decoded.experts_BCLK[slot, :count].tolist() if request.routed_experts else None
            ids = decoded.tokens_BC[slot, :count].tolist()
            new.append(New(ids, told(of_slot, count, request.logprobs), routed_experts))
        return new, decoded

    def _table(self, tickets: list[Ticket], positions: int) -> np.ndarray:
        """The pages of the tickets' first `positions` and perhaps more, int32 [tickets, G]; G takes few values."""
        longest = min(-(-positions // self._page_size), max(len(ticket.pages) for ticket in tickets))
        length = max(LEAST_TABLE, 1 << (longest - 1).bit_length())
        # What attention over a long table costs does not depend on its length: one shape for all of them.
        if length * self._page_size > LONGEST_WHOLE or length > self._longest_table:
            length = self._longest_table
        table = np.full((len(tickets), length), self._pages, np.int32)
        for row, ticket in zip(table, tickets, strict=True):
            pages = ticket.pages[:length]
            row[: len(pages)] = pages
        return table


def _empty_slots(mesh: Mesh | None, *shape: Any) -> Slots:
    if mesh is None:
        return empty_slots(*shape)
    return jax.jit(lambda: empty_slots(*shape), out_shardings=NamedSharding(mesh, row_spec(mesh)))()


def _first_token(request: Request, token: Array, logprobs: Logprobs, experts_LK: Array) -> New:
    logprobs = jax.tree.map(lambda array: np.asarray(array)[None], logprobs)
    routed_experts = [np.asarray(experts_LK).tolist()] if request.routed_experts else None
    return New([int(token)], told(logprobs, 1, request.logprobs), routed_experts)


def told(logprobs: Logprobs, count: int, top: int | None) -> list[TokenLogprobs] | None:
    """The first `count` of a slot's arrays as a client gets them, with `top` alternatives."""
    if top is None:
        return None
    chosen, ids, tops = (array[:count].tolist() for array in logprobs)
    return [
        TokenLogprobs(logprob, list(zip(ids_K[:top], top_K[:top], strict=True)))
        for logprob, ids_K, top_K in zip(chosen, ids, tops, strict=True)
    ]
