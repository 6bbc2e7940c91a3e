import torch
from torch import Tensor

KINDS = ("iou", "linear_iou", "giou")


def iou_loss_ref(pred, target, weight, kind="giou"):
    """`iou_loss` in plain PyTorch: what the kernel must reproduce, and what runs on the CPU."""
    if pred.dtype != torch.float64:
        pred, target, weight = pred.float(), target.float(), weight.float()
    # torch.where on the inputs, not on the loss: 0 * NaN would come back in the gradient.
    counts = (weight != 0)[:, None]
    pred, target = torch.where(counts, pred, 1), torch.where(counts, target, 1)

    left, top, right, bottom = torch.minimum(pred, target).unbind(1)
    hull_left, hull_top, hull_right, hull_bottom = torch.maximum(pred, target).unbind(1)
    inter = (left + right) * (top + bottom)
    union = _area(pred) + _area(target) - inter
    iou = (inter + 1) / (union + 1)
    if kind == "iou":
        loss = -iou.log()
    elif kind == "linear_iou":
        loss = 1 - iou
    else:
        hull = (hull_left + hull_right) * (hull_top + hull_bottom) + 1e-7
        loss = 1 - (iou - (hull - union) / hull)
    return (weight * loss).sum()


def _area(ltrb):
    left, top, right, bottom = ltrb.unbind(1)
    return (left + right) * (top + bottom)


def iou_loss(pred: Tensor, target: Tensor, weight: Tensor, kind: str = "giou") -> Tensor:
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; choose one of {', '.join(KINDS)}")
    if pred.ndim != 2 or pred.shape[1] != 4 or target.shape != pred.shape:
        raise ValueError(f"pred and target must both be (N, 4) ltrb distances, got {tuple(pred.shape)} and {tuple(target.shape)}; reshape with .reshape(-1, 4)")
    if weight.shape != pred.shape[:1]:
        raise ValueError(f"weight must be (N,) = ({pred.shape[0]},), got {tuple(weight.shape)}; flatten it")
    return iou_loss_ref(pred, target.detach(), weight.detach(), kind)
