"""How dsa-nano, the embedded checkpoint, was made: documents, tokenizer, model, optimizer, loop and evaluation."""
