"""What all trainers share: the loop, its start and stops, checkpoints, averages, logs. Imports neither wing."""
