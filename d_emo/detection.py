"""EMOv2 under torchvision's detectors; see `d_emo.classification.detection`."""

from d_emo.classification.detection import mask_rcnn, retinanet, ssdlite

__all__ = ["mask_rcnn", "retinanet", "ssdlite"]
