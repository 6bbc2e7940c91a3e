"""The device of the GPU tests and benchmarks: "cuda", or with FCOS_TEST_DEVICE=cpu a stand-in.

The stand-in runs small versions on the CPU: cuda_shim runs the kernels' CUDA text, and instead of
replaying a graph, its function is called again. Its times mean nothing.
`FCOS_TEST_DEVICE=cpu bash tests/gpu.sh` uses it to show that every line can run, before a minute on
a GPU is spent.
"""

import contextlib
import os
import time

import pytest
import torch

DEVICE = torch.device(os.environ.get("FCOS_TEST_DEVICE", "cuda"))
STAND_IN = DEVICE.type == "cpu"

needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (STAND_IN or torch.cuda.is_available()), reason="needs a CUDA device"),
]
only_cuda = pytest.mark.skipif(STAND_IN, reason="means nothing on the stand-in for a GPU")


def tensors(values):
    """Return the tensors in nested lists, tuples and dicts, in order."""
    if isinstance(values, torch.Tensor):
        return [values]
    if isinstance(values, dict):
        values = list(values.values())
    if isinstance(values, (list, tuple)):
        return [x for value in values for x in tensors(value)]
    return []


def capture(run, warmup=3):
    """Capture run() in a CUDA graph. Return a function that replays it, and the result tensors."""
    if STAND_IN:
        results = run()

        def replay():
            for old, new in zip(tensors(results), tensors(run()), strict=True):
                old.copy_(new)

        return replay, results
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warmup):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    return graph.replay, results


def synchronize():
    if not STAND_IN:
        torch.cuda.synchronize()


@contextlib.contextmanager
def waiting_is_an_error():
    """Raise an error if the CPU waits for the GPU in this context."""
    if STAND_IN:
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@contextlib.contextmanager
def late_stream():
    """Use a side stream that first sleeps for some milliseconds, and wait for it at the end."""
    if STAND_IN:
        yield
        return
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        yield
    stream.synchronize()


@contextlib.contextmanager
def exact_float32():
    """Compute products and convolutions in float32, without TF32."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def peak_bytes(run):
    """Return the peak of GPU memory that run() adds, in bytes; 0 on the stand-in."""
    if STAND_IN:
        run()
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def milliseconds(run, seconds=0.3):
    """Return the median time of a call over 10 rounds, which take about `seconds` together."""

    def rounds(count, repeat):
        times = []
        for _ in range(count):
            if STAND_IN:
                start = time.perf_counter()
                for _ in range(repeat):
                    run()
                times.append(1000 * (time.perf_counter() - start) / repeat)
                continue
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(repeat):
                run()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / repeat)
        return sorted(times)[count // 2]

    once = rounds(3, 1)
    if once > 100:  # torchvision's NMS of 75,000 candidates
        return once
    return rounds(10, max(1, int(1000 * seconds / 10 / max(once, 1e-3))))
