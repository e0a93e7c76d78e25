"""What each stage found, as sections of the page: charts, tables and sentences read from the run's own files."""
