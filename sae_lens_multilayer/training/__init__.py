"""Training: the runner, its trainer and steps, and the folder of a run."""
