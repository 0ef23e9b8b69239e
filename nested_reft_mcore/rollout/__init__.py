"""Records of completions, sampling from vocabulary shards, and the generation engine."""
