"""What was generated and what people said of it: records, queue, ingest, store, import and export."""
