"""Run a function in processes of its own: several that form a gloo group, or one that it may not survive.

Processes are forked from a server that has imported torch and Lightning and computed nothing. They start in a fraction
of the time that a new interpreter needs for these imports, and share no state with the test or with each other.
"""

import multiprocessing
import os
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed
import torch.multiprocessing

_TIMEOUT_S = 120
_PRELOADED = ["pytest", "torch.distributed.fsdp", "torch.distributed.tensor.parallel", "tests.helpers.training"]
CAN_SHARD = hasattr(torch.cpu.current_stream(), "record_event")  # without it `fully_shard` needs an accelerator

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(_PRELOADED)  # modules that compute nothing: threads do not survive a fork


def run(function: Callable[..., Any], num_processes: int, *args: Any, timeout_s: float = _TIMEOUT_S) -> list[Any]:
    """Call ``function(rank, *args)`` in each process and return the results by rank.

    ``function`` must be importable. When it is called, the group is not yet initialised: Lightning does that itself,
    other functions call :func:`join_group`.

    Raises:
        torch.multiprocessing.ProcessRaisedException: With the traceback of the first process that failed.
        TimeoutError: If a process did not end in time. All are killed.
    """
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        environments = [dict(os.environ) | _group_variables(rank, num_processes, port) for rank in range(num_processes)]
        context = torch.multiprocessing.start_processes(
            _in_group, (function, environments, folder, args), num_processes, join=False, start_method="forkserver"
        )
        deadline = time.monotonic() + timeout_s
        try:
            while not context.join(timeout=1):  # true when all have ended; raises when one has failed
                if time.monotonic() > deadline:
                    alive = [rank for rank, process in enumerate(context.processes) if process.is_alive()]
                    raise TimeoutError(f"Processes {alive} of {num_processes} did not end within {timeout_s} s.")
        finally:
            for process in context.processes:
                process.kill()
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(num_processes)]


def exit_code(function: Callable[..., Any], *args: Any, timeout_s: float = _TIMEOUT_S) -> int:
    """Call ``function(*args)`` in a process and return its exit status, or minus the signal that killed it."""
    process = _context.Process(target=_alone, args=(function, dict(os.environ), args))
    process.start()
    process.join(timeout_s)
    if process.exitcode is None:
        process.kill()
        raise TimeoutError(f"The process did not end within {timeout_s} s.")
    return process.exitcode


def join_group() -> None:
    """Join the group that the environment describes."""
    torch.distributed.init_process_group(
        "gloo", rank=int(os.environ["LOCAL_RANK"]), world_size=int(os.environ["WORLD_SIZE"])
    )


def _group_variables(rank: int, num_processes: int, port: int) -> dict[str, str]:
    return {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(num_processes),
        "NODE_RANK": "0",
        "LOCAL_RANK": str(rank),
    }


def _alone(function: Callable[..., Any], environment: dict[str, str], args: Any) -> None:
    _begin(environment)
    function(*args)


def _in_group(
    rank: int, function: Callable[..., Any], environments: list[dict[str, str]], folder: str, args: Any
) -> None:
    _begin(environments[rank])
    torch.save(function(rank, *args), Path(folder) / f"{rank}.pt")
    if torch.distributed.is_initialized():  # gloo processes that end without this abort now and then
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def _begin(environment: dict[str, str]) -> None:
    """Make a fork of the server as good as a new process."""
    torch.set_num_threads(1)
    os.environ.clear()  # the server keeps the environment in which it was started
    os.environ.update(environment)
    torch.seed()  # a fork inherits the state of generators; Python reseeds its own
    np.random.seed()  # noqa: NPY002
