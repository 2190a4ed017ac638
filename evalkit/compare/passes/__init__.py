"""What passes through the layers run, what each keeps, and how a comparison goes on that was killed."""
