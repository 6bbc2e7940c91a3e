"""Four kernels of FCOS, each a file to copy: IoU loss, focal loss, target assignment, NMS."""
