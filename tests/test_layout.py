"""The repository as a whole: imports, the place of files, and every claim of the READMEs."""

import ast
import itertools
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate
import fcos
import train

ROOT = Path(__file__).resolve().parents[1]
READMES = [
    path
    for folder in ("", "kernels", "notebooks", "tests", "tests/benchmarks")
    if (path := ROOT / folder / "README.md").exists()
]

ARROWS = {  # what each may import of this repository
    "kernels": set(),
    "fcos": {"kernels"},
    "evaluate": {"fcos"},
    "train": {"evaluate", "fcos"},
}
TOP_LEVEL = {
    "kernels",
    "fcos.py",
    "evaluate.py",
    "train.py",
    "notebooks",
    "tests",
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "LICENSE",
    "requirements.txt",
    "pyproject.toml",
    ".ci",
    ".gitignore",
}


def repository_files():
    """Return the paths that are committed or staged, relative to the root; runs leave others."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [Path(name) for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_every_test_file_has_tests():
    for path in repository_files():
        if path.name.startswith("test_") and path.suffix == ".py":
            assert "\ndef test_" in (ROOT / path).read_text(), path


# ---- imports -----------------------------------------------------------------------------------


def imported(path):
    """Return the top-level names of all modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("kernels" if node.level else node.module.split(".")[0])
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names |= {a.value.split(".")[0] for a in node.args if isinstance(a, ast.Constant)}
    return names


SOURCES = [*sorted((ROOT / "kernels").glob("**/*.py")), *(ROOT / f"{name}.py" for name in ARROWS)]


@pytest.mark.parametrize("path", [p for p in SOURCES if p.exists()], ids=lambda p: p.stem)
def test_imports_go_one_way(path):
    own = ARROWS.keys() | {"tests", "notebooks"}
    part = path.relative_to(ROOT).parts[0].removesuffix(".py")
    assert imported(path) & own <= ARROWS[part]


def test_importing_loads_no_extra_and_wakes_no_gpu():
    code = """
import sys
import fcos, evaluate, train
import torch
extras = "cupy", "pycocotools", "hotcoco", "matplotlib", "notebook"
loaded = [name for name in extras if name in sys.modules]
assert not loaded, loaded
assert not torch.cuda.is_initialized()
assert not torch.distributed.is_initialized()
"""
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:__main__", "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == done.stderr == ""


# ---- files -------------------------------------------------------------------------------------


def test_the_top_level_holds_no_other_files():
    assert {path.parts[0] for path in repository_files()} <= TOP_LEVEL


def test_the_readme_of_the_tests_lists_every_test_file():
    listed = set(re.findall(r"`(test_\w+\.py)`", (ROOT / "tests" / "README.md").read_text()))
    committed = {path.name for path in repository_files() if path.name.startswith("test_")}
    assert listed == committed


def test_no_file_is_large():
    sizes = {str(path): (ROOT / path).stat().st_size for path in repository_files()}
    assert not {name: size for name, size in sizes.items() if size > 3_000_000}


# ---- the READMEs ------------------------------------------------------------------------------


def code_blocks(path):
    """Return (language, text) of the fenced and the indented code blocks of a README."""
    text = path.read_text()
    fenced = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
    blocks = [(match[1], match[2]) for match in fenced.finditer(text)]
    indented = re.compile(r"(?:^(?: {4}|\t).*\n(?:[ \t]*\n)*)+", re.M)
    blocks += [
        ("", re.sub(r"^(?: {4}|\t)", "", match[0], flags=re.M))
        for match in indented.finditer(fenced.sub("", text))
    ]
    return blocks


def all_code_blocks():
    return [block for path in READMES for block in code_blocks(path)]


def commands():
    """Return the words of every command in the code blocks, without comments."""
    lines = []
    for language, text in all_code_blocks():
        if language in ("python", "py", "text", "json"):
            continue
        for line in text.replace("\\\n", " ").splitlines():
            try:
                words = shlex.split(line.removeprefix("$ "), comments=True)
            except ValueError:
                continue  # prose
            if words and not re.match(r"[├└│]", words[0]):
                lines.append(words)
    return lines


def calls_of(script):
    """Return the arguments of every call of a script in the READMEs."""
    calls = []
    for words in commands():
        for k, word in enumerate(words):
            if word == script and re.search(r"\b(python3?|torchrun)\b", " ".join(words[:k])):
                rest = itertools.takewhile(lambda w: not re.match(r"[|;&>]", w), words[k + 1 :])
                calls.append(list(rest))
    return calls


def help_of(module, capsys):
    capsys.readouterr()
    with pytest.raises(SystemExit):
        module.parse_args(["--help"])
    return capsys.readouterr().out


@pytest.mark.parametrize("module", [train, evaluate], ids=lambda module: module.__name__)
def test_every_flag_of_the_readme_exists(module, capsys):
    known = set(re.findall(r"--[a-z][a-z-]*", help_of(module, capsys)))
    calls = calls_of(f"{module.__name__}.py")
    assert calls, f"the README shows no call of {module.__name__}.py"
    for words in calls:
        flags = {word.split("=")[0] for word in words if word.startswith("--")}
        assert flags <= known, f"{module.__name__}.py {' '.join(words)}"
        if not any(re.search(r"\.\.\.|\[|\$", word) for word in words):
            module.parse_args(words)  # would exit


def test_every_recipe_and_model_named_in_the_readme_exists():
    for words in calls_of("train.py"):
        recipe = train.parse_args(words).recipe
        assert recipe in train.RECIPES, recipe
    named = {name for path in READMES for name in re.findall(r"\bfcos_\w*FPN\w*", path.read_text())}
    assert named <= train.RECIPES.keys() | fcos.MODELS.keys()


def test_every_flag_in_the_text_of_the_readme_exists(capsys):
    known = set(re.findall(r"--[a-z][a-z-]*", help_of(train, capsys) + help_of(evaluate, capsys)))
    in_text = {
        flag for path in READMES for flag in re.findall(r"`(--[a-z][a-z-]*)", path.read_text())
    }
    elsewhere = {"--nproc_per_node", "--nnodes", "--standalone", "--max-restarts", "--upgrade"}
    elsewhere |= {"--small", "--only", "--signal"}  # of the benchmarks and of Slurm
    assert in_text <= known | elsewhere


def test_every_file_named_in_the_code_of_the_readme_exists():
    """Modules, notebooks, tests and pictures of this repository, but not the output of runs."""
    files = {path.as_posix() for path in repository_files()}
    ends = {"/" + name for name in files}
    made_by_runs = re.compile(r"^(runs|data|drawn|folder)/|^(photo|my|your)\b")
    word = re.compile(r"(?<![\w/.*-])(?:\./)?([\w.-]+(?:/[\w.-]+)*\.(?:py|ipynb|txt|toml|sh|md))\b")
    missing = set()
    for _, text in all_code_blocks():
        for name in word.findall(text):
            if not made_by_runs.match(name) and not any(end.endswith("/" + name) for end in ends):
                missing.add(name)
    assert not missing


def test_every_link_of_the_readme_into_the_repository_leads_somewhere():
    for path in READMES:
        links = re.findall(r"(?:\]\(|src=\")([^)\"#\s]+)", path.read_text())
        local = [link for link in links if not re.match(r"\w+:", link)]
        assert not [link for link in local if not (path.parent / link).exists()], path


def test_the_python_of_the_readme_names_what_exists():
    modules = {"fcos": fcos, "evaluate": evaluate, "train": train}
    for language, text in all_code_blocks():
        if language not in ("python", "py"):
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                if node.value.id in modules:
                    assert hasattr(modules[node.value.id], node.attr), ast.unparse(node)
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "kernels":
                assert (ROOT / (node.module.replace(".", "/") + ".py")).exists(), node.module


def write_clip(path, frames):
    """Write a video of grey frames."""
    import av

    with av.open(path, "w") as clip:
        stream = clip.add_stream("mpeg4", 5)
        stream.width, stream.height, stream.pix_fmt = 66, 98, "yuv420p"
        for _ in range(frames):
            frame = av.VideoFrame.from_ndarray(np.full((98, 66, 3), 99, np.uint8), format="rgb24")
            clip.mux(stream.encode(frame))
        clip.mux(stream.encode())


PYTHON = {
    f"{path.parent.name if path.parent != ROOT else 'root'} {number}": text
    for path in READMES
    for number, (language, text) in enumerate(code_blocks(path))
    if language == "python" and '.to("cuda")' not in text
}


@pytest.mark.parametrize("name", PYTHON)
def test_the_python_of_the_readme_runs(name, tmp_path, monkeypatch):
    """Each block runs in a folder with the files that the commands of the READMEs write: a data
    set, a model, a log, drawings and, if the block needs it, an ONNX file. The kernels are copied,
    too."""
    code = PYTHON[name]
    for path in (ROOT / "kernels").glob("[a-z]*.py"):
        shutil.copy(path, tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for module in {
        name.split(".")[0]
        for node in ast.walk(ast.parse(code))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in (
            [node.module]
            if isinstance(node, ast.ImportFrom)
            else [alias.name for alias in node.names]
        )
    }:
        pytest.importorskip(module)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    train.make_shapes("data/shapes", train=1, val=1)
    torch.manual_seed(0)
    model = fcos.build("shapes", 6, test_size=(64, 96))
    model.classes = [name for name, *_ in train.SHAPES.values()]
    model.category_ids = list(train.SHAPES)
    torch.nn.init.zeros_(model.head.cls.bias)  # finds something
    Path("runs/shapes").mkdir(parents=True)
    fcos.save(model, "runs/shapes/model.pt")
    Path("runs/shapes/log.jsonl").write_text('{"step": 1, "loss": 2}\n{"step": 2, "loss": 1}\n')
    evaluate.draw_folder(model, ["data/shapes/val2017"], "drawn", 0.3)
    if "model.onnx" in code:
        pytest.importorskip("onnxscript")
        fcos.export_onnx(model, "model.onnx", 64, 96)
    if "results.json" in code:
        dataset = evaluate.CocoDataset(*evaluate.coco_paths("data/shapes", "val2017"))
        Path("results.json").write_text(json.dumps(evaluate.predict(model, dataset, workers=0)))
    if "clip.mp4" in code:
        write_clip("clip.mp4", frames=3)
    exec(code, {})
    if "clip.mp4" in code:
        import av

        with av.open("drawn/clip.mp4") as clip:
            pictures = [frame.to_image() for frame in clip.decode(video=0)]
        assert len(pictures) == 3
        assert min(pictures[0].size) >= 480
