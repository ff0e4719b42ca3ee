"""EMOv2 and EMOv1 as classification backbones: networks, transformers' and timm's classes, detectors, export."""
