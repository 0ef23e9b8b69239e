"""The files of checkpoints, without torch: manifest, appearing whole, retention.

What the tensors in them mean is `mcore`'s business.
"""
