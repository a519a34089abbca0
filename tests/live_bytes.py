"""How many bytes of tensors live at once."""

from __future__ import annotations

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that are made under it and not yet freed; given tensors do not count."""

    def __init__(self, given):
        super().__init__()
        self.given = {tensor.untyped_storage().data_ptr() for tensor in given}
        self.holders = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().nbytes():
                self._hold(tensor)
        return result

    def _hold(self, tensor):
        address, size = tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()
        if address in self.given:
            return
        if address not in self.holders:
            self.holders[address] = [0, size]
            self.now += size
            self.peak = max(self.peak, self.now)
        self.holders[address][0] += 1
        weakref.finalize(tensor, self._release, address)

    def _release(self, address):
        entry = self.holders[address]
        entry[0] -= 1
        if entry[0] == 0:
            self.now -= entry[1]
            del self.holders[address]
