"""NumPy arrays that modules hold, of which passes write to copies."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from lightning_robust.functional._isolation.holdings import get, places_in, put, storages, values_of

_LARGE_ARRAYS = 2**18  # elements of all of them together, the smallest ones first


class ArrayCopies:
    """Copies that take the places of arrays, so that passes write to those.

    Arrays stay where they are if they share memory or if something else holds them, too: passes would write to one and
    read the other, and what other threads write would be lost.
    """

    def __init__(self, modules: list[nn.Module], containers: list[Any]) -> None:
        self._copies: list[tuple[Any, Any, list[tuple[Any, Any]]]] = []  # array, copy, places
        numpy: Any = sys.modules.get("numpy")
        if numpy is None:
            return
        places: dict[int, list[tuple[Any, Any]]] = {}  # container and key, by the identity of the array
        for container, key in places_in(modules, containers):
            value = get(container, key)
            if type(value) is numpy.ndarray and value.flags.writeable and value.flags.owndata:
                places.setdefault(id(value), []).append((container, key))
        if not places:
            return
        shared = {storage.data_ptr() for _, storage in storages(values_of(modules, containers))}
        shared |= {id(value.base) for value in values_of(modules, containers) if isinstance(value, numpy.ndarray)}
        del value  # lest it count as a holder
        left = _LARGE_ARRAYS
        for held in sorted(places.values(), key=lambda held: get(*held[0]).size):
            array = get(*held[0])
            alone = sys.getrefcount(array) == len(held) + 2  # the variable, and the argument of the call
            if alone and not shared & {id(array), array.ctypes.data} and array.size <= left:
                left -= array.size
                self._copies.append((array, array.copy(), held))
        for _, copy, held in self._copies:
            put(copy, held)

    def refresh(self) -> None:
        for array, copy, _ in self._copies:
            copy[...] = array

    def put_back(self) -> None:
        for array, _, held in self._copies:
            put(array, held)
