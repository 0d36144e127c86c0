"""Compiles `megatron.core` for the active device; `torch` itself is never changed.

megatron-core names torch.cuda, `.cuda()`, device="cuda" and "torch.cuda.FloatTensor" about 400 times. A finder on
sys.meta_path loads its modules through a rewrite of the syntax tree:

    torch.cuda.X              -> __accelerator__.X      (the device's namespace, put into the module)
    x.cuda(...)               -> x.to(__accelerator__.current_device(), ...)
    "cuda"                    -> the device's name
    "torch.cuda.FloatTensor"  -> the device's tensor type name

On cuda nothing is rewritten. The compiled code is cached by source file, so only the first run pays for the rewrite.
"""

import ast
import hashlib
import importlib.abc
import importlib.machinery
import marshal
import os
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from modellink.device.base import Device

PACKAGE = "megatron.core"
_CACHE_TAG = f"1-{sys.implementation.cache_tag}"  # raise the number when the rewrite changes


class Rewrite(ast.NodeTransformer):
    """Rewrites one module's tree for the device called `name`."""

    def __init__(self, name: str):
        self.name = name
        self.tensor_prefix = "torch." if name == "cpu" else f"torch.{name}."

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        self.generic_visit(node)
        is_torch = isinstance(node.value, ast.Name) and node.value.id == "torch"
        if is_torch and node.attr == "cuda" and isinstance(node.ctx, ast.Load):
            return ast.copy_location(ast.Name("__accelerator__", ast.Load()), node)
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        function = node.func
        if not (isinstance(function, ast.Attribute) and function.attr == "cuda"):
            return node
        current = ast.Call(ast.Attribute(ast.Name("__accelerator__", ast.Load()), "current_device", ast.Load()), [], [])
        kept = [word for word in node.keywords if word.arg == "non_blocking"]
        return ast.copy_location(ast.Call(ast.Attribute(function.value, "to", ast.Load()), [current], kept), node)

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        value = node.value
        if value == "cuda":
            return ast.copy_location(ast.Constant(self.name), node)
        if isinstance(value, str) and value.startswith("torch.cuda.") and value.endswith("Tensor"):
            return ast.copy_location(ast.Constant(self.tensor_prefix + value.removeprefix("torch.cuda.")), node)
        return node


class RetargetLoader(importlib.machinery.SourceFileLoader):
    """Loads a source file through `Rewrite`, with the device's namespace in its globals."""

    device: Device

    def get_code(self, fullname: str) -> types.CodeType:
        path = self.get_filename(fullname)
        source = self.get_data(path)
        cached = _cache_file(path, source, self.device.name)
        try:
            return marshal.loads(cached.read_bytes())
        except (OSError, ValueError, EOFError, TypeError):
            pass
        tree = ast.fix_missing_locations(Rewrite(self.device.name).visit(ast.parse(source, path)))
        code = compile(tree, path, "exec", dont_inherit=True)
        _store(cached, marshal.dumps(code))
        return code

    def exec_module(self, module: types.ModuleType) -> None:
        module.__dict__["__accelerator__"] = self.device.namespace
        super().exec_module(module)
        if module.__name__ == f"{PACKAGE}.jit":
            # the fuser is torch.compile, which needs a C++ compiler at the first step; modules imported later
            # decorate their functions with whatever it is now
            module.disable_jit_fuser()


class RetargetFinder(importlib.abc.MetaPathFinder):
    """Finds modules of megatron.core and gives them a `RetargetLoader`."""

    def __init__(self, device: Device):
        self.device = device

    def find_spec(self, fullname: str, path: Sequence[str] | None,
                  target: types.ModuleType | None = None) -> importlib.machinery.ModuleSpec | None:
        if fullname != PACKAGE and not fullname.startswith(PACKAGE + "."):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            loader = RetargetLoader(spec.loader.name, spec.loader.path)
            loader.device = self.device
            spec.loader = loader
        return spec


def retarget(device: Device) -> None:
    """From now on `import megatron.core...` gives modules compiled for `device`.

    Raises:
        RuntimeError: megatron.core was already imported for another device in this process.
    """
    active = next((finder for finder in sys.meta_path if isinstance(finder, RetargetFinder)), None)
    if active is not None:
        if active.device.name != device.name:
            raise RuntimeError(f"megatron.core is already compiled for {active.device.name} in this process")
        return
    if device.name == "cuda":
        return
    if PACKAGE in sys.modules:
        raise RuntimeError("megatron.core was imported before modellink chose the device; import modellink first")
    sys.meta_path.insert(0, RetargetFinder(device))


def _cache_file(path: str, source: bytes, device_name: str) -> Path:
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "modellink" / "retarget"
    key = hashlib.sha256(b"\0".join([_CACHE_TAG.encode(), device_name.encode(), path.encode(), source])).hexdigest()
    return base / f"{key}.bin"


def _store(path: Path, data: bytes) -> None:
    """Write the cache file atomically; a read-only home only costs the cache."""
    beside: Any = path.with_suffix(f".{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_bytes(data)
        os.replace(beside, path)
    except OSError:
        beside.unlink(missing_ok=True)
