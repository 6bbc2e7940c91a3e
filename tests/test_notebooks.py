"""The notebooks: their committed form, and a run of each in memory on a small data set.

    python tests/test_notebooks.py              # run all, write outputs and pictures
    python tests/test_notebooks.py 03 06        # run these

Written are the cells' outputs without what goes to stderr (progress bars) and widgets, and
notebooks/images/.
They come from runs/shapes, runs/shapes_radius_0 (see 02_centerness), and for the photographs from
the BCCD data set of github.com/Shenggan/BCCD_Dataset in COCO's layout, with a model that
tests/benchmarks/accuracy.py has trained: runs/accuracy/imprv-1-900, copied to runs/bccd.
"""

import contextlib
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NAMES = (  # not a search: a reader's own notebooks are not tested
    "01_assignment",
    "02_centerness",
    "03_predictions",
    "04_your_data",
    "05_change_it",
    "06_deploy",
)
NOTEBOOKS = [ROOT / "notebooks" / f"{name}.ipynb" for name in NAMES]
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
WIDGET = "application/vnd.jupyter.widget-view+json"  # its state is not stored in the notebook
EVERY_MAP = """
for kind in MAPS:  # of 03_predictions
    for level in range(3, 8):
        draw(0, truth=False, kind=kind, level=level, label=0, zoom=False)
        plt.close()
"""
FLAGS = "--iters 60 --batch-size 8 --lr 0.02 --min-size 96 --max-size 136 --workers 0"
SHORT = {  # what a test puts in the place of a notebook's lines
    r"(?m)^STEPS = \d+$": "STEPS = 8",
    r'parse_args\(\["shapes"\]\)': f"parse_args({['shapes', *FLAGS.split()]})",
}


def execute(path, folder, then=None, replace=None):
    """Run the notebook at `path` in a new kernel that starts in `folder`, and return it.

    then: code of one more cell, which is not kept. replace: {pattern: text} of lines to change.
    Outputs on stderr and widgets are left out, and so is the widgets' state.
    """
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
            cell.outputs = [o for o in cell.outputs if is_kept(o)]
    notebook.metadata.pop("widgets", None)
    return notebook


def is_kept(output):
    """Return whether an output of a cell is committed: not progress bars, and no widgets."""
    return output.get("name") != "stderr" and WIDGET not in output.get("data", {})


def code_cells(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def kinds(cell):
    """Return what a cell shows: "stdout", or the richest form of a result or picture."""
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
    assert len(cells) < 20
    assert "widgets" not in notebook["metadata"]  # GitHub refuses some of its states
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    for before, cell in zip(cells, cells[1:]):  # a sentence before each
        assert cell["cell_type"] == "markdown" or before["cell_type"] == "markdown"
    for cell in code:
        assert "execution" not in cell["metadata"]  # no timestamps
        for output in cell["outputs"]:
            assert output["output_type"] != "error"
            assert is_kept(output)
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
    notebook = execute(path, start, EVERY_MAP if path.stem.startswith("03") else None, SHORT)
    committed = json.loads(path.read_text())
    for cell, before in zip(code_cells(notebook), code_cells(committed), strict=True):
        if "skipped; to run this cell: pip install" in str(cell.outputs):
            continue
        printed = {"stdout"} if "train.main" in cell.source else set()  # if there was no model
        assert set(kinds(cell)) - printed == set(kinds(before)) - printed, cell.source


@pytest.mark.browser
def test_the_viewer_reacts_in_a_browser(clone, tmp_path):
    """Run 03_predictions in JupyterLab, move the threshold, change the picture, see the figure
    change. With FCOS_SCREENSHOT=FILE, write a picture of the viewer."""
    playwright = pytest.importorskip("playwright.sync_api", reason="the browser needs playwright")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("the browser test needs Chromium: apt-get install chromium")
    if not (clone / "runs/shapes/model.pt").exists():  # this test alone was chosen
        execute(ROOT / "notebooks" / "02_centerness.ipynb", clone, replace=SHORT)
    source = (ROOT / "notebooks" / "03_predictions.ipynb").read_text()
    (clone / "notebooks" / "03_predictions.ipynb").write_text(source)
    with jupyter_lab(clone, tmp_path) as url, playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=BROWSER_FLAGS)
        page = browser.new_page(viewport={"width": 1500, "height": 1100})
        page.goto(f"{url}/lab/tree/notebooks/03_predictions.ipynb?token=fcos&reset")
        ready = page.locator(".jp-Notebook-ExecutionIndicator[data-status=idle]")
        ready.wait_for(state="attached", timeout=120_000)  # otherwise nothing would run
        figure = page.locator(".widget-image")
        for timeout in (60_000, 60_000, 120_000):  # JupyterLab drops a run while it still starts
            page.locator(".lm-MenuBar-item", has_text="Run").click()
            page.wait_for_timeout(1000)  # a menu that has just opened ignores the mouse
            page.locator(".lm-Menu-item[data-command='runmenu:run-all']").click()
            with contextlib.suppress(playwright.TimeoutError):
                figure.wait_for(state="attached", timeout=timeout)
                break
        assert figure.count(), page.locator(".jp-Notebook").inner_text()[-3000:]
        figure.scroll_into_view_if_needed()
        seen = [figure.get_attribute("src")]

        def wait_for_change():
            page.wait_for_function(
                "old => document.querySelector('.widget-image').src != old",
                arg=seen[-1],
                timeout=120_000,
            )
            seen.append(figure.get_attribute("src"))

        if "FCOS_SCREENSHOT" in os.environ:
            page.locator(".jp-OutputArea-output:has(.widget-image)").first.screenshot(
                path=os.environ["FCOS_SCREENSHOT"]
            )
        handle = page.locator(".widget-slider .noUi-handle")
        handle.focus()
        for _ in range(8):  # from 0.5 to 0.1
            handle.press("ArrowLeft")
        wait_for_change()
        page.get_by_role("button", name="next").click()
        wait_for_change()
        assert len(set(seen)) == 3
        shown = page.locator(".jp-Notebook").inner_text()
        assert "Traceback" not in shown and "Error displaying widget" not in shown
        browser.close()


LAB_SETTINGS = {
    "notebook-extension/tracker": {"windowingMode": "none"},  # render cells that are out of sight
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}
BROWSER_FLAGS = (  # the last three keep Chromium from asking for hosts of its own
    "--no-sandbox --disable-gpu --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync"
).split()


@contextlib.contextmanager
def jupyter_lab(folder, logs):
    """Start JupyterLab for `folder`, and yield its address without the token, which is "fcos"."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"]
    command += [f"--port={port}", "--IdentityProvider.token=fcos", f"--ServerApp.root_dir={folder}"]
    names = "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTERLAB_SETTINGS_DIR"
    private = {name: str(logs / name) for name in names}
    for extension, settings in LAB_SETTINGS.items():
        file = logs / f"JUPYTERLAB_SETTINGS_DIR/@jupyterlab/{extension}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(settings))
    log = (logs / "jupyter.log").open("w")
    server = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | private)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(120):
            try:
                urllib.request.urlopen(f"{url}/api?token=fcos")
                break
            except OSError:
                time.sleep(0.5)
        yield url
    finally:
        server.terminate()
        server.wait(30)


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


def write(numbers):
    import nbformat

    os.chdir(ROOT)
    images = ROOT / "notebooks" / "images"
    images.mkdir(exist_ok=True)
    for path in NOTEBOOKS:
        if numbers and path.stem[:2] not in numbers:
            continue
        if path.stem in PICTURES:
            name, expression = PICTURES[path.stem]
            quality = dict(quality=75, subsampling=0)
            then = f"{expression}.savefig('notebooks/images/{name}', dpi=72, pil_kwargs={quality})"
            execute(path, ROOT / "notebooks", then, PHOTOGRAPHS)
        notebook = execute(path, ROOT / "notebooks")
        notebook.metadata.language_info = {"name": "python"}
        stream = io.StringIO()
        nbformat.write(notebook, stream)
        path.write_text(stream.getvalue())
        print(path.relative_to(ROOT), path.stat().st_size, "bytes")
    if not numbers:
        draw_detections().save(images / "detections.jpg", quality=88)


if __name__ == "__main__":
    write(sys.argv[1:])
