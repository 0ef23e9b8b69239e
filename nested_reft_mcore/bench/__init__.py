"""How fast rollouts are: our own, what skipping could gain at best, and what others reach."""
