"""What is computed about the method rather than with it: gradients, their bias and variance."""
