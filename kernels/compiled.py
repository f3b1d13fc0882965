"""Numba compilation with a cache on disk that follows what the source says, not where it lies.

Numba's own cache belongs to a source folder. A Ray job unpacks its `working_dir` into a new
folder each time, so that cache would never hit there. This one lies in the user's cache folder
(`RAYGRAFT_CACHE_DIR` names another) and its key is made of contents:

- the source file of the function, and every file of its own package or of `raygraft` that this
  file imports, directly or not: Numba inlines callees and freezes global constants, so that a
  change in any of them must miss;
- further files named by `also=`, for what no import statement shows;
- the compiler options, the versions of Numba and llvmlite, and (by Numba) Python's version, the
  processor, and what the function closes over.

A change in a file that is not imported, such as the planner's, keeps the cache.

Processes that start together and miss the same code compile it once: see `compile_cache.py`. Code
that is found is loaded without what Numba does before it compiles (see `_FunctionCache`).
"""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import importlib.util
import inspect
import logging
import pickle
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar, overload

import llvmlite
import llvmlite.binding as llvm
import numba
import psutil
from numba.core import caching, sigutils
from numba.core.ccallback import CFunc
from numba.core.registry import cpu_target
from numba.core.runtime import _nrt_python

from raygraft.kernels.compile_cache import cache_folder, compiling, found_or_missed, used

Function = TypeVar("Function", bound=Callable[..., Any])

_log = logging.getLogger(__name__)
_OUR_PACKAGE = "raygraft"


@overload
def compiled(function: Function, /) -> Function: ...
@overload
def compiled(
    *, also: tuple[str | Path, ...] = (), **options: Any
) -> Callable[[Function], Function]: ...
def compiled(
    function: Function | None = None, /, *, also: tuple[str | Path, ...] = (), **options: Any
) -> Any:
    """`numba.njit` with the cache described above, as `@compiled` or `@compiled(nogil=True)`.

    `options` go to `numba.njit`. `also` names files that the key must include besides the imported
    ones. Types see the function itself; at run time it is a Numba dispatcher, with `.stats` for
    cache hits. A cache folder that cannot be written costs a warning in the log and compiling
    anew, no error.
    """

    def decorate(decorated: Function) -> Any:
        dispatcher = numba.njit(**options)(decorated)
        dispatcher._cache = _LazyCache(decorated, options, also)
        dispatcher.compile = compiling()(dispatcher.compile)
        return dispatcher

    return decorate if function is None else decorate(function)


def c_function(function: Callable[..., Any], signature: str) -> int:
    """Address of a function compiled for callers in C, from the same cache; it is never freed.

    `signature` is Numba's, such as "void(int64, int64)".
    """
    options: dict[str, Any] = {"nopython": True}
    cache = _LazyCache(function, options | {"c": signature}, ())
    with compiling():
        found = cache.load_c_function()
        if found is None:
            types = sigutils.normalize_signature(signature)
            made: Any = CFunc(function, types, locals={}, options=options)
            made.compile()
            cache.save_c_function(made)
            _loaded.append(made)
            return int(made.address)
        name, code = found
        return int(load_object(code).get_function_address(name))


_loaded: list[Any] = []
"""What owns code that is never freed."""


def load_object(code: bytes) -> llvm.ExecutionEngine:
    """Compiled code into memory, for good. Nothing else of a compiler is kept, or made ready."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine(jit=True)
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _loaded.append(engine)
    return engine


def content_key(files: list[Path]) -> str:
    """The hexadecimal digest of the sources that decide what a function compiles to."""
    digest = hashlib.sha256(f"{numba.__version__} {llvmlite.__version__}".encode())
    for file in files:
        digest.update(hashlib.sha256(_read(file)).digest())
    return digest.hexdigest()


def _files(function: Callable[..., Any], also: tuple[Any, ...]) -> list[Path]:
    """Every file that the key includes, in an order that does not depend on the folder."""
    roots = {function.__module__: Path(inspect.getfile(function))}
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # a cell not yet filled: the function names itself
            module = getattr(cell.cell_contents, "__module__", None)
            source = _source_of(module) if isinstance(module, str) else None
            if source is not None:
                roots[str(module)] = source
    imported = _closure(roots)
    return [imported[module] for module in sorted(imported)] + [Path(file) for file in also]


def _closure(roots: dict[str, Path]) -> dict[str, Path]:
    """Module names to files: the roots and what they import of their packages or of ours."""
    found = dict(roots)
    waiting = list(roots)
    followed = {_OUR_PACKAGE} | {module.partition(".")[0] for module in roots}
    while waiting:
        current = waiting.pop()
        is_package = found[current].name == "__init__.py"
        for name in _imported(
            found[current], current if is_package else current.rpartition(".")[0]
        ):
            if name in found or name.partition(".")[0] not in followed:
                continue
            source = _source_of(name)
            if source is not None:
                found[name] = source
                waiting.append(name)
    return found


def _imported(file: Path, package: str) -> tuple[str, ...]:
    """All names that could be modules in the import statements of a source file."""
    return _parse_imports(_read(file), package)


@functools.cache
def _parse_imports(source: bytes, package: str) -> tuple[str, ...]:
    return tuple(_import_names(ast.parse(source), package))


def _import_names(tree: ast.Module, package: str) -> Iterator[str]:
    for node in _statements(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            try:
                name = importlib.util.resolve_name(base, package)
            except ImportError:  # a relative import outside a package: it would fail at run time
                continue
            yield name
            yield from (f"{name}.{alias.name}" for alias in node.names)


def _statements(block: ast.AST) -> Iterator[ast.AST]:
    """All statements, and not what is in them: most nodes of a tree are expressions."""
    for part in ("body", "handlers", "orelse", "finalbody", "cases"):
        for node in getattr(block, part, ()):
            yield node
            yield from _statements(node)


@functools.cache
def _source_of(module: str) -> Path | None:
    """The source file of a module; None for a name that is none, or has no Python source."""
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, AttributeError, ValueError):
        return None
    origin = spec.origin if spec is not None else None
    return Path(origin) if origin is not None and origin.endswith(".py") else None


def _read(file: Path) -> bytes:
    status = file.stat()
    return _read_version(file, status.st_mtime_ns, status.st_size)


@functools.cache
def _read_version(file: Path, modified_ns: int, size: int) -> bytes:
    return file.read_bytes()


class _Locator(caching._CacheLocator):  # type: ignore[misc]  # numba is untyped
    """Where one function's compiled code lies: its module's folder, named by the module's key."""

    def __init__(self, function: Callable[..., Any], key: str, options: dict[str, Any]) -> None:
        self._path = cache_folder() / f"{function.__module__}-{key[:20]}"
        line = function.__code__.co_firstlineno
        words = [line, function.__qualname__, sorted(options.items())]
        self._own = hashlib.sha256(repr(words).encode()).hexdigest()[:12]
        self._py_file = inspect.getfile(function)  # numba names it in warnings

    def get_cache_path(self) -> str:
        return str(self._path)

    def get_source_stamp(self) -> None:
        return None  # the folder's name says it

    def get_disambiguator(self) -> str:
        return self._own


class _Implementation(caching.CompileResultCacheImpl):  # type: ignore[misc]  # numba is untyped
    """Numba's serialisation, with a locator that is given instead of searched for."""

    def __init__(self, function: Callable[..., Any], locator: _Locator) -> None:
        self._lineno = function.__code__.co_firstlineno
        self._locator = locator
        self._filename_base = self.get_filename_base(function.__qualname__, sys.abiflags)


class _EntryPerFile(caching.IndexDataCacheFile):  # type: ignore[misc]  # numba is untyped
    """One file per signature, named by a hash of its key, and no index.

    Numba numbers its data files in an index; two processes that compile different signatures at
    once can take the same number, and one then reads the other's code.
    """

    def __init__(self, folder: Path, base: str) -> None:
        super().__init__(str(folder), base, None)
        self._folder, self._base = folder, base

    def save(self, key: object, data: object) -> None:
        path = self._path(key)
        draft = path.with_suffix(f".{uuid.uuid4().hex[:12]}")
        draft.write_bytes(self._dump((key, data)))
        draft.replace(path)  # readers see the whole file or none

    def load(self, key: object) -> Any:
        path = self._path(key)
        try:
            saved_key, data = pickle.loads(path.read_bytes())
        except (OSError, EOFError, pickle.UnpicklingError):
            return None
        used(path)
        return data if saved_key == key else None

    def flush(self) -> None:
        for path in self._folder.glob(f"{self._base}-*.compiled"):
            path.unlink(missing_ok=True)

    def _path(self, key: object) -> Path:
        digest = hashlib.sha256(repr(key).encode()).hexdigest()[:20]
        return self._folder / f"{self._base}-{digest}.compiled"


class _FunctionCache(caching.FunctionCache):  # type: ignore[misc]  # numba is untyped
    """Numba's function cache with our locator and our files.

    Numba gets ready to compile before it looks for code: it imports what it knows of NumPy, which
    takes 0.3 s. Code that is found needs none of that, but for what it calls: so the names of these
    functions are kept with it, and only one that is not there yet makes Numba get ready.
    """

    def __init__(
        self, function: Callable[..., Any], options: dict[str, Any], files: list[Path]
    ) -> None:
        locator = _Locator(function, content_key(files), options)
        locator.ensure_cache_path()
        self._impl_class = functools.partial(_Implementation, locator=locator)
        super().__init__(function)
        self._cache_file = _EntryPerFile(Path(self._cache_path), self._impl.filename_base)

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        data = self._cache_file.load(self._index_key(sig, target_context.codegen()))
        if data is None:
            return None
        called, payload = data
        if not all(map(_address_of, called)):
            target_context.refresh()
        return self._impl.rebuild(target_context, payload)

    def _save_overload(self, sig: Any, data: Any) -> None:
        if self._impl.check_cachable(data):
            key = self._index_key(sig, data.codegen)
            self._impl.locator.ensure_cache_path()
            self._cache_file.save(key, (_calls_of(data.library), self._impl.reduce(data)))

    def load_c_function(self) -> tuple[str, bytes] | None:
        """The name and the object code of the one function that there is."""
        context = cpu_target.target_context
        data = self._cache_file.load(self._index_key(None, context.codegen()))
        if data is None:
            return None
        called, name, code = data
        if not all(map(_address_of, called)):
            context.refresh()
        return name, code

    def save_c_function(self, made: Any) -> None:
        library = made._library
        self._impl.locator.ensure_cache_path()
        data = _calls_of(library), made.native_name, library._get_compiled_object()
        self._cache_file.save(self._index_key(None, library.codegen), data)


def _calls_of(library: Any) -> list[str]:
    """The functions that compiled code finds elsewhere."""
    functions = library._final_module.functions
    return [f.name for f in functions if f.is_declaration and f.name[:5] != "llvm."]


@functools.cache
def _address_of(name: str) -> int | None:
    """Where a function is that compiled code calls, of this process or of Numba's runtime."""
    helper = _nrt_python.c_helpers.get(name.removeprefix("NRT_"))
    if helper is not None and name.startswith("NRT_"):
        llvm.add_symbol(name, helper)
    return llvm.address_of_symbol(name)  # type: ignore[no-any-return]


class _LazyCache(caching._Cache):  # type: ignore[misc]  # numba is untyped
    """A function's cache, made when it is first needed: most functions are parts of others.

    It is none where its folder cannot be written, or for sources that were edited after this
    process began: they may not be what it has loaded.
    """

    def __init__(
        self, function: Callable[..., Any], options: dict[str, Any], also: tuple[Any, ...]
    ) -> None:
        self._function, self._options, self._also = function, options, also

    @functools.cached_property
    def _own(self) -> Any:
        files = _files(self._function, self._also)
        if max(file.stat().st_mtime for file in files) > _process_start():
            return caching.NullCache()
        try:
            return _FunctionCache(self._function, self._options, files)
        except (OSError, RuntimeError) as error:
            name = self._function.__qualname__
            _log.warning("%s is compiled without a cache: %s", name, error)
            return caching.NullCache()

    @property
    def cache_path(self) -> Any:
        return self._own.cache_path

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        return found_or_missed(lambda: self._own.load_overload(sig, target_context))

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            self._own.save_overload(sig, data)
        except OSError as error:
            _log.warning("%s is not kept: %s", self._function.__qualname__, error)

    def load_c_function(self) -> tuple[str, bytes] | None:
        if isinstance(self._own, caching.NullCache):
            return None
        return found_or_missed(self._own.load_c_function)

    def save_c_function(self, made: Any) -> None:
        with contextlib.suppress(OSError):
            if not isinstance(self._own, caching.NullCache):
                self._own.save_c_function(made)

    def enable(self) -> None:
        self._own.enable()

    def disable(self) -> None:
        self._own.disable()

    def flush(self) -> None:
        self._own.flush()


@functools.cache
def _process_start() -> float:
    return psutil.Process().create_time()
