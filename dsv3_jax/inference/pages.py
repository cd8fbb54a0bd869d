"""Which page of the latent cache holds what: the host's side of a pool that requests share.

A page is in one of three states: free; used, by as many requests as it has references; or cached, when nobody uses it
but it holds a known piece of text that may come again. Cached pages are given up when space is needed, those that
were used longest ago first.
"""

import hashlib
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np


class Pages:
    """A pool of `count` pages."""

    def __init__(self, count: int):
        self.count = count
        self._free = list(range(count))
        self._references = [0] * count
        self._page_of_key: dict[bytes, int] = {}
        self._key_of_page: dict[int, bytes] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()
        """Least recently used first."""

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def cached(self) -> int:
        return len(self._cached)

    @property
    def used(self) -> int:
        return self.count - self.free - self.cached

    def take(self, keys: Sequence[bytes], count: int) -> tuple[list[int], int] | None:
        """`count` pages for one request, of which the first hold what the longest known beginning of `keys` names.

        Returns the pages and how many of them hold that, which must not be written; None where too few are left.
        """
        known = self._known(keys[:count])
        if count - len(known) > self.free + self.cached - sum(page in self._cached for page in known):
            return None
        for page in known:
            self._references[page] += 1
            self._cached.pop(page, None)
        return known + [self._new() for _ in range(count - len(known))], len(known)

    def known(self, keys: Sequence[bytes]) -> int:
        """How many pages there are of the longest known beginning of `keys`."""
        return len(self._known(keys))

    def keep(self, page: int, key: bytes) -> None:
        """A used page is written to its end and holds what `key` names; nobody writes it from now on."""
        if key not in self._page_of_key and page not in self._key_of_page:
            self._page_of_key[key], self._key_of_page[page] = page, key

    def release(self, pages: Sequence[int]) -> None:
        """One request less uses these."""
        # A later page is of no use without those before it: it goes first.
        for page in reversed(pages):
            self._references[page] -= 1
            if self._references[page] == 0:
                if page in self._key_of_page:
                    self._cached[page] = None
                else:
                    self._free.append(page)

    def check(self, tables: Iterable[Sequence[int]]) -> None:
        """Asserts that the books are right when these are all requests' pages."""
        references = Counter(page for table in tables for page in table)
        assert [references[page] for page in range(self.count)] == self._references
        assert len(set(self._free)) == len(self._free) and not set(self._free) & set(self._cached)
        assert sorted([*self._free, *self._cached, *references]) == list(range(self.count))
        assert {key: page for page, key in self._key_of_page.items()} == self._page_of_key
        assert set(self._cached) == {page for page in self._key_of_page if not self._references[page]}

    def _known(self, keys: Sequence[bytes]) -> list[int]:
        known: list[int] = []
        for key in keys:
            page = self._page_of_key.get(key)
            if page is None:
                break
            known.append(page)
        return known

    def _new(self) -> int:
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._cached.popitem(last=False)
            del self._page_of_key[self._key_of_page.pop(page)]
        self._references[page] = 1
        return page


def prefix_keys(token_ids: Sequence[int], size: int, ahead: int) -> list[bytes]:
    """A name for each whole page of a prompt: a hash of all tokens up to its end and of `ahead` more.

    `ahead`: tokens after a position on which its entries depend; an entry of an MTP module's cache depends on one. At
    least one token is left over, because the logits after the last one are wanted.
    """
    tokens, keys, before = np.asarray(token_ids, np.int32), list[bytes](), b""
    for end in range(size, len(token_ids), size):
        before = hashlib.blake2b(before + tokens[end - size : end + ahead].tobytes(), digest_size=32).digest()
        keys.append(before)
    return keys
