"""EMOv2 under torchvision's detectors, as published: SSDLite, RetinaNet and Mask R-CNN.

    from d_emo.detection import retinanet
    model = retinanet("EMOv2-5M")                                # COCO's 80 classes, fresh weights
    losses = model.train()(images, targets)                      # a dictionary of losses
    found = model.eval()(images)                                 # a list of boxes, scores, labels, (masks)

Needs torchvision. Importing this package imports PyTorch; `import d_emo` does not.
"""

try:
    import torchvision.models.detection  # noqa: F401
except ImportError as error:
    raise ImportError("d_emo.detection needs torchvision; pip install 'd-emo[eval]'.") from error

from d_emo.detection.detectors import mask_rcnn, retinanet, ssdlite

__all__ = ["mask_rcnn", "retinanet", "ssdlite"]
