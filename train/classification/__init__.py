"""The classification wing of the trainers: options, plan, augmentation, distillation, validation."""
