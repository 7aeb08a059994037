"""Text to batches: sources of documents, tokenizers, rows of tokens and the order in which training reads them."""
