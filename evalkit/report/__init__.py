"""What a run found, for a terminal, a pull request and a browser; read from its records and nothing else."""
