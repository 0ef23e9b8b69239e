"""Files on the disk, without torch: durable, whole or absent, listed in a manifest, retained.

What they mean is the business of `mcore` and `hf`.
"""
