"""The diffusion wing of the trainers: options, plan, objectives, what is shown, scored and published."""
