"""Run the CUDA text of kernels/*.py on the CPU: g++ compiles it behind cuda_shim.h.

The Python of the kernel files runs, too, except the CuPy launch: `install` replaces `_launch`.
"""

import ctypes
import functools
import itertools
import pathlib
import shutil
import subprocess
import tempfile

import numpy as np
import pytest
import torch

HEADER = pathlib.Path(__file__).with_name("cuda_shim.h")
# No fused multiply-adds: g++ would choose others than the GPU's compiler.
GXX = ["g++", "-std=c++17", "-O1", "-ffp-contract=off", "-fPIC", "-w"]
_count = itertools.count()


@functools.cache
def _folder():
    """Return a temporary folder with the precompiled header, which halves the time to compile."""
    if shutil.which(GXX[0]) is None:
        pytest.skip("running the CUDA text on the CPU needs g++")
    folder = tempfile.TemporaryDirectory()
    header = f"{folder.name}/cuda_shim.h.gch"
    subprocess.run([*GXX, "-x", "c++-header", str(HEADER), "-o", header], check=True)
    return folder


@functools.cache
def compile_text(source, names):
    """Compile the CUDA text `source`; return a library with its kernels `names`."""
    entries = "".join(
        f'extern "C" int run_{name}(const int* grid, int threads, bool reverse, void** args, '
        f"const int* sizes, int count)\n"
        f"{{ return shim::launch({name}, grid, threads, reverse, args, sizes, count); }}\n"
        for name in names
    )
    base = pathlib.Path(_folder().name) / str(next(_count))
    base.with_suffix(".cpp").write_text(f'#include "cuda_shim.h"\n{source}\n{entries}')
    files = ["-I", str(base.parent), f"{base}.cpp", "-shared", "-o", f"{base}.so"]
    subprocess.run([*GXX, *files], check=True)
    return ctypes.CDLL(f"{base}.so")


def launcher(source, names, reverse=False):
    """Return a `_launch` for the CPU. reverse: run the threads in reverse order."""
    library = compile_text(source, tuple(names))

    def launch(name, grid, threads, *args):
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        assert all(tensor.is_contiguous() for tensor in tensors)
        args = [np.int64(a.data_ptr()) if isinstance(a, torch.Tensor) else a for a in args]
        args = [np.asarray(a) for a in args]
        pointers = (ctypes.c_void_p * len(args))(*(a.ctypes.data for a in args))
        sizes = (ctypes.c_int * len(args))(*(a.itemsize for a in args))
        grid = (ctypes.c_int * 2)(*(*grid, 1)[:2])
        code = library[f"run_{name}"](grid, threads, reverse, pointers, sizes, len(args))
        if code:
            problem = ("", "the arguments are not the kernel's", "a barrier that not all reach")
            raise RuntimeError(f"{name}: {problem[code]}")

    return launch


def install(monkeypatch, module, source=None, reverse=False):
    """Make the public functions of a kernel file run its kernel on CPU tensors."""
    launch = launcher(source or module.CUDA_SOURCE, module.KERNELS, reverse)
    monkeypatch.setattr(module, "_launch", launch)
    monkeypatch.setattr(module, "_use_kernel", lambda like: True)
