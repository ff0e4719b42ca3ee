"""Names that a command line offers; nothing heavy is imported for them."""

# What can be computed.
METRICS = ("fid", "sfid", "is", "precision-recall", "kid")
# Formulas of guidance, of `d_emo.pipelines.guidance`, which imports PyTorch.
GUIDERS = ("cfg", "zero-star", "apg", "apg-mix", "tcfg")
# The protocols of `protocol.PRESETS`, for people.
PRESET_NOTES = {
    "dit-400k": "DiT at 400K, and the paper's Table XIV as far as it says: 250 ancestral steps, no guidance, ft-mse",
    "dit-script": "the defaults of DiT's sampling script: guidance 1.5 on three channels, ft-ema",
    "sit-sde": "SiT, stochastic: Euler-Maruyama, 250 evaluations, no guidance, ft-ema",
    "sit-ode": "SiT, deterministic: Heun, 249 evaluations, no guidance, ft-ema",
    "repa": "REPA: Euler-Maruyama, 250 evaluations, guidance 1.8 on the last 70% of the way, ft-ema",
    "lightningdit": "LightningDiT: 250 shifted Euler steps, guidance 6.7 on three channels after the first eighth",
    "rae": "RAE: 50 shifted Euler steps, balanced labels, no guidance (its guided scores take a second model)",
    "jit": "JiT: 50 Heun steps, balanced labels, guidance 3.0 after the first tenth, statistics of its own",
    "quick": "5,000 images (FID-5K), 50 DDIM or Euler steps, no guidance: for curves, not for comparison",
}
