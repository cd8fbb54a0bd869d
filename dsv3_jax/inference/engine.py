"""An inference engine that requests join and leave at any step: continuous batching over a paged latent cache.

The device works on a fixed number of slots (engine_steps.py). A round of `Engine.step` gives free slots and pages to
those that wait, takes one piece of the oldest unfinished prompt into the cache, and lets all slots past their prompts
make some tokens: a long prompt holds nobody up for longer than one piece of it. A request's result is that of the
request alone.

Pages for a prompt and all tokens that may follow are reserved when a request gets its slot, so that nobody runs out of
them on the way. Whole pages stay after their request, and are shared by requests that begin alike (pages.py).
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable

from tokenizers import Tokenizer

from dsv3_jax.inference.decoding import LONGEST_CHUNK
from dsv3_jax.inference.engine_device import NOTHING, Device, New
from dsv3_jax.inference.engine_places import Places
from dsv3_jax.inference.generation import FIRST_CHUNK, FLOWING_SECONDS
from dsv3_jax.inference.pages import prefix_keys
from dsv3_jax.inference.placement import row_parts
from dsv3_jax.inference.requests import EngineBusy, EngineError, Event, Finish, Limits, Request, Statistics, Ticket
from dsv3_jax.model.transformer import Transformer

SHORT_ROUND = 4
"""Passes between two pieces of prompts, and when others may be about to come."""
IDLE_SECONDS = 0.1


class Engine:
    """Answers requests with a model.

    `submit` and `cancel` may be called from any thread, also from an `on_event`; `step` or `run` from one.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        *,
        slots: int = 8,
        cache_tokens: int | None = None,
        speculative: int = 0,
        prefill_chunk: int = 128,
        page_size: int = 64,
        most_waiting: int = 256,
    ):
        """Args:
            slots: requests that run at the same time.
            cache_tokens: tokens that the cache holds, over all requests; by default 4096 a slot, or as many as the
                model can count to.
            speculative: drafts of the MTP module a pass; 0: none.
            prefill_chunk: tokens of a prompt that go into the cache at once, at most.
            page_size: tokens of a page.
            most_waiting: requests that may wait for a slot.

        Raises:
            EngineError: drafts of a model without MTP module, or a number too small.
        """
        config = model.model
        if speculative < 0 or (speculative and not config.mtp_depth):
            raise EngineError(
                f"speculative={speculative} must be at least 0, and 0 for a model without MTP module "
                f"(model.mtp_depth={config.mtp_depth})"
            )
        if cache_tokens is None:
            cache_tokens = slots * (min(config.maximum_positions, 4096) + page_size)
        for name, value in {"slots": slots, "prefill_chunk": prefill_chunk, "page_size": page_size}.items():
            if value < 1:
                raise EngineError(f"{name}={value} must be at least 1")
        parts = row_parts(model)
        if slots % parts:
            raise EngineError(f"slots={slots} must be a multiple of {parts}, the parts that the mesh divides rows into")
        if cache_tokens < page_size * parts:
            in_parts = "" if parts == 1 else f", times the {parts} parts that the mesh divides rows into"
            raise EngineError(f"cache_tokens={cache_tokens} must be at least page_size={page_size}{in_parts}")
        pages = cache_tokens // page_size // parts
        self._places = Places(parts, slots // parts, pages, page_size)
        self._device = Device(
            model,
            tokenizer,
            slots=slots,
            drafts=speculative,
            pages=pages,
            page_size=page_size,
            prefill_chunk=prefill_chunk,
        )
        self._limits = Limits(config.vocabulary, config.maximum_positions, pages, page_size)
        self._page_size, self._drafts, self._most_waiting = page_size, speculative, most_waiting
        self._running: list[Ticket] = []  # in the order in which they got their slots
        self._waiting: deque[Ticket] = deque()
        self._untold: list[tuple[Ticket, Event]] = []
        self._changed = threading.Condition()  # guards what waits and whether anybody will look at it
        self._refusal: str | None = None
        self._steps = FIRST_CHUNK
        self._steps_in_quiet = SHORT_ROUND
        self._prompt_tokens = self._reused_tokens = self._generated_tokens = self._passes = 0
        self._accepted = [0] * speculative

    def submit(self, request: Request, on_event: Callable[[Event], None]) -> Ticket:
        """Queue a request. `on_event` is called with its result as it comes, from the thread of `step` or `run`.

        What a step made is told during the next, an end at once. Everybody waits while `on_event` works. One that
        raises cancels its request.

        Raises:
            EngineError: a request that this engine can never answer.
            EngineBusy: too many wait already.
        """
        self._limits.check(request)
        ticket = Ticket(request, on_event, self._keys(request.token_ids))
        with self._changed:
            if self._refusal is not None:
                raise EngineError(self._refusal)
            if len(self._waiting) >= self._most_waiting:
                raise EngineBusy(f"{len(self._waiting)} requests wait already, and most_waiting={self._most_waiting}")
            self._waiting.append(ticket)
            self._changed.notify_all()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """End a request at the next step, with an event; nothing happens if it has ended."""
        with self._changed:
            ticket.cancelled = True
            self._changed.notify_all()

    def step(self) -> bool:
        """One round of work; whether there was any.

        Raises whatever the device raises, after an event to every request; the engine then takes no more of them.
        """
        try:
            gone = self._drop_cancelled()
            self._admit()
            prefilled = self._prefill()
            return self._decode() or prefilled or gone
        except Exception as error:
            self._end_all("error", f"the engine has failed: {error}")
            raise

    def run(self, stop: threading.Event) -> None:
        """Work until `stop` is set, then cancel what is left and refuse what comes: an engine runs once."""
        try:
            while not stop.is_set():
                if not self.step():
                    with self._changed:
                        if not self._waiting:
                            self._changed.wait(IDLE_SECONDS)
        finally:
            self._end_all("cancelled", "the engine has stopped")

    @property
    def most_positions(self) -> int:
        """Tokens of a request, prompt and answer, that there may be room for: of one part's pages."""
        return self._limits.pages * self._page_size

    def statistics(self) -> Statistics:
        return Statistics(
            len(self._running),
            len(self._waiting),
            *self._places.pages(),
            self._prompt_tokens,
            self._reused_tokens,
            self._generated_tokens,
            self._passes,
            list(self._accepted),
        )

    def check(self) -> None:
        """Asserts that slots and pages add up, between two steps."""
        self._places.check(self._running)

    def _drop_cancelled(self) -> bool:
        with self._changed:
            gone = [ticket for ticket in self._waiting if ticket.cancelled]
            if gone:
                self._waiting = deque(ticket for ticket in self._waiting if not ticket.cancelled)
        gone += [ticket for ticket in self._running if ticket.cancelled]
        if gone:
            self._tell_untold()
        for ticket in gone:
            self._end(ticket, NOTHING, "cancelled")
        return bool(gone)

    def _admit(self) -> None:
        """Slots and pages to those that wait, strictly in their order: whoever needs much is not overtaken for ever."""
        while self._places.has_free_slot:
            with self._changed:
                if not self._waiting:
                    return
                ticket = self._waiting[0]
                if not self._places.take(ticket, self._limits.pages_for(ticket.request)):
                    return
                self._waiting.popleft()
            self._running.append(ticket)
            self._steps_in_quiet = SHORT_ROUND
            self._device.admit(ticket)
            self._prompt_tokens += len(ticket.request.token_ids)
            self._reused_tokens += ticket.prefilled

    def _prefill(self) -> bool:
        """A piece of the oldest unfinished prompt of every part."""
        tickets: dict[int, Ticket] = {}
        for ticket in self._running:
            if not ticket.is_decoding:
                tickets.setdefault(self._places.part_of(ticket), ticket)
        if not tickets:
            return False
        made = self._device.prefill([*tickets.values()], self._tell_untold)
        for ticket, new in zip(tickets.values(), made, strict=True):
            self._places.keep(ticket, ticket.keys[: ticket.prefilled // self._page_size])
            if ticket.is_decoding:
                self._add(ticket, new)
        return True

    def _decode(self) -> bool:
        tickets = [ticket for ticket in self._running if ticket.is_decoding]
        if not tickets:
            return False
        most = LONGEST_CHUNK
        if len(self._running) > len(tickets):
            most = SHORT_ROUND
        elif self._places.has_free_slot:
            # Requests come together, and who has had an answer asks again: after one came or went a free slot is
            # offered again soon, then in longer and longer rounds.
            most = self._steps_in_quiet
        self._steps_in_quiet = min(2 * self._steps_in_quiet, LONGEST_CHUNK)
        steps = min(self._steps, most)
        start = time.perf_counter()
        new, decoded = self._device.decode(tickets, steps, bool(self._waiting), self._tell_untold)
        seconds = time.perf_counter() - start
        self._passes += int(decoded.passes)
        self._accepted = [sum(pair) for pair in zip(self._accepted, decoded.accepted_k.tolist(), strict=True)]
        for ticket, of_ticket in zip(tickets, new, strict=True):
            self._add(ticket, of_ticket)
        # As many passes a call as let text flow, and newcomers in, so that the host's time is lost among them.
        if seconds > 2 * FLOWING_SECONDS:
            self._steps = max(self._steps // 2, 1)
        elif 2 * seconds < FLOWING_SECONDS and steps == self._steps:
            self._steps = min(2 * self._steps, LONGEST_CHUNK)
        return True

    def _add(self, ticket: Ticket, new: New) -> None:
        """Tokens that the ticket's slot has made."""
        ids = new.token_ids
        if ids[-1] >= self._limits.words:
            self._end(ticket, NOTHING, "error", "the model's logits are NaN")
            return
        ticket.generated += ids
        self._generated_tokens += len(ids)
        ended = ids[-1] in self._device.ends(ticket.request)
        if ended or not ticket.left:
            # What was answered may come again as part of a longer conversation. The newest token is in no page yet.
            self._places.keep(ticket, self._keys(ticket.request.token_ids + ticket.generated))
            self._end(ticket, new, "stop" if ended else "length")
        else:
            self._untold.append((ticket, new.event(None)))

    def _keys(self, token_ids: list[int]) -> list[bytes]:
        # An entry of the MTP module's cache depends on one token more than its position's.
        return prefix_keys(token_ids, self._page_size, ahead=min(self._drafts, 1))

    def _end(self, ticket: Ticket, new: New, finish: Finish, message: str | None = None) -> None:
        """The only way out: slot and pages come back, then the client is told."""
        if ticket.slot is not None:
            self._steps_in_quiet = SHORT_ROUND
            self._running.remove(ticket)
            self._places.release(ticket)
        self._tell(ticket, new.event(finish, message))

    def _end_all(self, finish: Finish, message: str) -> None:
        with self._changed:
            self._refusal = self._refusal or message
            left, self._waiting = [*self._running, *self._waiting], deque()
        self._tell_untold()
        for ticket in left:
            self._end(ticket, NOTHING, finish, message)

    def _tell_untold(self) -> None:
        """What the last round made goes out while the device is at the next: whoever reads it holds nobody up."""
        untold, self._untold = self._untold, []
        for ticket, event in untold:
            self._tell(ticket, event)

    def _tell(self, ticket: Ticket, event: Event) -> None:
        try:
            ticket.on_event(event)
        except Exception:
            logging.getLogger(__name__).warning("a request is cancelled: its on_event raised", exc_info=True)
            ticket.cancelled = True
