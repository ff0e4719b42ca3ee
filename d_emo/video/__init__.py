"""V-EMOv2: video classification with the blocks of EMOv2 in time and space."""
