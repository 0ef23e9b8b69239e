"""The mathematics, pure torch: plans, advantages, importance ratios, objectives, diagnostics."""
