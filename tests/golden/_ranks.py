"""Runs a function on several real processes joined by gloo: `results = run_ranks(2, function, array, 3)`.

Import it as `from _ranks import run_ranks`; the conftest beside this file puts its folder on the path. The function is
named by file and name rather than pickled, because test and replay files are loaded by path and cannot be imported by name.
"""

from __future__ import annotations

import importlib.util
import inspect
import multiprocessing.connection
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

TIMEOUT_S = 120.0


def run_ranks(world_size: int, fn: Callable[..., Any], *args: Any, timeout_s: float = TIMEOUT_S) -> list[Any]:
    """Calls `fn(rank, world_size, *args)` in `world_size` processes, inside a gloo process group over loopback.

    Args:
        world_size: number of processes, >= 1; with 1 there is a process group of one.
        fn: a function at the top level of a file. `args` and what it returns are pickled: plain values,
            arrays, tensors without graph.
        timeout_s: seconds for everything: start, collectives, result.

    Returns:
        The results by rank.

    Raises:
        RuntimeError: with the first failing rank's traceback. What is still running is killed.
        TimeoutError: when the ranks do not end in time.
    """
    import torch.multiprocessing as mp

    source = inspect.getsourcefile(fn)
    assert source is not None, f"{fn!r} has no file"
    assert fn.__qualname__.isidentifier(), f"{fn!r} is not a function at the top level of a file"
    target = (str(Path(source).resolve()), fn.__qualname__)
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        call = (folder, world_size, target, pickle.dumps(args), timeout_s)
        processes = [mp.get_context("spawn").Process(target=_rank_main, args=(rank, *call), daemon=True) for rank in range(world_size)]
        try:
            for process in processes:
                process.start()
            _join(processes, Path(folder), time.monotonic() + timeout_s)
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                    process.join()
        return [pickle.loads(Path(folder, f"{rank}.result").read_bytes()) for rank in range(world_size)]


def _join(processes: list[Any], folder: Path, deadline: float) -> None:
    """Waits for all ranks; a rank that fails ends the wait at once, for its peers would wait for it in a collective."""
    waiting = dict(enumerate(processes))
    while waiting:
        multiprocessing.connection.wait([process.sentinel for process in waiting.values()], timeout=max(0.0, deadline - time.monotonic()))
        ended = [rank for rank, process in waiting.items() if not process.is_alive()]
        for rank in ended:
            code = waiting.pop(rank).exitcode
            if code != 0:
                error = folder / f"{rank}.error"
                raise RuntimeError(f"rank {rank} ended with exit code {code}\n{error.read_text() if error.exists() else ''}")
        if not ended and time.monotonic() >= deadline:
            raise TimeoutError(f"ranks {sorted(waiting)} did not end in time")


def _rank_main(rank: int, folder: str, world_size: int, target: tuple[str, str], args: bytes, timeout_s: float) -> None:
    try:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        store, timeout = f"file://{folder}/store", timedelta(seconds=timeout_s)
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size, timeout=timeout)
        result = _load(*target)(rank, world_size, *pickle.loads(args))
        dist.barrier()  # a rank that left early would break its peers' last collective
        Path(folder, f"{rank}.result").write_bytes(pickle.dumps(result))
        dist.destroy_process_group()
    except BaseException:
        Path(folder, f"{rank}.error").write_text(traceback.format_exc())
        raise


def _load(file: str, name: str) -> Callable[..., Any]:
    module_name = f"rank_target_{Path(file).stem.replace('-', '_')}"
    spec = importlib.util.spec_from_file_location(module_name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # where dataclasses look for the names in their annotations
    spec.loader.exec_module(module)
    function: Callable[..., Any] = getattr(module, name)
    return function
