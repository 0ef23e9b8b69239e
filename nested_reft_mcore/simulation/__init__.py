"""An event simulation of steps on machines that nobody here has: rollout, update, failures."""
