"""The only importer of megatron.core."""
