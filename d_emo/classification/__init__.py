"""Classification backbones: what they have beside the block of `d_emo.models`."""
