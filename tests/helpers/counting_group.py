"""A process group of gloo that counts what this process passes to each collective operation."""

from collections import Counter
from datetime import timedelta

from torch import distributed as dist

COUNTED = ("allreduce", "reduce", "broadcast", "allgather", "_allgather_base", "gather", "scatter", "alltoall")


class CountingGroup(dist.ProcessGroup):
    """Passes every operation on to gloo. calls, sent: how often, and bytes of the tensors given to it, by operation."""

    def __init__(self, store, rank, count, timeout):
        super().__init__(rank, count)
        self.inner = dist.ProcessGroupGloo(store, rank, count, timeout)
        self.calls, self.sent = Counter(), Counter()

    def getBackendName(self):
        return "counting"

    def barrier(self, *arguments, **options):
        return self.inner.barrier(*arguments, **options)

    def take(self):
        """Return (calls, bytes) by operation since the last call."""
        found = dict(self.calls), dict(self.sent)
        self.calls.clear()
        self.sent.clear()
        return found


def counted(name):
    def operation(self, *arguments, **options):
        self.calls[name] += 1
        self.sent[name] += sum(size_of(tensor) for tensor in own_tensors(name, arguments))
        return getattr(self.inner, name)(*arguments, **options)

    return operation


def own_tensors(name, arguments):
    """The tensors that this process gives; the first argument of a gathering operation is what it gets."""
    given = arguments[1] if name in ("allgather", "_allgather_base", "gather", "scatter") else arguments[0]
    return given if isinstance(given, list) else [given]


def size_of(tensor):
    return tensor.numel() * tensor.element_size()


for operation in COUNTED:
    setattr(CountingGroup, operation, counted(operation))


def join(folder, rank, count):
    """Make a counting group the default one of this process, and return it."""
    groups = []

    def create(store, rank, count, timeout):
        groups.append(CountingGroup(store, rank, count, timeout))
        return groups[-1]

    dist.Backend.register_backend("counting", create, devices=["cpu"])
    where = {"init_method": f"file://{folder}/meeting", "rank": rank, "world_size": count}
    dist.init_process_group("counting", **where, timeout=timedelta(seconds=180))
    return groups[0]
