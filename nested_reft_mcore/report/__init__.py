"""What a run has to say for itself: one page that opens anywhere, and plots for papers."""
