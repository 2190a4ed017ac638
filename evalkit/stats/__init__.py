"""How sure a difference between two candidates is."""
