"""What a run will need and give, told before it starts: memory of every rank, time of a step."""
