"""Runs a function in several processes that form a gloo group."""

import os
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed
import torch.multiprocessing

_TIMEOUT_S = 120
CAN_SHARD = hasattr(torch.cpu.current_stream(), "record_event")  # without it `fully_shard` needs an accelerator


def run(function: Callable[..., Any], num_processes: int, *args: Any, timeout_s: float = _TIMEOUT_S) -> list[Any]:
    """Call ``function(rank, *args)`` in each process; the results by rank.

    ``function`` must be importable. The group is not yet initialised when it is called: Lightning does that itself,
    others call :func:`join_group`.
    """
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        context = torch.multiprocessing.spawn(
            _process, (function, num_processes, port, folder, args), nprocs=num_processes, join=False
        )
        deadline = time.monotonic() + timeout_s
        while not context.join(timeout=1):  # true when all have ended; raises when one has failed
            if time.monotonic() > deadline:
                alive = [rank for rank, process in enumerate(context.processes) if process.is_alive()]
                for process in context.processes:
                    process.kill()
                raise TimeoutError(f"Processes {alive} of {num_processes} did not end within {timeout_s} s.")
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(num_processes)]


def join_group() -> None:
    """Join the group that the environment describes."""
    torch.distributed.init_process_group(
        "gloo", rank=int(os.environ["LOCAL_RANK"]), world_size=int(os.environ["WORLD_SIZE"])
    )


def _process(rank: int, function: Callable[..., Any], num_processes: int, port: int, folder: str, args: Any) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(num_processes),
        "NODE_RANK": "0",
        "LOCAL_RANK": str(rank),
    }
    torch.save(function(rank, *args), Path(folder) / f"{rank}.pt")
    if torch.distributed.is_initialized():  # gloo processes that end without this abort now and then
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
