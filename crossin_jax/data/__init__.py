"""Data: records, the mixture drawn from them, and how it becomes batches."""
