"""What the board can tell (resources), what follows from it (policy), and doing it (governor)."""
