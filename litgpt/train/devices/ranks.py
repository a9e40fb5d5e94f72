"""The processes of a run, one per device: which is the first, and how all of them end when one does."""

import atexit
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Optional

import torch

from litgpt.errors import UserError
from litgpt.train.signals import CODES, Signals, Stopped

if TYPE_CHECKING:
    from lightning.fabric import Fabric

exit_code: Optional[int] = None  # of this process, once its run is over
PATIENCE = 3.0  # seconds that a process with an error waits for the first rank to report it
LOST = ("connection closed by peer", "connection reset by peer", "connection refused", "broken pipe", "socket closed")


def is_first(fabric: "Fabric") -> bool:
    """Whether this is the process that prints and writes. Known before the launch."""
    environment = getattr(fabric.strategy, "cluster_environment", None)
    return environment is None or (environment.node_rank() == 0 and environment.local_rank() == 0)


def watch(fabric: "Fabric") -> None:
    """Start threads that end this process when its parent or one of its children has died. It may wait for hours in a
    collective operation; only a thread can end it."""
    environment = getattr(fabric.strategy, "cluster_environment", None)
    if environment is None:
        return
    atexit.register(leave)
    if environment.local_rank() > 0 or torch.distributed.is_torchelastic_launched():
        threading.Thread(target=end_with_parent, args=(os.getppid(),), daemon=True).start()
    elif not environment.creates_processes_externally:
        threading.Thread(target=end_with_children, args=(fabric.strategy.launcher,), daemon=True).start()


def leave() -> None:
    """Skip the interpreter's shutdown, where the threads of the process group may crash, or hang if it is destroyed."""
    if exit_code is not None:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):  # the stream is closed
                stream.flush()
        os._exit(exit_code)


def end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def end_with_children(launcher: Any) -> None:
    """End with the exit code of the first launched process that fails."""
    processes: list[subprocess.Popen] = []
    while True:
        time.sleep(0.2)
        while launcher.procs:  # empty the list, or Lightning's observer kills this process without a message
            processes.append(launcher.procs.pop(0))
        codes = [process.poll() for process in processes]
        if codes and not any(codes) and None not in codes:
            return
        for rank, code in enumerate(codes, start=1):
            if code in CODES.values():
                time.sleep(PATIENCE)  # a signal, which this process got too and reports
            if code:
                how = f"ended with exit code {code}" if code > 0 else f"was killed by signal {-code}"
                for process in processes:
                    process.kill()
                with suppress(OSError, ValueError):  # the stream is closed
                    sys.stdout.flush()
                    os.write(2, f"litgpt: error: Stopping: the process of device {rank} {how}.\n".encode())
                os._exit(code if code > 0 else 1)


@contextmanager
def together(fabric: "Fabric", signals: Signals) -> Iterator[None]:
    """A context in which an error on one rank ends all of them, with the message of the original cause.

    The first rank reports an error that all ranks have; the others wait for it to end them. They also wait after a lost
    connection, which means that another rank has failed before.
    """
    global exit_code
    try:
        yield
        exit_code = 0
    except (SystemExit, KeyboardInterrupt) as e:
        exit_code = e.code if isinstance(e, SystemExit) and isinstance(e.code, int) else 130
        raise
    except Exception as e:
        exit_code = 2 if isinstance(e, (UserError, OSError)) or is_lost_connection(e) else 1
        lost = is_lost_connection(e)
        if fabric.world_size == 1 or (is_first(fabric) and not lost):
            raise
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until and not signals.code:
            time.sleep(0.1)
        if signals.code:
            exit_code = signals.code
            raise Stopped(signals.code) from e
        if lost:
            raise UserError("Lost the connection to the process of another device, which has ended.") from e
        if isinstance(e, UserError):
            raise UserError(f"Device {fabric.global_rank}: {e}") from e
        raise


def is_lost_connection(error: BaseException) -> bool:
    """Whether a collective operation failed because another rank has ended."""
    text = str(error).lower()
    network = (torch.distributed.DistNetworkError, torch.distributed.DistBackendError)
    return isinstance(error, network) or (isinstance(error, RuntimeError) and any(words in text for words in LOST))
