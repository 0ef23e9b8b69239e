"""What is computed about the method rather than with it: exact gradients, their bias and variance."""
