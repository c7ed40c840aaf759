"""Two processes as torchrun starts them, forked after the script's imports, which take longest.

    python forked.py SCRIPT ARGUMENT ...

runs the script's `main` in both. The parent keeps their store, as torchrun's agent does.
"""

import importlib
import os
import sys
import traceback
from pathlib import Path

import torch._dynamo  # noqa: F401 (which the first optimizer imports)
import torch.distributed as dist

COUNT = 2


def child(rank: int, port: str, script: Path, arguments: list[str]) -> None:
    """One process: torchrun's variables, then the script."""
    size, own = str(COUNT), str(rank)
    os.environ.update(RANK=own, LOCAL_RANK=own, WORLD_SIZE=size, LOCAL_WORLD_SIZE=size)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    os.environ.update(TORCHELASTIC_RUN_ID="forked", TORCHELASTIC_RESTART_COUNT="0")
    os.environ.update(TORCHELASTIC_USE_AGENT_STORE="True")
    sys.modules[script.stem].main(arguments)


def main(script: Path, arguments: list[str]) -> int:
    """0 if both ended well."""
    sys.path.insert(0, str(script.parent))
    importlib.import_module(script.stem)
    started = []
    for rank in range(COUNT):  # before the store, whose thread would not be there after a fork
        told, tell = os.pipe()
        if not (pid := os.fork()):
            code = 1
            try:
                os.close(tell)  # so that the read ends where the parent has died
                child(rank, os.read(told, 8).decode(), script, arguments)
                sys.stdout.flush()
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        started.append((pid, tell))
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for _, tell in started:
        os.write(tell, str(store.port).encode())
    return max(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 0 for pid, _ in started)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
