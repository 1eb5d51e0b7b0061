"""What a chunk is, how it is hashed, and what a worker reports: the ground both halves stand on."""
