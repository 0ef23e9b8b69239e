"""What a user asks about a policy or a correction: exact bias and variance, layer sensitivity."""
