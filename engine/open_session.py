"""Opens an engine file on the device that it was built for."""

from pathlib import Path

from engine.backend import EngineError
from engine.cpu_session import CpuSession
from engine.session import Session
from qdbev import artifact


def open_session(path: Path, threads: int | None = None) -> Session | CpuSession:
    """Return the session of an engine, to be used in a `with` statement. `threads` is for engines of a CPU.

    Raises the errors of `Session` and `CpuSession`, and EngineError if `threads` is given for an engine of a GPU.
    """
    if artifact.unseal(path, "engine").facts.backend.name == "cpu":
        return CpuSession(path, threads)
    if threads is not None:
        raise EngineError(f"{path} runs on a GPU, where a number of threads has no effect; leave it out")
    return Session(path)
