import torch
from torch import Tensor


def batched_nms_ref(boxes, scores, labels, iou_threshold, max_detections):
    """`batched_nms` in plain PyTorch: what the kernel must reproduce, and what runs on the CPU."""
    (B, N), D = scores.shape, max_detections
    keep = torch.full((B, D), -1, dtype=torch.int64, device=boxes.device)
    if N == 0:
        return keep
    boxes, live = boxes.float(), scores.float()
    live = torch.where(live.isnan(), -torch.inf, live)  # a copy: suppressed candidates become -inf
    x1, y1, x2, y2 = boxes.unbind(2)
    area = (x2 - x1) * (y2 - y1)
    for d in range(D):
        score, best = live.max(dim=1, keepdim=True)  # the first of equal scores
        found = score > -torch.inf
        if not live.is_cuda and not found.any():
            break
        keep[:, d : d + 1] = torch.where(found, best, -1)
        bx1, by1, bx2, by2 = (c.gather(1, best) for c in (x1, y1, x2, y2))
        width = (torch.minimum(x2, bx2) - torch.maximum(x1, bx1)).clamp_(min=0)
        height = (torch.minimum(y2, by2) - torch.maximum(y1, by1)).clamp_(min=0)
        inter = width * height
        iou = inter / (area + area.gather(1, best) - inter)
        suppressed = (iou > iou_threshold) & (labels == labels.gather(1, best))
        live.masked_fill_(suppressed, -torch.inf).scatter_(1, best, -torch.inf)
    return keep


def batched_nms(boxes: Tensor, scores: Tensor, labels: Tensor, iou_threshold: float, max_detections: int) -> Tensor:
    if boxes.ndim != 3 or boxes.shape[2] != 4 or scores.shape != boxes.shape[:2] or labels.shape != boxes.shape[:2]:
        raise ValueError(f"boxes must be (B, N, 4), scores and labels (B, N), got {tuple(boxes.shape)}, {tuple(scores.shape)}, {tuple(labels.shape)}")
    if not 0 <= iou_threshold <= 1:
        raise ValueError(f"iou_threshold is {iou_threshold}; give a number from 0 to 1")
    if max_detections < 1:
        raise ValueError(f"max_detections is {max_detections}; give 1 or more")
    return batched_nms_ref(boxes, scores, labels, iou_threshold, max_detections)
