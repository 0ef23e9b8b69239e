"""Scaling studies: a grid of runs, planned, run here or under Slurm, and reported."""
