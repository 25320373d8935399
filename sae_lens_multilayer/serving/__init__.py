"""The served page: the report, and the reader's own text run through the model."""
