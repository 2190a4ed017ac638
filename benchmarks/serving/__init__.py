"""This project's own path against vLLM's: answers, log-probabilities, divergence, layers, two GPUs."""
