"""Several processes of one test."""

import os
from multiprocessing import set_forkserver_preload
from unittest.mock import patch

from torch import multiprocessing

LIBRARIES = [
    "torch",
    "peft",
    "transformers.trainer",
    "lora_one.runs.experiment",
    "tests.helpers.models",
    "tests.helpers.runs",
]


def in_processes(work, count, *arguments):
    """Run ``work(rank, *arguments)`` in ``count`` processes of one thread, forked from one that has the libraries."""
    set_forkserver_preload(LIBRARIES)  # before the first start in this session
    with patch.dict(os.environ, OMP_NUM_THREADS="1"):
        multiprocessing.start_processes(work, arguments, nprocs=count, start_method="forkserver")
