"""Images become batches."""
