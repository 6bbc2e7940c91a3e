"""Quantize a trained model to int8 for the CPU, and measure what it costs in AP and saves in time.

    python tests/benchmarks/quantize.py MODEL.pt [FOLDER] --data data/coco [--out model_int8.xml]

Exports the model to ONNX and quantizes it with NNCF for OpenVINO and, for comparison, with ONNX
Runtime's static quantization, on a handful of images of the training split. Then every engine
detects in the whole validation split, one image at a time: AP, and the time of one call. Writes
FOLDER/quantize.json. Needs onnxscript and onnxruntime, and openvino and nncf for the former.
"""

import argparse
import contextlib
import functools
import pathlib
import tempfile

import record
import torch

import evaluate
import fcos

openvino = nncf = None
with contextlib.suppress(ImportError):
    import nncf
    import openvino
with contextlib.suppress(ImportError):
    import onnxruntime
    from onnxruntime import quantization


def prepared(model, dataset, count=None):
    """Yield (image number, numpy inputs of the exported model) for `count` images, or all."""
    total = len(dataset)
    for i in range(0, total, max(total // (count or total), 1)):
        size = fcos.resized_hw(*dataset.hw[i].tolist(), *model.test_size)
        batch, sizes = fcos.pad_batch([fcos.resize(dataset.image(i), size)])
        yield i, {"images": batch.numpy(), "sizes": sizes.numpy()}


def openvino_run(model, precision="f32"):
    """Return a function from inputs to detections. model: one of OpenVINO.

    It is compiled for every size of images: at dynamic sizes OpenVINO is many times slower.
    """
    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": precision,
    }

    @functools.cache
    def compiled(shape):
        model.reshape({"images": shape, "sizes": (shape[0], 2)})
        return openvino.compile_model(model, "CPU", settings)

    def run(inputs):
        found = compiled(inputs["images"].shape)(inputs)
        return {output.any_name: values for output, values in found.items()}

    return run


def quantize_openvino(path, examples):
    """Quantize an ONNX file with NNCF. examples: a list of inputs to calibrate with."""
    model = openvino.Core().read_model(path)
    return nncf.quantize(model, nncf.Dataset(examples), subset_size=len(examples))


def onnxruntime_run(path):
    """Return a function from inputs to detections."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda inputs: dict(zip(names, session.run(None, inputs)))


def quantize_onnxruntime(path, examples):
    """Quantize the convolutions of an ONNX file in place, with the inputs `examples`."""

    class Reader(quantization.CalibrationDataReader):
        def __init__(self):
            self.rest = iter(examples)

        def get_next(self):
            return next(self.rest, None)

    quantization.quantize_static(
        path, path, Reader(), op_types_to_quantize=["Conv"], per_channel=True
    )


def torch_run(model, bf16):
    """Return a function from inputs to detections in PyTorch; call it inside fcos.inference."""
    deployed = fcos.Deployed(model)

    def run(inputs):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, bf16):
            found = deployed(*map(torch.from_numpy, inputs.values()))
        return {name: values.numpy() for name, values in found.items()}

    return run


def average_precision(run, model, dataset):
    """Return the AP of `run` on all images of the data set."""
    results = []
    for i, inputs in prepared(model, dataset):
        found = {name: torch.from_numpy(values) for name, values in run(inputs).items()}
        found = fcos.as_list(found, 0.0)[0]
        found["boxes"] = model.rescale(found["boxes"], inputs["sizes"][0], dataset.hw[i])
        image_id = dataset.image_ids[i].item()
        rows = evaluate.result_rows(found, dataset.category_ids)
        results += [{"image_id": image_id, **row} for row in rows]
    return evaluate.score(results, dataset.annotations)["AP"]


def sides(model, dataset, examples, folder):
    """Return {name: make}, see Record.compare."""

    def export():
        path = f"{folder}/model.onnx"
        fcos.export_onnx(model, path, *examples[0]["images"].shape[2:])
        return path

    def side(make_run):
        run = make_run()
        return functools.partial(run, examples[0]), {"AP": average_precision(run, model, dataset)}

    def int8_onnxruntime():
        quantize_onnxruntime(path, examples)
        return onnxruntime_run(path)

    path = export()
    makes = {
        "PyTorch": lambda: torch_run(model, bf16=False),
        "PyTorch, bf16": lambda: torch_run(model, bf16=True),
        "ONNX Runtime": lambda: onnxruntime_run(path),
    }
    if nncf:
        read_model = openvino.Core().read_model
        makes["OpenVINO"] = lambda: openvino_run(read_model(path))
        makes["OpenVINO, bf16"] = lambda: openvino_run(read_model(path), "bf16")
        makes["OpenVINO, int8"] = lambda: openvino_run(quantize_openvino(path, examples))
    makes["ONNX Runtime, int8"] = int8_onnxruntime  # last, because it writes over the file
    return {name: functools.partial(side, make) for name, make in makes.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("model", help="a trained model.pt")
    parser.add_argument("--data", required=True, help="folder in COCO's layout")
    parser.add_argument("--calibrate", type=int, default=32, help="images (%(default)s)")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", help="where to save the model for OpenVINO, such as int8.xml")
    args = record.arguments(parser)
    model = fcos.load(args.model).eval()
    training, validation = (
        evaluate.CocoDataset(*evaluate.coco_paths(args.data, split))
        for split in ("train2017", "val2017")
    )
    examples = [inputs for _, inputs in prepared(model, training, args.calibrate)]
    log = record.Record(args.folder and f"{args.folder}/quantize.json")
    h, w = examples[0]["images"].shape[2:]
    with tempfile.TemporaryDirectory() as folder, fcos.inference(model):
        what = f"{model.name} on {pathlib.Path(args.data).name}, batch 1, {h}x{w}"
        log.compare(what, sides(model, validation, examples, folder), args.rounds, base="PyTorch")
        if args.out:
            path = f"{folder}/whole.onnx"
            fcos.export_onnx(model, path, h, w)
            openvino.save_model(quantize_openvino(path, examples), args.out)
    return log.failed


if __name__ == "__main__":
    raise SystemExit(main())
