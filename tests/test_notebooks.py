"""The notebooks: their committed form, and a run of each in memory on a small data set.

    python tests/test_notebooks.py    # run them, write outputs and pictures

Written are the cells' outputs without what goes to stderr (progress bars), and notebooks/images/.
They come from runs/shapes, runs/shapes_radius_0 (see 02_centerness), and for the photographs from
the BCCD data set of github.com/Shenggan/BCCD_Dataset in COCO's layout, with a model that
tests/benchmarks/accuracy.py has trained: runs/accuracy/imprv-1-900, copied to runs/bccd.
"""

import io
import json
import os
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PICTURES = {  # photographs, by the notebook and the expression that draws them
    "01_assignment": ("assignment.jpg", "plot_assignment(EXAMPLE)"),
    "02_centerness": ("centerness.jpg", "plot_maps()"),
}
PHOTOGRAPHS = {  # what they put in the place of a notebook's lines
    r"(?m)^DATA, SPLIT = .*": 'DATA, SPLIT = "data/bccd", "val2017"',
    r"(?m)^MODEL, DATA, SPLIT = .*": (
        'MODEL, DATA, SPLIT = "runs/bccd/model.pt", "data/bccd", "val2017"'
    ),
}
ALL_LEVELS = "for level in range(3, 8):\n    heat_map(plt.gca(), c, level)"  # of 03_predictions
FLAGS = "--iters 60 --batch-size 8 --lr 0.02 --min-size 96 --max-size 136 --workers 0"
SHORT = {  # what a test puts in the place of a notebook's lines
    r"(?m)^STEPS = \d+$": "STEPS = 8",
    r'parse_args\(\["shapes"\]\)': f"parse_args({['shapes', *FLAGS.split()]})",
}


def execute(path, folder, then=None, replace=None):
    """The notebook at `path`, run in a new kernel that starts in `folder`; `then` is one more cell
    to run, which does not stay. `replace`: {pattern: text} of lines to change before."""
    nbclient = pytest.importorskip("nbclient", reason="running notebooks needs nbclient")
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(path, as_version=4)
    if then:
        notebook.cells.append(nbformat.v4.new_code_cell(then))
    for cell in notebook.cells:
        for pattern, text in (replace or {}).items():
            cell.source = re.sub(pattern, text, cell.source)
    client = nbclient.NotebookClient(
        notebook,
        timeout=3600,
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute()
    if then:
        notebook.cells.pop()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
    return notebook


def code_cells(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def kinds(cell):
    """What a cell shows: "stdout", or the richest form of a result or picture."""
    return [
        o["name"] if o["output_type"] == "stream" else sorted(o["data"])[0] for o in cell["outputs"]
    ]


# ---- the committed form ------------------------------------------------------------------------


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_form(path):
    text = path.read_text()
    assert len(text) < 400_000
    notebook = json.loads(text)
    cells, code = notebook["cells"], code_cells(notebook)
    assert len(cells) < 15
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    for before, cell in zip(cells, cells[1:]):  # a sentence before each
        assert cell["cell_type"] == "markdown" or before["cell_type"] == "markdown"
    for cell in code:
        assert "execution" not in cell["metadata"]  # no timestamps
        for output in cell["outputs"]:
            assert output["output_type"] != "error"
            assert output.get("name") != "stderr"
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_paths_of_a_machine(path):
    notebook = json.loads(path.read_text())
    for cell in code_cells(notebook):
        for output in cell["outputs"]:
            for name in [name for name in output.get("data", {}) if name.startswith("image/")]:
                del output["data"][name]  # base64 may spell anything
    found = re.search(r"(?<![\w.])/(home|root|tmp|work|usr|opt|Users|mnt)/|\w:\\\\", str(notebook))
    assert not found, f"{path.name} shows {found[0]}"


def test_pictures_of_the_readme_are_small():
    for name, _ in PICTURES.values():
        assert (ROOT / "notebooks" / "images" / name).stat().st_size < 200_000
    assert (ROOT / "notebooks" / "images" / "detections.jpg").stat().st_size < 200_000


# ---- a run -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A copy of the repository with a small data set; the first notebook that needs a model trains
    it there."""
    pytest.importorskip("nbclient", reason="running notebooks needs nbclient")
    import train

    root = tmp_path_factory.mktemp("clone")
    (root / "notebooks").mkdir()
    for name in ("fcos.py", "evaluate.py", "train.py", "kernels"):
        (root / name).symlink_to(ROOT / name)
    train.make_shapes(root / "data" / "shapes", train=64, val=24)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # on a busy machine, threads only wait
        yield root


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_from_top_to_bottom(path, clone):
    start = clone if path.stem.startswith("01") else clone / "notebooks"  # both must do
    notebook = execute(path, start, ALL_LEVELS if path.stem.startswith("03") else None, SHORT)
    committed = json.loads(path.read_text())
    for cell, before in zip(code_cells(notebook), code_cells(committed), strict=True):
        printed = {"stdout"} if "train.main" in cell.source else set()  # if there was no model
        assert set(kinds(cell)) - printed == set(kinds(before)) - printed, cell.source


# ---- writing -----------------------------------------------------------------------------------


def draw_detections(rows=2, columns=6, height=210):
    """The first twelve validation pictures, unchosen, with what the model finds, for the top of the
    README: all that scores at least the threshold of the best F1 over the 200 pictures."""
    from PIL import Image, ImageOps

    import evaluate
    import fcos

    model = fcos.load("runs/shapes/model.pt")
    dataset = evaluate.CocoDataset(*evaluate.coco_paths("data/shapes", "val2017"))
    results = evaluate.predict(model, dataset)
    metrics = evaluate.score(results, dataset.annotations, per_class=True)
    print({name: round(metrics[name], 3) for name in ("AP", "AP50", "AP75", "F1", "threshold")})
    sheet = Image.new("RGB", (columns * (height + 8) - 8, rows * (height + 8) - 8), "white")
    for i in range(rows * columns):
        image = dataset.image(i)
        found = model.predict(image, score_threshold=metrics["threshold"])[0]
        picture = evaluate.draw(image, found, model.classes, 0, min_side=400, font_size=20)
        picture = ImageOps.pad(picture, (height, height), color="white")
        sheet.paste(picture, (i % columns * (height + 8), i // columns * (height + 8)))
    return sheet


def write():
    import nbformat

    os.chdir(ROOT)
    images = ROOT / "notebooks" / "images"
    images.mkdir(exist_ok=True)
    for path in NOTEBOOKS:
        if path.stem in PICTURES:
            name, expression = PICTURES[path.stem]
            quality = dict(quality=75, subsampling=0)
            then = f"{expression}.savefig('notebooks/images/{name}', dpi=80, pil_kwargs={quality})"
            execute(path, ROOT / "notebooks", then, PHOTOGRAPHS)
        notebook = execute(path, ROOT / "notebooks")
        notebook.metadata.language_info = {"name": "python"}
        stream = io.StringIO()
        nbformat.write(notebook, stream)
        path.write_text(stream.getvalue())
        print(path.relative_to(ROOT), path.stat().st_size, "bytes")
    draw_detections().save(images / "detections.jpg", quality=88)


if __name__ == "__main__":
    write()
