"""Who has which slot and pages of an engine.

On a mesh slots are in parts, as many as it divides rows into. Each part has pages of its own, and a request has all its
pages in the part of its slot.
"""

from collections.abc import Sequence

from dsv3_jax.inference.pages import Pages
from dsv3_jax.inference.requests import Ticket


class Places:
    def __init__(self, parts: int, slots: int, pages: int, page_size: int):
        """`slots` and `pages`: of each part."""
        self._pages = [Pages(pages) for _ in range(parts)]
        self._free_slots = [[*reversed(range(part * slots, (part + 1) * slots))] for part in range(parts)]
        self._slots, self._page_size = slots, page_size

    @property
    def has_free_slot(self) -> bool:
        return any(self._free_slots)

    def take(self, ticket: Ticket, count: int) -> bool:
        """A slot and `count` pages for the ticket, if there are: in the part that knows most of its beginning, then
        has most room."""

        def worth(part: int) -> tuple[int, int]:
            pages = self._pages[part]
            return pages.known(ticket.keys), pages.free + pages.cached

        parts = [part for part, free in enumerate(self._free_slots) if free]
        for part in sorted(parts, key=worth, reverse=True):
            taken = self._pages[part].take(ticket.keys, count)
            if taken is not None:
                pages, known = taken
                ticket.pages, ticket.prefilled = tuple(pages), known * self._page_size
                ticket.slot = self._free_slots[part].pop()
                return True
        return False

    def part_of(self, ticket: Ticket) -> int:
        return ticket.row // self._slots

    def keep(self, ticket: Ticket, keys: list[bytes]) -> None:
        """The ticket's first pages, which hold what `keys` name."""
        pages, new = self._pages[self.part_of(ticket)], slice(ticket.kept, len(keys))
        for page, key in zip(ticket.pages[new], keys[new], strict=True):
            pages.keep(page, key)
        ticket.kept = len(keys)

    def release(self, ticket: Ticket) -> None:
        """The slot and pages of a ticket that has a slot."""
        part = self.part_of(ticket)
        self._free_slots[part].append(ticket.row)
        self._pages[part].release(ticket.pages)
        ticket.slot, ticket.pages = None, ()

    def pages(self) -> tuple[int, int, int]:
        """How many pages are used, free, and cached."""
        each = self._pages
        return sum(one.used for one in each), sum(one.free for one in each), sum(one.cached for one in each)

    def check(self, running: Sequence[Ticket]) -> None:
        """Asserts that slots and pages add up when these tickets have one."""
        for part, (pages, free) in enumerate(zip(self._pages, self._free_slots, strict=True)):
            tickets = [ticket for ticket in running if self.part_of(ticket) == part]
            pages.check([ticket.pages for ticket in tickets])
            first = part * self._slots
            assert sorted([*(ticket.row for ticket in tickets), *free]) == [*range(first, first + self._slots)]
