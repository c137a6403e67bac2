"""The one decorator under which edgert's kernels are compiled, and the cache that keeps their machine code.

Numba keys a cached function by its own file, so an edit of a function that it calls would run old code. Here the key
covers every source file that holds kernels or what they call, the versions of numba and llvmlite and the instruction
path: intrinsics and kernels may then live in different files, and an upgrade or an edit is always seen. A host
application's NUMBA_CACHE_DIR is neither read nor set.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import os
import re
import shutil
import stat
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite
import numba
from numba.core import config
from numba.core.caching import CompileResultCacheImpl, FunctionCache, _CacheLocator
from numba.core.compiler import Compiler
from numba.core.registry import CPUDispatcher

from edgert.quant import isa

JIT_ENABLED = not config.DISABLE_JIT
_STAMP = re.compile("[0-9a-f]{24}")
_KEPT_DAYS = 30  # since the kernels of a state of the sources were last used
WORK: Counter[str] = Counter()  # kernels that this process "compiled", and that it "found" in the cache
# What names of files begin with that hold no kernels, and nothing that kernels call or take a number from.
_NO_KERNELS = ("onnx_", "selection.", "split.", "verification")
_SOURCES = (("edgert.quant", "*.py"), ("edgert.devices", "*.py"), ("edgert.experts", "*_kernels.py"))


def cache_root() -> Path:
    """The folder under which compiled kernels are kept, one sub-folder for each state of the sources.

    It is in the user's cache folder; for a user without a home, in a folder of the temporary one that is theirs alone.
    """
    base = os.environ.get("XDG_CACHE_HOME")
    if not base:
        try:
            base = str(Path.home() / ".cache")
        except RuntimeError:  # neither HOME nor an entry in the list of users
            base = _private_folder(tempfile.gettempdir())
    return Path(base) / "edgert" / "kernels"


@functools.cache
def _private_folder(parent: str) -> str:
    """A folder that only this user can write, the same for all their processes: code is loaded from it."""
    user = os.getuid() if hasattr(os, "getuid") else 0
    path = Path(parent) / f"edgert-{user}"
    with contextlib.suppress(OSError):
        path.mkdir(mode=0o700)
    try:
        found = path.lstat()
        if stat.S_ISDIR(found.st_mode) and found.st_uid == user and not found.st_mode & 0o022:
            return str(path)
    except OSError:
        pass
    own = tempfile.mkdtemp(prefix="edgert-", dir=parent)  # somebody else took the name: this process compiles anew
    atexit.register(shutil.rmtree, own, ignore_errors=True)
    return own


@functools.cache
def _make_folder(path: Path) -> None:
    """Make the folder of one state of the sources, and remove those of others that were not used for long."""
    if path.is_dir():
        return
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    oldest = time.time() - 86400 * _KEPT_DAYS
    for other in path.parent.iterdir():
        with contextlib.suppress(OSError):  # another process removes it too
            if _STAMP.fullmatch(other.name) and other.stat().st_mtime < oldest:
                shutil.rmtree(other, ignore_errors=True)


@functools.cache
def _note_use(path: str) -> None:
    """Set the folder's time, which _make_folder goes by."""
    with contextlib.suppress(OSError):
        os.utime(path)


@functools.cache
def source_stamp() -> str:
    """Digest over all that decides the machine code except the CPU, which numba adds to its key by itself."""
    digest = hashlib.sha256(
        f"{numba.__version__} {llvmlite.__version__} {isa.choose().name} {isa.has_half_floats()}".encode()
    )
    for folder, pattern in _SOURCES:
        for path in sorted(_folder(folder).glob(pattern)):
            if not path.name.startswith(_NO_KERNELS):
                digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:24]


def _folder(name: str) -> Path:
    package = __import__(name, fromlist=["__path__"])
    return Path(next(iter(package.__path__)))


def cache_folder() -> Path:
    """The folder that keeps the kernels of the present sources; it may not be there yet."""
    return cache_root() / source_stamp()


class _KernelLocator(_CacheLocator):
    """Keeps machine code in the user's cache folder, in one sub-folder per source stamp."""

    def __init__(self, py_file: str) -> None:
        self._py_file = py_file
        self._path = cache_folder()

    def ensure_cache_path(self) -> None:
        _make_folder(self._path)
        tempfile.TemporaryFile(dir=self._path).close()

    def get_cache_path(self) -> str:
        return str(self._path)

    def get_source_stamp(self) -> str:
        return source_stamp()

    def get_disambiguator(self) -> str:
        return "k"

    @classmethod
    def from_function(cls, py_func: Any, py_file: str) -> _KernelLocator:
        return cls(py_file)


class _KernelCacheImpl(CompileResultCacheImpl):
    _locator_classes = (_KernelLocator,)


class _KernelCache(FunctionCache):
    """A cache that never stops the work: what cannot be read is compiled, what cannot be written is not kept."""

    _impl_class = _KernelCacheImpl

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            found = super().load_overload(sig, target_context)
        except Exception:  # a truncated or foreign pickle can raise anything
            with contextlib.suppress(OSError):
                self.flush()
            return None
        if found is not None:
            WORK["found"] += 1
            _note_use(self._cache_path)
        return found

    def save_overload(self, sig: Any, data: Any) -> None:
        WORK["compiled"] += 1
        with contextlib.suppress(OSError):
            super().save_overload(sig, data)

    def has_code(self) -> bool:
        """Whether machine code of the present sources is on disk, in some signature."""
        try:
            return bool(self._cache_file._load_index())
        except Exception:  # as above
            return False


class _Inner(CPUDispatcher):
    """A function that only compiled code calls: without what Python would need to, which takes time to compile."""

    def __call__(self, *arguments: Any) -> None:
        raise TypeError(f"{self.py_func.__name__} is called by compiled code alone")


def _compiled(function: Callable[..., Any], kind: Any, **options: bool) -> Any:
    if not JIT_ENABLED:
        return function
    targetoptions = {"nopython": True, "nogil": True, "error_model": "numpy", "boundscheck": False, **options}
    dispatcher = kind(py_func=function, locals={}, targetoptions=targetoptions, pipeline_class=Compiler)
    dispatcher._cache = _KernelCache(function)
    return dispatcher


def kernel(function: Callable[..., Any]) -> Any:
    """Compile `function` on its first call: nogil, no fastmath, no bounds checks, cached on disk.

    With NUMBA_DISABLE_JIT=1 the plain function comes back; the reference device then does the work.
    """
    return _compiled(function, CPUDispatcher)


def inner(function: Callable[..., Any]) -> Any:
    """The same for a function that is called by compiled code, or by its address, and never from Python."""
    return _compiled(function, _Inner, no_cpython_wrapper=True, no_cfunc_wrapper=True)


def is_compiled(dispatcher: Any) -> bool:
    """Whether a kernel is in the cache already, in some signature: tells a first run from a later one."""
    if not JIT_ENABLED or dispatcher.overloads:
        return True
    return bool(dispatcher._cache.has_code())
