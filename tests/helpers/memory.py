"""Which matrices are alive at once."""

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Alive(TorchDispatchMode):
    """Counts the fp32 matrices of given shapes, made while it is open, that are alive at once; weights aside."""

    def __init__(self, layers):
        super().__init__()
        self.shapes = {tuple(layer.weight.shape) for layer in layers.values()}
        self.shapes |= {shape[::-1] for shape in self.shapes}
        self.weights = {layer.weight.untyped_storage().data_ptr() for layer in layers.values()}
        self.alive, self.most, self.bytes = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if (
                isinstance(tensor, torch.Tensor)
                and tensor.dtype == torch.float32
                and tuple(tensor.shape) in self.shapes
            ):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self.weights:
                    self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
                del storage
        del tensor
        self.alive = {key: kept for key, kept in self.alive.items() if not kept[0].expired()}
        self.most = max(self.most, len(self.alive))
        self.bytes = max(self.bytes, sum(size for _, size in self.alive.values()))
        return result
