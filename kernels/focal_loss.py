import torch
import torch.nn.functional as F
from torch import Tensor


def sigmoid_focal_loss_ref(logits, labels, alpha=0.25, gamma=2.0):
    """`sigmoid_focal_loss` in plain PyTorch: what the kernels must reproduce, and what runs on the CPU."""
    if logits.dtype != torch.float64:
        logits = logits.float()
    positive = (labels >= 0)[:, None]
    column = labels.clamp(min=0)[:, None]
    # z is the logit of the wrong answer: x for a negative class and -x for the positive one.
    own = logits.gather(1, column)
    z = logits.scatter(1, column, torch.where(positive, -own, own))
    cross_entropy = F.softplus(z)  # -log p_t
    loss = torch.exp(gamma * (z - cross_entropy)) * cross_entropy  # log(1 - p_t) = z - softplus(z)
    own = torch.where(positive, loss.gather(1, column), 0)
    return (1 - alpha) * loss.sum() + (2 * alpha - 1) * own.sum()


def sigmoid_focal_loss(logits: Tensor, labels: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits must be (N, K) with K > 0, got {tuple(logits.shape)}; reshape with .flatten(0, -2)")
    if labels.shape != logits.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(f"labels must be (N,) = ({logits.shape[0]},) int64, got {tuple(labels.shape)} {labels.dtype}; flatten and .long() them")
    return sigmoid_focal_loss_ref(logits, labels, alpha, gamma)
