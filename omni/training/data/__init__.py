"""What training reads: manifests, mixtures, recordings, batches."""
