"""The CUDA text of the kernels: the comparisons notice mistakes in it, and it compiles for GPUs."""

import re

import cuda_shim
import numpy as np
import pytest
import torch
from kernel_inputs import (
    FILES,
    candidates,
    check_assign,
    check_focal_loss,
    check_focal_loss_writes_no_more_than_the_gradient,
    check_iou_loss,
    check_nms,
    location_grid,
    random_boxes,
)

pytestmark = pytest.mark.usefixtures("seeded")


# ---- planted faults

FAULTS = {
    "iou_loss": [
        ("-(1.0f + iou)", "(1.0f + iou)"),
        ("fminf(p.z, t.z)", "fminf(p.w, t.z)"),
        ("x_hull * (1.0f - s)", "x_hull * s"),
        ("0.0f : 0.5f", "0.0f : 1.0f"),
        ("grad && i < n", "grad && i < n - 1"),
        ("if (w != 0.0f)", "if (i < n)"),
        ("__syncthreads();", ""),
        ("kind == 2 || kind == 3", "kind == 3"),
        ("kind == 3 ? 0.0f", "kind == 4 ? 0.0f"),
        ("kind == 3 ? 1e-7f", "kind == 4 ? 1e-7f"),
    ],
    "focal_loss": [
        ("labels[row++]", "labels[row]"),
        ("start += classes", "start += classes + 1"),
        ("start + (int)label : -1", "start + (int)label + 1 : -1"),
        ("label >= 0 && label < classes", "true"),
        ("else if (j < count)", "else"),
        ("1/3.0f", "1/2.0f"),
        ("positive ? -x : x", "x"),
        ("GRAD ? -alpha", "GRAD ? alpha"),
        ("(1.0f - alpha) * *upstream", "1.0f - alpha"),
        ("gamma * (1.0f - q)", "gamma * q"),
        ("fminf(z, 0.0f) - tail", "fminf(z, 0.0f) + tail"),
        ("bits + 0x7fff", "bits"),
        ("total - i < SIZE ? total - i : SIZE", "SIZE"),
        ("grad[i + j] = out", "grad[i] = out"),
        ("__syncthreads();", ""),
    ],
    "assign": [
        ("area < smallest", "area <= smallest"),
        ("furthest <= hi", "furthest < hi"),
        ("x < cx + reach", "x < cx - reach"),
        ("start + j - first", "start + j"),
        ("points[5 * p + 2]", "points[5 * p + 3]"),
        ("__syncthreads();  // wait", "// wait"),
        ("__syncthreads();\n        const", "const"),
    ],
    "nms": [
        ("> iou_threshold", ">= iou_threshold"),
        ("| ~(unsigned)i", "| (unsigned)i"),
        ("bits == 0x80000000u", "false"),
        ("labels[i] == label", "true"),
        ("keys[i] = 0;", ""),
        ("~bits : bits", "bits : bits"),
        ("round % 2", "0"),
        ("__syncthreads();", ""),
        ("return 0;", "return 1;"),
    ],
}


def small_check(name):
    """Run the few comparisons that are needed to notice every planted fault."""
    if name == "iou_loss":
        check_iou_loss(257, "giou")
        check_iou_loss(257, "giou_exact")
    elif name == "focal_loss":
        check_focal_loss(1, 1, torch.float32)
        check_focal_loss(257, 3, torch.float32)
        check_focal_loss(257, 80, torch.bfloat16)
        check_focal_loss_writes_no_more_than_the_gradient()
    elif name == "assign":
        points = torch.cat((location_grid(100, 140), torch.tensor([[64.0, 32, 8, -1, 64]])))
        box = torch.tensor([[0.0, 0, 100, 60]])
        check_assign(points, [box, box.repeat(3, 1), random_boxes(600, 100, 140)], 1.5)
        check_assign(points, [box], 0)
    else:
        zeros = torch.tensor([[0.0, -0.0, 0.0, -0.0, torch.nan]])
        boxes = [[0.0, 0, 4, 4], [0, 0, 4, 2], [8, 8, 9, 9], [0, 0, 4, 3], [0, 0, 1, 1]]
        check_nms(torch.tensor([boxes]), zeros, torch.zeros(1, 5, dtype=torch.int64))
        check_nms(*candidates(2, 96, 2, levels=20), limit=40)


@pytest.mark.parametrize("name", FILES)
def test_the_true_text_passes_the_small_check(name, on_shim):
    small_check(name)


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [(name, *fault) for name, faults in FAULTS.items() for fault in faults],
)
def test_a_planted_fault_is_noticed(name, right, wrong, monkeypatch):
    file = FILES[name]
    assert right in file.CUDA_SOURCE
    noticed = False
    for reverse in (False, True):
        cuda_shim.install(monkeypatch, file, file.CUDA_SOURCE.replace(right, wrong, 1), reverse)
        try:
            small_check(name)
        except (AssertionError, RuntimeError):
            noticed = True
    assert noticed


def test_the_shim_notices_other_argument_widths():
    file = FILES["iou_loss"]
    launch = cuda_shim.launcher(file.CUDA_SOURCE, file.KERNELS)
    with pytest.raises(RuntimeError, match="arguments"):
        launch("iou_loss", (1,), 32, *torch.zeros(5, 4), *np.int32([1, 0]))  # n is a long long


# ---- the compiler's view


@pytest.mark.parametrize("architecture", [75, 80, 90, 100, 120])
@pytest.mark.parametrize("name", FILES)
def test_nvrtc_compiles_the_kernels(name, architecture):
    nvrtc = pytest.importorskip("cuda.bindings.nvrtc", reason="NVRTC comes with PyTorch for CUDA")
    file = FILES[name]
    ok = nvrtc.nvrtcResult.NVRTC_SUCCESS
    _, program = nvrtc.nvrtcCreateProgram(file.CUDA_SOURCE.encode(), b"kernels.cu", 0, [], [])
    # The options of CuPy 14, and a report of registers.
    options = [*file.OPTIONS, "-ftz=true", "-std=c++17", "--device-as-default-execution-space"]
    options += [f"-arch=sm_{architecture}", "--ptxas-options=-v"]
    (result,) = nvrtc.nvrtcCompileProgram(program, len(options), [o.encode() for o in options])
    log = bytes(nvrtc.nvrtcGetProgramLogSize(program)[1])
    nvrtc.nvrtcGetProgramLog(program, log)
    log = log.decode(errors="replace")
    assert result == ok, log
    assert nvrtc.nvrtcGetCUBINSize(program)[1] > 1000

    report = dict.fromkeys(file.KERNELS)
    for kernel, text in re.findall(r"entry function '(\w+)'(.*?)(?=Compiling|\Z)", log, re.DOTALL):
        spills = sum(map(int, re.findall(r"(\d+) bytes spill", text)))
        stack = int(re.search(r"(\d+) bytes stack frame", text)[1])
        registers = int(re.search(r"Used (\d+) registers", text)[1])
        shared = re.search(r"(\d+) bytes smem", text)
        report[kernel] = registers, spills, stack, int(shared[1]) if shared else 0
    print(f"sm_{architecture} {name}: (registers, spills, stack, shared memory) {report}")
    for registers, spills, stack, _ in report.values():
        assert spills == 0
        assert stack == 0
        assert registers <= 64  # so that a block of 1,024 threads fits
