"""How images become batches, in an order and with randomness that are functions of (seed, position)."""
