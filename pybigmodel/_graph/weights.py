"""The packed weights of a compiled graph: inputs behind its own, current at every call.

Dynamo's graph has the Parameters and buffers as inputs, and guards their shapes, not what is in
them. So what was made of them is kept here and compared at every call, as `pybigmodel.nn`'s layers
do (`_packing.py`). Nothing here keeps a model alive: sources are known by identity, and when the
memory of one is freed the copies of it go.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn import Parameter

from pybigmodel._torch_private import fake_mode_of
from pybigmodel.nn._conv_fold import packed_fold
from pybigmodel.nn._packing import Marks, cacheable, pack, packed_for, tell_what_to_forget

_KINDS = (Parameter, Tensor)  # running statistics are buffers


class Recipe(NamedTuple):
    """How one packed weight is made."""

    at: tuple[int | None, ...]  # the sources' places among the inputs: the weight, or all of `fold`
    eps: float | None  # of the norm that is folded in
    key: Any  # Key, a ConvKey with a norm

    def copies(self, args: Sequence[Any], watched: bool) -> tuple[Tensor, ...]:
        """The packed weight, and the bias that has the norm in it."""
        sources = tuple(None if i is None else args[i] for i in self.at)
        if self.eps is not None:
            return packed_fold(sources, self.eps, self.key)
        weight: Any = sources[0]
        # Of a Parameter alone it is the copy that eager layers use too.
        return (packed_for(weight, self.key)[1] if watched else pack(weight, self.key),)

    def examples(self, fakes: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
        """What they will look like."""
        weight: Any = fakes[0]
        with fake_mode_of(weight):
            if self.eps is not None:
                return packed_fold(fakes, self.eps, self.key)
            return (pack(weight, self.key),)


class _State:
    """The copies that were made last, and of what."""

    __slots__ = (
        *("__weakref__", "copies", "flat", "gone", "marks", "places", "recipes", "storages"),
    )

    def __init__(self, recipes: Sequence[Recipe] = ()) -> None:
        self.recipes = recipes
        self.places: dict[int, int] = {}  # of the sources, by id
        self.marks: Marks | None = None
        self.copies: list[tuple[Tensor, ...] | None] = []
        self.flat: tuple[Tensor, ...] = ()  # empty where one is missing
        self.gone: set[int] = set()  # places of sources that are no more, or to be read again
        self.storages: list[Any] = []

    def forget(self, source: int) -> None:
        """Let the copies of it go, and have all looked at in the next call."""
        place = self.places.get(source)
        if place is not None:
            self.gone.add(place)
            self.flat = ()
            for i, recipe in enumerate(self.recipes):
                if place in recipe.at:
                    self.copies[i] = None


class WithPacked:
    """A compiled graph, of which inputs it reads, with its packed weights behind them."""

    def __init__(
        self, inner: Callable[..., Any], recipes: Sequence[Recipe], read: Sequence[int]
    ) -> None:
        self._inner, self._recipes, self._read = inner, recipes, read
        self._at = sorted({i for recipe in recipes for i in recipe.at if i is not None})
        self._state = _State()

    def __call__(self, *args: Any) -> Any:
        sources = [args[i] for i in self._at]
        state = self._state
        flat = state.flat
        if not flat or state.marks is None or not state.marks.are_of(sources):
            flat = self._renewed(args, sources)
        return self._inner(*[args[i] for i in self._read], *flat)

    def _renewed(self, args: Sequence[Any], sources: list[Tensor]) -> tuple[Tensor, ...]:
        """With new copies of what has changed, or of all where changes cannot be noticed."""
        old, new = self._state, _State(self._recipes)
        if not all(cacheable(source, _KINDS) for source in sources):
            made = (recipe.copies(args, watched=False) for recipe in self._recipes)
            return tuple(copy for copies in made for copy in copies)
        # The marks first, then the copies: a change in between makes them out of date, not wrong.
        new.marks = Marks(sources)
        new.places = dict(zip(map(id, sources), self._at, strict=True))
        known = [None] * len(self._recipes) if old.marks is None else old.copies
        changed = set() if old.marks is None else set(new.marks.differing(old.marks))
        places = old.gone | {self._at[i] for i in changed}
        for recipe, copies in zip(self._recipes, known, strict=True):
            if copies is None or not places.isdisjoint(recipe.at):
                copies = recipe.copies(args, watched=True)
            new.copies.append(copies)
        flat = new.flat = tuple(copy for copies in new.copies for copy in copies or ())
        me = weakref.ref(new)
        new.storages = [
            weakref.ref(source.untyped_storage(), partial(_freed, me, id(source)))
            for source in sources
        ]
        tell_what_to_forget(new)
        self._state = new
        return flat


def _freed(of: weakref.ref[_State], source: int, storage: Any) -> None:
    state = of()
    if state is not None:
        state.forget(source)
