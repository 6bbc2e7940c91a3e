"""Training with the official weights: gradients, three steps of SGD, rates and parameter groups."""

import copy

import numpy as np
import pytest
import torch
from conftest import picture
from recorded import GOLDEN, golden_objects, official_model, our_names, read_golden

import fcos
import train


def backward(model, images, sizes, truths):
    """Compute the gradients of one step. Return the losses."""
    outputs = model(images, sizes)
    targets = model.targets(images.shape[2:], truths)
    losses = fcos.fcos_loss(outputs, targets, fcos.loss_normalizers(targets), **model.loss)
    model.zero_grad()
    sum(losses.values()).backward()
    return losses


def assert_losses_match(losses, expected):
    for part, name in (("cls", "cls"), ("box", "reg"), ("ctr", "centerness")):
        assert losses[part].item() == pytest.approx(expected[f"loss_{name}"], rel=1e-3), part


def assert_gradients_match(model, official_names, arrays, tolerance):
    """Compare norms, sums and first elements, the last in units of the mean element."""
    names = our_names(model)
    parameters = dict(model.named_parameters())
    trainable = {name for name, parameter in parameters.items() if parameter.requires_grad}
    assert {names[name] for name in official_names} == trainable
    for row, name in enumerate(official_names):
        gradient = parameters[names[name]].grad.double()
        l2 = arrays["grad_l2"][row]
        root = gradient.numel() ** 0.5
        assert gradient.norm().item() == pytest.approx(l2, rel=tolerance, abs=1e-12), name
        error = abs(gradient.sum().item() - arrays["grad_sum"][row])
        assert error <= tolerance * l2 * root, name
        first8 = arrays["grad_first8"][row][: gradient.numel()]
        error = np.abs(gradient.flatten()[:8].numpy() - first8).max()
        assert error <= 10 * tolerance * max(np.abs(first8).max(), l2 / root), name


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-3), (torch.float64, 1e-4)])
def test_gradients_of_a_step_match_the_official_code(dtype, tolerance):
    """In float32 rounding may flip a ReLU or two of such a small step; float64 is compared too."""
    facts, arrays = read_golden(GOLDEN / "train_imprv_R_50")
    model = copy.deepcopy(official_model("fcos_imprv_R_50_FPN")).to(dtype)
    images, sizes = fcos.pad_batch([picture(128, 160, seed) for seed in (11, 12)])
    losses = backward(model, images, sizes, golden_objects("", facts, arrays))
    assert_losses_match(losses, facts["losses"])
    assert_gradients_match(model, arrays["names"].tolist(), arrays, tolerance)
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    names = our_names(model)
    assert sorted(frozen) == sorted(names[name] for name in facts["frozen"])


def test_three_steps_of_sgd_match_the_official_code(shared):
    facts, arrays = read_golden(shared / "golden/train_step")
    model = copy.deepcopy(official_model("fcos_imprv_R_50_FPN")).train()
    optimizer = torch.optim.SGD(train.parameter_groups(model, 0.01), momentum=0.9)
    rates = [group["lr"] for group in optimizer.param_groups]
    images = torch.from_numpy(arrays["images"])
    truths = [
        {
            "boxes": torch.from_numpy(arrays[f"boxes{i}"]),
            "labels": torch.from_numpy(arrays[f"labels{i}"]).long() - 1,
        }
        for i in range(2)
    ]
    names = our_names(model)
    parameters = dict(model.named_parameters())
    for step in range(3):
        losses = backward(model, images, None, truths)
        assert_losses_match(losses, facts["sgd_losses"][step])
        if step == 0:
            assert_gradients_match(model, facts["trainable"], arrays, 1e-3)
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = train.lr_at(step, rate, 90_000, 500)
        optimizer.step()
        for row, name in enumerate(facts["trainable"]):
            parameter = parameters[names[name]].detach().double()
            l2 = arrays[f"param_l2_after_step{step + 1}"][row]
            assert parameter.norm().item() == pytest.approx(l2, rel=1e-5), name
            first8 = arrays[f"param_first8_after_step{step + 1}"][row][: parameter.numel()]
            found = parameter.flatten()[:8].numpy()
            tolerance = 1e-4 * np.abs(first8).max()
            np.testing.assert_allclose(found, first8, atol=tolerance, err_msg=name)


def test_parameter_groups_match_the_official_code(shared):
    facts, _ = read_golden(shared / "golden/train_step")
    with torch.device("meta"):
        model = fcos.build("fcos_imprv_R_50_FPN")
    name_of = {parameter: name for name, parameter in model.named_parameters()}
    found = {
        name_of[parameter]: (group["lr"], group["weight_decay"])
        for group in train.parameter_groups(model, 0.01)
        for parameter in group["params"]
    }
    names = our_names(model)
    expected = {
        names[name]: (group["lr"], group["weight_decay"])
        for group in facts["optimizer_groups_before_scheduler"]
        for name in group["names"]
    }
    assert found == expected


def test_learning_rates_match_the_official_code(shared):
    facts, _ = read_golden(shared / "golden/train_step")
    for step, rates in facts["lr_schedule"].items():
        rate = train.lr_at(int(step), 0.01, 90_000, 500)
        assert rate == pytest.approx(rates["weight"], rel=1e-12), step
        assert 2 * rate == pytest.approx(rates["bias"], rel=1e-12), step
