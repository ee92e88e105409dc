"""Several processes of one test."""

import os
from multiprocessing import set_forkserver_preload
from unittest.mock import patch

from filelock import FileLock
from torch import multiprocessing

LIBRARIES = [
    "torch",
    "peft",
    "transformers.trainer",
    "lora_one.runs.experiment",
    "tests.helpers.models",
    "tests.helpers.runs",
]


def results_of(work, count, name, tmp_path_factory):
    """The folder in which ``work(rank, folder)`` has put its results; the processes of all tests share it.

    It runs in ``count`` processes of one thread, forked from one that has the libraries.
    """
    top = tmp_path_factory.getbasetemp()
    folder = (top.parent if "PYTEST_XDIST_WORKER" in os.environ else top) / name
    with FileLock(f"{folder}.lock"), patch.dict(os.environ, OMP_NUM_THREADS="1"):
        if not folder.exists():
            began = tmp_path_factory.mktemp(f"{name}-began")
            set_forkserver_preload(LIBRARIES)  # before the first start in this session
            multiprocessing.start_processes(work, (began,), nprocs=count, start_method="forkserver")
            began.rename(folder)
    return folder
