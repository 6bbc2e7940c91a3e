import torch
from torch import Tensor


def assign_ref(points, boxes, labels, center_radius):
    """`assign` in plain PyTorch: what the kernel must reproduce, and what runs on the CPU."""
    x, y, stride, lo, hi = points.unsqueeze(2).unbind(1)  # (P, 1) each
    reach = center_radius * stride
    results = []
    for image_boxes, image_labels in zip(boxes, labels, strict=True):
        best_area = points.new_full((len(points),), torch.inf)
        index = torch.full_like(best_area, -1, dtype=torch.int64)
        for start in range(0, len(image_boxes), 64):
            x1, y1, x2, y2 = image_boxes[start : start + 64].unbind(1)  # (G,) each
            furthest = torch.maximum(torch.maximum(x - x1, x2 - x), torch.maximum(y - y1, y2 - y))
            matches = (furthest >= lo) & (furthest <= hi)
            matches &= (x > x1) & (y > y1) & (x < x2) & (y < y2)
            if center_radius > 0:
                cx, cy = (x1 + x2) / 2, (y1 + y2) / 2
                matches &= (x > cx - reach) & (x < cx + reach) & (y > cy - reach) & (y < cy + reach)
            area = torch.where(matches, (x2 - x1) * (y2 - y1), torch.inf)
            area, first = area.min(dim=1)
            better = area < best_area
            best_area = torch.where(better, area, best_area)
            index = torch.where(better, first + start, index)
        if len(image_boxes) == 0:
            image_boxes, image_labels = image_boxes.new_zeros(1, 4), image_labels.new_zeros(1)
        matched = index.clamp(min=0)
        x1, y1, x2, y2 = image_boxes[matched].unbind(1)
        ltrb = torch.stack((x[:, 0] - x1, y[:, 0] - y1, x2 - x[:, 0], y2 - y[:, 0]), dim=1)
        background = index < 0
        results.append((image_labels[matched].masked_fill(background, -1), ltrb.masked_fill(background[:, None], 0), index))
    return tuple(torch.stack(column) for column in zip(*results, strict=True))


def assign(points: Tensor, boxes: list[Tensor], labels: list[Tensor], center_radius: float) -> tuple[Tensor, Tensor, Tensor]:
    if points.ndim != 2 or points.shape[1] != 5:
        raise ValueError(f"points must be (P, 5) = x, y, stride, lo, hi, got {tuple(points.shape)}")
    if len(boxes) == 0 or len(boxes) != len(labels):
        raise ValueError(f"boxes and labels must be lists with one tensor for each image, got {len(boxes)} and {len(labels)}")
    for image, (b, l) in enumerate(zip(boxes, labels, strict=True)):
        if b.ndim != 2 or b.shape[1] != 4 or l.shape != b.shape[:1]:
            raise ValueError(f"image {image}: boxes must be (G, 4) and labels (G,), got {tuple(b.shape)} and {tuple(l.shape)}")
    if not center_radius >= 0:
        raise ValueError(f"center_radius is {center_radius}; give 0 for the whole box or a positive number of strides")
    return assign_ref(points.float(), [b.float() for b in boxes], [l.long() for l in labels], center_radius)
