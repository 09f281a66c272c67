"""What is compared: the catalogue, measures, records, reported numbers, claims."""
